"""Videos to normalised patches: a video is its sampled frames, each an image of its own. No torchvision."""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)
from .image_processing_neo import NeoImageProcessor, load_image, smart_resize

import base64
import io
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, validate_kwargs
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_av_available, is_decord_available, logging
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata, load_video

if is_decord_available():
    import decord
if is_av_available():
    import av

logger = logging.get_logger(__name__)

SAMPLING = ("num_frames", "fps", "frames_indices")


class NeoVideoProcessorKwargs(VideosKwargs, total=False):
    r"""
    num_frames (`int`, *optional*):
        Sample so many frames, evenly spaced and off both ends of the video. A video with fewer frames repeats some.
    fps (`float`, *optional*, defaults to 1.0):
        Sample so many frames per second, one at least.
    frames_indices (`list[int]`, *optional*):
        Sample just these frames. At most one of `num_frames`, `fps` and `frames_indices` can be given in a call.
    max_frames (`int`, *optional*, defaults to 128):
        Where `fps` would give more frames, so many evenly spaced ones are taken instead. `None` in a call: no limit.
    segment_centers (`bool`, *optional*, defaults to `False`):
        Cut the video into `num_frames` equal segments and take the frame in the middle of each.
    start, end (`float`, *optional*):
        Sample frames of this window of the video only, in seconds. Times still count from the video's beginning.
    min_pixels, max_pixels (`int`, *optional*, defaults to 4096 and 230400):
        Pixel budget of a frame.
    max_video_tokens (`int`, *optional*):
        Visual tokens of all frames of a video at most. Frames shrink, down to `min_pixels`, before any is left out.
    patch_size, spatial_merge_size (`int`, *optional*, defaults to 16 and 2):
        As of images.
    do_sample_frames (`bool`, *optional*):
        By default, files are sampled; frames that are given as such are if the call says how, or if their metadata
        gives a rate and no `frames_indices`. `False`: take all frames, `True`: sample always.
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


class NeoVideoProcessor(VideoProcessorMixin, NeoImageProcessor):
    """
    Turns videos into `pixel_values` (P, 3 * patch_size^2) and `image_grid_hw` (frames, 2), just as if their frames
    were images, video after video; with `return_metadata`, also a `VideoMetadata` per video, whose `frames_indices`
    are the frames taken.

    A video is a path, a URL, frames (T, H, W, C) or (T, C, H, W) as an array or tensor, or a list of frames (Pillow,
    array, tensor or path). Of a file, only the frames needed are read and only one is held at full size.
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
    valid_kwargs: Any = NeoVideoProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]

    def __init__(self, **kwargs: Any):
        if kwargs.get("fps") is None and any(
            kwargs.get(name) is not None for name in ("num_frames", "frames_indices")
        ):
            self.fps = None
        super().__init__(**kwargs)

    def preprocess(self, videos, **kwargs: Any) -> BatchFeature:
        """
        Args:
            videos: a video or a list of videos.
            kwargs: settings for this call; `video_metadata` is a `VideoMetadata` or dict of what is known of each
                video that is given as frames, `{}` if nothing is. That of files is read from them.

        Raises:
            ValueError: a video cannot be read, has no frames or frames of unequal size, settings exclude each other
                or are out of its range, or its rate is unknown and needed; the value is quoted.
        """
        names = [*self.valid_kwargs.__annotations__, "return_tensors"]
        validate_kwargs(captured_kwargs=kwargs.keys(), valid_processor_keys=names)
        validate_typed_dict(self.valid_kwargs, kwargs)
        asked = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
        if len(asked) > 1:
            raise ValueError(f"Give at most one of {', '.join(SAMPLING)}, got {asked}.")
        if asked:
            kwargs = {"do_sample_frames": True, **dict.fromkeys(SAMPLING), **kwargs}
        for name in self.valid_kwargs.__annotations__:
            kwargs.setdefault(name, getattr(self, name, None))
        kwargs = self._standardize_kwargs(**kwargs)
        self._validate_preprocess_kwargs(**kwargs)

        videos = flatten_videos(videos)
        given = kwargs.pop("video_metadata")
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        given = [one for item in given for one in (item if isinstance(item, (list, tuple)) else [item])]
        if len(given) == 1 and given[0] is None:
            given *= len(videos)
        if len(given) != len(videos):
            raise ValueError(f"video_metadata must be one for each of the {len(videos)} videos, got {len(given)}.")

        opened = [self._open(video, one, **kwargs) for video, one in zip(videos, given, strict=True)]
        budgets = [budget for _, metadata, budget in opened for _ in metadata.frames_indices]
        kwargs["max_pixels"] = budgets
        features = self._preprocess(chain.from_iterable(frames for frames, _, _ in opened), **kwargs)
        if kwargs["return_metadata"]:
            features["video_metadata"] = [metadata for _, metadata, _ in opened]
        return features

    def _open(self, video, metadata, **settings) -> tuple[Iterator[np.ndarray], VideoMetadata, int]:
        """The sampled frames of a video (3, H, W), to be read one by one, its metadata and the frames' max_pixels."""

        def choose(metadata: VideoMetadata) -> list[int]:
            sample = settings["do_sample_frames"]
            if sample is None:
                sample = isinstance(video, (str, os.PathLike)) or (metadata.fps and metadata.frames_indices is None)
            if sample and metadata.frames_indices is not None:
                raise ValueError(
                    f"The {len(metadata.frames_indices)} frames given are of {metadata.total_num_frames} already, by "
                    "video_metadata.frames_indices: they cannot be sampled again."
                )
            if sample:
                return self.sample_frames(metadata, **settings).tolist()
            return list(range(len(video) if metadata.frames_indices is not None else metadata.total_num_frames))

        frames: Any
        layout = settings["input_data_format"]
        if not isinstance(video, (str, os.PathLike)):
            metadata = _metadata_of_frames(video, metadata)
            known = metadata.frames_indices
            places = choose(metadata)
            first = load_image(video[0]) if isinstance(video[0], (str, os.PathLike)) else video[0]
            metadata.height, metadata.width = self.process_image(_to_numpy(first)).shape[1:]
            places, budget = self._fit(places, metadata, **settings)
            metadata.frames_indices = [known[place] for place in places] if known is not None else places
            frames = (video[place] for place in places)
        elif str(video).startswith(("http://", "https://")):
            wanted: list[int] = []

            def read(metadata: VideoMetadata, **_) -> list[int]:
                wanted.extend(choose(metadata))
                return sorted(set(wanted))

            try:
                frames, metadata = load_video(str(video), backend=_backend(), sample_indices_fn=read)
            except Exception as error:
                raise ValueError(f"Cannot read the video {video}: {type(error).__name__}: {error}") from error
            metadata.height, metadata.width = frames.shape[1:3]
            by_index = dict(zip(sorted(set(wanted)), frames, strict=True))
            metadata.frames_indices, budget = self._fit(wanted, metadata, **settings)
            frames, layout = (by_index[index] for index in metadata.frames_indices), ChannelDimension.LAST
        else:
            file = open_video(video)
            metadata = file.metadata
            metadata.frames_indices, budget = self._fit(choose(metadata), metadata, **settings)
            frames, layout = file.read(metadata.frames_indices), ChannelDimension.LAST
        return self._prepare(frames, metadata, settings["do_convert_rgb"], layout), metadata, budget

    def _prepare(self, frames, metadata, do_convert_rgb, layout) -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames):
            if isinstance(frame, (str, os.PathLike)):
                frame = load_image(frame)
            image = self.process_image(_to_numpy(frame), do_convert_rgb=do_convert_rgb, input_data_format=layout)
            if image.shape[1:] != (metadata.height, metadata.width):
                raise ValueError(
                    f"The frames of a video must have one size, but frame {number} is {image.shape[1]}x"
                    f"{image.shape[2]} and the first {metadata.height}x{metadata.width} (height x width)."
                )
            yield image

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        frames_indices: list[int] | None = None,
        max_frames: int | None = None,
        segment_centers: bool = False,
        start: int | float | None = None,
        end: int | float | None = None,
        **kwargs,
    ) -> np.ndarray:
        """
        Which frames to take, as the released checkpoints' training and evaluation did; see `NeoVideoProcessorKwargs`.

        Returns:
            (frames,) int64 indices.

        Raises:
            ValueError: a setting is out of the range of the video, or needs its rate and this is unknown.
        """
        total, video_fps = metadata.total_num_frames, metadata.fps
        if frames_indices is not None:
            outside = [index for index in frames_indices if not 0 <= index < total]
            if outside or not len(frames_indices):
                raise ValueError(
                    f"frames_indices must name frames of the video, 0 to {total - 1}, got {outside or frames_indices}."
                )
            return np.array(frames_indices, dtype=np.int64)

        first, length, duration = 0, total, video_duration(metadata)
        if start is not None or end is not None:
            if duration is None:
                raise ValueError(f"A window in seconds needs the frame rate of the video, got fps={video_fps}.")
            start, end = start or 0.0, duration if end is None else end
            # Decimals of seconds times a rate come out a hair off whole numbers.
            first, stop = (math.ceil(round(seconds * video_fps, 6)) for seconds in (start, end))
            first, length = max(first, 0), min(stop, total) - first
            if not 0 <= start < end <= duration or length < 1:
                raise ValueError(
                    f"The window must hold a frame of the video, 0 to {duration:.2f} seconds at {video_fps:g} frames "
                    f"per second, got start={start}, end={end}."
                )
            duration = end - start

        if num_frames is not None:
            if num_frames < 1:
                raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
            if segment_centers:
                step = length / num_frames
                offsets = [int((number + 0.5) * step) for number in range(num_frames)]
            else:
                step = length / (num_frames + 1)
                offsets = [int(number * step) for number in range(1, num_frames + 1)]
        elif fps is not None:
            if duration is None or fps <= 0:
                raise ValueError(
                    f"Sampling by rate needs a positive rate and the video's own, got fps={fps} and a video of "
                    f"{video_fps} frames per second. Give num_frames or video_metadata."
                )
            count = max(int(duration * fps), 1)
            if max_frames is not None and count > max_frames:
                count, step = max_frames, length / (max_frames + 1)
            else:
                step = video_fps / fps
            offsets = [min(int(number * step), length - 1) for number in range(count)]
        else:
            offsets = [*range(length)]
        return np.array(offsets, dtype=np.int64) + first

    def _fit(self, indices: list[int], metadata: VideoMetadata, **settings) -> tuple[list[int], int]:
        """Those of the frames that the budget of tokens has room for, and their max_pixels."""
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
                f"max_video_tokens={limit} has no room for a single frame, which takes {tokens(min_pixels)} tokens of "
                f"{factor}x{factor} pixels at min_pixels={min_pixels}."
            )
        step = len(indices) / room
        kept = [indices[int((number + 0.5) * step)] for number in range(room)]
        logger.warning(
            f"max_video_tokens={limit}: took {room} of {len(indices)} frames, of {tokens(budget)} visual tokens "
            f"instead of {tokens(max_pixels)} each."
        )
        return kept, budget

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """Patches of `num_frames` frames of `height` x `width` pixels; `videos_kwargs` may change the budgets."""
        names = ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels", "max_video_tokens", "do_resize")
        settings = {name: getattr(self, name) for name in names}
        settings |= {name: value for name, value in (videos_kwargs or {}).items() if name in settings}
        metadata = VideoMetadata(total_num_frames=num_frames, height=height, width=width)
        kept, settings["max_pixels"] = self._fit([*range(num_frames)], metadata, **settings)
        return len(kept) * self.get_number_of_image_patches(height, width, settings)


