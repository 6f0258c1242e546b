"""Model cards: up to date, well-formed, and their examples run."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, random_model, tiny_config
from huggingface_hub import ModelCard

from neo_hf import __version__
from neo_hf.publishing.model_card import (
    Provenance,
    TrainingRun,
    count_parameters,
    load_release,
    released_config,
    render_model_card,
)

FOLDER = ROOT / "model_cards"
CHECKPOINTS = list(load_release()["checkpoints"])


def card_file(checkpoint):
    return FOLDER / f"{Path(checkpoint).name}.md"


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_cards_are_up_to_date():
    expected = runpy.run_path(str(FOLDER / "generate.py"))["render_released_cards"]()
    assert len(expected) == 8
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")} == expected


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_metadata(checkpoint):
    card = ModelCard.load(card_file(checkpoint))
    facts = load_release()["checkpoints"][checkpoint]
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert [set(example) for example in data["widget"]] == [{"example_title", "src", "text"}] * 2
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == {"2B": "Qwen/Qwen3-1.7B-Base", "9B": "Qwen/Qwen3-8B-Base"}[facts["size"]]
    assert "neo" in data["tags"]
    assert ("video-text-to-text" in data["tags"]) == ("NEO1_5" in checkpoint)
    datasets = data.get("datasets", [])
    assert ("kakaobrain/coyo-700m" in datasets) == ("NEO1_0" in checkpoint)
    assert ("teknium/OpenHermes-2.5" in datasets) == ("NEO1_0" in checkpoint and facts["stage"] == "SFT")
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) for dataset in datasets)
    assert ("model-index" in data) == (facts["stage"] == "SFT")
    # Undefined names of the template render as nothing, None as a word.
    assert not re.search(r"\bNone\b|undefined|\{\{|\{%|\n\n\n", card.text)


@pytest.mark.parametrize("checkpoint", [name for name in CHECKPOINTS if name.endswith("SFT")])
def test_every_figure_stands_in_body_and_metadata_with_its_source(checkpoint):
    card = ModelCard.load(card_file(checkpoint))
    sources = load_release()["sources"]
    figures = [
        (benchmark, score, sources[group["source"]])
        for group in load_release()["checkpoints"][checkpoint]["results"]
        for benchmark, score in group["scores"].items()
    ]
    assert len(figures) == (13 if "NEO1_0" in checkpoint else 30)
    rows = re.findall(r"^\| .*?\| (\S+) \| (\d+\.\d) \| \[(.*)\]\((.*)\) \|$", card.text, flags=re.MULTILINE)
    assert rows == [(name, str(score), source["name"], source["url"]) for name, score, source in figures]
    assert card.data.model_name == card_file(checkpoint).stem
    # The parsed results are grouped by source and benchmark.
    assert sorted(
        (result.dataset_name, result.metric_value, result.source_name, result.source_url)
        for result in card.data.eval_results
    ) == sorted((name, score, source["name"], source["url"]) for name, score, source in figures)
    assert "They were not re-measured here" in card.text


@pytest.mark.parametrize(("size", "depth", "pre_buffer"), [("2B", 40, 12), ("9B", 42, 6)])
def test_architecture(size, depth, pre_buffer):
    config = released_config(f"Paranioar/NEO1_0-{size}-SFT")
    text = card_file(f"Paranioar/NEO1_0-{size}-SFT").read_text(encoding="utf-8")
    assert f"| Layers | {depth}: {pre_buffer} pre-Buffer, {depth - pre_buffer} post-LLM |" in text
    # By hand: attention with its norms, feed-forward network, two norms; patch embedding; embedding, head, last norm.
    d, e, f = 128, config.text_config.hidden_size, config.text_config.intermediate_size
    heads, kv_heads = config.text_config.num_attention_heads, 8
    block = e * d * (2 * heads + 2 * kv_heads) + e * d * (heads + kv_heads) + 4 * d + 3 * e * f + 2 * e
    patches = 3 * 16 * 16 * 1024 + 1024 + 4 * 1024 * e + e
    total = depth * block + patches + (1 if size == "2B" else 2) * 151_936 * e + e
    assert f"| Parameters | {total:,} (" in text
    assert f"| of these in the pre-Buffer | {pre_buffer * block:,} (" in text
    assert f"| of these in the post-LLM's layers | {(depth - pre_buffer) * block:,} (" in text
    assert f"| of these in the patch embedding | {patches:,} |" in text


@pytest.mark.parametrize("depth", [2, None])
@pytest.mark.parametrize("tie", [True, False])
def test_parameters_are_those_of_a_real_model(tie, depth):
    config = tiny_config(tie_word_embeddings=tie, text_config={"num_pre_buffer_layers": depth})
    model = random_model(config)
    assert count_parameters(config)["total"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_snippets_compile(checkpoint):
    code = snippets(card_file(checkpoint).read_text(encoding="utf-8"))
    assert len(code) == (5 if "NEO1_5" in checkpoint else 4)
    for snippet in code:
        ast.parse(snippet)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["Paranioar/NEO1_0-2B-SFT", "Paranioar/NEO1_5-2B-SFT"])
def test_snippets_run(checkpoint, hub_folder, photographs, clips, tmp_path):
    """One after another in a fresh process without this package, with a tiny model and fewer tokens and pixels."""
    for name, photograph in zip(("photograph.jpg", "chart.png"), photographs, strict=True):
        photograph.save(tmp_path / name)
    shutil.copy(clips / "carphone_pristine.mp4", tmp_path / "clip.mp4")
    text = card_file(checkpoint).read_text(encoding="utf-8")
    code = "\n".join(snippets(text))
    code = code.replace(f'"{checkpoint}"', repr(str(hub_folder)))
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=3, min_new_tokens=3", code)
    code = re.sub(r'"(min|max)_pixels": \d+', r'"\1_pixels": 65536', code)
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.modules['neo_hf'] = None\n{code}\nprint(loss.item() > 0)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "True"


def test_card_of_an_unknown_checkpoint():
    config = tiny_config(text_config={"num_pre_buffer_layers": None})
    digest = "0123456789abcdef" * 4
    provenance = Provenance("runs/checkpoint-100", {"model.safetensors": digest, "config.json": digest[::-1]})
    card = render_model_card(config, "someone/my-neo", provenance=provenance)
    assert ModelCard(str(card)).data.to_dict() == {
        "license": "unknown",
        "widget": load_release()["widget"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["neo", "multimodal", "vision-language", "encoder-free"],
    }
    assert card.text.startswith("\n# my-neo\n")
    assert "where the pre-Buffer ends is not known" in card.text
    assert f"Converted from `runs/checkpoint-100` by neo-hf {__version__}." in card.text
    assert f"| `config.json` | `{digest[::-1]}` |\n| `model.safetensors` | `{digest}` |" in card.text
    assert "Paranioar" not in card.text
    assert "its training data, licence and intended use are for its authors to add" in card.text
    licensed = render_model_card(config, "someone/my-neo", license="mit")
    assert licensed.data.license == "mit"
    assert "its training data and intended use are for its authors to add" in licensed.text
    for snippet in snippets(card.text):
        ast.parse(snippet)
    assert not re.search(r"\bNone\b|\n\n\n", card.text)


def test_card_of_a_converted_release():
    checkpoint = "Paranioar/NEO1_0-2B-SFT"
    provenance = Provenance(checkpoint, {"model.safetensors": "0" * 64})
    card = render_model_card(released_config(checkpoint), "out/neo", released=checkpoint, provenance=provenance)
    published = ModelCard.load(card_file(checkpoint))
    assert [result.metric_value for result in card.data.eval_results] == [
        result.metric_value for result in published.data.eval_results
    ]
    assert card.data.model_name == "neo"
    assert 'model_id = "out/neo"' in card.text
    assert "neo-hf convert" not in card.text, "it is converted"
    assert "## Provenance" in card.text
    assert "## Provenance" not in published.text


def test_card_of_a_training_run():
    run = TrainingRun(
        base_model="someone/base-neo",
        data=["someone/chats", "/home/me/pets.jsonl"],
        recipe={"steps": 300, "weight decay": "0.01"},
        history=[{"step": 100, "training loss": "1.5000"}, {"step": 300, "training loss": "0.7000"}],
        scores={"exact_match": 0.75},
        versions={"torch": "2.13.0"},
    )
    card = render_model_card(tiny_config(), "me/pets", license="mit", training=run)
    data = ModelCard(str(card)).data.to_dict()
    assert data["base_model"] == "someone/base-neo"
    assert data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["someone/chats"]
    assert "generated_from_trainer" in data["tags"]
    (index,) = data["model-index"]
    assert index["name"] == "pets"
    assert index["results"][0]["metrics"] == [{"type": "exact_match", "value": 0.75}]
    assert "its intended use is for its authors to add" in card.text
    assert "from `someone/base-neo` on `someone/chats`, `pets.jsonl`.\n" in card.text
    assert "| steps | 300 |\n| weight decay | 0.01 |\n" in card.text
    assert "| 100 | 1.5000 |\n| 300 | 0.7000 |\n\nVersions: torch 2.13.0.\n" in card.text
    assert not re.search(r"\bNone\b|\n\n\n", card.text)


def test_card_says_what_it_needs():
    """The oldest transformers, as pyproject.toml has it, and accelerate."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    (oldest,) = (re.search(r"transformers>=([\d.]+)", line) for line in project["dependencies"] if "transf" in line)
    text = render_model_card(tiny_config(), "someone/my-neo").text
    assert f"needs transformers {oldest[1]} or newer" in text
    assert '`device_map="auto"`' in text
    assert "pip install accelerate" in text


def test_unknown_release_is_refused():
    with pytest.raises(ValueError, match="'NEO1_0-2B-SFT' is not a released checkpoint"):
        render_model_card(tiny_config(), "neo", released="NEO1_0-2B-SFT")
