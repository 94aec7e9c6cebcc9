"""Stages as child processes: what one of them does to the others, and what is left when the caller goes away."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from project_folder import Project, init_dvc

from pipeline.launch import run_cells

STAGES = """
stages:
  good:
    cmd: echo hello $GREETING && echo done > good.txt
    outs: [good.txt]
  absent:
    cmd: >-
      printf '{"kind":"unavailable","message":"not to be had"}' > $SCHOENBAT_OUTCOME_FILE && exit 3
  broken:
    cmd: echo the reason && exit 1
  later:
    cmd: echo never > later.txt
  slow:
    cmd: echo started > slow.txt && sleep 100
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(STAGES)
    init_dvc(tmp_path)
    return tmp_path


def test_a_stage_that_fails_stops_only_those_that_need_it(stages: Path) -> None:
    graph = {"absent": [], "broken": [], "later": ["absent"], "slow": ["later"], "good": ["elsewhere"]}
    events = list(run_cells(graph, Path("logs"), {"GREETING": "you"}))
    assert [event.state for event in events[:5]] == ["queued"] * 5
    ends = {event.stage: event for event in events if event.state not in ("queued", "started", "progress")}
    assert {stage: event.state for stage, event in ends.items()} == {
        "absent": "unavailable",
        "broken": "failed",
        "later": "skipped",
        "slow": "skipped",
        "good": "done",
    }
    assert (ends["absent"].text, ends["broken"].text) == ("not to be had", "the reason")
    assert {ends["later"].cause, ends["slow"].cause} == {"absent"}
    assert [event.text for event in events if event.stage == "good" and event.state == "progress"] == ["hello you"]
    assert "hello you" in Path("logs/good.log").read_text()
    assert not Path("later.txt").exists()


def _processes_in(folder: Path) -> list[str]:
    """Command lines of the other processes whose current folder is `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.cwd() == str(folder.resolve()):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.fixture
def heeded_interrupt() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt even where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_no_child_behind(stages: Path, heeded_interrupt: None) -> None:
    seen: list[str] = []

    def interrupt_once_it_runs() -> None:
        while not Path("slow.txt").exists():
            time.sleep(0.05)
        seen.extend(_processes_in(stages))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once_it_runs, daemon=True).start()
    with contextlib.closing(run_cells({"slow": []}, Path("logs"), {})) as events, pytest.raises(KeyboardInterrupt):
        list(events)
    assert [command for command in seen if "repro --single-item slow" in command]
    assert _processes_in(stages) == []


def test_the_grid_goes_on_without_a_task_whose_data_cannot_be_had(
    project: Project, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    project.add_dvc()
    project.set("data", {"download_limit_mb": 1})
    selection = ("run", "--attn", "mean", "--seed", "0")
    code, out, err = invoke(*selection, "--dry-run")
    assert code == 0
    assert "train@tiny-lra-text-mean-transformer-0" in out
    assert not Path("runs").exists()

    code, out, err = invoke(*selection)
    assert (code, err) == (3, "")
    assert "unavailable: download@lra-text: " in out
    assert "SCHOENBAT_DATA_MIRROR" in out
    assert "not run: lra-text-mean-transformer-0, because download@lra-text unavailable" in out
    assert "report: reports/tiny/index.md" in out
    assert Path("reports/tiny/index.md").is_file()
    assert Path("runs/tiny/lra-listops-mean-transformer-0/test.json").is_file()

    code, out, _ = invoke("run", "--cell", "lra-listops-mean-transformer-0")
    assert code == 0
    assert "nothing to do" in out

    rows = {row["cell"]: row for row in json.loads(invoke("status", "--json")[1])["cells"]}
    assert rows["lra-listops-mean-transformer-0"]["state"] == "done"
    assert rows["lra-text-mean-transformer-0"]["state"] == "unavailable"
    assert rows["lra-listops-softmax-transformer-0"]["state"] == "to run"
