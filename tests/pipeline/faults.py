"""What can happen to a grid, as tables of strikes: each says whether there was anything for it to strike."""

import contextlib
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from mlflow_server import Server
from slurm_node import Node
from small_grid import processes_of

STAGES, SERVER = "schoenbat-exp", "multiprocessing.forkserver"
SLURM_SECONDS = 60
"""Slurm looks every half minute whether the time of a job is over, and then lets it end in peace."""


@dataclass
class Scene:
    """A grid that runs.

    Attributes:
        folder: its checkout.
        grid: its process.
        moments: decides whatever is left to chance.
        server: takes what MLflow records; None for a database in the folder.
        node: of Slurm, if the grid runs there.
    """

    folder: Path
    grid: "subprocess.Popen[str]"
    moments: random.Random
    server: Server | None = None
    node: Node | None = None

    def runs(self) -> bool:
        return self.grid.poll() is None

    def children(self, part: str) -> list[psutil.Process]:
        """Its processes that have `part` in their name or command."""
        found = []
        for process in processes_of(self.folder):
            with contextlib.suppress(psutil.Error):
                # Workers have the command of the fork server that they come from, but a name of their own.
                if part == SERVER and process.name() == STAGES:
                    continue
                if part in process.name() or part in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def pause(self, least: float, most: float) -> None:
        time.sleep(self.moments.uniform(least, most))


Strike = Callable[[Scene], bool]


def signal_grid(*numbers: signal.Signals) -> Strike:
    def strike(scene: Scene) -> bool:
        struck = scene.runs()
        for number in numbers:
            scene.grid.send_signal(number)
            scene.pause(0.1, 1.0)
        return struck

    return strike


def signal_children(part: str, number: signal.Signals) -> Strike:
    def strike(scene: Scene) -> bool:
        found = scene.children(part)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return bool(found)

    return strike


def kill_grid_and(part: str) -> Strike:
    def strike(scene: Scene) -> bool:
        found = scene.children(part)
        if not found or not scene.runs():
            return False
        scene.grid.kill()
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return True

    return strike


def limit_stages(resource: int, amount: int) -> Strike:
    """Take something away from the stages while they run, as a full disk or a full memory does."""

    def strike(scene: Scene) -> bool:
        found = scene.children(STAGES)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(resource, (amount, amount))
        return bool(found)

    return strike


def hold_database(scene: Scene) -> bool:
    if not (scene.folder / "mlflow.db").exists():
        return False
    with contextlib.closing(sqlite3.connect(scene.folder / "mlflow.db", timeout=60)) as database:
        database.execute("BEGIN EXCLUSIVE")
        scene.pause(1.0, 8.0)
    return True


def damage_rwlock(scene: Scene) -> bool:
    """What DVC leaves when it is killed while it writes this file, struck together with the kill."""
    if not kill_grid_and(STAGES)(scene):
        return False
    (scene.folder / ".dvc/tmp/rwlock").write_text("")
    return True


def tear_lock(scene: Scene) -> bool:
    """What DVC leaves when it is killed while it writes its lock file, struck together with the kill."""
    lock = scene.folder / "dvc.lock"
    if not lock.exists() or not kill_grid_and(STAGES)(scene):
        return False
    whole = lock.read_bytes()
    (scene.folder / ".dvc/tmp/dvc.lock.before").write_bytes(whole)
    lock.write_bytes(whole[: scene.moments.randrange(len(whole))])
    return True


def restart_server(scene: Scene) -> bool:
    assert scene.server is not None
    scene.server.kill()
    scene.pause(0.0, 8.0)
    scene.server.start()
    return True


