"""
NEO's attention: which keys each query sees, which kernel computes it, and the kernels.

Attention is causal in text, bidirectional within an image and separate for the documents of a packed row (NEO paper,
section 3.1). So each query sees one run of keys, from the start of its document to itself or to the end of its image,
and two numbers per query define the mask (`KeyRuns`). On a CPU, attention is computed tile by tile, over only the keys
that a tile sees; on CUDA, runs become blocks of FlexAttention; everything else uses a dense mask. All are exact.

Shapes: B rows, L new tokens, S keys (cached ones included), A attention heads, K key/value heads, D width of queries
and keys, V width of values.
"""

from .configuration_neo import NeoTextConfig
from .indexing_neo import document_starts, image_ids

import os
import shutil
from collections.abc import Callable
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._triton import has_triton
from transformers.cache_utils import Cache
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

logger = logging.get_logger(__name__)

BLOCK_SIZE = 128  # queries and keys per block of FlexAttention
# Queries per tile: more make faster matrix products, fewer compute fewer hidden scores, which matter with few keys.
TILE_SIZES = (256, 512)
MIN_KEYS_PER_QUERY = 8  # of tiles larger than the smallest
KEY_BLOCK = 1024  # keys per block of a tile: few enough for its scores to stay in the processor's caches
# On CUDA, shorter prompts use SDPA with a dense mask: compiling a kernel would not pay off.
MIN_FLEX_LENGTH = 1024

# Shared memory per thread block, in bytes, of consumer cards and related ones (RTX 3090, 4090 and 5090, A10, L40S).
SMALL_SHARED_MEMORY = 101_376
HOPPER = (9, 0)  # compute capability of H100 and H200
MAX_QUERY_WIDTH = 256  # that of the released models, for which the blocks were chosen
MAX_FLEX_GRAPHS = 64


def plan_attention(
    config: NeoTextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: "torch.Tensor | KeyRuns | BlockMask | None",
    position_ids: torch.Tensor,
    cache: Cache | None = None,
    document_ids: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Callable, "torch.Tensor | KeyRuns | BlockMask | None"]:
    """
    Choose the attention function and mask for all layers of a forward; docs/design.md has a table of the choices.

    Args:
        config: `_attn_implementation` is "neo" (the fastest for the inputs), "eager", "sdpa", "flex_attention" or
            another one registered with transformers, which is used unchanged.
        inputs_embeds: (B, L, E); only its dtype and device are used.
        attention_mask: (B, S), 0 on padding, or a ready-made mask in any form that the functions below accept.
        position_ids: (3, B, L) T, H and W indices of the new tokens. Images lie wholly within the new tokens.
        cache: the cache before the new tokens are added.
        document_ids: (B, L), the same for all tokens of a document in a packed row.
        dropout: probability of attention dropout.

    Returns:
        A function with the signature of transformers' attention interfaces, and the mask to call it with.

    Raises:
        ValueError: `attention_mask` does not cover the cached and the new tokens.
    """
    implementation = config._attn_implementation
    if implementation not in ("neo", "eager", "sdpa", "flex_attention"):
        return ALL_ATTENTION_FUNCTIONS[implementation], attention_mask
    length, on_cpu = position_ids.shape[-1], inputs_embeds.device.type == "cpu"

    mask = attention_mask
    if mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        if length == 1:
            mask = mask_of_one_query(mask, cache, inputs_embeds.device)
        else:
            mask = find_key_runs(position_ids, mask, document_ids, cache)

    if isinstance(mask, KeyRuns):
        is_default = implementation == "neo" and mask.is_gapless and not dropout
        if is_default and on_cpu:
            return attend_by_tiles, mask
        is_long = inputs_embeds.device.type == "cuda" and length >= MIN_FLEX_LENGTH and not mask.is_causal
        takes_blocks = implementation == "flex_attention" or (is_default and is_long)
        if takes_blocks and _can_compile(inputs_embeds.device):
            _ = mask.block_mask  # built here, once: layers that are compiled one by one would each build it
            return attend_by_blocks, mask
        mask = None if mask.is_causal and implementation != "eager" else mask.dense()
    elif isinstance(mask, BlockMask):
        return attend_by_blocks, mask
    if implementation == "eager":
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(
                ~mask, torch.finfo(inputs_embeds.dtype).min
            )
        return eager_attention_forward, mask
    # One mask for all heads, and no float16, whose range the scores may exceed.
    is_plain = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    reads_in_place = inputs_embeds.device.type in ("cpu", "cuda") and inputs_embeds.dtype != torch.float16
    if reads_in_place and length == 1 and is_plain and not dropout:
        return attend_one_query, mask
    return attend_by_sdpa, mask


