"""Components of other distributions: found by entry point, listed unimported, and refused with their place."""

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schoenbat import registry
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS, Kernel
from schoenbat.registry import check_bounds, describe_entry

Install = Callable[..., None]
KERNEL = """
from schoenbat.kernels import Kernel


class Two(Kernel):
    def __call__(self, x):
        return 2 + 0 * x
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution on the path: its metadata as an installer writes it, and modules."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, entries: str, **modules: str) -> None:
        folder = tmp_path / f"{name}-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (folder / "entry_points.txt").write_text(f"[schoenbat.kernels]\n{entries}\n")
        for module, content in modules.items():
            (tmp_path / f"{module}.py").write_text(content)
        registry._entry_points.cache_clear()

    yield install
    registry._entry_points.cache_clear()
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_an_entry_point_is_a_component_like_those_of_the_folder(install: Install) -> None:
    own = KERNELS.names()
    install("two-kernels", "two = plugin_two:Two\nmy_2-b = plugin_two:Two", plugin_two=KERNEL)
    assert KERNELS.names() == sorted([*own, "two", "my_2-b"])
    assert [describe_entry(entry) for entry in KERNELS.external().values()] == ["plugin_two:Two of two-kernels 0.1"] * 2
    assert "plugin_two" not in sys.modules, "listing imported a component"
    assert issubclass(KERNELS.get("two"), Kernel)
    assert KERNELS.get("two")().coefficient(0) == pytest.approx(2)


def test_an_unknown_name_lists_those_of_other_distributions_too(install: Install) -> None:
    install("two-kernels", "two = plugin_two:Two", plugin_two=KERNEL)
    with pytest.raises(UserError, match=r"unknown dotf 'twoo'; choose one of: two, exp, "):
        KERNELS.get("twoo")


def test_a_name_that_exists_twice_is_an_error_that_names_both(install: Install) -> None:
    install("a-dist", "two = plugin_a:Two")
    install("b-dist", "two = plugin_b:Two")
    with pytest.raises(
        UserError, match=r"^dotf 'two' exists twice: plugin_a:Two of a-dist 0.1 and plugin_b:Two of b-dist 0.1$"
    ):
        KERNELS.names()


def test_a_name_of_the_project_cannot_be_taken(install: Install) -> None:
    install("a-dist", "exp = plugin_a:Two")
    with pytest.raises(UserError, match=r"^dotf 'exp' exists twice: .*kernels/exp.py and plugin_a:Two of a-dist 0.1$"):
        KERNELS.get("log")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("plugin_absent:Two", "cannot be loaded: No module named 'plugin_absent'"),
        ("plugin_two:Three", "must lead to a class derived from Kernel"),
        ("plugin_two:__name__", "must lead to a class derived from Kernel"),
        ("plugin_two", "must lead to a class derived from Kernel"),
    ],
)
def test_an_entry_point_that_leads_nowhere_breaks_itself_only(install: Install, value: str, message: str) -> None:
    install("a-dist", f"two = {value}", plugin_two=KERNEL)
    assert KERNELS.get("exp")
    with pytest.raises(UserError) as caught:
        KERNELS.get("two")
    assert str(caught.value) == f"dotf 'two' ({value} of a-dist 0.1) {message}"


def test_a_name_must_be_fit_for_a_file_and_a_command_line(install: Install) -> None:
    install("a-dist", "../two = plugin_two:Two")
    with pytest.raises(UserError, match=r"named by letters, digits, - and _, not '\.\./two'$"):
        KERNELS.names()


LIST = """
import schoenbat
from schoenbat.attention import ATTENTIONS
from schoenbat.kernels import KERNELS
from schoenbat.lra.tasks import TASKS

print(schoenbat.__file__)
for registry in (ATTENTIONS, KERNELS, TASKS):
    print(*registry.names())
print(KERNELS.get("exp").__module__)
"""


def listed(folder: Path) -> list[str]:
    """What `LIST` prints where the package is that of `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", LIST], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()


def link_tree(source: Path, target: Path) -> None:
    """Folders as folders and files as links, as an installer with links lays a package out."""
    shutil.copytree(source, target, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))


def test_an_installation_made_of_links_has_all_components(tmp_path: Path) -> None:
    package = Path(registry.__file__).parent
    link_tree(package, tmp_path / "schoenbat")
    assert (tmp_path / "schoenbat/kernels/exp.py").is_symlink()
    first, *names = listed(tmp_path)
    assert first == str(tmp_path / "schoenbat/__init__.py")
    assert names == listed(package.parent)[1:]


@pytest.mark.slow
def test_an_installation_from_a_checkout_with_variants_has_no_component_more(tmp_path: Path) -> None:
    shutil.copytree(
        Path(registry.__file__).parent, tmp_path / "schoenbat", ignore=shutil.ignore_patterns("__pycache__")
    )
    expected = listed(tmp_path)
    # An installer copies the file that a link leads to.
    shutil.copy(tmp_path / "schoenbat/attention/rmfa.py", tmp_path / "schoenbat/attention/rmfa+wide.py")
    assert listed(tmp_path) == expected


def test_both_bounds_of_a_number_are_allowed_and_null_is_not_compared() -> None:
    for value in (1, 3, None, [1, 3]):
        check_bounds(types.SimpleNamespace(size=value), size=(1, 3))
    for value, message in ((0, "size must be at least 1, not 0"), ([1, 4], "size must be at most 3, not 4")):
        with pytest.raises(ValueError, match=message):
            check_bounds(types.SimpleNamespace(size=value), size=(1, 3))
