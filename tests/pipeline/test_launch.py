"""Stages as child processes: what one of them does to the others, and what is left when the caller goes away."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from project_folder import Project, job

from pipeline.launch import Device, Event, GridState, Heartbeat, Job, Options, run_jobs
from pipeline.launch.local import LocalBackend
from pipeline.launch.session import only_grid
from schoenbat.errors import UserError

FAILS = 'echo x >> {0}.txt && printf \'{{"kind":"{1}","message":"{2}"}}\' > $SCHOENBAT_OUTCOME_FILE && exit {3}'
COMMANDS = {
    "good": "echo hello $GREETING && echo done > good.txt",
    "absent": FAILS.format("absent", "unavailable", "not to be had", 3),
    "broken": "echo the reason && exit 1",
    "later": "echo never > later.txt",
    "slow": "echo started > slow.txt && sleep 100",
    "deaf": "trap '' INT TERM && echo started > deaf.txt && sleep 100",
    "hangs": "sleep 100",
    "crashes": "echo x >> crashes.txt && exit 7",
    "crashes_once": "test -e crashes_once.txt || { touch crashes_once.txt && kill -9 $$; }",
    "loses_its_worker": "test -e loses_its_worker.txt || { touch loses_its_worker.txt && kill -9 $PPID && sleep 100; }",
    "stops_itself": "test -e stops_itself.txt || { touch stops_itself.txt && exit 75; }",
    "never_ends": "echo x >> never_ends.txt && exit 75",
    "memory": FAILS.format("memory", "memory", "too little", 1),
    "usage": FAILS.format("usage", "usage", "unknown", 2),
    "nan": FAILS.format("nan", "failed", "loss is nan", 1),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def does(name: str, stages: Iterable[str], **options: Any) -> Job:
    """Return a job of some of the commands, by their names."""
    return job(name, {stage: COMMANDS[stage] for stage in stages}, **options)


def run(
    *jobs: Job, environment: dict[str, str] | None = None, stops: Callable[[], int] = lambda: 0, **options: Any
) -> Iterator[Event | None]:
    """The events of a grid of real workers on two slots."""
    heartbeat = Heartbeat(Path("logs"))
    backend = LocalBackend([Device("cpu", 2)], Path("logs"))
    chosen = Options(Path("logs/tiny"), environment or {}, **{"jobs": 2, "retries": 0, **options})
    state = GridState(Path("logs/tiny/grid.json"), heartbeat.path)
    with contextlib.closing(backend):
        yield from run_jobs(jobs, backend, heartbeat, chosen, state, stops)


def ends(events: Iterable[Event | None]) -> dict[str, Event]:
    final = ("done", "failed", "unavailable", "skipped", "stopped")
    return {event.job: event for event in events if event is not None and event.state in final}


def test_a_job_that_fails_stops_only_those_that_need_it(folder: Path) -> None:
    jobs = [
        does("absent", ("absent",)),
        does("broken", ("broken", "later")),
        does("later", ("later",), needs=("absent",)),
        does("slow", ("slow",), needs=("later",)),
        does("good", ("good",), needs=("elsewhere",)),
    ]
    ended = ends(run(*jobs, environment={"GREETING": "you"}))
    assert {name: event.state for name, event in ended.items()} == {
        "absent": "unavailable",
        "broken": "failed",
        "later": "skipped",
        "slow": "skipped",
        "good": "done",
    }
    assert (ended["absent"].text, ended["broken"].text) == ("not to be had", "the reason")
    assert (ended["absent"].cause, ended["later"].cause, ended["slow"].cause) == ("absent", "absent", "absent")
    assert "hello you" in Path("logs/tiny/good.log").read_text()
    assert not Path("later.txt").exists()


def attempts(stage: str) -> int:
    return Path(f"{stage}.txt").read_text().count("x")


@pytest.mark.slow
def test_crashes_and_lack_of_memory_are_tried_again_and_nothing_else_is(folder: Path) -> None:
    names = ("crashes", "crashes_once", "loses_its_worker", "stops_itself", "memory", "usage", "nan")
    jobs = [does(name, (name,), saves=name == "stops_itself") for name in (*names, "never_ends")]
    events = list(run(*jobs, retries=1))
    assert {name: (event.state, event.text) for name, event in ends(events).items() if event.state != "done"} == {
        "crashes": ("failed", "> echo x >> crashes.txt && exit 7"),
        "memory": ("failed", "too little"),
        "usage": ("failed", "unknown"),
        "nan": ("failed", "loss is nan"),
        "never_ends": ("failed", "stopped itself"),
    }
    assert {name: attempts(name) for name in ("crashes", "never_ends", "memory", "usage", "nan")} == {
        "crashes": 2,
        "never_ends": 2,
        "memory": 2,
        "usage": 1,
        "nan": 1,
    }
    tried_again = {event.job: event.text for event in events if event is not None and event.state == "retried"}
    assert tried_again["crashes_once"] == "crash: ended by SIGKILL"
    assert tried_again["loses_its_worker"] == "crash: ended by SIGKILL"
    assert tried_again["stops_itself"] == "stopped itself; goes on from its checkpoint"
    assert _processes_in(folder) == []


@pytest.mark.slow
def test_a_job_that_hangs_is_ended_and_not_tried_again(folder: Path) -> None:
    events = list(run(does("hangs", ("hangs",), timeout_seconds=6.0), retries=2))
    (event,) = ends(events).values()
    assert (event.state, event.text) == ("failed", "took more than 0.1 minutes")
    assert [event.state for event in events if event is not None].count("started") == 1
    assert _processes_in(folder) == []


@pytest.mark.slow
def test_the_longest_starts_first_and_what_measures_runs_alone_and_last(folder: Path) -> None:
    jobs = (
        does("measures", ("crashes_once",), exclusive=True, seconds=100.0),
        does("short", ("stops_itself",), seconds=1.0),
        does("long", ("good",), seconds=2.0),
        does("after", ("later",), needs=("short",)),
    )
    running: set[str] = set()
    order = []
    for event in run(*jobs, retries=1):
        if event is not None and event.state == "started":
            order.append(event.job)
            running.add(event.job)
            assert event.job != "measures" or running == {"measures"}
        elif event is not None:
            running.discard(event.job)
    assert order[:2] == ["long", "short"]
    assert set(order[-2:]) == {"measures"}


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 2])
def test_a_stage_that_does_not_heed_a_stop_is_killed(folder: Path, requests: int) -> None:
    events = run(does("deaf", ("deaf",)), stops=lambda: requests if Path("deaf.txt").exists() else 0)
    ended = ends(events)
    assert [event.state for event in ended.values()] == ["stopped"], ended
    assert _processes_in(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_and_their_timeout_do_not_hang_on_the_process_that_makes_them(
    folder: Path, number: signal.Signals
) -> None:
    def strike() -> None:
        while not Path("slow.txt").exists():
            time.sleep(0.05)
        for child in psutil.Process().children():
            if any("multiprocessing.forkserver" in word for word in child.cmdline()):
                child.send_signal(number)

    threading.Thread(target=strike, daemon=True).start()
    ended = ends(run(does("slow", ("slow",), timeout_seconds=15.0), does("good", ("good",), needs=("slow",))))
    assert ended["slow"].state == "failed"
    assert _processes_in(folder) == []
    again = ends(run(does("good", ("good",))))
    assert again["good"].state == "done", again


UNDER_A_HEARTBEAT = """
import subprocess, sys
from pipeline.host import heartbeat
heartbeat.EXPIRY_SECONDS = heartbeat.GRACE_SECONDS = 1.0
heartbeat.watch()
print("started", flush=True)
subprocess.run(["sleep", "100"])
"""


@pytest.mark.parametrize("how", ["deleted", "not renewed"])
def test_processes_end_with_their_heartbeat(tmp_path: Path, how: str) -> None:
    heartbeat = Heartbeat(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", UNDER_A_HEARTBEAT],
        env={**os.environ, "SCHOENBAT_HEARTBEAT": str(heartbeat.path)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    if how == "deleted":
        heartbeat.end()
    assert process.wait() != 0
    assert _processes_in(tmp_path) == []


def test_what_was_stopped_when_its_grid_was_killed_is_ended_by_the_next_of_this_checkout_alone(tmp_path: Path) -> None:
    def stopped(checkout: str) -> "subprocess.Popen[bytes]":
        heartbeat = tmp_path / checkout / "heartbeat-1-a"
        heartbeat.parent.mkdir()
        heartbeat.touch()
        process = subprocess.Popen(["sleep", "100"], env={**os.environ, "SCHOENBAT_HEARTBEAT": str(heartbeat)})
        process.send_signal(signal.SIGSTOP)
        return process

    mine, other = stopped("mine"), stopped("other")
    LocalBackend([Device("cpu", 2)], tmp_path / "mine").clear()
    assert not psutil.pid_exists(mine.pid)
    assert list(tmp_path.rglob("heartbeat-*")) == [tmp_path / "other/heartbeat-1-a"]
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(UserError, match=f"the file system of {tmp_path} has no file locks"), only_grid(tmp_path, print):
        pass


def _processes_in(folder: Path) -> list[psutil.Process]:
    """The other processes whose current folder is `folder`, but for the one that multiprocessing keeps till its end."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            tracker = any("resource_tracker" in word for word in process.cmdline())
            if process.pid != os.getpid() and process.cwd() == str(folder.resolve()) and not tracker:
                found.append(process)
    return found


