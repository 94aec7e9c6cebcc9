"""Stage `evaluate`: the test accuracy of one trained cell."""

from typing import Any

from pipeline.grid.cells import Cell, data_meta
from pipeline.grid.code import check_code
from pipeline.grid.freshness import data_folder
from pipeline.grid.params import Params, cell_training
from pipeline.grid.results import CellResults, Fingerprint, TestScore
from pipeline.grid.settings import flat
from pipeline.host.devices import get_device, prepare_host
from pipeline.host.progress import Meter, ProgressFile
from pipeline.mlflow import tracking
from pipeline.stages.train import description, identify, model_of
from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.training import load_model, predict


def run(params: Params, cell: Cell, *, device_name: str, force: bool) -> None:
    """Score the best weights of `cell` on the test split, unless that is up to date.

    Args:
        force: test again what is up to date.

    Raises:
        UserError: the cell has not been trained, or its weights belong to other settings or other data than today's.
    """
    results = CellResults(params.profile, cell.id)
    identity = identify(cell, params)
    if not force and results.fingerprints() == [str(identity)] * 2:
        print(f"{cell.id}: up to date; --force tests it again", flush=True)
        return
    best = results.best
    if not best.is_file():
        raise UserError(f"no {best}; train first: schoenbat-exp train {' '.join(cell.arguments())}")
    device = get_device(device_name)
    prepare_host(params.run.threads)
    meta = data_meta(cell, params)
    state, described = load_model(best)
    _check_description(cell, described, description(cell, params, meta))
    check_code()
    _check_code_of(cell, results, identity)
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
    tested = TestScore(cell.id, score.accuracy, score.loss, score.examples, described["best_step"], identity)
    results.write_test(tested, predictions)
    shown.unlink(missing_ok=True)
    print(f"{cell.id}: test accuracy {score.accuracy:.4f} on {score.examples} examples", flush=True)
    tracking.log_by_hand(params.profile, cell.id)


def _check_code_of(cell: Cell, results: CellResults, identity: Fingerprint) -> None:
    """Weights are tested with the code that has trained them."""
    metrics = results.metrics()
    if metrics is not None and metrics.fingerprint.code != identity.code:
        raise UserError(
            f"the weights of {cell.id} were trained with other code; train again: schoenbat-exp train "
            f"{' '.join(cell.arguments())}"
        )


def _check_description(cell: Cell, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    saved, wanted = flat(saved), flat(wanted)
    for key in sorted(wanted.keys() | (saved.keys() - {"best_step"})):
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"the weights of {cell.id} were trained with {key} = {saved.get(key)!r}, not {wanted.get(key)!r}; "
                f"train again: schoenbat-exp train {' '.join(cell.arguments())}"
            )