FAULTS: dict[str, Strike] = {
    "kill -9 of the stages": signal_children(STAGES, signal.SIGKILL),
    "kill -9 of the process that makes workers": signal_children(SERVER, signal.SIGKILL),
    "the process that makes workers hangs": signal_children(SERVER, signal.SIGSTOP),
    "kill -9 of the parent": signal_grid(signal.SIGKILL),
    "kill -9 of parent and stages": kill_grid_and(STAGES),
    "kill -9 while DVC writes its locks": damage_rwlock,
    "kill -9 while DVC writes its record": tear_lock,
    "Ctrl-C": signal_grid(signal.SIGINT),
    "Ctrl-C twice": signal_grid(signal.SIGINT, signal.SIGINT),
    "SIGTERM": signal_grid(signal.SIGTERM),
    "SIGTERM to the stages": signal_children(STAGES, signal.SIGTERM),
    "a stage that hangs": signal_children(STAGES, signal.SIGSTOP),
    "out of memory": limit_stages(psutil.RLIMIT_AS, 2**20),
    "disk full": limit_stages(psutil.RLIMIT_FSIZE, 5_000),
    "database locked": hold_database,
}
SERVER_FAULTS: dict[str, Strike] = {"MLflow server killed and restarted": restart_server}


def jobs_with_stages(scene: Scene) -> list[str]:
    """The ids of the Slurm jobs in which stages run."""
    found = set()
    for process in scene.children(STAGES):
        with contextlib.suppress(psutil.Error):
            found.add(process.environ()["SLURM_JOB_ID"])
    return sorted(found)


def cancel_job(scene: Scene) -> bool:
    assert scene.node is not None
    jobs = jobs_with_stages(scene)
    if jobs:
        scene.node.answer("scancel", scene.moments.choice(jobs))
    return bool(jobs)


def end_walltime(scene: Scene) -> bool:
    """Bring the end of a job forward, which its cells are not told; they are slowed down, not to be done before."""
    assert scene.node is not None
    jobs = jobs_with_stages(scene)
    if not jobs:
        return False
    job = scene.moments.choice(jobs)
    scene.node.answer("scontrol", "update", f"JobId={job}", "EndTime=now+1seconds")
    end = time.monotonic() + SLURM_SECONDS
    while (state := job_state(scene.node, job)) in ("RUNNING", "COMPLETING") and time.monotonic() < end:
        stages = scene.children(STAGES) if state == "RUNNING" else []
        for number, seconds in ((signal.SIGSTOP, 0.9), (signal.SIGCONT, 0.1)):
            for process in stages:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            time.sleep(seconds)
    return state == "TIMEOUT"


def job_state(node: Node, job: str) -> str:
    return node.answer("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


def drain_node(scene: Scene) -> bool:
    assert scene.node is not None
    update_node(scene.node, "drain")
    scene.pause(1.0, 8.0)
    update_node(scene.node, "resume")
    return True


def lose_node(scene: Scene) -> bool:
    """Slurm gives up the jobs of a node that is down, and takes it back as soon as it answers."""
    assert scene.node is not None
    struck = bool(jobs_with_stages(scene))
    update_node(scene.node, "down")
    return struck


def update_node(node: Node, state: str) -> None:
    node.answer("scontrol", "update", f"NodeName={node.name}", f"State={state}", "Reason=test")


def restart_daemon(daemon: str) -> Strike:
    def strike(scene: Scene) -> bool:
        assert scene.node is not None
        scene.node.kill(daemon)
        scene.pause(0.0, 8.0)
        scene.node.start(daemon)
        return True

    return strike


SLURM_FAULTS: dict[str, Strike] = {
    "a Slurm job cancelled": cancel_job,
    "walltime reached without notice": end_walltime,
    "node drained and resumed": drain_node,
    "node lost with its jobs": lose_node,
    "slurmd killed and restarted": restart_daemon("slurmd"),
    "slurmctld killed and restarted": restart_daemon("slurmctld"),
    "kill -9 of the parent, on Slurm": signal_grid(signal.SIGKILL),
    "kill -9 of parent and stages, on Slurm": kill_grid_and(STAGES),
    "kill -9 of the stages, on Slurm": signal_children(STAGES, signal.SIGKILL),
}
