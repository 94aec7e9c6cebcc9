"""What MLflow holds after cells and grids have come, gone and been killed. Every MLflow here is a real one."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow_server
import pytest
from mlflow_server import Server
from project_folder import ROOT, Project, write_results
from small_grid import CELLS, make_small, start_grid, tracked_runs

from pipeline.grid.cells import Cell
from pipeline.grid.results import CellResults, Fingerprint
from pipeline.mlflow import database, tracking
from pipeline.mlflow.tracking import Tracker, import_mlflow
from schoenbat.lra.training import Evaluation

Invoke = Callable[..., tuple[int, str, str]]
Start = Callable[..., "subprocess.Popen[str]"]

CELL = Cell("lra-text", "rmfa", "exp", "maclauformer", 42)
OTHER = Cell("lra-text", "softmax", None, "transformer", 42)
STEPS = [25, 50, 75, 100]
PRELUDE = """
import os, signal, sys, time
from pipeline.mlflow import tracking
from pipeline.mlflow.tracking import Tracker
"""


def write(
    cell: Cell, *, profile: str = "tiny", made_from: str = "f1", accuracy: float = 0.6, root: Path = Path()
) -> str:
    """The files of a cell that was trained and tested; its id."""
    fingerprint = Fingerprint(made_from, "settings", "data")
    write_results(CellResults(profile, cell.id, root), cell, fingerprint, accuracy, test_code=made_from)
    return cell.id


def untested(cell: str) -> Path:
    return CellResults("tiny", cell).files()[-1]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that holds nothing, which takes MLflow seconds to make."""
    path = tmp_path_factory.mktemp("tables") / "mlflow.db"
    database.create(path, lambda uri: import_mlflow().MlflowClient(uri).search_experiments(max_results=1))
    return path


@pytest.fixture
def made(project: Project, tables: Path) -> Project:
    """A project that has its database."""
    shutil.copy(tables, "mlflow.db")
    return project


@pytest.fixture
def start(project: Project) -> Iterator[Start]:
    """Start a python process in the project folder; whatever still runs at the end of the test is stopped."""
    started = []

    def run(code: str, *arguments: str, cwd: Path = project.folder, **env: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *arguments],
            cwd=cwd,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


LOG = "print(Tracker('tiny', sys.argv[1:]).finish())"


def held(uri: str | None = None) -> tuple[Any, list[Any], list[Any]]:
    """A client, the parent runs, and the runs of cells."""
    import mlflow

    client = mlflow.MlflowClient(uri or tracking.store_uri())
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags.get("kind") == "grid"]
    cells = [run for run in runs if "cell" in run.data.tags]
    ids = {parent.info.run_id for parent in parents}
    assert {run.data.tags["mlflow.parentRunId"] for run in cells} <= ids
    assert len(parents) + len(cells) == len(runs)
    return client, parents, cells


def steps_of(client: Any, run: Any, metric: str = "dev_accuracy") -> list[int]:
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


@pytest.mark.slow
def test_processes_that_meet_a_new_database_together_share_its_parent(project: Project, start: Start) -> None:
    cells = [write(dataclasses.replace(CELL, seed=seed)) for seed in range(3)]
    assert {finish(process) for process in [start(LOG, cell) for cell in cells]} == {"\n"}
    _, parents, runs = held()
    assert len(parents) == 1
    assert sorted(run.data.tags["cell"] for run in runs) == cells


@pytest.mark.slow
def test_checkouts_that_meet_one_new_database_together_all_log(project: Project, start: Start) -> None:
    folders = [project.folder / name for name in "abc"]
    cells = [write(dataclasses.replace(CELL, seed=seed), root=folder) for seed, folder in enumerate(folders)]
    uri = f"sqlite:///{project.folder / 'shared.db'}"
    started = [
        start(LOG, cell, cwd=folder, MLFLOW_TRACKING_URI=uri) for cell, folder in zip(cells, folders, strict=True)
    ]
    assert {finish(process) for process in started} == {"\n"}
    _, parents, runs = held(uri)
    assert len({parent.data.tags["checkout"] for parent in parents}) == len(parents) == 3
    assert sorted(run.data.tags["cell"] for run in runs) == cells


@pytest.mark.slow
def test_processes_that_log_one_cell_together_make_one_run(made: Project, start: Start) -> None:
    cell = write(CELL)
    assert {finish(process) for process in [start(LOG, cell) for _ in range(3)]} == {"\n"}
    client, _, (run,) = held()
    assert steps_of(client, run) == STEPS


