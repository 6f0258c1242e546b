"""A conversation about images, videos and text as the page shows it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.conversation import CachedConversation
from neo_hf.streaming import BackgroundAnswer
from neo_hf.web.media import Upload


@dataclass(frozen=True)
class Settings:
    """
    How a question is read and answered.

    max_pixels: budget of an image or frame; the processor's own if `None`.
    num_frames: frames sampled from a video; the processor's own rate if `None`.
    temperature: 0 for the most likely token.
    """

    max_pixels: int | None = None
    num_frames: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512

    def processor_kwargs(self, processor: NeoProcessor) -> dict[str, dict]:
        images: dict[str, int] = {}
        videos: dict[str, int] = {}
        if self.max_pixels is not None:  # also where it is below the processor's smallest
            for kwargs, own in ((images, processor.image_processor), (videos, processor.video_processor)):
                kwargs |= {"max_pixels": self.max_pixels, "min_pixels": min(own.min_pixels, self.max_pixels)}
        if self.num_frames is not None:
            videos["num_frames"] = self.num_frames
        return {"images_kwargs": images, "videos_kwargs": videos}

    def generate_kwargs(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": None}


@dataclass
class Turn:
    """
    A question and its answer: tokens [start, answer_start) and [answer_start, stop) of the conversation.

    thumbnails: (name, `data:` URI) of what went with the question; files themselves are not kept.
    stop: 0 while the answer is being written.
    answer: the text so far.
    images: pixel_values and image_grid_hw of the question, empty without images.
    num_computed: tokens of the question that were not cached yet.
    seconds: from the question to the last token of the answer.
    """

    question: str
    thumbnails: list[tuple[str, str]]
    start: int
    answer_start: int
    images: dict[str, torch.Tensor]
    settings: Settings
    num_computed: int = 0
    stop: int = 0
    answer: str = ""
    seconds: float = 0.0


class Conversation(CachedConversation):
    """
    A conversation as the page shows it. One thread at a time.

    Args:
        max_tokens: maximum number of tokens held.
    """

    max_tokens: int

    def __init__(self, model: NeoForConditionalGeneration, processor: NeoProcessor, max_tokens: int):
        super().__init__(model, processor, max_tokens)
        self.turns: list[Turn] = []

    @property
    def num_bytes(self) -> int:
        """Memory of cached keys and values, and of the pixels kept to draw what the model sees."""
        pixels = sum(turn.images["pixel_values"].nbytes for turn in self.turns if turn.images)
        return super().num_bytes + pixels

    def ask(self, question: str, uploads: list[Upload], settings: Settings) -> Iterator[str]:
        """
        Add a question, and return an iterator over pieces of its answer. If it is closed early, the answer so far
        stays in the conversation.

        Raises:
            ValueError: the question cannot be read, or does not fit. The conversation is as before.
        """
        content = [*(upload.part for upload in uploads), {"type": "text", "text": question}]
        start = len(self.ids)
        images = self.add([{"role": "user", "content": content}], settings.processor_kwargs(self.processor))
        thumbnails = [(upload.name, source) for upload in uploads for source in upload.thumbnails]
        self.turns.append(Turn(question, thumbnails, start, len(self.ids), images, settings))
        return self._start_answer()

    def retry(self, settings: Settings) -> Iterator[str]:
        """Answer the last question again. Its images and videos stay as they were read."""
        turn = self.turns[-1]
        turn.settings = settings
        question = self.ids[turn.start : turn.answer_start]
        self.rewind(turn.start)
        self.ids += question
        return self._start_answer()

    def undo(self) -> Turn:
        """Take back the last question and its answer."""
        turn = self.turns.pop()
        self.rewind(turn.start)
        return turn

    def inputs_before(self, token: int) -> dict[str, torch.Tensor]:
        """Arguments of `forward`: what the model saw when it wrote `token`, an index into `ids`."""
        images = [turn.images for turn in self.turns if turn.images and turn.answer_start <= token]
        joined = {name: torch.cat([image[name] for image in images]) for name in (images[0] if images else ())}
        return {"input_ids": torch.tensor([self.ids[:token]])} | joined

    def _start_answer(self) -> Iterator[str]:
        answer = self._answer()
        next(answer)  # closing it now ends the turn, even if nothing is ever read
        return answer

    def _answer(self) -> Iterator[str]:
        turn = self.turns[-1]
        turn.answer, turn.stop = "", 0
        started = time.perf_counter()
        turn.num_computed = turn.answer_start - self.num_cached
        answer = BackgroundAnswer(
            self.model,
            self.processor.tokenizer,
            max_new_tokens=min(turn.settings.max_new_tokens, self.max_tokens - len(self.ids)),
            **turn.settings.generate_kwargs(),
            **self.generate_kwargs(turn.images),
        )
        try:
            yield ""
            for piece in answer.pieces:
                turn.answer += piece
                turn.seconds = time.perf_counter() - started
                yield piece
        finally:
            output = answer.stop()
            if output is None:
                self.undo()
            else:
                self.end_answer(output[0].tolist())
                turn.stop = output.shape[1]
        if answer.error is not None:
            raise answer.error
