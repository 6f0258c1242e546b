"""What is drawn is what the model computes with: the data of the drawings, not their pixels."""

import copy
import sys

import numpy as np
import pytest
import torch
from helpers import GOLDEN, IMAGE, IMAGE_START, dense_mask_oracle, random_model, tiny_config
from matplotlib.figure import Figure
from PIL import Image

from neo_hf import NeoImageProcessor, NeoProcessor, visualize
from neo_hf.visualize import ImageUnit, TextUnit, draw
from neo_hf_cli import main

PHOTO = str(GOLDEN / "preprocess" / "images" / "00_RGB_300x200.png")
QUESTION = "Which costs $\\frac$ more?"
TEXTS = ["<image>\nA pagoda.", "Text alone", "<image>\nand <image>" + QUESTION]
PIXELS = {"min_pixels": 4096, "max_pixels": 16384}


def prompt_of(processor, photographs, text=TEXTS[-1], **kwargs):
    """Two images of unequal grids among text."""
    images = [photographs[0], photographs[1].crop((0, 0, 200, 420))][: text.count("<image>")]
    return processor(text=text, images=images or None, return_tensors="pt", **PIXELS, **kwargs)


@pytest.fixture(scope="module")
def inputs(processor, photographs):
    return prompt_of(processor, photographs)


@pytest.fixture(scope="module")
def packed(processor, photographs):
    """A row of three documents, with one image, none and two, and padding at its end."""
    parts = [prompt_of(processor, photographs, text) for text in TEXTS]
    lengths = [part["input_ids"].shape[1] for part in parts]
    return {
        "input_ids": torch.cat([part["input_ids"] for part in parts] + [torch.zeros(1, 5, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(1, sum(lengths)), torch.zeros(1, 5)], 1).long(),
        "document_ids": torch.arange(4).repeat_interleave(torch.tensor([*lengths, 5]))[None],
        "pixel_values": torch.cat([part["pixel_values"] for part in parts if "pixel_values" in part]),
        "image_grid_hw": torch.cat([part["image_grid_hw"] for part in parts if "image_grid_hw" in part]),
    }, parts


@pytest.fixture(scope="module")
def model(real_vocabulary_model):
    return real_vocabulary_model


def read(model, processor, inputs):
    return visualize.read_prompt(model.config, processor, inputs)


def test_units(model, processor, inputs, photographs):
    prompt = read(model, processor, inputs)
    first, image, between, other, last = prompt.units
    assert [type(unit) for unit in prompt.units] == [TextUnit, ImageUnit, TextUnit, ImageUnit, TextUnit]
    assert (first.text, between.text, last.text) == ("<img>", "</img>\nand <img>", "</img>" + QUESTION)
    assert [unit.start for unit in prompt.units] == [0, *(unit.stop for unit in prompt.units[:-1])]
    assert last.stop == inputs["input_ids"].shape[1]
    assert (image.grid, other.grid) == ((3, 4), (5, 2))
    for unit, photo in ((image, photographs[0]), (other, photographs[1].crop((0, 0, 200, 420)))):
        resized = photo.resize((32 * unit.grid[1], 32 * unit.grid[0]), Image.Resampling.BICUBIC)
        assert np.array_equal(unit.pixels, np.asarray(resized))


def test_cards(model, processor, inputs):
    prompt = read(model, processor, inputs)
    cards = visualize.plot_units(prompt).axes[0].child_axes
    assert [card.get_title() for card in cards] == ["1 token", "1: 3 x 4", "5 tokens", "2: 5 x 2", "8 tokens"]
    for card, unit in zip(cards, prompt.units, strict=True):
        if isinstance(unit, ImageUnit):
            assert np.array_equal(card.images[0].get_array(), unit.pixels)
        else:
            written = card.texts[0].get_text()
            assert "".join(written.replace("↵", "").split()) == "".join(unit.text.split())


def test_position_ids(model, processor, photographs, packed):
    for inputs in (prompt_of(processor, photographs, return_position_ids=True), packed[0]):
        prompt = read(model, processor, inputs)
        expected = inputs.get("position_ids")
        if expected is None:
            parts = [prompt_of(processor, photographs, text, return_position_ids=True) for text in TEXTS]
            expected = torch.cat([part["position_ids"] for part in parts], -1)
        figure = visualize.plot_position_ids(prompt)
        lines = {line.get_label(): line.get_ydata() for ax in figure.axes for line in ax.lines}
        for name, index in zip("THW", expected[:, 0], strict=True):
            assert np.array_equal(lines[name], index)


def test_mask(model, processor, packed):
    inputs, parts = packed
    stand_ins = {processor.image_token_id: IMAGE, processor.image_start_token_id: IMAGE_START}
    documents = [[stand_ins.get(token, 0) for token in part["input_ids"][0].tolist()] for part in parts]
    length = sum(map(len, documents))
    figure = visualize.plot_mask(read(model, processor, inputs))
    drawn = figure.axes[0].images[0].get_array()
    assert drawn.dtype == bool
    assert np.array_equal(drawn, dense_mask_oracle(documents, length, 0, packed=True)[0])
    # Text alone has a mask too, although the model is given none.
    figure = visualize.plot_mask(read(model, processor, {"input_ids": torch.tensor([[5, 6, 7]])}))
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.tri(3, dtype=bool))


