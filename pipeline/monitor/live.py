"""A grid on the screen while it runs: a table that is drawn again and again on a terminal, and lines elsewhere."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live

from pipeline.launch import Event, GridState
from pipeline.monitor import status, view

_DRAW_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def show_grid(profile: str, cells: Sequence[str], state: GridState) -> Iterator[Callable[[Event | None], None]]:
    """To be called with every event of a grid: it redraws a table on a terminal, and prints lines elsewhere."""

    def snapshot() -> status.Snapshot:
        names = [cell for cell in cells if cell in state.jobs()]
        rows = [status.job_row(profile, name, state.jobs()[name]) for name in names]
        return status.assemble(profile, True, rows, state.jobs())

    console = Console()
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            drawn = 0.0

            def redraw(event: Event | None) -> None:
                nonlocal drawn
                if event is not None and event.state in ("failed", "unavailable", "retried"):
                    live.console.print(_line(event), markup=False, highlight=False)
                if time.monotonic() - drawn >= _DRAW_SECONDS:
                    live.update(view.table(snapshot(), console.height), refresh=True)
                    drawn = time.monotonic()

            yield redraw
            live.update(view.table(snapshot(), console.height), refresh=True)
        return
    said = time.monotonic()

    def say(event: Event | None) -> None:
        nonlocal said
        # Of jobs that were never started there may be hundreds; the end of the run counts them.
        if event is not None and event.log is not None:
            print(_line(event), flush=True)
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            now = snapshot()
            print("\n".join([*view.progress_lines(now.cells), view.summary(now)]), flush=True)
            said = time.monotonic()

    yield say


def watch_grid(as_json: bool) -> None:
    """Draw the status once a second; where there is no terminal, or for programs, print a line now and then."""
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        if as_json or not console.is_terminal:
            while True:
                snapshot = status.take_snapshot()
                print(json.dumps(dataclasses.asdict(snapshot)) if as_json else view.summary(snapshot), flush=True)
                time.sleep(_SECONDS_BETWEEN_LINES)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(view.table(status.take_snapshot(), console.height), refresh=True)
                time.sleep(_DRAW_SECONDS)


def _line(event: Event) -> str:
    return f"{event.job}: {event.state}{' (' + event.text + ')' if event.text else ''}"
