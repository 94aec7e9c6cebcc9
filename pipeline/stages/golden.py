"""Golden records: the outcome of the first training steps of a cell, to compare two revisions of the code."""

import io
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.grid.cells import Cell, resolve
from pipeline.grid.checked import check_code
from pipeline.grid.params import Params
from pipeline.host.devices import get_device, prepare_host
from schoenbat.files import write_bytes
from schoenbat.lra.training import fit, load_model, predict, save_model

STEPS = 4


def run(params: Params, cells: Sequence[Cell], replaced: Sequence[str], out: Path) -> None:
    """Write what cells give after a few steps of training at their own settings, and replaced ones on few texts.

    It is an .npz file. Bits differ between processors and numbers of threads, so compare on one machine alone.

    Raises:
        UserError: the data of a cell is not prepared.
    """
    prepare_host(params.run.threads)
    check_code()
    content: dict[str, np.ndarray] = {}
    for cell in cells:
        content |= {f"{cell.id}/{name}": value for name, value in golden_record(params, cell).items()}
        print(f"{cell.id}: {STEPS} steps", flush=True)
    for name in replaced:
        from pipeline.stages import replace

        content |= {f"{name}/{kind}": value for kind, value in replace.golden_record(params, name).items()}
        print(f"{name}: {replace.GOLDEN_TEXTS} texts", flush=True)
    packed = io.BytesIO()
    np.savez_compressed(packed, **content)  # type: ignore[arg-type]
    write_bytes(out, packed.getvalue())


def golden_record(params: Params, cell: Cell) -> dict[str, np.ndarray]:
    """Return the best weights of a training of a few steps, its losses, and the predictions for the dev split.

    Everything but the number of steps is as the cell has it, and all that a cell runs is run: see the test of that.
    """
    setup, device = resolve(params, cell), get_device("cpu")
    few: Any = {"steps": STEPS, "warmup_steps": STEPS // 2, "eval_every": STEPS // 2, "stop_at_accuracy": None}
    config = replace(setup.training, **few)
    data, model = setup.data, setup.build_model(setup.data.meta)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, best = Path(scratch, "last.pt"), Path(scratch, "best.pt")
        result = fit(model, data, config, seed=cell.seed, device=device, checkpoint=checkpoint)
        save_model(best, model, {})
        model.load_state_dict(load_model(best)[0])
    predictions = predict(model, data, "dev", batch_size=config.batch_size, device=device)
    weights = torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])
    losses = [(row.train_loss, row.dev_loss, row.train_accuracy, row.dev_accuracy) for row in result.evaluations]
    outputs = np.append(predictions.log_probability, predictions.score().loss)
    return {"weights": weights.numpy(), "losses": np.array(losses).ravel(), "outputs": outputs}
