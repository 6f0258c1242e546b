"""ChatML, the prompt format of NEO: the chat template, its turns for code that writes prompts piece by piece, and the
marks that keep control tokens out of what people write."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import normalizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TURN_END = f"{IM_END}\n"


def turn_header(role: str) -> str:
    """What opens a turn of `role`."""
    return f"{IM_START}{role}\n"


GENERATION_PROMPT = turn_header("assistant")


def render_turn(role: str, text: str | None) -> str:
    """A whole turn as text; empty for a system turn without text."""
    if role == "system" and not text:
        return ""
    return f"{turn_header(role)}{text}{TURN_END}"


# A Unicode noncharacter, reserved for use inside programs. The tokenizer looks for special tokens before it normalizes
# text, and its normalizer drops the mark: a special token with a mark inside is tokenized as plain text.
MARK = "\ufdd0"
CONTROL_TOKENS = (IM_START, IM_END, "<img>", "</img>", "<IMG_CONTEXT>")
# What answers are written with: these stay special tokens in the assistant's turns.
ANSWER_TOKENS = frozenset({"<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"})


def mark_control_tokens(
    text: str, tokenizer: "PreTrainedTokenizerBase", role: str = "user", placeholders: Iterable[str] = ()
) -> str:
    """
    Mark the special tokens in `text`, so that `tokenizer` tokenizes them as plain text. Text without any is unchanged.

    Args:
        text: what someone with `role` wrote.
        tokenizer: its normalizer is made to drop the marks.
        role: the assistant's turns keep the tokens that answers are written with (`ANSWER_TOKENS`).
        placeholders: of images and videos, to be marked as well.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= {*CONTROL_TOKENS, *placeholders}
    if role == "assistant":
        tokens -= ANSWER_TOKENS
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    marked = re.sub(pattern, lambda match: match[0][0] + MARK + match[0][1:], text)
    if marked != text:
        drop_marks(tokenizer)
    return marked


def drop_marks(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make the normalizer of `tokenizer` drop marks."""
    backend = tokenizer.backend_tokenizer
    drop = normalizers.Replace(MARK, "")
    if backend.normalizer is None:
        backend.normalizer = drop
    elif backend.normalizer.normalize_str(MARK):
        backend.normalizer = normalizers.Sequence([drop, backend.normalizer])


# An image renders as `<image>` and a newline, a video as `<video>` and a newline. The `generation` block marks the
# tokens that training learns: the assistant's text and the end of its turn.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}
{{- part.text or '' -}}
{%- elif part.type in ['image', 'image_url'] -%}
{{- '<image>\\n' -}}
{%- elif part.type == 'video' -%}
{{- '<video>\\n' -}}
{%- else -%}
{{- raise_exception("A message part must be of type 'text', 'image' or 'video', got " ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- raise_exception("NEO was not trained to call tools: give no tools.") -}}
{%- endif -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}
{{- text + '<|im_end|>\\n' -}}
{%- endgeneration -%}
{%- elif message.role != 'system' or text -%}
{{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
