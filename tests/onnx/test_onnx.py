"""Exported graphs on ONNX Runtime give the logits and the answers of the model."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    EOS,
    IMAGE_START,
    batch,
    golden_case,
    load_golden_model,
    one,
    random_model,
    random_prompt,
    tiny_config,
)
from PIL import Image

from neo_hf import load_nano
from neo_hf.loading import EXAMPLE_IMAGE, NANO

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnx_ir

from neo_hf.onnx import DTYPES, OnnxCache, OnnxNeo, export, export_graphs, export_onnx
from neo_hf_cli import main

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
# The largest error of a logit of NEO-nano. Its logits reach 20.
ERRORS = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.5, "q4": 5, "q4f16": 5}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """The recorded model, in torch and in ONNX."""
    return exported(load_golden_model(), tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return exported(random_model(tiny_config()), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request):
    return request.getfixturevalue(request.param)


def exported(model, folder):
    export_graphs(model, folder)
    return model, OnnxNeo(model.config, folder / "onnx" / "model.onnx")


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "nano"
    export_onnx(NANO, folder, dtypes=DTYPES)
    return folder


@pytest.fixture(scope="module")
def nano(nano_folder):
    return *load_nano(), OnnxNeo.from_pretrained(nano_folder)


def close(logits, expected, tolerance=TOLERANCE):
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=tolerance, rtol=0)


def prompts(seed=1):
    """A batch without symmetry: text, two images, an image at the end."""
    generator = torch.Generator().manual_seed(seed)
    return [random_prompt(generator, images, text) for images, text in (([], 5), ([(2, 3), (1, 2)], 3), ([(3, 1)], 2))]


@pytest.mark.parametrize("name", CASES)
def test_recorded_numbers(untied, golden, name):
    _, neo = untied
    inputs, case = golden_case(golden, name)
    logits, _ = neo.forward(**inputs)
    close(logits[0], case["logits"])
    output = neo.generate(**inputs, max_new_tokens=12, eos_token_id=EOS)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert new.tolist() == case["generated"].tolist()[: len(new)]
    assert len(new) == 12 or new[-1] == EOS


def test_logits_of_a_padded_batch(pair):
    model, neo = pair
    for side in ("left", "right"):
        inputs = batch(prompts(), side)
        logits, _ = neo.forward(**inputs)
        attended = inputs["attention_mask"] != 0
        close(logits[attended.numpy()], model(**inputs).logits[attended])


def test_logits_to_keep(pair):
    _, neo = pair
    inputs = one(prompts()[1])
    logits, _ = neo.forward(**inputs)
    kept, _ = neo.forward(**inputs, logits_to_keep=[-1, 0])
    np.testing.assert_allclose(kept, logits[:, [-1, 0]], atol=1e-5)


def test_greedy_tokens_of_a_padded_batch(pair):
    model, neo = pair
    inputs = batch(prompts())
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert neo.generate(**inputs, max_new_tokens=8, eos_token_id=-1).tolist() == expected.tolist()


def test_rows_end_on_their_own(pair):
    """The second token of one row ends it; it is padded while the others go on."""
    model, neo = pair
    inputs = batch(prompts())
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    eos = int(free[1, inputs["input_ids"].shape[1] + 1])
    settings = {"max_new_tokens": 6, "eos_token_id": [eos, 511]}
    expected = model.generate(**inputs, **settings, do_sample=False, pad_token_id=eos)
    assert neo.generate(**inputs, **settings).tolist() == expected.tolist()


@pytest.mark.parametrize("cut", [1, 3, 13])
def test_continues_a_cache(pair, cut):
    """In text, before `<img>` and after the first image."""
    model, neo = pair
    ids, pixels, grids = prompts()[1]
    assert ids[3] == IMAGE_START
    count = int(cut > 9)  # images in the first piece
    seen = int(grids[:count].prod(-1).sum())
    first = {"pixel_values": pixels[:seen], "image_grid_hw": grids[:count]}
    second = {"pixel_values": pixels[seen:], "image_grid_hw": grids[count:]}
    cache = OnnxCache()
    head, _ = neo.forward(ids[None, :cut], **first, cache=cache)
    tail, _ = neo.forward(ids[None, cut:], **second, cache=cache)
    close(np.concatenate([head, tail], 1), model(**one((ids, pixels, grids))).logits)
    assert cache.length == len(ids)


def test_continues_after_the_image_token(pair):
    model, neo = pair
    ids, pixels, grids = prompts()[1]
    cache = OnnxCache()
    neo.forward(ids[None, :4], cache=cache)
    tail, _ = neo.forward(ids[None, 4:], pixel_values=pixels, image_grid_hw=grids, cache=cache)
    close(tail, model(**one((ids, pixels, grids))).logits[:, 4:])


def test_second_turn_of_a_padded_batch(pair):
    """A conversation of two turns: the second is processed on the cache of the first, with an image of its own."""
    model, neo = pair
    inputs = batch(prompts())
    cache = OnnxCache()
    answer = neo.generate(**inputs, max_new_tokens=4, eos_token_id=-1, cache=cache)
    generator = torch.Generator().manual_seed(2)
    turns = [random_prompt(generator, [grid], 2) for grid in ((1, 2), (2, 1), (1, 2))]
    new = batch(turns)
    ids = np.concatenate([answer, new["input_ids"]], 1)
    mask = np.pad(
        inputs["attention_mask"], ((0, 0), (0, ids.shape[1] - inputs["input_ids"].shape[1])), constant_values=1
    )
    images = {name: new[name] for name in ("pixel_values", "image_grid_hw")}
    continued = neo.generate(ids, mask, **images, max_new_tokens=5, eos_token_id=-1, cache=cache)

    def per_row(values, counts):
        return values.split(counts.tolist())

    whole = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    rows = [
        (pixels, grids)
        for old, turn in zip(prompts(), turns, strict=True)
        for pixels, grids in ((old[1], old[2]), (turn[1], turn[2]))
    ]
    whole |= {"pixel_values": torch.cat([x for x, _ in rows]), "image_grid_hw": torch.cat([x for _, x in rows])}
    expected = model.generate(**whole, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert continued.tolist() == expected.tolist()


def question(processor, text, images=(), video=None):
    content = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video}] if video is not None else []
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def scene():
    return Image.open(EXAMPLE_IMAGE).convert("RGB")


def nano_inputs(processor):
    wide = scene().resize((96, 64))
    clip = [np.roll(np.asarray(scene()), 8 * step, axis=1) for step in range(4)]
    return {
        "text": question(processor, "A red circle at the top left. What is at the top left?"),
        "image": question(processor, "Describe the picture.", [scene()]),
        "images": question(processor, "What changed?", [wide, scene()]),
        "video": question(processor, "Which way does the red circle move?", video=np.stack(clip)),
    }


@pytest.mark.parametrize("kind", ["text", "image", "images", "video"])
def test_nano(nano, kind):
    model, processor, neo = nano
    inputs = nano_inputs(processor)[kind]
    close(neo.forward(**inputs)[0], model(**inputs).logits)
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assert neo.generate(**inputs, max_new_tokens=40).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_precisions(nano, nano_folder, dtype):
    model, processor, _ = nano
    neo = OnnxNeo.from_pretrained(nano_folder, dtype)
    inputs = nano_inputs(processor)["image"]
    logits, cache = neo.forward(**inputs)
    close(logits, model(**inputs).logits, ERRORS[dtype])
    assert logits.dtype == np.float32
    assert {x.dtype for x in cache.entries.values()} == {np.dtype("float16" if "16" in dtype else "float32")}
    output = neo.generate(**inputs, max_new_tokens=40)
    expected = (
        "a red circle at the top left, a blue square at the top right, a yellow star at the bottom left<|im_end|>"
    )
    assert processor.decode(output[0, inputs["input_ids"].shape[1] :]) == expected


def test_quantized_weights_are_those_of_the_decoder_and_the_head(nano_folder):
    for dtype, bits in (("int8", 8), ("q4", 4)):
        graph = onnx_ir.load(nano_folder / "onnx" / f"model_{dtype}.onnx").graph
        quantized = [node for node in graph if node.op_type == "MatMulNBits"]
        assert len(quantized) == 6 * 9 + 1  # of each layer, and the head
        assert {node.attributes["bits"].as_int() for node in quantized} == {bits}


def test_layout(nano, nano_folder):
    files = {str(file.relative_to(nano_folder)) for file in nano_folder.rglob("*") if file.suffix != ".py"}
    names = ["model.onnx", "model_fp16.onnx", "model_int8.onnx", "model_q4.onnx", "model_q4f16.onnx"]
    assert files >= {"config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "onnx"}
    assert files >= {f"onnx/{name}" for name in names}
    _, _, neo = nano
    shapes = {value.name: value.shape for value in (*neo.session.get_inputs(), *neo.session.get_outputs())}
    assert shapes["position_ids"] == [3, "batch_size", "sequence_length"]
    assert shapes["pixel_values"] == ["num_patches", 192]
    assert shapes["past_key_values.5.key"] == ["batch_size", 1, "past_sequence_length", 64]
    assert shapes["present.5.value"] == ["batch_size", 1, "total_sequence_length", 32]
    assert shapes["logits"] == ["batch_size", "num_logits", 510]


def test_large_weights_lie_beside_the_graph(nano_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_EMBEDDED_BYTES", 1000)
    export.save(onnx_ir.load(nano_folder / "onnx" / "model.onnx"), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 1_000_000 < (tmp_path / "model.onnx_data").stat().st_size
    model, processor = load_nano()
    inputs = nano_inputs(processor)["image"]
    close(OnnxNeo(model.config, tmp_path / "model.onnx").forward(**inputs)[0], model(**inputs).logits)


def test_streams_what_generate_returns(nano):
    _, processor, neo = nano

    class Recorder(list):
        def put(self, ids):
            self.extend(ids.flatten().tolist())

        def end(self):
            self.append(None)

    streamer = Recorder()
    output = neo.generate(**nano_inputs(processor)["image"], max_new_tokens=40, streamer=streamer)
    assert streamer == [*output[0].tolist(), None]


def test_errors(untied, tmp_path):
    _, neo = untied
    inputs = batch(prompts())
    refused = [
        ({"attention_mask": inputs["attention_mask"][:, 1:]}, r"must cover 0 cached and 21 new tokens of 3 rows"),
        ({"pixel_values": inputs["pixel_values"][1:]}, r"do not match: patches \(43, 768\)"),
        ({"image_grid_hw": None, "pixel_values": None}, "Image tokens and images do not match"),
        ({"input_ids": inputs["input_ids"] + 500}, "input_ids must lie between 0 and 511"),
    ]
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            neo.forward(**inputs | change)
    with pytest.raises(ValueError, match="Pad prompts on the left: row 0"):
        neo.generate(**batch(prompts(), "right"))
    cache = OnnxCache()
    neo.forward(**inputs, cache=cache)
    with pytest.raises(ValueError, match="holds 21 of 21 tokens"):
        neo.generate(inputs["input_ids"], cache=cache)


def test_errors_of_export(nano_folder, tmp_path):
    with pytest.raises(ValueError, match="got 'int3'"):
        export_onnx(NANO, tmp_path / "x", dtypes=["fp32", "int3"])
    with pytest.raises(ValueError, match="got none"):
        export_onnx(NANO, tmp_path / "x", dtypes=[])
    with pytest.raises(ValueError, match="exists"):
        export_onnx(NANO, nano_folder)
    with pytest.raises(ValueError, match="neither a folder"):
        export_onnx(tmp_path / "missing", tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"has no onnx/model.onnx, only no graph at all"):
        OnnxNeo.from_pretrained(NANO)


def test_the_command_reports_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["onnx", "nano", str(tmp_path / "x"), "--dtype", "int3"])
    assert stop.value.code == 1
    assert "neo-hf: error: dtype must be one of fp32, fp16, int8, q4, q4f16, got 'int3'." in capsys.readouterr().err


def test_a_missing_package_is_named():
    script = "import sys; sys.modules['onnxruntime'] = None; import neo_hf.onnx"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "neo_hf.onnx needs onnxruntime: install the extra onnx." in result.stderr
