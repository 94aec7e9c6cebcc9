"""Names of cells, and numbers at the ends of what is allowed."""

import importlib
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from project_folder import Project

from pipeline.cli.names import KINDS, PROMISES, Name, described, names
from pipeline.grid.cells import expand, make_cells
from pipeline.grid.params import MAX_SEED, load_params
from schoenbat import registry
from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.errors import UserError
from schoenbat.lra.multihead import FORMERS

Invoke = Callable[..., tuple[int, str, str]]

MECHANISM = '''
"""The mean, under a name that reads like another mechanism with a kernel."""

from schoenbat.attention import ATTENTIONS


class RmfaExp(ATTENTIONS.get("mean")):
    pass
'''


@pytest.fixture
def hyphenated(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """A project with a mechanism `rmfa-exp` that takes no kernel, beside `rmfa` with the kernel `exp`."""
    installed = tmp_path_factory.mktemp("installed")
    (installed / "my_attention.py").write_text(MECHANISM)
    metadata = installed / "my_attention-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-attention\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[schoenbat.attention]\nrmfa-exp = my_attention:RmfaExp\n")
    monkeypatch.syspath_prepend(installed)
    registry._entry_points.cache_clear()
    project.settings["attention"]["rmfa-exp"] = {}
    project.write()
    yield project
    registry._entry_points.cache_clear()
    sys.modules.pop("my_attention", None)
    importlib.invalidate_caches()


def test_two_cells_of_one_id_are_an_error_that_names_both(hyphenated: Project, invoke: Invoke) -> None:
    assert len(expand(load_params())) == 16
    with pytest.raises(UserError, match="two cells have the id lra-text-rmfa-exp-maclauformer-0"):
        make_cells(load_params(), "lra-text", "rmfa-exp", None, "maclauformer", 0)
    assert make_cells(load_params(), "lra-text", "rmfa-exp", None, "transformer", 0)

    hyphenated.set("grid.plain", {"attn": ["rmfa-exp"], "former": ["maclauformer"]})
    for arguments in (("run", "--grid", "--dry-run"), ("status",), ("list",)):
        code, _, err = invoke(*arguments)
        assert code == 2
        assert err == (
            "error: params.yaml: grid: two cells have the id lra-listops-rmfa-exp-maclauformer-0: "
            "--task lra-listops --attn rmfa-exp --former maclauformer --seed 0 and "
            "--task lra-listops --attn rmfa --dotf exp --former maclauformer --seed 0; leave one of them out\n"
        )


@pytest.mark.parametrize("seed", [*(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2**43)), MAX_SEED])
def test_every_seed_that_is_accepted_trains(project: Project, invoke: Invoke, seed: int) -> None:
    project.add_dvc()
    project.set("grid.seeds", [seed])
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    rmfa = ("--task", "lra-listops", "--attn", "rmfa", "--dotf", "exp", "--former", "maclauformer")
    code, out, err = invoke("train", *rmfa)
    assert code == 0, err
    assert f"lra-listops-rmfa-exp-maclauformer-{seed}: dev accuracy" in out
    for wrong in (-1, MAX_SEED + 1):
        code, _, err = invoke("train", *rmfa, "--seed", str(wrong))
        assert (code, err) == (2, f"error: --seed must lie between 0 and {MAX_SEED}, not {wrong}\n")


def test_every_name_says_what_it_stands_for(project: Project) -> None:
    for kind in KINDS:
        for name in names(kind):
            assert name.about, f"{kind} {name.name} has no first line in its docstring"
            assert name.origin == ""
    assert [name.name for name in names("former")] == list(FORMERS)


def test_a_profile_that_is_no_yaml_is_listed_with_its_error(project: Project) -> None:
    Path("profiles").mkdir()
    Path("profiles/broken.yaml").write_text("a: [")
    ((broken,)) = names("profiles")
    assert "not valid YAML" in broken.about


def test_list_says_of_each_mechanism_what_its_class_declares_within_80_columns(
    project: Project, invoke: Invoke
) -> None:
    shown = invoke("list")[1]
    assert max(map(len, shown.splitlines())) <= 80
    listed = {each["name"]: each for each in json.loads(invoke("list", "attn", "--json")[1])["attn"]}
    for name, each in listed.items():
        declared = ATTENTIONS.get(name)
        assert each["promises"] == {promise: getattr(declared, promise) for promise in PROMISES}
        assert (each["cost"], each["paper"]) == (declared.cost, declared.paper)
        assert each["paper"], f"{name} names no paper"
        entry = re.search(rf"\n  {name} .*?(?=\n  \S|\n\S)", shown, re.DOTALL)
        assert entry is not None
        words = " ".join(entry[0].split())
        for promise, said in PROMISES.items():
            assert (said in words) == each["promises"][promise], f"{name}: {promise}"
        assert f" {declared.cost} cost; " in words
        assert declared.paper in words


def test_every_promise_of_a_mechanism_has_words() -> None:
    hints = typing.get_type_hints(Attention)
    assert {name for name, hint in hints.items() if hint == typing.ClassVar[bool]} == PROMISES.keys()


def test_a_mechanism_that_cannot_be_loaded_is_listed_with_the_reason(hyphenated: Project) -> None:
    (installed,) = (Path(path) for path in sys.path if (Path(path) / "my_attention.py").is_file())
    (installed / "my_attention.py").write_text("import schoenbat.nothing\n")
    (broken,) = (each for each in names("attn") if each.name == "rmfa-exp")
    assert broken == Name(
        "rmfa-exp",
        "cannot be loaded: attn 'rmfa-exp' (my_attention:RmfaExp of my-attention 0.1) cannot be loaded: "
        "No module named 'schoenbat.nothing'",
        "my_attention:RmfaExp of my-attention 0.1",
    )


def test_a_text_longer_than_a_line_is_wrapped_under_itself() -> None:
    shown = described([Name("a", "word " * 30), Name("long-name", "")])
    assert shown[0].startswith("  a          word word")
    assert shown[1].startswith("             word")
    assert shown[-1] == "  long-name"
