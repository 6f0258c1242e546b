"""The benchmark of formats on CPUs, in its smoke test."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_smoke(tmp_path):
    for name in ("bitsandbytes", "torchao"):
        pytest.importorskip(name)
    report = tmp_path / "results.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "cpu.py"), "--tiny", "--append", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert run.returncode == 0, run.stderr
    rows = [line.split(" | ")[0].removeprefix("| ") for line in report.read_text().splitlines() if "| " in line]
    for form in ("float32", "bfloat16", "int8 (bitsandbytes)", "int8 (torchao)", "NF4 (bitsandbytes)"):
        assert rows.count(form) == 2  # speed and accuracy
    assert {"NEO-2B", "Qwen3-VL-2B"} <= set(rows)
    assert list(tmp_path.glob("cpu-*.png"))
