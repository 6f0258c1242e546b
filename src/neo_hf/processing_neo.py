"""Prompts with images and videos to model inputs: placeholders, token ids and patches."""

from .chat_template_neo import CHAT_TEMPLATE, CONTROL_TOKENS, drop_marks, mark_control_tokens
from .image_processing_neo import check_names, check_settings, shared_budget
from .indexing_neo import allocate_position_ids
from .media_access_neo import MEDIA_KINDS, admit_media
from .video_processing_neo import NeoVideoProcessor, NeoVideoProcessorKwargs, flatten_videos, is_video, video_duration

import dataclasses
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoInput, VideoMetadata

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "image_url", "video")
VIDEO_STYLES = ("timestamps", "bare", "spatial_timestamps", "spatial")


class NeoVideosKwargs(NeoVideoProcessorKwargs, total=False):
    r"""
    video_style (`str`, *optional*, defaults to `"timestamps"`):
        How a video is written in the prompt: "timestamps", as in NEO-ov's video training and evaluation; "bare",
        frames only; "spatial_timestamps" and "spatial", as in the spatial evaluation, with and without times. If the
        frame rate is unknown, "timestamps" falls back to "bare" and "spatial_timestamps" to "spatial".
    """

    video_style: str


class NeoProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}  # type: ignore[misc]
    videos_kwargs: NeoVideosKwargs  # type: ignore[misc]  # as in transformers' own processors


