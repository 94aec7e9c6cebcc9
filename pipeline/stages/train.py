"""Stage `train`: one cell, from prepared data to its best weights, its learning curve and its figures."""

import contextlib
import dataclasses
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import torch
from filelock import FileLock, Timeout

from pipeline import tracking
from pipeline.devices import describe_device, get_device, prepare_host
from pipeline.files import git_revision, remove_unfinished
from pipeline.grid.cells import (
    Cell,
    data_folder,
    data_meta,
    fingerprint,
    settings,
    settings_fingerprint,
)
from pipeline.grid.code import check_code
from pipeline.grid.params import Params, cell_training, load_params, task_section
from pipeline.lease import LEASE_VARIABLE, STAGE_VARIABLE
from pipeline.monitor.progress import Meter, ProgressFile
from pipeline.results import CellResults, Fingerprint, Metrics, Resources
from pipeline.stopping import Stopped, stop_request
from schoenbat.data.arrays import Dataset
from schoenbat.errors import OutOfMemory, TrainingStopped, UserError
from schoenbat.nn.encoder import Classifier, build_model
from schoenbat.training import Evaluation, FitResult, StepReport, fit, save_model


def run(params: Params, cell: Cell, *, device_name: str, save: bool, restart: bool) -> None:
    """Train `cell`; a run that was interrupted goes on from its checkpoint.

    SIGINT and SIGTERM end it at the next step, with a checkpoint.

    Writes best.pt, curves.csv and, last, metrics.json into the cell's run folder, each complete or not at all. Then the
    checkpoint goes, unless a grid or DVC is about to put the results on record: it stays until that is done. With
    `save` false nothing is written or logged.

    Args:
        restart: discard a checkpoint of an interrupted run.

    Raises:
        UserError: the data is not prepared, the device is not there, or the checkpoint is of another configuration.
        TrainingFailed: the loss is no longer a number.
        OutOfMemory: the device's memory does not suffice.
        Stopped: by a signal; the checkpoint is written.
    """
    device = get_device(device_name)
    prepare_host(params.run.threads)
    meta = data_meta(cell, params)
    dataset = Dataset(data_folder(params.profile, cell.task))
    model = model_of(cell, params, meta)
    print(f"{cell.id}: {meta['label']}, {device}, {_num_parameters(model)} parameters", flush=True)
    if not save:
        result = _fit(cell, params, model, dataset, device)
        _print_result(cell, result)
        return
    checkpoint = cell.checkpoint_folder(params.profile) / "last.pt"
    if restart:
        checkpoint.unlink(missing_ok=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    for folder in (checkpoint.parent, cell.run_folder(params.profile)):
        remove_unfinished(folder)
    described = description(cell, params, meta)
    check_code()
    identity = fingerprint(cell, params)
    stop = Event()
    with (
        stop_request(stop.set),
        _alone(checkpoint.with_name("train.lock"), cell),
        tracking.cell_run(cell, str(identity), params.profile, flat(described)) as tracked,
    ):
        result = _fit(cell, params, model, dataset, device, checkpoint, tracked, stop.is_set)
        tracked.log_evaluations(result.evaluations)
        results = CellResults(params.profile, cell.id)
        save_model(results.best, model, described | {"best_step": result.best_step})
        resources = _resources(result, device, tracked.run_id or "")
        metrics = _metrics(cell, params, meta, model, result, identity, device)
        results.write_training(result.evaluations, resources, metrics)
        tracked.log_best(
            step=result.best_step,
            dev_accuracy=result.best_dev_accuracy,
            dev_loss=result.best_dev_loss,
            num_parameters=_num_parameters(model),
        )
        tracked.log_model(
            model, results.best, name=cell.id, num_texts=meta["num_texts"], num_classes=meta["num_classes"]
        )
        tracked.log_resources(dataclasses.asdict(resources))
    if os.environ.keys().isdisjoint((LEASE_VARIABLE, STAGE_VARIABLE)):
        checkpoint.unlink(missing_ok=True)
    elif LEASE_VARIABLE not in os.environ:
        _check_unchanged(cell, params, identity)
    _print_result(cell, result)


@contextlib.contextmanager
def _alone(path: Path, cell: Cell) -> Iterator[None]:
    """Wait until no other process trains the cell, and keep others waiting inside the block."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{cell.id}: another process trains it; waiting for its end", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_unchanged(cell: Cell, params: Params, identity: Fingerprint) -> None:
    """DVC would put on record what is there now as what the results were made from."""
    if fingerprint(cell, params) != identity or settings_fingerprint(cell, load_params()) != identity.settings:
        raise UserError(f"code, settings or data of {cell.id} have changed while it was trained; run again")


def model_of(cell: Cell, params: Params, meta: dict[str, Any]) -> Classifier:
    """The model of `cell` with its initial weights."""
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
    """What best.pt says about itself: the cell, its settings and its data."""
    data = {key: meta[key] for key in ("vocab_size", "num_classes", "num_texts", "max_length", "fingerprint")}
    return {**dataclasses.asdict(cell), **settings(cell, params), "data": data}


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _fit(
    cell: Cell,
    params: Params,
    model: Classifier,
    dataset: Dataset,
    device: torch.device,
    checkpoint: Path | None = None,
    tracked: tracking.CellRun | None = None,
    stop: Callable[[], bool] | None = None,
) -> FitResult:
    progress = None if checkpoint is None else ProgressFile(checkpoint.with_name("progress.json"), stage="train")
    with Meter(cell.id) as meter:

        def on_step(report: StepReport) -> None:
            if progress is not None and progress.is_due():
                progress.update(**dataclasses.asdict(report), memory_mb=_memory_mb(device), **_gpu_use(device))
            meter.update(
                report.step,
                report.steps,
                f"loss {report.loss:.4f} accuracy {report.accuracy:.3f} {report.steps_per_second:.1f} steps/s",
            )

        def on_evaluation(evaluation: Evaluation) -> None:
            meter.line(
                f"{cell.id}: step {evaluation.step} train loss {evaluation.train_loss:.4f} "
                f"dev loss {evaluation.dev_loss:.4f} dev accuracy {evaluation.dev_accuracy:.4f}"
            )
            if progress is not None:
                progress.update(dev_accuracy=evaluation.dev_accuracy)
            if tracked is not None:
                tracked.log_evaluation(evaluation)

        try:
            return fit(
                model,
                dataset,
                cell_training(params, cell),
                seed=cell.seed,
                device=device,
                checkpoint=checkpoint,
                fingerprint=str(fingerprint(cell, params)),
                on_step=on_step,
                on_evaluation=on_evaluation,
                stop=stop,
            )
        except TrainingStopped as error:
            raise Stopped(f"{cell.id}: stopped, and saved at step {error.step}") from None
        except MemoryError as error:
            raise OutOfMemory(f"{device} has too little memory") from error
        except RuntimeError as error:
            # On the CPU torch raises a RuntimeError that only its text tells from others.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise OutOfMemory(f"{device} has too little memory: {str(error).splitlines()[0]}") from error
        except UserError as error:
            if checkpoint is None or not checkpoint.exists():
                raise
            raise UserError(f"{error}, or pass --restart, which does so") from None


def _memory_mb(device: torch.device) -> float:
    """What this process takes now: on a GPU what torch holds of it, else its largest size so far."""
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


def _metrics(
    cell: Cell,
    params: Params,
    meta: dict[str, Any],
    model: Classifier,
    result: FitResult,
    identity: Fingerprint,
    device: torch.device,
) -> Metrics:
    return Metrics(
        cell=cell.id,
        profile=params.profile,
        **dataclasses.asdict(cell),
        steps=result.steps_run,
        best_step=result.best_step,
        best_dev_accuracy=result.best_dev_accuracy,
        best_dev_loss=result.best_dev_loss,
        final_train_loss=result.final_train_loss,
        num_parameters=_num_parameters(model),
        train_examples=meta["splits"]["train"],
        dev_examples=meta["splits"]["dev"],
        data=meta["label"],
        attention=params.attention[cell.attn],
        device=describe_device(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        git_revision=git_revision(),
        fingerprint=identity,
        state_bytes=model.state_bytes(meta["max_length"]) if meta["causal"] else None,
    )


def _resources(result: FitResult, device: torch.device, run_id: str) -> Resources:
    return Resources(
        device=describe_device(device),
        seconds=result.seconds,
        steps_per_second=result.steps_run / result.seconds,
        tokens_per_second=result.tokens / result.seconds,
        peak_memory_mb=result.peak_memory_mb,
        resumed=result.resumed,
        run_id=run_id,
    )


def _num_parameters(model: Classifier) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _print_result(cell: Cell, result: FitResult) -> None:
    print(
        f"{cell.id}: dev accuracy {result.best_dev_accuracy:.4f} (step {result.best_step} of {result.steps_run}), "
        f"{result.seconds:.1f} s of training"
    )
