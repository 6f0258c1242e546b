"""The `neo-hf` command: thin over the library."""

from . import conversion, publishing
from ._version import __version__
from .configuration_neo import NeoConfig
from .doctor import examine
from .image_processing_neo import load_image
from .loading import NANO, load_image_processor, load_model_and_processor
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor, format_timestamp
from .streaming import NeoStream
from .streaming import watch as watch_video
from .video_reading_neo import open_video

import sys
from collections.abc import Iterator
from pathlib import Path
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


def _print_version(wanted: bool):
    if wanted:
        print(f"neo-hf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
):
    pass


def _model_name(name: str) -> str:
    return str(NANO) if name == "nano" else name


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, folder in Hub format, raw folder, or `nano`, the model that comes with neo-hf.",
        callback=_model_name,
    ),
]
Images = Annotated[list[str], typer.Option("--image", metavar="FILE", help="Image (path or URL). May be repeated.")]
Videos = Annotated[list[str], typer.Option("--video", metavar="FILE", help="Video (path or URL). May be repeated.")]
Frames = Annotated[int | None, typer.Option(metavar="N", help="Frames to take of a video.")]
Fps = Annotated[float | None, typer.Option(metavar="F", help="Frames to take per second of a video.")]
Start = Annotated[float | None, typer.Option(metavar="S", help="Second of a video to start at.")]
End = Annotated[float | None, typer.Option(metavar="S", help="Second of a video to end at.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Length of an answer at most.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="System text.")]


@app.command()
def chat(
    model_name: Model,
    question: Annotated[str | None, typer.Argument(metavar="[QUESTION]", help="Without it, a conversation.")] = None,
    image: Images = [],  # noqa: B006 (typer copies it)
    video: Videos = [],  # noqa: B006
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    system: System = "",
    max_new_tokens: MaxNewTokens = 4096,
):
    """Answer a question about images and videos, or hold a conversation line by line."""
    media = _open_media(image, video)
    sampling = _sampling(frames, fps, start, end)
    model, processor = load_model_and_processor(model_name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict] = [{"role": "system", "content": system}]
    for text in _questions(question):
        content: list[dict] = [{"type": "text", "text": text}]
        if len(messages) == 1:
            content = [*media, *content]
        messages.append({"role": "user", "content": content})
        inputs = _prepare(processor, messages, sampling).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


def _open_media(images: list[str], videos: list[str]) -> list[dict]:
    """Parts of a message. What cannot be read is refused here, before the weights, which take longer."""
    for file in videos:
        if not file.startswith(("http://", "https://")):
            open_video(file)
    parts: list[dict] = [{"type": "image", "image": load_image(file)} for file in images]
    return [*parts, *({"type": "video", "video": file} for file in videos)]


def _sampling(frames: int | None, fps: float | None, start: float | None, end: float | None) -> dict:
    sampling = {"num_frames": frames, "fps": fps, "start": start, "end": end}
    return {name: value for name, value in sampling.items() if value is not None}


def _prepare(processor: NeoProcessor, messages: list[dict], sampling: dict) -> Any:
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": sampling},
    )


@app.command()
def show(
    model_name: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Question to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Drawing to write: .png, .pdf, .svg, ...")],
    image: Images = [],  # noqa: B006
    video: Videos = [],  # noqa: B006
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    system: System = "",
    token: Annotated[int, typer.Option(metavar="N", min=1, help="Token of the answer whose attention to draw.")] = 1,
    layer: Annotated[int | None, typer.Option(metavar="N", help="Layer to draw; the mean of all without.")] = None,
):
    """Draw what the model sees of a prompt: units, indices, mask, and an answer's attention over the images."""
    from . import visualize  # needs matplotlib

    visualize.check_output(out)
    media = _open_media(image, video)
    model, processor = load_model_and_processor(model_name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    content = [*media, {"type": "text", "text": prompt}]
    messages: list[dict] = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    inputs = _prepare(processor, messages, _sampling(frames, fps, start, end))
    if token > 1:
        inputs = visualize.with_answer(model, inputs, token - 1)
    visualize.save(visualize.plot_prompt(model, processor, inputs, layer=layer), out)


@app.command()
def watch(
    model_name: Model,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Asked after each frame.")],
    video: Annotated[str, typer.Option(metavar="FILE", help="Video file.")],
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds of video between two frames.")],
    system: System = "",
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Drop the oldest frames beyond.")] = None,
    max_new_tokens: MaxNewTokens = 4096,
):
    """Play a video file as if it were live, and answer as it goes."""
    open_video(video)  # before the weights, which take longer
    model, processor = load_model_and_processor(model_name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    stream = NeoStream(model, processor, system=system, max_tokens=max_tokens)
    for step in watch_video(stream, video, question, every, max_new_tokens=max_new_tokens):
        print(f"[{format_timestamp(step.timestamp)}] {step.answer}")
        print(
            f"  frame {step.frame_seconds:.2f} s, answer {step.answer_seconds:.2f} s, {step.num_tokens} tokens in the "
            "cache",
            flush=True,
        )


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
    """Describe a model: its sizes, parameters per part, and what images cost."""
    processor = load_image_processor(model_name)
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
    budget = f"{processor.min_pixels:,} to {processor.max_pixels:,} pixels"
    print(f"images            {budget}, {side} x {side} per visual token")
    for file in image:
        opened = load_image(file)
        rows, columns = (int(n) for n in processor(opened)["image_grid_hw"][0])
        height, width = rows * vision.patch_size, columns * vision.patch_size
        tokens = rows * columns // vision.spatial_merge_size**2
        size = f"{opened.height} x {opened.width} pixels (height x width)"
        print(f"  {file}: {size}, seen as {height} x {width}: {tokens} visual tokens")


Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT.")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Size of a file of weights at most.")]
Tokenizer = Annotated[str | None, typer.Option(metavar="FOLDER", help="Tokenizer, where it lies elsewhere.")]


def _say_missing(missing: list[str], out: str):
    if missing:
        print(f"{out} has no {', '.join(missing)}: give --tokenizer a folder that holds one.")


@app.command()
def convert(
    raw: Annotated[str, typer.Argument(metavar="RAW", help="Raw folder or Hub id.")],
    out: Out,
    tokenizer: Tokenizer = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="bfloat16, float16 or float32.")] = None,
    max_shard_size: ShardSize = "5GB",
    num_pre_buffer_layers: Annotated[int | None, typer.Option(metavar="N", help="Depth of the pre-Buffer.")] = None,
    repo_id: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Hub id that the card's examples load the model from.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence for the card, as the Hub writes it: apache-2.0, mit, ...")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare tensors and logits with the source.")] = False,
    force: Force = False,
):
    """Make a complete Hub repository of a raw checkpoint."""
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype must be bfloat16, float16 or float32, got {dtype}.")
    missing = conversion.convert_raw_to_hub(
        raw,
        out,
        tokenizer=tokenizer,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        num_pre_buffer_layers=num_pre_buffer_layers,
        repo_id=repo_id,
        license=license,
        verify=verify,
        force=force,
    )
    if verify:
        print(f"Verified: all tensors of {out}, and its logits on a fixed prompt, are those of {raw}.")
    _say_missing(missing, out)


