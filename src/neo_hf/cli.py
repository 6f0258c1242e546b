"""The `neo-hf` command: thin over the library."""

from .configuration_neo import NeoConfig
from .image_processing_neo import load_picture
from .loading import load_image_processor, load_model_and_processor
from .modeling_neo import NeoForConditionalGeneration

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import torch
import typer
from transformers import TextStreamer
from transformers.utils import logging

app = typer.Typer(
    help="NEO, a native vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder in Hub format, or raw folder.")]
Images = Annotated[list[str], typer.Option("--image", metavar="FILE", help="Picture (path or URL). May be repeated.")]


@app.command()
def chat(
    model_name: Model,
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="Without it, a conversation.")] = None,
    image: Images = [],  # noqa: B006 (typer copies it)
    system: Annotated[str, typer.Option(metavar="TEXT", help="System text.")] = "",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Length of an answer at most.")] = 4096,
):
    """Answer a question about pictures, or hold a conversation line by line."""
    images = [load_picture(file) for file in image]  # before the weights, which take longer
    model, processor = load_model_and_processor(model_name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict] = [{"role": "system", "content": system}]
    for text in _questions(question):
        content: list[dict] = [{"type": "text", "text": text}]
        if len(messages) == 1:
            content = [*({"type": "image", "image": picture} for picture in images), *content]
        messages.append({"role": "user", "content": content})
        inputs: Any = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs = inputs.to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _questions(question: str | None) -> Iterator[str]:
    if question is not None:
        yield question
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@app.command()
def info(model_name: Model, image: Images = []):  # noqa: B006
    """Describe a model: its sizes, parameters per part, and what pictures cost."""
    config = NeoConfig.from_pretrained(model_name)
    with torch.device("meta"):
        model = NeoForConditionalGeneration._from_config(config)
    text, vision, decoder = config.text_config, config.vision_config, model.model.language_model

    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    print(f"model             {model_name}")
    print(f"weights           {config.dtype or 'dtype not given'}")
    print(f"layers            {text.num_hidden_layers} of width {text.hidden_size}, MLP {text.intermediate_size}")
    print(
        f"attention         {text.num_attention_heads} heads, {text.num_key_value_heads} key/value heads, "
        f"{text.head_dim} channels for values and 2 x {text.head_dim} for queries and keys"
    )
    print(f"vocabulary        {text.vocab_size}, head {'tied' if config.tie_word_embeddings else 'untied'}")
    parts = {"patch embedding": count(model.model.patch_embed), "token embedding": count(decoder.embed_tokens)}
    if text.num_pre_buffer_layers is None:
        parts["layers (pre-Buffer depth unknown)"] = count(decoder.layers)
    else:
        parts[f"pre-Buffer, layers 0 to {text.num_pre_buffer_layers - 1}"] = count(model.pre_buffer)
        parts[f"post-LLM, layers {text.num_pre_buffer_layers} to {text.num_hidden_layers - 1}"] = count(model.post_llm)
    parts["norm"] = count(decoder.norm)
    if not config.tie_word_embeddings:
        parts["head"] = count(model.lm_head)
    print(f"parameters        {count(model):,}")
    for name, parameters in parts.items():
        print(f"  {name:<34} {parameters:>15,}")
    side = vision.patch_size * vision.spatial_merge_size
    processor = load_image_processor(model_name)
    budget = f"{processor.min_pixels:,} to {processor.max_pixels:,} pixels"
    print(f"pictures          {budget}, {side} x {side} per visual token")
    for file in image:
        picture = load_picture(file)
        rows, columns = (int(n) for n in processor(picture)["image_grid_hw"][0])
        height, width = rows * vision.patch_size, columns * vision.patch_size
        tokens = rows * columns // vision.spatial_merge_size**2
        size = f"{picture.height} x {picture.width} pixels (height x width)"
        print(f"  {file}: {size}, seen as {height} x {width}: {tokens} visual tokens")


def main(argv: list[str] | None = None):
    """Run the command line and exit; what the library refuses is one line on standard error."""
    logging.set_verbosity_error()
    try:
        app(argv)
    except (ValueError, OSError) as error:
        print(f"neo-hf: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
