"""The circumstances of the results of a profile: what captions and the status of a report say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.grid.cells import Cell
from pipeline.grid.params import Params, cell_training
from pipeline.reporting._mechanisms import Mechanism
from pipeline.reporting._statistics import MARGIN, Scores
from schoenbat.lra.tasks import TASKS


@dataclass(frozen=True)
class TaskData:
    """The prepared data of a task: its label and notes on it."""

    label: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Cells:
    """The cells of the grid: ids of those without current results, and what the others were made with."""

    planned: Sequence[Cell]
    missing: Sequence[str] = ()
    outdated: Sequence[str] = ()
    devices: Sequence[str] = ()
    revisions: Sequence[str] = ()
    torch: Sequence[str] = ()


@dataclass(frozen=True)
class Measured:
    """What `bench` or `errors` measured with: values by name; and the cells that were not measured."""

    circumstances: Mapping[str, Sequence[str]]
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Setting:
    """How the results came about.

    Attributes:
        data: by task, where it is prepared.
        scores: by (task, mechanism), what a mechanism gets right.
        reference: the mechanism that the others are compared with.
        margin: points of accuracy within which two mechanisms count as equal.
    """

    params: Params
    cells: Cells
    data: Mapping[str, TaskData]
    scores: Mapping[tuple[str, Mechanism], Scores]
    bench: Measured
    errors: Measured
    reference: str = "softmax"
    margin: float = MARGIN

    @property
    def profile(self) -> str:
        return self.params.profile

    @property
    def note(self) -> str:
        return self.params.note

    @property
    def tasks(self) -> list[str]:
        return self.params.grid.tasks

    @property
    def seeds(self) -> list[int]:
        return self.params.grid.seeds

    @property
    def num_cells(self) -> int:
        return len(self.cells.planned)

    @property
    def num_finished(self) -> int:
        return self.num_cells - len(self.cells.missing) - len(self.cells.outdated)

    @property
    def is_check(self) -> bool:
        """Whether the profile shows that everything works, and no more."""
        return self.profile.startswith("quick") or len(self.seeds) < 2

    @property
    def unavailable(self) -> list[str]:
        """The tasks without prepared data."""
        return [task for task in self.tasks if task not in self.data]

    def heading(self, task: str) -> str:
        """Return the task with the first two parts of its data's label, one of which names a subset."""
        label = self.data[task].label if task in self.data else "no data"
        return f"{task}: {', '.join(label.split(', ')[:2])}"

    def caption(self, tasks: Sequence[str] | None = None) -> str:
        """Describe the circumstances of results on `tasks` (all of them by default) in one line."""
        tasks = self.tasks if tasks is None else tasks
        labels = {task: self.data[task].label if task in self.data else "not available" for task in tasks}
        parts = [
            self._profile(),
            "data: " + ", ".join(f"{task} = {label}" for task, label in labels.items()),
            "steps: " + ", ".join(map(self._steps, tasks)),
            "seeds: " + ", ".join(map(str, self.seeds)),
            f"device: {', '.join(self.cells.devices) or 'none yet'}",
            f"git revision: {', '.join(self.cells.revisions) or 'none yet'}",
        ]
        return "; ".join(parts) + "."

    def _profile(self) -> str:
        return f"Profile {self.profile}: {self.note}".rstrip(": .")

    def _steps(self, task: str) -> str:
        """Return the steps of a task, and of each mechanism and former that has others."""
        usual = self.params.task[task].training.steps
        found = {
            " ".join(filter(None, (cell.attn, cell.dotf, cell.former))): cell_training(self.params, cell).steps
            for cell in self.cells.planned
            if cell.task == task
        }
        own = "; ".join(f"{name} {steps:,}" for name, steps in found.items() if steps != usual)
        return f"{task} {usual:,}" + (f" ({own})" if own else "")

    def bench_caption(self) -> str:
        """Describe the circumstances of the timings in one line."""
        return self._measured(self.bench)

    def errors_caption(self) -> str:
        """Describe the circumstances of the errors of estimates in one line."""
        missing = f" Not trained yet, so left out: {', '.join(self.errors.missing)}." if self.errors.missing else ""
        return self._measured(self.errors) + missing

    def _measured(self, measured: Measured) -> str:
        values = (f"{name.replace('_', ' ')}: {', '.join(found)}" for name, found in measured.circumstances.items())
        return f"{self._profile()}; {'; '.join(values)}."

    def status(self) -> list[str]:
        """Return what the report covers and what is missing, as paragraphs of Markdown."""
        paragraphs = [
            self.note or "No note.",
            f"{self.num_finished} of {self.num_cells} cells are finished.",
        ]
        if self.is_check:
            paragraphs.append("**This is a check, not a result.**")
        return [*paragraphs, *self.gaps()]

    def gaps(self) -> list[str]:
        """Return what is missing and why, as sentences."""
        sentences = [
            f"No prepared data, so no results, for {task}: "
            f"{TASKS.get(task).how_to_get or 'made by schoenbat-exp run --grid.'}"
            for task in self.unavailable
        ]
        for title, cells in (
            ("Not finished", self.cells.missing),
            ("Left out because they are out of date", self.cells.outdated),
        ):
            cells = [cell for cell in cells if not any(cell.startswith(f"{task}-") for task in self.unavailable)]
            if cells:
                sentences.append(f"{title}: {', '.join(cells)}.")
        if self.num_finished and not self.bench.circumstances:
            sentences.append("No benchmark.")
        return sentences
