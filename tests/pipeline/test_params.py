"""params.yaml is read strictly: what does not fit is one line that names the key and the choices."""

from pathlib import Path
from typing import Any

import pytest
from project_folder import ROOT, Project

from pipeline.grid.params import load_params
from schoenbat.errors import UserError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("surprise", 1, "unknown key 'surprise'"),
        ("grid.surprise", [], "unknown key 'surprise'; known keys: tasks, seeds, plain, kernel"),
        ("task.lra-text.training.stepz", 5, "unknown key 'stepz'"),
        ("task.lra-text.data.lenght", 5, "unknown key 'lenght'"),
        ("task.lra-text.training.steps", "many", "task.lra-text.training.steps must be an int, not 'many' (str)"),
        ("task.lra-text.training.steps", 2.5, "must be an int"),
        ("task.lra-text.training.steps", 0, "steps must be at least 1, not 0"),
        ("task.lra-text.training", None, "missing key"),
        ("attention.rmfa.features", 5, "attention.rmfa: unknown key 'features'; known keys: num_features, max_degree"),
        ("former.maclauformer.power", 1, "former.maclauformer.power must be a bool"),
        ("grid.tasks", ["lra-txet"], "grid.tasks: unknown task 'lra-txet'; choose one of: lra-text, "),
        ("grid.tasks", "lra-text", "grid.tasks must be a list"),
        ("grid.tasks", ["lra-text", "lra-text"], "grid.tasks lists 'lra-text' more than once"),
        ("grid.tasks", ["lra-retrieval"], "'lra-retrieval' has no section task.lra-retrieval"),
        ("grid.plain.attn", ["sofmax"], "grid.plain.attn: unknown attn 'sofmax'; choose one of: "),
        ("grid.plain.attn", ["rmfa"], "'rmfa' needs a kernel; list it under grid.kernel.attn"),
        ("grid.kernel.attn", ["softmax"], "'softmax' takes no kernel; list it under grid.plain.attn"),
        ("grid.kernel.attn", ["taylor1"], "'taylor1' has no section attention.taylor1"),
        ("grid.kernel.dotf", ["expo"], "grid.kernel.dotf: unknown dotf 'expo'; choose one of: exp, inverse, log, "),
        ("grid.kernel.former", ["macformer"], "unknown former 'macformer'; choose one of: maclauformer, transformer"),
        ("grid.seeds", ["42"], "grid.seeds[0] must be an int"),
        ("grid.seeds", [1.0], "grid.seeds[0] must be an int"),
        ("grid.seeds", [True], "grid.seeds[0] must be an int"),
        ("grid.seeds", [3, 3], "grid.seeds lists 3 more than once"),
        ("grid.seeds", [-1], "grid.seeds must not be negative"),
        ("task.lra-txet", {}, "task.lra-txet"),
        ("attention.sofmax", {}, "attention: unknown attn 'sofmax'; choose one of: "),
        ("former.macformer", {}, "former: unknown former 'macformer'"),
        ("profile", "../elsewhere", "profile must be"),
        ("run.device", "gpu", "unknown device 'gpu'; choose one of: cpu, cuda"),
        ("run.threads", 0, "threads must be at least 1"),
        ("data", {"mirror": 5}, "data.mirror must be a str"),
        ("bench.lengths", [0], "at least 1"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(project: Project, key: str, value: Any, message: str) -> None:
    project.set(key, value)
    with pytest.raises(UserError) as caught:
        load_params()
    assert message in str(caught.value)
    assert str(caught.value).startswith("params.yaml")
    assert "\n" not in str(caught.value)


def test_a_section_that_is_no_task_is_refused_even_when_it_is_complete(project: Project) -> None:
    project.set("task.lra-txet", project.settings["task"]["lra-text"])
    with pytest.raises(UserError, match="task: unknown task 'lra-txet'; choose one of: lra-text, "):
        load_params()


def test_the_values_arrive_typed(project: Project) -> None:
    project.set("task.lra-text.training.learning_rate", 1)
    params = load_params()
    assert params.task["lra-text"].training.learning_rate == 1.0
    assert params.task["lra-text"].data.max_length == 64
    assert params.attention == {"softmax": {}, "mean": {}, "rmfa": {"num_features": 8}}
    assert params.data.limit_bytes == 500_000_000


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001"])
def test_numbers_mean_what_they_mean_to_dvc(project: Project, number: str) -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("learning_rate: 0.001", f"learning_rate: {number}"))
    assert load_params().task["lra-text"].training.learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: [", "params.yaml line 1: not valid YAML"),
        ("profile: a\nprofile: b\n", 'params.yaml line 2: not valid YAML: found duplicate key "profile"'),
        ("- a\n", "must be a mapping"),
        ("", "missing key 'profile'"),
        ("a: !!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_params_file_is_refused(project: Project, text: str, message: str) -> None:
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_params()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_variable_for_the_mirror_wins(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.set("data", {"mirror": "/from/file"})
    assert load_params().data.mirror_folder == Path("/from/file")
    monkeypatch.setenv("SCHOENBAT_DATA_MIRROR", "/from/variable")
    assert load_params().data.mirror_folder == Path("/from/variable")


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_is_valid_and_called_after_its_file(path: Path) -> None:
    assert load_params(path).profile == path.stem


def test_a_check_is_repeated_when_a_distribution_comes_and_not_when_files_do(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli.app import main

    checks: list[object] = []
    monkeypatch.setattr("pipeline.grid.cells.check_models", lambda *_: checks.append(None))
    monkeypatch.syspath_prepend(project.folder)

    def ask() -> int:
        with pytest.raises(SystemExit):
            main(["list", "dotf"])
        return len(checks)

    assert [ask(), ask()] == [1, 1]
    Path("mlflow.db").touch()
    assert ask() == 1, "whatever a grid writes would make the next `status` slow"
    Path("my_kernels-0.1.dist-info").mkdir()
    assert ask() == 2
