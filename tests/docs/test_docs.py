"""The Python in docs/clients.md runs as printed, one block after another."""

import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

CLIENTS = ROOT / "docs" / "clients.md"


@pytest.mark.slow
def test_clients(hub_folder, server, clips, tmp_path, monkeypatch, capsys):
    for name in ("datasets", "trl", "peft", "torchao"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    Path("NEO-2B").symlink_to(hub_folder)
    Image.effect_noise((200, 120), 64).convert("RGB").save("photo.jpg")
    shutil.copy(clips / "carphone_pristine.mp4", "video.mp4")
    blocks = re.findall(r"```python\n(.*?)```", CLIENTS.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    names: dict = {"FOLDER": str(hub_folder)}
    for block in blocks:
        # The server has a port and a folder of its own.
        block = block.replace("http://localhost:8000", server).replace('model="NEO-2B", m', "model=FOLDER, m")
        exec(compile(block, str(CLIENTS), "exec"), names)
    assert len(capsys.readouterr().out) > 100