def video_duration(metadata: VideoMetadata) -> float | None:
    """Seconds that a video lasts, `None` where its frame rate is unknown."""
    if not metadata.fps:
        return None
    return metadata.duration or metadata.total_num_frames / metadata.fps


def is_video(x) -> bool:
    """Whether `x` is one video: a path or URL, an array or tensor of frames, or a list of frames that are no paths."""
    if isinstance(x, (list, tuple)):
        return bool(x) and all(isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3 for frame in x)
    return isinstance(x, (str, os.PathLike)) or getattr(x, "ndim", 0) == 4


def flatten_videos(videos) -> list:
    """
    All videos of `videos`: one, a list, or a list of lists. A list of paths is a list of videos, but as an item of
    such a list it is a video's frames.
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


def _is_paths(x) -> bool:
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(path, (str, os.PathLike)) for path in x)


def _to_numpy(frame):
    return frame.cpu().numpy() if hasattr(frame, "cpu") else frame


def _metadata_of_frames(frames, known: VideoMetadata | dict | None) -> VideoMetadata:
    """A copy of what is known of frames; a rate of 0 is no rate."""
    metadata = VideoMetadata(**{"total_num_frames": len(frames), **(known or {})})
    metadata.fps = metadata.fps or None
    if metadata.fps is not None and not 0 < metadata.fps < math.inf:
        raise ValueError(f"video_metadata.fps must be positive, or None where it is unknown, got {metadata.fps}.")
    if metadata.frames_indices is not None:
        indices = [int(index) for index in metadata.frames_indices]
        metadata.frames_indices = None if indices == [*range(metadata.total_num_frames)] else indices
    described = metadata.total_num_frames if metadata.frames_indices is None else len(metadata.frames_indices)
    if not len(frames):
        raise ValueError(f"A video must have at least one frame, got {getattr(frames, 'shape', frames)}.")
    if described != len(frames):
        raise ValueError(f"video_metadata describes {described} frames, but {len(frames)} were given.")
    return metadata


def _backend() -> str:
    if is_decord_available():
        return "decord"
    if is_av_available():
        return "pyav"
    raise ImportError("Reading video files needs decord or PyAV: pip install decord, or pip install av.")


def open_video(path: str | os.PathLike) -> "VideoFile":
    """
    Open a video file or a `data:` URI, with decord, or with PyAV where decord is not installed.

    Raises:
        ValueError: it cannot be read as a video; names the file and the reason.
    """
    backend: type[VideoFile] = DecordFile if _backend() == "decord" else PyAVFile
    source = str(path)
    is_data = source.startswith("data:")
    name = f"{source[:50]}..." if is_data else source
    if not is_data and not os.path.isfile(path):
        raise ValueError(f"Cannot read the video {name}: there is no such file.")
    try:
        file = backend(io.BytesIO(base64.b64decode(source.partition(",")[2])) if is_data else source)
    except Exception as error:  # of every kind
        raise ValueError(f"Cannot read the video {name}: {type(error).__name__}: {error}") from error
    if not file.metadata.total_num_frames:
        raise ValueError(f"Cannot read the video {name}: it has no frames.")
    return file


class VideoFile:
    """
    A video file whose frames are read one by one, each by a seek to the keyframe before it.

    metadata: frames, frames per second (on average; `None` where unknown), seconds and size of the video.
    """

    metadata: VideoMetadata

    def __init__(self, source: str | io.BytesIO):
        self.name = source if isinstance(source, str) else "given as data"

    def _describe(self, total: int, fps: float, height: int, width: int, backend: str):
        self.metadata = VideoMetadata(
            total_num_frames=total,
            fps=fps or None,
            width=width,
            height=height,
            duration=total / fps if fps else None,
            video_backend=backend,
        )

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """The frames (H, W, 3), uint8, in the order of `indices`."""
        for index in indices:
            try:
                yield self._frame(index)
            except Exception as error:  # of every kind
                raise ValueError(
                    f"Cannot read frame {index} of the video {self.name}: {type(error).__name__}: {error}"
                ) from error

    def _frame(self, index: int) -> np.ndarray:
        raise NotImplementedError


class DecordFile(VideoFile):
    """A video file, read with decord."""

    def __init__(self, source: str | io.BytesIO):
        super().__init__(source)
        self.reader = decord.VideoReader(source)
        height, width, _ = self.reader[0].shape
        self._describe(len(self.reader), float(self.reader.get_avg_fps()), height, width, "decord")

    def _frame(self, index: int) -> np.ndarray:
        return self.reader[index].asnumpy()


class PyAVFile(VideoFile):
    """A video file, read with PyAV. Its frames are found by their times, which the packets tell without decoding."""

    def __init__(self, source: str | io.BytesIO):
        super().__init__(source)
        self.container = av.open(source, "r")
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        packets = [(p.pts, p.is_keyframe) for p in self.container.demux(self.stream) if p.pts is not None]
        self.times = sorted(time for time, _ in packets)
        self.keyframes = sorted(time for time, is_keyframe in packets if is_keyframe)
        self.decoded: Any = None  # the frame at which the decoder stands
        self.frames: Any = None
        fps = float(self.stream.average_rate or 0)
        self._describe(len(self.times), fps, self.stream.height, self.stream.width, "pyav")

    def _frame(self, index: int) -> np.ndarray:
        time = self.times[index]
        keyframe = self.keyframes[max(bisect_right(self.keyframes, time) - 1, 0)]
        if self.decoded is None or not keyframe <= self.decoded.pts <= time:
            self.container.seek(time, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.decoded = next(self.frames)
        while self.decoded.pts < time:
            self.decoded = next(self.frames)
        return self.decoded.to_ndarray(format="rgb24")


__all__ = ["NeoVideoProcessor"]
