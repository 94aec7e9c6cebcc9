"""How stages of the grid are run: one function that yields an event for each change of state.

A stage is always the same child process, `dvc --wait-for-lock repro --single-item STAGE`, so it does not know how it
was started, and afterwards DVC's own record is complete. The order between stages is given by the caller.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

OUTCOME_VARIABLE = "SCHOENBAT_OUTCOME_FILE"
"""Names a file into which a failing command writes {"kind": ..., "message": ...}; see `pipeline.cli.main`."""

_START_OF_COMMAND = "> "
_END_OF_COMMAND = ("Updating lock file", "Generating lock file", "ERROR: failed to reproduce")
"""DVC's own lines around the output of a stage's command."""

State = Literal["queued", "started", "progress", "done", "failed", "unavailable", "skipped"]


@dataclass(frozen=True)
class Event:
    """A change of state of one stage.

    Attributes:
        stage: the name of the DVC stage.
        state: "unavailable" is a failure because the data cannot be had here; "skipped" means that an earlier stage
            did not succeed.
        text: a line of output for "progress", the time taken for "done", the reason for the last three.
        log: the file with all output of the stage, once it has started.
        cause: for "failed", "unavailable" and "skipped", the stage that did not succeed in the first place.
    """

    stage: str
    state: State
    text: str = ""
    log: Path | None = None
    cause: str | None = None


def run_cells(
    graph: Mapping[str, Sequence[str]], logs: Path, environment: Mapping[str, str]
) -> Generator[Event, None, None]:
    """Run the stages of `graph` one after another; one that fails stops only those that need it.

    Args:
        graph: stages and, for each, the stages it needs, in an order that can be run as it stands. A needed stage that
            is not itself in the graph counts as done.
        logs: the folder for one log per stage.
        environment: variables for the children, besides those of this process.

    Yields:
        Events, all "queued" first. When the caller stops iterating, the running child is stopped as well.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for stage in graph:
        yield Event(stage, "queued")
    unsuccessful: dict[str, Event] = {}
    for stage, needs in graph.items():
        broken = [unsuccessful[need] for need in needs if need in unsuccessful]
        if broken:
            event = Event(stage, "skipped", f"needs {broken[0].cause}", cause=broken[0].cause)
            unsuccessful[stage] = event
            yield event
            continue
        for event in _run_stage(stage, logs / f"{stage}.log", environment):
            if event.state in ("failed", "unavailable"):
                unsuccessful[stage] = event
            yield event


def _run_stage(stage: str, log: Path, environment: Mapping[str, str]) -> Iterator[Event]:
    outcome = log.with_suffix(".outcome.json")
    outcome.unlink(missing_ok=True)
    began = time.monotonic()
    yield Event(stage, "started", log=log)
    with log.open("w", encoding="utf-8") as log_file:
        child = subprocess.Popen(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                **os.environ,
                **environment,
                "PATH": _search_path(),
                "PYTHONUNBUFFERED": "1",
                OUTCOME_VARIABLE: str(outcome.absolute()),
            },
            start_new_session=True,
        )
        assert child.stdout is not None
        try:
            inside_command, last_line = False, ""
            for line in child.stdout:
                log_file.write(line)
                log_file.flush()
                if line.startswith(_END_OF_COMMAND):
                    inside_command = False
                if inside_command and line.strip():
                    last_line = line.strip()
                    yield Event(stage, "progress", line.rstrip(), log)
                if line.startswith(_START_OF_COMMAND):
                    inside_command = True
            child.wait()
        finally:
            if child.poll() is None:
                _stop(child)
    if child.returncode == 0:
        yield Event(stage, "done", f"{time.monotonic() - began:.1f} s", log)
    elif outcome.is_file():
        reason = json.loads(outcome.read_text(encoding="utf-8"))
        state: State = "unavailable" if reason["kind"] == "unavailable" else "failed"
        yield Event(stage, state, reason["message"], log, stage)
    else:
        yield Event(stage, "failed", last_line or _last_line(log), log, stage)


def _search_path() -> str:
    """PATH with the folder of this interpreter first: the commands in dvc.yaml are found there."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _stop(child: subprocess.Popen[str]) -> None:
    """End a child and all that it started."""
    os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
