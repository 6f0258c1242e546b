"""Prompts with images and videos: chat template, placeholders, tokens and patches in one call."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)
from .image_processing_neo import shared_budget
from .indexing_neo import allocate_position_ids
from .video_processing_neo import NeoVideoProcessor, NeoVideoProcessorKwargs, flatten_videos, is_video, video_duration

from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

# ChatML. An image is `<image>` on a line of its own, a video `<video>`; an empty system text gives no system block.
# The generation markers enclose what is learnt: the assistant's words with the end of turn.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
{%- if part.type == 'text' -%}
{{- part.text or '' -}}
{%- elif part.type in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- elif part.type == 'video' -%}
{{- '<video>\\n' -}}
{%- else -%}
{{- raise_exception("A message part must be of type 'text', 'image' or 'video', got " ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- raise_exception("NEO was not trained to call tools: give no tools.") -}}
{%- endif -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- text + '<|im_end|>\\n' -}}
{%- endgeneration -%}
{%- elif message.role != 'system' or text -%}
{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


VIDEO_STYLES = ("timestamps", "bare", "spatial_timestamps", "spatial")


class NeoVideosKwargs(NeoVideoProcessorKwargs, total=False):
    r"""
    video_style (`str`, *optional*, defaults to `"timestamps"`):
        How a video is written: "timestamps", as NEO-ov's video training and evaluation did; "bare", frames alone;
        "spatial_timestamps" and "spatial", as the spatial evaluation did, with times and without. Where times are
        unknown, "timestamps" gives "bare" and "spatial_timestamps" gives "spatial".
    """

    video_style: str


class NeoProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}  # type: ignore[misc]
    videos_kwargs: NeoVideosKwargs  # type: ignore[misc]  # as in transformers' own processors


class NeoProcessor(ProcessorMixin):
    """
    Image processor, video processor, tokenizer and chat template of NEO.

    Each `<image>` in a text stands for an image and becomes `<img>`, one `<IMG_CONTEXT>` per visual token, `</img>`.
    Each `<video>` becomes its sampled frames, images like any other, with their times (see `serialize_video`).
    Returns `input_ids` and `attention_mask` (B, L), and with images or videos `pixel_values`
    (P, 3 * patch_size^2) and `image_grid_hw` (N, 2) in patches: images and frames as one stream, in prompt order,
    row after row of the batch. Pixel budgets can be set per call (`min_pixels`, `max_pixels`, `share_pixel_budget`),
    those of images and frames apart as `images_kwargs` and `videos_kwargs`; so can the sampling of frames
    (`num_frames`, `fps`, ..., see `NeoVideoProcessorKwargs`).
    """

    valid_processor_kwargs: Any = NeoProcessorKwargs
    return_position_ids = False
    return_image_grid_thw = False

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None, **kwargs):
        self.image_token = "<image>"
        self.video_token = "<video>"
        self.image_context_token = "<IMG_CONTEXT>"
        self.image_start_token = "<img>"
        self.image_end_token = "</img>"
        if video_processor is None:
            names = ("patch_size", "spatial_merge_size")
            shared = {name: getattr(image_processor, name) for name in names if hasattr(image_processor, name)}
            video_processor = NeoVideoProcessor(**shared)
        super().__init__(
            image_processor, tokenizer, video_processor, chat_template=chat_template or CHAT_TEMPLATE, **kwargs
        )
        self.auto_map = {"AutoProcessor": "processing_neo.NeoProcessor"}  # as saving sets it, but loading does not
        self.image_token_id = self._token_id(self.image_context_token)
        self.image_start_token_id = self._token_id(self.image_start_token)
        self.image_end_token_id = self._token_id(self.image_end_token)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        # transformers knows the base class of video processors only where torchvision is installed.
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"video_processor must be a video processor, got a {type(argument).__name__}.")
        return VideoProcessorMixin

    def _token_id(self, token: str) -> int:
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or token_id == self.tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no {token}. Add NEO's special tokens to it before use.")
        return token_id

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        audio=None,
        return_position_ids: bool | None = None,
        return_image_grid_thw: bool | None = None,
        **kwargs: Unpack[NeoProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: images (Pillow, numpy, torch, path, URL, base64) in prompt order: one, some, or a list per text.
            text: a prompt or a list of prompts with `<image>` where an image and `<video>` where a video stands.
            videos: videos (see `NeoVideoProcessor`) in prompt order: one, some, or a list per text.
            return_position_ids: whether to return the T, H and W indices as `position_ids` (3, B, L); needs
                `return_tensors="pt"`. Defaults to the processor's own setting (off), as does the next one.
            return_image_grid_thw: whether to return grids as `image_grid_thw` (N, 3), (1, rows, columns), in place of
                `image_grid_hw`, as clients want them that cut `pixel_values` by grids themselves (TRL's GRPO).

        Raises:
            ValueError: placeholders and images or videos differ in number, truncation cut through an image, or a
                image or video cannot be read or has an impossible size.
        """
        offsets_asked = kwargs.get("return_text_replacement_offsets")
        if videos is not None and text is not None:
            kwargs["return_text_replacement_offsets"] = True  # they tell the order of images and videos
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        offsets = (
            inputs.get("text_replacement_offsets") if offsets_asked else inputs.pop("text_replacement_offsets", None)
        )
        self._join_streams(inputs, offsets)
        if self.return_position_ids if return_position_ids is None else return_position_ids:
            if not isinstance(inputs.get("input_ids"), torch.Tensor):
                raise ValueError('return_position_ids needs text and return_tensors="pt".')
            inputs["position_ids"] = allocate_position_ids(
                inputs["input_ids"],
                inputs.get("image_grid_hw"),
                image_token_id=self.image_token_id,
                image_start_token_id=self.image_start_token_id,
                spatial_merge_size=self.image_processor.spatial_merge_size,
                attention_mask=inputs["attention_mask"],
            )
        with_time = self.return_image_grid_thw if return_image_grid_thw is None else return_image_grid_thw
        if with_time and "image_grid_hw" in inputs:
            grids = inputs.pop("image_grid_hw")
            padded = F.pad(torch.as_tensor(grids), (1, 0), value=1)
            inputs["image_grid_thw"] = padded if isinstance(grids, torch.Tensor) else padded.numpy()
        return inputs

    def apply_chat_template(self, conversation, *args, load_audio_from_video: bool = False, **kwargs):
        """
        As the base class. Servers ask for the sound of videos with `load_audio_from_video`, which has no effect: NEO
        hears nothing.
        """
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _join_streams(self, inputs: BatchFeature, offsets: list[list[dict]] | None):
        """Put the patches of images and of videos in the order of their placeholders, in place."""
        frames = {name: inputs.pop(f"video_{name}", None) for name in ("pixel_values", "image_grid_hw", "frames")}
        if frames["frames"] is None:
            return
        grids, pixels = list(frames["image_grid_hw"]), frames["pixel_values"]
        videos = _split(pixels, grids, [int(count) for count in frames["frames"]])
        images: list = []
        if "pixel_values" in inputs:
            image_grids = list(inputs["image_grid_hw"])
            images = _split(inputs["pixel_values"], image_grids, [1] * len(image_grids))
        units = images + videos
        if offsets is not None:
            iterators = {"image": iter(images), "video": iter(videos)}
            units = [next(iterators[replaced["type"]]) for row in offsets for replaced in row]
        stack, join = (torch.stack, torch.cat) if isinstance(pixels, torch.Tensor) else (np.stack, np.concatenate)
        inputs["pixel_values"] = join([unit for unit, _ in units])
        inputs["image_grid_hw"] = stack([grid for _, unit_grids in units for grid in unit_grids])

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        # A list per prompt, so that counts are compared and budgets shared prompt by prompt.
        if images is not None and not _is_nested(images):
            flat = list(make_flat_list_of_images(images)) if not isinstance(images, list) or images else []
            images = self._per_prompt(flat, text, self.image_token)
        if videos is not None and not (isinstance(videos, (list, tuple)) and len(videos) == 0):
            rows = _is_nested(videos) and not any(is_video(row) for row in videos)
            videos = videos if rows else self._per_prompt(flatten_videos(videos), text, self.video_token)
        images, videos = (x if x is not None and any(map(len, x)) else None for x in (images, videos))
        return images, text, videos, audio

    @staticmethod
    def _per_prompt(flat: list, text: list[str] | None, token: str) -> list[list]:
        counts = [sample.count(token) for sample in text or []]
        if len(counts) < 2 or sum(counts) != len(flat):
            return [flat]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is None and text is None and videos is None:
            raise ValueError(f"{type(self).__name__} needs text, images or videos.")
        if text is None:
            return
        if not all(isinstance(sample, str) for sample in text):
            raise ValueError(f"text must be a string or a list of strings, got {text!r:.200}.")
        for what, token, given in (("Images", self.image_token, images), ("Videos", self.video_token, videos)):
            placeholders = [sample.count(token) for sample in text]
            counts = [len(sample) for sample in given or [[]] * len(text)]
            if placeholders != counts:
                raise ValueError(
                    f"{what} and {token} placeholders must match prompt by prompt: the prompts have {placeholders} "
                    f"placeholders, but {counts} {what.lower()} were given."
                )

    def _process_videos(self, videos: list[list], **kwargs):
        style = kwargs.pop("video_style", VIDEO_STYLES[0])
        if style not in VIDEO_STYLES:
            raise ValueError(f"video_style must be one of {VIDEO_STYLES}, got {style!r}.")
        features = self.video_processor(list(chain.from_iterable(videos)), **(kwargs | {"return_metadata": True}))
        texts, first = [], 0
        for metadata in features["video_metadata"]:
            text = serialize_video(metadata, style, start=kwargs.get("start"), end=kwargs.get("end"))
            head, *tails = text.removesuffix("\n").split(self.image_token)
            frames = [self.replace_image_token(features, first + i, **kwargs) for i in range(len(tails))]
            texts.append(head + "".join(frame + tail for frame, tail in zip(frames, tails, strict=True)))
            first += len(tails)
        # Under names of their own, as images have theirs already; joined at the end.
        data = {f"video_{name}": features[name] for name in ("pixel_values", "image_grid_hw")}
        data["video_frames"] = [len(metadata.frames_indices) for metadata in features["video_metadata"]]
        return data | {"video_metadata": features["video_metadata"]}, texts

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        rows, columns = (int(side) for side in image_inputs["image_grid_hw"][image_idx])
        merge_size = kwargs.get("spatial_merge_size", self.image_processor.spatial_merge_size)
        num_tokens = rows * columns // merge_size**2
        return self.image_start_token + self.image_context_token * num_tokens + self.image_end_token

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]):
        expected = [sample.count(self.image_context_token) for sample in text]
        ids = text_inputs["input_ids"]
        found = [list(row).count(self.image_token_id) for row in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if any(expected) and found != expected:
            raise ValueError(
                f"Truncation cut through an image: the prompts hold {expected} image tokens, of which {found} are "
                "left. Raise max_length or turn truncation off."
            )

    @property
    def model_input_names(self) -> list[str]:
        return list(dict.fromkeys(super().model_input_names))  # images and videos share theirs

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """
        Visual tokens and patches of images and videos of the given sizes.

        Args:
            image_sizes: (height, width) in pixels of each image.
            video_sizes: (sampled frames, height, width) of each video.
            kwargs: budgets, as in a call.
        """
        apart = {name: kwargs.pop(name, None) or {} for name in ("images_kwargs", "videos_kwargs")}
        counts = {}
        if image_sizes is not None:
            settings = kwargs | apart["images_kwargs"]
            merge_size = settings.get("spatial_merge_size", self.image_processor.spatial_merge_size)
            if settings.get("share_pixel_budget", self.image_processor.share_pixel_budget):
                max_pixels = settings.get("max_pixels", self.image_processor.max_pixels)
                min_pixels = settings.get("min_pixels", self.image_processor.min_pixels)
                settings = settings | {"max_pixels": shared_budget(max_pixels, min_pixels, len(image_sizes))}
            patches = [self.image_processor.get_number_of_image_patches(*size, settings) for size in image_sizes]
            counts["num_image_patches"] = patches
            counts["num_image_tokens"] = [count // merge_size**2 for count in patches]
        if video_sizes is not None:
            settings = kwargs | apart["videos_kwargs"]
            merge_size = settings.get("spatial_merge_size", self.video_processor.spatial_merge_size)
            patches = [self.video_processor.get_num_of_video_patches(*size, settings) for size in video_sizes]
            counts["num_video_tokens"] = [count // merge_size**2 for count in patches]
        return MultiModalData(**counts)


def serialize_video(
    metadata: VideoMetadata,
    style: str = "timestamps",
    start: int | float | None = None,
    end: int | float | None = None,
) -> str:
    """
    How a video is written, with `<image>` for each of its frames (NEO-ov paper, section 3.2).

    Args:
        metadata: of the video; `frames_indices` are the frames. A frame's time is its index over `fps`.
        style: see `NeoVideosKwargs`.
        start, end: the window that was sampled, in seconds; all of the video where not given.

    Returns:
        For the four styles:
        "timestamps": `The time range of this video is [00:00-MM:SS], and the following is a series of N frames sampled
        at F FPS.\\n`, then `[MM:SS.ss]:<image>\\n` per frame;
        "bare": `<image>\\n` per frame;
        "spatial_timestamps": the same first line, then `Frame1 is at [MM:SS.ss]:<image>\\n`, ...;
        "spatial": `Frame-1: <image>\\n`, ...
        Minutes count on past an hour.
    """
    indices, duration = metadata.frames_indices or [], video_duration(metadata)
    if duration is None:
        style = {"timestamps": "bare", "spatial_timestamps": "spatial"}.get(style, style)
    if style == "bare":
        return "<image>\n" * len(indices)
    if style == "spatial":
        return "".join(f"Frame-{number}: <image>\n" for number in range(1, len(indices) + 1))
    assert duration is not None
    start, end = start or 0, duration if end is None else end
    text = (
        f"The time range of this video is [{format_time(start)}-{format_time(end)}], and the following is a series of "
        f"{len(indices)} frames sampled at {round(len(indices) / (end - start), 1)} FPS.\n"
    )
    for number, index in enumerate(indices, start=1):
        frame = f"Frame{number} is at " if style == "spatial_timestamps" else ""
        text += f"{frame}[{format_timestamp(index / metadata.fps)}]:<image>\n"
    return text


def format_time(seconds: float) -> str:
    """`MM:SS`, seconds rounded down; 100 minutes and more stay minutes."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def format_timestamp(seconds: float) -> str:
    """`MM:SS.ss`, rounded; 100 minutes and more stay minutes."""
    minutes, rest = int(seconds // 60), f"{seconds % 60:05.2f}"
    return f"{minutes + 1:02d}:00.00" if rest == "60.00" else f"{minutes:02d}:{rest}"


def _split(pixels, grids: list, counts: list[int]) -> list[tuple]:
    """Cut patches (P, ...) into units of so many images each: the patches and the grids of each unit."""
    units, patch, image = [], 0, 0
    for count in counts:
        unit_grids = grids[image : image + count]
        end = patch + sum(int(grid[0]) * int(grid[1]) for grid in unit_grids)
        units.append((pixels[patch:end], unit_grids))
        patch, image = end, image + count
    return units


def _is_nested(images) -> bool:
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(x, (list, tuple)) for x in images)


__all__ = ["NeoProcessor", "serialize_video"]
