"""ChatML, the prompt format of NEO: the chat template, and its turns for code that writes prompts piece by piece."""

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


# An image renders as `<image>` and a newline, a video as `<video>` and a newline. The `generation` block marks the
# tokens that training learns: the assistant's text and the end of its turn.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content or [] -%}
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