@app.command()
def export(model_name: Model, out: Out, max_shard_size: ShardSize = "5GB", force: Force = False):
    """Write a NEO in the layout of the released checkpoints."""
    conversion.convert_hub_to_raw(model_name, out, max_shard_size=max_shard_size, force=force)


@app.command()
def init(
    qwen3: Annotated[str, typer.Argument(metavar="QWEN3", help="Folder or Hub id of a Qwen3 LLM.")],
    out: Out,
    num_pre_buffer_layers: Annotated[int, typer.Option(metavar="N", help="Depth of the pre-Buffer.")],
    tokenizer: Tokenizer = None,
    max_shard_size: ShardSize = "5GB",
    seed: Annotated[int, typer.Option(metavar="N", help="Of the random weights.")] = 0,
    force: Force = False,
):
    """Start a NEO from a Qwen3 LLM, ready for pre-training."""
    missing = conversion.init_from_qwen3(
        qwen3,
        out,
        num_pre_buffer_layers=num_pre_buffer_layers,
        tokenizer=tokenizer,
        max_shard_size=max_shard_size,
        seed=seed,
        force=force,
    )
    _say_missing(missing, out)


pre_buffer = typer.Typer(help="The pre-Buffer as a checkpoint of its own.", no_args_is_help=True)
app.add_typer(pre_buffer, name="pre-buffer")


@pre_buffer.command()
def extract(model_name: Model, out: Out, force: Force = False):
    """Lift patch embedding and pre-Buffer out of a NEO."""
    conversion.extract_pre_buffer(model_name, out, force=force)


@pre_buffer.command()
def graft(
    folder: Annotated[str, typer.Argument(metavar="PRE_BUFFER", help="Folder made by extract.")],
    qwen3: Annotated[str, typer.Argument(metavar="QWEN3", help="Folder or Hub id of a Qwen3 LLM.")],
    out: Out,
    tokenizer: Tokenizer = None,
    max_shard_size: ShardSize = "5GB",
    force: Force = False,
):
    """Start a NEO from a pre-Buffer and a Qwen3 LLM of the same width."""
    missing = conversion.graft_pre_buffer(
        folder, qwen3, out, tokenizer=tokenizer, max_shard_size=max_shard_size, force=force
    )
    _say_missing(missing, out)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Folder in Hub format.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Hub id, user/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go.")] = False,
):
    """Publish a folder in Hub format."""
    files = publishing.check_complete(folder)
    if dry_run:
        for file, size in files.items():
            print(f"{size:>15,}  {file}")
        print(f"{sum(files.values()):>15,}  bytes in {len(files)} files to {repo_id}")
        return
    print(publishing.push(folder, repo_id, private=private, revision=revision, create_pr=create_pr))


@app.command()
def doctor():
    """Check that NEO works with what is installed here; fails where it does not."""
    if not examine():
        raise typer.Exit(1)


def main(argv: list[str] | None = None):
    """Run the command line and exit; what the library refuses is one line on standard error."""
    logging.set_verbosity_error()
    try:
        app(argv)
    except (ValueError, OSError, ImportError) as error:
        print(f"neo-hf: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
