"""Live video: frames enter the KV cache as they arrive, so that each one costs only its own tokens."""

from .cache_neo import NeoCache
from .chat_template_neo import GENERATION_PROMPT, IM_END, TURN_END, mark_control_tokens, render_turn, turn_header
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor, format_timestamp
from .video_processing_neo import sample_frames, video_duration
from .video_reading_neo import open_video

import copy
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast


class BackgroundAnswer:
    """
    An answer that `generate()` writes in a thread of its own.

    Args:
        tokenizer: decodes the answer.
        generate_kwargs: keyword arguments of `generate()`, for a single sequence.

    Attributes:
        pieces: iterator over pieces of the text, as they are written.
        error: what `generate()` raised, if it has.
    """

    def __init__(self, model: NeoForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, **generate_kwargs):
        self.pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.error: BaseException | None = None
        self._output: torch.Tensor | None = None
        self._is_stopped = threading.Event()
        given = generate_kwargs.pop("stopping_criteria", None) or []
        generate_kwargs["stopping_criteria"] = StoppingCriteriaList([*given, self._should_stop])
        self._thread = threading.Thread(target=self._generate, args=(model, generate_kwargs), daemon=True)
        self._thread.start()

    def _generate(self, model: NeoForConditionalGeneration, generate_kwargs: dict):
        try:
            self._output = model.generate(**generate_kwargs, streamer=self.pieces)
        except BaseException as error:
            self.error = error
        finally:
            self.pieces.end()

    def _should_stop(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self._is_stopped.is_set(), device=input_ids.device)

    def stop(self) -> torch.Tensor | None:
        """
        End the answer after the token that is being written, and wait for that.

        Returns:
            (1, L) ids of the prompt and the answer so far, `None` after an error.
        """
        self._is_stopped.set()
        self._thread.join()
        return self._output


@dataclass(frozen=True)
class _Frame:
    """Tokens [start, end) of a frame: its timestamp, its image and the newline after it."""

    start: int
    end: int
    timestamp: float | None


