"""Golden records: the outcome of the first training steps of a cell, to compare two revisions of the code."""

import contextlib
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.devices import get_device, prepare_host
from pipeline.files import read_json
from pipeline.grid.axes import Cell
from pipeline.grid.code import check_code
from pipeline.grid.freshness import data_folder
from pipeline.grid.params import Params, cell_training
from pipeline.stages.train import model_of
from schoenbat.errors import TrainingStopped, UserError
from schoenbat.files import write_bytes
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.training import fit

STEPS = 3


def run(params: Params, cells: Sequence[Cell], out: Path) -> None:
    """Train each cell for a few steps at its own settings, and write what that gives into an .npz file.

    Bits differ between processors and numbers of threads, so records are compared on one machine alone.

    Raises:
        UserError: the data of a cell is not prepared.
    """
    prepare_host(params.run.threads)
    check_code()
    content: dict[str, np.ndarray] = {}
    for cell in cells:
        content |= {f"{cell.id}/{name}": value for name, value in golden_record(params, cell).items()}
        print(f"{cell.id}: {STEPS} steps", flush=True)
    with tempfile.TemporaryFile() as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
        file.seek(0)
        write_bytes(out, file.read())


def golden_record(params: Params, cell: Cell) -> dict[str, np.ndarray]:
    """Return the weights after a few steps, their mean loss, and the outputs for a batch of the dev split."""
    folder = data_folder(params.profile, cell.task)
    if not (folder / "meta.json").is_file():
        raise UserError(f"no prepared data for {cell.task} ({folder})")
    config, dataset = cell_training(params, cell), Dataset(folder)
    model = model_of(cell, params, read_json(folder / "meta.json"))
    steps, losses = itertools.count(1), []
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(TrainingStopped):
        fit(
            model,
            dataset,
            config,
            seed=cell.seed,
            device=get_device("cpu"),
            checkpoint=Path(scratch, "last.pt"),
            on_step=lambda report: losses.append(report.loss),
            stop=lambda: next(steps) >= STEPS,
        )
    batch = dataset.batch("dev", np.arange(min(config.batch_size, dataset.num_examples("dev"))))
    with torch.no_grad():
        outputs = model.eval()(batch.tokens, batch.key_mask)
    weights = torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])
    return {"weights": weights.numpy(), "losses": np.array(losses), "outputs": outputs.double().numpy()}
