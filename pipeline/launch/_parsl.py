"""Parsl as this project uses it: Slurm jobs that each take several cells, and come and go with the cells that wait.

The only importer of parsl on the engine's side.
"""

import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from parsl import Config, python_app
from parsl.dataflow.dflow import DataFlowKernel
from parsl.errors import ParslError
from parsl.executors import HighThroughputExecutor
from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
from parsl.jobs.error_handlers import windowed_error_handler
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from pipeline.grid.params import SlurmParams
from pipeline.launch._job import Attempt
from pipeline.launch.slurm_block import BLOCK_END_VARIABLE, END_SECONDS, run_attempt

_POLL_SECONDS = 10
_IDLE_SECONDS = 60.0
_HEARTBEAT_SECONDS, _LOST_SECONDS = 5, 30
_DRAIN_SECONDS = 15.0
"""So long before attempts are stopped, a Slurm job takes no further ones."""
_COMMAND_SECONDS = 60
_PARSL = "parsl.executors.high_throughput"
_END_GROUP = "kill -KILL -- -$pool 2>/dev/null"


class Pool:
    """Slurm jobs that run attempts.

    Args:
        slurm: the user's settings.
        options: of sbatch.
        cores: of one Slurm job.
        folder: takes Parsl's logs, the scripts of the jobs and what they print.
        lease: of the grid; Parsl's processes end with it.
    """

    def __init__(self, slurm: SlurmParams, options: Sequence[str], cores: int, folder: Path, lease: Path) -> None:
        minutes = slurm.walltime_minutes
        provider = _Provider(
            init_blocks=0,
            max_blocks=slurm.max_blocks,
            cores_per_node=cores,
            walltime=f"{minutes // 60:02}:{minutes % 60:02}:00",
            exclusive=False,
            scheduler_options="\n".join(f"#SBATCH {option}" for option in options),
            worker_init=f"export {BLOCK_END_VARIABLE}=$(($(date +%s) + {minutes * 60}))\n{slurm.worker_init}",
            launcher=SimpleLauncher(),
            cmd_timeout=_COMMAND_SECONDS,
        )
        under_lease = [sys.executable, "-m", "pipeline.launch.slurm_block", str(lease)]
        self._executor = HighThroughputExecutor(
            label="slurm",
            provider=provider,
            launch_cmd=_launch_command(under_lease),
            interchange_launch_cmd=[*under_lease, f"{_PARSL}.interchange"],
            address="127.0.0.1",
            cores_per_worker=cores / slurm.cells_per_block,
            max_workers_per_node=slurm.cells_per_block,
            heartbeat_period=_HEARTBEAT_SECONDS,
            heartbeat_threshold=_LOST_SECONDS,
            drain_period=max(1, int(minutes * 60 - END_SECONDS - _DRAIN_SECONDS)),
            block_error_handler=windowed_error_handler,
        )
        # With no address given, Parsl would ask a server on the internet for that of this machine.
        self._executor.address, self._executor.all_addresses = None, _addresses()
        self._kernel = DataFlowKernel(
            Config(
                executors=[self._executor],
                run_dir=str(folder),
                strategy="htex_auto_scale",
                strategy_period=1,
                max_idletime=_IDLE_SECONDS,
                usage_tracking=0,
            )
        )
        self._run = python_app(run_attempt, data_flow_kernel=self._kernel)

    def submit(self, attempt: Attempt, environment: Mapping[str, str], claim: Path) -> Any:
        """A future of what `run_attempt` returns; its exception says that the process which ran it was lost."""
        return self._run(
            attempt.command(),
            {**attempt.environment, **environment},
            str(attempt.folder),
            str(attempt.log.absolute()),
            str(claim),
        )

    def check(self) -> None:
        """Let all attempts fail if Parsl's central process is gone, without which nothing is heard of them."""
        if not self.is_alive() and not self._executor.bad_state_is_set:
            self._executor.set_bad_state_and_fail_all(ParslError("Parsl's interchange process has ended"))

    def is_alive(self) -> bool:
        process = self._executor.interchange_proc
        return process is not None and process.poll() is None

    def close(self) -> None:
        """Cancel the Slurm jobs and end Parsl's processes."""
        # It would wait forever for an answer from an interchange that is gone.
        if self.is_alive():
            self._kernel.cleanup()


class _Provider(SlurmProvider):  # type: ignore[misc, unused-ignore]
    """Parsl's, but quicker to see that a job has ended, and in folders with spaces in their names."""

    @property
    def status_polling_interval(self) -> int:
        return _POLL_SECONDS

    def execute_wait(self, cmd: str, timeout: int | None = None) -> tuple[int, str, str]:
        program, _, script = cmd.partition(" ")
        return super().execute_wait(f"{program} {shlex.quote(script)}" if program == "sbatch" else cmd, timeout)

    def _write_submit_script(self, template: str, script_filename: str, job_name: str, configs: dict[str, Any]) -> Any:
        quoted = {key: f'"{configs[key]}"' for key in ("job_stdout_path", "job_stderr_path")}
        return super()._write_submit_script(template, script_filename, job_name, {**configs, **quoted})


def _launch_command(under_lease: Sequence[str]) -> str:
    """Parsl's command for its worker pool, under the lease and with its folders quoted; Parsl formats it twice.

    A pool that is killed leaves processes of its own behind, which not every Slurm ends with the job, so the job does.
    """
    command = DEFAULT_LAUNCH_CMD
    for folder in ("{cert_dir}", "{logdir}", "{logconf}"):
        command = command.replace(folder, f"'{folder}'")
    ours = shlex.join([*under_lease, f"{_PARSL}.process_worker_pool"]).replace("{", "{{{{").replace("}", "}}}}")
    return f"{command.replace('process_worker_pool.py', ours)} & pool=$!; wait $pool; code=$?; {_END_GROUP}; exit $code"


def _addresses() -> set[str]:
    """The IPv4 addresses of this machine; workers take the first one that answers."""
    return {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
