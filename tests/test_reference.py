"""The reference in the documents knows every key of params.yaml and every command, and is right about their bounds."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from pipeline.cli import app as cli
from pipeline.grid.params import BenchParams
from pipeline.grid.settings import flat, read_yaml
from schoenbat.lra.tasks import TASKS
from schoenbat.registry import base_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def keys(reference: ModuleType) -> dict[str, Any]:
    """Keys with their sections."""
    found = {}
    for section, _, listed in reference.sections():
        found |= {f"{section.partition(',')[0]}.{key.name}".lstrip("."): key for key in listed}
    return found


def general(key: str) -> str:
    """A key of a params file as the reference calls it."""
    first, *rest = key.split(".")
    if "training" in rest:
        return f"task.NAME.training.{rest[-1]}"
    if first == "former" or (first == "task" and rest[1] == "model"):
        return ".".join([first, "NAME", *rest[1:]])
    if first in ("task", "attention"):
        return ".".join([first, base_name(rest[0]), *rest[1:]])
    if first == "trained" and len(rest) > 2:
        return f"trained.{rest[0]}.NAME.{rest[2]}"
    return key


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_the_profiles_is_explained(profile: Path, keys: dict[str, Any]) -> None:
    for key, value in flat(read_yaml(profile)).items():
        # A section without keys is null.
        assert general(key) in keys or value is None, key


def test_every_key_has_a_type_a_default_and_a_meaning_in_words(keys: dict[str, Any]) -> None:
    for name in ("former.NAME.power", "task.NAME.model.head_width", "task.NAME.training.eval_every"):
        assert len(keys[name].meaning) > 20, name
    assert {name for name, key in keys.items() if not key.kind or not key.meaning} == set()
    assert keys["task.NAME.model.width"].default == "64"
    assert {field.name for field in dataclasses.fields(TASKS.get("table").Config)} == {
        name.rpartition(".")[2] for name in keys if name.startswith("task.table.data.")
    }


def test_bounds_are_those_that_are_kept(keys: dict[str, Any]) -> None:
    assert keys["bench.repeats"].bounds == "be at least 1, at most 100000"
    for repeats in (0, 100_001):
        with pytest.raises(ValueError, match="repeats must be at"):
            BenchParams([64], repeats)
    assert keys["task.NAME.model.dropout"].bounds == "lie in [0, 1)"
    assert keys["run.threads"].bounds.startswith("be at least 1, at most ")


def test_every_command_and_option_is_listed(reference: ModuleType) -> None:
    group: Any = typer.main.get_command(cli.app)
    listed = {shown.split()[1]: options for _, shown, _, options, _ in reference.commands()}
    assert listed.keys() == group.commands.keys()
    for name, command in group.commands.items():
        flags = " ".join(flags for flags, _ in listed[name])
        for parameter in command.params:
            assert all(option in flags for option in (*parameter.opts, *parameter.secondary_opts)) or (
                parameter.param_type_name == "argument"
            )
        assert all(told for _, told in listed[name]), name
