"""Grids on a real Slurm of one node: they end as they would on this machine, and leave no Slurm job behind."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import project_folder
import pytest
from project_folder import Project
from slurm_node import Node
from small_grid import numbers, processes_of, start_grid

from pipeline.grid.cells import expand
from pipeline.grid.params import RunParams, SlurmParams, load_params
from pipeline.host.heartbeat import GRACE_SECONDS
from pipeline.launch import Device, Event, GridState, Heartbeat, Job, Options, run_jobs, slurm
from pipeline.launch.slurm import SlurmBackend, plan_slurm
from schoenbat.errors import UserError
from schoenbat.lra.config import build_config

RUN = RunParams(threads=1, slurm=SlurmParams(max_jobs=2, walltime_minutes=60))

COMMANDS = {
    "good": "echo hello $GREETING",
    "broken": "echo the reason && exit 1",
    "slow": "touch slow.txt && sleep 300",
    "saving": "python saving.py",
}
SAVING = """
import pathlib, signal, sys, time
saved = pathlib.Path("saved.txt")
if saved.exists():
    sys.exit(0)
def save(number, frame):
    saved.write_text("half")
    sys.exit(75)
signal.signal(signal.SIGINT, save)
time.sleep(300)
"""
CELLS = [
    f"lra-listops-{mechanism}-{seed}"
    for mechanism in ("softmax-transformer", "mean-transformer", "rmfa-exp-maclauformer", "rmfa-inverse-maclauformer")
    for seed in (0, 1)
]


@pytest.fixture
def cluster(slurm_machine: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with spaces in its name, and Slurm around it; no job is left when the test ends."""
    monkeypatch.setenv("SLURM_CONF", slurm_machine.environment["SLURM_CONF"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    wait_until(lambda: not slurm_jobs(), seconds=60)


@pytest.fixture
def stages(cluster: Path) -> Path:
    Path("saving.py").write_text(SAVING)
    return cluster


def wait_until(condition: Callable[[], object], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} seconds"
        time.sleep(0.2)


def slurm_jobs(state: str = "all states that are not over") -> list[str]:
    wanted = [f"--states={state}"] if state.isupper() else []
    command = ["squeue", "--noheader", "--format=%A", *wanted]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def job(name: str, **options: Any) -> Job:
    return project_folder.job(name, {name: COMMANDS[name]}, **options)


def run(run_params: RunParams, *jobs: Job, on_event: Callable[[Event], object] = print, **options: Any) -> list[Event]:
    """The events of a grid in this process."""
    devices, at_once = plan_slurm(run_params, None)
    backend = SlurmBackend(run_params, devices, Path("logs"))
    backend.clear()
    heartbeat = Heartbeat(Path("logs"))
    chosen = Options(Path("logs/tiny"), {"GREETING": "you"}, **{"jobs": at_once, "retries": 0, **options})
    events = []
    try:
        for event in run_jobs(jobs, backend, heartbeat, chosen, GridState(Path("logs/tiny/grid.json"), heartbeat.path)):
            if event is not None:
                on_event(event)
                events.append(event)
    finally:
        heartbeat.end()
        backend.close()
    return events


def test_each_job_ends_for_itself(stages: Path) -> None:
    slow = job("slow", timeout_seconds=10)
    events = run(RUN, job("good"), job("broken"), slow)
    ended = {event.job: event for event in events}
    assert {name: event.state for name, event in ended.items()} == {
        "good": "done",
        "broken": "failed",
        "slow": "failed",
    }
    assert (ended["broken"].text, ended["slow"].text) == ("the reason", "took more than 0.166667 minutes")
    assert "hello you" in Path("logs/tiny/good.log").read_text()


def test_before_the_end_of_the_walltime_a_cell_saves_and_goes_on_in_another_job(stages: Path) -> None:
    short = dataclasses.replace(RUN, slurm=SlurmParams(walltime_minutes=2))
    events = run(short, job("saving", saves=True))
    assert [event.state for event in events] == ["queued", "started", "retried", "started", "done"]
    assert "walltime" in events[2].text
    assert Path("saved.txt").read_text() == "half"


def test_a_job_that_cannot_start_its_worker_is_a_failure_with_a_reason(stages: Path) -> None:
    wrong = dataclasses.replace(RUN, slurm=SlurmParams(worker_init="echo no such module >&2; exit 1"))
    (*_, last) = run(wrong, job("good"))
    assert last.state == "failed"
    assert "no such module" in last.text


def test_a_killed_worker_is_a_failure_and_leaves_no_process(stages: Path) -> None:
    def kill_worker() -> None:
        wait_until(Path("slow.txt").exists)
        for process in processes_of(stages):
            if process.name() == "schoenbat-exp":
                process.kill()

    killer = threading.Thread(target=kill_worker)
    killer.start()
    (*_, last) = run(RUN, job("slow"))
    killer.join()
    assert (last.state, last.text) == ("failed", "ended by SIGKILL")
    wait_until(lambda: not processes_of(stages), seconds=60)


def test_a_job_of_a_lost_node_has_not_ended_before_its_heartbeat_must_have_ended_it(
    stages: Path, slurm_machine: Node
) -> None:
    moments = []

    def lose_node() -> None:
        wait_until(Path("slow.txt").exists)
        moments.append(time.monotonic())
        slurm_machine.answer("scontrol", "update", f"NodeName={slurm_machine.name}", "State=down", "Reason=test")

    def note(event: Event) -> None:
        if event.state == "failed":
            moments.append(time.monotonic())
            assert not processes_of(stages)

    loser = threading.Thread(target=lose_node)
    loser.start()
    (*_, last) = run(RUN, job("slow"), on_event=note)
    loser.join()
    assert "NODE_FAIL" in last.text
    lost, ended = moments
    assert ended - lost > GRACE_SECONDS


def test_a_job_that_slurm_does_not_take_for_long_is_a_failure_with_a_reason(
    stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_AWAY_SECONDS", 5.0)
    options = slurm._options
    monkeypatch.setattr(slurm, "_options", lambda run: [*options(run), "--partition=nowhere"])
    monkeypatch.setattr(sys.modules[__name__], "plan_slurm", lambda run, jobs: ([Device("slurm", 1)], 1))
    (*_, last) = run(RUN, job("good"))
    assert last.state == "failed"
    assert last.text.startswith("could not be started: sbatch: ")


def test_what_slurm_refuses_is_an_error_of_one_line(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(RUN, slurm=SlurmParams(partition="nowhere"))
    with pytest.raises(UserError, match=r"run\.slurm: .*[Ii]nvalid partition"):
        plan_slurm(wrong, None)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="--backend local"):
            plan_slurm(RUN, None)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"walltime_minutes": 1}, "walltime_minutes must be at least 2"),
        ({"max_jobs": 0}, "max_jobs must be at least 1"),
        ({"options": ["mem=16G"]}, "such as --mem=16G"),
        ({"walltime": "10:00"}, "unknown key 'walltime'"),
    ],
)
def test_a_wrong_setting_is_named(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_config(SlurmParams, section, "params.yaml: run.slurm")


@pytest.mark.parametrize(
    ("device", "options", "asked"),
    [
        ("cpu", [], []),
        ("cuda", [], ["--gpus-per-node=1"]),
        ("cuda:1", ["--gres=gpu:a100:1"], ["--gres=gpu:a100:1"]),
    ],
)
def test_a_job_asks_for_one_gpu_unless_its_options_say_which(device: str, options: list[str], asked: list[str]) -> None:
    run_params = RunParams(device=device, slurm=SlurmParams(options=options))
    assert [option for option in slurm._options(run_params) if "gpu" in option] == asked


@dataclasses.dataclass(frozen=True)
class Grid:
    """All cells, run by a process of its own, and the file of what it says."""

    process: "subprocess.Popen[str]"
    output: Path

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def runs(self) -> bool:
        return self.process.poll() is None


@pytest.fixture
def start(cluster: Path, tmp_path: Path) -> Iterator[Callable[[], Grid]]:
    """Starts a grid; none is left when the test ends."""
    started: list[Grid] = []

    def start() -> Grid:
        output = tmp_path / f"grid-{len(started)}.txt"
        with output.open("w", encoding="utf-8") as file:
            started.append(Grid(start_grid(cluster, "--backend", "slurm", output=file), output))
        return started[-1]

    yield start
    for grid in started:
        grid.process.kill()
        grid.process.wait()


def training(folder: Path) -> list[Path]:
    """The progress of cells that are in the middle of their training."""
    return list(folder.glob("checkpoints/tiny/*/progress.json"))


def finished(folder: Path) -> list[Path]:
    return list(folder.glob("runs/tiny/*/test/*.json"))


def test_a_cancelled_job_and_a_killed_engine_change_no_number_and_leave_nothing(
    cluster: Path, start: Callable[[], Grid], invoke: Callable[..., tuple[int, str, str]]
) -> None:
    project = Project(cluster)
    project.set("grid.tasks", ["lra-listops"])
    project.set("task.lra-listops.training.steps", 1200)
    project.set("task.lra-listops.training.eval_every", 200)
    project.set("run.slurm", {"max_jobs": 2, "walltime_minutes": 60})
    project.add_dvc()

    grid = start()
    wait_until(lambda: training(cluster) or not grid.runs())
    subprocess.run(["scancel", slurm_jobs("RUNNING")[0]], check=True)
    wait_until(lambda: "CANCELLED" in grid.said() or not grid.runs())
    wait_until(lambda: (len(finished(cluster)) >= 3 and training(cluster)) or not grid.runs())
    grid.process.kill()
    assert grid.process.wait() == -signal.SIGKILL, grid.said()
    assert "CANCELLED" in grid.said()
    wait_until(lambda: not slurm_jobs() and not processes_of(cluster), seconds=60)
    assert len(finished(cluster)) < len(CELLS)

    grid = start()
    assert grid.process.wait() == 0, grid.said()
    assert f"all {len(CELLS)} cells of profile tiny are done" in grid.said()
    wait_until(lambda: not slurm_jobs(), seconds=60)
    assert (
        sum(json.loads(path.read_text())["resumed"] for path in cluster.glob("checkpoints/tiny/*/resources.json")) >= 1
    )

    found = numbers(cluster, CELLS)
    for cell in expand(load_params()):
        for verb in ("train", "eval"):
            assert invoke(verb, *cell.arguments(), "--force")[0] == 0
    assert numbers(cluster, CELLS) == found
