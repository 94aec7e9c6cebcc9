"""What a grid and its cells record in MLflow; the only importer of mlflow.

The database is `mlflow.db` in the project's folder, or whatever MLFLOW_TRACKING_URI names. There is one experiment, in
it one parent run per profile of this checkout, and below that one run per cell. Who starts a grid calls `start_grid`
once, hands its result to the environment of the children, and calls `end_grid`; a cell that is started alone does the
same for itself. All first use happens under a file lock, because MLflow's migrations fail when several processes meet a
new database.

A cell has one run for each fingerprint (code, data and params), however often it is interrupted, fails or is trained
again, and what the run already holds is not logged a second time. MLflow is for browsing: reports never read it.

A server may be away for a while. During training an evaluation that cannot be logged is kept and sent with a later one;
at the start and at the end of a cell, where there is nothing better to do, it is waited for. A grid does not begin with
an MLflow that cannot be used; later on, what cannot be logged is said, and the cell goes on without.
"""

import copy
import dataclasses
import errno
import importlib.metadata
import os
import platform
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from filelock import FileLock

from pipeline import database
from pipeline.files import git_revision
from pipeline.grid.cells import Cell
from pipeline.quiet_mlflow import import_mlflow
from pipeline.stopping import Stopped
from pipeline.text import counted
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

    from schoenbat.lra.encoder import Classifier
    from schoenbat.lra.training import Evaluation

EXPERIMENT = "schoenbat"
EXPERIMENT_ID = "SCHOENBAT_MLFLOW_EXPERIMENT_ID"
PARENT_RUN_ID = "SCHOENBAT_MLFLOW_PARENT_RUN_ID"
TRACKING_URI = "MLFLOW_TRACKING_URI"

PATIENCE_SECONDS = 300.0
"""How long a server is waited for at the start and at the end of a cell."""
_PAUSE_SECONDS = 3.0
_SHOWN_RUNS = 1000

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
    uri = os.environ.get(TRACKING_URI) or database.default_uri(root)
    mlflow = import_mlflow()
    folder = root / "logs"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "mlflow.lock"):
        tags = {"kind": "grid", "profile": profile, "checkout": _checkout_id(folder)}
        artifacts = (root / "mlruns").as_uri() if uri.startswith("sqlite:") else None
        with _usable(uri):
            if uri == database.default_uri(root):
                database.ensure(root, lambda new: _experiment_id(mlflow.MlflowClient(new), artifacts))
            mlflow.set_tracking_uri(uri)
            client = mlflow.MlflowClient()
            experiment = _experiment_id(client, artifacts)
            run = _only_run(client, experiment, tags, f"grid {profile}")
            if run.info.status != "RUNNING":
                client.update_run(run.info.run_id, status="RUNNING")
    return {TRACKING_URI: uri, EXPERIMENT_ID: experiment, PARENT_RUN_ID: run.info.run_id}


def describe_store(root: Path) -> str | None:
    """Where the runs of the project in `root` are recorded, and how many there are; None for a database yet to be made.

    Raises:
        UserError: the tracking server or database cannot be used.
    """
    uri = os.environ.get(TRACKING_URI) or database.default_uri(root)
    with _usable(uri):
        if _is_gone(uri):
            return None
        client = import_mlflow().MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        runs = client.search_runs([experiment.experiment_id], max_results=_SHOWN_RUNS) if experiment else []
    number = f"{len(runs)} or more runs" if len(runs) == _SHOWN_RUNS else counted(len(runs), "run")
    return f"{number} in {_without_password(uri)}"


def find_experiment(uri: str) -> str:
    """The id of the experiment in which cells are recorded.

    Raises:
        UserError: nothing is recorded there yet, or MLflow cannot use it.
    """
    with _usable(uri):
        experiment = None if _is_gone(uri) else import_mlflow().MlflowClient(uri).get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        raise UserError(f"nothing is recorded in {_without_password(uri)} yet; run a grid first")
    return str(experiment.experiment_id)


