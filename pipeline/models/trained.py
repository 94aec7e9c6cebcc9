"""Trained cells as their own folders describe them, whatever params.yaml says by now."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.grid.axes import Cell
from pipeline.grid.freshness import Freshness, summary_file
from pipeline.grid.results import CellResults, Metrics, trained_cells
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.host.files import read_json
from schoenbat.errors import UserError, list_choices
from schoenbat.lra.config import build_config
from schoenbat.lra.pretrained import PretrainedClassifier, PretrainedConfig, model_data
from schoenbat.lra.training import load_model


@dataclass(frozen=True)
class TrainedCell:
    """A trained cell: its results, and its model.

    Attributes:
        metrics: of the training.
        description: what the file of weights says about itself.
        meta: the description of the data, with the baselines.
    """

    profile: str
    cell: Cell
    results: CellResults
    metrics: Metrics
    description: dict[str, Any]
    meta: dict[str, Any]
    classifier: PretrainedClassifier

    def code_has_changed(self) -> bool:
        """Return whether the code that the training depended on has changed since."""
        now = Freshness({"profile": self.profile}).code(self.cell.attn, self.cell.dotf)
        return now != self.metrics.fingerprint.code


def current_profile(root: Path = Path()) -> str:
    """Return the profile of params.yaml under `root`; raises UserError if it has none."""
    settings = read_yaml(root / PARAMS_FILE)
    profile = settings.get("profile") if isinstance(settings, dict) else None
    if not isinstance(profile, str):
        raise UserError(f"{PARAMS_FILE}: missing key 'profile'")
    return profile


def load_trained(cell: str, profile: str | None = None) -> TrainedCell:
    """Load a trained cell, of the profile of params.yaml by default, with its best weights, on the CPU.

    Raises:
        UserError: no such cell is trained, its files are damaged, or its data has changed since.
    """
    profile = profile or current_profile()
    results, again = CellResults(profile, cell), f"schoenbat-exp run --cell {cell}"
    best, metrics = results.best, results.metrics()
    if metrics is None:
        known = list_choices(cell, trained_cells(profile))
        raise UserError(f"no trained cell {cell!r} in runs/{profile}; choose one of: {known}")
    if not best.is_file():
        raise UserError(f"no {best}; train it: {again}, or where a remote has it: dvc pull {best}")
    state, described = load_model(best)
    axes = Cell(metrics.task, metrics.attn, metrics.dotf, metrics.former, metrics.seed)
    summary = summary_file(profile, axes.task)
    if not summary.is_file():
        made_by = f"schoenbat-exp preprocess --task {axes.task}"
        raise UserError(f"no {summary}, the description of the cell's data; make it: {made_by}")
    meta = read_json(summary)
    if meta["fingerprint"] != described["data"]["fingerprint"]:
        raise UserError(f"the data of {axes.task} is another one than {cell} was trained on; train it again: {again}")
    options = {"model": described["model"], "attention": described["attention"], "former_options": described["former"]}
    config = build_config(PretrainedConfig, asdict(axes) | options | {"data": model_data(meta)}, str(best))
    model = config.build()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{best} does not fit the code of today ({reason}); train again") from None
    return TrainedCell(profile, axes, results, metrics, described, meta, PretrainedClassifier(config, model))
