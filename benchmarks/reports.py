"""Reports of benchmarks, as Markdown on the terminal and in a file of results."""

import datetime
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def publish(
    device: str,
    settings: list[str],
    title: str,
    body: str,
    append: Path | None,
    plot: tuple[str, str, Callable] | None = None,
):
    """
    Print the report of a run and, where asked, add it to a file.

    Args:
        device: what was measured, for the heading.
        settings: of the run, such as the dtype.
        title: of the section, which names the script.
        body: Markdown.
        append: file that the report is added to.
        plot: what the file beside it is called, what it shows, and a function that returns the figure.
    """
    date = datetime.date.today().isoformat()
    details = [platform.machine(), *settings, f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    text = f"## {date}, {device}\n\n{', '.join(details)}.\n\n### {title}\n\n{body}"
    print(text)
    if append is None:
        return
    if plot is not None:
        name, caption, draw = plot
        image = append.with_name(f"{name}-{date}.png")
        draw().savefig(image, dpi=120)
        text += f"\n![{caption}]({image.name})\n"
    with append.open("a") as file:
        file.write(f"\n{text}")
