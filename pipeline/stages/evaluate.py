"""Stage `evaluate`: the test accuracy of one trained cell."""

import os
from typing import Any

from pipeline import tracking
from pipeline.devices import get_device, prepare_host
from pipeline.grid.cells import Cell, data_folder, data_meta, fingerprint
from pipeline.grid.code import check_code
from pipeline.grid.params import Params, cell_training
from pipeline.grid.settings import flat
from pipeline.lease import LEASE_VARIABLE, STAGE_VARIABLE
from pipeline.monitor.progress import Meter, ProgressFile
from pipeline.results import CellResults, Fingerprint, TestScore
from pipeline.stages.train import description, model_of
from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.training import load_model, predict


def run(params: Params, cell: Cell, *, device_name: str) -> None:
    """Score best.pt of `cell` on the test split, into test.json, predictions.npz and the cell's MLflow run.

    Raises:
        UserError: the cell has not been trained, or best.pt belongs to other settings or other data than today's.
    """
    results = CellResults(params.profile, cell.id)
    best = results.best
    if not best.is_file():
        raise UserError(f"no {best}; train first: schoenbat-exp train {' '.join(cell.arguments())}")
    device = get_device(device_name)
    prepare_host(params.run.threads)
    meta = data_meta(cell, params)
    state, described = load_model(best)
    _check_description(cell, described, description(cell, params, meta))
    check_code()
    identity = fingerprint(cell, params)
    _check_code_of(cell, results, identity)
    if STAGE_VARIABLE in os.environ and LEASE_VARIABLE not in os.environ:
        # DVC has put the training on record by now.
        (cell.checkpoint_folder(params.profile) / "last.pt").unlink(missing_ok=True)
    model = model_of(cell, params, meta)
    model.load_state_dict(state)
    dataset = Dataset(data_folder(params.profile, cell.task))
    shown = cell.checkpoint_folder(params.profile) / "progress.json"
    shown.parent.mkdir(parents=True, exist_ok=True)
    progress = ProgressFile(shown, stage="evaluate")
    with Meter(f"{cell.id}: test examples") as meter:

        def on_batch(done: int, total: int) -> None:
            meter.update(done, total)
            if progress.is_due():
                progress.update(step=done, steps=total)

        predictions = predict(
            model,
            dataset,
            "test",
            batch_size=cell_training(params, cell).batch_size,
            device=device,
            on_batch=on_batch,
        )
    score = predictions.score()
    with tracking.attach(cell, str(identity), params.profile) as tracked:
        tracked.log({"test_accuracy": score.accuracy, "test_loss": score.loss})
    tested = TestScore(cell.id, score.accuracy, score.loss, score.examples, described["best_step"], identity)
    results.write_test(tested, predictions)
    shown.unlink(missing_ok=True)
    print(f"{cell.id}: test accuracy {score.accuracy:.4f} on {score.examples} examples")


def _check_code_of(cell: Cell, results: CellResults, identity: Fingerprint) -> None:
    """Weights are tested with the code that has trained them."""
    metrics = results.metrics()
    if metrics is not None and metrics.fingerprint.code != identity.code:
        raise UserError(
            f"best.pt of {cell.id} was trained with other code; train again: schoenbat-exp train "
            f"{' '.join(cell.arguments())}"
        )


def _check_description(cell: Cell, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    saved, wanted = flat(saved), flat(wanted)
    for key in sorted(wanted.keys() | (saved.keys() - {"best_step"})):
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"best.pt of {cell.id} was trained with {key} = {saved.get(key)!r}, not {wanted.get(key)!r}; "
                f"train again: schoenbat-exp train {' '.join(cell.arguments())}"
            )