def _can_compile(device: torch.device) -> bool:
    if can_compile_kernels(device.type):
        return True
    logger.warning_once(
        "FlexAttention needs a C++ compiler, on CUDA Triton and a C compiler, which were not found: attention uses "
        "SDPA with a dense mask, whose size is the square of the length."
    )
    return False


@cache
def can_compile_kernels(device_type: str) -> bool:
    """Whether FlexAttention can be compiled for a device type. Uncompiled, it would materialise the L x S scores."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "cc", "gcc", "clang"]
    has_compiler = any(shutil.which(name) for name in names if name)
    return has_compiler and (device_type == "cpu" or has_triton())


def even_parts(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """
    Cut [start, end) into equal parts of at most 1.5 * size. A small rest would make an inefficient matrix product.
    """
    count = max(1, round((end - start) / size))
    return list(pairwise(start + (end - start) * i // count for i in range(count + 1)))


class KeyRuns:
    """
    A mask in which each query sees the attended keys at positions [first, last). Built once per forward and shared by
    all layers.

    Args:
        first, last: (B, L) int64. Neither decreases along a row, and a query sees its own key. Padding, which sees
            nothing, has (S, 0).
        num_keys: S.
        attended: (B, S) boolean, `None` if all keys of all runs are attended.
        is_causal: whether this is known to be the plain causal mask, with as many queries as keys.
    """

    def __init__(
        self,
        first: torch.Tensor,
        last: torch.Tensor,
        num_keys: int,
        attended: torch.Tensor | None = None,
        is_causal: bool = False,
    ):
        self.first, self.last, self.num_keys = first, last, num_keys
        self.attended, self.is_causal = attended, is_causal
        self._copies: dict[torch.device, KeyRuns] = {}

    def to(self, device, non_blocking: bool = False) -> "KeyRuns":
        """Like `Tensor.to`, since layers on several devices receive the mask as an input. One copy per device."""
        device = torch.device(device)
        if self.first.device == device:
            return self
        if device not in self._copies:
            first, last = (x.to(device, non_blocking=non_blocking) for x in (self.first, self.last))
            attended = None if self.attended is None else self.attended.to(device, non_blocking=non_blocking)
            self._copies[device] = KeyRuns(first, last, self.num_keys, attended, self.is_causal)
        return self._copies[device]

    @property
    def is_gapless(self) -> bool:
        """Whether the runs alone define the mask, and their values can be read."""
        return self.attended is None and not is_tracing(self.first)

    def dense(self) -> torch.Tensor:
        """(B, 1, L, S) boolean, True where a query sees a key."""
        keys = torch.arange(self.num_keys, device=self.first.device)
        seen = (self.first[..., None] <= keys) & (keys < self.last[..., None])
        return (seen if self.attended is None else seen & self.attended[:, None])[:, None]

    @cached_property
    def tiles(self) -> list[tuple[int, int, int, int, int, torch.Tensor | None]]:
        """
        Tiles of queries (row, start, end) and their keys (first, last); `hidden` (end - start, n) marks which of the
        last n keys a query does not see. Tiles stay within a document and skip padding.
        """
        tiles = []
        for row, (first, last) in enumerate(zip(self.first.cpu(), self.last.cpu(), strict=True)):
            borders = [0, *((first[1:] != first[:-1]).nonzero()[:, 0] + 1).tolist(), len(first)]
            for begin, stop in pairwise(borders):
                if first[begin] >= last[begin]:
                    continue  # padding
                num_keys = int(last[stop - 1] - first[begin])
                smallest, largest = TILE_SIZES
                size = min(max(smallest, num_keys // MIN_KEYS_PER_QUERY), largest)
                for start, end in even_parts(begin, stop, size):
                    seen_by_all, seen_by_one = int(last[start]), int(last[end - 1])
                    hidden = None
                    if seen_by_all < seen_by_one:
                        hidden = torch.arange(seen_by_all, seen_by_one) >= last[start:end, None]
                    tiles.append((row, start, end, int(first[start]), seen_by_one, hidden))
        return tiles

    @cached_property
    def block_mask(self) -> BlockMask:
        """
        The mask for FlexAttention, equal to what `create_block_mask` finds by evaluating all L x S pairs: the runs of
        adjacent queries touch, so there is no gap between the first and the last block that a block of queries sees.
        """
        first, last, num_keys, attended = self.first, self.last, self.num_keys, self.attended
        length = first.shape[1]
        padding = (0, -length % BLOCK_SIZE)
        firsts = F.pad(first, padding, value=num_keys).unflatten(1, (-1, BLOCK_SIZE))  # (B, blocks, BLOCK_SIZE)
        lasts = F.pad(last, padding, value=0).unflatten(1, (-1, BLOCK_SIZE))
        begins = BLOCK_SIZE * torch.arange(-(-num_keys // BLOCK_SIZE), device=first.device)
        ends = begins + BLOCK_SIZE
        seen = (firsts.amin(-1, keepdim=True) < ends) & (begins < lasts.amax(-1, keepdim=True))
        full = (firsts.amax(-1, keepdim=True) <= begins) & (ends <= lasts.amin(-1, keepdim=True))
        if attended is not None:
            blocks = F.pad(attended, (0, -num_keys % BLOCK_SIZE)).unflatten(1, (-1, BLOCK_SIZE))
            full = full & blocks.all(-1)[:, None]

        def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = blocks[:, None].int()
            order = blocks.argsort(dim=-1, descending=True, stable=True)
            return blocks.sum(-1, dtype=torch.int32), order.int()

        def is_in_run(row, head, query, key):
            return (first[row, query] <= key) & (key < last[row, query])

        def is_attended(row, head, query, key):
            return is_in_run(row, head, query, key) & attended[row, key]  # type: ignore[index]

        return BlockMask.from_kv_blocks(
            *ordered(seen & ~full),
            *ordered(full),
            BLOCK_SIZE=BLOCK_SIZE,
            mask_mod=is_in_run if attended is None else is_attended,
            seq_lengths=(length, num_keys),
        )


def mask_of_one_query(
    attention_mask: torch.Tensor | None, cache: Cache | None, device: torch.device
) -> torch.Tensor | None:
    """
    Boolean mask (B or 1, 1, 1, S) of a single new token per row, True where it sees a key: the attended cached keys
    and its own. `None` if it sees all keys.

    Args:
        attention_mask: (B, S), 0 on padding.
        cache: the cache before the new token enters it.

    Raises:
        ValueError: `attention_mask` does not cover the cached and the new tokens.
    """
    attended = None if attention_mask is None else attention_mask != 0
    if not getattr(cache, "is_compileable", False):
        _check_length(attention_mask, 0 if cache is None else cache.get_seq_length(), 1)
        return None if attended is None else attended[:, None, None]
    # In a static cache, the query's position is a tensor, and unused places follow it.
    num_keys, _ = cache.get_mask_sizes(1, 0)  # type: ignore[union-attr]
    seen = torch.arange(num_keys, device=device) <= torch.as_tensor(cache.get_query_offset(0), device=device)  # type: ignore[union-attr]
    if attended is not None:
        seen = seen & F.pad(attended, (0, num_keys - attended.shape[1]))
    return seen.view(-1, 1, 1, num_keys)


def _check_length(attention_mask: torch.Tensor | None, num_cached: int, num_new: int):
    if attention_mask is not None and attention_mask.shape[1] != num_cached + num_new:
        raise ValueError(
            f"attention_mask must cover {num_cached} cached and {num_new} new tokens, got "
            f"{tuple(attention_mask.shape)}."
        )


def find_key_runs(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> KeyRuns:
    """
    Find which keys each new token sees, in time and memory linear in the length.

    Args:
        position_ids: (3, B, L) T, H and W indices of the new tokens.
        attention_mask: (B, S), 0 on padding.
        document_ids: (B, L), the same for all tokens of a document in a packed row.
        cache: the cache before the new tokens are added.

    Raises:
        ValueError: `attention_mask` does not cover the cached and the new tokens.
    """
    temporal = position_ids[0]
    length = temporal.shape[1]
    offset: int | torch.Tensor = 0
    num_keys = length
    if cache is not None:
        offset = cache.get_query_offset(0)  # a tensor for static caches
        offset = offset.to(temporal.device) if isinstance(offset, torch.Tensor) else offset
        num_keys, _ = cache.get_mask_sizes(length, 0)
    places = torch.arange(length, device=temporal.device) + offset  # positions of the queries among the keys

    attended = is_padding = None
    if attention_mask is not None:
        if isinstance(offset, int):
            _check_length(attention_mask, offset, length)
        attended = F.pad(attention_mask != 0, (0, num_keys - attention_mask.shape[1]))
        is_padding = ~attended[:, places]
        if document_ids is not None:  # padding becomes a document of its own
            document_ids = document_ids.masked_fill(is_padding, document_ids.min() - 1)

    images = image_ids(temporal, document_ids)
    if is_padding is not None:
        images = images.masked_fill(is_padding, -1)
    continues = F.pad((images[:, 1:] == images[:, :-1]) & (images[:, 1:] >= 0), (0, 1))
    end = places[-1] + 1
    last = torch.where(continues, end, places + 1).flip(-1).cummin(-1).values.flip(-1)
    first = torch.zeros_like(last)
    if document_ids is not None:
        first = torch.where(document_starts(document_ids), places, 0).cummax(-1).values
    if attended is not None and is_padding is not None:
        if document_ids is None:
            first = attended.int().argmax(-1, keepdim=True).expand_as(last)
        first, last = first.masked_fill(is_padding, num_keys), last.masked_fill(is_padding, 0)
    if is_tracing(temporal):
        return KeyRuns(first, last, num_keys, attended)
    if document_ids is not None:  # padding is a document of its own
        return KeyRuns(first, last, num_keys)

    # Read everything that depends on values from the device at once.
    facts = [(images >= 0).any()]
    if attended is not None:
        start, count = attended.int().argmax(-1, keepdim=True), attended.sum(-1, keepdim=True)
        keys = torch.arange(num_keys, device=temporal.device)
        facts += [~attended.all(), (attended != (keys >= start) & (keys < start + count)).any()]
    has_images, *padding = torch.stack(facts).tolist()
    has_padding, has_gaps = padding or (False, False)
    return KeyRuns(
        first,
        last,
        num_keys,
        attended if has_gaps else None,
        is_causal=not (has_images or has_padding) and num_keys == length,
    )


class TiledAttention(torch.autograd.Function):
    """
    Attention of each tile as two matrix products around a softmax, for one block of keys after another, as in
    FlashAttention. No L x S tensor is stored: the backward pass recomputes each tile's weights.

    Scores, softmax and the backward pass are float32 or wider. Weights are rounded to meet bfloat16 values, as in SDPA
    and FlashAttention, since this product is twice as fast; float16 values are widened: CPUs multiply them slowly.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, query, key, value, runs: KeyRuns, scale: float):
        """query (B, A, L, D), key (B, K, S, D), value (B, K, S, V) -> (B, L, A, V)."""
        ctx.save_for_backward(query, key, value)
        ctx.runs, ctx.scale = runs, scale
        output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        grouped_query, grouped_output = (_grouped(x, key) for x in (query, output.transpose(1, 2)))
        memory = _scores_of_largest_tile(runs, grouped_query)
        for new, seen, hidden in _tiles_of_heads(runs, key.shape[1]):
            q = _widen(grouped_query[new]).flatten(0, 1)
            tile = _attend_tile(q, key[seen], value[seen], scale, hidden, memory)
            grouped_output[new] = tile.view(grouped_output[new].shape)
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
        memory = _scores_of_largest_tile(ctx.runs, grouped_query)
        for new, seen, hidden in _tiles_of_heads(ctx.runs, key.shape[1]):
            q, k, v, grad = (_widen(x) for x in (grouped_query[new], key[seen], value[seen], grad_output[new]))
            q, grad = q.flatten(0, 1), grad.flatten(0, 1)
            scores = _scores(q, k, ctx.scale, hidden, memory)
            weights = torch.softmax(scores, -1, out=scores)
            grad_value[seen].addmm_(weights.T, grad)
            grad_scores = torch._softmax_backward_data(grad @ v.T, weights, -1, weights.dtype)
            grad_query[new] = (grad_scores @ k).mul_(ctx.scale).view(grad_query[new].shape)
            grad_key[seen].addmm_(grad_scores.T, q, alpha=ctx.scale)
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


