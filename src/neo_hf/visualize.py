"""What the model sees of a prompt, drawn: its units, the T, H and W indices, the attention mask, and the attention of
an answer's token over the images. Needs matplotlib (extra `plot`).

`plot_prompt` draws all of it; `read_prompt` gives the data, and the other functions draw one part each, on `ax` where
it is given. Nothing is shown or written: figures belong to no window, `figure.savefig` writes them. Shapes: L tokens,
N images (or video frames).
"""

from .attention_neo import find_key_runs
from .configuration_neo import NeoConfig
from .image_processing_neo import NeoImageProcessor
from .indexing_neo import allocate_position_ids, document_starts, place_in_grids
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor

import math
import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache

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
MAX_MASK_SIDE = 1024  # more than the dots of its axes


@dataclass(frozen=True)
class Unit:
    """Neighbouring tokens [start, stop) of a row that belong together; `document` counts from 0."""

    start: int
    stop: int
    document: int


@dataclass(frozen=True)
class TextUnit(Unit):
    """All text between two images or borders of documents, decoded."""

    text: str


@dataclass(frozen=True)
class ImageUnit(Unit):
    """The visual tokens of image `number` of the row: `grid` (rows, columns), `pixels` (height, width, 3) uint8."""

    number: int
    grid: tuple[int, int]
    pixels: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """
    A row as the model sees it, without padding.

    input_ids: (L,) int64.
    position_ids: (3, L) int64 T, H and W indices.
    mask: (L, L) bool, whether a query (row) sees a key (column).
    units: from the first token to the last, without gaps.
    pixel_values, image_grid_hw: patches and (N, 2) grids of its images, `None` where there are none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    units: list[Unit]
    pixel_values: torch.Tensor | None
    image_grid_hw: torch.Tensor | None

    @property
    def images(self) -> list[ImageUnit]:
        """The units that are images, in order."""
        return [unit for unit in self.units if isinstance(unit, ImageUnit)]


def read_prompt(config: NeoConfig, processor: NeoProcessor, inputs: Mapping[str, torch.Tensor]) -> Prompt:
    """
    Args:
        inputs: arguments of `forward` for one row, as the processor or a collator gives them: `input_ids` (1, L), and
            where there are any `attention_mask` (1, L), `pixel_values`, `image_grid_hw`, `position_ids` (3, 1, L), and
            `document_ids` (1, L) of a packed row. The mask takes memory in proportion to L^2 bytes.

    Raises:
        ValueError: there are more rows, `position_ids` are not three-dimensional, or images and image tokens do not
            match in number.
    """
    rows, length = inputs["input_ids"].shape
    if rows != 1 or not length:
        raise ValueError(f"A drawing shows one prompt: input_ids must be (1, tokens), got {(rows, length)}.")
    there = torch.ones(length, dtype=torch.bool)
    if (attention_mask := inputs.get("attention_mask")) is not None:
        there = attention_mask[0].cpu() != 0
    input_ids = inputs["input_ids"].cpu()[:, there]
    document_ids = inputs.get("document_ids")
    if document_ids is not None:
        document_ids = document_ids.cpu()[:, there]
    pixels, grid_hw = (
        None if (tensor := inputs.get(name)) is None else tensor.cpu() for name in ("pixel_values", "image_grid_hw")
    )
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        position_ids = allocate_position_ids(
            input_ids,
            grid_hw,
            image_token_id=processor.image_token_id,
            image_start_token_id=processor.image_start_token_id,
            spatial_merge_size=processor.image_processor.spatial_merge_size,
            document_ids=document_ids,
        )
    elif position_ids.shape != (3, 1, length):
        raise ValueError(f"position_ids must be {(3, 1, length)} (T, H and W), got {tuple(position_ids.shape)}.")
    else:
        position_ids = position_ids.cpu()[:, :, there]

    return Prompt(
        input_ids=input_ids[0],
        position_ids=position_ids[:, 0],
        mask=find_key_runs(position_ids, document_ids=document_ids).dense()[0, 0],
        units=_find_units(input_ids, document_ids, pixels, grid_hw, processor),
        pixel_values=pixels,
        image_grid_hw=grid_hw,
    )


def _find_units(
    input_ids: torch.Tensor,
    document_ids: torch.Tensor | None,
    pixels: torch.Tensor | None,
    grid_hw: torch.Tensor | None,
    processor: NeoProcessor,
) -> list[Unit]:
    images, grids = [], []
    number = torch.full_like(input_ids, -1)  # of the image, -1 on text
    if grid_hw is not None and len(grid_hw):
        if pixels is None:
            raise ValueError(f"image_grid_hw describes {len(grid_hw)} images, but there are no pixel_values.")
        merge_size = processor.image_processor.spatial_merge_size
        for patches, (rows, columns) in zip(pixels.split(grid_hw.prod(-1).tolist()), grid_hw.tolist(), strict=True):
            images.append(patches_to_image(patches, rows, columns, processor.image_processor))
            grids.append((rows // merge_size, columns // merge_size))
        is_image = input_ids == processor.image_token_id
        place, _, _ = place_in_grids(is_image.cumsum(-1) - 1, torch.tensor(grids))
        number = torch.where(is_image, place, -1)
    opens = document_starts(torch.zeros_like(input_ids) if document_ids is None else document_ids)
    starts = document_starts(number) | opens  # neighbours of another number, be it of a document or an image
    documents = (opens.cumsum(-1) - 1)[0].tolist()
    edges = [*starts[0].nonzero()[:, 0].tolist(), input_ids.shape[1]]
    units: list[Unit] = []
    for start, stop in pairwise(edges):
        if (image := int(number[0, start])) < 0:
            units.append(TextUnit(start, stop, documents[start], processor.tokenizer.decode(input_ids[0, start:stop])))
        else:
            units.append(ImageUnit(start, stop, documents[start], image, grids[image], images[image]))
    return units


def patches_to_image(patches: torch.Tensor, rows: int, columns: int, processor: NeoImageProcessor) -> np.ndarray:
    """
    The image that was cut into normalised patches, undone.

    Args:
        patches: (rows * columns, 3 * patch_size^2), row-major, channel-major inside.

    Returns:
        (rows * patch_size, columns * patch_size, 3) uint8.
    """
    size = processor.patch_size
    pixels = patches.float().reshape(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * size, columns * size, 3)
    pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8).numpy()


@torch.no_grad()
def answer_attention(
    model: NeoForConditionalGeneration, prompt: Prompt, layer: int | None = None
) -> tuple[np.ndarray, int]:
    """
    Where the model looks when it says the token that follows `prompt`: attention of the last token, in eager mode.
    All before it goes through the cache, so that the weights of one query only are held. In a packed row, the last
    document is answered. Switches the model's attention implementation for the time of the call.

    Args:
        layer: the layer to look at; the mean over all of them where not given.

    Returns:
        (L,) float32 weights, mean over heads, 0 on other documents; sum 1. And the id of the likeliest next token.

    Raises:
        ValueError: there is no such layer, or the prompt ends within an image.
    """
    num_layers = model.config.text_config.num_hidden_layers
    if layer is not None and not 0 <= layer < num_layers:
        raise ValueError(f"layer must be 0 to {num_layers - 1}, got {layer}.")
    last = prompt.units[-1]
    if isinstance(last, ImageUnit):
        raise ValueError("The prompt ends with an image; the answer follows a token of text.")
    document = [unit for unit in prompt.units if unit.document == last.document]
    start = document[0].start
    input_ids = prompt.input_ids[None, start:].to(model.device)
    position_ids = prompt.position_ids[:, None, start:].to(model.device)
    images = {}
    if count := sum(isinstance(unit, ImageUnit) for unit in document):
        assert prompt.image_grid_hw is not None
        assert prompt.pixel_values is not None
        grid_hw = prompt.image_grid_hw[-count:]
        patches = prompt.pixel_values[-int(grid_hw.prod(-1).sum()) :]
        images = {"pixel_values": patches.to(model.device), "image_grid_hw": grid_hw.to(model.device)}

    cache = DynamicCache(config=model.config.get_text_config())
    if input_ids.shape[1] > 1:
        model(
            input_ids=input_ids[:, :-1],
            position_ids=position_ids[..., :-1],
            past_key_values=cache,
            logits_to_keep=1,
            **images,
        )
    decoder = model.get_decoder()
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        outputs = model(
            input_ids=input_ids[:, -1:],
            position_ids=position_ids[..., -1:],
            past_key_values=cache,
            output_attentions=True,
        )
    finally:
        decoder.set_attn_implementation(implementation)
    chosen = outputs.attentions if layer is None else outputs.attentions[layer : layer + 1]
    weights = torch.stack([weights[0, :, 0].float().mean(0).cpu() for weights in chosen]).mean(0)
    return np.pad(weights.numpy(), (start, 0)), int(outputs.logits[0, -1].argmax())


@torch.no_grad()
def with_answer(
    model: NeoForConditionalGeneration, inputs: Mapping[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """
    The inputs of a row (see `read_prompt`), without `position_ids`, followed by the first tokens of the model's greedy
    answer: what it sees when it says the next.

    Raises:
        ValueError: the answer is shorter.
    """
    given = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "position_ids"}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    output = model.generate(**given, max_new_tokens=num_tokens, do_sample=False)
    if (found := output.shape[1] - given["input_ids"].shape[1]) < num_tokens:
        raise ValueError(f"The answer has {found} tokens only, expected {num_tokens} or more.")
    attention_mask = F.pad(given["attention_mask"], (0, num_tokens), value=1)
    return {**given, "input_ids": output, "attention_mask": attention_mask}


def plot_units(prompt: Prompt, ax: Axes | None = None) -> Figure:
    """
    The units along the tokens: images as the model gets them, with number and grid, and text as it is read, with its
    tokens. Of many units, those at both ends are shown.
    """
    ax = ax or _new_axes(14, 2.6)
    length = len(prompt.input_ids)
    ax.set(xlim=(0, length), ylim=(-0.12, 1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(f"{length:,} tokens, {len(prompt.images)} images", loc="left")
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
    points = ax.bbox.width / ax.figure.dpi * 72 * width  # a letter is 0.6 font sizes wide
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
    ax.set_zorder(right.get_zorder() + 1)  # T on top of the many turns of W
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
    Which key (column) each query (row) sees, with the borders of units. Of long prompts, a dot is several tokens and
    shows whether any of them is seen.
    """
    ax = ax or _new_axes(6, 6)
    length = len(prompt.input_ids)
    dots = shrink_mask(prompt.mask.numpy(), MAX_MASK_SIDE)
    step = math.ceil(length / MAX_MASK_SIDE)
    side = step * len(dots)  # the last dot may reach beyond the last token
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
    ax.set_title("Attention mask: a query sees the blue keys", pad=14)
    return _figure_of(ax)


