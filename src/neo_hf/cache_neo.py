"""A key/value cache that grows by copying only what is new."""

from .configuration_neo import NeoTextConfig

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.import_utils import is_tracing

# What generate() and outputs call the cache: `past_key_values`, and `cache` from transformers 5.24 on.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Copies of a layer in several threads share buffers. On no layer, which must be copied and pickled.
_claiming = threading.Lock()


@dataclass
class _Buffers:
    keys: torch.Tensor  # (B, K, places, D)
    values: torch.Tensor
    used: int = 0  # places that hold something, of this layer or of a copy of it


class GrowingLayer(DynamicLayer):
    """
    A `DynamicLayer` whose tensors are views of buffers with room to spare, where it would copy all that is cached at
    every step. What is cached never changes: layers that share buffers (`copy.copy`), or were cut back, move to
    buffers of their own where the next place is taken.
    """

    keys: torch.Tensor
    values: torch.Tensor
    _buffers: _Buffers | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.get_seq_length()
        in_step = not length or self.keys.shape[:2] == key_states.shape[:2]
        if torch.is_grad_enabled() or is_tracing(key_states) or not in_step:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = length + key_states.shape[-2]
        buffers = self._buffers
        if buffers is None or not self._claim(buffers, length, end):
            places = end + max(end // 8, 128)
            keys, values = (x.new_empty(*x.shape[:2], places, x.shape[-1]) for x in (key_states, value_states))
            buffers = self._buffers = _Buffers(keys, values, used=end)
            if length:
                buffers.keys[:, :, :length], buffers.values[:, :, :length] = self.keys, self.values
        buffers.keys[:, :, length:end], buffers.values[:, :, length:end] = key_states, value_states
        self.keys, self.values = buffers.keys[:, :, :end], buffers.values[:, :, :end]
        return self.keys, self.values

    def _claim(self, buffers: _Buffers, length: int, end: int) -> bool:
        """Take places [length, end) for this layer, if they are free and follow what it holds."""
        with _claiming:
            if not self._can_append(buffers, length, end):
                return False
            buffers.used = end
            return True

    def _can_append(self, buffers: _Buffers, length: int, end: int) -> bool:
        return (
            buffers.used == length
            and end <= buffers.keys.shape[2]
            # Reordered, repeated, selected or replaced tensors are no longer those of the buffers.
            and self.keys.shape[:2] == buffers.keys.shape[:2]
            and self.keys.data_ptr() == buffers.keys.data_ptr()
            and self.values.data_ptr() == buffers.values.data_ptr()
            and (torch.is_inference_mode_enabled() or not buffers.keys.is_inference())
        )

    def reset(self):
        super().reset()
        self._buffers = None


class NeoCache(DynamicCache):
    """
    A `DynamicCache` of `GrowingLayer`s.

    Set by the model, both `int64`; they follow when rows are moved, repeated or selected:
    rope_deltas: (B, 1), what to add to a row's length for the next T index.
    next_indices: (B, S), the T index that follows each token, -1 within an image. Read where the cache was cropped.
    """

    rope_deltas: torch.Tensor | None = None
    next_indices: torch.Tensor | None = None

    def __init__(self, config: NeoTextConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        self._change_rows(lambda x: x[indices])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]):
        for name in ("rope_deltas", "next_indices"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, change(x))
