"""One person's live video: frames enter a `NeoStream` as fast as the model takes them."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.streaming import NeoStream

MAX_FRAME_BYTES = 4 * 2**20
MAX_FRAME_PIXELS = 4_000_000
MAX_STANDING_QUESTIONS = 4
MAX_STANDING_TOKENS = 64  # of an answer to a standing question


class Live:
    """
    Frames and questions of one live video. Questions are answered on a fork of the stream, while frames go on.

    Args:
        max_tokens: the largest budget that a frame may ask for.
    """

    def __init__(self, model: NeoForConditionalGeneration, processor: NeoProcessor, max_tokens: int):
        self.max_tokens = max_tokens
        self._stream = NeoStream(model, processor, max_tokens=max_tokens)
        self._lock = threading.Lock()
        self._timestamp: float | None = None
        self._num_shown = 0

    @property
    def num_bytes(self) -> int:
        """Memory of cached keys and values in bytes."""
        return self._stream.num_bytes

    def status(self) -> dict[str, Any]:
        """What the cache holds, and the number of frames shown and the timestamp of the last one."""
        return {
            "shown": self._num_shown,
            "timestamp": self._timestamp,
            "frames": self._stream.num_frames,
            "tokens": self._stream.num_tokens,
            "seconds": self._stream.num_seconds,
            "bytes": self._stream.num_bytes,
        }

    def add_frame(
        self, image: str, timestamp: float, max_tokens: int | None = None, questions: tuple[str, ...] | list[str] = ()
    ) -> dict[str, Any]:
        """
        Show a frame, and answer the standing questions about what has been shown so far.

        Args:
            image: `data:` URI of a PNG, JPEG or WebP file.
            timestamp: in seconds, not before that of the previous frame.
            max_tokens: tokens to hold; the oldest frames are dropped.

        Returns:
            `status()`, the `answers`, and the seconds spent on the frame (`frame_seconds`) and on all answers
            (`answer_seconds`).

        Raises:
            ValueError: the frame cannot be read or does not fit, or there are too many questions.
            RuntimeError: another frame is being added.
        """
        frame = _decode(image)
        if len(questions) > MAX_STANDING_QUESTIONS:
            raise ValueError(f"Up to {MAX_STANDING_QUESTIONS} standing questions, got {len(questions)}.")
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("The last frame is still being added.")
        try:
            self._stream.max_tokens = min(max_tokens or self.max_tokens, self.max_tokens)
            started = time.perf_counter()
            self._stream.add_frame(frame, timestamp)
            shown = time.perf_counter()
            self._timestamp, self._num_shown = timestamp, self._num_shown + 1
            answers = [
                "".join(self._stream.ask(question, max_new_tokens=MAX_STANDING_TOKENS, do_sample=False))
                for question in questions
            ]
            times = {"frame_seconds": shown - started, "answer_seconds": time.perf_counter() - shown}
            return {**self.status(), **times, "answers": answers}
        finally:
            self._lock.release()

    def ask(self, question: str, max_new_tokens: int) -> Iterator[str]:
        """
        Yield pieces of an answer about what has been shown so far.

        Raises:
            ValueError: nothing has been shown.
        """
        with self._lock:
            fork = self._stream.fork()
        yield from fork.ask(question, max_new_tokens=max_new_tokens, do_sample=False)


def _decode(image: str) -> Image.Image:
    if not image.startswith("data:image/") or len(image) > MAX_FRAME_BYTES * 4 / 3:
        raise ValueError(f"A frame must be the data: URI of an image of up to {MAX_FRAME_BYTES // 2**20} MB.")
    try:
        content = base64.b64decode(image.partition(",")[2], validate=True)
        frame = Image.open(io.BytesIO(content), formats=("png", "jpeg", "webp"))
        width, height = frame.size
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(f"A frame can have {MAX_FRAME_PIXELS:,} pixels, got {width} x {height}.")
        return frame.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The frame cannot be read: {error}") from error