class NeoStream:
    """
    A conversation about frames that arrive one by one. Since a frame attends only to what precedes it (NEO-ov paper,
    sections 3.2 and 3.3), cached frames never need to be recomputed.

    Each call computes only new tokens. A user turn consists of `[MM:SS.ss]:<image>\\n` per frame (`<image>\\n` without
    a timestamp) and text, in the order added; `ask` closes the turn and generates the answer. Text is held back until
    the next frame or question and tokenized with it, so answers are exactly those for the same content in one prompt.

    With `max_tokens` or `max_seconds`, the oldest frames are removed from the cache, timestamps included. The system
    text, other text and all indices stay. This is an approximation: tokens after a removed frame have attended to it
    and still carry its information, and its T indices stay unused. A prompt without the frame has neither effect.

    A stream does one thing at a time: while a call runs in another thread, or an answer has not been read to its
    end, closed or discarded, any other call raises a `RuntimeError`. If a call fails, the stream is as it was before.

    Args:
        model: a NEO model.
        processor: its processor. Frames are processed by the video processor.
        system: system text.
        max_tokens: maximum number of tokens held after adding a frame. Questions and answers come on top.
        max_seconds: maximum time between the oldest and the newest frame. Requires timestamps.
        sanitize_control_tokens: whether special tokens in texts and questions are plain text. If not, they are control
            tokens, and those that mark images are refused.
        frame_kwargs: settings of the video processor, such as `max_pixels` per frame.
    """

    def __init__(
        self,
        model: NeoForConditionalGeneration,
        processor: NeoProcessor,
        system: str | None = None,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        sanitize_control_tokens: bool = True,
        **frame_kwargs,
    ):
        for name, limit in (("max_tokens", max_tokens), ("max_seconds", max_seconds)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, or None for no limit, got {limit}.")
        self.model = model
        self.processor = processor
        self.max_tokens = max_tokens
        self.max_seconds = max_seconds
        self.sanitize_control_tokens = sanitize_control_tokens
        self.frame_kwargs = frame_kwargs
        self._lock = threading.Lock()
        self._cache = NeoCache(model.config.get_text_config())
        self._ids: list[int] = []  # all tokens held; the cache may lack the last ones
        self._position_ids = torch.zeros((3, 1, 0), dtype=torch.long)
        self._next_t = 0
        self._frames: list[_Frame] = []
        self._last_timestamp: float | None = None
        self._has_seen_frame = False
        self._pending = render_turn("system", self._as_text(system or "")) + turn_header(
            "user"
        )  # text not yet in the cache
        self._pending_newline = False  # whether it begins with the newline of the last frame

    @property
    def num_tokens(self) -> int:
        """Number of tokens held, without text held back for the next frame or question."""
        return len(self._ids)

    @property
    def num_frames(self) -> int:
        """Number of frames held."""
        return len(self._frames)

    @property
    def num_seconds(self) -> float:
        """Time between the oldest and the newest frame held that have timestamps."""
        timestamps = [frame.timestamp for frame in self._frames if frame.timestamp is not None]
        return timestamps[-1] - timestamps[0] if timestamps else 0.0

    @property
    def num_bytes(self) -> int:
        """Memory of the cached keys and values in bytes, room to grow included."""
        return self._cache.num_bytes

    def add_frame(self, image, timestamp: float | None = None) -> None:
        """
        Show a frame to the model.

        Args:
            image: an image (Pillow, numpy, torch or path).
            timestamp: its time in seconds, not before that of the previous frame.

        Raises:
            ValueError: if the image cannot be read, the timestamp is out of order, or the frame does not fit in
                `max_tokens`. The stream is left unchanged.
        """
        with self._exclusive():
            before = self._copy()
            try:
                self._add_frame(image, timestamp)
            except BaseException:
                self.__dict__.update(before.__dict__)  # also restores frames removed to make room
                raise

    def _add_frame(self, image, timestamp: float | None) -> None:
        if timestamp is None and self.max_seconds is not None:
            raise ValueError(f"max_seconds={self.max_seconds} requires a timestamp for each frame.")
        if timestamp is not None and not (self._last_timestamp or 0) <= timestamp < math.inf:
            raise ValueError(
                f"timestamp must be seconds, at least {self._last_timestamp or 0} (the last frame), got {timestamp}."
            )
        features = self.processor.video_processor(
            [[image]], **self.frame_kwargs, do_sample_frames=False, return_tensors="pt"
        )
        own = f"[{format_timestamp(timestamp)}]:" if timestamp is not None else ""
        own += self.processor.replace_image_token(features, 0)
        ids, offsets = self._tokenize(self._pending + own)
        self._make_room(len(ids), timestamp)
        if self.max_tokens is not None or self.max_seconds is not None:
            ids, offsets = self._tokenize(self._pending + own)  # removing frames may have removed the newline

        own_start = next(number for number, (start, _) in enumerate(offsets) if start >= len(self._pending))
        first = len(self._ids)
        no_logits = torch.empty(0, dtype=torch.long)
        self._append(
            torch.tensor([ids]), features["pixel_values"], features["image_grid_hw"], logits_to_keep=no_logits
        )
        self._give_newline(first, offsets)
        self._frames.append(_Frame(first + own_start, len(self._ids), timestamp))
        self._pending, self._pending_newline = "\n", True
        self._last_timestamp = timestamp if timestamp is not None else self._last_timestamp

    def add_text(self, text: str) -> None:
        """Add text to the user turn. It is processed with the next frame or question."""
        with self._exclusive():
            self._pending += self._as_text(text)

    def append(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Add tokens unchanged, ahead of any text held back. `add_frame` builds on it.

        Args:
            input_ids: (1, L) token ids; all tokens of an image must come in one call.
            pixel_values, image_grid_hw: (P, ...) patches and (N, 2) grids of the images among them.
            kwargs: keyword arguments of `model.forward`.

        Returns:
            The model's output for the tokens that were not cached yet, with logits of the last one by default.
        """
        with self._exclusive():
            return self._append(input_ids, pixel_values, image_grid_hw, **kwargs)

    @torch.no_grad()
    def _append(self, input_ids, pixel_values=None, image_grid_hw=None, **kwargs) -> CausalLMOutputWithPast:
        positions = self._positions_of(input_ids, image_grid_hw)
        cached = self._cache.get_seq_length()
        ids = torch.cat([torch.tensor([self._ids[cached:]], dtype=torch.long), input_ids.cpu()], dim=1)
        position_ids = torch.cat([self._position_ids, positions], dim=-1)
        device = self.model.device
        try:
            outputs = self.model(
                input_ids=ids.to(device),
                position_ids=position_ids[..., cached:].to(device),
                past_key_values=self._cache,
                pixel_values=None if pixel_values is None else pixel_values.to(device),
                image_grid_hw=None if image_grid_hw is None else image_grid_hw.to(device),
                **{"logits_to_keep": 1, "use_cache": True, **kwargs},
            )
        except BaseException:
            self._cache.rewind(cached)
            raise
        self._ids += input_ids[0].tolist()
        self._position_ids, self._next_t = position_ids, int(position_ids[0].max()) + 1
        self._has_seen_frame |= image_grid_hw is not None
        return outputs

    def ask(self, question: str, keep: bool = False, **generate_kwargs) -> Iterator[str]:
        """
        Ask about what has been shown so far.

        Args:
            question: the user's question.
            keep: whether question and answer stay in the conversation. If not, the stream returns to its previous
                state once the answer has been read to its end or closed.
            generate_kwargs: keyword arguments of `generate()`, for a single sequence.

        Returns:
            An iterator over pieces of the answer, which is generated in the background; `"".join(...)` gives it whole.

        Raises:
            ValueError: if no frame has been added yet, or the arguments request several sequences.
        """
        answer = self._ask(question, keep, generate_kwargs)
        next(answer)  # claims the stream now, and releases it even if nothing is ever read
        return answer

    def _ask(self, question: str, keep: bool, generate_kwargs: dict) -> Iterator[str]:
        with self._exclusive():
            if not self._has_seen_frame:
                raise ValueError("The stream has no frame yet: call add_frame first.")
            for name in ("num_beams", "num_return_sequences"):
                if (generate_kwargs.get(name) or 1) > 1:
                    raise ValueError(f"A stream generates one sequence, got {name}={generate_kwargs[name]}.")
            question = self._as_text(question)
            yield ""
            yield from self._answer(question, keep, generate_kwargs)

    def _answer(self, question: str, keep: bool, generate_kwargs: dict) -> Iterator[str]:
        tokenizer = self.processor.tokenizer
        end = tokenizer.convert_tokens_to_ids(IM_END)
        new_ids, offsets = self._tokenize(self._pending + question + TURN_END + GENERATION_PROMPT)
        input_ids = torch.tensor([self._ids + new_ids])
        positions = torch.cat([self._position_ids, self._positions_of(torch.tensor([new_ids]))], dim=-1)
        cached = self._cache.get_seq_length()
        answer = BackgroundAnswer(
            self.model,
            tokenizer,
            input_ids=input_ids.to(self.model.device),
            attention_mask=torch.ones_like(input_ids).to(self.model.device),
            position_ids=positions.to(self.model.device),
            past_key_values=self._cache,
            **{"eos_token_id": end, "pad_token_id": end, **generate_kwargs},
        )
        try:
            yield from answer.pieces
        finally:
            output = answer.stop()
            if keep and output is not None:
                self._give_newline(len(self._ids), offsets)
                self._keep(output[0].tolist(), positions, end)
            else:
                self._cache.rewind(cached)
        if answer.error is not None:
            raise answer.error

    def _keep(self, ids: list[int], positions: torch.Tensor, end: int):
        """Keep a question and its answer. `ids` is the whole sequence; `positions` covers all of it but the answer."""
        ids = ids if ids[-1] == end else [*ids, end]
        self._next_t = int(positions[0].max()) + 1
        answer = torch.tensor([ids[positions.shape[-1] :]])
        answer_positions = torch.zeros((3, *answer.shape), dtype=torch.long)  # T advances by 1, as in generate()
        answer_positions[0] = self._next_t + torch.arange(answer.shape[1])
        self._cache.rewind(min(self._cache.get_seq_length(), len(ids) - 1))
        self._ids, self._position_ids = ids, torch.cat([positions, answer_positions], dim=-1)
        self._next_t += answer.shape[1]
        self._pending, self._pending_newline = "\n" + turn_header("user"), False

    def fork(self) -> "NeoStream":
        """
        Create an independent stream with the same past. Nothing is recomputed or copied: both share the cached
        tensors, which are never modified.
        """
        with self._exclusive():
            fork = self._copy()
        fork._lock = threading.Lock()
        return fork

    def _copy(self) -> "NeoStream":
        fork = copy.copy(self)
        fork._cache = copy.copy(self._cache)
        fork._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        fork._ids, fork._frames = list(self._ids), list(self._frames)
        return fork

    @contextmanager
    def _exclusive(self):
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "The stream is busy: another call is running, or it is generating an answer. Read the answer to its "
                "end, or close it, first."
            )
        try:
            yield
        finally:
            self._lock.release()

    def _as_text(self, text: str) -> str:
        """Text in the form in which it is tokenized."""
        if self.sanitize_control_tokens:
            return mark_control_tokens(text, self.processor.tokenizer)
        for token in (self.processor.image_start_token, self.processor.image_context_token):
            if token in text:
                raise ValueError(f"Text must not contain {token}, which marks images, got {text!r:.200}.")
        return text

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _positions_of(self, input_ids: torch.Tensor, image_grid_hw: torch.Tensor | None = None) -> torch.Tensor:
        """T, H and W indices (3, 1, L) of tokens that follow those held."""
        grid = None if image_grid_hw is None else image_grid_hw.cpu()
        positions = self.model.model.get_position_ids(input_ids.cpu(), grid)
        positions[0] += self._next_t
        return positions

    def _give_newline(self, first: int, offsets: list[tuple[int, int]]):
        """Assign the newline token at `first`, if it is one, to the last frame, so that both are removed together."""
        if self._pending_newline and offsets[0][1] == 1 and self._frames[-1].end == first:
            self._frames[-1] = replace(self._frames[-1], end=first + 1)

    def _make_room(self, num_new: int, timestamp: float | None):
        """Remove the oldest frames until `num_new` tokens at `timestamp` fit within the limits."""
        sizes = [frame.end - frame.start for frame in self._frames]
        count = 0
        if self.max_seconds is not None and timestamp is not None:
            oldest = timestamp - self.max_seconds
            count = sum(frame.timestamp is not None and frame.timestamp < oldest for frame in self._frames)
        if self.max_tokens is not None:
            while count < len(sizes) and self.num_tokens - sum(sizes[:count]) + num_new > self.max_tokens:
                count += 1
            if (left := self.num_tokens - sum(sizes[:count]) + num_new) > self.max_tokens:
                raise ValueError(
                    f"max_tokens={self.max_tokens} has no room for the frame: with it as the only frame, the stream "
                    f"holds {left} tokens."
                )
        if not count:
            return
        dropped, self._frames = self._frames[:count], self._frames[count:]
        if not self._frames and self._pending_newline:
            self._pending, self._pending_newline = self._pending[1:], False
        keep = torch.ones(self.num_tokens, dtype=torch.bool)
        for frame in dropped:
            keep[frame.start : frame.end] = False
        shift = torch.cumsum(~keep, 0)
        self._frames = [
            replace(frame, start=frame.start - int(shift[frame.start]), end=frame.end - int(shift[frame.start]))
            for frame in self._frames
        ]
        for layer in self._cache.layers:
            index = keep[: layer.get_seq_length()].to(layer.keys.device)
            layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]
        self._ids = [token for token, is_kept in zip(self._ids, keep.tolist(), strict=True) if is_kept]
        self._position_ids = self._position_ids[..., keep]


@dataclass(frozen=True)
class WatchedFrame:
    """
    One step of `watch`: the timestamp of the frame in seconds, the answer, the seconds spent on adding the frame and
    on answering, and the number of tokens that the stream holds.
    """

    timestamp: float
    answer: str
    frame_seconds: float
    answer_seconds: float
    num_tokens: int


def watch(
    stream: NeoStream, video: str | os.PathLike, question: str, every: float, **generate_kwargs
) -> Iterator[WatchedFrame]:
    """
    Play a video as if it were live: show a frame to `stream` every `every` seconds, and ask after each.

    Args:
        stream: the stream to add frames to; answers are not kept in it.
        video: a path, a URL or a `data:` URI.
        question: the question to ask after each frame.
        every: seconds of video between two frames.
        generate_kwargs: keyword arguments of `generate()`.

    Raises:
        ValueError: if the video cannot be read or has no frame rate, or `every` is not positive.
    """
    if not 0 < every < math.inf:
        raise ValueError(f"every must be a positive number of seconds, got {every}.")
    reader = open_video(video)
    if video_duration(reader.metadata) is None:
        raise ValueError(f"The video {video} has no frame rate.")
    indices = sample_frames(reader.metadata, fps=1 / every)
    for index, frame in zip(indices, reader.read(indices), strict=True):
        started = time.perf_counter()
        stream.add_frame(frame, index / reader.metadata.fps)
        shown = time.perf_counter()
        answer = "".join(stream.ask(question, **generate_kwargs))
        yield WatchedFrame(
            index / reader.metadata.fps, answer, shown - started, time.perf_counter() - shown, stream.num_tokens
        )


__all__ = ["NeoStream", "WatchedFrame", "watch"]
