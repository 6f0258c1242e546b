"""The documentation site builds without warnings: no broken link, every page in the navigation, every object found."""

import subprocess
import sys

import pytest
from helpers import ROOT


def test_site(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    for page, text in (("index", "Quick start"), ("api/model/index", "rope_parameters"), ("design/index", "mermaid")):
        assert text in (tmp_path / f"{page}.html").read_text()
