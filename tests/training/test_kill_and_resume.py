"""Runs that are killed and resumed; `python tests/training/kill_and_resume.py OUT` kills ten times."""

import pytest
from kill_and_resume import compare, compare_encodings, kill_at_random, launch


@pytest.mark.slow
def test_killed_twice(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = launch(whole, steps=12, workers=2)
    run.communicate()
    assert run.returncode == 0, (whole / "stderr.txt").read_text()[-4000:]
    starts = kill_at_random(killed, kills=2, steps=12, workers=2)
    assert starts[-1][0] != "None"  # it did resume
    compare(whole, killed)
    compare_encodings(whole, killed, starts, workers=2)
