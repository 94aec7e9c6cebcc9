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
    """Shows snapshots, not more often than they can be read, while `live` is entered."""

    def __init__(self) -> None:
        self._console = Console()
        self.is_terminal = self._console.is_terminal
        self.live = Live(console=self._console, auto_refresh=False) if self.is_terminal else contextlib.nullcontext()
        self.seconds = _DRAW_SECONDS if self.is_terminal else _SECONDS_BETWEEN_LINES
        self.shown = time.monotonic()

    def show(self, snapshot: status.Snapshot) -> None:
        """Draw the table anew; or print the cells that run, and the summary."""
        if isinstance(self.live, Live):
            size = self._console.size
            self.live.update(Group(*view.screen(snapshot, size.width, size.height)), refresh=True)
        else:
            running = [row for row in snapshot.cells if row.state == "running" and row.progress]
            print(*view.table(running), view.summary(snapshot), sep="\n", flush=True)
        self.shown = time.monotonic()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def show_grid(profile: str, cells: Sequence[str], state: GridState) -> Iterator[Callable[[Event | None], None]]:
    """Give a function to be called with every event of a grid, which shows the grid."""

    def snapshot() -> status.Snapshot:
        jobs = state.jobs
        return status.assemble(profile, True, [status.job_row(profile, c, jobs[c]) for c in cells if c in jobs], jobs)

    screen = _Screen()
    with screen.live:

        def show(event: Event | None) -> None:
            # Of jobs that were never started there may be hundreds; the end of the run counts them.
            of_interest = ("failed", "unavailable", "retried")
            if event is not None and (event.state in of_interest if screen.is_terminal else event.log is not None):
                screen.say(f"{event.job}: {event.state}{' (' + event.text + ')' if event.text else ''}")
            if time.monotonic() - screen.shown >= screen.seconds:
                screen.show(snapshot())

        yield show
        if screen.is_terminal:
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
