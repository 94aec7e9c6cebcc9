"""A grid as lines of text: a table of cells, with as many columns as there is room for, and a summary."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.text import Text

from pipeline.host.text import counted
from pipeline.monitor.status import Row, Snapshot

_STYLES = {
    **{"running": "cyan", "waiting": "", "failed": "red", "unavailable": "yellow", "interrupted": "yellow"},
    **{"stopped": "yellow", "skipped": "yellow", "queued": "", "to run": "", "done": ""},
}
"""The states of cells in the order in which they are shown."""
_OPEN = ("running", "waiting", "queued")
_LEAST_NAME = 20
_GAP = "  "
_KEPT = ("cell", "state", "progress", "left")
"""Columns that are not dropped."""
_WORDS = ("cell", "state", "device")
"""Columns of words, which begin at the left."""


def screen(snapshot: Snapshot, width: int, height: int) -> list[Text]:
    """Return what fits on a terminal: the cells by state, those that run first, and the summary."""
    rows = sorted([*snapshot.others, *snapshot.cells], key=lambda row: [*_STYLES].index(row.state))
    fitting = max(1, height - 4)
    styles = ["", *(_STYLES[row.state] for row in rows[:fitting])]
    drawn = list(zip(table(rows[:fitting], width), styles, strict=False))
    if len(rows) > fitting:
        drawn.append((f"... and {len(rows) - fitting} more", ""))
    drawn.append((summary(snapshot), ""))
    return [Text(line, style, no_wrap=True, overflow="ellipsis") for line, style in drawn]


def lines(snapshot: Snapshot, width: int | None = None) -> list[str]:
    """Return a line for each cell, what several of them have as their reason once beneath, and the summary."""
    rows = [*(row for row in snapshot.others if row.state == "running"), *snapshot.cells]
    reasons = Counter((row.state, row.reason) for row in rows if row.reason)
    shared = {key: number for key, number in reasons.items() if number > 1}
    return [
        *table([replace(row, reason="") if (row.state, row.reason) in shared else row for row in rows], width),
        *(f"{state}: {counted(number, 'cell')}: {reason}" for (state, reason), number in shared.items()),
        summary(snapshot),
    ]


def table(rows: Sequence[Row], width: int | None = None) -> list[str]:
    """Return a line for each row under a line of titles; none for no rows.

    Where `width` is given, columns are dropped from the right until the table fits, and in the end names are shortened
    in their middle. The reason of a row without progress follows its state, however long it is.
    """
    if not rows:
        return []
    drawn = [_columns(row) for row in rows]
    titles = [title for title in drawn[0] if any(row[title] for row in drawn)]
    sizes = {title: max(len(title), *(len(row[title]) for row in drawn)) for title in titles}
    room = (width or sys.maxsize) + len(_GAP)
    while (taken := sum(sizes[title] + len(_GAP) for title in titles)) > room and titles[-1] not in _KEPT:
        titles.pop()
    if taken > room:
        sizes["cell"] = max(_LEAST_NAME, sizes["cell"] - (taken - room))
    found = [_GAP.join(_aligned(title, title, sizes[title]) for title in titles).rstrip()]
    for row, columns in zip(rows, drawn, strict=True):
        told = "" if row.progress else row.reason
        chosen = titles[:2] if told else titles
        found.append(_GAP.join([*(_aligned(title, columns[title], sizes[title]) for title in chosen), told]).rstrip())
    return found


def summary(snapshot: Snapshot) -> str:
    """Return one sentence: the cells by state, what runs beside them, what comes after them, and the time left."""
    counts = Counter(row.state for row in snapshot.cells)
    cells = [f"{counts['done']} of {counted(len(snapshot.cells), 'cell')} done"] if snapshot.cells else []
    cells += [f"{counts[state]} {state}" for state in _STYLES if state != "done" and counts[state]]
    parts = [", ".join(cells)] if cells else []
    if now := [row.cell for row in snapshot.others if row.state == "running"]:
        parts.append(f"running {', '.join(now)}")
    # While cells run, what gathers their results is far away.
    then = [row.cell for row in snapshot.others if row.state in _OPEN and row.state != "running"]
    if then and not any(counts[state] for state in _OPEN):
        parts.append(f"then {', '.join(then)}")
    if snapshot.seconds_left is not None:
        parts.append(f"about {duration(snapshot.seconds_left)} left")
    return f"profile {snapshot.profile}: {'; '.join(parts) or 'no cell'}"


def duration(seconds: float) -> str:
    """Return such as "45 s", "12 min" or "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _columns(row: Row) -> dict[str, str]:
    """Return the columns by title, the most important first; "" for what is not known."""
    told = row.progress or {}

    def shown(name: str, form: str) -> str:
        return form.format(told[name]) if name in told else ""

    return {
        "cell": row.cell,
        "state": row.state + (f" ({row.attempt})" if row.attempt > 1 else ""),
        "progress": f"{told.get('stage', '')} {told['step']}/{told['steps']}".strip() if "step" in told else "",
        "left": duration(row.seconds_left) if told and row.seconds_left is not None else "",
        "dev accuracy": shown("dev_accuracy", "{:.4f}"),
        "loss": shown("loss", "{:.4f}"),
        "steps/s": shown("steps_per_second", "{:.1f}"),
        "memory": shown("memory_mb", "{:.0f} MB"),
        "device": row.device,
    }


def _aligned(title: str, text: str, size: int) -> str:
    if len(text) > size:
        half = (size - 1) // 2
        text = f"{text[: size - 1 - half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"
    return text.ljust(size) if title in _WORDS else text.rjust(size)