@pytest.fixture
def heeded_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt even where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_an_interrupt_leaves_no_child_behind(folder: Path, heeded_interrupt: None) -> None:
    seen: list[str] = []

    def interrupt_once_it_runs() -> None:
        while not Path("slow.txt").exists():
            time.sleep(0.05)
        seen.extend(process.name() for process in _processes_in(folder))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_runs, daemon=True).start()
    with contextlib.closing(run(does("slow", ("slow",)))) as events, pytest.raises(KeyboardInterrupt):
        list(events)
    assert {"schoenbat-exp", "sleep"} <= set(seen)
    assert _processes_in(folder) == []


@pytest.mark.slow
def test_the_grid_goes_on_without_a_task_whose_data_cannot_be_had(
    project: Project, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    project.add_dvc()
    project.set("data", {"download_limit_mb": 1})
    selection = ("run", "--attn", "mean", "--seed", "0")
    code, out, err = invoke(*selection, "--dry-run")
    assert code == 0
    assert "lra-text-mean-transformer-0: train@tiny-lra-text-mean-transformer evaluate@" in out
    assert not Path("runs").exists()

    code, out, err = invoke(*selection)
    assert (code, err) == (3, "")
    assert "unavailable: download@tiny-lra-text: " in out
    assert "SCHOENBAT_DATA_MIRROR" in out
    assert "not run, because download@tiny-lra-text unavailable: 1 cell" in out
    assert "lra-text-mean-transformer-0: skipped" not in out
    assert "report: reports/tiny/index.html" in out
    assert Path("reports/tiny/index.md").is_file()
    assert Path("runs/tiny/lra-listops-mean-transformer/test/0.json").is_file()

    code, out, _ = invoke("run", "--cell", "lra-listops-mean-transformer-0")
    assert code == 0
    assert "nothing to do" in out

    rows = {row["cell"]: row for row in json.loads(invoke("status", "--json")[1])["cells"]}
    assert rows["lra-listops-mean-transformer-0"]["state"] == "done"
    assert rows["lra-text-mean-transformer-0"]["state"] == "unavailable"
    assert rows["lra-listops-softmax-transformer-0"]["state"] == "to run"
