"""Video files to frames: opened from a path, a URL or a `data:` URI, read frame by frame with decord or PyAV."""

from .image_processing_neo import describe_source, fetch

import io
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from transformers.utils import is_av_available, is_decord_available
from transformers.video_utils import VideoMetadata

if is_decord_available():
    import decord
if is_av_available():
    import av


def open_video(source: str | os.PathLike) -> "VideoReader":
    """
    Open a video with decord, or with PyAV where decord is not installed.

    Args:
        source: a path, an http(s) URL or a `data:` URI. URLs are downloaded into memory, paths are read in place.

    Raises:
        ValueError: if it cannot be read as a video; names the source and the reason.
        ImportError: if neither library is installed.
    """
    if not (is_decord_available() or is_av_available()):
        raise ImportError("Reading video files needs decord or PyAV: pip install decord, or pip install av.")
    reader: type[VideoReader] = DecordReader if is_decord_available() else PyAVReader
    name = describe_source(source)
    try:
        file = fetch(source)
        if isinstance(file, io.BytesIO) or os.path.isfile(file):
            return reader(file, name)
    except Exception as error:  # decoders raise errors of all types
        raise ValueError(f"Cannot read the video {name}: {type(error).__name__}: {error}") from error
    raise ValueError(f"Cannot read the video {name}: there is no such file.")


class VideoReader:
    """
    Frames of a video, decoded on demand: each read seeks to the preceding keyframe, so memory does not grow with the
    length of the video.

    Args:
        file: a path, or the content of the file.
        name: what error messages call the video.

    Attributes:
        metadata: number of frames, mean frames per second (`None` if unknown), duration in seconds, height and width
            in pixels.
    """

    metadata: VideoMetadata

    def __init__(self, file: str | io.BytesIO, name: str):
        self.name = name
        self.metadata = self._open(file)
        if not self.metadata.total_num_frames:
            raise ValueError("it has no frames")
        if self.metadata.fps:
            self.metadata.duration = self.metadata.total_num_frames / self.metadata.fps

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """
        Yield the frames at `indices`, in that order, as (height, width, 3) uint8 RGB.

        Raises:
            ValueError: if a frame cannot be decoded; names the video and the index.
        """
        for index in indices:
            try:
                yield self._frame(index)
            except Exception as error:  # decoders raise errors of all types
                raise ValueError(
                    f"Cannot read frame {index} of the video {self.name}: {type(error).__name__}: {error}"
                ) from error

    def _open(self, file: str | io.BytesIO) -> VideoMetadata:
        raise NotImplementedError

    def _frame(self, index: int) -> np.ndarray:
        raise NotImplementedError


class DecordReader(VideoReader):
    """Reads with decord."""

    def _open(self, file):
        self.frames = decord.VideoReader(file)
        height, width, _ = self.frames[0].shape
        fps = float(self.frames.get_avg_fps()) or None
        return VideoMetadata(len(self.frames), fps=fps, width=width, height=height, video_backend="decord")

    def _frame(self, index):
        return self.frames[index].asnumpy()


class PyAVReader(VideoReader):
    """Reads with PyAV. Frames are located by their timestamps, which packets carry without being decoded."""

    def _open(self, file):
        self.container = av.open(file, "r")
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        packets = [(p.pts, p.is_keyframe) for p in self.container.demux(self.stream) if p.pts is not None]
        self.times = sorted(time for time, _ in packets)
        self.keyframes = sorted(time for time, is_keyframe in packets if is_keyframe)
        self.decoded: Any = None  # the last frame that came out of the decoder
        self.frames: Any = None  # the frames that follow it
        fps = float(self.stream.average_rate or 0) or None
        return VideoMetadata(
            len(self.times), fps=fps, width=self.stream.width, height=self.stream.height, video_backend="pyav"
        )

    def _frame(self, index):
        time = self.times[index]
        keyframe = self.keyframes[max(bisect_right(self.keyframes, time) - 1, 0)]
        if self.decoded is None or not keyframe <= self.decoded.pts <= time:
            self.container.seek(time, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.decoded = next(self.frames)
        while self.decoded.pts < time:
            self.decoded = next(self.frames)
        return self.decoded.to_ndarray(format="rgb24")
