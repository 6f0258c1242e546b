"""Groups of processes that share rows; through examples/train.py in test_distributed.py."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_model, tiny_config
from transformers import Trainer, TrainingArguments

from neo_hf.training import NeoTrainer, PaddedCollator, SampleStream, Source

WORKER = Path(__file__).with_name("sequence_parallel_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_loss_and_gradients(num_processes):
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, timeout=600, env=environment
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "done" in run.stdout


CONFLICTS = {
    "train_dataset that is not a SampleStream": {"train_dataset": [{}]},
    "compute_loss_func": {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.loss},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "model_init": {"model_init": lambda: random_model(tiny_config())},
    "average_tokens_across_devices=False": {"average_tokens_across_devices": False},
    "torch_compile": {"torch_compile": True},
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_what_cannot_be_combined(tmp_path, conflict):
    options = {"train_dataset": SampleStream([Source([{}])], None)} | CONFLICTS[conflict]
    if "model_init" not in options:
        options["model"] = random_model(tiny_config())
    passed = {name: options.pop(name) for name in inspect.signature(Trainer).parameters if name in options}
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, **options)
    with pytest.raises(ValueError, match=f"sequence_parallel_size=2 cannot be combined with .*{conflict}"):
        NeoTrainer(args=arguments, data_collator=PaddedCollator(0), sequence_parallel_size=2, **passed)


def test_one_process_has_no_groups(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    stream = SampleStream([Source([{}])], None)
    with pytest.raises(ValueError, match="must divide the number of processes, 1, got 2"):
        NeoTrainer(random_model(tiny_config()), arguments, PaddedCollator(0), stream, sequence_parallel_size=2)
