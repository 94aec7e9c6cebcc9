"""Finished cells in MLflow, from the files that they have written; the only importer of mlflow.

The database is `mlflow.db` in the project's folder, or whatever MLFLOW_TRACKING_URI names. It has one experiment, in it
one parent run per profile of this checkout, and below that one run per cell and fingerprint (code, data and params).
Training knows nothing of it: the process of a grid, the command that has trained a cell by hand, or `schoenbat-exp log`
finds out what MLflow lacks and logs it. A run is FINISHED when all of it is logged; what was cut off is done again, for
metrics of equal time, step and value are one to MLflow. MLflow is for browsing: nothing reads it, no cell waits for it.
"""

import contextlib
import functools
import logging
import os
import re
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from filelock import FileLock

from pipeline.grid.results import CellResults, Fingerprint, Metrics, Replaced
from pipeline.grid.settings import flat
from pipeline.host.heartbeat import HEARTBEAT_VARIABLE
from pipeline.host.text import counted
from pipeline.mlflow import database
from pipeline.models.trained import TrainedCell, load_trained
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "schoenbat"
TRACKING_URI = "MLFLOW_TRACKING_URI"
PATIENCE_SECONDS = 120.0
"""The end of a grid waits so long for MLflow to take another cell, and a cell so long for another process to log."""
_STOPPING_SECONDS = 2.0
_BATCH = 10
_MOST_METRICS = 1000
_CURVES = ("dev_accuracy", "dev_loss", "train_accuracy", "train_loss", "epoch", "learning_rate")


class Tracker:
    """Logs those of `cells` that are finished in a thread of its own, for which nothing has to wait."""

    def __init__(self, profile: str, cells: Iterable[str] = ()) -> None:
        self._profile, self._cells = profile, list(cells)
        self._logged: set[str] = set()
        self._parent = self._problem = ""
        self._beat, self._stopped = 0.0, False
        _due_file(profile).parent.mkdir(parents=True, exist_ok=True)
        _due_file(profile).touch()
        self._thread = self._start()

    def add(self, cell: str) -> None:
        """Let a cell be logged that has finished."""
        self._cells.append(cell)
        if self.is_idle():
            self._thread = self._start()

    def is_idle(self) -> bool:
        """Return whether nothing is being logged."""
        return not self._thread.is_alive()

    def finish(self, status: str = "FINISHED", stops: Callable[[], int] = lambda: 0) -> str:
        """Log what MLflow lacks, unless that gets nowhere or `stops` asks to stop, and end the parent run.

        Returns:
            One line about what is not logged; empty if all is.
        """
        self._beat, last = time.monotonic(), False
        while not (last and self.is_idle()):
            self._stopped = bool(stops())
            if time.monotonic() - self._beat > (_STOPPING_SECONDS if self._stopped else PATIENCE_SECONDS):
                self._problem = self._problem or f"no answer from MLflow at {shown(store_uri())}"
                break
            if self.is_idle():
                self._thread, last = self._start(status), True
            self._thread.join(0.1)
        missing = len(set(self._cells) - self._logged)
        if not missing and not self._problem:
            _due_file(self._profile).unlink(missing_ok=True)
            return ""
        cells, why = counted(missing, "cell"), self._problem or "stopped"
        return f"not logged: {cells}: {why}; the next run or `schoenbat-exp log` logs them"

    def _start(self, status: str = "") -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(status,), name="mlflow", daemon=True)
        thread.start()
        return thread

    def _work(self, status: str) -> None:
        try:
            while self._log_some(status):
                pass
            self._problem = ""
        except UserError as error:
            self._problem = str(error)

    def _log_some(self, status: str) -> bool:
        """Log a batch of cells; return whether there may be more."""
        with self._open() as runs:
            self._beat = time.monotonic()
            if runs.parent != self._parent:
                # Of another database, where the one before was deleted.
                self._parent, self._logged = runs.parent, set()
            due = [cell for cell in dict.fromkeys(self._cells) if cell not in self._logged][:_BATCH]
            for cell in due if not self._stopped else ():
                runs.log(cell)
                self._logged.add(cell)
                self._beat = time.monotonic()
            if (not due or self._stopped) and status:
                runs.client.set_terminated(runs.parent, status)
            return bool(due) and not self._stopped

    @contextlib.contextmanager
    def _open(self) -> Iterator["_Runs"]:
        """Yield the runs of the profile while no other process looks for runs or makes any."""
        uri = store_uri()
        path = database.file_of(uri)
        lock = FileLock(f"{path}.lock" if path else "logs/mlflow.lock", timeout=PATIENCE_SECONDS)
        with _usable(uri) as mlflow, lock:
            if path and database.is_absent(uri):
                database.create(path, lambda new: mlflow.MlflowClient(new).search_experiments(max_results=1))
            client = mlflow.MlflowClient(uri)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                artifacts = Path("mlruns").absolute().as_uri() if path else None
                experiment = client.get_experiment(client.create_experiment(EXPERIMENT, artifact_location=artifacts))
            elif experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            runs = _Runs(client, experiment.experiment_id, self._profile)
            tags = {"kind": "grid", "profile": self._profile, "checkout": _checkout_id(Path("logs/mlflow-checkout"))}
            (run,) = runs.find(tags)[:1] or [client.create_run(runs.experiment, None, tags, f"grid {self._profile}")]
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
            runs.parent = run.info.run_id
            yield runs


