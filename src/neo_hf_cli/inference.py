"""Commands that run or describe a model."""

from .options import End, Fps, Frames, Images, MaxNewTokens, Model, Start, System, Videos, resolve_model

import signal
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def chat(
    model_name: Model,
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Without a question, a conversation starts.")
    ] = None,
    image: Images = [],  # noqa: B006 (typer copies it)
    video: Videos = [],  # noqa: B006
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    system: System = "",
    max_new_tokens: MaxNewTokens = 4096,
):
    """Answer a question about images and videos, or hold a conversation."""
    from .conversation import Conversation, converse
    from .prompts import load, media_parts, sampling_kwargs

    media = media_parts(image, video)
    sampling = sampling_kwargs(frames, fps, start, end)
    conversation = Conversation(*load(model_name), system, media, sampling, max_new_tokens)
    if question is None:
        converse(conversation)
    else:
        conversation.ask(question)


@app.command()
def show(
    model_name: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Question to visualize.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="File to write: .png, .pdf, .svg, ...")],
    image: Images = [],  # noqa: B006
    video: Videos = [],  # noqa: B006
    frames: Frames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    system: System = "",
    token: Annotated[
        int, typer.Option(metavar="N", min=1, help="Token of the answer whose attention is drawn, from 1.")
    ] = 1,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="Layer whose attention is drawn; by default the mean of all layers."),
    ] = None,
):
    """Draw how the model sees a prompt: units, indices, mask, and where an answer looks in the images."""
    from .prompts import load, media_parts, prepare, sampling_kwargs

    from neo_hf import visualize  # needs matplotlib

    visualize.check_output(out)
    media = media_parts(image, video)
    model, processor = load(model_name)
    content = [*media, {"type": "text", "text": prompt}]
    messages: list[dict] = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    inputs = prepare(processor, messages, sampling_kwargs(frames, fps, start, end))
    if token > 1:
        inputs = visualize.with_answer(model, inputs, token - 1)
    visualize.save(visualize.plot_prompt(model, processor, inputs, layer=layer), out)


@app.command()
def watch(
    model_name: Model,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="Question to ask after each frame.")],
    video: Annotated[str, typer.Option(metavar="FILE", help="Video file.")],
    every: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds of video between two frames.")],
    system: System = "",
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens to keep in the cache; the oldest frames are dropped.")
    ] = None,
    max_new_tokens: MaxNewTokens = 4096,
):
    """Play a video file as a live stream and answer a question after each frame."""
    from .prompts import load

    from neo_hf.processing_neo import format_timestamp
    from neo_hf.streaming import NeoStream
    from neo_hf.streaming import watch as watch_video
    from neo_hf.video_processing_neo import open_video

    open_video(video)  # an unreadable file is reported before the weights are loaded
    stream = NeoStream(*load(model_name), system=system, max_tokens=max_tokens)
    for step in watch_video(stream, video, question, every, max_new_tokens=max_new_tokens):
        print(f"[{format_timestamp(step.timestamp)}] {step.answer}")
        print(
            f"  frame {step.frame_seconds:.2f} s, answer {step.answer_seconds:.2f} s, {step.num_tokens} tokens in the "
            "cache",
            flush=True,
        )


@app.command()
def web(
    model_name: Model,
    compare: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Second model, for the page's Compare.", callback=resolve_model)
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on.")] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="NEO_WEB_AUTH", help="Ask for this user and password."),
    ] = None,
    root_path: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where a proxy puts the page, for example /neo.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Open a public tunnel through Gradio's servers.")] = False,
    max_sessions: Annotated[int, typer.Option(metavar="N", help="People at the same time.")] = 16,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens that a conversation, or a live video, can hold.")
    ] = 8192,
    idle_minutes: Annotated[float, typer.Option(metavar="M", help="What was not used for so long is freed.")] = 30,
):
    """Serve a page to chat, show live video, and look at what the model sees."""
    if auth is not None and not all(auth.partition(":")):
        raise ValueError("--auth must be USER:PASSWORD.")
    if compare is not None and Path(compare).name == Path(model_name).name:
        raise ValueError(f"--compare needs a model of another name, got {compare} twice.")
    from .prompts import load

    from neo_hf.loading import NANO
    from neo_hf.web import Page  # needs Gradio

    models = {Path(name).name: load(name) for name in (model_name, compare) if name is not None}
    frame_side = 64 if model_name == str(NANO) else 448
    page = Page(models, max_sessions, max_tokens, 60 * idle_minutes, frame_side)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, which deletes the uploads
    page.launch(
        server_name=host,
        server_port=port,
        auth=tuple(auth.split(":", 1)) if auth else None,
        root_path=root_path,
        share=share,
    )


@app.command()
def info(model_name: Model, image: Images = []):  # noqa: B006
    """Describe a model: sizes, parameters by part, memory, dtype on this machine, and the visual tokens of images."""
    import torch

    from neo_hf import NeoConfig
    from neo_hf.image_processing_neo import load_image
    from neo_hf.loading import choose_dtype, load_image_processor
    from neo_hf.publishing.model_card import count_parameters

    processor = load_image_processor(model_name)
    config = NeoConfig.from_pretrained(model_name)
    text, vision = config.text_config, config.vision_config

    print(f"model             {model_name}")
    print(f"weights           {config.dtype or 'dtype not given'}")
    print(f"layers            {text.num_hidden_layers} of width {text.hidden_size}, MLP {text.intermediate_size}")
    print(
        f"attention         {text.num_attention_heads} heads, {text.num_key_value_heads} key/value heads, "
        f"{text.head_dim} channels for values and 2 x {text.head_dim} for queries and keys"
    )
    print(f"vocabulary        {text.vocab_size}, head {'tied' if config.tie_word_embeddings else 'untied'}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = count_parameters(config)
    cached = 3 * text.head_dim * text.num_key_value_heads * text.num_hidden_layers  # keys are twice as wide as values
    names = {"layers": "layers (pre-Buffer depth unknown)"}
    if (depth := text.num_pre_buffer_layers) is not None:
        names["pre_buffer"] = f"pre-Buffer, layers 0 to {depth - 1}"
        names["post_llm"] = f"post-LLM, layers {depth} to {text.num_hidden_layers - 1}"
    num_parameters = counts.pop("total")
    print(f"parameters        {num_parameters:,}")
    for name, count in counts.items():
        print(f"  {names.get(name, name.replace('_', ' ')):<34} {count:>15,}")
    for dtype in (torch.float32, torch.bfloat16):
        weights, token = num_parameters * dtype.itemsize / 1e6, cached * dtype.itemsize / 1e3
        print(f"memory            {weights:,.0f} MB of weights and {token:.1f} kB per token in the cache, in {dtype}")
    chosen = choose_dtype(config, device)
    reason = "" if chosen == config.dtype else f", since this CPU has no fast products of {config.dtype}"
    print(f"runs here in      {chosen or 'the dtype of its weights'}, on {device}{reason}")
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


@app.command()
def doctor():
    """Check that NEO works with the installed versions; fails if it does not."""
    from neo_hf.doctor import examine

    if not examine():
        raise typer.Exit(1)
