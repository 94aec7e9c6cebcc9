"""Stage `train`: one cell, from prepared data to its best weights, its learning curve and its figures."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import psutil
import torch

from pipeline.grid.cells import Cell, Setup, resolve
from pipeline.grid.checked import check_code
from pipeline.grid.freshness import CODE_VARIABLE, Freshness
from pipeline.grid.numerics import component_digests
from pipeline.grid.params import Params
from pipeline.grid.results import Fingerprint, Metrics, Resources
from pipeline.grid.settings import PARAMS_FILE, params_file, read_yaml
from pipeline.host.devices import describe_device, get_device, prepare_host
from pipeline.host.files import git_revision, locked, remove_unfinished
from pipeline.host.heartbeat import HEARTBEAT_VARIABLE, STAGE_VARIABLE
from pipeline.host.progress import Meter, ProgressFile
from pipeline.host.stopping import Stopped, stop_request
from pipeline.mlflow import tracking
from schoenbat.errors import OutOfMemory, TrainingStopped, UserError
from schoenbat.lra.encoder import Classifier
from schoenbat.lra.training import Evaluation, FitResult, OtherCheckpoint, StepReport, fit, save_model


def run(params: Params, cell: Cell, *, device_name: str, force: bool) -> None:
    """Train `cell` unless its training is up to date; a run that was interrupted goes on from its checkpoint.

    A checkpoint of another configuration, or one that cannot be read, is set aside. Writes the weights, the curve and,
    last, the metrics of the cell, each complete or not at all; then the checkpoint goes.

    Raises:
        TrainingFailed: the loss is no longer a number.
        OutOfMemory: the device's memory does not suffice.
        Stopped: by SIGINT or SIGTERM; the checkpoint is written.
    """
    device, setup = get_device(device_name), resolve(params, cell)
    made_from, results = identify(setup), setup.results
    if not force and results.fingerprints()[0] == str(made_from) and results.best.is_file():
        print(f"{cell.id}: up to date; --force trains it again", flush=True)
        return
    prepare_host(params.run.threads)
    training = _Training(setup, made_from, device, setup.build_model(setup.data.meta))
    print(f"{cell.id}: {setup.data.meta['label']}, {device}, {training.num_parameters} parameters", flush=True)
    result = training.keep()
    print(
        f"{cell.id}: dev accuracy {result.best_dev_accuracy:.4f} (step {result.best_step} of {result.steps_run}), "
        f"{result.seconds:.1f} s of training"
    )


def identify(setup: Setup) -> Fingerprint:
    """Return what a result that this process computes for a cell is made from.

    The code is that which was imported: what changes in its files while the process runs does not concern it.

    Raises:
        UserError: the data is not prepared, or other data would be made now, or the code has changed since the grid
            started.
    """
    cell, prepared = setup.cell, setup.data.meta["fingerprint"]
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
"""The code of this process: looked at once, for its first cell."""


@dataclass(frozen=True)
class _Training:
    """One cell on a device, and what comes of training it."""

    setup: Setup
    made_from: Fingerprint
    device: torch.device
    model: Classifier

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def keep(self) -> FitResult:
        """Train with a checkpoint, and write what comes of it, while no other process trains the cell."""
        cell, results, stop = self.setup.cell, self.setup.results, Event()
        checkpoint = results.checkpoint
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"{cell.id}: another process trains it; waiting for its end"
        with locked(checkpoint.with_name("train.lock"), lambda: print(waiting, flush=True)):
            remove_unfinished(checkpoint.parent)
            results.remove_unfinished()
            check_code()
            with stop_request(stop.set):
                result = self.fit(checkpoint, stop.is_set)
                described = self.setup.description() | {"best_step": result.best_step}
                save_model(results.best, self.model, described)
                results.write_training(result.evaluations, self._resources(result), self._metrics(result))
            checkpoint.unlink(missing_ok=True)
        # DVC would put on record what is there now as what the results were made from.
        by_dvc = STAGE_VARIABLE in os.environ and HEARTBEAT_VARIABLE not in os.environ
        if by_dvc and Freshness(read_yaml(PARAMS_FILE)).fingerprint(cell) != self.made_from:
            raise UserError(f"code, settings or data of {cell.id} have changed while it was trained; run again")
        tracking.log_by_hand(self.setup.profile, cell.id)
        return result

    def fit(self, checkpoint: Path, stop: Callable[[], bool]) -> FitResult:
        """Train, and show how it goes."""
        cell = self.setup.cell
        progress = ProgressFile(checkpoint.with_name("progress.json"), stage="train")
        with Meter(cell.id) as meter, _memory_watched(self.device):

            def on_step(report: StepReport) -> None:
                if progress.is_due():
                    progress.update(**dataclasses.asdict(report), memory_mb=_memory_mb(self.device))
                figures = f"loss {report.loss:.4f} accuracy {report.accuracy:.3f} {report.steps_per_second:.1f} steps/s"
                meter.update(report.step, report.steps, figures)

            def on_evaluation(row: Evaluation) -> None:
                losses = f"train loss {row.train_loss:.4f} dev loss {row.dev_loss:.4f}"
                meter.line(f"{cell.id}: step {row.step} {losses} dev accuracy {row.dev_accuracy:.4f}")
                progress.update(dev_accuracy=row.dev_accuracy)

            try:
                return fit(
                    self.model,
                    self.setup.data,
                    self.setup.training,
                    seed=cell.seed,
                    device=self.device,
                    checkpoint=checkpoint,
                    fingerprint=str(self.made_from),
                    on_step=on_step,
                    on_evaluation=on_evaluation,
                    stop=stop,
                )
            except TrainingStopped as error:
                raise Stopped(f"{cell.id}: stopped, and saved at step {error.step}") from None
            except UserError as error:
                if not checkpoint.exists():
                    raise
                other = "is of other settings, code or data"
                why = other if isinstance(error, OtherCheckpoint) else "cannot be read"
                aside = checkpoint.replace(checkpoint.with_name("last.other.pt"))
                print(f"{cell.id}: {checkpoint} {why}; now {aside.name}", flush=True)
        return self.fit(checkpoint, stop)

    def _metrics(self, result: FitResult) -> Metrics:
        cell, meta = self.setup.cell, self.setup.data.meta
        return Metrics(
            cell=cell.id,
            profile=self.setup.profile,
            **dataclasses.asdict(cell),
            steps=result.steps_run,
            best_step=result.best_step,
            best_dev_accuracy=result.best_dev_accuracy,
            best_dev_loss=result.best_dev_loss,
            final_train_loss=result.final_train_loss,
            num_parameters=self.num_parameters,
            train_examples=meta["splits"]["train"],
            dev_examples=meta["splits"]["dev"],
            data=meta["label"],
            attention=self.setup.attention,
            device=describe_device(self.device),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            git_revision=git_revision(),
            fingerprint=self.made_from,
            state_bytes=self.model.state_bytes(meta["max_length"]) if meta["causal"] else None,
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
    """Return what this process takes of the device's memory."""
    taken: int = torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return taken / 2**20
