"""MLflow's pages on what this project records, opened where one compares: the cells of a profile, as curves."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

from pipeline import database, tracking
from pipeline.trained import current_profile
from schoenbat.errors import UserError

_STARTING_SECONDS = 120.0
_ENDING_SECONDS = 10.0


def run(*, profile: str | None, port: int, open_browser: bool) -> None:
    """Serve the pages until Ctrl-C, and print the address; where a server is there already, print that of its pages.

    Raises:
        UserError: nothing is recorded yet, or the port is taken.
    """
    profile = profile or current_profile()
    uri = os.environ.get(tracking.TRACKING_URI) or database.default_uri(Path.cwd())
    experiment = tracking.find_experiment(uri)
    if uri.startswith("http"):
        _show(page(uri.rstrip("/"), experiment, profile), open_browser)
        return
    with _served(uri, port) as (address, server):
        _show(page(address, experiment, profile), open_browser)
        print("Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


def page(address: str, experiment: str, profile: str) -> str:
    """The page of a server that shows the cells of a profile as curves, the best first.

    Sorted by anything but time, MLflow does not hide cells below the run of their grid.
    """
    query = {
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
        "searchFilter": f"params.profile = '{profile}'",
        "orderByKey": "metrics.`test_accuracy`",
        "orderByAsc": "false",
    }
    return f"{address}/#/experiments/{experiment}/runs?{urlencode(query, quote_via=quote)}"


def _show(address: str, open_browser: bool) -> None:
    print(f"MLflow: {address}", flush=True)
    if open_browser:
        webbrowser.open(address)


@contextlib.contextmanager
def _served(uri: str, port: int) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server of MLflow on this machine alone, which neither reports home nor runs jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken; choose another one: --port {port + 1}") from None
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    storage = ["--backend-store-uri", uri, "--artifacts-destination", str(Path("mlruns").absolute())]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = Path("logs", "mlflow-ui.log")
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, *storage],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **settings},
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(address, server, log)
        yield address, server
    finally:
        _end(server)


def _wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up = time.monotonic() + _STARTING_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > give_up:
                raise UserError(f"MLflow's server does not start; what it said is in {log}") from None
            time.sleep(0.25)


def _end(server: "subprocess.Popen[bytes]") -> None:
    """All its processes: first asked, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_ENDING_SECONDS)
            return
