"""A grid on the screen while it runs: a table that is drawn again and again on a terminal, and lines elsewhere."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.live import Live

from pipeline.launch import Event, GridState
from pipeline.monitor import status, view

_DRAW_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 30.0


class _Screen:
    """Shows snapshots, not more often than they can be read; `live` is to be entered."""

    def __init__(self) -> None:
        console = Console()
        self.terminal = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.live = self.terminal or contextlib.nullcontext()
        self.seconds = _SECONDS_BETWEEN_LINES if self.terminal is None else _DRAW_SECONDS
        self.shown = time.monotonic()

    def show(self, snapshot: status.Snapshot) -> None:
        """Draw the table anew; or print the cells that run, and the summary."""
        if self.terminal is None:
            running = [row for row in snapshot.cells if row.state == "running" and row.progress]
            print(*view.table(running), view.summary(snapshot), sep="\n", flush=True)
        else:
            size = self.terminal.console.size
            self.terminal.update(Group(*view.screen(snapshot, size.width, size.height)), refresh=True)
        self.shown = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        if self.terminal is None:
            print(line, flush=True)
        else:
            self.terminal.console.print(line, markup=False, highlight=False)


@contextlib.contextmanager
def show_grid(profile: str, cells: Sequence[str], state: GridState) -> Iterator[Callable[[Event | None], None]]:
    """Give a function to be called with every event of a grid, which shows the grid."""

    def snapshot() -> status.Snapshot:
        jobs = state.jobs()
        return status.assemble(profile, True, [status.job_row(profile, c, jobs[c]) for c in cells if c in jobs], jobs)

    screen = _Screen()
    with screen.live:

        def show(event: Event | None) -> None:
            # Of jobs that were never started there may be hundreds; the end of the run counts them.
            of_interest = ("failed", "unavailable", "retried")
            if event is not None and (event.log is not None if screen.terminal is None else event.state in of_interest):
                screen.say(f"{event.job}: {event.state}{' (' + event.text + ')' if event.text else ''}")
            if time.monotonic() - screen.shown >= screen.seconds:
                screen.show(snapshot())

        yield show
        if screen.terminal is not None:
            screen.show(snapshot())


def watch_grid(as_json: bool) -> None:
    """Show the status until Ctrl-C, once a second on a terminal; elsewhere, and for programs, now and then."""
    with contextlib.suppress(KeyboardInterrupt):
        while as_json:
            print(json.dumps(dataclasses.asdict(status.take_snapshot())), flush=True)
            time.sleep(_SECONDS_BETWEEN_LINES)
        screen = _Screen()
        with screen.live:
            while True:
                screen.show(status.take_snapshot())
                time.sleep(screen.seconds)