def end_grid(grid: Mapping[str, str], status: str) -> None:
    """End the parent run of a grid.

    Args:
        grid: what `start_grid` returned.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    try:
        _check_database(grid[TRACKING_URI])
        import_mlflow().MlflowClient(grid[TRACKING_URI]).set_terminated(grid[PARENT_RUN_ID], status)
    except _errors() as error:
        print(f"warning: the end of the grid is not logged in MLflow: {_reason(error)}", flush=True)


@contextmanager
def cell_run(cell: Cell, fingerprint: str, profile: str, params: Mapping[str, Scalar]) -> Iterator["CellRun"]:
    """The run of a cell, in which it is trained.

    The run ends as FINISHED, as KILLED when it is stopped, and as FAILED on any other exception, which goes on.

    Args:
        cell: what is trained.
        fingerprint: identifies code, data and params of the cell; with other ones it has another run.
        profile: the name of the profile.
        params: settings, flat; they become parameters `settings.*`.
    """
    # MLflow's comparison begins with the first parameters by name: so those are what the grid is made of.
    axes: dict[str, Scalar] = {"profile": profile, **dataclasses.asdict(cell), "dotf": cell.dotf or "none"}
    settings = {f"settings.{name}": value for name, value in params.items() if name not in axes}
    revision = git_revision()
    tags = {
        "git_sha": revision,
        "dvc_stage": os.environ.get("DVC_STAGE", ""),
        "mlflow.source.name": "schoenbat-exp train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": revision,
        "mlflow.note.content": f"One cell. Train it again: `schoenbat-exp run --cell {cell.id} --force`",
    }

    def describe(client: "MlflowClient", run: "Run") -> None:
        if not client.list_artifacts(run.info.run_id):
            client.log_text(run.info.run_id, _installed_packages(), "environment.txt")
        _describe(client, run, {**axes, **settings}, tags)

    with _opened(cell, fingerprint, profile, describe) as opened:
        yield opened


@contextmanager
def attach(cell: Cell, fingerprint: str, profile: str) -> Iterator["CellRun"]:
    """The run of a trained cell, to add what was found out after the training."""
    with _opened(cell, fingerprint, profile, lambda client, run: None) as opened:
        yield opened


@contextmanager
def _opened(
    cell: Cell, fingerprint: str, profile: str, describe: Callable[["MlflowClient", "Run"], None]
) -> Iterator["CellRun"]:
    """The run of a cell, described, which gets the status that fits how the block ends."""
    mlflow = import_mlflow()
    alone = not all(name in os.environ for name in (TRACKING_URI, EXPERIMENT_ID, PARENT_RUN_ID))
    grid: Mapping[str, str] = start_grid(profile) if alone else os.environ
    opened = CellRun(grid[TRACKING_URI])

    def open_run() -> None:
        _check_database(grid[TRACKING_URI])
        mlflow.set_tracking_uri(grid[TRACKING_URI])
        client = mlflow.MlflowClient()
        tags = {"mlflow.parentRunId": grid[PARENT_RUN_ID], "cell": cell.id, "fingerprint": fingerprint}
        run = _only_run(client, grid[EXPERIMENT_ID], tags, _name(cell))
        describe(client, run)
        opened.open(client, run.info.run_id)

    opened.do(open_run)
    status = "FAILED"
    try:
        yield opened
        status = "FINISHED"
    except (KeyboardInterrupt, Stopped):
        status = "KILLED"
        raise
    finally:
        opened.close(status)
        if alone:
            end_grid(grid, status)


class CellRun:
    """The run of a cell; where MLflow cannot be used it takes everything and logs nothing.

    Attributes:
        run_id: None until the run is open.
    """

    def __init__(self, uri: str) -> None:
        self.run_id: str | None = None
        self._uri = uri
        self._given_up = False
        self._kept: dict[int, Evaluation] = {}
        self._unsure = False

    def open(self, client: "MlflowClient", run_id: str) -> None:
        """Make a run of MLflow the one that is logged to, and mark it as running."""
        self._client, self._run_id = client, run_id
        client.update_run(run_id, status="RUNNING")
        self._held = self._evaluations_held()
        self.run_id = run_id

    def close(self, status: str) -> None:
        """Mark the run as ended."""
        self.do(lambda: self._client.set_terminated(self._run_id, status))

    def do(self, action: Callable[[], object]) -> None:
        """Do something with MLflow, patiently. If it cannot be done, that is said, and nothing more is tried."""
        if self._given_up:
            return
        try:
            _patiently(action, self._uri)
        except _errors() as error:
            self._given_up = True
            where = _without_password(self._uri)
            print(
                f"warning: MLflow at {where} cannot be used, so nothing is logged there: {_reason(error)}", flush=True
            )

    def log_evaluation(self, evaluation: "Evaluation") -> None:
        """Log one row of the learning curve, and what could not be logged before; keep it if MLflow cannot be reached.

        What the run already holds is left alone.
        """
        if self._given_up:
            return
        self._kept[evaluation.step] = evaluation
        try:
            self._send()
        except _errors() as error:
            kept = counted(len(self._kept), "evaluation")
            print(f"MLflow cannot be reached, {kept} kept for later: {_reason(error)}", flush=True)

    def log_evaluations(self, evaluations: "Sequence[Evaluation]") -> None:
        """Make the run hold every row of a finished learning curve, whatever became of them on the way."""
        self._kept = {evaluation.step: evaluation for evaluation in evaluations}
        self.do(self._send)

    def _send(self) -> None:
        if self._unsure:
            # A call that failed may have arrived all the same.
            self._held = self._evaluations_held()
        self._unsure = True
        for step, evaluation in sorted(self._kept.items()):
            # On a GPU a training that is repeated can end up with slightly other numbers, which are logged as well.
            if (step, evaluation.dev_accuracy) not in self._held:
                self._client.log_batch(self._run_id, metrics=_metrics(_curves(evaluation), step))
                self._held.add((step, evaluation.dev_accuracy))
        self._kept.clear()
        self._unsure = False

    def _evaluations_held(self) -> set[tuple[int, float]]:
        history = self._client.get_metric_history(self._run_id, "dev_accuracy")
        return {(metric.step, metric.value) for metric in history}

    def log(self, values: Mapping[str, Scalar]) -> None:
        """Log numbers as metrics and words as tags; what the run already holds is left alone.

        All are at step 0: MLflow draws bars of what has no other step, and else a point.
        """

        def log_once() -> None:
            held = self._client.get_run(self._run_id).data
            known = {**held.metrics, **held.tags}
            new = {name: value for name, value in values.items() if known.get(name) != value}
            words = {name: value for name, value in new.items() if isinstance(value, str)}
            numbers = {name: value for name, value in new.items() if isinstance(value, int | float)}
            self._client.log_batch(self._run_id, metrics=_metrics(numbers, step=0), tags=_tags(words))

        self.do(log_once)

    def log_model(self, model: "Classifier", best_path: Path, *, name: str, num_texts: int, num_classes: int) -> None:
        """Log the trained model so that MLflow's `load_model` reads it anywhere, and the file `best.pt` as it is.

        The library's source travels with the model, and the model is stored on the CPU in evaluation mode. Its
        signature is that of `model(tokens)`.

        Args:
            name: of the model in MLflow.
            num_texts, num_classes: of the task.
        """
        import mlflow.pytorch
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        import schoenbat

        positions = (-1,) if model.encoder.per_position else ()
        tokens = TensorSpec(np.dtype(np.int64), (-1, num_texts, -1))
        logits = TensorSpec(np.dtype(np.float32), (-1, *positions, num_classes))
        signature = ModelSignature(Schema([tokens]), Schema([logits]))
        # A text of eight tokens, and padding.
        example = np.zeros((1, num_texts, 64), dtype=np.int64)
        example[..., :8] = 1

        def log_once() -> None:
            logged = self._client.get_run(self._run_id).outputs
            if logged and logged.model_outputs:
                return
            # It ends the run, which does no harm: what is logged later goes to the same.
            with mlflow.start_run(run_id=self._run_id):
                mlflow.pytorch.log_model(
                    copy.deepcopy(model).cpu().eval(),
                    name=name,
                    signature=signature,
                    input_example=example,
                    serialization_format="pickle",
                    pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "numpy")],
                    code_paths=[str(Path(schoenbat.__file__).parent)],
                )

        self.do(log_once)
        self.do(lambda: self._client.log_artifact(self._run_id, str(best_path)))


def _name(cell: Cell) -> str:
    """Of a run, with what tells cells apart first: MLflow cuts names in its legends."""
    return " ".join(str(part) for part in (cell.attn, cell.dotf, cell.former, cell.task, cell.seed) if part is not None)


def _curves(evaluation: "Evaluation") -> dict[str, float]:
    """The metrics of one evaluation. MLflow's comparison begins with the first that was logged."""
    values = dataclasses.asdict(evaluation)
    ordered = ("dev_accuracy", "dev_loss", "train_accuracy", "train_loss", "epoch", "learning_rate")
    return {name: values[name] for name in ordered}


