"""Video files to frames: opened from a path, a URL or a `data:` URI, read frame by frame with PyAV or decord."""

from .image_processing_neo import describe_source, fetch

import io
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import is_av_available, is_decord_available
from transformers.video_utils import VideoMetadata

# Before decord, whose own libvpx would otherwise take the place of PyAV's.
if is_av_available():
    import av
if is_decord_available():
    import decord


@dataclass
class NeoVideoMetadata(VideoMetadata):
    """
    `VideoMetadata` whose `times`, if set, are the presentation times of all frames of the video, in seconds after the
    first. Otherwise the time of a frame is its number divided by `fps`.
    """

    times: list[float] | None = None

    @property
    def timestamps(self) -> list[float]:
        """Times of the sampled frames in seconds."""
        if self.times is None:
            return super().timestamps
        return [self.times[index] for index in self.frames_indices]


def open_video(source: str | os.PathLike) -> "VideoReader":
    """
    Open a video with PyAV, or with decord where PyAV is not installed.

    Args:
        source: a path, an http(s) URL or a `data:` URI. URLs are downloaded into memory, paths are read in place.

    Raises:
        ValueError: if it cannot be read as a video; names the source and the reason.
        ImportError: if neither library is installed.
    """
    if not (is_decord_available() or is_av_available()):
        raise ImportError("Reading video files needs PyAV or decord: pip install av, or pip install decord.")
    reader: type[VideoReader] = PyAVReader if is_av_available() else DecordReader
    name = describe_source(source)
    try:
        file = fetch(source)
        if isinstance(file, str) and not os.path.exists(file):
            raise FileNotFoundError
        return reader(file, name)
    except FileNotFoundError as error:
        raise ValueError(f"Cannot read the video {name}: there is no such file.") from error
    except Exception as error:  # decoders raise errors of all types
        raise ValueError(f"Cannot read the video {name}: {type(error).__name__}: {error}") from error


class VideoReader:
    """
    Frames of a video, decoded on demand: each read seeks to the preceding keyframe, so memory does not grow with the
    length of the video.

    Args:
        file: a path, or the content of the file.
        name: what error messages call the video.

    Attributes:
        metadata: number of frames, mean frames per second (`None` if unknown), duration in seconds, height and width
            in pixels, as displayed.
        times: presentation time of each frame, in seconds after the first.
    """

    metadata: NeoVideoMetadata
    times: list[float]

    def __init__(self, file: str | io.BytesIO, name: str):
        self.name = name
        self.metadata = self._open(file)
        if not self.metadata.total_num_frames:
            raise ValueError("it has no frames")
        if self.metadata.fps:
            self.metadata.duration = self.metadata.total_num_frames / self.metadata.fps

    @property
    def has_variable_rate(self) -> bool:
        """Whether a frame is shown a quarter of the mean interval earlier or later than its number suggests."""
        fps = self.metadata.fps
        return bool(fps) and any(abs(time * fps - number) > 0.25 for number, time in enumerate(self.times))

    def use_container_times(self):
        """Let `metadata` give the presentation times, and the rate and duration that follow from them."""
        if len(self.times) > 1:
            interval = self.times[-1] / (len(self.times) - 1)
            self.metadata.fps, self.metadata.duration = 1 / interval, self.times[-1] + interval
        self.metadata.times = self.times

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

    def _open(self, file: str | io.BytesIO) -> NeoVideoMetadata:
        raise NotImplementedError

    def _frame(self, index: int) -> np.ndarray:
        raise NotImplementedError


class DecordReader(VideoReader):
    """Reads with decord."""

    def _open(self, file):
        self.frames = decord.VideoReader(file)
        height, width, channels = self.frames[0].shape
        if channels != 3:  # of turned frames whose rows have no multiple of 64 bytes
            raise ValueError("decord misreads its rotated frames; install PyAV (pip install av)")
        fps = float(self.frames.get_avg_fps()) or None
        times = self.frames.get_frame_timestamp(range(len(self.frames)))[:, 0]
        self.times = (times - times[0]).tolist()
        return NeoVideoMetadata(len(self.frames), fps=fps, width=width, height=height, video_backend="decord")

    def _frame(self, index):
        return self.frames[index].asnumpy()


class PyAVReader(VideoReader):
    """
    Reads with PyAV. Frames are located by their timestamps, which packets carry without being decoded, and turned as
    the display matrix of the file says.
    """

    def _open(self, file):
        self.container = av.open(file, "r")
        if self.container.format.name.endswith("_pipe"):
            raise ValueError("it is an image")
        if not self.container.streams.video:
            raise ValueError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_type = "AUTO"
        packets = self._scan()
        self.ticks = sorted(time for time, _ in packets)
        self.keyframes = sorted(time for time, is_keyframe in packets if is_keyframe)
        self.times = [float((tick - self.ticks[0]) * self.stream.time_base) for tick in self.ticks]
        self.decoded: Any = None  # the last frame that came out of the decoder
        self.frames: Any = None  # the frames that follow it
        fps = float(self.stream.average_rate or 0) or None
        metadata = NeoVideoMetadata(len(self.ticks), fps=fps, video_backend="pyav")
        if self.ticks:
            metadata.height, metadata.width, _ = self._frame(0).shape
        return metadata

    def _scan(self) -> list[tuple[int, bool]]:
        """Read all packets of the file: timestamp and whether it is a keyframe, for each packet of the video."""
        packets, count, end = [], 0, 0.0
        self.first_packet = 0
        for packet in self.container.demux():
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != self.stream.index or not packet.size:
                continue
            if packet.is_corrupt:
                raise ValueError(f"it is damaged or cut off at frame {count}")
            count += 1
            if packet.dts is not None:
                self.first_packet = min(self.first_packet, packet.dts) if count > 1 else packet.dts
            if packet.pts is not None and not packet.is_discard:  # cut away by an edit list
                packets.append((packet.pts, packet.is_keyframe))
        if count < self.stream.frames:
            raise ValueError(f"it is cut off: it holds {count} of {self.stream.frames} frames")
        # Matroska (WebM) does not count frames, but writes the duration of its longest stream.
        duration = (self.container.duration or 0) / av.time_base
        if "matroska" in self.container.format.name and end + 0.5 < duration:
            raise ValueError(f"it is cut off: it ends after {end:.2f} of {duration:.2f} seconds")
        return packets

    def _frame(self, index):
        tick = self.ticks[index]
        keyframes = self.keyframes[: max(bisect_right(self.keyframes, tick), 1)]
        if self.decoded is None or not keyframes[-1] <= self.decoded.pts <= tick:
            self._seek(tick, keyframes)
        while self.decoded.pts < tick:
            self.decoded = next(self.frames)
        if self.decoded.pts != tick:
            raise ValueError("it does not decode")
        # `rotation` counts degrees anticlockwise, as np.rot90 counts quarter turns.
        frame = np.rot90(self.decoded.to_ndarray(format="rgb24"), round(self.decoded.rotation / 90))
        return np.ascontiguousarray(frame)

    def _seek(self, tick: int, keyframes: list[int]):
        """Decode the first frame from the last of `keyframes` that leads to the frame at `tick`."""
        # Containers seek by decoding time, which may find a keyframe shown later: go back until none is skipped.
        for start in (*reversed(keyframes), self.first_packet):
            self.container.seek(start, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.decoded = next(self.frames, None)
            if self.decoded is not None and self.decoded.pts <= tick:
                return
        raise ValueError("it does not decode")
