"""Two processes (gloo) learn what one does, step for step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_train import main
from helpers import ROOT

from neo_hf import NeoForConditionalGeneration

ZERO3 = ROOT / "examples" / "accelerate" / "zero3.json"

# Gradient checkpointing leaves DDP without a search for parameters that text alone does not reach.
KINDS = {
    "ddp": {"gradient_checkpointing": True},
    "fsdp": {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}},
    "zero3": {"deepspeed": json.loads(ZERO3.read_text()) | {"zero_allow_untested_optimizer": True}},
}


def torchrun(folder, arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29518"]
    command += [str(Path(__file__).parent / "distributed_train.py"), str(folder), json.dumps(arguments)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    assert run.returncode == 0, run.stderr[-4000:]


def result(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    model = NeoForConditionalGeneration.from_pretrained(folder)
    return [entry["loss"] for entry in history if "loss" in entry], dict(model.named_parameters())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    main(folder, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    return result(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(alone, tmp_path, kind):
    """One row each per batch, among them rows of text alone, in other processes than in one."""
    torchrun(
        tmp_path,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "use_cpu": True, **KINDS[kind]},
    )
    losses, weights = result(tmp_path)
    expected_losses, expected_weights = alone
    assert len(losses) == 4
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert weights.keys() == expected_weights.keys()
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-4, msg=name)
