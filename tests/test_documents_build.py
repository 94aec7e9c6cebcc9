"""Sphinx builds the documents without a warning, and the reference has an entry for every public name."""

import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path

import pytest

import schoenbat

pytest.importorskip("sphinx", reason="needs sphinx, furo and myst-parser: the extra dev of pipeline")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")
pytest.importorskip("transformers", reason="the reference imports schoenbat.integrations.huggingface")

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
# What Sphinx says of the extensions' own use of it.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("documents"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sphinx, str]:
    """The application after it has read and resolved all pages, and its warnings; no page is written."""
    folder = tmp_path_factory.mktemp("documents")
    warnings = io.StringIO()
    app = Sphinx(ROOT, ROOT / "docs", folder / "out", folder / "trees", "dummy", status=None, warning=warnings)
    app.build()
    return app, warnings.getvalue()


def test_the_documents_are_built_without_a_warning(built: tuple[Sphinx, str]) -> None:
    assert built[1] == ""


def test_every_public_name_has_an_entry(built: tuple[Sphinx, str]) -> None:
    entries = set(built[0].env.domains.python_domain.objects)
    pages = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in set(schoenbat.__all__) - {"__version__"}:
        (target,) = re.findall(rf"`{name} <(schoenbat\.\S+)>`", pages)
        module, _, last = target.rpartition(".")
        assert getattr(importlib.import_module(module), last) is getattr(schoenbat, name)
        assert target in entries, name


def test_every_public_class_and_function_of_the_library_has_an_entry(built: tuple[Sphinx, str]) -> None:
    entries = set(built[0].env.domains.python_domain.objects)
    components = [getattr(schoenbat, name).package for name in ("KERNELS", "ATTENTIONS", "TASKS")]
    missing = []
    for module in pkgutil.walk_packages(schoenbat.__path__, "schoenbat."):
        # Components are in the reference by their names.
        if "._" in module.name or module.name.rpartition(".")[0] in components:
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            defined = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.name
            if defined and not name.startswith("_") and f"{module.name}.{name}" not in entries:
                missing.append(f"{module.name}.{name}")
    assert missing == []


@pytest.mark.parametrize(
    ("page", "registry"), [("kernels", "KERNELS"), ("mechanisms", "ATTENTIONS"), ("models", "TASKS")]
)
def test_every_component_is_on_its_page(built: tuple[Sphinx, str], page: str, registry: str) -> None:
    text = built[0].env.get_doctree(f"docs/api-{page}").astext()
    for name in getattr(schoenbat, registry).names():
        assert re.search(rf"^{re.escape(name)}$", text, re.MULTILINE), name
