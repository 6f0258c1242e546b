"""Live video: frames enter the KV cache as they come, so that each costs only its own tokens."""

from .cache_neo import NeoCache
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor, format_timestamp
from .video_processing_neo import open_video, video_duration

import copy
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass(frozen=True)
class _Frame:
    """Tokens [start, end) that one frame holds: its time, its image and the newline after it."""

    start: int
    end: int
    timestamp: float | None


class NeoStream:
    """
    A conversation about frames that arrive one by one (NEO-ov paper, sections 3.2 and 3.3: a frame is a unit of its
    own and sees only what came before it, so what is in the cache stays as it is).

    Each call computes only what is new. The content is `[MM:SS.ss]:<image>\\n` per frame (`<image>\\n` without a
    timestamp) and text, in the order in which they were added, in one user turn; `ask` closes the turn for its answer.
    Text waits until the next frame or question, so that it is tokenised as the whole would be: answers are those of
    the same content given whole.

    Bounded: with `max_tokens` or `max_seconds`, the oldest frames leave the cache whole, with their times. The system
    text, other text and all indices stay. This is not exact: what came after a dropped frame has seen it, and still
    holds what it took from it; the same content without these frames, given whole, would have neither that nor the
    gaps in the T indices.

    Args:
        model: NEO.
        processor: its processor. Frames are prepared by the video processor.
        system: system text.
        max_tokens: most tokens to hold when a frame is added, its own included. Questions and answers come on top.
        max_seconds: longest time between the oldest frame and the newest. Needs timestamps.
        frame_kwargs: settings of the video processor, such as `max_pixels` per frame.
    """

    def __init__(
        self,
        model: NeoForConditionalGeneration,
        processor: NeoProcessor,
        system: str | None = None,
        max_tokens: int | None = None,
        max_seconds: float | None = None,
        **frame_kwargs,
    ):
        for name, limit in (("max_tokens", max_tokens), ("max_seconds", max_seconds)):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, or None for no bound, got {limit}.")
        self.model = model
        self.processor = processor
        self.max_tokens = max_tokens
        self.max_seconds = max_seconds
        self.frame_kwargs = frame_kwargs
        self._cache = NeoCache(model.config.get_text_config())
        self._ids: list[int] = []  # of all tokens held; the cache may lack the last of them
        self._position_ids = torch.zeros((3, 1, 0), dtype=torch.long)
        self._next_t = 0
        self._frames: list[_Frame] = []
        self._last_timestamp: float | None = None
        self._has_seen_frame = False
        self._is_answering = False
        system_block = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        self._pending = f"{system_block}<|im_start|>user\n"  # text that waits
        self._pending_newline = False  # whether that begins with the newline of the last frame

    @property
    def num_tokens(self) -> int:
        """Tokens held. Text that waits for the next frame or question is not counted."""
        return len(self._ids)

    @property
    def num_frames(self) -> int:
        """Frames held."""
        return len(self._frames)

    def add_frame(self, image, timestamp: float | None = None) -> None:
        """
        Show a frame to the model.

        Args:
            image: an image (Pillow, numpy, torch or path).
            timestamp: its time in seconds, not before that of the frame before.

        Raises:
            ValueError: the image cannot be read, the timestamp is out of order, or the bound has no room for the
                frame. The stream is as before.
        """
        self._check_idle()
        if timestamp is None and self.max_seconds is not None:
            raise ValueError(f"max_seconds={self.max_seconds} needs the timestamp of each frame.")
        if timestamp is not None and not (self._last_timestamp or 0) <= timestamp < math.inf:
            raise ValueError(
                f"timestamp must be seconds, at least {self._last_timestamp or 0} (the frame before), got {timestamp}."
            )
        features = self.processor.video_processor(
            [[image]], **self.frame_kwargs, do_sample_frames=False, return_tensors="pt"
        )
        own = f"[{format_timestamp(timestamp)}]:" if timestamp is not None else ""
        own += self.processor.replace_image_token(features, 0)
        ids, offsets = self._tokenize(self._pending + own)
        self._make_room(len(ids), timestamp)
        if self.max_tokens is not None or self.max_seconds is not None:
            ids, offsets = self._tokenize(self._pending + own)  # what was dropped may have taken a newline along

        own_start = next(number for number, (start, _) in enumerate(offsets) if start >= len(self._pending))
        first = len(self._ids)
        no_logits = torch.empty(0, dtype=torch.long)
        self.append(torch.tensor([ids]), features["pixel_values"], features["image_grid_hw"], logits_to_keep=no_logits)
        self._give_newline(first, offsets)
        self._frames.append(_Frame(first + own_start, len(self._ids), timestamp))
        self._pending, self._pending_newline = "\n", True
        self._last_timestamp = timestamp if timestamp is not None else self._last_timestamp

    def add_text(self, text: str) -> None:
        """Add words to the user's turn. They cost nothing before the next frame or question."""
        self._check_idle()
        self._check_text(text)
        self._pending += text

    @torch.no_grad()
    def append(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Add tokens as they are, before any text that waits; `add_frame` is made of it.

        Args:
            input_ids: (1, L) token ids; all tokens of an image come together.
            pixel_values, image_grid_hw: (P, ...) patches and (N, 2) grids of the images among them.
            kwargs: of `model.forward`.

        Returns:
            The model's output for the tokens that were new to the cache; by default logits of the last one only.
        """
        self._check_idle()
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
            self._rewind(cached)
            raise
        self._ids += input_ids[0].tolist()
        self._position_ids, self._next_t = position_ids, int(position_ids[0].max()) + 1
        self._has_seen_frame |= image_grid_hw is not None
        return outputs

    def ask(self, question: str, keep: bool = False, **generate_kwargs) -> Iterator[str]:
        """
        Ask about what was shown so far.

        Args:
            question: the user's words.
            keep: whether question and answer stay in the conversation. If not, the stream is as before once the
                answer was read to its end, or closed.
            generate_kwargs: arguments of `generate()`, of one sequence.

        Returns:
            The answer, piece by piece as it is written; it is computed while it is read. `"".join(...)` gives it all.

        Raises:
            ValueError: no frame was added yet, or the arguments ask for several sequences.
        """
        self._check_idle()
        self._check_text(question)
        if not self._has_seen_frame:
            raise ValueError("The stream has no frame to be asked about yet: call add_frame first.")
        for name in ("num_beams", "num_return_sequences"):
            if (generate_kwargs.get(name) or 1) > 1:
                raise ValueError(f"A stream answers with one sequence, got {name}={generate_kwargs[name]}.")
        return self._answer(question, keep, generate_kwargs)

    def _answer(self, question: str, keep: bool, generate_kwargs: dict) -> Iterator[str]:
        self._check_idle()
        tokenizer = self.processor.tokenizer
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        new_ids, offsets = self._tokenize(f"{self._pending}{question}<|im_end|>\n<|im_start|>assistant\n")
        input_ids = torch.tensor([self._ids + new_ids])
        positions = torch.cat([self._position_ids, self._positions_of(torch.tensor([new_ids]))], dim=-1)
        cached = self._cache.get_seq_length()

        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_closed = threading.Event()

        def stop(input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], is_closed.is_set(), device=input_ids.device)

        kwargs = {"eos_token_id": end, "pad_token_id": end, **generate_kwargs}
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), stop])
        result: dict = {}

        def generate():
            try:
                result["output"] = self.model.generate(
                    input_ids=input_ids.to(self.model.device),
                    attention_mask=torch.ones_like(input_ids).to(self.model.device),
                    position_ids=positions.to(self.model.device),
                    past_key_values=self._cache,
                    streamer=streamer,
                    **kwargs,
                )
            except BaseException as error:
                result["error"] = error
            finally:
                streamer.end()

        self._is_answering = True
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            is_closed.set()
            thread.join()
            self._is_answering = False
            if keep and "output" in result:
                self._give_newline(len(self._ids), offsets)
                self._keep(result["output"][0].tolist(), positions, end)
            else:
                self._rewind(cached)
        if "error" in result:
            raise result["error"]

    def _keep(self, ids: list[int], positions: torch.Tensor, end: int):
        """Take over a question and its answer: the tokens `ids`, of which the answer follows those of `positions`."""
        ids = ids if ids[-1] == end else [*ids, end]
        self._next_t = int(positions[0].max()) + 1
        answer = torch.tensor([ids[positions.shape[-1] :]])
        answer_positions = torch.zeros((3, *answer.shape), dtype=torch.long)  # each one further, as generate() counts
        answer_positions[0] = self._next_t + torch.arange(answer.shape[1])
        self._rewind(min(self._cache.get_seq_length(), len(ids) - 1))
        self._ids, self._position_ids = ids, torch.cat([positions, answer_positions], dim=-1)
        self._next_t += answer.shape[1]
        self._pending, self._pending_newline = "\n<|im_start|>user\n", False

    def fork(self) -> "NeoStream":
        """
        A stream of its own with the same past. Nothing is computed or copied: both share what is in the cache, which
        never changes.
        """
        self._check_idle()
        fork = copy.copy(self)
        fork._cache = copy.copy(self._cache)
        fork._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        fork._ids, fork._frames = list(self._ids), list(self._frames)
        return fork

    def _check_idle(self):
        if self._is_answering:
            raise RuntimeError("The stream is writing an answer: read it to its end, or close it, first.")

    def _check_text(self, text: str):
        for token in (self.processor.image_start_token, self.processor.image_context_token):
            if token in text:
                raise ValueError(f"Text must not hold {token}, which stands for images, got {text!r:.200}.")

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
        """The newline after the last frame, where it is a token of its own at `first`, goes when the frame does."""
        if self._pending_newline and offsets[0][1] == 1 and self._frames[-1].end == first:
            self._frames[-1] = replace(self._frames[-1], end=first + 1)

    def _make_room(self, num_new: int, timestamp: float | None):
        """Drop the oldest frames until the bounds hold with so many new tokens of that time."""
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
                    f"max_tokens={self.max_tokens} has no room for the frame: with it and without any other, the "
                    f"stream holds {left} tokens."
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

    def _rewind(self, length: int):
        """Shorten the cache to so many tokens, layer by layer: an error may have come between two of them."""
        for layer in self._cache.layers:
            layer.crop(-max(layer.get_seq_length() - length, 0))


@dataclass(frozen=True)
class WatchedFrame:
    """
    What `watch` found at one frame: its timestamp in seconds, the answer, the seconds that adding the frame and
    answering took, and the tokens that the stream holds.
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
    Play a video file as if it were live: show a frame to `stream` every so many seconds, and ask after each.

    Args:
        stream: takes the frames; the answers are not kept in it.
        video: path of a video file.
        question: asked after each frame.
        every: seconds of video between two frames.
        generate_kwargs: arguments of `generate()`.

    Raises:
        ValueError: the file cannot be read or does not tell its frame rate, or `every` is not positive.
    """
    if not 0 < every < math.inf:
        raise ValueError(f"every must be a positive number of seconds, got {every}.")
    file = open_video(video)
    duration = video_duration(file.metadata)
    if duration is None:
        raise ValueError(f"The video {video} does not tell its frame rate.")
    sampler = stream.processor.video_processor.sample_frames
    indices = sampler(file.metadata, fps=1 / every).tolist()
    for index, frame in zip(indices, file.read(indices), strict=True):
        started = time.perf_counter()
        stream.add_frame(frame, index / file.metadata.fps)
        shown = time.perf_counter()
        answer = "".join(stream.ask(question, **generate_kwargs))
        yield WatchedFrame(
            index / file.metadata.fps, answer, shown - started, time.perf_counter() - shown, stream.num_tokens
        )


__all__ = ["NeoStream", "WatchedFrame", "watch"]
