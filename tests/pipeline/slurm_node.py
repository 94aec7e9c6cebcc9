"""A real Slurm of one node on 127.0.0.1, for tests: no systemd, no cgroups, no database, nothing outside one folder.

    python tests/pipeline/slurm_node.py COMMAND...

runs a command that finds this Slurm, and stops it afterwards. It takes root, and Debian's `slurm-wlm` and `munge`.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "scancel", "squeue", "scontrol")
START_SECONDS, STOP_SECONDS = 60, 30
_SBIN = "/usr/sbin"
_PR_SET_PDEATHSIG = 1

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
KillWait=5
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why a Slurm cannot be started here; "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of one's own takes Linux and root"
    absent = [program for program in PROGRAMS if _which(program) is None]
    return f"not installed: {', '.join(absent)} (Debian: apt-get install slurm-wlm munge)" if absent else ""


class Node:
    """A running Slurm.

    Attributes:
        environment: in which its commands find it.
        name: of its only node.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.name = _host()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, daemon: str) -> None:
        arguments = ["-D", "-f", self.environment["SLURM_CONF"]]
        if daemon == "munged":
            files = [f"--{option}={self._folder}/munge/{option.split('-')[0]}" for option in _MUNGE_FILES]
            arguments = ["--foreground", "--force", *files]
        self.daemons[daemon] = _start(self._folder, daemon, *arguments)

    def kill(self, daemon: str) -> None:
        self.daemons[daemon].kill()
        self.daemons[daemon].wait()

    def answer(self, *command: str) -> str:
        """What one of Slurm's commands prints, whether it succeeds or not."""
        found = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        return found.stdout.strip()

    def state(self) -> str:
        """Of the node, such as "idle"; "" while there is no answer."""
        return self.answer("sinfo", "--noheader", "--format=%t")


@contextlib.contextmanager
def slurm_node(cpus: int = 2) -> Iterator[Node]:
    """A running Slurm. Afterwards its jobs and daemons are gone.

    Args:
        cpus: what the node says it has, whatever the machine has.
    """
    # Munge's socket has a short limit for its path, so the folder is not one of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    node = Node(folder)
    try:
        _configure(folder, node.name, cpus)
        node.start("munged")
        _wait_for(lambda: (folder / "munge/socket").exists(), folder, node)
        node.start("slurmctld")
        node.start("slurmd")
        _wait_for(lambda: node.state() == "idle", folder, node)
        yield node
    finally:
        if len(node.daemons) == len(DAEMONS):
            _end_jobs(node)
        for daemon in reversed(node.daemons.values()):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder)


_MUNGE_FILES = ("key-file", "log-file", "pid-file", "seed-file", "socket")


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _configure(folder: Path, host: str, cpus: int) -> None:
    folder.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge/key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(64))
    with socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in (first, second)]
    config = CONFIG.format(
        folder=folder,
        host=host,
        controller_port=ports[0],
        node_port=ports[1],
        cpus=cpus,
    )
    (folder / "slurm.conf").write_text(config, encoding="ascii")


def _start(folder: Path, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    path = _which(program)
    assert path is not None
    with (folder / f"{program}.out").open("wb") as out:
        return subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_for(condition: Callable[[], bool], folder: Path, node: Node) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end or any(daemon.poll() is not None for daemon in node.daemons.values()):
            logs = [*sorted(folder.glob("*.out")), *sorted(folder.glob("*.log"))]
            said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)
            raise RuntimeError(f"Slurm did not start:\n{said}")
        time.sleep(0.2)


def _end_jobs(node: Node) -> None:
    end = time.monotonic() + STOP_SECONDS
    while (jobs := node.answer("squeue", "--noheader", "--format=%A").split()) and time.monotonic() < end:
        node.answer("scancel", *jobs)
        time.sleep(0.5)


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), _SBIN]))


def main(command: list[str]) -> int:
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    with slurm_node() as node:
        return subprocess.run(command, env={**os.environ, **node.environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
