"""A key/value cache that copies only new entries as it grows, and where the sequences in it continue."""

from .configuration_neo import NeoTextConfig

import threading
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.import_utils import is_tracing

# Name of the cache in generate() and in outputs: `past_key_values`, or `cache` since transformers 5.24.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"

# Copies of a layer in several threads share buffers. Not an attribute of layers, which must be copied and pickled.
_claiming = threading.Lock()


@dataclass
class _Buffers:
    keys: torch.Tensor  # (B, K, places, D)
    values: torch.Tensor
    used: int = 0  # places filled by this layer or by a copy of it


class GrowingLayer(DynamicLayer):
    """
    A `DynamicLayer` whose tensors are views of buffers with spare room, so that steps do not copy the whole cache.
    Cached entries never change: layers that share buffers (`copy.copy`) or were cropped move to buffers of their own
    if the next place is taken.
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
        """Claim places [length, end) for this layer if they are free and follow its entries."""
        with _claiming:
            if not self._can_append(buffers, length, end):
                return False
            buffers.used = end
            return True

    def _can_append(self, buffers: _Buffers, length: int, end: int) -> bool:
        return (
            buffers.used == length
            and end <= buffers.keys.shape[2]
            # Reordered, repeated, selected or replaced tensors are no longer views of the buffers.
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

    The model sets two `int64` tensors, which are updated when rows are moved, repeated or selected:
    rope_deltas: (B, 1), the next T index of each row minus its length.
    next_indices: (B, S), the T index that follows each token, -1 within an image. Used after the cache was cropped.
    """

    rope_deltas: torch.Tensor | None = None
    next_indices: torch.Tensor | None = None

    def __init__(self, config: NeoTextConfig):
        super().__init__(config=config)
        self.layers = [GrowingLayer() for _ in range(config.num_hidden_layers)]

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values in bytes, room to grow included."""
        tensors = [x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def rewind(self, length: int):
        """Crop to `length` tokens, layer by layer: after an error, layers may differ in length."""
        for layer in self.layers:
            layer.crop(-max(layer.get_seq_length() - length, 0))

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


def remember_end(
    cache: Cache | None,
    position_ids: torch.Tensor,
    token_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    image_start_token_id: int,
):
    """
    Record on the cache where each row continues (see `NeoModel.get_position_ids`): `rope_deltas` (B, 1), the next T
    index minus the length, which text leaves unchanged; and `next_indices` (B, S), for caches that are cropped: the T
    index that would follow each token, or -1 if cropping there would split an image.
    """
    if cache is None or is_tracing(position_ids):
        return
    end, temporal = cache.get_seq_length(), position_ids[0]
    length = temporal.shape[-1]
    next_indices = temporal + 1
    if token_ids is not None:
        next_indices = next_indices + (token_ids == image_start_token_id)
    is_attended = None
    if attention_mask is not None and attention_mask.ndim == 2:
        is_attended = attention_mask[:, -length:] != 0
        next_indices = next_indices.masked_fill(~is_attended, -1)
    next_indices = next_indices.cummax(-1).values
    if is_attended is not None:  # rows that contain only padding keep their index
        deltas = getattr(cache, "rope_deltas", None)
        previous = 0 if deltas is None else deltas + (end - length)
        next_indices = torch.where(next_indices < 0, previous, next_indices)
    cache.rope_deltas = next_indices[:, -1:] - end
    if not isinstance(end, int):  # a static cache, which cannot be cropped
        return
    if length > 1:
        is_cut = temporal[:, 1:] == temporal[:, :-1]
        if is_attended is not None:
            is_cut = is_cut & is_attended[:, 1:] & is_attended[:, :-1]
        next_indices = torch.cat([next_indices[:, :-1].masked_fill(is_cut, -1), next_indices[:, -1:]], dim=-1)
    start = end - length
    if start:
        past = getattr(cache, "next_indices", None)
        if past is None or past.shape[0] != len(next_indices):
            past = next_indices.new_empty(len(next_indices), 0)
        past = F.pad(past[:, :start], (0, max(start - past.shape[1], 0)), value=-1)
        next_indices = torch.cat([past.to(next_indices.device), next_indices], dim=-1)
    cache.next_indices = next_indices


def rope_deltas_of(cache: Cache, length: int | torch.Tensor) -> torch.Tensor | None:
    """
    The next T index of each cached row minus the length of the cache, (B, 1), or `None` if unknown.

    Raises:
        ValueError: the cache was cropped within an image, whose remaining tokens have attended to those cut off.
    """
    next_indices = getattr(cache, "next_indices", None)
    if next_indices is None or not isinstance(length, int) or next_indices.shape[1] <= length:
        return getattr(cache, "rope_deltas", None)
    next_index = next_indices[:, length - 1 : length]
    if (next_index < 0).any():
        raise ValueError(
            f"The cache was cropped from {next_indices.shape[1]} to {length} tokens, within an image or within tokens "
            "of unknown index. Crop before or after an image, since its tokens see each other, or give position_ids."
        )
    return next_index - length
