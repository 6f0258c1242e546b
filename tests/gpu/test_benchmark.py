"""The benchmark for GPUs, in its smoke test without one."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_smoke(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(command, capture_output=True, text=True, env=without_gpu)
    assert refused.returncode == 2
    assert "no CUDA device was found" in refused.stderr
    report = tmp_path / "results.md"
    run = subprocess.run(
        [*command, "--tiny", "--append", str(report)], capture_output=True, text=True, env=without_gpu
    )
    assert run.returncode == 0, run.stderr
    for title in ("Attention of one layer", "Time to first token", "A decoding step", "A training step"):
        assert title in report.read_text()
