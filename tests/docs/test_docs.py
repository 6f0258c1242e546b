"""The Python on each page runs as printed, one block after another."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from neo_hf.conversion import convert_hub_to_raw

CLIENTS = ("datasets", "trl", "peft", "torchao")


@pytest.fixture
def run(hub_folder, clips, tmp_path, monkeypatch, capsys):
    """Runs the blocks of a page where its files are; gives what they printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub_folder, "NEO-2B")  # a copy: pages may save into it
    Path("docs").symlink_to(ROOT / "docs")
    for name, size in (("photo.jpg", (200, 120)), ("other.jpg", (90, 160))):
        Image.effect_noise(size, 64).convert("RGB").save(name)
    shutil.copy(clips / "carphone_pristine.mp4", "video.mp4")

    def run(page: str, **replacements: str) -> str:
        names: dict = {}
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
        assert blocks
        for block in blocks:
            for old, new in replacements.items():
                block = block.replace(old, new)
            exec(compile(block, page, "exec"), names)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_first_answer(run, page, hub_folder):
    convert_hub_to_raw(hub_folder, "NEO-raw")
    printed = run(page, **{"Paranioar/NEO1_5-2B-SFT": "NEO-raw"})
    promised = re.findall(r"^# (a red circle .*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert promised == [printed.splitlines()[0]]


@pytest.mark.parametrize("page", ["images-and-video", "streaming", "design"])
def test_page(run, page):
    assert run(f"docs/{page}.md")


@pytest.mark.slow
def test_clients(run):
    for name in CLIENTS:
        pytest.importorskip(name)
    assert len(run("docs/clients.md")) > 100


@pytest.mark.slow
def test_cpu(run):
    pytest.importorskip("bitsandbytes")
    assert re.fullmatch(r"torch\.float32\ntorch\.Size\(\[1, \d+\]\)\n", run("docs/cpu.md"))


@pytest.mark.slow
def test_onnx(run):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert run("docs/onnx.md").endswith("a yellow star at the bottom right\n")


@pytest.mark.slow
def test_serving(run, server, hub_folder):
    # The server has a port and a folder of its own, and another name than vLLM for the processor's settings.
    replacements = {
        "http://localhost:8000": server,
        'model="NEO-2B"': f'model="{hub_folder}"',
        "mm_processor_kwargs": "chat_template_kwargs",
    }
    assert run("docs/serving.md", **replacements)


def test_every_page_is_run():
    """Pages with Python are in the tests above. Training, conversion and the web page have tests of their own."""
    pages = {page.stem for page in ROOT.glob("docs/*.md") if "```python" in page.read_text()}
    assert pages - {"training", "training-data", "conversion", "web"} == {
        "index",
        "images-and-video",
        "streaming",
        "design",
        "clients",
        "cpu",
        "serving",
        "onnx",
    }
