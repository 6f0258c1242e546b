"""A conversation that keeps its KV cache from turn to turn."""

from .cache_neo import NeoCache
from .chat_template_neo import IM_END
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor

from collections.abc import Mapping
from typing import Any

import torch


class CachedConversation:
    """
    The tokens of a conversation and their KV cache. Only what is new is computed: a question and its images once, and
    each token of an answer once. Answers stay as they were generated.

        images = conversation.add([{"role": "user", "content": content}])
        output = model.generate(**conversation.generate_kwargs(images))
        conversation.end_answer(output[0].tolist())

    Args:
        max_tokens: maximum number of tokens held, `None` for no limit.

    Attributes:
        ids: all tokens. The cache may lack the last ones.
    """

    def __init__(self, model: NeoForConditionalGeneration, processor: NeoProcessor, max_tokens: int | None = None):
        self.model = model
        self.processor = processor
        self.max_tokens = max_tokens
        self.ids: list[int] = []
        self._cache = NeoCache(model.config.get_text_config())
        self._end = processor.tokenizer.convert_tokens_to_ids(IM_END)

    @property
    def num_bytes(self) -> int:
        """Memory of cached keys and values."""
        return self._cache.num_bytes

    @property
    def num_cached(self) -> int:
        """Tokens that need not be computed again."""
        return self._cache.get_seq_length()

    def add(
        self, messages: list[dict[str, Any]], processor_kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Append messages and the header of the assistant's answer.

        Returns:
            `pixel_values` and `image_grid_hw` of their images, empty without images.

        Raises:
            ValueError: the messages cannot be read, or do not fit. The conversation is as before.
        """
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(processor_kwargs or {}),
        )
        new = inputs["input_ids"][0].tolist()
        if self.ids:  # which end where the last answer does
            new = self.processor.tokenizer("\n", add_special_tokens=False)["input_ids"] + new
        if self.max_tokens is not None and len(self.ids) + len(new) >= self.max_tokens:
            raise ValueError(
                f"There is no room for this question: it has {len(new):,} tokens, the conversation {len(self.ids):,}, "
                f"and the limit is {self.max_tokens:,}. Start over, or reduce the pixel budget or the frames."
            )
        self.ids += new
        return {name: inputs[name] for name in ("pixel_values", "image_grid_hw") if name in inputs}

    def generate_kwargs(self, images: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Arguments of `generate()` for the answer. `images` are those of the messages that are not cached yet."""
        device = self.model.device
        input_ids = torch.tensor([self.ids], device=device)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "past_key_values": self._cache,
            "eos_token_id": self._end,
            "pad_token_id": self._end,
        } | {name: tensor.to(device) for name, tensor in images.items()}

    def end_answer(self, ids: list[int]):
        """
        Keep an answer, finished or not.

        Args:
            ids: all tokens: what `generate()` returned or, if it was interrupted, wrote so far.
        """
        self._crop(len(ids) - 1)  # an interrupted step may have reached some of the layers
        self.ids = ids if ids[-1] == self._end else [*ids, self._end]

    def rewind(self, length: int):
        """Forget all but the first `length` tokens, where a turn starts or an answer does."""
        self.ids = self.ids[:length]
        self._crop(length)

    def _crop(self, length: int):
        self._cache.rewind(min(length, self.num_cached))
