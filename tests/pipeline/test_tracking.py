"""What MLflow holds after grids and cells have come, gone and been killed. Every process here is a real one."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow_server
import pytest
from mlflow_server import Server

from pipeline import tracking
from pipeline.grid.cells import Cell
from schoenbat.lra.training import Evaluation

CELL = Cell("lra-text", "rmfa", "exp", "maclauformer", 42)
PRELUDE = """
import os, sys, time
from pathlib import Path
from pipeline import tracking
from pipeline.grid.cells import Cell
from schoenbat.lra.training import Evaluation

CELL = Cell("lra-text", "rmfa", "exp", "maclauformer", 42)

def evaluation(step):
    return Evaluation(step, 0, 1e-4, 0.7, 0.5, 0.6, step / 100)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the current one, with nothing handed down by a grid."""
    monkeypatch.chdir(tmp_path)
    for name in (tracking.TRACKING_URI, tracking.EXPERIMENT_ID, tracking.PARENT_RUN_ID):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def start(project: Path) -> Iterator[Start]:
    """Start a python process in the project folder; whatever still runs at the end of the test is stopped."""
    started = []

    def run(code: str, *arguments: str, **env: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *arguments],
            cwd=project,
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


def client_and_cells(grid: dict[str, str]) -> tuple:
    """A client, and the runs below the grid's parent run."""
    import mlflow

    client = mlflow.MlflowClient(grid[tracking.TRACKING_URI])
    query = f"tags.`mlflow.parentRunId` = '{grid[tracking.PARENT_RUN_ID]}'"
    return client, client.search_runs([grid[tracking.EXPERIMENT_ID]], query)


def evaluation(step: int) -> Evaluation:
    return Evaluation(step, 0, 1e-4, 0.7, 0.5, 0.6, step / 100)


@pytest.mark.slow
def test_processes_that_meet_a_new_database_together_share_experiment_and_parent(project: Path, start: Start) -> None:
    code = "print(sorted(tracking.start_grid('quick').items()))"
    outputs = {finish(process) for process in [start(code) for _ in range(4)]}
    assert outputs == {f"{sorted(tracking.start_grid('quick').items())}\n"}, "a process failed, chatted or went astray"


def test_each_profile_has_its_parent_run(project: Path) -> None:
    quick, cpu = tracking.start_grid("quick"), tracking.start_grid("cpu")
    assert quick[tracking.EXPERIMENT_ID] == cpu[tracking.EXPERIMENT_ID]
    assert quick[tracking.PARENT_RUN_ID] != cpu[tracking.PARENT_RUN_ID]
    assert tracking.start_grid("quick") == quick


def test_a_run_holds_the_cell_its_environment_and_its_numbers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_STAGE", "train_kernel@quick-x")
    with tracking.cell_run(CELL, "f1", "quick", {"learning_rate": 1e-4}) as run:
        run.log_evaluation(evaluation(10))
        run.log({"resources.device": "cpu", "system/seconds": 1.5})
    with tracking.attach(CELL, "f1", "quick") as attached:
        attached.log({"test_accuracy": 0.5, "test_loss": 0.7})
    client, (held,) = client_and_cells(tracking.start_grid("quick"))
    assert attached.run_id == run.run_id == held.info.run_id
    assert held.info.run_name == "rmfa exp maclauformer lra-text 42", "what tells cells apart comes first"
    assert held.info.status == "FINISHED"
    assert held.data.params == {
        "task": "lra-text",
        "attn": "rmfa",
        "dotf": "exp",
        "former": "maclauformer",
        "seed": "42",
        "profile": "quick",
        "settings.learning_rate": "0.0001",
    }
    assert held.data.tags["dvc_stage"] == "train_kernel@quick-x"
    assert {"git_sha", "torch", "python", "cell", "fingerprint"} <= set(held.data.tags)
    assert held.data.metrics["dev_accuracy"] == 0.1
    assert held.data.metrics["test_accuracy"] == 0.5
    assert held.data.metrics["system/seconds"] == 1.5
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["environment.txt"]


