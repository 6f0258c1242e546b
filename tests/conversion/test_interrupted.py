"""A conversion that is interrupted, or has company, loses nothing. `interrupted.py` is the long form of this."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN, ROOT

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.conversion import convert_raw_to_hub, target
from neo_hf.conversion.target import new_folder

RAW = GOLDEN / "neo_tiny" / "raw"


@pytest.mark.slow
def test_kills_and_full_disks():
    script = Path(__file__).parent / "interrupted.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, script, "--kills", "20", "--sizes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    assert "full: 4 times the old folder" in done.stdout
    assert "times the new folder" in done.stdout


def fill(path, content, force=True):
    with new_folder(path, force) as folder:
        (folder / "config.json").write_text(content)


@pytest.mark.parametrize("exchange", ["system", "none"])
def test_replacement(tmp_path, monkeypatch, exchange):
    """In one step where the system can, else by two renames; a failure in between gives the old folder back."""
    if exchange == "none":
        monkeypatch.setattr(target, "_exchange", lambda first, second: False)
    out = tmp_path / "parent" / "out"
    fill(out, "old")
    fill(out, "new")
    assert (out / "config.json").read_text() == "new"
    rename = Path.rename

    def fail(path, other):
        if path.name.endswith("unfinished"):
            raise KeyboardInterrupt
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", fail)
    if exchange == "none":
        with pytest.raises(KeyboardInterrupt):
            fill(out, "newer")
        assert (out / "config.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders here")
def test_exchange(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert target._exchange(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert not target._exchange(tmp_path / "a", tmp_path / "c")


def test_recovery_of_what_a_kill_between_two_renames_left(tmp_path):
    fill(tmp_path / "out", "old")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.unfinished").mkdir()
    with pytest.raises(ValueError, match="out exists; force=True"):
        fill(tmp_path / "out", "new", force=False)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name != ".out.unfinished"] == ["out"]


def test_two_conversions_into_one_folder(tmp_path):
    script = f"""
import sys
from neo_hf.conversion.target import new_folder
with new_folder({str(tmp_path / "out")!r}) as folder:
    print("started", flush=True)
    sys.stdin.read()
    (folder / "config.json").write_text("first")
"""
    first = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "started\n"
    for force in (False, True):
        with pytest.raises(ValueError, match=r"Another process is writing .*/out: it holds .*/\.out\.lock"):
            convert_raw_to_hub(RAW, tmp_path / "out", force=force)
    first.communicate()
    assert first.returncode == 0
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    second = subprocess.Popen(
        [sys.executable, "-c", script.replace("/out'", "/other'")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert second.stdout.readline() == "started\n"
    second.kill()
    second.communicate()
    fill(tmp_path / "other", "after a kill")  # the lock went with the process
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_unfinished_folder_is_no_model(tmp_path, monkeypatch):
    """config.json comes last; until then, another in its place keeps loaders from assuming the default one."""
    seen = []
    write_config = target.write_config

    def look(folder, config):
        seen.append(sorted(path.name for path in folder.iterdir()))
        for load in (NeoConfig.from_pretrained, NeoForConditionalGeneration.from_pretrained):
            with pytest.raises(OSError, match=r"config\.json.* is not a valid JSON"):
                load(folder)
        write_config(folder, config)

    monkeypatch.setattr("neo_hf.conversion.raw_to_hub.write_config", look)
    convert_raw_to_hub(RAW, tmp_path / "hub", verify=True)
    assert {*seen[0]} == {path.name for path in (tmp_path / "hub").iterdir()}
    assert NeoConfig.from_pretrained(tmp_path / "hub").text_config.hidden_size == 64
