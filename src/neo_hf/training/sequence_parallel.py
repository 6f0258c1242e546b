"""
Sequence parallelism by heads (Ulysses): a group of processes trains on the same rows, each on a slice of their tokens.

Every process embeds the whole row and plans its attention. It passes only its slice through the layers and the loss.
Within attention, the processes trade: each gets all tokens, for its share of the heads, so that attention itself, with
NEO's mask, is that of a single process.

Shapes: B rows, L tokens, n processes in the group, A attention heads, K key/value heads, D width of queries and keys,
V width of values.
"""

import math
from copy import copy
from functools import partial

import torch
import torch.distributed as dist
from transformers.models.qwen3.modeling_qwen3 import repeat_kv

from neo_hf.loss_neo import next_token_targets


def check_divides(size: int, count: int, what: str):
    """Raise a ValueError unless `size`, the `sequence_parallel_size`, divides `count`."""
    if size < 1 or count % size:
        raise ValueError(f"sequence_parallel_size must divide {what}, {count}, got {size}.")


class SequenceParallel:
    """
    Makes a model pass only this process's slice of each row through its layers in training mode, by hooks on them. In
    evaluation mode the model is as it was.

    The gradients of a process are those of its slice's loss: their sum over the group is the gradient.

    Args:
        model: `NeoForConditionalGeneration`, possibly with adapters.
        size: n, the number of processes in a group, which have consecutive ranks. All processes must call this.

    Raises:
        ValueError: `size` does not divide the number of processes or of attention heads.
    """

    def __init__(self, model, size: int):
        check_divides(size, dist.get_world_size() if dist.is_initialized() else 1, "the number of processes")
        check_divides(size, model.config.get_text_config().num_attention_heads, "the number of attention heads")
        self.size = size
        self.group, _ = dist.new_subgroups(size)
        for layer in model.get_decoder().layers:
            layer.register_forward_pre_hook(self._slice_inputs, with_kwargs=True)

    def slice_targets(self, batch: dict, image_token_id: int) -> dict:
        """
        The batch with `shift_labels` and `loss_weight` (B, L / n) of this process's slice in place of `labels` and
        `loss_weight` (B, L). They are shifted before they are sliced: the last token of a slice predicts the first of
        the next.

        Raises:
            ValueError: n does not divide L.
            RuntimeError: the processes of the group have different rows.
        """
        batch = dict(batch)
        labels = batch.pop("labels")
        self._check_same(batch["input_ids"], labels)
        check_divides(self.size, labels.shape[1], "the number of tokens in a row")
        targets, weights = next_token_targets(
            labels,
            image_token_id=image_token_id,
            **{name: batch.get(name) for name in ("loss_weight", "attention_mask", "document_ids")},
        )
        return batch | {"shift_labels": self.slice(targets), "loss_weight": self.slice(weights)}

    def _check_same(self, *tensors: torch.Tensor):
        # Records that only one process cannot read would shift its rows for the rest of the run.
        places = [torch.arange(1, x.numel() + 1, device=x.device) for x in tensors]
        mine = torch.stack([(x.flatten() * place).sum() for x, place in zip(tensors, places, strict=True)])
        all_of_group = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_of_group, mine, group=self.group)
        if not all(torch.equal(mine, other) for other in all_of_group):
            raise RuntimeError(
                f"The {self.size} processes of a sequence-parallel group have different rows. Can each of them read "
                "all records?"
            )

    def slice(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) -> (B, L / n, ...): this process's part."""
        return x.chunk(self.size, dim=1)[self.group.rank()]

    def _slice_inputs(self, layer, args, kwargs):
        if not layer.training:
            return args, kwargs
        (hidden_states,) = args
        tables = kwargs["position_embeddings"]
        if hidden_states.shape[1] == tables[0].shape[1]:  # the first layer gets whole rows
            hidden_states = self.slice(hidden_states)
        attend = partial(self._attend, kwargs["attend"])
        return (hidden_states,), kwargs | {"position_embeddings": [*map(self.slice, tables)], "attend": attend}

    def _attend(self, attend, module, query, key, value, attention_mask, **kwargs):
        """
        query (B, A, L / n, D), key (B, K, L / n, D), value (B, K, L / n, V) -> (B, L / n, A, V) and, in eager mode,
        the weights of this process's heads (B, A / n, L, L).
        """
        # Fewer key/value heads than processes are repeated, so that each process has those of its queries.
        repeats = self.size // math.gcd(self.size, key.shape[1])
        heads = (query, repeat_kv(key, repeats), repeat_kv(value, repeats))
        query, key, value = map(self._trade, heads)
        module = copy(module)
        module.num_key_value_groups = query.shape[1] // key.shape[1]
        output, weights = attend(module, query, key, value, attention_mask, **kwargs)  # (B, L, A / n, V)
        return self._trade(output), weights

    def _trade(self, x: torch.Tensor) -> torch.Tensor:
        """Give each process of the group its part of dimension 1, and join what they give along dimension 2."""
        parts = torch.stack(x.chunk(self.size, dim=1))
        return torch.cat(_AllToAll.apply(parts, self.group).unbind(), dim=2)


class _AllToAll(torch.autograd.Function):
    """(n, ...) -> (n, ...): the i-th part goes to the i-th process of the group."""

    @staticmethod
    def forward(ctx, parts: torch.Tensor, group) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad.contiguous(), ctx.group), None
