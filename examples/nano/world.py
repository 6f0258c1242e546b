"""A small world to look at: coloured shapes and digits, drawn on the fly, with questions and their answers.

A scene has up to four shapes, one per quadrant, at places that are multiples of `SNAP` pixels. Every task makes
samples as chat messages whose images are Pillow images. Scenes are split by a hash of their description: training
never asks about those of the test split. (As the second image of a pair or a frame of a clip, one can occur.)
Handwritten digits come from scikit-learn's set, the last fifth of it for the test split.
"""

import functools
import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from transformers.video_utils import VideoMetadata

from neo_hf.processing_neo import serialize_video

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (245, 210, 40),
    "purple": (150, 60, 180),
    "orange": (255, 127, 14),
}
NEW_COLORS = {"pink": (255, 150, 190), "brown": (120, 70, 30), "cyan": (40, 210, 220)}  # NEO-nano knows none of them
KINDS = ("circle", "square", "triangle", "star", "cross")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS = ("white", "gainsboro", "lightcyan", "black")
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SNAP = 4  # pixels
SHAPE_SIZE = 20  # pixels
STEP = 12  # pixels that a moving shape goes from frame to frame
FRAMES = 4

Sample = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A shape; `x` and `y` are its upper left corner in pixels."""

    color: str
    kind: str
    x: int
    y: int

    def __str__(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """(width, height) in pixels, a background, and what stands in each of the quadrants, None where nothing does."""

    size: tuple[int, int]
    background: str
    shapes: tuple[Shape | None, Shape | None, Shape | None, Shape | None]

    @property
    def present(self) -> list[tuple[int, Shape]]:
        return [(quadrant, shape) for quadrant, shape in enumerate(self.shapes) if shape is not None]

    def describe(self) -> str:
        """The caption."""
        return ", ".join(f"{article(shape)} at the {QUADRANTS[quadrant]}" for quadrant, shape in self.present)

    def draw(self) -> Image.Image:
        return draw(self.size, self.background, [shape for _, shape in self.present])


def article(shape: Shape | None) -> str:
    return f"{'an' if str(shape)[0] == 'o' else 'a'} {shape}"


def draw(size: tuple[int, int], background: str, shapes: list[Shape]) -> Image.Image:
    image = Image.new("RGB", size, background)
    for shape in shapes:
        image.paste((COLORS | NEW_COLORS)[shape.color], (shape.x, shape.y), stencil(shape.kind))
    return image


@functools.cache
def stencil(kind: str) -> Image.Image:
    """The outline of a shape, as an anti-aliased mask of SHAPE_SIZE x SHAPE_SIZE pixels."""
    scale = 8
    mask = Image.new("L", (SHAPE_SIZE * scale, SHAPE_SIZE * scale))
    pen, n = ImageDraw.Draw(mask), SHAPE_SIZE * scale - 1
    if kind == "circle":
        pen.ellipse((0, 0, n, n), fill=255)
    elif kind == "square":
        pen.rectangle((n // 16, n // 16, n - n // 16, n - n // 16), fill=255)
    elif kind == "triangle":
        pen.polygon([(n / 2, 0), (n, n), (0, n)], fill=255)
    elif kind == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, n / 2, n / 5)
        pen.polygon([(n / 2 + r * np.sin(a), n / 2 - r * np.cos(a)) for a, r in zip(angles, radii, strict=True)], 255)
    else:
        pen.rectangle((0, n / 3, n, n - n / 3), fill=255)
        pen.rectangle((n / 3, 0, n - n / 3, n), fill=255)
    return mask.resize((SHAPE_SIZE, SHAPE_SIZE), Image.Resampling.LANCZOS)


def is_test(description: str) -> bool:
    """Whether a scene of this description belongs to the test split: one in eight."""
    return zlib.crc32(description.encode()) % 8 == 0


class World:
    """
    Draws samples of one split.

    Args:
        seed: of all that is random.
        test: draw the scenes and the handwriting that training never sees.
        sizes: (width, height) in pixels of the scenes; one is drawn per scene.
        kinds, colors: of shapes in scenes.
    """

    def __init__(
        self,
        seed: int,
        test: bool = False,
        sizes: tuple[tuple[int, int], ...] = ((64, 64),),
        kinds: tuple[str, ...] = KINDS,
        colors: tuple[str, ...] = tuple(COLORS),
    ):
        self.random = random.Random(seed)
        self.test = test
        self.sizes = sizes
        self.kinds = kinds
        self.colors = colors
        digits = load_digits()
        start, end = (len(digits.images) * 4 // 5, None) if test else (0, len(digits.images) * 4 // 5)
        self.handwriting: list[list[np.ndarray]] = [[] for _ in range(10)]
        for image, label in zip(digits.images[start:end], digits.target[start:end], strict=True):
            self.handwriting[label].append((image * 255 / 16).astype(np.uint8))

    def in_split(self, make: Callable[[], Any]) -> Any:
        """Draw until the outcome's representation belongs to this split."""
        while is_test(repr(outcome := make())) != self.test:
            pass
        return outcome

    def place(self, quadrant: int, size: tuple[int, int], color: str, kind: str) -> Shape:
        def along(side: int, second: bool) -> int:
            half = side // 2
            return second * half + SNAP * self.random.randint(0, (half - SHAPE_SIZE) // SNAP)

        return Shape(color, kind, along(size[0], quadrant % 2 == 1), along(size[1], quadrant >= 2))

    def background(self) -> str:
        return self.random.choice(BACKGROUNDS)

    def scene(
        self, counts: tuple[int, ...] = (1, 2, 3, 4), distinct: bool = False, max_colors: int | None = None
    ) -> Scene:
        """`distinct`: no two shapes of the same colour and kind. `max_colors`: draw from so many colours only."""

        def make() -> Scene:
            size, count = self.random.choice(self.sizes), self.random.choice(counts)
            colors, kinds = list(self.colors), list(self.kinds)
            if max_colors is not None:
                colors = self.random.sample(colors, max_colors)
            elif not distinct and self.random.random() < 0.7:  # more alike than chance would have them, to be counted
                colors = self.random.sample(colors, 2)
                kinds = self.random.sample(kinds, min(2, len(kinds)))
            looks = [(color, kind) for color in colors for kind in kinds]
            chosen = self.random.sample(looks, count) if distinct else self.random.choices(looks, k=count)
            shapes: list[Shape | None] = [None] * 4
            for quadrant, look in zip(self.random.sample(range(4), count), chosen, strict=True):
                shapes[quadrant] = self.place(quadrant, size, *look)
            return Scene(size, self.background(), tuple(shapes))  # type: ignore[arg-type]

        return self.in_split(make)

    # Questions about a scene: (question, answer).

    def caption(self, scene: Scene) -> tuple[str, str]:
        return "Describe the picture.", scene.describe()

    def attribute(self, scene: Scene) -> tuple[str, str]:
        quadrant = self.random.randrange(4)
        shape, place = scene.shapes[quadrant], QUADRANTS[quadrant]
        form = self.random.randrange(3)
        if form == 0 or shape is None:
            return f"What is at the {place}?", "nothing" if shape is None else article(shape)
        if form == 1:
            return f"What color is the shape at the {place}?", shape.color
        return f"What shape is at the {place}?", shape.kind

    def where(self, scene: Scene) -> tuple[str, str] | None:
        """None where every look is there more than once."""
        looks = [str(shape) for _, shape in scene.present]
        unique = [(quadrant, shape) for quadrant, shape in scene.present if looks.count(str(shape)) == 1]
        if not unique:
            return None
        quadrant, shape = self.random.choice(unique)
        return f"Where is the {shape}?", f"at the {QUADRANTS[quadrant]}"

    def relation(self, scene: Scene) -> tuple[str, str] | None:
        """None where no two shapes, each the only one of its look, are side by side or above one another."""
        looks = [str(shape) for _, shape in scene.present]
        pairs = []
        for a, first in scene.present:
            for b, second in scene.present:
                if looks.count(str(first)) == looks.count(str(second)) == 1:
                    if a % 2 != b % 2:
                        pairs.append((first, second, "left of" if a % 2 == 0 else "right of"))
                    if a // 2 != b // 2:
                        pairs.append((first, second, "above" if a < b else "below"))
        if not pairs:
            return None
        first, second, relation = self.random.choice(pairs)
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        if self.random.random() < 0.5:
            return f"Is the {first} {relation} the {second}?", "yes"
        return f"Is the {first} {opposite[relation]} the {second}?", "no"

    def count(self, scene: Scene) -> tuple[str, str]:
        shapes = [shape for _, shape in scene.present]
        form = self.random.randrange(3)
        if form == 0:
            return "How many shapes are there?", str(len(shapes))
        if form == 1:  # mostly of a colour that is there
            color = self.random.choice(shapes).color if self.random.random() < 0.8 else self.random.choice(self.colors)
            return f"How many {color} shapes are there?", str(sum(shape.color == color for shape in shapes))
        kind = self.random.choice(shapes).kind if self.random.random() < 0.8 else self.random.choice(self.kinds)
        plural = {"cross": "crosses"}.get(kind, kind + "s")
        return f"How many {plural} are there?", str(sum(shape.kind == kind for shape in shapes))

    # Samples: chat messages with images.

    def scene_sample(self, tasks: tuple[str, ...], max_colors: int | None = None) -> Sample:
        """A scene with a question of each of these tasks about it, in any order; none is asked twice."""
        order = self.random.sample(tasks, len(tasks))
        distinct = "relation" in tasks or "where" in tasks
        scene = self.scene((2, 3, 4) if "relation" in tasks else (1, 2, 3, 4), distinct, max_colors)
        asked = dict(turn for task in order if (turn := getattr(self, task)(scene)) is not None)
        return conversation([scene.draw()], [*asked.items()])

    def change_sample(self) -> Sample:
        """Two images of a scene; something changed from the first to the second, or nothing."""
        scene = self.scene((1, 2, 3), distinct=True)
        shapes = list(scene.shapes)
        quadrant, shape = self.random.choice(scene.present)
        looks = [str(shape) for _, shape in scene.present]
        form = self.random.randrange(5)
        if form == 0:
            color = self.random.choice([c for c in COLORS if f"{c} {shape.kind}" not in looks])
            shapes[quadrant] = replace(shape, color=color)
            answer = f"the {shape} became {color}"
        elif form == 1:
            kind = self.random.choice([k for k in KINDS if f"{shape.color} {k}" not in looks])
            shapes[quadrant] = replace(shape, kind=kind)
            answer = f"the {shape} became a {kind}"
        elif form == 2 and len(looks) > 1:
            shapes[quadrant] = None
            answer = f"the {shape} disappeared"
        elif form == 3:
            free = self.random.choice([q for q, s in enumerate(shapes) if s is None])
            color, kind = self.random.choice([(c, k) for c in COLORS for k in KINDS if f"{c} {k}" not in looks])
            shapes[free] = self.place(free, scene.size, color, kind)
            answer = f"{article(shapes[free])} appeared"
        else:
            answer = "nothing"
        changed = replace(scene, shapes=tuple(shapes))
        return conversation([scene.draw(), changed.draw()], [("What changed?", answer)])

    def motion_sample(self) -> Sample:
        """Frames of a shape that moves, perhaps along with one that does not."""

        def make() -> tuple[tuple[int, int], str, str, Shape, Shape | None]:
            size, direction = self.random.choice(self.sizes), self.random.choice([*DIRECTIONS])
            dx, dy = DIRECTIONS[direction]
            looks = self.random.sample([(color, kind) for color in COLORS for kind in KINDS], 2)
            # One half for the shape that moves along it, the other for the one that stands.
            half = self.random.randrange(2)
            travel = STEP * (FRAMES - 1)

            def start(side: int, sign: int) -> int:
                first = SNAP * self.random.randint(0, (side - SHAPE_SIZE - travel) // SNAP)
                return first if sign > 0 else first + travel

            def across(side: int, second: int) -> int:
                return second * (side // 2) + SNAP * self.random.randint(0, (side // 2 - SHAPE_SIZE) // SNAP)

            width, height = size
            if dx:
                mover = Shape(*looks[0], start(width, dx), across(height, half))
                other = Shape(*looks[1], across(width, self.random.randrange(2)), across(height, 1 - half))
            else:
                mover = Shape(*looks[0], across(width, half), start(height, dy))
                other = Shape(*looks[1], across(width, 1 - half), across(height, self.random.randrange(2)))
            return size, self.background(), direction, mover, other if self.random.random() < 0.5 else None

        size, background, direction, mover, other = self.in_split(make)
        dx, dy = DIRECTIONS[direction]
        frames = []
        for number in range(FRAMES):
            moved = replace(mover, x=mover.x + dx * STEP * number, y=mover.y + dy * STEP * number)
            frames.append(draw(size, background, [moved] if other is None else [moved, other]))
        question = f"Which way does the {mover} move?"
        return conversation(frames, [(question, direction)], video=self.random.choice(("whole", "streamed")))

    def digits_sample(self) -> Sample:
        """A row of digits, printed or handwritten: up to three, in training also more."""
        lengths = (1, 2, 3) if self.test else (1, 2, 3, 4, 6)
        number = "".join(self.random.choices("0123456789", k=self.random.choice(lengths)))
        return conversation([self.draw_digits(number)], [("What number is written?", number)])

    def draw_digits(self, number: str, handwritten: bool | None = None) -> Image.Image:
        """An image 32 pixels high and 32 wide per digit, dark on light or light on dark."""
        if handwritten is None:
            handwritten = self.random.random() < 0.6
        mask = Image.new("L", (32 * len(number), 32))
        for place, digit in enumerate(number):
            side = self.random.choice((24, 28, 32)) if handwritten else self.random.choice((24, 28))
            if handwritten:
                tile = Image.fromarray(self.random.choice(self.handwriting[int(digit)]))
                tile = tile.resize((side, side), Image.Resampling.BICUBIC)
                if not self.test:
                    tile = self.distort(tile)
            else:
                tile = Image.new("L", (side, side))
                ImageDraw.Draw(tile).text((side / 2, side / 2), digit, fill=255, font=font(side), anchor="mm")
            room = (32 - side) // SNAP
            x, y = (SNAP * self.random.randint(0, room) for _ in "xy")
            mask.paste(tile, (32 * place + x, y))
        ink, paper = self.random.choice([("black", "white"), ("navy", "gainsboro"), ("white", "black")])
        image = Image.new("RGB", mask.size, paper)
        image.paste(ink, (0, 0), mask)
        return image

    def distort(self, tile: Image.Image) -> Image.Image:
        """The same digit as other hands would write it: turned, slanted, stretched and shifted a little."""
        angle, slant = math.radians(self.random.uniform(-12, 12)), self.random.uniform(-0.15, 0.15)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        stretch = np.diag([self.random.uniform(0.85, 1.15) for _ in "xy"])
        matrix = turn @ np.array([[1, slant], [0, 1]]) @ stretch
        center = np.full(2, tile.width / 2)
        shift = center - matrix @ center + [self.random.uniform(-0.04, 0.04) * tile.width for _ in "xy"]
        affine = (*matrix[0], shift[0], *matrix[1], shift[1])
        return tile.transform(tile.size, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)

    def text_sample(self) -> Sample:
        """The same questions with the images put into words."""
        form = self.random.random()
        if form < 0.6:
            tasks = tuple(self.random.sample(("attribute", "relation", "count"), 2))
            scene = self.scene((2, 3, 4) if "relation" in tasks else (1, 2, 3, 4), distinct="relation" in tasks)
            turns = [turn for task in tasks if (turn := getattr(self, task)(scene)) is not None]
            return conversation([], turns, preface=f"There is {scene.describe()}.\n")
        if form < 0.8:
            scene = self.scene()
            return conversation([], [("Describe the picture.", scene.describe())], preface=scene.describe() + "\n")
        number = "".join(self.random.choices("0123456789", k=self.random.randint(1, 4)))
        words = " ".join(DIGIT_NAMES[int(digit)] for digit in number)
        return conversation([], [("What number is written?", number)], preface=f"Digits: {words}.\n")

    def stream(self, weights: dict[str, float]) -> Iterator[Sample]:
        """
        Samples without end.

        Args:
            weights: share of each kind of sample: a task of a scene ("caption", "attribute", "where", "relation",
                "count"), "scene" (several questions about one whose shapes all differ), "alike" (about one where some
                may be the same), "color" (about one where most differ only in kind), "change", "motion", "digits",
                "text".
        """
        makers: dict[str, Callable[[], Sample]] = {
            "scene": lambda: self.scene_sample(
                ("attribute", "attribute", "where", "relation", "relation", "count"),
            ),
            "color": lambda: self.scene_sample(
                ("relation", "relation", "where", "attribute"), max_colors=self.random.choice((1, 2))
            ),
            "alike": lambda: self.scene_sample(("attribute", "count", "count", "count", "count")),
            "change": self.change_sample,
            "motion": self.motion_sample,
            "digits": self.digits_sample,
            "text": self.text_sample,
        }
        for task in ("caption", "attribute", "where", "relation", "count"):
            makers[task] = functools.partial(self.scene_sample, (task,))
        names, shares = list(weights), list(weights.values())
        while True:
            yield makers[self.random.choices(names, shares)[0]]()


@functools.cache
def font(side: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(side)


def conversation(
    images: list[Image.Image], turns: list[tuple[str, str]], preface: str = "", video: str | None = None
) -> Sample:
    """
    Chat messages: the images and `preface` open the first question. With `video` the images are frames, one second
    apart, written as a "whole" one or as one that is "streamed", which does not know how long it will be.
    """
    if video is not None:
        metadata = VideoMetadata(len(images), fps=1.0, duration=float(len(images)))
        metadata.frames_indices = list(range(len(images)))
        text = serialize_video(metadata)
        if video == "streamed":
            text = text[text.index("\n") + 1 :]
        pieces = text.split("<image>\n")
        opening = []
        for piece, image in zip(pieces, [*images, None], strict=True):
            opening += [{"type": "text", "text": piece}] if piece else []
            opening += [{"type": "image", "image": image}] if image is not None else []
    else:
        opening = [{"type": "image", "image": image} for image in images]
    messages = []
    for number, (question, answer) in enumerate(turns):
        text = {"type": "text", "text": preface + question if number == 0 else question}
        messages.append({"role": "user", "content": [*opening, text] if number == 0 else [text]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages}
