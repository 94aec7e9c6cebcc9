"""What a grid and its cells record in MLflow; the only importer of mlflow.

The database is `mlflow.db` in the project's folder, or whatever MLFLOW_TRACKING_URI names. There is one experiment, in
it one parent run per profile of this checkout, and below that one run per cell. Who starts a grid calls `start_grid`
once and hands its result to the environment of the children; a cell that is started alone does the same for itself. All
first use happens under a file lock, because MLflow's migrations fail when several processes meet a new database.

A run that was interrupted is continued when its cell is started again with the same fingerprint (code, data and
params), and an evaluation that it already holds is not logged a second time. A run that ended but was never tested
counts as interrupted: DVC has no record of it, or its test would have followed. MLflow is for browsing: reports never
read it.

A server may be away for a while. During training an evaluation that cannot be logged is kept and sent with a later one;
at the start and at the end of a cell, where there is nothing better to do, it is waited for.
"""

import copy
import dataclasses
import errno
import importlib.metadata
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from pipeline.files import git_revision
from pipeline.grid.cells import Cell
from pipeline.quiet_mlflow import import_mlflow
from pipeline.stopping import Stopped
from schoenbat.errors import UserError

if TYPE_CHECKING:
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

    from schoenbat.training import Evaluation

EXPERIMENT = "schoenbat"
EXPERIMENT_ID = "SCHOENBAT_MLFLOW_EXPERIMENT_ID"
PARENT_RUN_ID = "SCHOENBAT_MLFLOW_PARENT_RUN_ID"
TRACKING_URI = "MLFLOW_TRACKING_URI"

PATIENCE_SECONDS = 300.0
"""How long a server is waited for at the start and at the end of a cell."""
_PAUSE_SECONDS = 3.0
_TESTED = "test_accuracy"

Scalar = str | int | float | bool | None
T = TypeVar("T")


def start_grid(profile: str, root: Path | None = None) -> dict[str, str]:
    """Create, or find again, the experiment and the parent run of a profile.

    Args:
        profile: the name of the profile.
        root: the project's folder; the current one by default.

    Returns:
        The environment that lets child processes log below that run.

    Raises:
        UserError: the tracking server or database cannot be used.
    """
    root = (root or Path.cwd()).resolve()
    uri = os.environ.get(TRACKING_URI) or f"sqlite:///{root / 'mlflow.db'}"
    mlflow = import_mlflow()
    folder = root / "logs"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "mlflow.lock"):
        tags = {"kind": "grid", "profile": profile, "checkout": _checkout_id(folder)}
        try:
            mlflow.set_tracking_uri(uri)
            client = mlflow.MlflowClient()
            experiment = _experiment_id(client, (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None)
            found = _newest_run(client, experiment, tags)
            run = found or client.create_run(experiment, tags=tags, run_name=f"grid {profile}")
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"MLflow cannot use {uri}: {str(error).splitlines()[0]}") from error
    return {TRACKING_URI: uri, EXPERIMENT_ID: experiment, PARENT_RUN_ID: run.info.run_id}


@contextmanager
def cell_run(cell: Cell, fingerprint: str, profile: str, params: Mapping[str, Scalar]) -> Iterator["CellRun"]:
    """The run in which a cell is trained: the interrupted one of the same fingerprint if there is one, else a new one.

    The run ends as FINISHED, as KILLED when it is stopped, and as FAILED on any other exception, which goes on; an
    error of MLflow itself as an OSError.

    Args:
        cell: what is trained.
        fingerprint: identifies code, data and params of the cell; only a run that has the same is continued.
        profile: the name of the profile.
        params: further parameters, flat.
    """
    with _errors_as_one_line():
        client, experiment, parent = _patiently(lambda: _connect(profile))
        identity = _identity(cell, fingerprint, parent)
        axes: dict[str, Scalar] = {"profile": profile, **dataclasses.asdict(cell)}
        tags = {"git_sha": git_revision(), "dvc_stage": os.environ.get("DVC_STAGE", "")}

        def open_run() -> CellRun:
            run = _newest_run(client, experiment, identity)
            if run is None or (run.info.status == "FINISHED" and _TESTED in run.data.metrics):
                run = client.create_run(experiment, tags=identity, run_name=cell.id)
            if not client.list_artifacts(run.info.run_id):
                client.log_text(run.info.run_id, _installed_packages(), "environment.txt")
            _describe(client, run, {**axes, **params}, tags)
            return CellRun(client, run.info.run_id)

        opened = _patiently(open_run)
        with _active(opened.run_id):
            yield opened


