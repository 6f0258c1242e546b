"""The self-test notices what breaks generation, and an untested transformers is never trusted in silence."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers import GOLDEN, ROOT
from huggingface_hub import constants
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

import neo_hf
from neo_hf import NeoForConditionalGeneration, cache_neo, doctor, generation_neo, modeling_neo, self_test_neo
from neo_hf.generation_neo import NeoGenerationMixin
from neo_hf.self_test_neo import RECORDED_TOKENS, build_model, prompt_inputs, self_test
from neo_hf_cli import main

DESIGN = ROOT / "docs" / "design.md"


@pytest.mark.parametrize("implementation", ["neo", "sdpa", "eager"])
def test_passes(implementation):
    assert self_test(NeoForConditionalGeneration, attn_implementation=implementation) == {}


@pytest.mark.gpu
def test_passes_on_cuda():
    assert self_test(NeoForConditionalGeneration, "cuda") == {}


@torch.no_grad()
@pytest.mark.parametrize("row", range(len(RECORDED_TOKENS)))
def test_recorded_tokens_are_those_of_whole_forwards(row):
    """No cache, no generate(): each token by a forward pass over everything before it, with eager attention."""
    model = build_model(NeoForConditionalGeneration, attn_implementation="eager")
    inputs = prompt_inputs(range(row, row + 1))
    del inputs["attention_mask"]
    for token in RECORDED_TOKENS[row]:
        position_ids = model.model.get_position_ids(inputs["input_ids"], inputs.get("image_grid_hw"))
        logits = model(**inputs, position_ids=position_ids, use_cache=False).logits[0, -1]
        assert int(logits.argmax()) == token
        best, second = logits.topk(2).values
        assert best - second > 10 * self_test_neo.TOLERANCE  # what rounding cannot overturn
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)


def forget_rows_and_columns(function):
    def without(*args, **kwargs):
        position_ids = function(*args, **kwargs)
        position_ids[-2:] = 0
        return position_ids

    return without


def change_mask(change):
    def plan(config, inputs_embeds, attention_mask, position_ids, *args):
        return original(config, inputs_embeds, *change(attention_mask, position_ids), *args)

    original = modeling_neo.plan_attention
    return plan


def causal(attention_mask, position_ids):
    return attention_mask, torch.arange(position_ids.shape[-1]).expand_as(position_ids)


def forget_cached(self, keys, values, *args, **kwargs):
    cache_neo.DynamicLayer.update(self, keys, values)
    return keys, values


BROKEN = {
    "indices": (NeoGenerationMixin, "_prepare_position_ids_for_generation", "generate()"),
    "indices of steps": (NeoGenerationMixin, "prepare_inputs_for_generation", "generate()"),
    "images in the cache": (NeoGenerationMixin, "_prefill", "a second turn on a cache"),
}


@pytest.mark.parametrize(("owner", "name", "part"), BROKEN.values(), ids=BROKEN)
def test_broken_overrides_are_noticed(monkeypatch, owner, name, part):
    monkeypatch.setattr(owner, name, getattr(GenerationMixin, name))
    assert part in self_test(NeoForConditionalGeneration)


MUTATIONS = {
    "causal images": (modeling_neo, "plan_attention", lambda: change_mask(causal), "a prompt with images"),
    "padding attended": (
        modeling_neo,
        "plan_attention",
        lambda: change_mask(lambda attention_mask, position_ids: (None, position_ids)),
        "a batch with padding",
    ),
    "no rows and columns": (
        modeling_neo,
        "allocate_position_ids",
        lambda: forget_rows_and_columns(modeling_neo.allocate_position_ids),
        "a prompt with images",
    ),
    "no rows and columns in generate()": (
        generation_neo,
        "spatial_index",
        lambda: forget_rows_and_columns(generation_neo.spatial_index),
        "generate()",
    ),
    "cache ignored": (cache_neo.GrowingLayer, "update", lambda: forget_cached, "decoding step by step"),
    "beams not reordered": (
        cache_neo.NeoCache,
        "reorder_cache",
        lambda: lambda self, beams: None,
        "generate() with beams",
    ),
    "mask of a static cache": (
        NeoGenerationMixin,
        "create_masks_for_generate",
        lambda: staticmethod(create_masks_for_generate),
        "generate() with a static cache",
    ),
}


@pytest.mark.parametrize(("owner", "name", "replacement", "part"), MUTATIONS.values(), ids=MUTATIONS)
def test_wrong_computations_are_noticed(monkeypatch, owner, name, replacement, part):
    monkeypatch.setattr(owner, name, replacement())
    assert part in self_test(NeoForConditionalGeneration)


@pytest.fixture
def untested(monkeypatch, tmp_path):
    """A transformers newer than those tested, with an empty cache folder. Returns the folder and the warnings."""
    warnings = []
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(self_test_neo.logger, "warning", warnings.append)
    self_test_neo.check_transformers.cache_clear()
    yield tmp_path / "home" / "neo-hf", warnings
    self_test_neo.check_transformers.cache_clear()


def load():
    return NeoForConditionalGeneration.from_pretrained(
        GOLDEN / "neo_tiny" / "raw", image_token_id=501, image_start_token_id=502, image_end_token_id=503
    )


def count_self_tests(monkeypatch):
    runs = []
    monkeypatch.setattr(self_test_neo, "self_test", lambda model_class: runs.append(1) or self_test(model_class))
    return runs


def test_untested_version_is_tried_once(untested, monkeypatch):
    folder, warnings = untested
    runs = count_self_tests(monkeypatch)
    load()
    load()
    assert len(runs) == 1
    assert len(warnings) == 1
    assert "5.99.0" in warnings[0]
    assert "neo-hf doctor" in warnings[0]
    (marker,) = folder.iterdir()
    assert "transformers-5.99.0" in marker.name
    self_test_neo.check_transformers.cache_clear()  # another process
    load()
    assert len(runs) == 1
    assert len(warnings) == 2
    monkeypatch.setattr(torch, "__version__", "9.0.0")
    self_test_neo.check_transformers.cache_clear()
    load()
    assert len(runs) == 2


def test_untested_version_that_fails_is_refused(untested, monkeypatch):
    folder, _ = untested
    monkeypatch.setattr(
        NeoGenerationMixin, "prepare_inputs_for_generation", GenerationMixin.prepare_inputs_for_generation
    )
    for _ in range(2):
        with pytest.raises(ImportError, match=r"(?s)5\.99\.0.*pip install.*generate\(\): generated"):
            load()
    assert not folder.exists()


def test_tested_version_is_not_tried(untested, monkeypatch):
    folder, warnings = untested
    monkeypatch.setattr(transformers, "__version__", "{}.{}.7".format(*self_test_neo.NEWEST_TESTED))
    runs = count_self_tests(monkeypatch)
    load()
    assert not runs
    assert not warnings
    assert not folder.exists()


def test_cache_folder_that_cannot_be_written(untested):
    folder, warnings = untested
    folder.parent.write_text("a file where the folder should be")
    load()
    assert len(warnings) == 1


def test_random_numbers_are_left_alone(untested):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    self_test_neo.check_transformers(NeoForConditionalGeneration)
    assert torch.equal(torch.rand(3), expected)


def run_doctor():
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    return stop.value.code


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "peft" else "1.0")
    assert run_doctor() == 0
    output = capsys.readouterr().out
    assert re.search(r"cpu +neo +passed", output)
    assert re.search(r"peft +not installed +needed for adapters", output)
    assert re.search(r"transformers +1\.0 +older than what was tested", output)


def test_doctor_fails_where_the_self_test_fails(capsys, monkeypatch):
    monkeypatch.setattr(
        NeoGenerationMixin, "prepare_inputs_for_generation", GenerationMixin.prepare_inputs_for_generation
    )
    assert run_doctor() == 1
    output = capsys.readouterr().out
    assert re.search(r"cpu +neo +FAILED", output)
    assert "generate(): generated" in output
    assert "pip install" in output


@pytest.mark.parametrize(
    ("version", "note"),
    [("5.18.9", "older than"), ("5.19.0", "tested ("), ("5.24.1", "tested ("), ("5.25.0.dev0", "newer than")],
)
def test_range(version, note):
    assert doctor.range_note("transformers", version).startswith(note)


def overrides():
    """`Class.method` of all methods of ours that override one of transformers, dunders left out."""
    folder = Path(neo_hf.__file__).parent
    found = set()
    for file in [*folder.glob("*.py"), *(folder / "training").glob("*.py")]:
        if file.stem.startswith("__"):
            continue
        module = importlib.import_module(".".join(file.relative_to(folder.parent).with_suffix("").parts))
        classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
        for owner in classes:
            bases = [base for base in owner.__mro__[1:] if base.__module__.startswith("transformers.")]
            for name, value in vars(owner).items():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                own = getattr(function, "__qualname__", "") == f"{owner.__qualname__}.{name}"
                if own and not name.startswith("__") and any(name in vars(base) for base in bases):
                    found.add(f"{owner.__name__}.{name}")
    return found - {f"{c}.validate" for c in ("NeoTextConfig", "NeoVisionConfig", "NeoConfig")}  # made by @strict


def test_the_table_of_overrides_is_complete():
    whole = DESIGN.read_text().partition("## Hooks into Transformers")[2].partition("\n## ")[0]
    section, _, _ = whole.partition("Hooks other than overridden methods")
    rows = re.findall(r"^\| `(\w+\.\w+)` \|.*\| `([\w/]+\.py)::(test_\w+)` \|$", section, re.MULTILINE)
    assert {override for override, _, _ in rows} == overrides()
    for file, test in re.findall(r"`([\w/]+\.py)::(test_\w+)` \|$", whole, re.MULTILINE):
        assert f"def {test}(" in (ROOT / "tests" / file).read_text()
