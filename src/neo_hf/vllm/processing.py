"""Images, videos and prompts in vLLM, processed by `NeoProcessor`."""

from ..processing_neo import NeoProcessor
from .tokenization import placeholders, processor_of

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.transformers import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    TimingContext,
)
from vllm.multimodal.processing.processor import PromptTargetMatch, ResolvedPromptUpdate
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader


class NeoVllmProcessor(NeoProcessor):
    """Returns videos apart from images, under the names that vLLM knows."""

    return_image_grid_thw = True

    def _merge_videos(self, inputs, offsets):
        frames = torch.as_tensor(inputs.pop("video_frames"))
        grids = torch.as_tensor(inputs.pop("video_image_grid_hw"))
        first = frames.cumsum(0) - frames
        # All frames of a video have the same size.
        inputs["video_grid_thw"] = torch.cat([frames[:, None], grids[first]], dim=1)
        inputs["pixel_values_videos"] = inputs.pop("video_pixel_values")
        inputs.pop("video_metadata", None)


@cache
def _vllm_processor(name_or_path: str) -> NeoVllmProcessor:
    loaded = processor_of(name_or_path)
    # No allowed_media: what clients may send is vLLM's to say, which downloads it.
    return NeoVllmProcessor(
        loaded.image_processor, loaded.tokenizer, loaded.video_processor, chat_template=loaded.chat_template
    )


@VIDEO_LOADER_REGISTRY.register("neo")
class NeoVideoLoader(VideoLoader):
    """Leaves video files as they are: the processor samples and decodes them, as it does everywhere else."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, fps: float = -1, **kwargs) -> tuple[np.ndarray, dict]:
        if num_frames > 0 or fps > 0:
            raise ValueError(
                f"media_io_kwargs do not sample the frames of NEO's videos, got num_frames={num_frames}, fps={fps}: "
                "give num_frames or fps in mm_processor_kwargs."
            )
        return np.frombuffer(data, dtype=np.uint8), {}


def _as_uri(video):
    """A `data:` URI of a file from `NeoVideoLoader`; frames as they are."""
    if video.ndim > 1:
        return video
    return f"data:video/mp4;base64,{base64.b64encode(video.tobytes()).decode()}"


class NeoProcessingInfo(MultiModalProcessingInfo):
    _video_needs_metadata = True

    def get_hf_processor(self, **kwargs: object) -> NeoVllmProcessor:
        return _vllm_processor(self.ctx.model_config.model)


class NeoDummyInputsBuilder(MultiModalDummyInputsBuilder):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.get_hf_processor()
        tokens = {"image": processor.image_token, "video": processor.video_token}
        return "".join(token * mm_counts.get(modality, 0) for modality, token in tokens.items())


class NeoMultiModalProcessor(MultiModalProcessor):
    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """
        Raises:
            ValueError: an image or a frame does not fit into a step, so it would wait forever.
        """
        processed = super().apply(inputs, timing_ctx)
        limit = self.info.get_hf_config().max_image_tokens
        for placeholder in chain.from_iterable(processed["mm_placeholders"].values()):
            size = max(last - first + 1 for first, last in placeholder.extract_embeds_range())
            if size > limit:
                raise ValueError(
                    f"An image or video frame of {size} visual tokens does not fit into a step, whose "
                    f"max_num_batched_tokens - max_num_seqs leave {limit}: raise --max-num-batched-tokens or lower "
                    "max_pixels in mm_processor_kwargs."
                )
        return processed

    def _get_hf_mm_inputs(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]):
        # Not the next class's: it decides whether frames are sampled, which is the video processor's to say.
        hf_inputs = super(MultiModalProcessor, self)._get_hf_mm_inputs(mm_items, hf_kwargs)
        data: dict[str, Any] = hf_inputs.hf_data
        if "videos" in data:
            videos, metadata = zip(*data["videos"], strict=True)
            data["videos"] = [_as_uri(video) for video in videos]
            data["video_metadata"] = [
                {name: value for name, value in known.items() if name != "do_sample_frames"} for known in metadata
            ]
        return hf_inputs

    def _get_modality_field_names(self, modality: str) -> set[str]:
        return {{"image": "pixel_values", "video": "pixel_values_videos"}[modality]}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        # vLLM takes the most frequent token for the visual one, but the times of a video's frames repeat digits.
        processor, tokenizer = self.info.get_hf_processor(), self.info.get_tokenizer()
        updates = []
        for modality, items in out_mm_kwargs.items():
            replacements = [
                PromptUpdateDetails.select_token_id(
                    item.pop(f"{modality}_replacement_ids").data.tolist(), processor.image_token_id
                )
                for item in items
            ]
            placeholder = getattr(processor, f"{modality}_token")
            target = tokenizer.encode(placeholders(processor)[placeholder], add_special_tokens=False)
            updates.append(PromptReplacement(modality, target, replacements.__getitem__))
        return updates

    def _iter_text_matches(
        self, update: ResolvedPromptUpdate, prompt_text: str, tokenizer, *, start_idx: int = 0
    ) -> Iterator[PromptTargetMatch]:
        """Placeholders in prompts that are given as text; those of chats are tokens."""
        placeholder = getattr(self.info.get_hf_processor(), f"{update.modality}_token")
        for match in re.compile(re.escape(placeholder)).finditer(prompt_text, start_idx):
            yield PromptTargetMatch(match.start(), match.end())
