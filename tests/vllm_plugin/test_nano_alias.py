"""What vLLM is told before it loads a model."""

import shutil

import huggingface_hub.constants
import pytest

from neo_hf.loading import NANO

arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason="needs vLLM: make test-vllm")


@pytest.mark.parametrize("offline", [False, True])
def test_nano(monkeypatch, tmp_path, offline):
    """Is the model that comes with the package, and the Hub is not asked for it; a folder of that name goes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    def names():
        config = arg_utils.EngineArgs(model="nano", max_model_len=512).create_engine_config().model_config
        return config.model, config.tokenizer

    assert names() == (str(NANO), str(NANO))
    shutil.copytree(NANO, tmp_path / "nano")
    assert names() == ("nano", "nano")
