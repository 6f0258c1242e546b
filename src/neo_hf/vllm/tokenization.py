"""Chats as token ids in vLLM, by `NeoProcessor`: what people write holds no control tokens and no placeholders."""

from ..image_processing_neo import NeoImageProcessorKwargs
from ..loading import load_processor
from ..processing_neo import NeoProcessor, NeoVideosKwargs

import copy
from functools import cache
from pathlib import Path

from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import HfTokenizer, get_cached_tokenizer

# What the processor can be told for one request.
SETTINGS = NeoImageProcessorKwargs.__annotations__.keys() | NeoVideosKwargs.__annotations__.keys()


@cache
def processor_of(name_or_path: str | Path) -> NeoProcessor:
    return load_processor(name_or_path)


def placeholders(processor: NeoProcessor) -> dict[str, str]:
    """Placeholders of images and videos to special tokens, which nothing that people write is tokenized as."""
    start, end = processor.image_start_token, processor.image_end_token
    return {processor.image_token: processor.image_context_token, processor.video_token: start + end}


class NeoTokenizer:
    """Loads the tokenizer of a checkpoint, with a chat template that also reads raw checkpoints."""

    @classmethod
    def from_pretrained(cls, path_or_repo_id: str | Path, *args, **kwargs) -> HfTokenizer:
        processor = processor_of(path_or_repo_id)
        tokenizer = copy.copy(processor.tokenizer)
        tokenizer.chat_template = processor.chat_template

        class NeoChatTokenizer(type(tokenizer)):  # type: ignore[misc]
            def apply_chat_template(self, conversation, *, tokenize=True, return_dict=False, **kwargs):
                # Typed placeholders too: those that remain in the text are the template's.
                marked = processor.mark_messages(conversation)
                text = processor.apply_chat_template(marked, tokenize=False, sanitize_control_tokens=False, **kwargs)
                for placeholder, tokens in placeholders(processor).items():
                    text = text.replace(placeholder, tokens)
                return self.encode(text, add_special_tokens=False) if tokenize else text

        tokenizer.__class__ = NeoChatTokenizer
        return get_cached_tokenizer(tokenizer)


class NeoRenderer(HfRenderer):
    """Refuses settings of the processor where `transformers serve` has them: vLLM would ignore them without a word."""

    def render_messages(self, messages: list, params: ChatParams):
        _check_settings(params)
        return super().render_messages(messages, params)

    async def render_messages_async(self, messages: list, params: ChatParams):
        _check_settings(params)
        return await super().render_messages_async(messages, params)


def _check_settings(params: ChatParams):
    """
    Raises:
        ValueError: settings of the processor are among the arguments of the chat template.
    """
    if misplaced := sorted(SETTINGS & params.chat_template_kwargs.keys()):
        raise ValueError(
            f"chat_template_kwargs have {', '.join(misplaced)}, which vLLM takes in mm_processor_kwargs, if the "
            "server is started with --trust-request-mm-kwargs."
        )