def test_each_profile_has_its_parent_run_which_ends_and_begins_again_with_its_grid(made: Project) -> None:
    import mlflow

    def statuses() -> dict[str, str]:
        _, parents, _ = held()
        return {parent.data.tags["profile"]: parent.info.status for parent in parents}

    assert Tracker("tiny").finish("KILLED") == Tracker("cpu").finish() == ""
    assert statuses() == {"tiny": "KILLED", "cpu": "FINISHED"}
    tracker = Tracker("tiny", [write(CELL)])
    end = time.monotonic() + 60
    while not held()[2] and time.monotonic() < end:
        time.sleep(0.1)
    assert statuses()["tiny"] == "RUNNING"
    assert tracker.finish("FAILED") == ""
    assert statuses() == {"tiny": "FAILED", "cpu": "FINISHED"}
    assert isinstance(held()[0], mlflow.MlflowClient)


def test_a_run_holds_the_cell_its_curve_and_its_numbers(made: Project) -> None:
    assert Tracker("tiny", [write(CELL)]).finish() == ""
    client, (parent,), (run,) = held()
    assert parent.info.run_name == "grid tiny"
    assert run.info.run_name == "rmfa exp maclauformer lra-text 42", "what tells cells apart comes first"
    assert (run.info.status, run.info.end_time - run.info.start_time) == ("FINISHED", 10_000)
    axes = {"task": "lra-text", "attn": "rmfa", "dotf": "exp", "former": "maclauformer", "seed": "42"}
    assert run.data.params == {"profile": "tiny", **axes}
    wanted = {"cell": CELL.id, "fingerprint": "f1-settings-data", "git_sha": "abc123", "torch": "2.13.0"}
    assert wanted.items() <= run.data.tags.items()
    assert "42.pt cannot be read" in run.data.tags["no_model"], "why there is no model is said"
    for name in ("dev_accuracy", "dev_loss", "train_accuracy", "train_loss", "epoch", "learning_rate"):
        assert steps_of(client, run, name) == STEPS
    ((data, context),) = [(each.dataset, each.tags[0].value) for each in run.inputs.dataset_inputs]
    assert (data.name, data.digest, data.source, context) == ("lra-text", "data", "made up", "train, dev, test")
    best = {"best_step": 100, "best_dev_accuracy": 0.61, "best_dev_loss": 0.6, "num_parameters": 12345}
    for name, value in {**best, "test_accuracy": 0.6, "test_loss": 0.6, "system/seconds": 10}.items():
        (point,) = client.get_metric_history(run.info.run_id, name)
        assert (point.step, point.value) == (0, value), "MLflow draws bars of what is at step 0 alone"


def test_a_long_curve_is_logged_whole(made: Project) -> None:
    results = CellResults("tiny", write(CELL))
    resources, metrics = results.resources(), results.metrics()
    assert resources is not None
    assert metrics is not None
    curve = [Evaluation(step, 0, 1e-3, 0.7, 0.5, 0.6, 0.5) for step in range(1, 401)]
    results.write_training(curve, resources, metrics)
    assert Tracker("tiny", [CELL.id]).finish() == ""
    client, _, (run,) = held()
    assert steps_of(client, run) == list(range(1, 401))


def test_a_cell_is_logged_once_for_each_fingerprint_and_what_is_logged_stays(made: Project) -> None:
    for made_from in ("f1", "f1", "f2"):
        assert Tracker("tiny", [write(CELL, made_from=made_from)]).finish() == ""
    client, _, runs = held()
    assert sorted(run.data.tags["fingerprint"] for run in runs) == ["f1-settings-data", "f2-settings-data"]
    for run in runs:
        assert steps_of(client, run) == STEPS
        assert len(client.get_metric_history(run.info.run_id, "system/seconds")) == 1


def test_a_cell_trained_again_with_other_numbers_has_a_run_with_these_alone(made: Project) -> None:
    for accuracy in (0.6, 0.5):
        assert Tracker("tiny", [write(CELL, accuracy=accuracy)]).finish() == ""
    _, _, (run,) = held()
    assert run.data.metrics["test_accuracy"] == 0.5


def test_a_cell_tested_later_goes_on_with_its_run(made: Project) -> None:
    cell = write(CELL)
    test = untested(cell).read_bytes()
    untested(cell).unlink()
    assert Tracker("tiny", [cell]).finish() == ""
    _, _, (first,) = held()
    assert "test_accuracy" not in first.data.metrics
    untested(cell).write_bytes(test)
    for _ in range(2):
        assert Tracker("tiny", [cell]).finish() == ""
    client, _, (run,) = held()
    assert run.info.run_id == first.info.run_id
    assert (steps_of(client, run), steps_of(client, run, "test_accuracy")) == (STEPS, [0])


