"""Videos to normalised patches: a video is a sequence of sampled frames, each an image. No torchvision."""

from .image_processing_neo import (
    NeoImageProcessor,
    check_names,
    check_settings,
    smart_resize,
    tensor_to_array,
    to_uint8,
)
from .video_reading_neo import NeoVideoMetadata, open_video

import math
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoInput, VideoMetadata

logger = logging.get_logger(__name__)

SAMPLING = ("num_frames", "fps", "frames_indices")
VIDEO_TIMES = ("mean_rate", "container")
# More than fit in any context: a frame takes some 20 tokens at least, so these take 160,000.
MAX_FRAMES = 8192


class NeoVideoProcessorKwargs(VideosKwargs, total=False):
    r"""
    num_frames (`int`, *optional*):
        Sample this many frames, evenly spaced inside the video. Frames of a shorter video repeat.
    fps (`float`, *optional*, defaults to 1.0):
        Sample this many frames per second, at least one frame.
    frames_indices (`list[int]`, *optional*):
        Sample exactly these frames. A call may set at most one of `num_frames`, `fps` and `frames_indices`.
    max_frames (`int`, *optional*, defaults to 128):
        If `fps` would give more frames, sample this many evenly spaced frames instead. `None` in a call: no limit.
    segment_centers (`bool`, *optional*, defaults to `False`):
        Divide the video into `num_frames` equal segments and sample the middle frame of each.
    start, end (`float`, *optional*):
        Sample only from this window, in seconds. Timestamps still count from the start of the video.
    min_pixels, max_pixels (`int`, *optional*, defaults to 4096 and 230400):
        Pixel budget of a frame.
    max_video_tokens (`int`, *optional*):
        Maximum number of visual tokens per video. Frames are shrunk, down to `min_pixels`, before any is dropped.
    patch_size, spatial_merge_size (`int`, *optional*, defaults to 16 and 2):
        As for images.
    video_times (`str`, *optional*, defaults to `"mean_rate"`):
        The times of the frames of a file: "mean_rate", number over mean frame rate, as in training; "container", the
        presentation times, which differ if the rate varies.
    do_sample_frames (`bool`, *optional*):
        By default, files are sampled, and frames passed directly are sampled if the call sets a sampling method or if
        their metadata has a frame rate and no `frames_indices`. `False`: keep all frames; `True`: always sample.
    """

    frames_indices: list[int] | None
    max_frames: int | None
    segment_centers: bool
    start: int | float | None
    end: int | float | None
    min_pixels: int
    max_pixels: int
    max_video_tokens: int | None
    patch_size: int
    spatial_merge_size: int
    video_times: str


def video_duration(metadata: VideoMetadata) -> float | None:
    """Duration in seconds, `None` if the frame rate is unknown."""
    if not metadata.fps:
        return None
    return metadata.duration or metadata.total_num_frames / metadata.fps


