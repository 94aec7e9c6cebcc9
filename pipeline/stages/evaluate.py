"""Stage `evaluate`: the test accuracy of one trained cell."""

from collections.abc import Mapping
from typing import Any

from pipeline.grid.cells import Cell, resolve
from pipeline.grid.checked import check_code
from pipeline.grid.params import Params
from pipeline.grid.results import TestScore
from pipeline.grid.settings import flat
from pipeline.host.devices import get_device, prepare_host
from pipeline.host.progress import Meter, ProgressFile
from pipeline.mlflow import tracking
from pipeline.stages.train import identify
from schoenbat.errors import UserError
from schoenbat.lra.training import load_model, predict


def run(params: Params, cell: Cell, *, device_name: str, force: bool) -> None:
    """Score the best weights of `cell` on the test split, unless that is up to date.

    Raises:
        UserError: the cell has not been trained, or its weights belong to other settings, data or code than today's.
    """
    device, setup = get_device(device_name), resolve(params, cell)
    made_from, results = identify(setup), setup.results
    if not force and results.fingerprints() == [str(made_from)] * 2:
        print(f"{cell.id}: up to date; --force tests it again", flush=True)
        return
    train = f"schoenbat-exp train {' '.join(cell.arguments())}"
    if not results.best.is_file():
        raise UserError(f"no {results.best}; train first: {train}")
    state, described = load_model(results.best)
    if other := _difference(described, setup.description()):
        raise UserError(f"the weights of {cell.id} were trained with {other}; train again: {train}")
    check_code()
    metrics = results.metrics()
    if metrics is not None and metrics.fingerprint.code != made_from.code:
        raise UserError(f"the weights of {cell.id} were trained with other code; train again: {train}")
    prepare_host(params.run.threads)
    model = setup.build_model(setup.data.meta)
    model.load_state_dict(state)
    results.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    shown = results.checkpoint.with_name("progress.json")
    progress = ProgressFile(shown, stage="evaluate")
    with Meter(f"{cell.id}: test examples") as meter:

        def on_batch(done: int, total: int) -> None:
            meter.update(done, total)
            if progress.is_due():
                progress.update(step=done, steps=total)

        size = setup.training.batch_size
        predictions = predict(model, setup.data, "test", batch_size=size, device=device, on_batch=on_batch)
    score = predictions.score()
    tested = TestScore(cell.id, score.accuracy, score.loss, score.examples, described["best_step"], made_from)
    results.write_test(tested, predictions)
    shown.unlink(missing_ok=True)
    print(f"{cell.id}: test accuracy {score.accuracy:.4f} on {score.examples} examples", flush=True)
    tracking.log_by_hand(params.profile, cell.id)


def _difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the first setting that two descriptions have differently; "" if there is none."""
    saved, wanted = flat(saved), flat(wanted)
    for key in sorted(wanted.keys() | (saved.keys() - {"best_step"})):
        if saved.get(key) != wanted.get(key):
            return f"{key} = {saved.get(key)!r}, not {wanted.get(key)!r}"
    return ""