def _scores_of_largest_tile(runs: KeyRuns, grouped_query: torch.Tensor) -> torch.Tensor:
    """
    Memory for the scores of any tile. The allocator would give the scores of a long prompt back to the system after
    each tile, and every page of them would be cleared again for the next.
    """
    size = max(((end - start) * (last - first) for _, start, end, first, last, _ in runs.tiles), default=0)
    return _widen(grouped_query.new_empty(0)).new_empty(grouped_query.shape[2] * size)


def _attend_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    hidden: torch.Tensor | None,
    memory: torch.Tensor,
) -> torch.Tensor:
    """
    query (G * n, D), key (m, D), value (m, V), hidden (n, h) for the last h keys -> (G * n, V). All queries see the
    first key.
    """
    num_keys, is_bfloat16 = len(key), value.dtype == torch.bfloat16
    # bfloat16 values are multiplied with all weights at once: the product of each block would be rounded.
    blocks = even_parts(0, num_keys, num_keys if is_bfloat16 else KEY_BLOCK)
    if len(blocks) == 1:
        scores = _scores(query, key, scale, hidden, memory)
        weights = torch.softmax(scores, -1, out=scores)
        return weights.to(value.dtype) @ value if is_bfloat16 else weights @ _widen(value)
    seen_by_all = num_keys if hidden is None else num_keys - hidden.shape[1]
    output = query.new_zeros(len(query), value.shape[-1])
    # Of the scores so far: the largest, and the sum of exp(score - largest).
    largest, total = query.new_full((len(query), 1), -torch.inf), query.new_zeros(len(query), 1)
    for start, end in blocks:
        hidden_here = None
        if hidden is not None and end > seen_by_all:
            hidden_here = hidden[:, max(start - seen_by_all, 0) : end - seen_by_all]
        scores = _scores(query, key[start:end], scale, hidden_here, memory)
        before, here = largest, scores.amax(-1, keepdim=True)
        largest = torch.maximum(before, here)
        weights = torch.softmax(scores, -1, out=scores)
        added = torch.exp(here - largest) / weights.amax(-1, keepdim=True)  # the largest weight is 1 over the sum
        total = total * torch.exp(before - largest) + added
        output.lerp_(weights @ _widen(value[start:end]), added / total)
    return output


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, hidden: torch.Tensor | None, memory: torch.Tensor
) -> torch.Tensor:
    """
    query (G * n, D), key (m, D), hidden (n, h) for the last h keys -> scores (G * n, m), a view of `memory`. Hidden
    scores are finite, because a query may see no key of a block. Each product takes a block of keys: one with all keys
    of a long prompt is slower by a third.
    """
    scores = memory[: len(query) * len(key)].view(len(query), len(key))
    for start, end in even_parts(0, len(key), KEY_BLOCK):
        block = scores[:, start:end]
        torch.addmm(block, query, _widen(key[start:end]).T, beta=0, alpha=scale, out=block)
    if hidden is not None:
        last = scores.view(-1, *hidden.shape[:1], len(key))[..., -hidden.shape[1] :]
        last.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return scores


