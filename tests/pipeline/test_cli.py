"""schoenbat-exp as a user meets it: exit codes, one-line errors, and one cell from data to test accuracy."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from project_folder import Project

from pipeline.grid.results import CellResults
from pipeline.stages import commands
from schoenbat.errors import OutOfMemory, TrainingFailed

Invoke = Callable[..., tuple[int, str, str]]

PLAIN = ("--task", "lra-listops", "--attn", "softmax", "--former", "transformer")
KERNEL = ("--task", "lra-listops", "--attn", "rmfa", "--dotf", "exp", "--former", "maclauformer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", *PLAIN, "--task", "lra-txet"), "unknown task 'lra-txet'; choose one of: lra-text, "),
        (("train", *PLAIN, "--attn", "sofmax"), "unknown attn 'sofmax'; choose one of: "),
        (("train", *PLAIN, "--former", "macformer"), "unknown former 'macformer'; choose one of: maclauformer"),
        (("train", *KERNEL, "--dotf", "expo"), "unknown dotf 'expo'; choose one of: exp, inverse"),
        (("train", *PLAIN, "--dotf", "exp"), "takes no kernel"),
        (("train", *PLAIN, "--attn", "rmfa"), "needs a kernel"),
        (("train", *PLAIN, "--device", "gpu"), "unknown device 'gpu'; choose one of: cpu"),
        (("train", *PLAIN, "--device", "cuda:99"), "device 'cuda:99' is not available here; choose one of: cpu"),
        (("train", *PLAIN), "no prepared data for lra-listops"),
        (("eval", *PLAIN), "no prepared data for lra-listops"),
        (("preprocess", "--task", "lra-listops"), "schoenbat-exp download --task lra-listops"),
        (("preprocess", "--task", "lra-txet"), "unknown task"),
        (("download", "--task", "lra-txet"), "unknown task"),
        (("run",), "nothing chosen: pass --grid"),
        (("run", "--task", "lra-image"), "the grid has no task 'lra-image'; choose from: lra-listops, lra-text"),
        (("run", "--cell", "x"), "the grid has no cell 'x'"),
        (("use", "huge"), "unknown profile 'huge'; choose one of: "),
    ],
)
def test_wrong_names_end_in_one_line_and_exit_code_2(
    project: Project, invoke: Invoke, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [("trian",), ("train",), ("train", *PLAIN, "--stepz", "5"), ("train", *PLAIN, "--seed", "x"), ("list", "x")],
)
def test_wrong_usage_is_exit_code_2(project: Project, invoke: Invoke, arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments)[0] == 2


def test_a_wrong_params_file_is_exit_code_2_for_every_command(project: Project, invoke: Invoke) -> None:
    project.set("grid.surprise", 1)
    for arguments in (("run", "--grid"), ("status",), ("report",), ("bench",), ("eval", *PLAIN), ("train", *PLAIN)):
        code, _, err = invoke(*arguments)
        assert (code, err) == (2, f"error: {err.removeprefix('error: ')}")
        assert "unknown key 'surprise'" in err


def test_outside_a_project_the_missing_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = invoke("status")
    assert code == 2
    assert err == f"error: no params.yaml in {tmp_path}; run this in the root folder of the project\n"


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (OutOfMemory("cpu has too little memory"), "memory", "error: cpu has too little memory\n"),
        (MemoryError(), "memory", "error: MemoryError\n"),
        (TrainingFailed("loss is nan"), "failed", "error: loss is nan\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.pt"), "crash", "error: No space left on device: x.pt\n"),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_line_and_exit_code_1(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, line: str
) -> None:
    def fail(profile: str | None = None) -> None:
        raise error

    monkeypatch.setattr(commands, "load", fail)
    outcome = project.folder / "outcome.json"
    monkeypatch.setenv("SCHOENBAT_OUTCOME_FILE", str(outcome))
    assert invoke("report") == (1, "", line)
    assert json.loads(outcome.read_text())["kind"] == kind


def test_data_that_cannot_be_had_is_exit_code_3(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.set("data", {"download_limit_mb": 1})
    code, _, err = invoke("download", "--task", "lra-text")
    assert code == 3
    assert len(err.splitlines()) == 1
    monkeypatch.setenv("SCHOENBAT_DATA_MIRROR", "nowhere")
    code, _, err = invoke("download", "--task", "lra-text")
    assert (code, err) == (2, "error: the data mirror nowhere is not a folder\n")


def test_help_and_names_are_quick_and_need_neither_torch_nor_mlflow(project: Project) -> None:
    began = time.monotonic()
    script = (
        "import sys; from pipeline import cli; print(sorted({'torch', 'mlflow', 'dvc', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out == "[]\n"
    assert time.monotonic() - began < 5


def test_list_names_everything_that_can_be_used(project: Project, invoke: Invoke) -> None:
    Path("profiles").mkdir()
    Path("profiles/tiny.yaml").write_bytes(Path("params.yaml").read_bytes())
    lines = invoke("list", "dotf")[1].splitlines()
    assert {"exp", "inverse", "log", "sqrt", "trigh"} <= {line.split()[0] for line in lines}
    assert lines[0] == "  exp      exp(x): normalised, it is softmax attention."
    assert invoke("list", "profiles")[1] == "  tiny  For tests.\n"
    code, out, _ = invoke("list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert list(listed) == ["tasks", "attn", "dotf", "former", "profiles"]
    assert [name["name"] for name in listed["former"]] == ["maclauformer", "transformer"]
    assert all(name["about"] for names in listed.values() for name in names)
    assert "\n  lra-listops " in invoke("list")[1].partition("attn:")[0]


def test_use_puts_a_valid_profile_into_params_and_never_loses_edits(project: Project, invoke: Invoke) -> None:
    Path("profiles").mkdir()
    other = Path("profiles/other.yaml")
    other.write_text(Path("params.yaml").read_text().replace("profile: tiny", "profile: other"))
    code, _, err = invoke("use", "other")
    assert code == 2
    assert "pass --force" in err
    Path("profiles/tiny.yaml").write_bytes(Path("params.yaml").read_bytes())
    assert invoke("use", "other") == (0, "params.yaml is now profile other: For tests.\n", "")
    assert Path("params.yaml").read_bytes() == other.read_bytes()
    Path("profiles/tiny.yaml").write_text("profile: tiny\n")
    assert invoke("use", "tiny")[0] == 2
    Path("profiles/tiny.yaml").write_bytes(other.read_bytes())
    assert "calls itself profile 'other'" in invoke("use", "tiny")[2]
    assert Path("params.yaml").read_bytes() == other.read_bytes()


@pytest.fixture
def prepared(project: Project, invoke: Invoke) -> Project:
    project.add_code()
    for command in ("download", "preprocess"):
        code, _, err = invoke(command, "--task", "lra-listops")
        assert code == 0, err
    return project


def test_one_cell_from_data_to_test_accuracy(prepared: Project, invoke: Invoke) -> None:
    cell = "lra-listops-rmfa-exp-maclauformer-1"
    code, _, err = invoke("eval", *KERNEL, "--seed", "1")
    assert code == 2
    assert "train first: schoenbat-exp train --task lra-listops --attn rmfa --dotf exp --former maclauformer" in err
    code, out, err = invoke("train", *KERNEL, "--seed", "1")
    assert code == 0, err
    best, curve, written, predictions, tested = CellResults("tiny", cell).files()
    found = {path for folder in ("runs/tiny", "weights") for path in Path(folder).glob("**/1.*")}
    assert found == {best, curve, written}
    assert not Path("checkpoints/tiny", cell, "last.pt").exists()
    metrics = json.loads(written.read_text())
    assert metrics["cell"] == cell
    assert (metrics["steps"], metrics["dev_examples"], metrics["dotf"], metrics["seed"]) == (6, 16, "exp", 1)
    assert metrics["attention"] == {"num_features": 8}
    curves = curve.read_text().splitlines()
    assert curves[0] == "step,epoch,learning_rate,train_loss,train_accuracy,dev_loss,dev_accuracy"
    assert [line.split(",")[0] for line in curves[1:]] == ["3", "6"]
    assert metrics["threads"] == 1
    resources = json.loads(Path("checkpoints/tiny", cell, "resources.json").read_text())
    assert resources["resumed"] == 0

    code, out, err = invoke("eval", *KERNEL, "--seed", "1")
    assert code == 0, err
    assert predictions.is_file()
    test = json.loads(tested.read_text())
    assert test["examples"] == 16
    assert test["best_step"] == metrics["best_step"]
    assert f"test accuracy {test['accuracy']:.4f}" in out

    prepared.set("task.lra-listops.training.steps", 9)
    code, _, err = invoke("eval", *KERNEL, "--seed", "1")
    assert code == 2
    assert "were trained with training.steps = 6, not 9; train again: schoenbat-exp train --task lra-listops" in err

    best.write_bytes(best.read_bytes()[:100])
    code, _, err = invoke("eval", *KERNEL, "--seed", "1")
    assert code == 2
    assert str(best) in err


def test_each_seed_is_trained_once_and_again_by_force_with_the_same_bytes(prepared: Project, invoke: Invoke) -> None:
    cells = [f"lra-listops-softmax-transformer-{seed}" for seed in (0, 1)]

    def call(command: str, *options: str) -> tuple[list[str], list[tuple[bytes, int]]]:
        code, out, err = invoke(command, *PLAIN, *options)
        assert code == 0, err
        files = [path for cell in cells for path in CellResults("tiny", cell).files() if path.is_file()]
        return out.splitlines(), [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]

    for command, verb, number in (("train", "trains", 6), ("eval", "tests", 10)):
        _, first = call(command)
        assert len(first) == number, "both seeds of the grid"
        assert call(command) == ([f"{cell}: up to date; --force {verb} it again" for cell in cells], first)
        _, forced = call(command, "--force")
        assert [content for content, _ in forced] == [content for content, _ in first]
        assert forced != first


def test_a_checkpoint_of_another_configuration_is_set_aside_and_so_is_an_unreadable_one(
    prepared: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import train

    last = Path("checkpoints/tiny/lra-listops-softmax-transformer-0/last.pt")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "best.pt")

    cell = (*PLAIN, "--seed", "0")
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_model", fail)
        code, _, err = invoke("train", *cell)
        assert code == 1
        assert err.splitlines()[-1] == "error: No space left on device: best.pt"
    assert last.exists()

    # Settings have changed: it is set aside, and the cell is trained as if there had been none.
    saved = last.read_bytes()
    prepared.set("task.lra-listops.training.learning_rate", 0.5)
    code, out, _ = invoke("train", *cell)
    assert code == 0
    assert f"{last} is of other settings, code or data; now last.other.pt" in out
    assert not last.exists()
    assert last.with_name("last.other.pt").read_bytes() == saved
    curves = CellResults("tiny", last.parent.name).files()[1]
    found = curves.read_text()
    last.write_bytes(b"of another program")
    code, out, _ = invoke("train", *cell, "--force")
    assert code == 0
    assert f"{last} cannot be read; now last.other.pt" in out
    assert curves.read_text() == found
    assert not last.exists()
