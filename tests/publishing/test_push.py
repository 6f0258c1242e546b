"""A converted repository is checked and pushed; there is no Hub here, so pushing ends in a refused connection."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import random_model, tiny_config
from huggingface_hub.utils import filter_repo_objects

from neo_hf.conversion import convert_hub_to_raw, convert_raw_to_hub
from neo_hf.conversion.target import shipped_files
from neo_hf.publishing.hub import check_complete
from neo_hf.publishing.hub import push as push_folder
from neo_hf_cli import main

WEIGHTS = "model.safetensors"


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    return stop.value.code


def test_push(tmp_path, capsys, monkeypatch, tokenizer):
    random_model(tiny_config(151_936)).save_pretrained(tmp_path / "made")
    convert_hub_to_raw(tmp_path / "made", tmp_path / "raw")
    tokenizer.save_pretrained(tmp_path / "raw")
    convert_raw_to_hub(tmp_path / "raw", tmp_path / "hub")
    push = ["push", str(tmp_path / "hub"), "someone/neo"]
    capsys.readouterr()
    assert run(*push, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "Left out" not in out
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "hub").iterdir()}
    assert f"{sizes[WEIGHTS]:>15,}  {WEIGHTS}\n" in out
    assert f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files to someone/neo\n" in out

    # What training leaves beside the model stays here.
    for name in ("checkpoint-9/README.md", "checkpoint-9/model.safetensors", "answers/0-0.png", "optimizer.pt"):
        (tmp_path / "hub" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(b"private")
    assert run(*push, "--dry-run") == 0
    left_out, listing = capsys.readouterr().out.split("\n", 1)
    assert left_out == "Left out: answers/, checkpoint-9/, optimizer.pt."
    assert listing == out
    uploaded = {}

    def upload_folder(self, **kwargs):
        uploaded.update(kwargs)
        return SimpleNamespace(pr_url=None, commit_url="the commit")

    with monkeypatch.context() as hub:
        hub.setattr("neo_hf.publishing.hub.get_token", lambda: "hf_x")
        hub.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: None)
        hub.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
        assert push_folder(tmp_path / "hub", "your-username/hub") == "the commit"
    files = [str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert {*filter_repo_objects(files, allow_patterns=uploaded["allow_patterns"])} == sizes.keys()

    monkeypatch.setattr("neo_hf.publishing.hub.get_token", lambda: None)
    assert run(*push) == 1
    assert "There is no Hub token" in capsys.readouterr().err
    edited = (tmp_path / "hub" / "README.md").read_text() + "\nTrained on what I drew.\n"
    (tmp_path / "hub" / "README.md").write_text(edited)
    monkeypatch.setattr("neo_hf.publishing.hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert run(*push) == 1
    assert "Publishing to someone/neo failed" in capsys.readouterr().err
    # The card's examples load what was pushed; the rest of the card is as its owner left it.
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'model_id = "your-username/hub"' in edited
    assert card == edited.replace('model_id = "your-username/hub"', 'model_id = "someone/neo"')

    (tmp_path / "hub" / "processor_config.json").unlink()
    assert run(*push, "--dry-run") == 1
    assert "lacks processor_config.json" in capsys.readouterr().err
    for file in shipped_files():
        (tmp_path / "hub" / file.name).unlink()
    with pytest.raises(ValueError, match=r"lacks processor_config\.json, attention_neo\.py, .*video_proc.*_neo\.py\."):
        check_complete(tmp_path / "hub")


@pytest.mark.parametrize("module", ["conversion", "publishing", "conversion.target", "publishing.model_card"])
def test_packages_import_in_any_order(module):
    subprocess.run([sys.executable, "-c", f"import neo_hf.{module}"], check=True)
