"""What the README and CONTRIBUTING.md say of the rest of the repository is true."""

import re
import tomllib

from helpers import ROOT
from packaging.requirements import Requirement

from neo_hf.configuration_neo import NEWEST_TESTED

README = (ROOT / "README.md").read_text()


def test_every_file_is_described():
    """The source tree in CONTRIBUTING.md."""
    described = set(re.findall(r"[\w/]*?(\w+\.py)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert {path.name for path in ROOT.glob("src/neo_hf/*.py")} - {"__init__.py", "_version.py"} <= described


def test_badges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minors = [line.rsplit("3.", 1)[1] for line in project["classifiers"] if "Python :: 3." in line]
    assert f"python-3.{minors[0]}_to_3.{minors[-1]}-" in README
    transformers = next(line for line in map(Requirement, project["dependencies"]) if line.name == "transformers")
    lowest = next(specifier.version for specifier in transformers.specifier if specifier.operator == ">=")
    newest = ".".join(map(str, NEWEST_TESTED))
    assert f"transformers-{lowest}_to_{newest}-" in README
    assert f"license-{project['license'].replace('-', '--')}-" in README


def test_figures():
    """Those beside Qwen3-VL's and the hardware's are of the last run, here and on the page of results."""
    run = (ROOT / "benchmarks" / "RESULTS.md").read_text().split("### Speed (`speed.py`)")[-1]
    results = (ROOT / "docs" / "results.md").read_text()
    hardware = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]*) ?\|$", results, flags=re.MULTILINE)
    assert len(hardware) == 3
    for tokens, neo, eager in hardware:
        [row] = re.findall(rf"^\| {tokens.replace(',', '')} \| \d \| .*", run, flags=re.MULTILINE)
        assert row.split(" | ")[4] == neo
        assert row.split(" | ")[6] == (eager or "-")
    memory = re.search(r"takes (\d+ MB) beyond weights and inputs, where eager attention takes ([\d,]+ MB)", results)
    assert f"| 4K tokens: NEO, eager | {memory[1]} | {memory[2]} |" in run
    for page in (README, results):
        rows = re.findall(r"^\| .+ \| ([\d.]+) (s|ms|MB) \| ([\d.]+) \2 \| ([\d.]+) \|$", page, flags=re.MULTILINE)
        assert len(rows) == 5
        for neo, unit, qwen, ratio in rows:
            assert round(float(neo) / float(qwen), 2) == float(ratio)
            assert f" {neo} {unit} " in run
            assert f" {qwen} {unit} " in run