def test_the_score_of_weights_that_were_trained_over_is_not_logged(made: Project) -> None:
    test = untested(write(CELL, made_from="f1")).read_bytes()
    untested(write(CELL, made_from="f2")).write_bytes(test)
    assert Tracker("tiny", [CELL.id]).finish() == ""
    _, _, (run,) = held()
    assert "test_accuracy" not in run.data.metrics


def test_a_cell_that_is_not_finished_is_not_logged(made: Project) -> None:
    assert Tracker("tiny", [CELL.id]).finish() == ""
    assert held()[2] == []


def test_runs_whose_making_was_not_heard_of_become_one(made: Project) -> None:
    cell = write(CELL)
    assert Tracker("tiny").finish() == ""
    client, (parent,), _ = held()
    tags = {"mlflow.parentRunId": parent.info.run_id, "cell": cell, "fingerprint": "f1-settings-data"}
    for _ in range(2):
        client.create_run(parent.info.experiment_id, tags=tags)
    assert Tracker("tiny", [cell]).finish() == ""
    client, _, (run,) = held()
    assert (run.info.status, steps_of(client, run)) == ("FINISHED", STEPS)


def test_settings_of_any_name_are_parameters(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = {"a=b": 1, "../x": 2, "\N{GREEK SMALL LETTER ALPHA}$": 3, "n" * 300: 4, "none": None}
    trained = SimpleNamespace(
        description={"attention": odd, "seed": 42, "best_step": 100},
        classifier=SimpleNamespace(save_pretrained=lambda folder: folder.mkdir()),
    )
    monkeypatch.setattr(tracking, "load_trained", lambda *_: trained)
    results = CellResults("tiny", write(CELL))
    results.best.write_bytes(b"weights")
    assert Tracker("tiny", [CELL.id]).finish() == ""
    _, _, (run,) = held()
    assert run.data.params["settings.attention.a_b"] == "1"
    settings = {name: value for name, value in run.data.params.items() if name.startswith("settings.")}
    assert sorted(settings.values()) == ["1", "2", "3", "4"]


@pytest.fixture
def trained(made: Project, invoke: Invoke) -> Project:
    """A project with a trained cell whose training is not logged, as under a grid."""
    made.add_code()
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "log_by_hand", lambda *_: None)
        assert invoke("train", *CELLS[RMFA])[0] == 0
        assert invoke("eval", *CELLS[RMFA])[0] == 0
    return made


RMFA = "lra-listops-rmfa-exp-maclauformer-0"
KILLED_AT = """
import mlflow
from pipeline.mlflow.tracking import import_mlflow
import_mlflow()
number, method = int(sys.argv[2]), getattr(mlflow.MlflowClient, sys.argv[3])

def call(*given, **named):
    global number
    number -= 1
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return method(*given, **named)

setattr(mlflow.MlflowClient, sys.argv[3], call)
Tracker("tiny", sys.argv[1:2]).finish()
"""


@pytest.mark.slow
def test_killed_anywhere_a_cell_is_logged_whole_the_next_time(trained: Project, start: Start) -> None:
    # The first that is created is the parent run; parameters are a batch of their own.
    for method, number in {"create_run": 2, "log_batch": 2, "log_model_artifacts": 1, "set_terminated": 1}.items():
        process = start(KILLED_AT, RMFA, str(number), method)
        assert process.wait() == -signal.SIGKILL, method
    assert tracking.is_due("tiny")
    assert Tracker("tiny", [RMFA]).finish() == ""
    assert not tracking.is_due("tiny")
    assert tracked_runs(Path()) == {RMFA: [3, 6]}
    client, _, (run,) = held()
    assert len(run.outputs.model_outputs) == 1
    assert steps_of(client, run, "test_accuracy") == [0]


@pytest.mark.slow
def test_weights_and_model_of_a_trained_cell_can_be_used_from_mlflow(trained: Project) -> None:
    import mlflow

    from pipeline.models.trained import load_trained
    from schoenbat import PretrainedClassifier

    assert Tracker("tiny", [RMFA]).finish() == ""
    client, _, (run,) = held()
    weights = client.download_artifacts(run.info.run_id, "0.pt")
    assert Path(weights).read_bytes() == CellResults("tiny", RMFA).best.read_bytes()
    assert run.data.params["settings.training.steps"] == "6"
    assert "no_model" not in run.data.tags
    (logged,) = run.outputs.model_outputs
    model = client.get_logged_model(logged.model_id)
    assert (model.name, str(model.status)) == (RMFA, "READY")
    folder = mlflow.artifacts.download_artifacts(model.artifact_location)
    text = ["[MAX 2 9 ]", "[MIN 4 7 1 ]"]
    expected = load_trained(RMFA, "tiny").classifier.predict(text)
    assert PretrainedClassifier.from_pretrained(folder).predict(text) == expected
    mlflow.set_tracking_uri(tracking.store_uri())
    version = mlflow.register_model(f"models:/{model.model_id}", "listops")
    registered = mlflow.artifacts.download_artifacts(f"models:/listops/{version.version}")
    assert PretrainedClassifier.from_pretrained(registered).predict(text) == expected