@torch.compiler.disable  # tiles depend on values: a compiled layer would be compiled anew for each layout
def attend_by_tiles(module, query, key, value, attention_mask: KeyRuns, scaling: float, **kwargs):
    """query (B, A, L, D), key (B, K, S, D), value (B, K, S, V) -> (B, L, A, V), `None`; same shapes below."""
    return TiledAttention.apply(query, key, value, attention_mask, scaling), None


def attend_by_blocks(module, query, key, value, attention_mask: KeyRuns | BlockMask, scaling: float, **kwargs):
    """FlexAttention. `kernel_options` (see `torch.nn.attention.flex_attention`) override those chosen for the card."""
    mask = attention_mask.block_mask if isinstance(attention_mask, KeyRuns) else attention_mask
    options = kwargs.pop("kernel_options", None) or {}
    if "BACKEND" not in options:
        # Not PyTorch's kernel for fewer than 128 queries: more than 128 per key/value head do not compile
        # (pytorch/pytorch#185349).
        options = {"FORCE_USE_FLEX_ATTENTION": True} | options
    options = (find_kernel_options(query) or {}) | options
    kwargs |= {"scaling": scaling, "kernel_options": options}
    if is_tracing(query):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)[0], None
    # A layout of heads takes up to five graphs. If dynamo gave up compiling, it would materialise the L x S scores.
    with torch._dynamo.config.patch(recompile_limit=MAX_FLEX_GRAPHS, fail_on_recompile_limit_hit=True):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)[0], None


