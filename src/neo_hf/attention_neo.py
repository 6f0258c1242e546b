"""
Attention over runs of keys: NEO's mask without a mask.

A query of NEO sees one run of keys, from where its document begins to itself or the end of its image. So two numbers
per query are the whole mask. On CPUs, attention goes tile by tile of queries over just the keys that a tile sees; on
CUDA the runs become the blocks of FlexAttention. Both are exact, and take memory that grows with the length.

Shapes: B rows, L new tokens, S keys (cached ones included), A attention heads, K key/value heads, D width of queries
and keys, V width of values.
"""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)

import os
import shutil
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._triton import has_triton
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK_SIZE = 128  # of FlexAttention
TILE_SIZE = 256  # queries of a tile: long enough for matrix products, short enough to waste little on its corners


@cache
def can_compile_kernels(device_type: str) -> bool:
    """Whether FlexAttention can be compiled for this kind of device. Without, it would make the L x S scores."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "cc", "gcc", "clang"]
    has_compiler = any(shutil.which(name) for name in names if name)
    return has_compiler and (device_type == "cpu" or has_triton())


class KeyRuns:
    """
    Each query sees the keys at places [first, last). Made once per forward and shared by all layers.

    Args:
        first, last: (B, L) int64. Neither falls along a row, and a query sees its own key; but for padding, which sees
            nothing: (S, 0).
        num_keys: S.
    """

    def __init__(self, first: torch.Tensor, last: torch.Tensor, num_keys: int):
        self.first, self.last, self.num_keys = first, last, num_keys

    def to(self, device, non_blocking: bool = False) -> "KeyRuns":
        """As tensors do: layers on several devices are handed the mask like any other input."""
        if self.first.device == torch.device(device):
            return self
        first, last = (x.to(device, non_blocking=non_blocking) for x in (self.first, self.last))
        return KeyRuns(first, last, self.num_keys)

    def contiguous(self) -> "KeyRuns":
        """As tensors are asked by `generate()`."""
        return self

    @cached_property
    def tiles(self) -> list[tuple[int, int, int, int, int, torch.Tensor | None]]:
        """
        Tiles of queries (row, start, end) and their keys (first, last); `hidden` (end - start, n) tells which of the
        last n keys a query does not see. Tiles do not reach across documents and leave out padding.
        """
        tiles = []
        for row, (first, last) in enumerate(zip(self.first.cpu(), self.last.cpu(), strict=True)):
            borders = [0, *((first[1:] != first[:-1]).nonzero()[:, 0] + 1).tolist(), len(first)]
            for begin, stop in pairwise(borders):
                if first[begin] >= last[begin]:
                    continue  # padding
                for start in range(begin, stop, TILE_SIZE):
                    end = min(start + TILE_SIZE, stop)
                    seen_by_all, seen_by_one = int(last[start]), int(last[end - 1])
                    hidden = None
                    if seen_by_all < seen_by_one:
                        hidden = torch.arange(seen_by_all, seen_by_one) >= last[start:end, None]
                    tiles.append((row, start, end, int(first[start]), seen_by_one, hidden))
        return tiles

    @cached_property
    def block_mask(self) -> BlockMask:
        """
        The mask of FlexAttention, equal to what `create_block_mask` finds by looking at each of the L x S pairs: runs
        that hang together leave no gap between the first and the last block that a block of queries sees.
        """
        first, last, num_keys = self.first, self.last, self.num_keys
        length = first.shape[1]
        padding = (0, -length % BLOCK_SIZE)
        firsts = F.pad(first, padding, value=num_keys).unflatten(1, (-1, BLOCK_SIZE))  # (B, blocks, BLOCK_SIZE)
        lasts = F.pad(last, padding, value=0).unflatten(1, (-1, BLOCK_SIZE))
        begins = BLOCK_SIZE * torch.arange(-(-num_keys // BLOCK_SIZE), device=first.device)
        ends = begins + BLOCK_SIZE
        seen = (firsts.amin(-1, keepdim=True) < ends) & (begins < lasts.amax(-1, keepdim=True))
        full = (firsts.amax(-1, keepdim=True) <= begins) & (ends <= lasts.amin(-1, keepdim=True))

        def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = blocks[:, None].int()
            order = blocks.argsort(dim=-1, descending=True, stable=True)
            return blocks.sum(-1, dtype=torch.int32), order.int()

        def is_seen(row, head, query, key):
            return (first[row, query] <= key) & (key < last[row, query])

        return BlockMask.from_kv_blocks(
            *ordered(seen & ~full),
            *ordered(full),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=is_seen,
            seq_lengths=(length, num_keys),
        )


class TiledAttention(torch.autograd.Function):
    """
    Attention of each tile as two matrix products around a softmax, in float32 or wider. Nothing of the size L x S is
    kept: the backward pass computes the weights of a tile anew.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, query, key, value, runs: KeyRuns, scale: float):
        """query (B, A, L, D), key (B, K, S, D), value (B, K, S, V) -> (B, L, A, V)."""
        ctx.save_for_backward(query, key, value)
        ctx.runs, ctx.scale = runs, scale
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        grouped_query, grouped_output = (_grouped(x, key) for x in (query, output.transpose(1, 2)))
        for new, seen, hidden in _tiles_of_heads(runs, key.shape[1]):
            weights = _weights(_widen(grouped_query[new]), _widen(key[seen]), scale, hidden)
            grouped_output[new] = (weights @ _widen(value[seen])).view(grouped_output[new].shape)
        return output

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, grad_output):  # type: ignore[override]
        inputs = ctx.saved_tensors
        query, key, value = inputs
        grads = [torch.zeros_like(_widen(x), memory_format=torch.contiguous_format) for x in inputs]
        grad_query, grad_key, grad_value = _grouped(grads[0], key), *grads[1:]
        grouped_query, grad_output = (_grouped(x, key) for x in (query, grad_output.transpose(1, 2)))
        for new, seen, hidden in _tiles_of_heads(ctx.runs, key.shape[1]):
            q, k, v, grad = (_widen(x) for x in (grouped_query[new], key[seen], value[seen], grad_output[new]))
            weights = _weights(q, k, ctx.scale, hidden)
            grad = grad.flatten(0, 1)
            grad_value[seen].addmm_(weights.T, grad)
            grad_scores = torch._softmax_backward_data(grad @ v.T, weights, -1, weights.dtype)
            grad_query[new] = (grad_scores @ k).mul_(ctx.scale).view(q.shape)
            grad_key[seen].addmm_(grad_scores.T, q.flatten(0, 1), alpha=ctx.scale)
        return *(grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None, None


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, A, ...) -> (B, K, A / K, ...): the queries that share a key."""
    return x.unflatten(1, (key.shape[1], -1))


def _tiles_of_heads(runs: KeyRuns, heads: int):
    """For each tile and key/value head: the index of its queries (grouped), the index of its keys, what is hidden."""
    for head in range(heads):
        for row, start, end, first, last, hidden in runs.tiles:
            yield (row, head, slice(None), slice(start, end)), (row, head, slice(first, last)), hidden


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float, hidden: torch.Tensor | None) -> torch.Tensor:
    """query (G, n, D), key (m, D), hidden (n, h): of the last h keys -> attention weights (G * n, m)."""
    scores = (query.flatten(0, 1) * scale) @ key.T
    if hidden is not None:
        last = scores.view(*query.shape[:2], -1)[..., -hidden.shape[1] :]
        last.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1, out=scores)


def attend_one_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """
    query (B, A, 1, D), key (B, K, S, D), value (B, K, S, V), mask (B, 1, 1, S), True where seen -> (B, 1, A, V). Reads
    keys and values once and in place, where SDPA on CPUs scales, widens and repeats them first.
    """
    query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # (B, K, A / K, D)
    scores = (query * scale) @ key.transpose(2, 3)
    if mask is not None:
        # Finite: a padded row that sees nothing yet would be NaN, and so would be all that it leaves in the cache.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).flatten(1, 2)[:, None]


def neo_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: KeyRuns | torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    The default attention, `attn_implementation="neo"`: for each mask that `create_neo_mask` makes, what is fastest.

    Args:
        query: (B, A, L, D).
        key, value: (B, K, S, D) and (B, K, S, V).
        attention_mask: `KeyRuns`, or what SDPA takes.

    Returns:
        (B, L, A, V) and no weights.
    """
    on_cpu = query.device.type == "cpu"
    if isinstance(attention_mask, KeyRuns):
        if on_cpu:
            return TiledAttention.apply(query, key, value, attention_mask, scaling), None
        block_mask = attention_mask.block_mask
        return flex_attention_forward(module, query, key, value, block_mask, scaling=scaling, **kwargs)[0], None
    is_plain = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1)
    if on_cpu and query.shape[2] == 1 and is_plain and not dropout:
        return attend_one_query(query, key, value, attention_mask, scaling), None
    # SDPA's fast kernels want values as wide as keys; a single query is faster without the copy.
    width = value.shape[-1]
    if query.shape[2] > 1:
        value = F.pad(value, (0, query.shape[-1] - width))
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output[..., :width], None


# Makes "neo" a known name. The model calls the function itself: another copy of this file may be registered by now.
ALL_ATTENTION_FUNCTIONS.register("neo", neo_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("neo", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])  # where there is but a dense mask
