"""The README's Python runs as printed, one block after another."""

import re
import shutil

from helpers import GOLDEN, ROOT
from PIL import Image

README = ROOT / "README.md"


def test_snippets(tmp_path, monkeypatch, real_vocabulary_model, processor, tokenizer, clips, capsys):
    monkeypatch.chdir(tmp_path)
    real_vocabulary_model.save_pretrained("NEO-2B")
    processor.save_pretrained("NEO-2B")
    shutil.copytree(GOLDEN / "neo_tiny" / "raw", "NEO-raw")
    tokenizer.save_pretrained("NEO-raw")
    for name, size in (("photo.jpg", (200, 120)), ("other.jpg", (90, 160))):
        Image.effect_noise(size, 64).convert("RGB").save(name)
    shutil.copy(clips / "carphone_pristine.mp4", "video.mp4")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert len(capsys.readouterr().out) > 20


def test_every_file_is_described():
    described = set(re.findall(r"[\w/]*?(\w+\.py)", README.read_text()))
    assert {path.name for path in README.parent.glob("src/neo_hf/*.py")} - {"__init__.py", "_version.py"} <= described
