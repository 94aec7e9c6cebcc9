"""What a person sees of a grid: a table that is drawn again and again on a terminal, and plain lines elsewhere."""

from collections.abc import Sequence

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
    """One line per cell, and the summary."""
    rows = [*(row for row in snapshot.others if row.state == "running"), *snapshot.cells]
    width = max((len(row.cell) for row in rows), default=0)
    return [*(f"{row.cell:{width}}  {_described(row)}" for row in rows), summary(snapshot)]


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


def _progress(row: Row) -> str:
    progress = row.progress or {}
    parts = [f"{progress.get('stage', '')} {progress['step']}/{progress['steps']}"] if "step" in progress else []
    if "loss" in progress:
        parts.append(f"loss {progress['loss']:.4f}")
    if "dev_accuracy" in progress:
        parts.append(f"dev accuracy {progress['dev_accuracy']:.4f}")
    if "steps_per_second" in progress:
        parts.append(f"{progress['steps_per_second']:.1f} steps/s")
    if row.seconds_left is not None:
        parts.append(f"{duration(row.seconds_left)} left")
    if "memory_mb" in progress:
        parts.append(f"{progress['memory_mb']:.0f} MB")
    if "gpu_percent" in progress:
        parts.append(f"GPU {progress['gpu_percent']} % busy")
    return ", ".join(parts).strip()


def _columns(row: Row) -> list[str]:
    progress = row.progress or {}
    again = f" ({row.attempt})" if row.attempt > 1 else ""
    if not progress:
        return [row.cell, row.state + again, row.reason, "", "", "", "", "", "", row.device]
    return [
        row.cell,
        row.state + again,
        f"{progress.get('stage', '')} {progress['step']}/{progress['steps']}" if "step" in progress else "",
        f"{progress['loss']:.4f}" if "loss" in progress else "",
        f"{progress['dev_accuracy']:.4f}" if "dev_accuracy" in progress else "",
        f"{progress['steps_per_second']:.1f}" if "steps_per_second" in progress else "",
        duration(row.seconds_left) if row.seconds_left is not None else "",
        f"{progress['memory_mb']:.0f} MB" if "memory_mb" in progress else "",
        f"{progress['gpu_percent']} %" if "gpu_percent" in progress else "",
        row.device,
    ]


def _known(state: str) -> str:
    return state if state in _SHOWN_FIRST else "interrupted"
