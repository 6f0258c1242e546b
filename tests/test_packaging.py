"""What pip sees: the declared versions, the metadata and README on PyPI, the source distribution."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from neo_hf import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of the package and of all extras.
REQUIREMENTS = [*map(Requirement, chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the wheel and the source distribution."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def metadata(dist):
    with zipfile.ZipFile(dist / f"neo_hf-{__version__}-py3-none-any.whl") as wheel:
        return email.message_from_bytes(wheel.read(f"neo_hf-{__version__}.dist-info/METADATA"))


def test_floor_is_what_is_declared():
    declared: dict[str, set] = {}
    for requirement in REQUIREMENTS:
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                declared.setdefault(canonicalize_name(requirement.name), set()).add(Version(specifier.version))
    lines = [line for line in (ROOT / "constraints-floor.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = {canonicalize_name(name): {Version(version)} for name, version in (line.split("==") for line in lines)}
    assert pinned == declared


def test_everything_imported_is_declared():
    """Not installed only because another package happens to need it."""
    files = [*(ROOT / "src").rglob("*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    modules = {name.partition(".")[0] for name in imported} - {"neo_hf", "neo_hf_cli"} - sys.stdlib_module_names
    installed = packages_distributions()
    packages = {module: {canonicalize_name(name) for name in installed.get(module, [module])} for module in modules}
    declared = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}
    assert not [module for module, names in packages.items() if not names & declared]


def test_metadata(metadata):
    assert metadata["Name"] == "neo-hf"
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert "transformers" in metadata["Keywords"]
    labels = {url.split(",")[0] for url in metadata.get_all("Project-URL")}
    assert labels >= {"Repository", "Documentation", "Changelog", "Issues"}
    classifiers = metadata.get_all("Classifier")
    supported = SpecifierSet(metadata["Requires-Python"])
    minors = [minor for minor in range(8, 30) if f"Programming Language :: Python :: 3.{minor}" in classifiers]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert [f"3.{minor}" in supported for minor in (minors[0] - 1, *minors)] == [False] + [True] * len(minors)


def test_readme_links_work_from_pypi(metadata):
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload(decode=True).decode())
    kinds = {"blob": 0, "raw": 0}  # pages, and images to be shown
    for link in links:
        assert link.startswith(("https://", "#")), link
        if found := re.fullmatch(rf"{PROJECT['urls']['Repository']}/(blob|raw)/main/([^#]+)(#.*)?", link):
            assert (ROOT / found[2]).exists(), link
            assert (found[1] == "raw") == found[2].endswith(".png"), link
            kinds[found[1]] += 1
    assert kinds["blob"] >= 5
    assert kinds["raw"] >= 2


def test_is_typed(dist):
    """Type checkers take the annotations of an installed package with this file only."""
    with zipfile.ZipFile(dist / f"neo_hf-{__version__}-py3-none-any.whl") as wheel:
        assert "neo_hf/py.typed" in wheel.namelist()


def test_wheel_has_the_command_and_its_model(dist):
    with zipfile.ZipFile(dist / f"neo_hf-{__version__}-py3-none-any.whl") as wheel:
        assert {"neo_hf_cli/__init__.py", "neo_hf/nano/model.safetensors", "neo_hf/nano/scene.png"} <= set(
            wheel.namelist()
        )
        entry_points = wheel.read(f"neo_hf-{__version__}.dist-info/entry_points.txt").decode()
    assert "neo-hf = neo_hf_cli:main" in entry_points


def test_source_distribution_can_run_its_tests(dist):
    """Tests, and all that they read, are in it."""
    with tarfile.open(dist / f"neo_hf-{__version__}.tar.gz") as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames()}
    folders = ("src", "tests", "docs", "examples", "benchmarks", "conversion", "model_cards", "notebooks")
    files = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(p.endswith(".egg-info") for p in path.parts)
    ]
    files += ["CHANGELOG.md", "LICENSE", "Makefile", "README.md", "mkdocs.yml", "pyproject.toml"]
    files += ["constraints.txt", "constraints-floor.txt"]
    assert set(files) <= packed, set(files) - packed