def test_the_database_lies_in_the_checkout_whatever_that_is_called(project: Project, start: Start) -> None:
    folder = project.folder / "what? 100%20 #1; a&b"
    cell = write(CELL, root=folder)
    before = set(project.folder.iterdir())
    assert finish(start(LOG, cell, cwd=folder)) == "\n"
    assert {path.name for path in folder.iterdir()} >= {"mlflow.db", "logs"}
    assert set(project.folder.iterdir()) == before


@pytest.mark.slow
def test_a_kill_while_the_database_is_made_leaves_one_that_works(project: Project, start: Start) -> None:
    # What is made aside shows when to kill: at different sizes of it.
    for size in (1, 100_000, 400_000):
        process = start(LOG)
        while process.poll() is None:
            made = [file.stat().st_size for file in project.folder.glob(".mlflow.db.*.tmp")]
            if made and max(made) >= size:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert process.returncode == -signal.SIGKILL
        assert not (project.folder / "mlflow.db").exists()
    assert Tracker("tiny", [write(CELL)]).finish() == ""
    assert [run.data.tags["cell"] for run in held()[2]] == [CELL.id]
    assert [path.name for path in project.folder.glob(".mlflow*")] == []


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_cells_are_logged_again_where_the_database_is_deleted_between_them(made: Project, how: str) -> None:
    tracker = Tracker("tiny", [write(CELL)])
    wait_until(
        lambda: tracking.find_experiment() is not None and [run.info.status for run in held()[2]] == ["FINISHED"]
    )
    Path("mlflow.db").unlink()
    if how == "emptied":
        Path("mlflow.db").touch()
    tracker.add(write(OTHER))
    assert tracker.finish() == ""
    assert sorted(run.data.tags["cell"] for run in held()[2]) == sorted([CELL.id, OTHER.id])


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_experiment_that_was_deleted_is_named_and_restored(made: Project, invoke: Invoke) -> None:
    made.add_dvc()
    assert Tracker("tiny", [write(CELL)]).finish() == ""
    client, (parent,), _ = held()
    client.delete_experiment(parent.info.experiment_id)
    code, out, _ = invoke("doctor")
    (line,) = [line for line in out.splitlines() if " mlflow " in line]
    assert code == 1
    assert "experiment schoenbat" in line
    assert "is deleted; `schoenbat-exp log` restores it" in line
    assert "is deleted; `schoenbat-exp log` restores it" in invoke("ui")[2]
    write(OTHER)
    assert invoke("log")[0] == 0
    assert sorted(run.data.tags["cell"] for run in held()[2]) == sorted([CELL.id, OTHER.id])


def test_the_command_logs_what_mlflow_lacks_and_nothing_twice(made: Project, invoke: Invoke) -> None:
    write(CELL)
    write(OTHER)
    write(CELL, profile="other")
    for _ in range(2):
        code, out, err = invoke("log")
        assert (code, err) == (0, "")
        assert out.startswith("MLflow has all 2 finished cells of profile tiny: sqlite:///")
        client, _, runs = held()
        assert {run.data.tags["cell"]: steps_of(client, run) for run in runs} == {CELL.id: STEPS, OTHER.id: STEPS}
    assert invoke("log", "--profile", "other")[0] == 0
    assert sorted(run.data.params["profile"] for run in held()[2]) == ["other", "tiny", "tiny"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "MLflow cannot use sqlite:///{folder}/mlflow.db: "),
        ("postgresql://me:secret@localhost/db", "MLflow cannot use postgresql://me:***@localhost/db: No module named"),
        ("gopher://somewhere", "MLflow cannot use gopher://somewhere: "),
    ],
)
def test_what_mlflow_cannot_use_is_one_line(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, uri: str, message: str
) -> None:
    if uri:
        monkeypatch.setenv(tracking.TRACKING_URI, uri)
    else:
        (project.folder / "mlflow.db").write_bytes(b"no database at all" * 100)
    write(CELL)
    code, out, err = invoke("log")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"error: not logged: 1 cell: {message.format(folder=project.folder)}")
    assert err.endswith("; the next run or `schoenbat-exp log` logs them\n")


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line_and_leaves_no_half_database(project: Project, start: Start) -> None:
    limit = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    output = finish(start(limit + LOG, write(CELL)))
    assert output.startswith("not logged: 1 cell: MLflow cannot use sqlite:////")
    assert len(output.splitlines()) == 1, output
    assert not (project.folder / "mlflow.db").exists()


