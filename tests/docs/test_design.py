"""The diagram of a forward pass in docs/design.md is of the code as it is."""

import importlib
import operator
import re

from helpers import ROOT


def test_names_in_the_diagram_exist():
    text = (ROOT / "docs" / "design.md").read_text()
    diagram = re.search(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)[1]
    names = re.findall(r"\b(\w+_neo)\.([\w.]+)", diagram)
    assert len(names) >= 12
    for module, name in names:
        operator.attrgetter(name)(importlib.import_module(f"neo_hf.{module}"))
    for step in ("NeoProcessor.__call__", "NeoModel.forward", "NeoTextModel.forward", "NeoPatchEmbedding.forward"):
        assert step in {name for _, name in names}
