"""What the engine does with jobs that end as a script says, without any process: the rules that test_launch.py sees at
work on real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.launch import Attempt, Device, Ended, Event, GridState, Heartbeat, Job, Options, Work, _engine, run_jobs

FAILED, KILLED = Ended(1), Ended(-9)
POLLS = 3
"""A job runs for so many turns of the loop."""


class Scripted:
    """A backend whose jobs end one attempt after the other as told; with 0 where nothing is.

    Attributes:
        beside: for each attempt, the job and those that ran when it was started.
        kinds: what a failing job says of itself.
    """

    def __init__(self, ends: dict[str, list[Ended]], kinds: dict[str, str], devices: tuple[Device, ...]) -> None:
        self.devices, self.kinds, self.beside = devices, kinds, list[tuple[str, set[str]]]()
        self._ends, self._running, self._killed = ends, dict[str, tuple[int, Attempt]](), set[str]()

    def clear(self) -> None: ...

    def start(self, job: Job, device: str, attempt: Attempt) -> str:
        self.beside.append((job.name, set(self._running)))
        self._running[job.name] = (0, attempt)
        attempt.log.touch()
        return job.name

    def waits(self, name: str) -> bool:
        return False

    def poll(self, name: str) -> Ended | None:
        turns, attempt = self._running[name]
        self._running[name] = (turns + 1, attempt)
        stopped = name in self._killed
        if not stopped and (turns < POLLS or name == "endless"):
            return None
        del self._running[name]
        if name in self.kinds:
            outcome = Path(attempt.environment["SCHOENBAT_OUTCOME_FILE"])
            outcome.write_text(json.dumps({"kind": self.kinds[name], "message": "told"}))
        ends = self._ends.get(name)
        return KILLED if stopped else ends.pop(0) if ends else Ended(0)

    def kill(self, name: str) -> None:
        self._killed.add(name)

    def close(self) -> None: ...

    def starts(self, name: str) -> int:
        return [job for job, _ in self.beside].count(name)


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Event], Scripted]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_engine, "LOOP_SECONDS", 0.0)

    def run(
        *jobs: Job,
        ends: dict[str, list[Ended]] | None = None,
        kinds: dict[str, str] | None = None,
        devices: tuple[Device, ...] = (Device("cpu", 3),),
        stops: Callable[[], int] = lambda: 0,
        **options: Any,
    ) -> tuple[dict[str, Event], Scripted]:
        heartbeat = Heartbeat(Path("logs"))
        backend = Scripted(ends or {}, kinds or {}, devices)
        chosen = Options(Path("logs/tiny"), {}, **{"jobs": 3, "retries": 1, **options})
        state = GridState(Path("logs/tiny/grid.json"), heartbeat.path)
        final = ("done", "failed", "unavailable", "skipped", "stopped")
        events = [event for event in run_jobs(jobs, backend, heartbeat, chosen, state, stops) if event is not None]
        return {event.job: event for event in events if event.state in final}, backend

    return run


def job(name: str, **options: Any) -> Job:
    return Job(name, (Work(name, "true"),), **options)


def states(ended: dict[str, Event]) -> dict[str, str]:
    return {name: event.state for name, event in ended.items()}


def test_a_failure_skips_those_that_need_it_and_no_others(grid: Callable[..., Any]) -> None:
    jobs = (job("a"), job("b", needs=("a",)), job("c", needs=("b",)), job("d", needs=("elsewhere",)), job("e"))
    ended, _ = grid(*jobs, ends={"a": [FAILED]}, kinds={"a": "failed"})
    assert states(ended) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "done", "e": "done"}
    assert (ended["b"].cause, ended["c"].cause, ended["a"].text) == ("a", "a", "told")


def test_what_needs_others_starts_after_all_of_them(grid: Callable[..., Any]) -> None:
    ended, backend = grid(job("c", needs=("a", "b"), seconds=9.0), job("a"), job("b"))
    assert [name for name, _ in backend.beside][-1] == "c"
    assert backend.beside[-1][1] == set()
    assert set(states(ended).values()) == {"done"}


@pytest.mark.parametrize(
    ("end", "kind", "starts"),
    [
        *((FAILED, "crash", 2), (KILLED, None, 2), (FAILED, "memory", 2), (Ended(None, "node lost"), None, 2)),
        *((FAILED, "failed", 1), (FAILED, "usage", 1), (FAILED, "unavailable", 1)),
    ],
)
def test_crashes_and_lack_of_memory_are_tried_again_as_often_as_asked(
    grid: Callable[..., Any], end: Ended, kind: str | None, starts: int
) -> None:
    ended, backend = grid(job("a"), ends={"a": [end] * 5}, kinds={"a": kind} if kind else {})
    assert ended["a"].state == ("unavailable" if kind == "unavailable" else "failed")
    assert backend.starts("a") == starts


def test_what_ran_out_of_memory_is_alone_when_it_is_tried_again(grid: Callable[..., Any]) -> None:
    jobs = (job("a", seconds=9.0), job("b"), job("c"), job("d"), job("e"))
    ended, backend = grid(*jobs, ends={"a": [FAILED]}, kinds={"a": "memory"})
    assert set(states(ended).values()) == {"done"}
    first, again = (position for position, (name, _) in enumerate(backend.beside) if name == "a")
    assert backend.beside[again] == ("a", set())
    assert {name for name, others in backend.beside if "a" in others} <= {"b", "c"}
    assert (first, backend.beside[1][1]) == (0, {"a"})


def test_the_longest_starts_first_and_what_measures_time_is_last_and_alone(grid: Callable[..., Any]) -> None:
    times = {"measures": 99.0, "short": 1.0, "long": 3.0, "middle": 2.0}
    jobs = [job(name, seconds=seconds, exclusive=name == "measures") for name, seconds in times.items()]
    _, backend = grid(*jobs, jobs=2)
    assert [name for name, _ in backend.beside] == ["long", "middle", "short", "measures"]
    assert backend.beside[-1] == ("measures", set())


def test_no_more_run_at_once_than_asked_nor_than_the_devices_have_room_for(grid: Callable[..., Any]) -> None:
    jobs = [job(str(number), memory_mb=100.0) for number in range(6)]
    for options, most in (({"jobs": 2}, 2), ({"devices": (Device("cpu", 3, 2.5 * 100),)}, 2), ({}, 3)):
        _, backend = grid(*jobs, **options)
        assert max(len(others) + 1 for _, others in backend.beside) == most, options


def test_a_timeout_ends_a_job_for_good(grid: Callable[..., Any]) -> None:
    ended, backend = grid(job("endless", timeout_seconds=0.05), job("a"))
    assert states(ended) == {"endless": "failed", "a": "done"}
    assert ended["endless"].text.startswith("took more than ")
    assert backend.starts("endless") == 1


def test_asked_once_workers_lose_their_heartbeat_and_asked_twice_they_are_killed(grid: Callable[..., Any]) -> None:
    asked: list[bool] = []

    def stops() -> int:
        asked.append(bool(list(Path("logs").glob("heartbeat-*"))))
        return (len(asked) > 3) + (len(asked) > 6)

    ended, _ = grid(job("endless"), job("later", needs=("endless",)), stops=stops)
    assert states(ended) == {"endless": "stopped", "later": "stopped"}
    assert (asked[3], asked[4]) == (True, False)


def test_what_stops_itself_goes_on_if_it_saves_and_costs_no_attempt(grid: Callable[..., Any]) -> None:
    ended, backend = grid(job("a", saves=True), job("b"), ends={"a": [Ended(75)] * 3, "b": [Ended(75)] * 3})
    assert (ended["a"].state, backend.starts("a")) == ("done", 4)
    assert (ended["b"].state, backend.starts("b")) == ("failed", 2)
