"""The first section of docs/training.md, command by command, as in a fresh clone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from neo_hf.conversion.target import shipped_files


@pytest.mark.slow
def test_five_minutes_on_a_cpu(tmp_path):
    section = re.search(
        r"## Five minutes on a CPU\n(.*?)\n## ", (ROOT / "docs" / "training.md").read_text(), re.DOTALL
    )
    draw_and_train, chat, push = re.findall(r"```bash\n(.*?)```", section[1], re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(commands):
        shell = ["bash", "-ec", commands]
        done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run(draw_and_train)
    answers = (tmp_path / "nano-colors" / "answers" / "step-150.md").read_text()
    assert int(re.search(r"(\d+) of 60 answers", answers)[1]) >= 55
    assert re.fullmatch("pink|brown|cyan", run(chat).strip())

    listing = run(push)
    files = {line.split()[-1] for line in listing.splitlines()[1:-1]}
    assert files - {file.name for file in shipped_files()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert listing.startswith("Left out: answers/, checkpoint-150/, trainer_state.json, training_args.bin.\n")
    card = (tmp_path / "nano-colors" / "README.md").read_text()
    assert "from `nano` on `train.jsonl`" in card
    assert re.search(r"\| 150 \| [\d.]+ \| [\d.]+ \|", card)
