"""Two processes on a CPU give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import random_model, tiny_config

WORKER = Path(__file__).with_name("client_processes_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_two_processes(tmp_path, tied):
    cases = ["data_parallel", "fully_sharded", "tensor_parallel"]
    if not tied:
        pytest.importorskip("deepspeed")
        cases.append("zero_3")
    random_model(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", WORKER, tmp_path, *cases]
    run = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if line.startswith("done")] == [f"done {case}" for case in cases]