@contextmanager
def attach(cell: Cell, fingerprint: str, profile: str) -> Iterator["CellRun"]:
    """The newest run of a trained cell, to add what was found out after the training; it is made if there is none."""
    with _errors_as_one_line():
        client, experiment, parent = _patiently(lambda: _connect(profile))
        run = _patiently(lambda: _newest_run(client, experiment, _identity(cell, fingerprint, parent)))
        if run is None:
            with cell_run(cell, fingerprint, profile, {}) as made:
                yield made
            return
        run_id = run.info.run_id
        with _active(run_id):
            yield _patiently(lambda: CellRun(client, run_id))


class CellRun:
    """One open run of a cell."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._kept: dict[int, Evaluation] = {}
        self._unsure = False
        self._logged_steps = self._held_steps()

    def log_evaluation(self, evaluation: "Evaluation") -> None:
        """Log one row of the learning curve, and what could not be logged before; keep it if MLflow cannot be reached.

        A step that the run already holds is left alone.
        """
        self._kept[evaluation.step] = evaluation
        try:
            self._send()
        except import_mlflow().exceptions.MlflowException as error:
            reason = str(error).splitlines()[0]
            print(f"MLflow cannot be reached, {len(self._kept)} evaluations are kept for later: {reason}", flush=True)

    def log_evaluations(self, evaluations: "Sequence[Evaluation]") -> None:
        """Make the run hold every row of a finished learning curve, whatever became of them on the way."""
        self._kept = {evaluation.step: evaluation for evaluation in evaluations}
        _patiently(self._send)

    def _send(self) -> None:
        if self._unsure:
            # A call that failed may have arrived all the same.
            self._logged_steps = self._held_steps()
        self._unsure = True
        for step, evaluation in sorted(self._kept.items()):
            if step not in self._logged_steps:
                values = dataclasses.asdict(evaluation)
                del values["step"]
                self._client.log_batch(self.run_id, metrics=_metrics(values, step))
                self._logged_steps.add(step)
        self._kept.clear()
        self._unsure = False

    def _held_steps(self) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self.run_id, "dev_accuracy")}

    def log_model(self, model: "torch.nn.Module", best_path: Path) -> None:
        """Log the trained model so that `mlflow.pytorch.load_model` reads it anywhere, and the file `best.pt` as it is.

        The library's source travels with the model, and the model is stored on the CPU in evaluation mode.
        """
        import mlflow.pytorch

        import schoenbat

        def log_once() -> None:
            logged = self._client.get_run(self.run_id).outputs
            if logged and logged.model_outputs:
                return
            mlflow.pytorch.log_model(
                copy.deepcopy(model).cpu().eval(),
                name="model",
                serialization_format="pickle",
                pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")],
                code_paths=[str(Path(schoenbat.__file__).parent)],
            )

        _patiently(log_once)
        self.log_artifact(best_path)

    def log_artifact(self, path: Path) -> None:
        """Log a file under its own name."""
        _patiently(lambda: self._client.log_artifact(self.run_id, str(path)))

    def log_resources(self, resources: Mapping[str, Scalar]) -> None:
        """Log what the training took: numbers as metrics `resources.*`, the rest as tags of the same names."""
        numbers, words = {}, {}
        for name, value in resources.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                numbers[f"resources.{name}"] = value
            else:
                words[f"resources.{name}"] = str(value)
        metrics, tags = _metrics(numbers, step=0), _tags(words)
        _patiently(lambda: self._client.log_batch(self.run_id, metrics=metrics, tags=tags))

    def log_test(self, scores: Mapping[str, float]) -> None:
        """Log the scores on the test split, as metrics `test_*`."""
        values = {f"test_{name}": value for name, value in scores.items()}
        metrics = _metrics(values, step=0)

        def log_once() -> None:
            held = self._client.get_run(self.run_id).data.metrics
            if any(held.get(name) != value for name, value in values.items()):
                self._client.log_batch(self.run_id, metrics=metrics)

        _patiently(log_once)


def _connect(profile: str) -> tuple["MlflowClient", str, str]:
    """A client, the experiment's id and the parent run's id, as handed down or else set up here."""
    handed_down = all(name in os.environ for name in (TRACKING_URI, EXPERIMENT_ID, PARENT_RUN_ID))
    grid = dict(os.environ) if handed_down else start_grid(profile)
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(grid[TRACKING_URI])
    return mlflow.MlflowClient(), grid[EXPERIMENT_ID], grid[PARENT_RUN_ID]


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    """MLflow's errors, which can be pages long, as an OSError that says where and why."""
    mlflow = import_mlflow()
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        reason = str(error).splitlines()[0]
        raise OSError(errno.EIO, f"MLflow at {mlflow.get_tracking_uri()}: {reason}") from error