def find_kernel_options(query: torch.Tensor) -> dict[str, int] | None:
    """Kernel options of FlexAttention for the queries' device; `None` for PyTorch's defaults."""
    if query.device.type != "cuda" or torch.version.cuda is None or query.shape[-1] > MAX_QUERY_WIDTH:
        return None
    properties = torch.cuda.get_device_properties(query.device)
    capability = properties.major, properties.minor
    return kernel_options_of(query.dtype, properties.shared_memory_per_block_optin, capability)  # type: ignore[attr-defined]


def kernel_options_of(dtype: torch.dtype, shared_memory: int, capability: tuple[int, int]) -> dict[str, int] | None:
    """
    Options of FlexAttention that make its kernels fit the shared memory of a card, and fast where that was measured.

    Args:
        dtype: dtype of the queries.
        shared_memory: maximum bytes per thread block.
        capability: compute capability.

    Returns:
        `kernel_options`; `None` for PyTorch's default blocks, made for up to 160 KB.
    """
    is_small = shared_memory <= SMALL_SHARED_MEMORY
    if dtype == torch.float32:  # the backward pass has small blocks anyway
        return _blocks("fwd", 32, 16, num_stages=2, num_warps=4) if is_small else None
    if is_small:
        return _blocks("fwd", 128, 32, num_stages=2, num_warps=8) | _blocks("bwd", 32, 32, num_stages=2, num_warps=4)
    if capability == HOPPER:
        return _blocks("fwd", 128, 64, num_stages=3, num_warps=8) | _blocks("bwd", 32, 128, num_stages=3, num_warps=8)
    return None