def log_by_hand(profile: str, cell: str) -> None:
    """Log a cell that was trained or tested outside of a grid, which logs its cells itself."""
    if HEARTBEAT_VARIABLE not in os.environ and (problem := Tracker(profile, [cell]).finish()):
        print(f"warning: {problem}", flush=True)


def is_due(profile: str) -> bool:
    """Return whether a process has ended before it had logged all of its cells."""
    return _due_file(profile).exists()


def _due_file(profile: str) -> Path:
    return Path("logs", profile, "mlflow-due")


def store_uri() -> str:
    """Return where the project in the current folder logs its runs."""
    return os.environ.get(TRACKING_URI) or database.address(Path.cwd() / "mlflow.db")


def find_experiment() -> str | None:
    """Return the id of the experiment in which cells are logged; None if there is none yet, UserError if deleted."""
    uri, experiment = store_uri(), None
    if not database.is_absent(uri):
        with _usable(uri) as mlflow:
            experiment = mlflow.MlflowClient(uri).get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    if experiment.lifecycle_stage == "deleted":
        raise UserError(f"experiment {EXPERIMENT} in {shown(uri)} is deleted; `schoenbat-exp log` restores it")
    return str(experiment.experiment_id)


@dataclass
class _Runs:
    """The runs of the cells of a profile, below `parent`."""

    client: "MlflowClient"
    experiment: str
    profile: str
    parent: str = ""

    def find(self, tags: Mapping[str, str]) -> "list[Run]":
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
        return list(self.client.search_runs([self.experiment], query))

    def log(self, cell: str) -> None:
        """Log a cell if it is finished and MLflow lacks anything of it.

        A run with other numbers, since the cell was trained again, is deleted.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param

        results = CellResults(self.profile, cell)
        metrics = results.metrics()
        if metrics is None:
            self.log_replaced(Replaced(self.profile, cell))
            return
        figures = _figures(results, metrics)
        identity = {"mlflow.parentRunId": self.parent, "cell": cell, "fingerprint": str(metrics.fingerprint)}
        run: Run | None = None
        for found in self.find(identity):
            held = found.data.metrics
            if run is not None or any(held.get(name, value) != value for name, value in figures.items()):
                self.client.delete_run(found.info.run_id)
            elif found.info.status == "FINISHED" and figures.keys() <= held.keys():
                return
            else:
                run = found
        trained, no_model = None, ""
        try:
            trained = load_trained(cell, self.profile)
        except UserError as error:
            no_model = str(error)
        took = asdict(resources) if (resources := results.resources()) else {}
        milliseconds = int(1000 * took.get("seconds", 0))
        if run is None:
            began, tags = int(1000 * time.time()) - milliseconds, identity | _tags(metrics, no_model)
            run = self.client.create_run(self.experiment, began, tags, _name(metrics))
        number, began = run.info.run_id, run.info.start_time
        # MLflow's comparison begins with what was logged first, shows what is under system/ last, and draws bars of
        # what has no step but 0.
        logged = [Metric(name, row[name], began, int(row["step"])) for row in results.curve() for name in _CURVES]
        used = {f"system/{name}": value for name, value in took.items() if not isinstance(value, str)}
        logged += [Metric(name, value, began, 0) for name, value in (figures | used).items()]
        data = Dataset(metrics.task, metrics.fingerprint.data[:36], "local", metrics.data)
        self.client.log_inputs(number, [DatasetInput(data, [InputTag("mlflow.data.context", "train, dev, test")])])
        self.client.log_batch(number, params=[Param(*item) for item in _params(metrics, trained).items()])
        for first in range(0, len(logged), _MOST_METRICS):
            self.client.log_batch(number, logged[first : first + _MOST_METRICS])
        if trained is not None:
            self.client.log_artifact(number, str(results.best))
            if not (run.outputs and run.outputs.model_outputs):
                made = self.client.create_logged_model(self.experiment, cell, number)
                with tempfile.TemporaryDirectory() as folder:
                    trained.classifier.save_pretrained(Path(folder, "model"))
                    self.client.log_model_artifacts(made.model_id, f"{folder}/model")
                self.client.finalize_logged_model(made.model_id, "READY")
                self.client.log_outputs(number, [LoggedModelOutput(made.model_id, 0)])
        self.client.set_terminated(number, "FINISHED", began + milliseconds)

    def log_replaced(self, results: Replaced) -> None:
        """Log a cell of `trained.cells` if it is measured and MLflow lacks it."""
        from mlflow.entities import Metric, Param

        if (found := results.read()) is None:
            return
        rows, about = found
        made_from = str(Fingerprint(**about["fingerprint"]))
        identity = {"mlflow.parentRunId": self.parent, "cell": results.cell, "fingerprint": made_from}
        known = self.find(identity)
        if any(run.info.status == "FINISHED" for run in known):
            return
        for run in known:
            self.client.delete_run(run.info.run_id)
        tags = identity | {"git_sha": about["git_revision"], "torch": about["torch"], "device": about["device"]}
        run = self.client.create_run(self.experiment, None, tags, results.cell)
        model, _, method = results.cell.partition("-")
        params = {"profile": self.profile, "model": model, "method": method, "draws": about["draws"]}
        means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
        if heads := about["heads"]:
            means |= {"share_median": statistics.median(heads), "share_worst": min(heads)}
        logged = [Metric(name, mean, run.info.start_time, 0) for name, mean in means.items()]
        self.client.log_batch(run.info.run_id, logged, [Param(name, str(value)) for name, value in params.items()])
        self.client.set_terminated(run.info.run_id, "FINISHED")


def _figures(results: CellResults, metrics: Metrics) -> dict[str, float]:
    """Return the numbers of the best weights, in which two trainings differ."""
    names = ("best_step", "best_dev_accuracy", "best_dev_loss", "num_parameters")
    figures = {name: float(getattr(metrics, name)) for name in names}
    if (test := results.test()) is not None and test.fingerprint == metrics.fingerprint:
        figures |= {"test_accuracy": test.accuracy, "test_loss": test.loss}
    return figures


def _name(metrics: Metrics) -> str:
    """Return the name of a run, with what tells cells apart first: MLflow cuts names in its legends."""
    parts = metrics.attn, metrics.dotf, metrics.former, metrics.task, metrics.seed
    return " ".join(str(part) for part in parts if part is not None)


def _tags(metrics: Metrics, no_model: str) -> dict[str, str]:
    tags = {
        "git_sha": metrics.git_revision,
        "torch": metrics.torch,
        "device": metrics.device,
        "mlflow.source.name": "schoenbat-exp train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": metrics.git_revision,
        "mlflow.note.content": f"One cell. Train it again: `schoenbat-exp run --cell {metrics.cell} --force`",
        "no_model": no_model,
    }
    return {name: value for name, value in tags.items() if value}


def _params(metrics: Metrics, trained: TrainedCell | None) -> dict[str, str]:
    """Return the cell and its settings by names that MLflow takes."""
    # MLflow's comparison begins with the first parameters by name: so those are what the grid is made of.
    axes = {name: getattr(metrics, name) for name in ("profile", "task", "attn", "dotf", "former", "seed")}
    params = axes | {"dotf": metrics.dotf or "none"}
    for name, value in (flat(trained.description) if trained else {}).items():
        if name not in (*axes, "best_step") and value is not None:
            params[re.sub(r"[^\w\-.: ]", "_", f"settings.{name}")[:250]] = value
    return {name: str(value) for name, value in params.items()}


def _checkout_id(path: Path) -> str:
    """Return a random name of this checkout, kept in a file, so that two checkouts on one server share no runs."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


@contextlib.contextmanager
def _usable(uri: str) -> Iterator[ModuleType]:
    """Yield MLflow, and raise UserError for whatever it, its drivers and the network raise in the block."""
    try:
        yield import_mlflow()
    except UserError:
        raise
    except Exception as error:
        # MLflow's own texts can be pages long.
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        reason = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        raise UserError(f"MLflow cannot use {shown(uri)}: {reason}") from error


@functools.cache
def import_mlflow() -> ModuleType:
    """Return MLflow, which neither reports home nor chats; importing it takes seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # A connection that is kept writes into a database that has been deleted, without an error.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    import mlflow

    # It logs an error with its traceback before it raises it; the message says what matters.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow


def shown(uri: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)
