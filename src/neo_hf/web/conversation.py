"""A conversation about images, videos and text that keeps its KV cache from turn to turn."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from neo_hf import NeoForConditionalGeneration, NeoProcessor
from neo_hf.cache_neo import NeoCache
from neo_hf.chat_template_neo import IM_END
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
    answer: the text so far.
    images: (pixel_values, image_grid_hw) of the question, `None` without images.
    num_computed: tokens of the question that were not cached yet.
    seconds: from the question to the last token of the answer.
    """

    question: str
    thumbnails: list[tuple[str, str]]
    start: int
    answer_start: int
    images: tuple[torch.Tensor, torch.Tensor] | None
    settings: Settings
    num_computed: int = 0
    stop: int = 0
    answer: str = ""
    seconds: float = 0.0


@dataclass
class Conversation:
    """
    Only what is new is computed: a question and its images once, and each token of an answer once. One thread at a
    time.

    Args:
        max_tokens: maximum number of tokens held.
    """

    model: NeoForConditionalGeneration
    processor: NeoProcessor
    max_tokens: int
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self):
        self.ids: list[int] = []  # all tokens; the cache may lack the last ones
        self._cache = NeoCache(self.model.config.get_text_config())
        self._end = self.processor.tokenizer.convert_tokens_to_ids(IM_END)

    @property
    def num_bytes(self) -> int:
        """Memory of cached keys and values, and of the pixels kept to draw what the model sees."""
        pixels = sum(turn.images[0].nbytes for turn in self.turns if turn.images)
        return self._cache.num_bytes + pixels

    def ask(self, question: str, uploads: list[Upload], settings: Settings) -> Iterator[str]:
        """
        Add a question, and return an iterator over pieces of its answer. If it is closed early, the answer so far
        stays in the conversation.

        Raises:
            ValueError: the question cannot be read, or does not fit. The conversation is as before.
        """
        content = [*(upload.part for upload in uploads), {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings.processor_kwargs(self.processor),
        )
        new = inputs["input_ids"][0].tolist()
        if self.ids:  # which end where the last answer does
            new = self.processor.tokenizer("\n", add_special_tokens=False)["input_ids"] + new
        if len(self.ids) + len(new) >= self.max_tokens:
            raise ValueError(
                f"There is no room for this question: it has {len(new):,} tokens, the conversation {len(self.ids):,}, "
                f"and the limit is {self.max_tokens:,}. Start over, or reduce the pixel budget or the frames."
            )
        images = (inputs["pixel_values"], inputs["image_grid_hw"]) if "pixel_values" in inputs else None
        start = len(self.ids)
        self.ids += new
        thumbnails = [(upload.name, source) for upload in uploads for source in upload.thumbnails]
        self.turns.append(Turn(question, thumbnails, start, len(self.ids), images, settings))
        return self._start_answer()

    def retry(self) -> Iterator[str]:
        """Answer the last question again."""
        turn = self.turns[-1]
        self.ids = self.ids[: turn.answer_start]
        self._cache.rewind(min(turn.start, self._cache.get_seq_length()))
        return self._start_answer()

    def undo(self) -> Turn:
        """Take back the last question and its answer."""
        turn = self.turns.pop()
        self.ids = self.ids[: turn.start]
        self._cache.rewind(min(turn.start, self._cache.get_seq_length()))
        return turn

    def inputs_before(self, token: int) -> dict[str, torch.Tensor]:
        """Arguments of `forward`: what the model saw when it wrote `token`, an index into `ids`."""
        inputs = {"input_ids": torch.tensor([self.ids[:token]])}
        images = [turn.images for turn in self.turns if turn.images and turn.answer_start <= token]
        if images:
            pixels, grids = zip(*images, strict=True)
            inputs |= {"pixel_values": torch.cat(pixels), "image_grid_hw": torch.cat(grids)}
        return inputs

    def _start_answer(self) -> Iterator[str]:
        answer = self._answer()
        next(answer)  # closing it now ends the turn, even if nothing is ever read
        return answer

    def _answer(self) -> Iterator[str]:
        turn = self.turns[-1]
        turn.answer = ""
        started = time.perf_counter()
        cached = self._cache.get_seq_length()
        turn.num_computed = turn.answer_start - cached
        device = self.model.device
        input_ids = torch.tensor([self.ids], device=device)
        images = {}
        if turn.images:
            names = ("pixel_values", "image_grid_hw")
            images = {name: tensor.to(device) for name, tensor in zip(names, turn.images, strict=True)}
        answer = BackgroundAnswer(
            self.model,
            self.processor.tokenizer,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=self._cache,
            eos_token_id=self._end,
            pad_token_id=self._end,
            max_new_tokens=min(turn.settings.max_new_tokens, self.max_tokens - len(self.ids)),
            **turn.settings.generate_kwargs(),
            **images,
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
                self._cache.rewind(min(cached, turn.start))
                self.ids = self.ids[: turn.start]
                self.turns.pop()
            else:
                self.ids = output[0].tolist()
                turn.stop = len(self.ids)
                if self.ids[-1] != self._end:
                    self.ids.append(self._end)
        if answer.error is not None:
            raise answer.error
