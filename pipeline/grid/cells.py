"""Cells: one training run each, with its settings and its data."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.grid.axes import Cell, check_id, expand_grid
from pipeline.grid.freshness import data_folder
from pipeline.grid.params import MAX_SEED, Params, attention_section, cell_training, former_section, task_section
from pipeline.grid.settings import PARAMS_FILE
from pipeline.host.files import read_json
from schoenbat.attention import check_kernel
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.encoder import build_model
from schoenbat.lra.tasks import TASKS


def make_cells(params: Params, task: str, attn: str, dotf: str | None, former: str, seed: int | None) -> list[Cell]:
    """Return the cell of these names, inside the grid or not, or those of all seeds of the grid.

    Args:
        seed: None for all of the grid.

    Raises:
        UserError: an unknown name, a section that params.yaml lacks, a kernel missing or too much, no seed or one that
            is out of range, or the id of another cell of the grid.
    """
    task_section(params, task)
    attention_section(params, attn)
    former_section(params, former)
    check_kernel(attn, dotf)
    if seed is None and not params.grid.seeds:
        raise UserError("grid.seeds is empty: pass --seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed must lie between 0 and {MAX_SEED}, not {seed}")
    cells = [Cell(task, attn, dotf, former, each) for each in (params.grid.seeds if seed is None else [seed])]
    by_id = {cell.id: cell for cell in cells}
    for other in expand(params):
        check_id(by_id.get(other.id, other), other)
    return cells


def expand(params: Params) -> list[Cell]:
    """All cells of the grid, task by task; an empty axis gives none of its half."""
    return expand_grid(params.grid)


def select(cells: Sequence[Cell], **wanted: Sequence[Any] | None) -> list[Cell]:
    """Return the cells whose task, attn, dotf, former, seed and id are among the values wanted; None takes all.

    Args:
        cells: the grid.
        wanted: lists of values by attribute: `task`, `attn`, `dotf`, `former`, `seed`, `id`.

    Raises:
        UserError: a value that no cell has, or a combination that no cell has.
    """
    chosen = list(cells)
    for attribute, values in wanted.items():
        if not values:
            continue
        choices = list(dict.fromkeys(getattr(cell, attribute) for cell in cells))
        for value in values:
            if value not in choices:
                known = list_choices(value, [choice for choice in choices if choice is not None])
                option = "cell" if attribute == "id" else attribute
                raise UserError(f"the grid has no {option} {value!r}; choose from: {known}")
        chosen = [cell for cell in chosen if getattr(cell, attribute) in values]
    if cells and not chosen:
        raise UserError("no cell of the grid has this combination of values")
    return chosen


def check_models(params: Params, cells: Sequence[Cell]) -> None:
    """Build one head of each combination in `cells`, so that options which do not go together are found at once.

    Raises:
        UserError: as `build_model` says it, such as a kernel that the former cannot keep inside its radius, or as
            `cell_training` does.
    """
    for cell in cells:
        cell_training(params, cell)
    for task, attn, dotf, former in dict.fromkeys((cell.task, cell.attn, cell.dotf, cell.former) for cell in cells):
        model = task_section(params, task).model
        head_dim = model.width // model.num_heads
        try:
            build_model(
                vocab_size=2,
                num_classes=2,
                num_texts=1,
                max_length=1,
                model=dataclasses.replace(model, num_layers=1, width=head_dim, ffn_width=1, num_heads=1, head_width=1),
                attn=attn,
                attention=attention_section(params, attn),
                dotf=dotf,
                former=former,
                former_config=former_section(params, former),
                seed=0,
                per_position=TASKS.get(task).per_position,
                causal=TASKS.get(task).causal,
            )
        except UserError as error:
            where = f"{PARAMS_FILE}: task {task} with {' '.join(filter(None, (attn, dotf, former)))}"
            raise UserError(f"{where}: {error}") from None


def settings(cell: Cell, params: Params) -> dict[str, Any]:
    """Return the parts of params.yaml that decide the cell's numbers, as plain values."""
    return {
        "model": dataclasses.asdict(task_section(params, cell.task).model),
        "training": dataclasses.asdict(cell_training(params, cell)),
        "attention": attention_section(params, cell.attn),
        "former": dataclasses.asdict(former_section(params, cell.former)),
    }


def data_meta(cell: Cell, params: Params) -> dict[str, Any]:
    """meta.json of the cell's data; raises UserError when the data has not been prepared."""
    path = data_folder(params.profile, cell.task) / "meta.json"
    if not path.is_file():
        raise UserError(
            f"no prepared data for {cell.task} ({path}); make it with: schoenbat-exp download --task {cell.task}"
            f" && schoenbat-exp preprocess --task {cell.task}"
        )
    return read_json(path)