def sample_frames(
    metadata: VideoMetadata,
    num_frames: int | None = None,
    fps: int | float | None = None,
    frames_indices: list[int] | None = None,
    max_frames: int | None = None,
    segment_centers: bool = False,
    start: int | float | None = None,
    end: int | float | None = None,
) -> list[int]:
    """
    Choose frames as in training and evaluation of the released checkpoints (NEO-ov paper, section 3.2).

    Args:
        metadata: number of frames and frame rate of the video.
        num_frames, fps, frames_indices, max_frames, segment_centers, start, end: see `NeoVideoProcessorKwargs`. With
            neither `num_frames`, `fps` nor `frames_indices`, all frames of the window are chosen.

    Returns:
        Frame indices.

    Raises:
        ValueError: if a setting is no finite number, is out of range for the video, asks for more than `MAX_FRAMES`
            frames, or needs the frame rate and that is unknown.
    """
    check_settings(
        {
            "num_frames": num_frames,
            "fps": fps,
            "frames_indices": frames_indices,
            "max_frames": max_frames,
            "start": start,
            "end": end,
        }
    )
    total, video_fps = metadata.total_num_frames, metadata.fps
    if frames_indices is not None:
        outside = [index for index in frames_indices if not 0 <= index < total]
        if outside or not len(frames_indices):
            raise ValueError(
                f"frames_indices must name frames of the video, 0 to {total - 1}, got {outside or frames_indices}."
            )
        return [int(index) for index in frames_indices]

    first, length, duration = 0, total, video_duration(metadata)
    if start is not None or end is not None:
        if duration is None:
            raise ValueError(f"A window in seconds needs the frame rate of the video, got fps={video_fps}.")
        start, end = start or 0.0, duration if end is None else end
        times = getattr(metadata, "times", None)
        if times is not None:
            first, stop = (bisect_left(times, round(seconds, 6)) for seconds in (start, end))
        else:
            # Decimal seconds times a frame rate miss whole numbers by rounding error.
            first, stop = (math.ceil(round(seconds * video_fps, 6)) for seconds in (start, end))
        first, length = max(first, 0), min(stop, total) - first
        if not 0 <= start < end <= duration or length < 1:
            raise ValueError(
                f"The window must hold a frame of the video, 0 to {duration:.2f} seconds at {video_fps:g} frames per "
                f"second, got start={start}, end={end}."
            )
        duration = end - start

    # The order of float operations decides on which side of a frame boundary an index falls: keep it.
    if num_frames is not None:
        _check_count(num_frames, f"num_frames={num_frames}")
        if segment_centers:
            step = length / num_frames
            offsets = [int((number + 0.5) * step) for number in range(num_frames)]
        else:
            step = length / (num_frames + 1)
            offsets = [int(number * step) for number in range(1, num_frames + 1)]
    elif fps is not None:
        if duration is None:
            raise ValueError(
                f"Sampling by rate needs the frame rate of the video, got fps={fps} and a video of {video_fps} frames "
                "per second. Set num_frames, or fps in video_metadata."
            )
        count = max(int(duration * fps), 1)
        if max_frames is not None and count > max_frames:
            count, step = max_frames, length / (max_frames + 1)
        else:
            step = video_fps / fps
        _check_count(count, f"fps={fps} for {duration:g} seconds and max_frames={max_frames}")
        offsets = [min(int(number * step), length - 1) for number in range(count)]
    else:
        offsets = [*range(length)]
    return [first + offset for offset in offsets]


def _check_count(count: int, settings: str):
    if count > MAX_FRAMES:
        raise ValueError(f"At most {MAX_FRAMES} frames of a video are read, got {settings}: {count} frames.")


