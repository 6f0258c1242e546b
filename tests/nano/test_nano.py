"""NEO-nano: the drawn world it was trained on, the weights that ship, the scripts that made them."""

import itertools
import json
import subprocess
import sys

import ablate
import pytest
import torch
from evaluate import answer, blank
from helpers import ROOT
from PIL import Image
from train import TASKS, batches, evaluate, logits
from transformers import AutoModelForImageTextToText
from world import QUADRANTS, World, article, is_test

from neo_hf import load_nano
from neo_hf_cli import main as cli

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def nano():
    return load_nano()


def test_weights_are_small():
    files = (ROOT / "src" / "neo_hf" / "nano").iterdir()
    assert sum(file.stat().st_size for file in files) < 8e6


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_answers(nano, task):
    samples = list(itertools.islice(World(7, test=True).stream({task: 1}), 60))
    expected = [sample["messages"][1]["content"][0]["text"] for sample in samples]

    def accuracy(asked):
        return sum(a == e for a, e in zip(answer(*nano, asked), expected, strict=True)) / len(expected)

    majority = max(map(expected.count, expected)) / len(expected)
    assert accuracy(samples) > 0.8
    assert accuracy([blank(sample) for sample in samples]) < majority + 0.1


def test_world_is_reproducible_and_split():
    def scenes(seed, test):
        world = World(seed, test)
        return [world.scene() for _ in range(200)]

    assert scenes(3, False) == scenes(3, False) != scenes(4, False)
    assert all(is_test(repr(scene)) for scene in scenes(3, True))
    assert not any(is_test(repr(scene)) for scene in scenes(3, False))
    train, test = World(0).handwriting, World(0, test=True).handwriting
    assert not {a.tobytes() for digit in train for a in digit} & {a.tobytes() for digit in test for a in digit}


def test_scene_says_what_it_shows():
    world = World(5)
    colors = set()
    for scene in (world.scene() for _ in range(20)):
        image = scene.draw()
        background = image.getpixel((31, 31) if scene.size == (64, 64) else (0, 0))
        for quadrant, shape in scene.present:
            assert f"{article(shape)} at the {QUADRANTS[quadrant]}" in scene.describe()
            middle = image.getpixel((shape.x + 10, shape.y + 10))
            assert middle != background
            colors.add((shape.color, middle))
            assert (shape.x >= 32, shape.y >= 32) == (quadrant % 2 == 1, quadrant >= 2)
    assert len(colors) == len({color for color, _ in colors})  # one colour each, whatever the shape


def test_relation_agrees_with_the_image():
    world = World(6)
    for _ in range(50):
        scene = world.scene((3, 4), distinct=True)
        question, answer = world.relation(scene)
        words = question.removeprefix("Is the ").removesuffix("?").replace(" of", "").split()
        shapes = {str(shape): shape for _, shape in scene.present}
        first, second = shapes[" ".join(words[:2])], shapes[" ".join(words[-2:])]
        holds = {
            "left": first.x < second.x,
            "right": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }[words[2]]
        assert answer == ("yes" if holds else "no")


def test_batches(nano):
    """Rows are full, and the loss covers the answers, every token of which counts 1."""
    _, processor = nano
    records = list(itertools.islice(World(9).stream({"scene": 1, "motion": 1, "text": 1}), 40))
    packed = list(batches(records, processor, rows=2, length=256))
    assert all(batch["input_ids"].shape[1] == 256 for batch in packed)
    assert all(batch["loss_weight"].equal((batch["labels"] != -100).float()) for batch in packed)
    counted = torch.cat([batch["labels"][batch["labels"] != -100] for batch in packed])
    answers = [m["content"][0]["text"] for r in records for m in r["messages"] if m["role"] == "assistant"]
    assert sorted(processor.tokenizer.decode(counted).split("<|im_end|>\n")) == sorted(["", *answers])
    assert sum(int((batch["document_ids"] != 0).sum()) for batch in packed[:-1])