def test_a_locked_database_is_waited_for_beside_the_cells(made: Project) -> None:
    assert Tracker("tiny").finish() == ""
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        tracker = Tracker("tiny", [write(CELL)])
        began = time.monotonic()
        tracker.add(write(OTHER))
        assert time.monotonic() - began < 0.1
        time.sleep(1)
    assert tracker.finish() == ""
    assert len(held()[2]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("stops", "seconds"), [(1, tracking._STOPPING_SECONDS + 3), (0, 6.0)])
def test_a_server_that_never_answers_delays_neither_a_stop_nor_for_long_the_end(
    project: Project, monkeypatch: pytest.MonkeyPatch, stops: int, seconds: float
) -> None:
    import_mlflow()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv(tracking.TRACKING_URI, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 3.0)
        tracker = Tracker("tiny", [write(CELL)])
        silent.accept()
        began = time.monotonic()
        problem = tracker.finish("KILLED", lambda: stops)
        assert time.monotonic() - began < seconds
        assert problem.startswith("not logged: 1 cell: no answer from MLflow at http://127.0.0.1:")
    assert tracking.is_due("tiny")


def test_telemetry_is_off(start: Start) -> None:
    code = "from pipeline.mlflow.tracking import import_mlflow; import_mlflow()\n"
    code += "from mlflow.telemetry import get_telemetry_client; print(get_telemetry_client())"
    assert finish(start(code)) == "None\n"


def test_importing_the_command_line_leaves_mlflow_alone(start: Start) -> None:
    assert finish(start("import pipeline.cli.app; print('mlflow' in sys.modules)")) == "False\n"


@pytest.fixture
def server(project: Project) -> Iterator[Server]:
    """An MLflow server of its own."""
    with mlflow_server.running_server(project.folder, project.folder / "server.db", project.folder / "stored") as found:
        yield found


@pytest.mark.slow
def test_cells_that_finish_while_a_server_is_away_are_logged_when_it_is_back(
    trained: Project, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracking.TRACKING_URI, server.address)
    assert Tracker("tiny", [write(CELL)]).finish() == ""
    server.kill()
    tracker = Tracker("tiny", [CELL.id, RMFA])
    assert "not logged: 2 cells: MLflow cannot use http://" in tracker.finish()
    server.start()
    assert Tracker("tiny", [CELL.id, RMFA]).finish() == ""
    client, (parent,), runs = held()
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["cell"]: steps_of(client, run) for run in runs} == {CELL.id: STEPS, RMFA: [3, 6]}
    (run,) = [run for run in runs if run.data.tags["cell"] == RMFA]
    assert Path(client.download_artifacts(run.info.run_id, "0.pt")).is_file()
    assert len(run.outputs.model_outputs) == 1


@pytest.mark.slow
def test_a_grid_without_mlflow_trains_says_so_once_and_the_next_one_logs_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: Project
) -> None:
    folder = tmp_path / "grid"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_small(folder)
    grid = start_grid(folder, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    out, _ = grid.communicate(timeout=300)
    assert grid.returncode == 0, out
    assert out.count("MLflow") == 1, out
    assert "warning: not logged: 2 cells: MLflow cannot use http://127.0.0.1:9: " in out
    grid = start_grid(folder)
    out, _ = grid.communicate(timeout=300)
    assert (grid.returncode, "nothing to do" in out, "MLflow" in out) == (0, True, False), out
    assert tracked_runs(folder) == {cell: [3, 6] for cell in CELLS}


@pytest.mark.slow
def test_what_is_done_by_hand_is_logged_by_hand(project: Project, invoke: Invoke) -> None:
    project.add_code()
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    assert invoke("train", *CELLS[RMFA])[0] == 0
    (first,) = [run for run in held()[2] if run.data.tags["cell"] == RMFA]
    assert invoke("eval", *CELLS[RMFA])[0] == 0
    (run,) = [run for run in held()[2] if run.data.tags["cell"] == RMFA]
    assert run.info.run_id == first.info.run_id
    assert "test_accuracy" in run.data.metrics.keys() - first.data.metrics.keys()
    assert ROOT not in Path(run.info.artifact_uri).parents
