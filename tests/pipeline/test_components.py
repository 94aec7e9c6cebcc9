"""The links by which DVC sees the files of components from other distributions."""

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pipeline.grid.components import link_components
from pipeline.grid.graph import cell_sources
from project_folder import ROOT, Project

from pipeline.grid.axes import Cell
from schoenbat import registry
from schoenbat.errors import UserError

FOLDER = Path("schoenbat/kernels")
Offer = Callable[[dict[str, str]], None]


@pytest.fixture
def offer(project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Have the given modules offered as kernels, by name; the modules `plugin_a` and `plugin_b` exist."""
    project.add_code()
    outside = tmp_path_factory.mktemp("outside")
    monkeypatch.syspath_prepend(outside)
    for module in ("plugin_a", "plugin_b"):
        (outside / f"{module}.py").write_text(f"# {module}\n")

    def offer(kernels: dict[str, str]) -> None:
        entries = [EntryPoint(name, f"{module}:K", "schoenbat.kernels") for name, module in kernels.items()]
        monkeypatch.setattr(registry, "_entry_points", lambda group: entries if group == "schoenbat.kernels" else [])

    return offer


def links() -> dict[str, str]:
    return {path.name: path.read_text() for path in FOLDER.iterdir() if path.is_symlink()}


def test_a_component_has_its_file_where_the_sources_of_a_cell_are_looked_for(offer: Offer) -> None:
    offer({"k": "plugin_a"})
    link_components()
    cell = Cell("lra-text", "rmfa", "k", "maclauformer", 0)
    (file,) = [Path(path) for path in cell_sources(cell, "train", "tiny", ROOT / "dvc.yaml") if path.endswith("/k.py")]
    assert file.read_text() == "# plugin_a\n"
    assert (FOLDER / ".gitignore").read_text().splitlines()[1:] == ["/.gitignore", "/k.py"]
    assert not Path("schoenbat/attention/.gitignore").exists()


def test_links_follow_what_is_installed(offer: Offer) -> None:
    offer({"a": "plugin_a", "b": "plugin_b"})
    link_components()
    assert links() == {"a.py": "# plugin_a\n", "b.py": "# plugin_b\n"}
    offer({"b": "plugin_a", "c": "plugin_a", "gone": "plugin_gone"})
    link_components()
    assert links() == {"b.py": "# plugin_a\n", "c.py": "# plugin_a\n"}
    offer({})
    link_components()
    assert links() == {}
    assert not (FOLDER / ".gitignore").exists()


def test_links_and_files_of_others_are_left_alone(offer: Offer) -> None:
    (FOLDER / "mine.py").symlink_to("exp.py")
    (FOLDER / "taken.py").write_text("x = 1\n")
    offer({"k": "plugin_a"})
    link_components()
    offer({})
    link_components()
    assert (FOLDER / "mine.py").is_symlink()
    offer({"taken": "plugin_a"})
    with pytest.raises(UserError, match=r"schoenbat/kernels/taken.py is in the way of a link to .*plugin_a.py"):
        link_components()
    assert (FOLDER / "taken.py").read_text() == "x = 1\n"
