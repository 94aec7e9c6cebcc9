"""What a person sees of a grid: a table that is drawn again and again on a terminal, and plain lines elsewhere."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.monitor.status import Row, Snapshot
from pipeline.text import counted

_STYLE = {"running": "cyan", "failed": "red", "unavailable": "yellow", "skipped": "yellow", "interrupted": "yellow"}
_SHOWN_FIRST = ("running", "waiting", "failed", "unavailable", "interrupted", "skipped", "queued", "to run", "done")


def table(snapshot: Snapshot, height: int) -> Group:
    """The cells by state, those that run first, cut to the height of the terminal."""
    drawn = Table(box=None, pad_edge=False)
    for title, justify in (
        *(("cell", "left"), ("state", "left"), ("progress", "right"), ("loss", "right"), ("dev accuracy", "right")),
        *(("steps/s", "right"), ("left", "right"), ("memory", "right"), ("GPU", "right"), ("device", "left")),
    ):
        drawn.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rows = sorted([*snapshot.others, *snapshot.cells], key=lambda row: _SHOWN_FIRST.index(_known(row.state)))
    fitting = max(1, height - 4)
    for row in rows[:fitting]:
        drawn.add_row(*_columns(row), style=_STYLE.get(row.state))
    more = [Text(f"... and {len(rows) - fitting} more")] if len(rows) > fitting else []
    return Group(drawn, *more, Text(summary(snapshot)))


def lines(snapshot: Snapshot) -> list[str]:
    """One line per cell, what several of them have as their reason once beneath, and the summary."""
    rows = [*(row for row in snapshot.others if row.state == "running"), *snapshot.cells]
    width = max((len(row.cell) for row in rows), default=0)
    reasons = Counter((row.state, row.reason) for row in rows if row.reason)
    shared = {key: number for key, number in reasons.items() if number > 1}
    short = [replace(row, reason="") if (row.state, row.reason) in shared else row for row in rows]
    return [
        *(f"{row.cell:{width}}  {_described(row)}" for row in short),
        *(f"{state}: {counted(number, 'cell')}: {reason}" for (state, reason), number in shared.items()),
        summary(snapshot),
    ]


def progress_lines(rows: Sequence[Row]) -> list[str]:
    """One line for each cell that runs and has something to say."""
    return [f"{row.cell}: {_progress(row)}" for row in rows if row.state == "running" and row.progress]


def summary(snapshot: Snapshot) -> str:
    counts = snapshot.counts()
    parts = [f"{counts[state]} {state}" for state in _SHOWN_FIRST if state != "done" and counts[state]]
    done = f"profile {snapshot.profile}: {counts['done']} of {counted(len(snapshot.cells), 'cell')} done"
    left = f"; about {duration(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
    return ", ".join([done, *parts]) + left


def duration(seconds: float) -> str:
    """Such as "45 s", "12 min" or "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _described(row: Row) -> str:
    if row.state == "running" and row.progress:
        return f"running: {_progress(row)}"
    again = f" (attempt {row.attempt})" if row.attempt > 1 else ""
    return f"{row.state}{again}{': ' + row.reason if row.reason else ''}"


def _figures(row: Row) -> dict[str, str]:
    """What the cell itself says, by name; "" for what it does not say."""
    told = row.progress or {}
    forms = (
        *(("loss", "{:.4f}"), ("dev_accuracy", "{:.4f}"), ("steps_per_second", "{:.1f}")),
        *(("memory_mb", "{:.0f} MB"), ("gpu_percent", "{} %")),
    )
    return {
        "step": f"{told.get('stage', '')} {told['step']}/{told['steps']}" if "step" in told else "",
        **{name: form.format(told[name]) if name in told else "" for name, form in forms},
        "left": duration(row.seconds_left) if told and row.seconds_left is not None else "",
    }


def _progress(row: Row) -> str:
    forms = {
        **{"step": "{}", "loss": "loss {}", "dev_accuracy": "dev accuracy {}", "steps_per_second": "{} steps/s"},
        **{"left": "{} left", "memory_mb": "{}", "gpu_percent": "GPU {} busy"},
    }
    figures = _figures(row)
    return ", ".join(form.format(figures[name]) for name, form in forms.items() if figures[name]).strip()


def _columns(row: Row) -> list[str]:
    state = row.state + (f" ({row.attempt})" if row.attempt > 1 else "")
    shown = _figures(row)
    names = ("loss", "dev_accuracy", "steps_per_second", "left", "memory_mb", "gpu_percent")
    first = shown["step"] if row.progress else row.reason
    return [row.cell, state, first, *(shown[name] for name in names), row.device]


def _known(state: str) -> str:
    return state if state in _SHOWN_FIRST else "interrupted"
