"""What a stranger installs: the library alone, whole, under one version; and the experiments, which need a checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import packaging.metadata
import pytest
import yaml
from packaging.requirements import Requirement

import schoenbat

pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).parents[1]
LIBRARY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXPERIMENTS = tomllib.loads((ROOT / "pipeline/pyproject.toml").read_text(encoding="utf-8"))
MOST_PACKAGES = 40
FOREIGN = {"dvc", "mlflow", "pandas", "matplotlib", "transformers", "typer", "pipeline"}
EXAMPLE = """
import time
began = time.monotonic()
from schoenbat import *
seconds = time.monotonic() - began
import sys, torch, warnings
warnings.simplefilter("ignore", PoorEstimateWarning)
query, key, value = torch.randn(3, 1, 2, 100, 16)
assert dot_product_kernel_attention(query, key, value, is_causal=True).shape == value.shape
assert MultiheadKernelAttention(16, 2)(*torch.randn(3, 9, 1, 16))[0].shape == (9, 1, 16)
assert {"exp", "yat"} <= set(KERNELS.names()) and "rmfa-sketch" in ATTENTIONS.names() and "lra-text" in TASKS.names()
print(__version__, f"{seconds:.2f}")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, made from what belongs to it, and the wheel, made from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "checkout"
    left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("schoenbat", "pipeline", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _build("sdist", source, folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    _build("wheel", folder / archive.name.removesuffix(".tar.gz"), folder)
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


def _build(kind: str, source: Path, target: Path) -> None:
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_wheel_is_the_library_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "schoenbat").rglob("*")
        if path.suffix in (".py", ".pyi", ".cpp", ".h") or path.name == "py.typed"
    }
    described = {name.partition("/")[2] for name in names} - {name.partition("/")[2] for name in code}
    assert described == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}, "no commands"


@pytest.mark.slow
def test_the_source_distribution_has_no_tests_that_could_not_run(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert folders == {
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "schoenbat",
        "schoenbat.egg-info",
        "setup.cfg",
    }


@pytest.mark.slow
def test_the_metadata_of_the_wheel_is_valid(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        text = wheel.read(name)
    checked = packaging.metadata.Metadata.from_email(text, validate=True)
    assert str(checked.version) == schoenbat.__version__
    assert checked.license_expression == "MIT"
    assert checked.description_content_type == "text/markdown"
    assert checked.description == (ROOT / "README.md").read_text(encoding="utf-8")
    needed = {requirement.name for requirement in checked.requires_dist or [] if requirement.marker is None}
    assert needed == {"torch", "torchquad", "numpy"}


def test_every_version_is_the_same() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    headings = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    stated = {"the experiments": EXPERIMENTS["project"]["version"], "citation": cited, "changes": headings[0]}
    assert stated == dict.fromkeys(stated, schoenbat.__version__)


def test_the_experiments_list_every_package_of_theirs() -> None:
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "pipeline").rglob("__init__.py")
        if "build" not in path.parts
    }
    assert set(EXPERIMENTS["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("project", [LIBRARY["project"], EXPERIMENTS["project"]], ids=lambda project: project["name"])
def test_every_dependency_is_bounded_below_and_above(project: dict[str, Any]) -> None:
    for requirement in map(Requirement, project["dependencies"]):
        if requirement.name != LIBRARY["project"]["name"]:
            assert {each.operator for each in requirement.specifier} == {">=", "<"}, requirement


class Environment:
    """An empty virtual environment."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=True)
        self.python = folder / "bin/python"

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        # -I: neither this checkout nor PYTHONPATH may be found.
        command = [str(self.python), "-I", *arguments]
        return subprocess.run(command, cwd=self.python.parent, capture_output=True, text=True, check=False)

    def install(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return self.run("-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *arguments)

    def check(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Environment]:
    yield Environment(tmp_path / "environment")
    shutil.rmtree(tmp_path / "environment")


@pytest.mark.slow
def test_an_empty_environment_gets_few_packages_and_a_library_that_works(
    built: tuple[Path, Path], empty: Environment
) -> None:
    pins = ("-c", str(ROOT / "constraints.txt"))
    installed = empty.install(*pins, "torch==2.13.0", str(built[1]))
    if installed.returncode != 0 and empty.install(*pins, "--no-deps", "filelock").returncode != 0:
        pytest.skip(f"pip finds no packages here: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    assert empty.check("-m", "pip", "check") == "No broken requirements found.\n"
    packages = set(re.findall(r"^(\S+)==", empty.check("-m", "pip", "list", "--format", "freeze"), re.MULTILINE))
    assert "schoenbat" in packages
    assert len(packages) <= MOST_PACKAGES
    assert not {package.lower() for package in packages} & FOREIGN
    found = f"import importlib.util as u; print([name for name in {sorted(FOREIGN)} if u.find_spec(name)])"
    assert empty.check("-c", found) == "[]\n"
    # The first import writes what Python compiles.
    version, seconds = [empty.check("-c", EXAMPLE).split() for _ in range(2)][1]
    assert version == schoenbat.__version__
    print(f"{len(packages)} packages, imported in {seconds} s: {', '.join(sorted(packages))}")

    # torch's own lowest version is left out: for the CPU alone it is not where packages usually come from.
    needed = map(Requirement, LIBRARY["project"]["dependencies"])
    bounds = {each.name: next(s.version for s in each.specifier if s.operator == ">=") for each in needed}
    lowest = empty.install("--no-deps", *(f"{name}=={bounds[name]}" for name in ("numpy", "torchquad")))
    assert lowest.returncode == 0, lowest.stderr
    assert empty.check("-c", EXAMPLE).split()[0] == schoenbat.__version__
