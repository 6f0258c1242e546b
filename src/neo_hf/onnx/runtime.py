"""
Greedy decoding of an exported graph on ONNX Runtime.

Arrays in, arrays out: the model runs without torch. Only the T, H and W indices come from the functions that the model
and the processor use, which take tensors.
"""

from ..checks_neo import check_token_ids
from ..configuration_neo import NeoConfig
from ..indexing_neo import allocate_position_ids
from ..loading import check_available
from .graph import cache_names, file_name

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig


@dataclass
class OnnxCache:
    """
    Keys and values of past tokens, and where their rows continue. `generate()` and `forward()` fill it in place.

    entries: `past_key_values.N.key` (B, K, S, 2d) and `past_key_values.N.value` (B, K, S, d) of each layer.
    next_index: (B, 1) int64, the T index that follows.
    """

    entries: dict[str, np.ndarray] = field(default_factory=dict)
    next_index: np.ndarray | None = None

    @property
    def length(self) -> int:
        """S, the number of cached tokens, padding included."""
        return next(iter(self.entries.values())).shape[2] if self.entries else 0


class OnnxNeo:
    """
    A NEO that runs on ONNX Runtime.

    Args:
        config: its `config.json`.
        file: a graph written by `neo_hf.onnx.export_graphs`.
        generation_config: where `eos_token_id` and `pad_token_id` are taken from.
        kwargs: passed to `onnxruntime.InferenceSession`; `providers` defaults to `["CPUExecutionProvider"]`.
    """

    def __init__(
        self, config: NeoConfig, file: str | os.PathLike, generation_config: GenerationConfig | None = None, **kwargs
    ):
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.session = onnxruntime.InferenceSession(
            os.fspath(file), **{"providers": ["CPUExecutionProvider"], **kwargs}
        )
        text = config.text_config
        self._past, self._present = (cache_names(x, text.num_hidden_layers) for x in ("past_key_values", "present"))
        types = {value.name: value.type for value in self.session.get_inputs()}
        self._cache_dtype = np.float16 if types[self._past[0]] == "tensor(float16)" else np.float32

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, dtype: str = "fp32", **kwargs) -> "OnnxNeo":
        """
        Load what `neo-hf onnx` wrote.

        Args:
            name_or_path: folder or Hub id.
            dtype: precision, "fp32", "fp16", "int8", "q4" or "q4f16".
            kwargs: as for the constructor.

        Raises:
            ValueError: the folder has no graph of this precision.
        """
        name = file_name(dtype)
        check_available(name_or_path)
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=["*.json", name, f"{name}_data"]))
        if not (folder / name).is_file():
            found = sorted(str(file.relative_to(folder)) for file in folder.glob("onnx/*.onnx"))
            raise ValueError(f"{name_or_path} has no {name}, only {', '.join(found) or 'no graph at all'}.")
        config = NeoConfig.from_pretrained(folder)
        return cls(config, folder / name, GenerationConfig.from_pretrained(folder), **kwargs)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_hw=None,
        cache: OnnxCache | None = None,
        logits_to_keep=None,
    ) -> tuple[np.ndarray, OnnxCache]:
        """
        Process new tokens after the cached ones. All arguments may be arrays or tensors.

        Args:
            input_ids: (B, L) the new tokens.
            attention_mask: (B, S), 0 on padding, cached tokens included.
            pixel_values: (P, channels * patch_size^2) patches of the images among the new tokens.
            image_grid_hw: (N, 2) (rows, columns) of these images in patches.
            cache: extended in place.
            logits_to_keep: (K,) indices of the new tokens whose logits are wanted, -1 being the last; all by default.

        Returns:
            Logits (B, K, vocabulary), float32, and the cache.

        Raises:
            ValueError: images and image tokens do not match in number, grids do not match the patches, the mask does
                not cover the tokens, or token ids are outside the vocabulary.
        """
        cache = OnnxCache() if cache is None else cache
        input_ids = np.asarray(input_ids, np.int64)
        rows, length = input_ids.shape
        total = cache.length + length
        mask = np.ones((rows, total), np.int64) if attention_mask is None else np.asarray(attention_mask, np.int64)
        if mask.shape != (rows, total):
            raise ValueError(
                f"attention_mask must cover {cache.length} cached and {length} new tokens of {rows} rows, got "
                f"{mask.shape}."
            )
        text, vision = self.config.text_config, self.config.vision_config
        check_token_ids(int(input_ids.min()), int(input_ids.max()), text.vocab_size)
        width = vision.num_channels * vision.patch_size**2
        grids = np.zeros((0, 2)) if image_grid_hw is None else np.asarray(image_grid_hw)
        pixels = np.zeros((0, width)) if pixel_values is None else np.asarray(pixel_values)
        if pixels.shape != (int(grids.prod(-1).sum()), width):
            raise ValueError(
                f"pixel_values and image_grid_hw do not match: patches {pixels.shape}, but the grids {grids.tolist()} "
                f"of patches of {width} values."
            )
        position_ids = self._position_ids(input_ids, mask[:, cache.length :], grids, cache)
        keep = np.arange(length) if logits_to_keep is None else np.asarray(logits_to_keep)
        feeds = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            "pixel_values": pixels.astype(np.float32),
            "image_grid_hw": grids.astype(np.int64),
            "logits_to_keep": keep.astype(np.int64),
            **(cache.entries or self._empty_entries(rows)),
        }
        logits, *present = self.session.run(["logits", *self._present], feeds)
        cache.entries = dict(zip(self._past, present, strict=True))
        cache.next_index = self._next_index(input_ids, mask[:, -length:], position_ids[0], cache)
        return logits, cache

    def generate(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_hw=None,
        max_new_tokens: int = 20,
        eos_token_id: int | list[int] | None = None,
        cache: OnnxCache | None = None,
        streamer=None,
    ) -> np.ndarray:
        """
        Decode greedily, as `NeoForConditionalGeneration.generate(do_sample=False)` does.

        Args:
            input_ids: (B, L) the whole prompt, with the cached tokens; padded on the left.
            attention_mask: (B, L), 0 on padding.
            pixel_values, image_grid_hw: patches and grids of the images that are not cached.
            max_new_tokens: maximum number of new tokens.
            eos_token_id: ends a row, or several such tokens. Defaults to that of the generation configuration.
            cache: tokens that are processed already; extended in place.
            streamer: receives token ids as they are generated, such as a `TextStreamer`.

        Returns:
            (B, L + new tokens) int64, the prompt and its continuation; rows that end early are padded on the right.

        Raises:
            ValueError: as for `forward()`, a row is padded on the right, or all tokens are cached.
        """
        settings = self.generation_config
        eos = settings.eos_token_id if eos_token_id is None else eos_token_id
        eos = [] if eos is None else np.atleast_1d(eos).tolist()
        pad = next((x for x in (settings.pad_token_id, *eos) if x is not None), 0)
        ids = np.asarray(input_ids, np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
        cache = OnnxCache() if cache is None else cache
        if not mask[:, -1].all():
            raise ValueError(f"Pad prompts on the left: row {int(mask[:, -1].argmin())} ends with padding.")
        if cache.length >= ids.shape[1]:
            raise ValueError(f"Nothing is left to process: the cache holds {cache.length} of {ids.shape[1]} tokens.")
        if streamer is not None:
            streamer.put(ids)
        new, images = ids[:, cache.length :], (pixel_values, image_grid_hw)
        is_running = np.ones(len(ids), bool)
        for _ in range(max_new_tokens):
            logits, cache = self.forward(new, mask, *images, cache=cache, logits_to_keep=[-1])
            tokens = np.where(is_running, logits[:, -1].argmax(-1), pad)
            new, images = tokens[:, None], (None, None)
            ids, mask = np.concatenate([ids, new], 1), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            is_running &= ~np.isin(tokens, eos)
            if streamer is not None:
                streamer.put(tokens)
            if not is_running.any():
                break
        if streamer is not None:
            streamer.end()
        return ids

    def _empty_entries(self, rows: int) -> dict[str, np.ndarray]:
        text = self.config.text_config
        widths = [text.qk_head_dim, text.head_dim] * text.num_hidden_layers
        return {
            name: np.zeros((rows, text.num_key_value_heads, 0, width), self._cache_dtype)
            for name, width in zip(self._past, widths, strict=True)
        }

    def _position_ids(
        self, input_ids: np.ndarray, mask: np.ndarray, grids: np.ndarray, cache: OnnxCache
    ) -> np.ndarray:
        """T, H and W indices (3, B, L) of the new tokens."""
        position_ids = allocate_position_ids(
            torch.from_numpy(input_ids),
            torch.from_numpy(grids.astype(np.int64)),
            image_token_id=self._token_id("image_token_id"),
            image_start_token_id=self._token_id("image_start_token_id"),
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            attention_mask=torch.from_numpy(mask),
        ).numpy()
        if cache.next_index is not None:
            position_ids[0] += cache.next_index
        return position_ids

    def _next_index(
        self, input_ids: np.ndarray, mask: np.ndarray, temporal: np.ndarray, cache: OnnxCache
    ) -> np.ndarray:
        """The T index (B, 1) that follows: one more than the last, two more after `<img>`."""
        following = temporal + 1 + (input_ids == self._token_id("image_start_token_id"))
        previous = 0 if cache.next_index is None else cache.next_index
        return np.maximum(np.where(mask != 0, following, 0).max(-1, keepdims=True), previous)

    def _token_id(self, name: str) -> int:
        token_id = getattr(self.config, name)
        return -1 if token_id is None else token_id
