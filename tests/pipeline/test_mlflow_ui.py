"""MLflow's pages as a browser shows them: six cells of different mechanisms, side by side."""

import dataclasses
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib.image
import psutil
import pytest
from browser import missing, open_page
from project_folder import ROOT, Project, write_results

from pipeline.grid.cells import Cell
from pipeline.grid.results import CellResults, Fingerprint
from pipeline.mlflow import tracking
from schoenbat.lra.training import Evaluation

pytestmark = pytest.mark.xdist_group("mlflow-ui")

Invoke = Callable[..., tuple[int, str, str]]

PLAIN, KERNEL = ("softmax", "mean"), ("rmfa", "rmfa-sketch", "kernelized", "taylor1")
STEPS = list(range(10, 110, 10))
CELLS = [
    *(Cell("lra-text", attn, None, "transformer", 0) for attn in PLAIN),
    *(Cell("lra-text", attn, "exp", "maclauformer", 0) for attn in KERNEL),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `schoenbat-exp ui` prints for six cells with curves, beside one of another profile."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv(tracking.TRACKING_URI, raising=False)
        Project(folder)
        for profile, cells in (("tiny", CELLS), ("other", CELLS[:1])):
            ids = [write(cell, profile, number) for number, cell in enumerate(cells, start=1)]
            assert tracking.Tracker(profile, ids).finish() == ""
        with served(folder) as found:
            yield found


def write(cell: Cell, profile: str, number: int) -> str:
    """The files of a cell with a curve of its own; its id."""
    results = CellResults(profile, cell.id)
    write_results(results, cell, Fingerprint("code", "settings", "data"), 0.5)
    metrics, resources = results.metrics(), results.resources()
    assert metrics is not None
    assert resources is not None
    heights = [1 - 0.5 * math.exp(-step * number / 200) for step in STEPS]
    curve = [
        Evaluation(step, step // 40, 1e-3, 1.1 - reached, reached, 1.2 - reached, reached)
        for step, reached in zip(STEPS, heights, strict=True)
    ]
    best = {"best_dev_accuracy": heights[-1], "num_parameters": 1000 + number}
    tested, predictions = results.test(), results.predictions()
    assert tested is not None
    assert predictions is not None
    results.write_training(curve, resources, dataclasses.replace(metrics, **best))
    results.write_test(tested, predictions)
    return cell.id


def heed_signals() -> None:
    """As in a terminal: background jobs of a shell ignore SIGINT, and those of nohup SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def served(folder: Path, ended_by: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """The address; the signal ends the program and all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pipeline.cli", "ui", "--port", str(free_port())],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    children: list[psutil.Process] = []
    try:
        line = process.stdout.readline()
        assert line.startswith("MLflow: http://127.0.0.1:"), process.stderr.read()
        children = psutil.Process(process.pid).children(recursive=True)
        yield line.removeprefix("MLflow: ").strip()
        process.send_signal(ended_by)
        assert process.wait(timeout=60) == 0
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def keep_picture(page: Any, name: str) -> None:
    if folder := os.environ.get("SCHOENBAT_SCREENSHOTS"):
        page.screenshot(path=Path(folder, name))


@pytest.mark.slow
def test_the_page_shows_the_cells_of_the_profile_as_curves_that_can_be_told_apart(address: str) -> None:
    with open_page(2200, 2000) as page:
        page.goto(address)
        page.get_by_text("6 matching runs").wait_for(timeout=60_000)
        page.locator(".js-plotly-plot .scatterlayer .trace").first.wait_for(timeout=60_000)
        for title in ("dev_accuracy", "best_dev_accuracy", "test_accuracy", "train_loss", "num_parameters"):
            page.get_by_text(title, exact=True).first.wait_for(timeout=20_000)
        keep_picture(page, "mlflow-charts.png")
        shown = page.inner_text("body")
        for cell in CELLS:
            assert " ".join(filter(None, (cell.attn, cell.dotf))) + " " in shown, cell
        assert "grid tiny" not in shown, "the run of the grid has no curves"
        drawn = page.evaluate(
            "() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => "
            "plot.data.filter(trace => trace.type !== 'bar' && trace.x).map(trace => [...trace.x]))"
        )
    curves = [[steps for steps in traces if len(steps) == len(STEPS)] for traces in drawn]
    assert any(steps[: len(CELLS)] == [STEPS] * len(CELLS) for steps in curves), "all are over the same steps"


@pytest.mark.slow
def test_the_script_takes_a_picture_of_the_page_with_its_curves(address: str, tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    script = runpy.run_path(str(ROOT / "docs/figures/picture_mlflow.py"))
    script["take"](address, tmp_path / "page.png")
    pixels = matplotlib.image.imread(tmp_path / "page.png")
    assert pixels.shape[:2] == (script["HEIGHT"], script["WIDTH"])
    colours = {tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])[:, :3]}
    assert len(colours) > 100, "nothing is drawn"


@pytest.mark.slow
def test_the_comparison_begins_with_what_the_grid_is_made_of(address: str) -> None:
    base, _, rest = address.partition("/#/")
    experiment = rest.split("/")[1]
    query = json.dumps({"experiment_ids": [experiment], "filter": "params.profile = 'tiny'"}).encode()
    request = urllib.request.Request(f"{base}/api/2.0/mlflow/runs/search", query, {"Content-Type": "application/json"})
    found: list[dict[str, Any]] = json.load(urllib.request.urlopen(request, timeout=60))["runs"]
    assert len(found) == len(CELLS)
    runs, experiments = json.dumps([run["info"]["run_id"] for run in found]), json.dumps([experiment])
    with open_page() as page:
        page.goto(f"{base}/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}")
        page.get_by_text("Comparing 6 Runs").wait_for(timeout=60_000)
        page.locator(".js-plotly-plot").first.wait_for(timeout=60_000)
        chosen = page.locator("[class*=select-selection-item]").all_inner_texts()
        keep_picture(page, "mlflow-compare.png")
    shown = list(dict.fromkeys(text.strip() for text in chosen if text.strip()))
    assert shown == ["attn", "dotf", "former", "dev_accuracy"]


def test_the_address_of_a_server_is_shown_without_starting_another(
    address: str, project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv(tracking.TRACKING_URI, address.partition("/#")[0])
    assert invoke("ui", "--open") == (0, f"MLflow: {address}\n", "")
    assert opened == [address]
    code, out, _ = invoke("ui", "--profile", "other")
    assert code == 0
    assert "searchFilter=params.profile%20%3D%20%27other%27&" in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_ends_with_its_server_when_it_is_asked_to_or_loses_its_terminal(
    number: signal.Signals, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.Tracker("tiny").finish() == ""
    with served(Path.cwd(), ended_by=number):
        pass


@pytest.mark.slow
def test_a_server_that_ends_by_itself_is_an_error(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.Tracker("tiny").finish() == ""
    log, port = Path("logs", "mlflow-ui.log"), str(free_port())

    def end_server(_: str) -> None:
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if port in child.cmdline():
                    child.kill()

    monkeypatch.setattr("webbrowser.open", end_server)
    code, out, err = invoke("ui", "--port", port, "--open")
    assert code == 2
    assert out.startswith("MLflow: http://127.0.0.1:")
    assert err == f"error: MLflow's server has ended; what it said is in {log}\n"


def test_before_anything_is_recorded_it_is_said(project: Project, invoke: Invoke) -> None:
    code, out, err = invoke("ui")
    assert (code, out) == (2, "")
    assert err.startswith("error: nothing is recorded in sqlite:///")
    assert err.endswith("yet; run a grid first\n")
    assert not Path("mlflow.db").exists()


def test_a_port_that_is_taken_is_an_error_that_names_another(
    project: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking.Tracker("tiny").finish() == ""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = invoke("ui", "--port", str(port))
    assert (code, err) == (2, f"error: port {port} is taken; choose another one: --port {port + 1}\n")
