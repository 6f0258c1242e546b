"""The notebook runs from its first cell to its last, and prints what it should."""

import pytest
from helpers import ROOT

PATH = ROOT / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
def test_quickstart(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(PATH, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs go stale: clear them"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert printed.splitlines() == [
        "a red circle at the top left, a blue square at the top right, a green cross at the bottom right",
        "yes",
        "the green cross disappeared",
        "right",
    ]
    figures = ["image/png" in output.get("data", {}) for output in outputs]
    assert sum(figures) == 2  # the drawing, and what the model sees of two