def test_mask_of_a_long_prompt(model, processor, inputs, monkeypatch):
    """A dot stands for several tokens, and unit borders stay where they are."""
    monkeypatch.setattr(draw, "MAX_MASK_SIDE", 8)
    prompt = read(model, processor, inputs)
    length = len(prompt.input_ids)
    assert length == 36
    (image,) = visualize.plot_mask(prompt).axes[0].images
    expected = [[bool(prompt.mask[q : q + 5, k : k + 5].any()) for k in range(0, 36, 5)] for q in range(0, 36, 5)]
    assert np.array_equal(image.get_array(), expected)
    mask = np.zeros((7, 7), dtype=bool)
    mask[6, 2] = True
    assert draw.shrink_mask(mask, 3).tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    monkeypatch.setattr(draw, "MAX_MASK_SIDE", 3)
    (image,) = visualize.plot_mask(read(model, processor, {"input_ids": torch.arange(7)[None]})).axes[0].images
    assert image.get_extent() == [0, 9, 9, 0]


@pytest.mark.parametrize("layer", [None, 1])
def test_attention(model, processor, inputs, packed, layer):
    """One query behind a cache sees what it sees in a forward pass in eager mode."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for row in (inputs, packed[0]):
        prompt = read(model, processor, row)
        there = row["attention_mask"][0].bool()
        with torch.no_grad():
            outputs = eager(**row, output_attentions=True)
        layers = outputs.attentions if layer is None else outputs.attentions[layer : layer + 1]
        last = int(there.sum()) - 1
        expected = torch.stack(layers)[:, 0, :, last, there].mean((0, 1)).numpy()
        before = model.get_decoder().config._attn_implementation
        weights, token_id = visualize.answer_attention(model, prompt, layer)
        np.testing.assert_allclose(weights, expected, atol=1e-6)
        assert token_id == outputs.logits[0, last].argmax()
        assert model.get_decoder().config._attn_implementation == before != "eager"

        figure = visualize.plot_prompt(model, processor, row, layer)
        drawn = [ax for ax in figure.axes if ax.get_title().startswith("Image")]
        images = prompt.images[-2:]  # those of the last document
        assert len(drawn) == 2
        for ax, unit in zip(drawn, images, strict=True):
            assert ax.get_title().startswith(f"Image {unit.number + 1}: {expected[unit.start : unit.stop].sum():.1%}")
            on_grid = ax.images[1].get_array()
            np.testing.assert_allclose(on_grid, expected[unit.start : unit.stop].reshape(unit.grid), atol=1e-6)


def test_parts_take_axes(model, processor, inputs):
    prompt = read(model, processor, inputs)
    weights, _ = visualize.answer_attention(model, prompt)
    figure = Figure()
    axes = figure.subplots(2, 2)
    assert visualize.plot_units(prompt, axes[0, 0]) is figure
    assert visualize.plot_position_ids(prompt, axes[0, 1]) is figure
    assert visualize.plot_mask(prompt, axes[1, 0]) is figure
    assert visualize.plot_attention(prompt, weights, 1, axes[1, 1]) is figure
    figure.draw_without_rendering()


def test_video(model, processor, clips):
    """Many units: cards and attention of some of them, all in mask and indices."""
    content = [{"type": "video", "path": str(clips / "carphone_pristine.mp4")}, {"type": "text", "text": "Hm?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 12, "max_pixels": 4096},
    )
    prompt = read(model, processor, inputs)
    assert len(prompt.images) == 12
    assert "[00:00." in prompt.units[0].text
    figure = visualize.plot_prompt(model, processor, inputs)
    figure.draw_without_rendering()
    assert len(figure.axes[0].child_axes) == draw.MAX_CARDS - 1
    assert "9 more" in [text.get_text().split("\n")[-1] for text in figure.axes[0].texts]
    drawn = [ax.get_title() for ax in figure.axes if ax.get_title().startswith("Image")]
    assert len(drawn) == draw.MAX_IMAGES
    weights, _ = visualize.answer_attention(model, prompt)
    shares = sorted((weights[unit.start : unit.stop].sum() for unit in prompt.images), reverse=True)
    assert sorted((float(title.split()[-1][:-1]) for title in drawn), reverse=True) == pytest.approx(
        [100 * share for share in shares[: len(drawn)]], abs=0.06
    )


def test_small_patches(tokenizer, photographs):
    """As in NEO-nano: a token is 16 x 16 pixels."""
    config = tiny_config(151_936)
    config.vision_config.patch_size = 8
    processor = NeoProcessor(NeoImageProcessor(patch_size=8, min_pixels=256, max_pixels=4096), tokenizer)
    inputs = processor(text="<image>Hm?", images=photographs[0], return_tensors="pt")
    prompt = visualize.read_prompt(config, processor, inputs)
    (image,) = prompt.images
    assert image.pixels.shape == (16 * image.grid[0], 16 * image.grid[1], 3) == (48, 64, 3)
    visualize.plot_prompt(random_model(config), processor, inputs).draw_without_rendering()


def test_later_tokens_of_the_answer(model, processor, inputs):
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    extended = visualize.with_answer(model, inputs, 2)
    assert torch.equal(extended["input_ids"], output[:, :-1])
    _, token_id = visualize.answer_attention(model, read(model, processor, extended))
    assert token_id == output[0, -1]
    ends = copy.deepcopy(model)
    ends.generation_config.eos_token_id = int(output[0, inputs["input_ids"].shape[1]])
    with pytest.raises(ValueError, match="has only 1 tokens, expected at least 2"):
        visualize.with_answer(ends, inputs, 2)


def test_bad_input(model, processor, inputs):
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match=rf"must be \(1, tokens\), got \(2, {length}\)"):
        read(model, processor, {"input_ids": inputs["input_ids"].repeat(2, 1)})
    with pytest.raises(ValueError, match=rf"\(3, 1, {length}\) \(T, H and W\), got \(1, {length}\)"):
        read(model, processor, {**inputs, "position_ids": torch.arange(length)[None]})
    with pytest.raises(ValueError, match="2 images, but there are no pixel_values"):
        read(model, processor, {name: inputs[name] for name in ("input_ids", "image_grid_hw")})
    with pytest.raises(ValueError, match="layer must be 0 to 2, got 3"):
        visualize.plot_prompt(model, processor, inputs, layer=3)
    cut = {name: inputs[name][:, :-8] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="ends with an image"):
        visualize.plot_prompt(model, processor, {**inputs, **cut})


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    return stop.value.code


def test_command(hub_folder, tmp_path, capsys):
    out = tmp_path / "seen.png"
    argv = ["show", str(hub_folder), "--image", PHOTO, QUESTION, "-o", str(out), "--layer", "0", "--token", "2"]
    assert run(*argv) == 0, capsys.readouterr().err
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    written = out.read_bytes()
    assert run(*argv[:-3], "9") == 1
    assert "layer must be 0 to 2, got 9" in capsys.readouterr().err
    assert out.read_bytes() == written
    assert list(tmp_path.iterdir()) == [out]


def test_nothing_half_written(tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match=r"taken\.png"):
        visualize.save(Figure(), tmp_path / "taken.png")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["Hm?", "-o", "seen.xyz"], "got seen.xyz"),
        (["Hm?", "-o", "no/such/seen.png"], "there is no folder no/such"),
        (["--image", "missing.png", "Hm?", "-o", "seen.png"], "Cannot read the image missing.png"),
        (["Hm?", "-o", "seen.png"], "has no processor. It needs processor_config.json"),
    ],
)
def test_errors(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    tiny_config().save_pretrained("model")
    assert run("show", "model", *argv) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*seen*"))


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "neo_hf.visualize.draw")
    monkeypatch.delattr(visualize, "draw")
    assert visualize.read_prompt
    assert run("show", "model", "Hm?", "-o", "seen.png") == 1
    assert "pip install 'neo-hf[plot]'" in capsys.readouterr().err
