"""An MLflow server for tests: a real one on a port of this machine, which can die and come back."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Server:
    """An MLflow server that can go away and come back at the same address with the same data.

    Args:
        folder: takes its log.
        database: SQLite's file with what is recorded.
        artifacts: the folder for files.
    """

    def __init__(self, folder: Path, database: Path, artifacts: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        self._folder, self._database, self._artifacts = folder, database, artifacts

    def start(self) -> None:
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        storage = ["--backend-store-uri", f"sqlite:///{self._database}", "--artifacts-destination", self._artifacts]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, *storage],
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=1)
                return
            except OSError:
                assert self._process.poll() is None, (self._folder / "server.log").read_text()
                time.sleep(0.25)

    def kill(self) -> None:
        """All its processes, at once."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def running_server(folder: Path, database: Path, artifacts: Path) -> Iterator[Server]:
    """A server that runs during the block."""
    server = Server(folder, database, artifacts)
    server.start()
    try:
        yield server
    finally:
        server.kill()
