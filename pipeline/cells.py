"""Cells: one training run each, with its folders, its settings, and the order of the stages that make it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.files import read_json
from pipeline.grid import Cell, download_stage, expand_grid, preprocess_stage, sources
from pipeline.params import Params, attention_section, former_section, task_section
from schoenbat.attention import check_kernel
from schoenbat.errors import UserError
from schoenbat.nn.encoder import build_model
from schoenbat.tasks import TASKS


def raw_folder(task: str) -> Path:
    return Path("data/raw", task)


def data_folder(profile: str, task: str) -> Path:
    return Path("data/processed", profile, task)


def summary_file(profile: str, task: str) -> Path:
    """The copy of a data set's meta.json that the report reads."""
    return Path("runs", profile, "data", f"{task}.json")


def make_cell(params: Params, task: str, attn: str, dotf: str | None, former: str, seed: int | None) -> Cell:
    """A cell by name, inside the grid or not; the seed defaults to the first of the grid.

    Raises:
        UserError: an unknown name, a section that params.yaml lacks, a kernel missing or too much, or no seed.
    """
    task_section(params, task)
    attention_section(params, attn)
    former_section(params, former)
    check_kernel(attn, dotf)
    if seed is None and not params.grid.seeds:
        raise UserError("grid.seeds is empty: pass --seed")
    if seed is not None and seed < 0:
        raise UserError(f"--seed must not be negative, not {seed}")
    return Cell(task, attn, dotf, former, params.grid.seeds[0] if seed is None else seed)


def expand(params: Params) -> list[Cell]:
    """All cells of the grid, task by task; an empty axis gives none of its half."""
    return expand_grid(params.grid)


def select(cells: Sequence[Cell], **wanted: Sequence[Any] | None) -> list[Cell]:
    """The cells whose task, attn, dotf, former, seed and id are among the values wanted for them; None takes all.

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
                known = ", ".join(str(choice) for choice in choices if choice is not None) or "none"
                option = "cell" if attribute == "id" else attribute
                raise UserError(f"the grid has no {option} {value!r}; choose from: {known}")
        chosen = [cell for cell in chosen if getattr(cell, attribute) in values]
    if cells and not chosen:
        raise UserError("no cell of the grid has this combination of values")
    return chosen


def check_models(params: Params, cells: Sequence[Cell]) -> None:
    """Build a small model for each combination in `cells`, so that options which do not go together are found at once.

    Raises:
        UserError: as `build_model` says it, such as a kernel that the former cannot keep inside its radius.
    """
    for task, attn, dotf, former in dict.fromkeys((cell.task, cell.attn, cell.dotf, cell.former) for cell in cells):
        build_model(
            vocab_size=2,
            num_classes=2,
            num_texts=1,
            max_length=1,
            model=dataclasses.replace(task_section(params, task).model, num_layers=1),
            attn=attn,
            attention=attention_section(params, attn),
            dotf=dotf,
            former=former,
            former_config=former_section(params, former),
            seed=0,
            per_position=TASKS.get(task).per_position,
            causal=TASKS.get(task).causal,
        )


def stage_graph(params: Params, cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The DVC stages that `cells` need and, for each, the stages before it, in an order in which they can run."""
    profile = params.profile
    graph: dict[str, list[str]] = {}
    for task in dict.fromkeys(cell.task for cell in cells):
        graph[download_stage(task)] = []
        graph[preprocess_stage(profile, task)] = [download_stage(task)]
    for cell in cells:
        train, evaluate = cell.stage("train", profile), cell.stage("evaluate", profile)
        graph[train] = [preprocess_stage(profile, cell.task)]
        graph[evaluate] = [train]
    return graph


def bench_stage(profile: str) -> str:
    return f"bench@{profile}"


def trained_cells(params: Params) -> list[Cell]:
    """The cells of `errors.trained`; raises UserError for one that the grid does not have."""
    grid = {cell.id: cell for cell in expand(params)}
    for name in params.errors.trained:
        if name not in grid:
            raise UserError(f"errors.trained: the grid has no cell {name!r}; choose from: {', '.join(grid) or 'none'}")
    return [grid[name] for name in params.errors.trained]


def errors_stage(profile: str, cell: Cell | None = None) -> str:
    """The stage that measures estimators on made-up vectors, or on those of a trained cell."""
    return f"errors@{profile}" if cell is None else f"errors_trained@{profile}-{cell.id}"


def report_stage(profile: str) -> str:
    return f"report@{profile}"


def settings(cell: Cell, params: Params) -> dict[str, Any]:
    """The parts of params.yaml that decide the cell's numbers, as plain values."""
    task = task_section(params, cell.task)
    return {
        "model": dataclasses.asdict(task.model),
        "training": dataclasses.asdict(task.training),
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


def fingerprint(cell: Cell, params: Params) -> str:
    """What an interrupted run must share with the one that goes on from its checkpoint, as a hex digest.

    It covers the code of `sources`, the cell, its settings and its data, but neither the device nor the threads.
    """
    digest = hashlib.sha256()
    for source in sources(cell):
        files = sorted(source.rglob("*.py")) if source.is_dir() else [source]
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.as_posix()} {len(content)}\n".encode() + content)
    described = [dataclasses.asdict(cell), settings(cell, params), data_meta(cell, params)["fingerprint"]]
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()
