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

from pipeline.launch.session import counted_stops
from pipeline.mlflow import tracking
from pipeline.models.trained import current_profile
from schoenbat.errors import UserError

_ENDING_SECONDS = 10.0
_LOOKING_SECONDS = 0.25
_LOG = Path("logs", "mlflow-ui.log")


def run(*, profile: str | None, port: int, open_browser: bool) -> None:
    """Serve the pages until Ctrl-C, SIGTERM or SIGHUP, and print the address; of a server that is there, only that."""
    profile = profile or current_profile()
    uri, experiment = tracking.store_uri(), tracking.find_experiment()
    if experiment is None:
        raise UserError(f"nothing is recorded in {uri} yet; run a grid first")
    if uri.startswith("http"):
        _show(page(uri.rstrip("/"), experiment, profile), open_browser)
        return
    address = f"http://127.0.0.1:{port}"
    with counted_stops() as stopped, _served(uri, port) as server:
        answers = False
        while not stopped():
            if server.poll() is not None:
                raise UserError(f"MLflow's server has ended; what it said is in {_LOG}")
            if not answers and (answers := _answers(address)):
                _show(page(address, experiment, profile), open_browser)
                print("Ctrl-C ends it", flush=True)
            time.sleep(_LOOKING_SECONDS)


def page(address: str, experiment: str, profile: str) -> str:
    """Return the address of a page that shows the cells of a profile as curves, the best first.

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
def _served(uri: str, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a server of MLflow on this machine alone, which neither reports home nor runs jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken; choose another one: --port {port + 1}") from None
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", uri, "--artifacts-destination", str(Path("mlruns").absolute())),
    ]
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**os.environ, **settings}
    _LOG.parent.mkdir(exist_ok=True)
    with _LOG.open("wb") as output:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield server
    finally:
        # All its processes: first asked, then killed.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(_ENDING_SECONDS)


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{address}/health", timeout=1).close()
        return True
    return False