def _is_gone(uri: str) -> bool:
    """Whether there is no such database on this machine: MLflow would begin to make another."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file()


def _check_database(uri: str) -> None:
    """Raise FileNotFoundError for a database that has gone."""
    if _is_gone(uri):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri.removeprefix("sqlite:///"))


@contextmanager
def _usable(uri: str) -> Iterator[None]:
    """What MLflow raises in the block where it cannot be used becomes a UserError."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"MLflow cannot use {_without_password(uri)}: {error}") from error
    except _errors() as error:
        raise UserError(f"MLflow cannot use {_without_password(uri)}: {_reason(error)}") from error


def _errors() -> tuple[type[Exception], ...]:
    """What MLflow raises where it cannot be used."""
    import requests
    import sqlalchemy.exc

    mlflow = import_mlflow()
    return mlflow.exceptions.MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError


def _reason(error: Exception) -> str:
    """In one line; MLflow's own texts can be pages long."""
    text = str(getattr(error, "orig", None) or error)
    if "database or disk is full" in text:
        return os.strerror(errno.ENOSPC)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return next(iter(text.splitlines()), "") or type(error).__name__


def _without_password(uri: str) -> str:
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)


def _patiently(action: Callable[[], T], uri: str) -> T:
    """Do something with MLflow, and while it cannot be reached, again; the last error after PATIENCE_SECONDS."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            return action()
        except _errors() as error:
            if not _is_passing(error, uri) or time.monotonic() > give_up:
                raise
            if not told:
                print(f"waiting for MLflow at {_without_password(uri)}: {_reason(error)}", flush=True)
                told = True
            time.sleep(_PAUSE_SECONDS)


def _is_passing(error: Exception, uri: str) -> bool:
    """Whether it may help to try again: MLflow gives errors of the network and of the database the same class."""
    if uri.startswith("sqlite:"):
        return "database is locked" in str(error)
    if isinstance(error, OSError) and not hasattr(error, "response"):
        return False
    code = getattr(error, "error_code", None)
    return code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", None)


def _experiment_id(client: "MlflowClient", artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, artifact_location=artifacts)


def _only_run(client: "MlflowClient", experiment: str, tags: dict[str, str], name: str) -> "Run":
    """The one run with these tags, which is made if there is none."""
    query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in tags.items())
    runs = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
    for empty in runs[1:]:
        # Its making was said to have failed, so another one was made.
        client.delete_run(empty.info.run_id)
    return runs[0] if runs else client.create_run(experiment, tags=tags, run_name=name)


def _describe(client: "MlflowClient", run: "Run", params: Mapping[str, Scalar], tags: Mapping[str, str]) -> None:
    """Log the params that the run does not hold yet (MLflow never changes one) and set its tags."""
    import torch
    from mlflow.entities import Param

    held = run.data.params
    named = {_fit_name(key): value for key, value in params.items() if value is not None}
    new = [Param(key, str(value)) for key, value in named.items() if key not in held]
    environment = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
    client.log_batch(
        run.info.run_id,
        params=new,
        tags=_tags({**environment, **tags}),
    )


def _fit_name(name: str) -> str:
    """A name that MLflow takes: letters, digits and _ - . : / and spaces, in the form of a path without detours."""
    fit = re.sub(r"[^\w\-.:/ ]", "_", name)[:250]
    return fit if posixpath.normpath(fit) == fit and not fit.startswith(("/", "..")) else fit.replace("/", "_")


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
