"""Stage `train`: one cell, from prepared data to its best weights, its learning curve and its figures."""

import contextlib
import dataclasses
import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import torch

from pipeline.grid.cells import Cell, data_meta, settings
from pipeline.grid.code import check_code
from pipeline.grid.freshness import CODE_VARIABLE, Freshness, data_folder
from pipeline.grid.numerics import component_digests
from pipeline.grid.params import Params, cell_training, task_section
from pipeline.grid.results import CellResults, Fingerprint, Metrics, Resources
from pipeline.grid.settings import PARAMS_FILE, params_file, read_yaml
from pipeline.host.devices import describe_device, get_device, prepare_host
from pipeline.host.files import git_revision, locked, remove_unfinished
from pipeline.host.heartbeat import HEARTBEAT_VARIABLE, STAGE_VARIABLE
from pipeline.host.progress import Meter, ProgressFile
from pipeline.host.stopping import Stopped, stop_request
from pipeline.mlflow import tracking
from schoenbat.errors import OutOfMemory, TrainingStopped, UserError
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.encoder import Classifier, build_model
from schoenbat.lra.training import Evaluation, FitResult, OtherCheckpoint, StepReport, fit, save_model


def run(params: Params, cell: Cell, *, device_name: str, save: bool, restart: bool, force: bool) -> None:
    """Train `cell` unless its training is up to date; a run that was interrupted goes on from its checkpoint.

    A checkpoint of another configuration is set aside.

    SIGINT and SIGTERM end it at the next step, with a checkpoint.

    Writes the weights, the curve and, last, the metrics of the cell, each complete or not at all; then the checkpoint
    goes. With `save` false nothing is written or logged.

    Args:
        restart: discard a checkpoint of an interrupted run.
        force: train again what is up to date.

    Raises:
        UserError: the data is not prepared, the device is not there, the checkpoint is unreadable, or the code is not
            that of the start of the grid.
        TrainingFailed: the loss is no longer a number.
        OutOfMemory: the device's memory does not suffice.
        Stopped: by a signal; the checkpoint is written.
    """
    device = get_device(device_name)
    prepare_host(params.run.threads)
    training = _Training(params, cell, device)
    if save and not force and training.is_up_to_date():
        print(f"{cell.id}: up to date; --force trains it again", flush=True)
        return
    print(f"{cell.id}: {training.meta['label']}, {device}, {training.num_parameters} parameters", flush=True)
    result = training.keep(restart=restart) if save else training.fit()
    print(
        f"{cell.id}: dev accuracy {result.best_dev_accuracy:.4f} (step {result.best_step} of {result.steps_run}), "
        f"{result.seconds:.1f} s of training"
    )


def model_of(cell: Cell, params: Params, meta: dict[str, Any]) -> Classifier:
    """Return the model of `cell` with its initial weights."""
    section = settings(cell, params)
    return build_model(
        vocab_size=meta["vocab_size"],
        num_classes=meta["num_classes"],
        num_texts=meta["num_texts"],
        max_length=meta["max_length"],
        model=task_section(params, cell.task).model,
        attn=cell.attn,
        attention=section["attention"],
        dotf=cell.dotf,
        former=cell.former,
        former_config=params.former[cell.former],
        seed=cell.seed,
        per_position=meta["per_position"],
        causal=meta["causal"],
    )


def description(cell: Cell, params: Params, meta: dict[str, Any]) -> dict[str, Any]:
    """Return what a file of weights says about itself: the cell, its settings and its data."""
    data = {key: meta[key] for key in ("vocab_size", "num_classes", "num_texts", "max_length", "fingerprint")}
    return {**dataclasses.asdict(cell), **settings(cell, params), "data": data}


def identify(cell: Cell, params: Params) -> Fingerprint:
    """Return what a result that this process computes for the cell is made from.

    The code is that which was imported: what changes in its files while the process runs does not concern it.

    Raises:
        UserError: the data has to be prepared first, or the code has changed since the grid started.
    """
    prepared = data_meta(cell, params)["fingerprint"]
    found = Freshness(read_yaml(params_file()), _imported_code).fingerprint(cell)
    if found is None or found.data != prepared:
        raise UserError(
            f"the data of {cell.task} is not what its code and settings make by now; make it again: "
            f"schoenbat-exp preprocess --task {cell.task}"
        )
    if os.environ.get(CODE_VARIABLE, found.code) != found.code:
        raise UserError(f"the code of {cell.id} has changed since the grid started; run again to use it as it is")
    return found


_imported_code = functools.cache(component_digests)
"""The code of this process: looked at once, when the first cell has imported it."""


