"""Parity with numbers recorded from the public reference implementation, in float32 on a CPU."""

import json

import pytest
import torch
from helpers import CASES, EOS, GOLDEN, golden_case
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from neo_hf import NeoImageProcessor
from neo_hf.image_processing_neo import smart_resize

PREPROCESS = GOLDEN / "preprocess"


@pytest.mark.parametrize("name", CASES)
def test_forward(golden_model, golden, name):
    inputs, expected = golden_case(golden, name)
    position_ids = golden_model.model.get_position_ids(inputs["input_ids"], inputs.get("image_grid_hw"))
    assert torch.equal(position_ids[:, 0], expected["thw_indexes"])
    with torch.no_grad():
        outputs = golden_model(**inputs)
    torch.testing.assert_close(outputs.logits[0], expected["logits"], rtol=0, atol=1e-4)
    if name != "text_only":
        torch.testing.assert_close(outputs.image_hidden_states, expected["image_embeds"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy(golden_model, golden, name, use_cache):
    inputs, expected = golden_case(golden, name)
    output = golden_model.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=EOS, pad_token_id=EOS, use_cache=use_cache
    )
    assert torch.equal(output[0, inputs["input_ids"].shape[1] :], expected["generated"])


def test_packed_training_row(golden_model):
    train = load_file(GOLDEN / "neo_tiny" / "train.safetensors")
    inputs = {key: train[key] for key in ("input_ids", "pixel_values", "image_grid_hw")}
    places = torch.arange(train["input_ids"].shape[1])
    document_ids = torch.bucketize(places, train["seq_boundaries"][1:], right=True)[None]
    position_ids = golden_model.model.get_position_ids(
        inputs["input_ids"], inputs["image_grid_hw"], document_ids=document_ids
    )
    assert torch.equal(position_ids[0, 0], train["t_indexes"])

    with torch.no_grad():
        logits = golden_model(**inputs, document_ids=document_ids).logits[0]
    torch.testing.assert_close(logits, train["logits"], rtol=0, atol=1e-4)
    token_loss = F.cross_entropy(logits[:-1], train["labels"][0, 1:], reduction="none", ignore_index=-100)
    torch.testing.assert_close(token_loss, train["token_loss"], rtol=0, atol=1e-4)


def test_smart_resize():
    for height, width, min_pixels, max_pixels, expected in json.loads((PREPROCESS / "smart_resize.json").read_text()):
        if expected is None:
            with pytest.raises(ValueError, match=f"{height}x{width}"):
                smart_resize(height, width, 32, min_pixels, max_pixels)
        else:
            assert [*smart_resize(height, width, 32, min_pixels, max_pixels)] == expected


@pytest.mark.parametrize("case", json.loads((PREPROCESS / "images.json").read_text()), ids=lambda case: case["file"])
@pytest.mark.parametrize("source", ["path", "pillow", "bytes"])
def test_pixels(case, source):
    path = PREPROCESS / "images" / case["file"]
    image = {"path": str(path), "pillow": Image.open(path), "bytes": path.read_bytes()}[source]
    inputs = NeoImageProcessor(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])(
        image, return_tensors="pt"
    )
    assert inputs["image_grid_hw"].tolist() == [case["grid_hw"]]
    recorded = load_file(PREPROCESS / "pixels.safetensors")
    pixels = inputs["pixel_values"]
    if f"{case['case']}.pixel_values" in recorded:
        assert torch.equal(pixels, recorded[f"{case['case']}.pixel_values"])
    else:
        assert torch.equal(torch.stack([pixels.mean(0), pixels.std(0)]), recorded[f"{case['case']}.pixel_mean_std"])
