"""Figures of what the model sees. Functions that draw one part draw it on `ax` if given.

Nothing is shown or written: the figures belong to no window; `save` writes them.
"""

import math
import os
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from neo_hf.modeling_neo import NeoForConditionalGeneration
from neo_hf.processing_neo import NeoProcessor
from neo_hf.visualize.prompt import ImageUnit, Prompt, TextUnit, answer_attention, read_prompt

try:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Polygon, Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("Drawing needs matplotlib: pip install 'neo-hf[plot]', or pip install matplotlib.") from error

TEXT_COLOR = "#c3c8d0"
IMAGE_COLORS = ("#e8833a", "#3f9b6c", "#8f5fc0", "#cf4d6f", "#2f9ec4", "#b59a1f")
AXIS_COLORS = {"T": "#30343b", "H": "#d1495b", "W": "#2e86c1"}
MASK_COLORS = ListedColormap(["#ffffff", "#33658a"])
MAX_CARDS = 17
CARD_GAP = 0.006  # of the width
MAX_IMAGES = 9
MAX_MASK_SIDE = 1024  # more than the pixels of its axes


def plot_units(prompt: Prompt, ax: Axes | None = None) -> Figure:
    """
    The units along the token axis: images as the model gets them, with their number and grid, and text with its number
    of tokens. Of many units, the first and last are shown.
    """
    ax = ax or _new_axes(14, 2.6)
    length = len(prompt.input_ids)
    ax.set(xlim=(0, length), ylim=(-0.12, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    count = len(prompt.images)
    ax.set_title(f"{length:,} tokens, {count} image{'' if count == 1 else 's'}", loc="left")
    colors = _unit_colors(prompt)
    for unit, color in zip(prompt.units, colors, strict=True):
        ax.add_patch(
            Rectangle((unit.start, 0), unit.stop - unit.start, 0.1, facecolor=color, edgecolor="white", lw=0.5)
        )
    borders = _document_borders(prompt)
    for number, start in enumerate([0, *borders] if borders else [], start=1):
        ax.vlines(start, -0.12, 0.1, color="black", lw=1.5)
        ax.text(start, -0.03, f" {number}" if start else f" document {number}", va="top", fontsize=8)

    shown: list[int | None] = [*range(len(prompt.units))]
    if len(shown) > MAX_CARDS:
        half = MAX_CARDS // 2
        shown = [*shown[:half], None, *shown[-half:]]
    step = (1 + CARD_GAP) / len(shown)
    width = step - CARD_GAP
    font_size = 9 if len(shown) <= 8 else 6.5
    points = ax.bbox.width / ax.figure.dpi * 72 * width  # a letter is about 0.6 font sizes wide
    letters = max(int(points / (0.62 * font_size)), 4)
    for place, index in enumerate(shown):
        left = place * step
        if index is None:
            ax.text((left + width / 2) * length, 0.6, f"…\n{len(prompt.units) - len(shown) + 1} more", ha="center")
            continue
        unit, color = prompt.units[index], colors[index]
        corners = [(left * length, 0.3), ((left + width) * length, 0.3), (unit.stop, 0.1), (unit.start, 0.1)]
        ax.add_patch(Polygon(corners, facecolor=color, alpha=0.35, lw=0))
        card = ax.inset_axes((left, 0.375, width, 0.5), xticks=[], yticks=[], anchor="S")
        card.spines[:].set_color(color)
        count = unit.stop - unit.start
        caption = f"{count:,} token{'s' * (count > 1)}"
        if isinstance(unit, ImageUnit):
            card.imshow(unit.pixels)
            card.spines[:].set_linewidth(2)
            rows, columns = unit.grid
            caption = f"{unit.number + 1}: {rows} x {columns}"
        elif isinstance(unit, TextUnit):
            lines = [
                part for line in unit.text.splitlines(True) for part in textwrap.wrap(line.replace("\n", "↵"), letters)
            ]
            room = int(72 / font_size)
            card.annotate(
                "\n".join(lines[:room]),
                (0, 1),
                (3, -3),
                "axes fraction",
                "offset points",
                va="top",
                family="monospace",
                fontsize=font_size,
                parse_math=False,
                clip_on=True,
            )
            card.set_facecolor("#f6f7f9")
        card.set_title(caption, fontsize=7.5, pad=2)
    return _figure_of(ax)


def plot_position_ids(prompt: Prompt, ax: Axes | None = None) -> Figure:
    """The T index of each token (left axis), H and W (right axis)."""
    ax = ax or _new_axes(14, 2.2)
    right = ax.twinx()
    ax.set_zorder(right.get_zorder() + 1)  # T on top of W, which jumps at each image row
    ax.patch.set_visible(False)
    lines = []
    for name, index, side, width in zip("THW", prompt.position_ids, (ax, right, right), (1.4, 1.2, 0.6), strict=True):
        lines += side.plot(index, color=AXIS_COLORS[name], label=name, lw=width, zorder=2 + width, ds="steps-post")
    for unit, color in zip(prompt.units, _unit_colors(prompt), strict=True):
        if isinstance(unit, ImageUnit):
            ax.axvspan(unit.start, unit.stop, color=color, alpha=0.12, lw=0)
    for start in _document_borders(prompt):
        ax.axvline(start, color="black", lw=1.5)
    ax.set(xlim=(0, len(prompt.input_ids)), xlabel="token", ylabel="T")
    ax.set_ylim(bottom=0)
    right.set(ylabel="H, W")
    right.set_ylim(0, 1.15 * max(1, int(prompt.position_ids[1:].max())))
    for axis in (ax.xaxis, ax.yaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(handles=lines, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return _figure_of(ax)


def plot_mask(prompt: Prompt, ax: Axes | None = None) -> Figure:
    """
    Which keys (columns) each query (row) attends to, with the boundaries of units. In long prompts, a dot stands for
    several tokens and is filled if any of them is attended to.
    """
    ax = ax or _new_axes(6, 6)
    length = len(prompt.input_ids)
    dots = shrink_mask(prompt.mask.numpy(), MAX_MASK_SIDE)
    step = math.ceil(length / MAX_MASK_SIDE)
    side = step * len(dots)  # the last dot may extend past the last token
    ax.imshow(dots, cmap=MASK_COLORS, vmin=0, vmax=1, extent=(0, side, side, 0), interpolation="nearest")
    units = [unit.start for unit in prompt.units[1:]]
    for borders, color, line_width in ((units, "#999999", 0.4), (_document_borders(prompt), "black", 1.2)):
        ax.hlines(borders, 0, length, color=color, lw=line_width)
        ax.vlines(borders, 0, length, color=color, lw=line_width)
    for unit, color in zip(prompt.units, _unit_colors(prompt), strict=True):
        size = unit.stop - unit.start
        for corner, width, height, transform in (
            ((unit.start, 1.01), size, 0.02, ax.get_xaxis_transform()),
            ((1.01, unit.start), 0.02, size, ax.get_yaxis_transform()),
        ):
            ax.add_patch(Rectangle(corner, width, height, transform=transform, facecolor=color, clip_on=False))
    ax.set(xlim=(0, length), ylim=(length, 0), xlabel="key", ylabel="query")
    ax.set_title("Attention mask: a query attends to the blue keys", pad=14)
    return _figure_of(ax)


def shrink_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Downsample a (L, L) boolean mask to at most `side` by `side`, by the maximum of each square."""
    length = len(mask)
    step = math.ceil(length / side)
    rest = -length % step
    dots = (length + rest) // step
    return np.pad(mask, (0, rest)).reshape(dots, step, dots, step).max((1, 3))


def plot_attention(prompt: Prompt, weights: np.ndarray, number: int = 0, ax: Axes | None = None) -> Figure:
    """
    Attention over an image, laid over it token by token.

    Args:
        weights: (L,) from `answer_attention`.
        number: of the image in the prompt. The colour scale ends at the largest weight in any image.
    """
    ax = ax or _new_axes(6, 5)
    unit = prompt.images[number]
    height, width, _ = unit.pixels.shape
    top = max(weights[unit.start : unit.stop].max() for unit in prompt.images)
    ax.imshow(unit.pixels.mean(-1), cmap="gray", vmin=-128, vmax=255)  # pale gray: colour is attention
    on_grid = weights[unit.start : unit.stop].reshape(unit.grid)
    top = max(top, np.finfo(np.float32).tiny)
    colors = {"cmap": "YlOrRd", "vmin": 0, "vmax": top, "alpha": 0.9 * on_grid / top}
    ax.imshow(on_grid, extent=(0, width, height, 0), interpolation="nearest", **colors)
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"Image {number + 1}: {on_grid.sum():.1%}", fontsize=9)
    return _figure_of(ax)


def plot_prompt(
    model: NeoForConditionalGeneration,
    processor: NeoProcessor,
    inputs: Mapping[str, torch.Tensor],
    layer: int | None = None,
) -> Figure:
    """
    Everything the model sees of a prompt: units, indices, mask, and the attention over the images when it predicts the
    next token. Of many images, those with the most attention are shown.

    Args:
        inputs: as for `read_prompt`.
        layer: as for `answer_attention`.

    Raises:
        ValueError: as in `read_prompt` and `answer_attention`.
    """
    prompt = read_prompt(model.config, processor, inputs)
    figure = Figure(figsize=(14, 10), layout="constrained")
    along, square = figure.subfigures(2, 1, height_ratios=(4.6, 5.4), squeeze=False)[:, 0]
    units, positions = along.subplots(2, 1, height_ratios=(2.8, 2))
    plot_units(prompt, units)
    plot_position_ids(prompt, positions)
    images = [unit for unit in prompt.images if unit.document == prompt.units[-1].document]
    if not images:
        plot_mask(prompt, square.subplots())
        return figure
    left, right = square.subfigures(1, 2, width_ratios=(5.6, 8.4), squeeze=False)[0]
    plot_mask(prompt, left.subplots())

    weights, token_id = answer_attention(model, prompt, layer)
    shares = {unit.number: weights[unit.start : unit.stop].sum() for unit in images}
    shown = sorted(sorted(shares, key=lambda number: -shares[number])[:MAX_IMAGES])
    columns = math.ceil(math.sqrt(len(shown)))
    axes = right.subplots(math.ceil(len(shown) / columns), columns, squeeze=False)
    for ax in axes.flat[len(shown) :]:
        ax.remove()
    for number, ax in zip(shown, axes.flat, strict=False):
        plot_attention(prompt, weights, number, ax)
    right.colorbar(axes.flat[0].images[1], ax=axes, shrink=0.8, label="attention per token")
    where = "mean over layers and heads" if layer is None else f"layer {layer}, mean over heads"
    answer, share = processor.tokenizer.decode(token_id), sum(shares.values())
    right.suptitle(f"Attention when answering {answer!r}: {share:.1%} on images ({where})", parse_math=False)
    return figure


def check_output(path: str | os.PathLike):
    """Raise a ValueError if `save` could not write to `path`."""
    path = Path(path)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"A figure's file must end in .{', .'.join(sorted(formats))}, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"Cannot write {path}: there is no folder {path.parent}.")


def save(figure: Figure, path: str | os.PathLike):
    """Write a figure, in the format of the file's suffix. On failure, an existing file is left as it was."""
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        figure.savefig(unfinished, dpi=120)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").subplots()


def _figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _unit_colors(prompt: Prompt) -> list[str]:
    return [
        IMAGE_COLORS[unit.number % len(IMAGE_COLORS)] if isinstance(unit, ImageUnit) else TEXT_COLOR
        for unit in prompt.units
    ]


def _document_borders(prompt: Prompt) -> list[int]:
    """The start of each document but the first."""
    return [unit.start for last, unit in pairwise(prompt.units) if unit.document != last.document]
