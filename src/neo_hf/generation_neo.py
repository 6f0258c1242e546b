"""What `generate()` needs to know about NEO.

`generate()` carries T, H and W indices (3, B, L) along and adds 1 to all three per new token; the mask is derived from
them. No state of a sequence is stored on the model.
"""

from .attention_neo import mask_of_one_query
from .cache_neo import CACHE_NAME, NeoCache
from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)
from .indexing_neo import spatial_index, temporal_index, without_time

import copy

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin


class NeoGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model with three-dimensional indices and bidirectional attention within images."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> torch.Tensor:
        input_ids = model_kwargs.get("input_ids")
        if input_ids is None or input_ids.shape[1] == 0:
            input_ids = inputs_tensor if inputs_tensor.ndim == 2 else None
        token_ids = self.model.get_token_ids(input_ids, inputs_tensor)
        attention_mask = model_kwargs.get("attention_mask")
        grid_hw = without_time(model_kwargs.get("image_grid_hw"), model_kwargs.get("image_grid_thw"))
        cache = model_kwargs.get(CACHE_NAME)
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        length = token_ids.shape[1]
        if past_length and attention_mask is not None and attention_mask.shape[1] == past_length + length:
            # Only the new tokens were given. The indices of the cached ones are never read again.
            new = self.model.get_position_ids(token_ids, grid_hw, attention_mask, cache)
            return F.pad(new, (past_length, 0))

        t = temporal_index(
            token_ids,
            image_token_id=self._image_token_id,
            image_start_token_id=self._image_start_token_id,
            attention_mask=attention_mask,
        )
        is_image = token_ids == self._image_token_id
        if past_length and not _covers(grid_hw, is_image, self.config.vision_config.spatial_merge_size):
            # The whole conversation, but only its new images: those in the cache need no grid.
            is_image[:, :past_length] = False
        hw = spatial_index(is_image, grid_hw, self.config.vision_config.spatial_merge_size)
        return torch.cat([t[None], hw])

    def prepare_inputs_for_generation(
        self, input_ids, *, inputs_embeds=None, is_first_iteration=False, mm_token_type_ids=None, **kwargs
    ):
        # mm_token_type_ids: returned by processors for other models; NEO recognises visual tokens by their ids.
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and not (is_first_iteration and inputs_embeds is not None):
            # Each step adds 1 to all three indices, but only visual tokens have H and W indices other than 0.
            tokens = input_ids[:, -position_ids.shape[-1] :]
            is_text = F.pad(tokens != self._image_token_id, (position_ids.shape[-1] - tokens.shape[1], 0))
            if not is_first_iteration and kwargs.get("use_cache", True):
                is_text = torch.ones_like(is_text)  # everything not cached was generated
            keep = torch.stack([torch.zeros_like(is_text), is_text, is_text])
            kwargs["position_ids"] = position_ids.masked_fill(keep, 0)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, position_ids=None, **kwargs):
        """The 4-D mask of a step with a static cache, built outside the compiled forward."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask  # a prefill is not compiled: forward() builds the mask
        return mask_of_one_query(attention_mask, kwargs[CACHE_NAME], inputs_embeds.device)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        is_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if not is_given and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE_NAME] = NeoCache(self.config.get_text_config())

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """
        Give each chunk of `prefill_chunk_size` tokens its images, which transformers only does since 5.23, and leave
        out images that are already cached.
        """
        length, cache = input_ids.shape[1], model_kwargs.get(CACHE_NAME)
        past_length = int(cache.get_seq_length()) if cache is not None else 0
        # How many cached tokens `input_ids` lacks: all or none.
        offset = model_kwargs["position_ids"].shape[-1] - length
        num_cached = past_length - offset
        is_image = input_ids == self._image_token_id
        features = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")

        def columns(start: int, end: int) -> dict:
            attention_mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs["position_ids"]
            if attention_mask is not None:
                attention_mask = attention_mask[:, : offset + end]
            taken = {"attention_mask": attention_mask, "position_ids": position_ids[..., : offset + end]}
            if features is not None:
                taken["mm_encoder_outputs"] = {
                    "image": _features_of_columns(features, is_image, num_cached, slice(start, end))
                }
            return {**model_kwargs, **taken}

        start, chunk_size = num_cached, generation_config.prefill_chunk_size
        if chunk_size is not None and cache is not None and length:
            _refuse_split_images(is_image[:, start:], chunk_size)
            for end in range(start + chunk_size, length, chunk_size):
                chunk = input_ids[:, start:end]
                self(**self.prepare_inputs_for_generation(chunk, is_first_iteration=True, **columns(start, end)))
                start = end
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        model_kwargs = columns(start, length)
        return super()._prefill(
            input_ids[:, start:] if offset else input_ids, generation_config, model_kwargs, is_first_iteration
        )


def _covers(grid_hw: torch.Tensor | None, is_image: torch.Tensor, merge_size: int) -> bool:
    tokens = 0 if grid_hw is None else int(grid_hw.prod(-1).sum()) // merge_size**2
    return tokens == int(is_image.sum())


def _features_of_columns(features, is_image: torch.Tensor, num_cached: int, columns: slice):
    """
    The visual tokens (V, E) of some columns of `is_image` (B, L). `features` holds those of all images, or of all but
    those in the first `num_cached` columns.
    """
    if not len(features.pooler_output):
        return features
    visual = torch.cat(tuple(features.pooler_output))
    covered, wanted = is_image, torch.zeros_like(is_image)
    if visual.shape[0] != int(is_image.sum()):
        covered = is_image.clone()
        covered[:, :num_cached] = False
    wanted[:, columns] = True
    if visual.shape[0] == int(covered.sum()):  # otherwise forward() reports the mismatch
        visual = visual[wanted[covered].to(visual.device)]
    return type(features)(pooler_output=(visual,))


def _refuse_split_images(is_image: torch.Tensor, chunk_size: int):
    """An image's tokens see each other: all of its keys are needed when the first of them is computed."""
    for end in range(chunk_size, is_image.shape[1], chunk_size):
        split = is_image[:, end - 1] & is_image[:, end]  # <img> stands between two images
        if split.any():
            raise ValueError(
                f"prefill_chunk_size={chunk_size} would split an image of row {int(split.nonzero()[0])} between "
                f"tokens {end - 1} and {end} of what is not cached yet. Choose a size whose chunks end outside of "
                "images, or None."
            )
