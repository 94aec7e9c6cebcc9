"""Cells: one training run each, with its settings and its data."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.grid.axes import Cell, check_ids, expand_grid
from pipeline.grid.freshness import data_folder
from pipeline.grid.params import MAX_SEED, Params, cell_training, section_of
from pipeline.grid.results import CellResults
from pipeline.grid.settings import PARAMS_FILE
from schoenbat.attention import check_kernel
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.encoder import Classifier, ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig
from schoenbat.lra.tasks import TASKS
from schoenbat.lra.training import TrainingConfig


def make_cells(params: Params, task: str, attn: str, dotf: str | None, former: str, seed: int | None) -> list[Cell]:
    """Return the cell of these names, inside the grid or not, or those of all seeds of the grid.

    Args:
        seed: None for all of the grid.

    Raises:
        UserError: an unknown name, a section that params.yaml lacks, a kernel missing or too much, no seed or one that
            is out of range, or the id of another cell of the grid.
    """
    for kind, name in (("task", task), ("attention", attn), ("former", former)):
        section_of(getattr(params, kind), kind, name)
    check_kernel(attn, dotf)
    if seed is None and not params.grid.seeds:
        raise UserError("grid.seeds is empty: pass --seed")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise UserError(f"--seed must lie between 0 and {MAX_SEED}, not {seed}")
    cells = [Cell(task, attn, dotf, former, each) for each in (params.grid.seeds if seed is None else [seed])]
    check_ids([*expand(params), *cells])
    return cells


def expand(params: Params) -> list[Cell]:
    """All cells of the grid, task by task; an empty axis gives none of its half."""
    return expand_grid(params.grid)


def select(cells: Sequence[Cell], **wanted: Sequence[Any] | None) -> list[Cell]:
    """Return the cells of a grid whose attributes are among the values wanted, such as task=["recall"]; None for all.

    Raises:
        UserError: a value that no cell has, or a combination that no cell has.
    """
    chosen = list(cells)
    for attribute, values in wanted.items():
        choices = {getattr(cell, attribute): None for cell in cells}
        for value in values or ():
            if value not in choices:
                known = list_choices(value, [choice for choice in choices if choice is not None])
                option = "cell" if attribute == "id" else attribute
                raise UserError(f"the grid has no {option} {value!r}; choose from: {known}")
        chosen = [cell for cell in chosen if not values or getattr(cell, attribute) in values]
    if cells and not chosen:
        raise UserError("no cell of the grid has this combination of values")
    return chosen


@dataclass(frozen=True)
class Setup:
    """A cell with its sections of params.yaml: what its stages are made of."""

    profile: str
    cell: Cell
    model: ModelConfig
    training: TrainingConfig
    attention: dict[str, Any]
    former: FormerConfig

    @property
    def results(self) -> CellResults:
        return CellResults(self.profile, self.cell.id)

    @functools.cached_property
    def data(self) -> Dataset:
        """The prepared data of its task; raises UserError where there is none."""
        task = self.cell.task
        folder = data_folder(self.profile, task)
        if not (folder / "meta.json").is_file():
            raise UserError(
                f"no prepared data for {task} ({folder}); make it with: schoenbat-exp download --task {task}"
                f" && schoenbat-exp preprocess --task {task}"
            )
        return Dataset(folder)

    def build_model(self, data: Mapping[str, Any]) -> Classifier:
        """Return the model with its initial weights, for data of this description."""
        cell, needed = self.cell, ("vocab_size", "num_classes", "num_texts", "max_length", "per_position", "causal")
        return build_model(
            **{key: data[key] for key in needed},
            model=self.model,
            attn=cell.attn,
            attention=self.attention,
            dotf=cell.dotf,
            former=cell.former,
            former_config=self.former,
            seed=cell.seed,
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the cell's numbers, as plain values."""
        return {
            "model": asdict(self.model),
            "training": asdict(self.training),
            "attention": self.attention,
            "former": asdict(self.former),
        }

    def description(self) -> dict[str, Any]:
        """Return what a file of weights says about itself: the cell, its settings and its data."""
        known = ("vocab_size", "num_classes", "num_texts", "max_length", "fingerprint")
        return {**asdict(self.cell), **self.settings(), "data": {key: self.data.meta[key] for key in known}}


def resolve(params: Params, cell: Cell) -> Setup:
    """Return the cell with its sections; raises UserError for one that is missing, or as `cell_training` does."""
    return Setup(
        profile=params.profile,
        cell=cell,
        model=section_of(params.task, "task", cell.task).model,
        training=cell_training(params, cell),
        attention=section_of(params.attention, "attention", cell.attn),
        former=section_of(params.former, "former", cell.former),
    )


def check_models(params: Params, cells: Sequence[Cell]) -> None:
    """Build one head of each combination in `cells`; raises UserError where options do not go together."""
    for cell in {cell.group: cell for cell in cells}.values():
        setup, task = resolve(params, cell), TASKS.get(cell.task)
        width = setup.model.width // setup.model.num_heads
        model = replace(setup.model, num_layers=1, width=width, ffn_width=1, num_heads=1, head_width=1)
        sizes = {"vocab_size": 2, "num_classes": 2, "num_texts": 1, "max_length": 1}
        data = {**sizes, "per_position": task.per_position, "causal": task.causal}
        try:
            replace(setup, model=model).build_model(data)
        except UserError as error:
            where = " ".join(filter(None, (cell.attn, cell.dotf, cell.former)))
            raise UserError(f"{PARAMS_FILE}: task {cell.task} with {where}: {error}") from None