def _blocks(step: str, rows: int, columns: int, **launch: int) -> dict[str, int]:
    """Blocks of queries (rows) and keys (columns) of the "fwd" or "bwd" kernel. The latter also loops over queries."""
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns}
    if step == "bwd":
        blocks = {"BLOCK_M1": rows, "BLOCK_N1": columns, "BLOCK_M2": columns, "BLOCK_N2": rows}
    return {f"{step}_{name}": value for name, value in (blocks | launch).items()}


def attend_one_query(module, query, key, value, attention_mask: torch.Tensor | None, scaling: float, **kwargs):
    """
    A single query, with an attention mask (B, 1, 1, S), True where seen. Reads keys and values once and in place; SDPA
    on a CPU first scales, widens and repeats them, and on CUDA has one block of threads per head.
    """
    query = query.unflatten(1, (key.shape[1], -1)).squeeze(3) * scaling  # (B, K, A / K, D)
    on_cuda = query.device.type == "cuda"
    keeps_graph = torch.is_grad_enabled() or is_tracing(value)
    if on_cuda:
        scores = query @ key.transpose(2, 3)
    elif query.dtype == torch.bfloat16 and not keeps_graph:
        # Head by head: the product of batches would copy a cache that has room to grow.
        heads = zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)
        scores = torch.stack([q @ k.T for q, k in heads]).view(*query.shape[:3], -1)
    else:
        # In this order CPUs read the keys in sequence: three times as fast as queries times transposed keys.
        scores = (key @ query.transpose(2, 3)).transpose(2, 3)
    if attention_mask is not None:
        # Finite: a padded row that sees no key yet would give NaN and leave NaN in the cache.
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = weights @ value if keeps_graph or on_cuda else _weighted_sums(weights, value)
    return output.flatten(1, 2)[:, None], None


