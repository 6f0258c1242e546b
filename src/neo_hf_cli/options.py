"""Arguments and options that several commands take."""

from typing import Annotated

import typer


def resolve_model(name: str | None) -> str | None:
    """As `neo_hf.loading.resolve_model`, which only `nano` needs."""
    if name != "nano":
        return name
    from neo_hf import loading

    return loading.resolve_model(name)


def resolve_image(file: str) -> str:
    """The path or URL of an image; `example` is the one that comes with neo-hf."""
    if file != "example":
        return file
    from neo_hf.loading import EXAMPLE_IMAGE

    return str(EXAMPLE_IMAGE)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, folder in Hub format, folder of a raw checkpoint, or `nano`, the model that comes with neo-hf.",
        callback=resolve_model,
    ),
]
Images = Annotated[
    list[str],
    typer.Option(
        "--image",
        metavar="FILE",
        help="Image: path, URL, or `example`, the one that comes with neo-hf. Repeatable.",
        callback=lambda files: [resolve_image(file) for file in files],
    ),
]
Videos = Annotated[list[str], typer.Option("--video", metavar="FILE", help="Video: path or URL. Repeatable.")]
Frames = Annotated[int | None, typer.Option(metavar="N", help="Number of frames to sample from a video.")]
Fps = Annotated[float | None, typer.Option(metavar="F", help="Frames to sample per second of a video.")]
Start = Annotated[float | None, typer.Option(metavar="S", help="Where in a video to start, in seconds.")]
End = Annotated[float | None, typer.Option(metavar="S", help="Where in a video to end, in seconds.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum length of an answer, in tokens.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="System prompt.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Maximum size of a weight file.")]
Tokenizer = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder with the tokenizer, if the source has none.")
]