def test_accuracy_is_that_of_greedy_decoding(nano):
    """What one forward tells of the answers is what generation gives; a model that is wrong is told so."""
    model, processor = nano
    found = evaluate(lambda batch: logits(model, batch), processor, World(7, test=True), 20, ["count"])
    samples = list(itertools.islice(World(7, test=True).stream({"count": 1}), 20))
    expected = [sample["messages"][1]["content"][0]["text"] for sample in samples]
    correct = [a == e for a, e in zip(answer(model, processor, samples), expected, strict=True)]
    assert found == {"count": sum(correct) / 20}
    assert evaluate(lambda batch: -logits(model, batch), processor, World(7), 5, ["count"]) == {"count": 0}


def test_ablation_indices(nano):
    """The native variant is what the model does by itself; the others differ as they should."""
    model, processor = nano
    records = itertools.islice(World(10).stream({"change": 1, "motion": 1, "scene": 1}), 6)
    batch = next(batches(records, processor, rows=2, length=400))
    position_ids, mask = ablate.indices("native", batch, model.config)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "image_grid_hw")}
    own = model(**inputs, document_ids=batch["document_ids"]).logits
    given = model(**inputs, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
    real = batch["input_ids"] != processor.tokenizer.pad_token_id
    torch.testing.assert_close(given[real], own[real], rtol=0, atol=1e-4)
    causal = model(
        **inputs, position_ids=position_ids, attention_mask=ablate.indices("causal", batch, model.config)[1]
    )
    assert not torch.allclose(causal.logits[real], own[real], atol=1e-2)

    images = [Image.new("RGB", (96, 32)), Image.new("RGB", (32, 64))]  # 2 x 6 and 4 x 2 tokens
    inputs = processor(text="<image>\n<image>?", images=images, return_tensors="pt")
    inputs["document_ids"] = torch.zeros_like(inputs["input_ids"])
    (t, h, w), _ = ablate.indices("mrope", inputs, model.config)
    assert t[0].tolist() == [0, *[1] * 12, 7, 8, 9, *[10] * 8, 14, 15]
    assert h[0, 1:13].tolist() == [1] * 6 + [2] * 6
    assert w[0, 16:24].tolist() == [10, 11] * 4
    assert ablate.indices("1d", inputs, model.config)[0].unique_consecutive(dim=0).tolist() == [[list(range(26))]]


def test_interval():
    centre, half = ablate.interval([70.0, 72.0, 77.0])
    assert centre == 73
    assert half == pytest.approx(4.3027 * (13**0.5) / 3**0.5, rel=1e-4)


@pytest.mark.slow
def test_training_runs_and_resumes(tmp_path):
    """All stages with next to no steps; a second run finds everything done and publishes the same again."""
    command = [sys.executable, EXAMPLES / "nano" / "train.py", "--output_dir", tmp_path, "--scale", "0.0005"]
    subprocess.run(command, check=True, capture_output=True)
    folder = tmp_path / "NEO-nano"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float16
    before = {path.name: path.stat().st_mtime for path in (tmp_path / "sft").iterdir()}
    subprocess.run(command, check=True, capture_output=True)
    assert before == {path.name: path.stat().st_mtime for path in (tmp_path / "sft").iterdir()}


@pytest.mark.slow
def test_demo(tmp_path):
    process = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert process.stdout.count("A scene:") == 3
    assert "A stream" in process.stdout
    assert Image.open(tmp_path / "demo.png").width > 500


def test_command_line(tmp_path, capsys):
    scene = World(11, test=True).scene((3,))
    scene.draw().save(tmp_path / "scene.png")
    with pytest.raises(SystemExit, match="0"):
        cli(["chat", "nano", "--image", str(tmp_path / "scene.png"), "How many shapes are there?"])
    assert capsys.readouterr().out.strip() == "3"


def test_card_has_the_figures():
    card = (ROOT / "src" / "neo_hf" / "nano" / "README.md").read_text()
    results = json.loads((EXAMPLES / "nano" / "results" / "accuracy.json").read_text())
    for task in TASKS:
        assert f"| {task} | {100 * results[task]['accuracy']:.1f} |" in card
