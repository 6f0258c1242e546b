"""Draws the figures of the README and of the documentation beside this file: `python docs/images/draw.py`.

The answers in them are NEO-nano's, the times those of the last run of benchmarks/speed.py in benchmarks/RESULTS.md.
"""

import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from neo_hf import NeoForConditionalGeneration, NeoProcessor, load_nano, visualize

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from nano.world import Shape, World, draw  # noqa: E402

NEO, QWEN = "#e8833a", "#9aa3b2"


def tokenize(processor: NeoProcessor, content: list[dict]):
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def answer(model: NeoForConditionalGeneration, processor: NeoProcessor, content: list[dict]) -> str:
    inputs = tokenize(processor, content)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def about(image: Image.Image, question: str) -> list[dict]:
    return [{"type": "image", "image": image}, {"type": "text", "text": question}]


def draw_bubble(ax: Axes, x: float, y: float, text: str, color: str) -> float:
    """Returns its height."""
    lines = textwrap.wrap(text, 36)
    width, height = 2.4 + 0.78 * max(map(len, lines)), 1.5 + 1.7 * len(lines)
    box = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.9", facecolor=color, edgecolor="none")
    ax.add_patch(box)
    ax.text(x + 1.2, y + height / 2, "\n".join(lines), va="center", fontsize=10.5, linespacing=1.15)
    return height


def draw_conversation(ax: Axes, turns: list[tuple[list[dict], str]]):
    """The images of each turn beside its question and answer. `ax` is in tenths of an inch from the top left."""
    ax.axis("off")
    top = 1.0
    for content, reply in turns:
        images = [part["image"] for part in content if part["type"] == "image"]
        side = 9.5 if len(images) < 3 else 4.5
        for number, image in enumerate(images):
            row, column = divmod(number, 2)
            x, y = column * (side + 0.5), top + row * (side + 0.5)
            scale = min(side / image.height, 19.5 / image.width)
            width, height = image.width * scale, image.height * scale
            ax.imshow(image, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto")
            ax.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor="#c3c8d0"))
        asked = draw_bubble(ax, 21.5, top, content[-1]["text"], "#eceff4")
        replied = draw_bubble(ax, 24.5, top + asked + 0.7, reply, "#fde3cf")
        top = max(y + height, top + asked + 0.7 + replied) + 1.6
    width, height = 10 * ax.figure.get_size_inches() * ax.get_position().size
    ax.set(xlim=(0, width), ylim=(height, 0))


def conversation(model: NeoForConditionalGeneration, processor: NeoProcessor, turns: list[list[dict]]) -> Figure:
    figure = Figure(figsize=(14, 5.7))
    figure.text(0.01, 0.95, "A conversation with NEO-nano", fontsize=13, weight="bold")
    figure.text(0.43, 0.95, "What the model sees when asked what changed", fontsize=13, weight="bold")
    answered = [(content, answer(model, processor, content)) for content in turns]
    draw_conversation(figure.add_axes((0.01, 0.0, 0.4, 0.93)), answered)

    prompt = visualize.read_prompt(model.config, processor, tokenize(processor, turns[1]))
    weights, _ = visualize.answer_attention(model, prompt)
    units = figure.add_axes((0.43, 0.55, 0.56, 0.33))
    visualize.plot_units(prompt, units)
    units.set_title("One sequence of text and visual tokens", loc="left", fontsize=10)
    mask = figure.add_axes((0.46, 0.085, 0.17, 0.4))
    visualize.plot_mask(prompt, mask)
    mask.set_title("Attention mask", pad=12, fontsize=10)
    for number, left in enumerate((0.69, 0.85)):
        visualize.plot_attention(prompt, weights, number, figure.add_axes((left, 0.085, 0.14, 0.36)))
    figure.text(0.69, 0.485, "Attention of the first answer token over the images", fontsize=10)
    return figure


def speed() -> Figure:
    """NEO and Qwen3-VL side by side, from the tables of the last run."""
    run = (ROOT / "benchmarks" / "RESULTS.md").read_text().split("### Speed (`speed.py`)")[-1]
    first = re.findall(r"^\| (one [^|]*|16 [^|]*) \| \d+ \| ([\d.]+) s \| ([\d.]+) s \|", run, re.MULTILINE)
    steps = re.findall(r"^\| (256|4096) \| ([\d.]+) ms \| [\d.]+ ms \| ([\d.]+) ms \|", run, re.MULTILINE)
    panels = (
        ("Time to first token, seconds", [(name.replace(" of ", "\nof "), neo, qwen) for name, neo, qwen in first]),
        ("Decoding step, milliseconds", [(f"{int(count):,}\ncached tokens", neo, qwen) for count, neo, qwen in steps]),
    )
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for ax, (title, rows) in zip(figure.subplots(1, 2), panels, strict=True):
        for side, (label, color) in enumerate((("NEO", NEO), ("Qwen3-VL", QWEN))):
            values = [float(row[1 + side]) for row in rows]
            bars = ax.bar(np.arange(len(rows)) + (side - 0.5) * 0.38, values, 0.36, color=color, label=label)
            ax.bar_label(bars, fontsize=8)
        ax.set_xticks(range(len(rows)), [row[0] for row in rows])
        ax.set_title(title, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.3)
        ax.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    return figure


def main(folder: Path = Path(__file__).parent):
    model, processor = load_nano()
    shapes = [Shape("red", "circle", 8, 4), Shape("blue", "square", 40, 8), Shape("yellow", "star", 36, 40)]
    scene = draw((64, 64), "white", shapes)
    scene.save(folder / "scene.png")
    change = World(seed=3, test=True).change_sample()["messages"][0]["content"]
    world = World(seed=7, test=True)
    motion = world.motion_sample()["messages"][0]["content"]
    digits = about(world.draw_digits("407", handwritten=True), "What number is written?")
    turns = [about(scene, "Describe the picture."), change, motion, digits]
    visualize.save(conversation(model, processor, turns), folder / "conversation.png")
    visualize.save(visualize.plot_prompt(model, processor, tokenize(processor, change)), folder / "seen.png")
    visualize.save(speed(), folder / "speed.png")


if __name__ == "__main__":
    main()
