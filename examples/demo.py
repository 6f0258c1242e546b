"""Ask NEO-nano, the model that comes with the package, about images, a clip and a stream.

Prints the answers and writes `demo.png`: the images with questions and answers and, below, what the model sees of the
question about two images (units, indices, attention mask, where the answer looks). `--seed` draws other scenes.
"""

import argparse
import io
import textwrap
from pathlib import Path

from nano.world import Sample, World
from PIL import Image, ImageDraw, ImageFont

from neo_hf import NeoForConditionalGeneration, NeoProcessor, load_nano
from neo_hf.streaming import NeoStream
from neo_hf.visualize import plot_prompt

Answered = tuple[str, list[Image.Image], list[tuple[str, str]]]  # title, images, questions with answers


def prepare(processor: NeoProcessor, content: list[dict]):
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def ask(model: NeoForConditionalGeneration, processor: NeoProcessor, content: list[dict]) -> str:
    inputs = prepare(processor, content)
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def images_of(sample: Sample) -> list[Image.Image]:
    return [part["image"] for part in sample["messages"][0]["content"] if part["type"] == "image"]


def conversation(answered: list[Answered]) -> Image.Image:
    """The images, with their questions (black) and answers (green) beside them."""
    zoom, margin, line, columns = 2, 16, 24, 64
    rows = [[p.resize((p.width * zoom, p.height * zoom), Image.Resampling.NEAREST) for p in a[1]] for a in answered]
    texts = [
        [(title, "gray")]
        + [
            (wrapped, color)
            for pair in pairs
            for text, color in zip(pair, ("black", "darkgreen"), strict=True)
            for wrapped in textwrap.wrap(text, columns)
        ]
        for title, _, pairs in answered
    ]
    left = max(sum(image.width + margin for image in row) for row in rows) + margin
    heights = [max(line * len(t), *(p.height for p in row)) + margin for t, row in zip(texts, rows, strict=True)]
    sheet = Image.new("RGB", (left + 10 * columns, sum(heights) + margin), "white")
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(18), margin
    for row, lines, height in zip(rows, texts, heights, strict=True):
        x = margin
        for image in row:
            sheet.paste(image, (x, y))
            pen.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline="silver")
            x += image.width + margin
        for number, (text, color) in enumerate(lines):
            pen.text((left, y + line * number), text, fill=color, font=font)
        y += height
    return sheet


def what_it_sees(model: NeoForConditionalGeneration, processor: NeoProcessor, content: list[dict]) -> Image.Image:
    file = io.BytesIO()
    plot_prompt(model, processor, prepare(processor, content)).savefig(file, format="png", dpi=100)
    return Image.open(file).convert("RGB")


def stack(images: list[Image.Image]) -> Image.Image:
    """The images below one another, each centred."""
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, ((sheet.width - image.width) // 2, top))
        top += image.height
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes, none of which was used in training")
    model, processor = load_nano()
    world = World(seed=parser.parse_args().seed, test=True)
    answered: list[Answered] = []

    scene = world.scene((3, 4), distinct=True)
    pairs = []
    for question, _ in (world.caption(scene), world.relation(scene), world.count(scene)):
        content = [{"type": "image", "image": scene.draw()}, {"type": "text", "text": question}]
        pairs.append((question, ask(model, processor, content)))
    answered.append(("A scene", [scene.draw()], pairs))

    digits = world.draw_digits("".join(world.random.choices("0123456789", k=3)), handwritten=True)
    question = "What number is written?"
    content = [{"type": "image", "image": digits}, {"type": "text", "text": question}]
    answered.append(("Handwriting", [digits], [(question, ask(model, processor, content))]))

    change, clip = world.change_sample(), world.motion_sample()
    for title, sample in (("Two images", change), ("A clip", clip)):
        content = sample["messages"][0]["content"]
        answered.append((title, images_of(sample), [(content[-1]["text"], ask(model, processor, content))]))

    live = world.motion_sample()
    frames, question = images_of(live), live["messages"][0]["content"][-1]["text"]
    stream = NeoStream(model, processor)
    for second, frame in enumerate(frames):
        stream.add_frame(frame, timestamp=second)
    answer = "".join(stream.ask(question, max_new_tokens=8))
    answered.append(("A stream, frame by frame", frames, [(question, answer)]))

    for title, _, pairs in answered:
        for question, answer in pairs:
            print(f"{title + ':':<26}{question}\n{'':<26}{answer}")
    seen = what_it_sees(model, processor, change["messages"][0]["content"])
    stack([conversation(answered), seen]).save("demo.png")
    print(f"The conversation, and what the model sees: {Path('demo.png').resolve()}")


if __name__ == "__main__":
    main()