def _weighted_sums(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    weights (B, K, G, S), value (B, K, S, V) -> weights @ value (B, K, G, V), as an embedding bag: its kernel reads the
    rows of a table in sequence, where a product with so few weights per value runs at a third of the memory's rate.
    """
    width = value.shape[-1]
    if value.stride(-1) != 1 or any(stride % width for stride in value.stride()[:-1]):
        value = value.contiguous()
    # A cache with room to grow is a table as it is: of all rows between its first and its last.
    sizes, strides = value.shape[:-1], [stride // width for stride in value.stride()[:-1]]
    num_rows = 1 + sum(stride * (size - 1) for stride, size in zip(strides, sizes, strict=True))
    table = value.as_strided((num_rows, width), (width, 1))
    row, head, place = (stride * torch.arange(size) for stride, size in zip(strides, sizes, strict=True))
    place = row[:, None, None, None] + head[:, None, None] + place  # (B, K, 1, S)
    bags = place.expand_as(weights).reshape(-1, weights.shape[-1])
    sums = F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights.reshape(bags.shape))
    return sums.view(*weights.shape[:3], width)


def attend_by_sdpa(module, query, key, value, attention_mask: torch.Tensor | None, scaling: float, **kwargs):
    """SDPA. `attention_mask` (B, 1 or A, L, S) is boolean, True where seen, or is added to the scores."""
    width = value.shape[-1]
    if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
        # Queries that share a key become those of one head, so that no key is repeated: (B, K, A / K, D). Compiled for
        # CUDA, a dimension of one query would get a stride that kernels refuse.
        query = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
        dropout = kwargs.get("dropout", 0.0)
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
        return output.flatten(1, 2)[:, None], None
    if query.shape[2] > 1:  # its fast kernels need values as wide as keys; a single query is faster without the copy
        value = F.pad(value, (0, query.shape[-1] - width))
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output[..., :width], None


# Makes transformers accept the name "neo". The model itself calls `plan_attention`.
ALL_ATTENTION_FUNCTIONS.register("neo", attend_by_sdpa)