def _patiently(action: Callable[[], T]) -> T:
    """Do something with MLflow, and while it cannot be reached, again; the last error after PATIENCE_SECONDS."""
    import requests

    mlflow = import_mlflow()
    give_up = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            return action()
        except (mlflow.exceptions.MlflowException, requests.RequestException) as error:
            if not _is_passing(error) or time.monotonic() > give_up:
                raise
            if not told:
                print(f"waiting for MLflow at {mlflow.get_tracking_uri()}: {str(error).splitlines()[0]}", flush=True)
                told = True
            time.sleep(_PAUSE_SECONDS)


def _is_passing(error: Exception) -> bool:
    """Whether it may help to try again: MLflow gives errors of the network and of the database the same class."""
    code = getattr(error, "error_code", None)
    return code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", None)


@contextmanager
def _active(run_id: str) -> Iterator[None]:
    """Make a run MLflow's active one, and close it with the status that fits how the block ended."""
    mlflow = import_mlflow()
    _patiently(lambda: mlflow.start_run(run_id=run_id))
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        _patiently(lambda: mlflow.end_run(status))


def _experiment_id(client: "MlflowClient", artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, artifact_location=artifacts)


def _newest_run(client: "MlflowClient", experiment: str, tags: Mapping[str, str]) -> "Run | None":
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    runs = client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None


def _identity(cell: Cell, fingerprint: str, parent: str) -> dict[str, str]:
    return {"mlflow.parentRunId": parent, "cell": cell.id, "fingerprint": fingerprint}


def _describe(client: "MlflowClient", run: "Run", params: Mapping[str, Scalar], tags: Mapping[str, str]) -> None:
    """Log the params that the run does not hold yet (MLflow never changes one) and set its tags."""
    import torch
    from mlflow.entities import Param

    held = run.data.params
    new = [Param(key, str(value)) for key, value in params.items() if value is not None and key not in held]
    environment = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
    client.log_batch(
        run.info.run_id,
        params=new,
        tags=_tags({**environment, **tags}),
    )


def _metrics(values: Mapping[str, float], step: int) -> list["Metric"]:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def _tags(values: Mapping[str, str]) -> list:
    from mlflow.entities import RunTag

    return [RunTag(name, value) for name, value in values.items()]


def _checkout_id(folder: Path) -> str:
    """A random name of this checkout, kept in a file, so that two checkouts on one server do not share runs."""
    path = folder / "mlflow-checkout"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def _installed_packages() -> str:
    described = (package.metadata for package in importlib.metadata.distributions())
    found = {f"{metadata['Name']}=={metadata['Version']}" for metadata in described}
    return "\n".join(sorted(found, key=str.lower)) + "\n"