class NeoProcessor(ProcessorMixin):
    """
    Combines NEO's image processor, video processor, tokenizer and chat template.

    Each `<image>` in a text stands for an image and becomes `<img>`, an `<IMG_CONTEXT>` per visual token and `</img>`.
    Each `<video>` becomes its sampled frames, written as images with their timestamps (see `serialize_video`).

    Returns `input_ids` and `attention_mask` (B, L), and with images or videos `pixel_values` (P, 3 * patch_size^2) and
    `image_grid_hw` (N, 2) in patches: all images and frames of the batch in prompt order. Pixel budgets
    (`min_pixels`, `max_pixels`, `share_pixel_budget`) and frame sampling (`num_frames`, `fps`, ..., see
    `NeoVideoProcessorKwargs`) can be set per call; `images_kwargs` and `videos_kwargs` set them separately.

    `allowed_media`, for servers, restricts how images and videos are given as strings: a list of "path", "url" (http
    and https, up to 256 MiB, public addresses only, redirects included) and "data" (`data:` URIs and base64). `None`
    allows all, and any address. It is saved with the processor. No argument of a call changes it, since servers pass
    on what clients send.
    """

    valid_processor_kwargs: Any = NeoProcessorKwargs
    return_position_ids = False
    return_image_grid_thw = False

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        chat_template=None,
        allowed_media=None,
        **kwargs,
    ):
        is_known = allowed_media is None or (
            not isinstance(allowed_media, str) and set(allowed_media) <= set(MEDIA_KINDS)
        )
        if not is_known:
            raise ValueError(
                f"allowed_media must be None or a list of {', '.join(MEDIA_KINDS)}, got {allowed_media!r}."
            )
        self.allowed_media = allowed_media
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
        self.auto_map = {"AutoProcessor": "processing_neo.NeoProcessor"}  # set by saving, but not by loading
        drop_marks(self.tokenizer)
        self.image_token_id = self._token_id(self.image_context_token)
        self.image_start_token_id = self._token_id(self.image_start_token)
        self.image_end_token_id = self._token_id(self.image_end_token)

    def check_argument_for_proper_class(self, argument_name, argument):
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        # transformers exports the base class of video processors only if torchvision is installed.
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
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        videos: VideoInput | None = None,
        audio: None = None,
        return_position_ids: bool | None = None,
        return_image_grid_thw: bool | None = None,
        **kwargs: Unpack[NeoProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images: images (Pillow, numpy, torch, path, URL, base64) in prompt order: one, a list, or a list per text.
            text: a prompt or a list of prompts with `<image>` and `<video>` placeholders.
            videos: videos (see `NeoVideoProcessor`) in prompt order: one, a list, or a list per text.
            audio: not supported; ignored.
            return_position_ids: whether to return the T, H and W indices as `position_ids` (3, B, L); requires
                `return_tensors="pt"`. Defaults to the attribute of the same name (`False`).
            return_image_grid_thw: whether to return `image_grid_thw` (N, 3), (1, rows, columns), instead of
                `image_grid_hw`, for clients that split `pixel_values` by grid themselves (TRL's GRPO). Defaults to the
                attribute of the same name (`False`).
            kwargs: settings of tokenizer, image processor and video processor. With `return_mm_token_type_ids`,
                `mm_token_type_ids` (B, L) is 1 at visual tokens of images, 2 at those of videos and 0 elsewhere.

        Raises:
            ValueError: if a prompt is empty, the numbers of placeholders and images or videos differ, truncation would
                cut through an image or a turn, an image or video cannot be read, has an impossible size or is not
                allowed, or a setting is misspelt or out of range.
        """
        self._check_settings(kwargs)
        if self.allowed_media is not None:
            images, videos = (admit_media(media, self.allowed_media) for media in (images, videos))
        return_offsets = kwargs.get("return_text_replacement_offsets")
        if videos is not None and text is not None:
            kwargs["return_text_replacement_offsets"] = True  # they tell the order of images and videos
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        offsets = (inputs.get if return_offsets else inputs.pop)("text_replacement_offsets", None)
        if "video_frames" in inputs:
            self._merge_videos(inputs, offsets)
            if "mm_token_type_ids" in inputs:
                self._mark_videos(inputs["mm_token_type_ids"], offsets)
        if self.return_position_ids if return_position_ids is None else return_position_ids:
            if not isinstance(inputs.get("input_ids"), torch.Tensor):
                raise ValueError('return_position_ids requires text and return_tensors="pt".')
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

    def _check_settings(self, settings: Any):
        kinds = self.valid_processor_kwargs.__annotations__
        known = {*kinds, "common_kwargs"}.union(*(getattr(kind, "__annotations__", ()) for kind in kinds.values()))
        # `ProcessingKwargs` names the base class of image settings.
        media = {"images_kwargs": self.image_processor.valid_kwargs, "videos_kwargs": kinds["videos_kwargs"]}
        for name, kind in media.items():
            known |= set(kind.__annotations__)
            check_names(settings.get(name) or {}, kind.__annotations__)
            check_settings(settings.get(name) or {})
        check_names(settings, known, strict=False)
        check_settings(settings)

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize: bool = False,
        sanitize_control_tokens: bool = True,
        load_audio_from_video: bool = False,
        **kwargs,
    ):
        """
        As in the base class, but for these arguments.

        Args:
            conversation: messages, or a list of conversations. A system message comes first, an assistant's follows a
                user's.
            tokenize: whether to return token ids instead of text.
            sanitize_control_tokens: whether special tokens in the messages are plain text, other than those of boxes
                in the assistant's messages. If text is returned, they have invisible marks, which the processor drops.
                Placeholders in the messages are plain text if ids are returned; in text they stand for the images
                that are passed with it.
            load_audio_from_video: ignored, since servers set it: NEO has no audio input.

        Raises:
            ValueError: if there is no message, a role is unknown or out of order, or a part is neither text, image nor
                video.
        """
        conversation = getattr(conversation, "messages", conversation)
        is_batched = bool(conversation) and (
            isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        )
        conversations = [
            _check_messages(getattr(messages, "messages", messages))
            for messages in (conversation if is_batched else [conversation])
        ]
        if sanitize_control_tokens:
            conversations = [self.mark_messages(messages, placeholders=tokenize) for messages in conversations]
        conversation = conversations if is_batched else conversations[0]
        kwargs["tokenize"] = tokenize
        return super().apply_chat_template(conversation, *args, **kwargs)

    def mark_messages(self, messages: list[dict], placeholders: bool = True) -> list[dict]:
        """
        Mark the special tokens in messages, so that they are tokenized as plain text (see `mark_control_tokens`).

        Args:
            messages: a conversation; not modified.
            placeholders: whether to mark `<image>` and `<video>` as well.
        """
        tokens = (self.image_token, self.video_token) if placeholders else ()

        def mark(text, role):
            return mark_control_tokens(text, self.tokenizer, role, tokens) if isinstance(text, str) else text

        marked = []
        for message in messages:
            role, content = message["role"], message.get("content")
            if isinstance(content, (list, tuple)):
                parts: list[dict] = []
                for part in content:
                    if part["type"] == "text" and parts and parts[-1]["type"] == "text":
                        # The template joins texts, and two texts can make a special token of their halves.
                        part = {"type": "text", "text": (parts.pop().get("text") or "") + (part.get("text") or "")}
                    parts.append(part)
                content = [
                    {**part, "text": mark(part.get("text"), role)} if part["type"] == "text" else part
                    for part in parts
                ]
            marked.append({**message, "content": mark(content, role)})
        return marked

    def _merge_videos(self, inputs: BatchFeature, offsets: list[list[dict]] | None):
        """Merge patches and grids of images and videos in prompt order, in place."""
        units: dict[str, list] = {"image": [], "video": []}
        if "pixel_values" in inputs:
            grids = inputs["image_grid_hw"]
            units["image"] = _split(inputs["pixel_values"], grids, [1] * len(grids))
        frames = [int(count) for count in inputs.pop("video_frames")]
        pixels, grids = inputs.pop("video_pixel_values"), inputs.pop("video_image_grid_hw")
        units["video"] = _split(pixels, grids, frames)
        ordered = units["image"] + units["video"]
        if offsets is not None:
            iterators = {kind: iter(units[kind]) for kind in units}
            ordered = [next(iterators[replaced["type"]]) for row in offsets for replaced in row]
        join: Any = torch.cat if isinstance(pixels, torch.Tensor) else np.concatenate
        inputs["pixel_values"], inputs["image_grid_hw"] = map(join, zip(*ordered, strict=True))

    def _mark_videos(self, token_types, offsets: list[list[dict]]):
        """Change the type of visual tokens of videos from 1 to 2, in place."""
        for types, row in zip(token_types, offsets, strict=True):
            visual = [place for place, kind in enumerate(types) if kind]
            end = 0
            for replaced in row:
                start, end = end, end + replaced["replacement"].count(self.image_context_token)
                if replaced["type"] == "video":
                    for place in visual[start:end]:
                        types[place] = 2

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        # One list per prompt, so that counts are compared and pixel budgets shared within a prompt.
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
        if not text or not all(text):
            raise ValueError(f"A prompt must not be empty, got {text!r:.200}.")
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
        # Under other names than those of images, with which `_merge_videos` merges them.
        data = {f"video_{name}": features[name] for name in ("pixel_values", "image_grid_hw")}
        data["video_frames"] = [len(metadata.frames_indices) for metadata in features["video_metadata"]]
        return data | {"video_metadata": features["video_metadata"]}, texts

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        rows, columns = (int(side) for side in image_inputs["image_grid_hw"][image_idx])
        merge_size = kwargs.get("spatial_merge_size", self.image_processor.spatial_merge_size)
        num_tokens = rows * columns // merge_size**2
        return self.image_start_token + self.image_context_token * num_tokens + self.image_end_token

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]):
        ids = text_inputs["input_ids"]
        rows = ids.tolist() if hasattr(ids, "tolist") else ids
        if "attention_mask" in text_inputs:  # padding may be one of the tokens
            masks = text_inputs["attention_mask"]
            rows = [[x for x, is_kept in zip(*row, strict=True) if is_kept] for row in zip(rows, masks, strict=True)]
        is_truncated = any(encoding.overflowing for encoding in getattr(text_inputs, "encodings", None) or [])
        for token in (self.image_context_token, *CONTROL_TOKENS):
            expected = [sample.count(token) for sample in text]
            token_id = self.tokenizer.convert_tokens_to_ids(token)
            found = [list(row).count(token_id) for row in rows]
            if any(expected) and found != expected and (is_truncated or token == self.image_context_token):
                what, name = ("an image", "image") if "im_" not in token else ("a turn", token)
                raise ValueError(
                    f"Truncation cut through {what}: the prompts hold {expected} {name} tokens, of which {found} are "
                    "left. Increase max_length or disable truncation."
                )

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """
        Count the visual tokens and patches of images and videos.

        Args:
            image_sizes: (height, width) of each image in pixels.
            video_sizes: (sampled frames, height, width) of each video.
            kwargs: settings, as in a call.
        """
        separate = {name: kwargs.pop(name, None) or {} for name in ("images_kwargs", "videos_kwargs")}
        counts = {}
        if image_sizes is not None:
            settings = kwargs | separate["images_kwargs"]
            merge_size = settings.get("spatial_merge_size", self.image_processor.spatial_merge_size)
            if settings.get("share_pixel_budget", self.image_processor.share_pixel_budget):
                max_pixels = settings.get("max_pixels", self.image_processor.max_pixels)
                min_pixels = settings.get("min_pixels", self.image_processor.min_pixels)
                settings = settings | {"max_pixels": shared_budget(max_pixels, min_pixels, len(image_sizes))}
            patches = [self.image_processor.get_number_of_image_patches(*size, settings) for size in image_sizes]
            counts["num_image_patches"] = patches
            counts["num_image_tokens"] = [count // merge_size**2 for count in patches]
        if video_sizes is not None:
            settings = kwargs | separate["videos_kwargs"]
            merge_size = settings.get("spatial_merge_size", self.video_processor.spatial_merge_size)
            patches = [self.video_processor.get_num_of_video_patches(*size, settings) for size in video_sizes]
            counts["num_video_tokens"] = [count // merge_size**2 for count in patches]
        return MultiModalData(**counts)


def _check_messages(messages) -> list[dict]:
    """The messages of a conversation as dicts, if their roles and parts are those that the template knows."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"A conversation must be a list of at least one message, got {messages!r:.200}.")
    checked: list[dict] = []
    for message in messages:
        if hasattr(message, "model_dump"):
            message = message.model_dump(exclude_none=True)
        elif dataclasses.is_dataclass(message) and not isinstance(message, type):
            message = dataclasses.asdict(message)
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"A message must be a dict with a role, one of {', '.join(ROLES)}, got {message!r:.200}.")
        if message["role"] == "system" and checked:
            raise ValueError(
                f"A system message must come first, got it after {len(checked)} others: {message!r:.200}."
            )
        if message["role"] == "assistant" and (not checked or checked[-1]["role"] != "user"):
            before = f"the {checked[-1]['role']}'s" if checked else "none"
            raise ValueError(f"An assistant's message must follow a user's, got it after {before}: {message!r:.200}.")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else part
                if kind not in PART_TYPES:
                    raise ValueError(f"A message part must be of type 'text', 'image' or 'video', got {kind!s:.200}.")
                if kind == "text" and not isinstance(part.get("text"), str):
                    raise ValueError(f"A part of type 'text' must have a 'text', a string, got {part!r:.200}.")
        elif content is None and message["role"] == "user":
            raise ValueError(f"A user's message must have a 'content', text or a list of parts, got {message!r:.200}.")
        elif not isinstance(content, (str, type(None))):
            raise ValueError(f"The content of a message must be text or a list of parts, got {content!r:.200}.")
        checked.append(message)
    return checked


def serialize_video(
    metadata: VideoMetadata,
    style: str = "timestamps",
    start: int | float | None = None,
    end: int | float | None = None,
) -> str:
    """
    Write a video as text, with `<image>` for each of its frames (NEO-ov paper, section 3.2).

    Args:
        metadata: metadata of the video. `frames_indices` are the sampled frames, `timestamps` their times: the index
            divided by `fps`, or the presentation times of a file read with `video_times="container"`.
        style: see `NeoVideosKwargs`.
        start, end: sampled window in seconds; by default the whole video.

    Returns:
        Depending on `style`:
        "timestamps": `The time range of this video is [00:00-MM:SS], and the following is a series of N frames sampled
        at F FPS.\\n`, then `[MM:SS.ss]:<image>\\n` per frame;
        "bare": `<image>\\n` per frame;
        "spatial_timestamps": the same first line, then `Frame1 is at [MM:SS.ss]:<image>\\n`, ...;
        "spatial": `Frame-1: <image>\\n`, ...
        Minutes continue past an hour.
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
    for number, time in enumerate(metadata.timestamps, start=1):
        frame = f"Frame{number} is at " if style == "spatial_timestamps" else ""
        text += f"{frame}[{format_timestamp(time)}]:<image>\n"
    return text


def format_time(seconds: float) -> str:
    """Format as `MM:SS`, rounded down. Minutes continue past 99."""
    return f"{int(seconds) // 60:02d}:{int(seconds) % 60:02d}"


def format_timestamp(seconds: float) -> str:
    """Format as `MM:SS.ss`, rounded. Minutes continue past 99; 59.998 is `00:60.00`, as in training."""
    return f"{int(seconds // 60):02d}:{seconds % 60:05.2f}"


def _split(pixels, grids, counts: list[int]) -> list[tuple]:
    """Split patches (P, ...) and grids (N, 2) into units of `counts` images: (patches, grids) of each unit."""
    images = np.cumsum(counts)[:-1]
    patches = np.cumsum(np.asarray(grids).prod(-1))[images - 1]
    split: Any = torch.tensor_split if isinstance(pixels, torch.Tensor) else np.split
    return list(zip(split(pixels, patches.tolist()), split(grids, images.tolist()), strict=True))


def _is_nested(images) -> bool:
    return isinstance(images, (list, tuple)) and bool(images) and all(isinstance(x, (list, tuple)) for x in images)


__all__ = ["NeoProcessor", "serialize_video"]