def shrink_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """The largest value of each square of a (L, L) boolean mask, so that at most `side` by `side` are left."""
    length = len(mask)
    step = math.ceil(length / side)
    rest = -length % step
    dots = (length + rest) // step
    return np.pad(mask, (0, rest)).reshape(dots, step, dots, step).max((1, 3))


def plot_attention(prompt: Prompt, weights: np.ndarray, number: int = 0, ax: Axes | None = None) -> Figure:
    """
    Attention over an image, laid on it token by token.

    Args:
        weights: (L,) from `answer_attention`.
        number: of the image in the prompt. Colours reach up to the largest weight in any image.
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
    All that the model sees of a prompt: units, indices, mask, and attention over the images when the next token is
    said; of many images, those with the most.

    Args:
        inputs: as for `read_prompt`.
        layer: as for `answer_attention`.

    Raises:
        ValueError: as `read_prompt` and `answer_attention`.
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
    """Raise a ValueError where `save` could not write to `path`."""
    path = Path(path)
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"A drawing must end in .{', .'.join(sorted(formats))}, got {path}.")
    if not path.parent.is_dir():
        raise ValueError(f"Cannot write {path}: there is no folder {path.parent}.")


def save(figure: Figure, path: str | os.PathLike):
    """Write a figure, in the format of the file's ending, or leave what is there as it was."""
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
    """Where each document but the first starts."""
    return [unit.start for last, unit in pairwise(prompt.units) if unit.document != last.document]