class NeoVideoProcessor(VideoProcessorMixin, NeoImageProcessor):
    """
    Turns videos into `pixel_values` (P, 3 * patch_size^2) and `image_grid_hw` (frames, 2), as if all frames of all
    videos were images; with `return_metadata`, also into one `VideoMetadata` per video, whose `frames_indices` are the
    sampled frames.

    A video is a path, a URL, a `data:` URI, an array or tensor of frames (T, H, W, C) or (T, C, H, W), or a list of
    frames (Pillow, array, tensor or path). Only the sampled frames of a file are read, one at a time.
    """

    min_pixels = 4096
    max_pixels = 230400
    max_video_tokens = None
    fps: float | None = 1.0
    num_frames = None
    frames_indices = None
    max_frames = 128
    segment_centers = False
    start = None
    end = None
    do_sample_frames = None
    video_times = VIDEO_TIMES[0]
    valid_kwargs: Any = NeoVideoProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(self, **kwargs: Any):
        if kwargs.get("fps") is None and any(
            kwargs.get(name) is not None for name in ("num_frames", "frames_indices")
        ):
            self.fps = None
        super().__init__(**kwargs)

    def preprocess(self, videos: VideoInput, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """
        Args:
            videos: a video or a list of videos.
            kwargs: settings for this call (`NeoVideoProcessorKwargs`). `video_metadata` holds one `VideoMetadata` or
                dict per video passed as frames, `{}` if nothing is known; that of files is read from them.

        Raises:
            ValueError: if a video cannot be read, is empty or has frames of different sizes, or if settings are in
                conflict or out of range for the video; quotes the value.
        """
        check_names(kwargs, self.valid_kwargs.__annotations__)
        self._check_settings(kwargs)
        validate_typed_dict(self.valid_kwargs, kwargs)
        requested = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
        if len(requested) > 1:
            raise ValueError(f"Set at most one of {', '.join(SAMPLING)}, got {requested}.")
        if requested:
            kwargs = {"do_sample_frames": True, **dict.fromkeys(SAMPLING), **kwargs}
        for name in self.valid_kwargs.__annotations__:
            kwargs.setdefault(name, getattr(self, name, None))
        kwargs = self._standardize_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)
        if kwargs["video_times"] not in VIDEO_TIMES:
            raise ValueError(f"video_times must be one of {VIDEO_TIMES}, got {kwargs['video_times']!r}.")

        videos = flatten_videos(videos)
        given = kwargs.pop("video_metadata")
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        given = [one for item in given for one in (item if isinstance(item, (list, tuple)) else [item])]
        if len(given) == 1 and given[0] is None:
            given *= len(videos)
        if len(given) != len(videos):
            raise ValueError(f"video_metadata must be one for each of the {len(videos)} videos, got {len(given)}.")

        opened = [self._open(video, one, **kwargs) for video, one in zip(videos, given, strict=True)]
        kwargs["max_pixels"] = [budget for _, metadata, budget in opened for _ in metadata.frames_indices]
        features = self._preprocess(chain.from_iterable(frames for frames, _, _ in opened), **kwargs)
        if kwargs["return_metadata"]:
            features["video_metadata"] = [metadata for _, metadata, _ in opened]
        return features

    def _open(self, video, metadata, **settings) -> tuple[Iterator[np.ndarray], VideoMetadata, int]:
        """Open a video: its sampled frames (3, H, W), read lazily, its metadata and the `max_pixels` of a frame."""
        reader = open_video(video) if isinstance(video, (str, os.PathLike)) else None
        to_array = {name: settings[name] for name in ("do_convert_rgb", "input_data_format")}
        if reader:
            if settings["video_times"] == "container":
                reader.use_container_times()
            elif reader.has_variable_rate:
                logger.warning(
                    f"The frame rate of the video {reader.name} varies, so times from its mean of "
                    f'{reader.metadata.fps:.3f} frames per second are off: video_times="container" gives true ones.'
                )
            metadata = reader.metadata
            to_array["input_data_format"] = ChannelDimension.LAST
        else:
            metadata = _metadata_of_frames(video, metadata)
            if getattr(video, "ndim", 0) == 4:
                video = _to_uint8_video(video, settings["do_rescale"])
            metadata.height, metadata.width = self.process_image(self.fetch_images(video[0]), **to_array).shape[1:]

        known = metadata.frames_indices  # of frames that were sampled before they were passed
        do_sample = settings["do_sample_frames"]
        if do_sample is None:
            do_sample = reader or (metadata.fps and known is None)
        if do_sample and known is not None:
            raise ValueError(
                f"video_metadata.frames_indices says that the {len(known)} frames are a sample of "
                f"{metadata.total_num_frames}: they cannot be sampled again."
            )
        if do_sample:
            sampling = (*SAMPLING, "max_frames", "segment_centers", "start", "end")
            places = sample_frames(metadata, **{name: settings[name] for name in sampling})
        else:
            places = [*range(metadata.total_num_frames if known is None else len(known))]
        if reader:
            _check_count(len(places), f"a video of {metadata.total_num_frames} frames")
        places, budget = self._fit(places, metadata, **settings)
        metadata.frames_indices = places if known is None else [known[place] for place in places]
        frames = reader.read(places) if reader else (video[place] for place in places)
        return self._prepare(frames, metadata, to_array), metadata, budget

    def _prepare(self, frames: Iterable, metadata: VideoMetadata, to_array: dict) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames):
            image = self.process_image(self.fetch_images(frame), **to_array)
            if image.shape[1:] != (metadata.height, metadata.width):
                raise ValueError(
                    f"The frames of a video must have the same size, but frame {number} is {image.shape[1]}x"
                    f"{image.shape[2]} and the first {metadata.height}x{metadata.width} (height x width)."
                )
            yield image

    def _fit(self, indices: list[int], metadata: VideoMetadata, **settings) -> tuple[list[int], int]:
        """Reduce pixels, then frames, to `max_video_tokens`: the remaining frames and their `max_pixels`."""
        limit, min_pixels, max_pixels = (settings[name] for name in ("max_video_tokens", "min_pixels", "max_pixels"))
        factor = settings["patch_size"] * settings["spatial_merge_size"]

        def tokens(budget: int) -> int:
            size = (metadata.height, metadata.width)
            if settings["do_resize"]:
                size = smart_resize(*size, factor, min_pixels, budget)
            return math.prod(size) // factor**2

        if limit is None or len(indices) * tokens(max_pixels) <= limit:
            return indices, max_pixels
        share = max(limit // len(indices) * factor**2, min_pixels)
        budget = share if len(indices) * tokens(share) <= limit else min_pixels
        room = min(limit // tokens(budget), len(indices))
        if not room:
            raise ValueError(
                f"max_video_tokens={limit} has no room for a single frame, which needs {tokens(min_pixels)} tokens of "
                f"{factor}x{factor} pixels at min_pixels={min_pixels}."
            )
        step = len(indices) / room
        kept = [indices[int((number + 0.5) * step)] for number in range(room)]
        logger.warning(
            f"max_video_tokens={limit}: kept {room} of {len(indices)} frames with {tokens(budget)} visual tokens "
            f"instead of {tokens(max_pixels)} each."
        )
        return kept, budget

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """Number of patches of `num_frames` frames of `height` x `width` pixels; `videos_kwargs` override settings."""
        names = ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels", "max_video_tokens", "do_resize")
        settings = {name: getattr(self, name) for name in names}
        settings |= {name: value for name, value in (videos_kwargs or {}).items() if name in settings}
        metadata = VideoMetadata(total_num_frames=num_frames, height=height, width=width)
        kept, settings["max_pixels"] = self._fit([*range(num_frames)], metadata, **settings)
        return len(kept) * self.get_number_of_image_patches(height, width, settings)


def is_video(x) -> bool:
    """Whether `x` is a single video: a path or URL, an array or tensor of frames, or a list of frames (not paths)."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in x)
    return isinstance(x, (str, os.PathLike)) or getattr(x, "ndim", 0) == 4


def flatten_videos(videos) -> list:
    """
    Flatten a video, a list of videos or a list of such lists. A list of paths is a list of videos, but inside another
    list it is the frames of one video.
    """
    if is_video(videos):
        return [videos]
    if getattr(videos, "ndim", 0) == 5:
        return list(videos)
    if isinstance(videos, (list, tuple)) and videos:
        flat = []
        for item in videos:
            is_row = isinstance(item, (list, tuple)) and not is_video(item) and not _is_paths(item)
            flat += flatten_videos(item) if is_row else [item]
        if all(is_video(video) or _is_paths(video) for video in flat):
            return flat
    kind = f"{type(videos).__name__} {getattr(videos, 'shape', videos)}"
    raise ValueError(
        f"A video must be a path, a URL, or frames (at least one, of 3 dimensions each), got {kind:.200}."
    )


def _to_uint8_video(frames, do_rescale: bool) -> np.ndarray:
    """An array or tensor of frames as uint8, so that whether floats reach to 1 or 255 is decided for all frames."""
    frames = tensor_to_array(frames) if isinstance(frames, torch.Tensor) else frames
    return to_uint8(frames) if do_rescale else frames


def _is_paths(x) -> bool:
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(path, (str, os.PathLike)) for path in x)


def _metadata_of_frames(frames, known: VideoMetadata | dict | None) -> VideoMetadata:
    """Metadata of a video passed as frames, checked; a frame rate of 0 means unknown. `known` is not modified."""
    metadata = NeoVideoMetadata(**{"total_num_frames": len(frames), **(known or {})})
    for name in ("fps", "duration"):
        value = metadata[name]
        if isinstance(value, (bool, str)) or (value is not None and not math.isfinite(value)):
            raise ValueError(f"video_metadata.{name} must be a finite number or None, got {value!r}.")
    metadata.fps = metadata.fps or None
    if metadata.fps is not None and metadata.fps < 0:
        raise ValueError(f"video_metadata.fps must be positive, or None if unknown, got {metadata.fps}.")
    if metadata.frames_indices is not None:
        indices = [int(index) for index in metadata.frames_indices]
        metadata.frames_indices = None if indices == [*range(metadata.total_num_frames)] else indices
    described = metadata.total_num_frames if metadata.frames_indices is None else len(metadata.frames_indices)
    if not len(frames):
        raise ValueError(f"A video must have at least one frame, got {getattr(frames, 'shape', frames)}.")
    if described != len(frames):
        raise ValueError(f"video_metadata describes {described} frames, but {len(frames)} were given.")
    return metadata


__all__ = ["NeoVideoProcessor", "sample_frames"]