def test_a_killed_run_is_continued_without_logging_a_step_twice(project: Path, start: Start) -> None:
    grid = tracking.start_grid("quick")
    code = """
        with tracking.cell_run(CELL, "f1", "quick", {"steps": 30}) as run:
            for step in (10, 20, 30)[: int(sys.argv[1])]:
                run.log_evaluation(evaluation(step))
            print("logged", flush=True)
            time.sleep(float(sys.argv[2]))
    """
    killed = start(code, "2", "600", **grid)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "logged\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    client, (run,) = client_and_cells(grid)
    assert run.info.status == "RUNNING"
    assert finish(start(code, "3", "0", **grid)) == "logged\n"
    client, (run,) = client_and_cells(grid)
    assert run.info.status == "FINISHED"
    for metric in ("dev_accuracy", "train_loss"):
        assert [held.step for held in client.get_metric_history(run.info.run_id, metric)] == [10, 20, 30]


def test_a_cell_has_one_run_for_each_fingerprint_also_when_it_is_trained_again(project: Path) -> None:
    ids = []
    for fingerprint in ("f1", "f1", "f2"):
        with tracking.cell_run(CELL, fingerprint, "quick", {}) as run:
            ids.append(run.run_id)
            run.log_evaluation(evaluation(10))
        with tracking.attach(CELL, fingerprint, "quick") as run:
            assert run.run_id == ids[-1]
            run.log({"test_accuracy": 0.5})
    assert ids[0] == ids[1] != ids[2]
    client, runs = client_and_cells(tracking.start_grid("quick"))
    assert [held_steps(client, run) for run in runs] == [[10], [10]]


def test_a_run_that_was_only_tested_is_the_one_that_is_trained_in(project: Path) -> None:
    with tracking.attach(CELL, "f1", "quick") as tested:
        tested.log({"test_accuracy": 0.5})
    with tracking.cell_run(CELL, "f1", "quick", {"steps": 10}) as trained:
        trained.log_evaluation(evaluation(10))
    client, (run,) = client_and_cells(tracking.start_grid("quick"))
    assert tested.run_id == trained.run_id == run.info.run_id
    assert (held_steps(client, run), run.data.params["settings.steps"]) == ([10], "10")


def test_a_run_whose_making_was_not_heard_of_is_no_second_one(project: Path) -> None:
    grid = tracking.start_grid("quick")
    client, _ = client_and_cells(grid)
    tags = {"mlflow.parentRunId": grid[tracking.PARENT_RUN_ID], "cell": CELL.id, "fingerprint": "f1"}
    for _ in range(2):
        client.create_run(grid[tracking.EXPERIMENT_ID], tags=tags)
    with tracking.cell_run(CELL, "f1", "quick", {}) as run:
        run.log_evaluation(evaluation(10))
    client, (held,) = client_and_cells(grid)
    assert (held.info.run_id, held_steps(client, held)) == (run.run_id, [10])


def test_a_run_that_ended_but_was_never_tested_is_continued(project: Path) -> None:
    with tracking.cell_run(CELL, "f1", "quick", {}) as first:
        first.log_evaluation(evaluation(10))
    with tracking.cell_run(CELL, "f1", "quick", {}) as again:
        assert again.run_id == first.run_id
        again.log_evaluation(evaluation(10))
        again.log_evaluations([evaluation(10), evaluation(20)])
        for _ in range(2):
            again.log({"test_accuracy": 0.5})
    client, (run,) = client_and_cells(tracking.start_grid("quick"))
    assert held_steps(client, run) == [10, 20]
    assert len(client.get_metric_history(run.info.run_id, "test_accuracy")) == 1


def held_steps(client: Any, run: Any) -> list[int]:
    return [held.step for held in client.get_metric_history(run.info.run_id, "dev_accuracy")]


