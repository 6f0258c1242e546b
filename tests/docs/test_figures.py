"""The figures of README and documentation can be drawn again, and are of this code."""

import runpy

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

FOLDER = ROOT / "docs" / "images"


@pytest.mark.slow
def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(FOLDER / "draw.py"))["main"](tmp_path)
    names = {path.name for path in FOLDER.glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        drawn, committed = (np.asarray(Image.open(folder / name).convert("L"), int) for folder in (tmp_path, FOLDER))
        assert drawn.shape == committed.shape
        assert (abs(drawn - committed) > 64).mean() < 0.01, name  # fonts and rounding may differ