class _Training:
    """One cell on a device: its model, its data, and what comes of training it."""

    def __init__(self, params: Params, cell: Cell, device: torch.device) -> None:
        self.params, self.cell, self.device = params, cell, device
        self.meta = data_meta(cell, params)
        self.dataset = Dataset(data_folder(params.profile, cell.task))
        self.model = model_of(cell, params, self.meta)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.identity = identify(cell, params)
        self.results = CellResults(params.profile, cell.id)
        self.checkpoint = cell.checkpoint_folder(params.profile) / "last.pt"

    def is_up_to_date(self) -> bool:
        return self.results.fingerprints()[0] == str(self.identity) and self.results.best.is_file()

    def keep(self, *, restart: bool) -> FitResult:
        """Train with a checkpoint, and write what comes of it, while no other process trains the cell."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{self.cell.id}: another process trains it; waiting for its end"
        with locked(self.checkpoint.with_name("train.lock"), lambda: print(waiting, flush=True)):
            if restart:
                self.checkpoint.unlink(missing_ok=True)
            remove_unfinished(self.checkpoint.parent)
            self.results.remove_unfinished()
            check_code()
            result = self._fit_and_write()
            self.checkpoint.unlink(missing_ok=True)
        if STAGE_VARIABLE in os.environ and HEARTBEAT_VARIABLE not in os.environ:
            self._check_unchanged()
        tracking.log_by_hand(self.params.profile, self.cell.id)
        return result

    def _fit_and_write(self) -> FitResult:
        described = description(self.cell, self.params, self.meta)
        stop = Event()
        with stop_request(stop.set):
            result = self.fit(self.checkpoint, stop.is_set)
            save_model(self.results.best, self.model, described | {"best_step": result.best_step})
            self.results.write_training(result.evaluations, self._resources(result), self._metrics(result))
        return result

    def fit(self, checkpoint: Path | None = None, stop: Callable[[], bool] | None = None) -> FitResult:
        """Train, and show how it goes; without a checkpoint nothing of it is written."""
        progress = None if checkpoint is None else ProgressFile(checkpoint.with_name("progress.json"), stage="train")
        with Meter(self.cell.id) as meter, _memory_watched(self.device):
            shown = _Shown(self.cell.id, self.device, meter, progress)
            try:
                return fit(
                    self.model,
                    self.dataset,
                    cell_training(self.params, self.cell),
                    seed=self.cell.seed,
                    device=self.device,
                    checkpoint=checkpoint,
                    fingerprint=str(self.identity),
                    on_step=shown.step,
                    on_evaluation=shown.evaluation,
                    stop=stop,
                )
            except TrainingStopped as error:
                raise Stopped(f"{self.cell.id}: stopped, and saved at step {error.step}") from None
            except OtherCheckpoint:
                assert checkpoint is not None
                aside = checkpoint.with_name("last.other.pt")
                checkpoint.replace(aside)
                print(f"{self.cell.id}: {checkpoint} is of other settings, code or data; now {aside.name}", flush=True)
                return self.fit(checkpoint, stop)
            except UserError as error:
                if checkpoint is None or not checkpoint.exists():
                    raise
                raise UserError(f"{error}, or pass --restart, which does so") from None

    def _check_unchanged(self) -> None:
        """DVC would put on record what is there now as what the results were made from."""
        if Freshness(read_yaml(PARAMS_FILE)).fingerprint(self.cell) != self.identity:
            raise UserError(f"code, settings or data of {self.cell.id} have changed while it was trained; run again")

    def _metrics(self, result: FitResult) -> Metrics:
        return Metrics(
            cell=self.cell.id,
            profile=self.params.profile,
            **dataclasses.asdict(self.cell),
            steps=result.steps_run,
            best_step=result.best_step,
            best_dev_accuracy=result.best_dev_accuracy,
            best_dev_loss=result.best_dev_loss,
            final_train_loss=result.final_train_loss,
            num_parameters=self.num_parameters,
            train_examples=self.meta["splits"]["train"],
            dev_examples=self.meta["splits"]["dev"],
            data=self.meta["label"],
            attention=self.params.attention[self.cell.attn],
            device=describe_device(self.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            git_revision=git_revision(),
            fingerprint=self.identity,
            state_bytes=self.model.state_bytes(self.meta["max_length"]) if self.meta["causal"] else None,
        )

    def _resources(self, result: FitResult) -> Resources:
        return Resources(
            device=describe_device(self.device),
            seconds=result.seconds,
            steps_per_second=result.steps_run / result.seconds,
            tokens_per_second=result.tokens / result.seconds,
            peak_memory_mb=result.peak_memory_mb,
            resumed=result.resumed,
        )


@dataclasses.dataclass(frozen=True)
class _Shown:
    """How a training goes, on the terminal and, if it is kept, in progress.json."""

    cell: str
    device: torch.device
    meter: Meter
    progress: ProgressFile | None

    def step(self, report: StepReport) -> None:
        if self.progress is not None and self.progress.is_due():
            used = {"memory_mb": _memory_mb(self.device), **_gpu_use(self.device)}
            self.progress.update(**dataclasses.asdict(report), **used)
        figures = f"loss {report.loss:.4f} accuracy {report.accuracy:.3f} {report.steps_per_second:.1f} steps/s"
        self.meter.update(report.step, report.steps, figures)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.meter.line(
            f"{self.cell}: step {evaluation.step} train loss {evaluation.train_loss:.4f} "
            f"dev loss {evaluation.dev_loss:.4f} dev accuracy {evaluation.dev_accuracy:.4f}"
        )
        if self.progress is not None:
            self.progress.update(dev_accuracy=evaluation.dev_accuracy)


@contextlib.contextmanager
def _memory_watched(device: torch.device) -> Iterator[None]:
    """Every form in which memory runs out becomes OutOfMemory."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"{device} has too little memory") from error
    except RuntimeError as error:
        # On the CPU torch raises a RuntimeError that only its text tells from others.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemory(f"{device} has too little memory: {str(error).splitlines()[0]}") from error


def _memory_mb(device: torch.device) -> float:
    """Return what this process takes now: on a GPU what torch holds of it, else its largest size so far."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _gpu_use(device: torch.device) -> dict[str, int]:
    """How busy the GPU is with all that runs on it; nothing where the driver does not tell, as for a part of a GPU."""
    if device.type != "cuda":
        return {}
    import pynvml

    try:
        return {"gpu_percent": torch.cuda.utilization(device)}
    except pynvml.NVMLError:
        return {}