def test_evaluations_that_meet_a_locked_database_are_logged_later(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_PAUSE_SECONDS", 0.1)
    with tracking.cell_run(CELL, "f1", "quick", {}) as run:
        run.log_evaluation(evaluation(10))
        with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
            database.execute("BEGIN EXCLUSIVE")
            run.log_evaluation(evaluation(20))
            assert "MLflow cannot be reached, 1 evaluation kept for later" in capsys.readouterr().out
        run.log_evaluation(evaluation(30))
    client, (held,) = client_and_cells(tracking.start_grid("quick"))
    assert held_steps(client, held) == [10, 20, 30]


def test_a_parent_ends_with_its_grid_and_begins_again_with_the_next(project: Path) -> None:
    def status(grid: dict[str, str]) -> str:
        client, _ = client_and_cells(grid)
        return str(client.get_run(grid[tracking.PARENT_RUN_ID]).info.status)

    grid = tracking.start_grid("quick")
    assert status(grid) == "RUNNING"
    tracking.end_grid(grid, "KILLED")
    assert status(grid) == "KILLED"
    assert tracking.start_grid("quick") == grid
    assert status(grid) == "RUNNING"
    with tracking.cell_run(CELL, "f1", "quick", {}):
        pass
    assert status(grid) == "FINISHED", "a cell that was started alone left the grid running"


def test_what_the_best_weights_reach_is_at_step_0_where_mlflow_draws_bars(project: Path) -> None:
    with tracking.cell_run(CELL, "f1", "quick", {}) as run:
        for step in (10, 20, 30):
            run.log_evaluation(evaluation(step))
        run.log({"best_step": 20, "best_dev_accuracy": 0.2, "num_parameters": 1234})
        run.log({"test_accuracy": 0.19})
    client, (held,) = client_and_cells(tracking.start_grid("quick"))
    best = {name: held.data.metrics[name] for name in ("best_step", "best_dev_accuracy", "num_parameters")}
    assert best == {"best_step": 20, "best_dev_accuracy": 0.2, "num_parameters": 1234}
    for name, value in {**best, "test_accuracy": 0.19}.items():
        (logged,) = client.get_metric_history(run.run_id, name)
        assert (logged.step, logged.value) == (0, value)


def test_parameters_of_any_name_are_logged(project: Path) -> None:
    odd = {
        "attention.a=b": 1,
        "attention.../x": 2,
        "attention.\N{GREEK SMALL LETTER ALPHA}$": 3,
        "/abs": 4,
        "n" * 300: 5,
    }
    with tracking.cell_run(CELL, "f1", "quick", odd) as run:
        assert run.run_id is not None
    _, (held,) = client_and_cells(tracking.start_grid("quick"))
    assert "settings.attention.a_b" in held.data.params
    assert {int(value) for value in held.data.params.values() if value.isdigit()} >= {1, 2, 3, 4, 5}


def test_the_database_lies_in_the_checkout_whatever_that_is_called(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "what? 100%20 #1; a&b"
    folder.mkdir()
    before = set(tmp_path.iterdir())
    code = "os.chdir(sys.argv[1]); g = tracking.start_grid('quick'); print(g['MLFLOW_TRACKING_URI'])"
    finish(start(code, str(folder)))
    assert {path.name for path in folder.iterdir()} >= {"mlflow.db", "logs"}
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_kill_while_the_database_is_made_leaves_one_that_works(project: Path, start: Start) -> None:
    # What is made aside shows when to kill: at different sizes of it.
    for size in (1, 100_000, 400_000):
        process = start("tracking.start_grid('quick')")
        while process.poll() is None:
            made = [file.stat().st_size for file in project.glob(".mlflow.db.*.tmp")]
            if made and max(made) >= size:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert process.returncode == -signal.SIGKILL
        assert not (project / "mlflow.db").exists()
    grid = tracking.start_grid("quick")
    client, _ = client_and_cells(grid)
    assert [file.name for file in project.iterdir() if "mlflow.db" in file.name] == ["mlflow.db"]
    assert client.get_run(grid[tracking.PARENT_RUN_ID]).info.status == "RUNNING"


@pytest.mark.parametrize("statement", ["create table spans (x)", "create table alembic_version (version_num)", ""])
def test_a_half_made_database_is_made_anew(project: Path, start: Start, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        database.execute(statement)
    if not statement:
        (project / "mlflow.db").touch()
    finish(start("tracking.start_grid('quick')"))
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)


UNUSABLE = """
from schoenbat.errors import UserError
try:
    tracking.start_grid("quick")
except UserError as error:
    print(error)
"""


def test_what_mlflow_cannot_use_is_one_line(project: Path, start: Start) -> None:
    (project / "mlflow.db").write_bytes(b"no database at all" * 100)
    assert finish(start(UNUSABLE)) == (
        f"{project / 'mlflow.db'} cannot be used (file is not a database); move it away and run again: reports do not "
        f"need it\n"
    )
    for uri, message in (
        ("postgresql://me:secret@localhost/db", "MLflow cannot use postgresql://me:***@localhost/db: No module named"),
        ("gopher://somewhere", "MLflow cannot use gopher://somewhere: "),
    ):
        output = finish(start(UNUSABLE, **{tracking.TRACKING_URI: uri}))
        assert message in output
        assert len(output.splitlines()) == 1, output


def test_a_database_that_another_process_holds_is_named(project: Path, start: Start) -> None:
    tracking.start_grid("quick")
    with contextlib.closing(sqlite3.connect(project / "mlflow.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert "mlflow.db is locked by another process; wait for its end" in finish(start(UNUSABLE))


def test_a_full_disk_is_said_in_one_line(project: Path, start: Start) -> None:
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    output = finish(start(code + UNUSABLE))
    assert output.startswith("MLflow cannot use sqlite:////")
    assert len(output.splitlines()) == 1, output
    assert not (project / "mlflow.db").exists()


def test_a_cell_goes_on_without_a_database_that_has_gone(
    project: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tracking.start_grid("quick")
    (project / "mlflow.db").unlink()
    code = """
    with tracking.cell_run(CELL, "f1", "quick", {}) as run:
        run.log_evaluation(evaluation(10))
        run.log_evaluations([evaluation(10)])
        run.log({"best_dev_accuracy": 0.1, "num_parameters": 3})
        run.log({"system/seconds": 1.0})
    with tracking.attach(CELL, "f1", "quick") as run:
        run.log({"test_accuracy": 0.5})
    tracking.end_grid(os.environ, "FINISHED")
    print("trained")
    """
    lines = finish(start(code, **grid)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning", "warning", "trained"]
    assert "mlflow.db cannot be used, so nothing is logged there: No such file or directory" in lines[0]
    assert not (project / "mlflow.db").exists()


def test_telemetry_is_off(start: Start) -> None:
    code = "from pipeline.quiet_mlflow import import_mlflow; import_mlflow()\n"
    code += "from mlflow.telemetry import get_telemetry_client; print(get_telemetry_client())"
    assert finish(start(code)) == "None\n"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_exception_marks_the_run_and_goes_on(project: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracking.cell_run(CELL, "f1", "quick", {}) as interrupted:
        raise error
    _, (run,) = client_and_cells(tracking.start_grid("quick"))
    assert run.info.status == status
    with tracking.cell_run(CELL, "f1", "quick", {}) as continued:
        assert continued.run_id == interrupted.run_id


MODEL = """
import torch
from schoenbat.lra.encoder import ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig

def model():
    return build_model(
        vocab_size=9, num_classes=3, num_texts=1, max_length=64, model=ModelConfig(), attn="rmfa", attention={},
        dotf="exp", former="maclauformer", former_config=FormerConfig(), seed=0,
    )

tokens = torch.arange(1, 9).reshape(1, 1, 8)
mask = torch.ones(1, 1, 8, dtype=torch.bool)
"""
LOG_MODEL = f"""{MODEL}
with tracking.cell_run(CELL, "f1", "quick", {{}}) as run:
    trained = model()
    Path("best.pt").write_bytes(b"weights")
    for _ in range(2):
        run.log_model(trained, Path("best.pt"), name=CELL.id, num_texts=1, num_classes=3)
    assert trained.training
    print(run.run_id, *trained.eval()(tokens, mask).flatten().tolist())
"""
LOAD_MODEL = f"""{MODEL}
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
(logged,) = mlflow.MlflowClient().get_run(sys.argv[2]).outputs.model_outputs
logged_model = mlflow.MlflowClient().get_logged_model(logged.model_id)
loaded = mlflow.pytorch.load_model(f"models:/{{logged.model_id}}")
artifact = mlflow.artifacts.download_artifacts(run_id=sys.argv[2], artifact_path="best.pt")
assert Path(artifact).read_bytes() == b"weights"
assert logged_model.name == CELL.id
served = mlflow.pyfunc.load_model(f"models:/{{logged.model_id}}")
assert served.metadata.signature.inputs.inputs[0].shape == (-1, 1, -1)
assert served.predict(tokens.numpy()).tolist() == loaded(tokens, mask).tolist()
assert served.predict(served.input_example).shape == (1, 3)
print(sys.argv[2], *loaded(tokens, mask).flatten().tolist())
"""


@pytest.mark.slow
def test_a_logged_model_predicts_the_same_in_a_new_process(project: Path, start: Start) -> None:
    grid = tracking.start_grid("quick")
    trained = finish(start(LOG_MODEL, **grid))
    loaded = finish(start(LOAD_MODEL, grid[tracking.TRACKING_URI], trained.split()[0]))
    assert loaded.splitlines()[-1] == trained.splitlines()[-1]


@pytest.fixture
def running_server(project: Path) -> Iterator[Server]:
    with mlflow_server.running_server(project, project / "server.db", project / "stored") as server:
        yield server


@pytest.fixture
def server(running_server: Server) -> str:
    """The address of an MLflow server of its own."""
    return running_server.address


@pytest.mark.slow
def test_a_training_goes_on_without_the_server_and_its_evaluations_arrive_when_it_is_back(
    running_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tracking.TRACKING_URI, running_server.address)
    grid = tracking.start_grid("quick")
    with tracking.cell_run(CELL, "f1", "quick", {}) as run:
        run.log_evaluation(evaluation(10))
        running_server.kill()
        run.log_evaluation(evaluation(20))
        run.log_evaluation(evaluation(30))
        assert "2 evaluations kept for later" in capsys.readouterr().out
        threading.Timer(1.0, running_server.start).start()
        run.log_evaluations([evaluation(step) for step in (10, 20, 30, 40)])
    client, (held,) = client_and_cells(grid)
    assert held_steps(client, held) == [10, 20, 30, 40]
    assert held.info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_serves_grids_cells_and_models(server: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.TRACKING_URI, server)
    grid = tracking.start_grid("quick")
    assert grid[tracking.TRACKING_URI] == server
    trained = finish(start(LOG_MODEL, **grid))
    assert len(trained.splitlines()) == 1, f"MLflow chatted: {trained}"
    loaded = finish(start(LOAD_MODEL, server, trained.split()[0]))
    assert loaded.splitlines()[-1] == trained.splitlines()[-1]
    _, (run,) = client_and_cells(grid)
    assert run.info.status == "FINISHED"


def test_importing_the_command_line_leaves_mlflow_alone(start: Start) -> None:
    assert finish(start("import pipeline.cli; print('mlflow' in sys.modules)")) == "False\n"
