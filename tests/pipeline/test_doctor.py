"""schoenbat-exp doctor: what is wrong is named with what to do, and decides the exit code."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from project_folder import Project

from pipeline.doctor import gpu_tests
from pipeline.doctor.gpu_tests import Case

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def whole(project: Project) -> Project:
    project.add_dvc()
    return project


def lines(out: str) -> dict[str, str]:
    return {line.split()[1]: line for line in out.splitlines()}


def test_where_everything_is_there_nothing_is_wrong_and_nothing_is_made(whole: Project, invoke: Invoke) -> None:
    before = sorted(path for path in whole.folder.rglob("*") if "logs" not in path.parts)
    code, out, err = invoke("doctor")
    assert (code, err) == (0, "")
    found = lines(out)
    assert list(found) == [
        "python",
        "packages",
        "settings",
        "code",
        "torch",
        "threads",
        "dvc",
        "mlflow",
        "disk",
        "memory",
        "data",
    ]
    assert all(line.split()[0] in ("ok", "note") for line in found.values())
    assert sys.version.split()[0] in found["python"]
    assert torch.__version__ in found["torch"]
    assert "profile tiny, 16 cells" in found["settings"]
    assert "0 of " in found["dvc"]
    assert "the first run makes its database" in found["mlflow"]
    assert "lra-text not fetched yet" in found["data"]
    assert sorted(path for path in whole.folder.rglob("*") if "logs" not in path.parts) == before


def test_findings_can_be_read_by_programs(whole: Project, invoke: Invoke) -> None:
    code, out, _ = invoke("doctor", "--json")
    report = json.loads(out)
    assert (code, report["ok"]) == (0, True)
    assert {finding["subject"] for finding in report["findings"]} >= {"torch", "dvc", "mlflow", "data"}
    assert all(set(finding) == {"subject", "state", "text", "mend"} for finding in report["findings"])


def no_such_device(project: Project) -> None:
    project.set("run.device", "cuda:99")


def too_many_threads(project: Project) -> None:
    project.set("run.threads", 1000)


def a_wrong_key(project: Project) -> None:
    project.set("grid.surprise", 1)


def no_mirror(project: Project) -> None:
    project.set("data", {"mirror": "nowhere"})


def no_dvc(project: Project) -> None:
    (project.folder / ".dvc" / "config").unlink()
    (project.folder / ".dvc").rmdir()


def a_lock_file_cut_short(project: Project) -> None:
    (project.folder / "dvc.lock").write_text("<<<<<<< HEAD\n")


def a_database_of_noise(project: Project) -> None:
    (project.folder / "mlflow.db").write_bytes(b"noise" * 1000)


def other_code(project: Project) -> None:
    (project.folder / "schoenbat" / "norm.py").write_text("import torch\n")


@pytest.mark.parametrize(
    ("break_it", "subject", "said"),
    [
        (no_such_device, "torch", "to mend it: "),
        (too_many_threads, "threads", "to mend it: set run.threads to at most "),
        (a_wrong_key, "settings", "unknown key 'surprise'"),
        (no_mirror, "data", "to mend it: correct SCHOENBAT_DATA_MIRROR or data.mirror"),
        (no_dvc, "dvc", "to mend it: dvc init"),
        (a_lock_file_cut_short, "dvc", "settle it, or move it away"),
        (a_database_of_noise, "mlflow", "move it away"),
        (other_code, "code", "set PYTHONPATH="),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_is_one_line_that_says_how_to_mend_it(
    whole: Project, invoke: Invoke, break_it: Callable[[Project], None], subject: str, said: str
) -> None:
    break_it(whole)
    code, out, err = invoke("doctor")
    assert (code, err) == (1, "")
    found = lines(out)
    assert [name for name, line in found.items() if line.startswith("wrong")] == [subject]
    assert said in found[subject]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_tests_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, project: Project, invoke: Invoke
) -> None:
    code, _, err = invoke("doctor", "--gpu")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "no tests/gpu in " in err
    Path("tests/gpu").mkdir(parents=True)
    code, out, _ = invoke("doctor", "--gpu")
    assert code == 1
    assert out.startswith("wrong  gpu       no CUDA device; to mend it: ")
    assert not Path("docs").exists()


REPORT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="tests.gpu.test_gpu_contract" name="test_a_holds_on_a_gpu[rmfa-exp]" time="0.5" />
<testcase classname="tests.gpu.test_gpu_contract" name="test_a_holds_on_a_gpu[softmax]" time="0.25">
<failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.gpu.test_gpu_contract" name="test_b" time="0"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def timing(attn: str, length: int, direction: str, milliseconds: float, speedup: float, features: str = "") -> dict:
    setting = {"dtype": "bfloat16", "repeats": "5", "batch": "2", "heads": "8", "head_dim": "64"}
    numbers = {"milliseconds": str(milliseconds), "speedup_vs_sdpa": str(speedup), "peak_memory_mb": "12.3"}
    return {"attn": attn, "num_features": features, "length": str(length), "direction": direction, **setting, **numbers}


def test_the_table_says_what_passed_and_how_long_it_took(tmp_path: Path) -> None:
    (tmp_path / "contract.xml").write_text(REPORT)
    cases = gpu_tests.read_report(tmp_path / "contract.xml")
    assert cases == [
        Case("test_a_holds_on_a_gpu", "passed", 0.5),
        Case("test_a_holds_on_a_gpu", "failed", 0.25, "assert 1 == 2"),
        Case("test_b", "skipped", 0.0, "no CUDA device"),
    ]
    timings = [
        timing("sdpa", 512, "forward", 0.5, 1),
        timing("sdpa", 512, "forward+backward", 1234.5, 1),
        timing("rmfa", 512, "forward", 0.25, 2, "128"),
        timing("rmfa", 512, "forward+backward", 3, 0.5, "128"),
        timing("rmfa", 512, "causal forward", 0.125, 4, "128"),
        timing("rmfa", 4096, "training step", 7, 1.25),
    ]
    facts = {
        "cell": {"steps_per_second": 12.34, "peak_memory_mb": 56.7},
        "packing": {
            "cells": 3,
            "side_by_side_when_unknown": 1,
            "side_by_side_when_known": 3,
            "seconds_when_unknown": 30.0,
            "seconds_when_known": 20.0,
        },
    }
    setting = {"device": "a card", "driver": "1.2", "torch": "2.13.0", "revision": "abc"}
    text = gpu_tests.document(setting, {"contract": cases, "bench": None}, timings, facts)
    tables = [" ".join(line.split()) for line in text.splitlines()]
    assert "| a card | 1.2 | 2.13.0 | abc |" in tables
    assert "| contract | a holds | 1 | 1 | |" in tables
    assert "| contract | b | | | 1 |" in tables
    assert "| bench | not run | | | |" in tables
    assert "| sdpa | | 0.5 (1×) / 1,234 (1×) |" in tables
    assert "| rmfa | 128 | 0.25 (2×) / 3 (0.5×) |" in tables
    assert "| rmfa | 128 | 0.125 (4×) |" in tables
    assert "| rmfa | 7.0 | 1.25× | 12 |" in tables
    assert "3 cells of a grid on the one card: 1 at a time while their memory is unknown (30 s in all)" in text
