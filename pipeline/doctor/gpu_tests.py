"""`schoenbat-exp doctor --gpu`: the tests marked gpu as one command, and the table of what they found.

Each file of `tests/gpu` is run by a pytest of its own, so that what is done stays when the time is over. What tests
measure they leave as files in logs/gpu; the rest is read from pytest's own reports. The table goes to docs/gpu.md, and
every timing of the benchmark to docs/gpu.csv.
"""

import csv
import importlib.util
import io
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.doctor import Finding
from pipeline.doctor.checks import driver_version
from pipeline.files import git_revision, read_json
from pipeline.launch.plan import number_of_cores
from schoenbat.errors import UserError
from schoenbat.files import write_bytes

TESTS = Path("tests/gpu")
PARTS = ("contract", "calibration", "training", "packing", "bench")
MEASURING = ("packing", "bench")
"""Parts beside which nothing else may run on the card; the others are spread over processes."""
PROCESSES = 4
SECONDS = 600.0
RESULTS = Path("logs/gpu")
TABLE, TIMINGS = Path("docs/gpu.md"), Path("docs/gpu.csv")
RESULTS_VARIABLE = "SCHOENBAT_GPU_RESULTS"
_LEFT = "not run"

Row = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One test: its function, how it ended (passed, failed, skipped), its seconds, and why it failed."""

    function: str
    outcome: str
    seconds: float
    message: str = ""


def examine() -> Iterator[Finding]:
    """One finding per part, and one for the table; nothing is written where there is no GPU.

    Raises:
        UserError: there are no tests here.
    """
    import torch

    if not TESTS.is_dir():
        raise UserError(f"no {TESTS} in {Path.cwd()}; run this in a checkout of the project's sources")
    if not torch.cuda.is_available():
        yield Finding("gpu", "wrong", "no CUDA device", "`schoenbat-exp doctor` says what torch and the driver are")
        return
    if importlib.util.find_spec("pytest") is None:
        yield Finding("gpu", "wrong", "pytest is not installed", "make setup")
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    for old in RESULTS.iterdir():
        old.unlink()
    setting = {
        "device": torch.cuda.get_device_name(0),
        "driver": driver_version(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "revision": git_revision(),
    }
    end = time.monotonic() + SECONDS
    found: dict[str, list[Case] | None] = dict.fromkeys(PARTS)
    for part in PARTS:
        found[part] = run_part(part, end - time.monotonic())
        timings = [row for path in sorted(RESULTS.glob("timings-*.csv")) for row in _read_rows(path)]
        write_bytes(TABLE, document(setting, found, timings, _facts()).encode())
        if timings:
            write_bytes(TIMINGS, _as_csv(timings).encode())
        yield _finding(part, found[part])
    yield Finding("table", "good", f"{TABLE}, and every timing in {TIMINGS}")


def run_part(part: str, seconds: float) -> list[Case] | None:
    """The cases of tests/gpu/test_gpu_PART.py; None if it did not come to its end in time, or at all."""
    report, log = RESULTS / f"{part}.xml", RESULTS / f"{part}.log"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", str(TESTS / f"test_gpu_{part}.py"), f"--junitxml={report}"]
    if part not in MEASURING and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(PROCESSES, number_of_cores()))]
    paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, RESULTS_VARIABLE: str(RESULTS.absolute())}
    if seconds <= 0:
        return None
    with log.open("wb") as output:
        try:
            subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    return read_report(report) if report.is_file() else None


def read_report(path: Path) -> list[Case]:
    """The cases in a report of pytest's."""
    cases = []
    for element in ET.parse(path).iter("testcase"):
        outcome, message = "passed", ""
        for child in element:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                message = (child.get("message") or "").split("\n")[0]
        function = str(element.get("name")).partition("[")[0]
        cases.append(Case(function, outcome, float(element.get("time") or 0.0), message))
    return cases


def _finding(part: str, cases: Sequence[Case] | None) -> Finding:
    log = RESULTS / f"{part}.log"
    if not cases:
        return Finding(part, "wrong", f"did not come to its end in {SECONDS / 60:g} minutes, or could not begin: {log}")
    failed = [case for case in cases if case.outcome == "failed"]
    seconds = sum(case.seconds for case in cases)
    if failed:
        first = f"{failed[0].function}: {failed[0].message}"
        return Finding(part, "wrong", f"{len(failed)} of {len(cases)} tests failed, first {first}", f"see {log}")
    passed = sum(case.outcome == "passed" for case in cases)
    text = f"{passed} of {len(cases)} tests passed in {seconds:.0f} s"
    return Finding(part, "good" if passed == len(cases) else "note", text)


def document(
    setting: Mapping[str, str],
    found: Mapping[str, Sequence[Case] | None],
    timings: Sequence[Row],
    facts: Mapping[str, Mapping[str, Any]],
) -> str:
    """The text of docs/gpu.md."""
    lines = [
        "# On a GPU",
        "",
        "Made by `schoenbat-exp doctor --gpu`, which runs the tests marked `gpu`.",
        "",
        _table([setting]),
        "",
        "## What was tested",
        "",
        _table(_tested(found)),
    ]
    if "cell" in facts:
        cell = facts["cell"]
        lines += [
            "",
            f"One small cell through `train` and `eval`: {cell['steps_per_second']:.1f} steps per second, peak memory "
            f"{cell['peak_memory_mb']:.0f} MB.",
        ]
    if "packing" in facts:
        packed = facts["packing"]
        lines += [
            "",
            f"{packed['cells']} cells of a grid on the one card: {packed['side_by_side_when_unknown']} at a time "
            f"while their memory is unknown ({packed['seconds_when_unknown']:.0f} s in all), "
            f"{packed['side_by_side_when_known']} at a time once it is known ({packed['seconds_when_known']:.0f} s).",
        ]
    for dtype in dict.fromkeys(row["dtype"] for row in timings):
        of_dtype = [row for row in timings if row["dtype"] == dtype]
        lines += ["", f"## Time of one attention in {dtype}", "", _caption(of_dtype)]
        for title, prefix in (("Every query sees every key", ""), ("Causal", "causal ")):
            rows = _times(of_dtype, prefix)
            if rows:
                lines += ["", f"**{title}**", "", _table(rows)]
    steps = [row for row in timings if row["direction"] == "training step"]
    if steps:
        lines += [
            "",
            "## One training step of the whole model",
            "",
            f"{steps[0]['batch']} texts of {int(steps[0]['length']):,} bytes, under autocast to bfloat16; speed-up "
            "against softmax.",
            "",
            _table(
                [
                    {
                        "attn": row["attn"],
                        "ms": f"{float(row['milliseconds']):.1f}",
                        "speed-up": f"{float(row['speedup_vs_sdpa']):.2f}×",
                        "peak MB": f"{float(row['peak_memory_mb']):,.0f}",
                    }
                    for row in steps
                ]
            ),
        ]
    return "\n".join(lines) + "\n"


def _tested(found: Mapping[str, Sequence[Case] | None]) -> list[dict[str, str]]:
    rows = []
    for part, cases in found.items():
        if cases is None:
            rows.append({"part": part, "property": _LEFT, "passed": "", "failed": "", "skipped": ""})
            continue
        for function in dict.fromkeys(case.function for case in cases):
            outcomes = [case.outcome for case in cases if case.function == function]
            counts = {name: str(outcomes.count(name) or "") for name in ("passed", "failed", "skipped")}
            words = function.removeprefix("test_").removesuffix("_on_a_gpu").replace("_", " ")
            rows.append({"part": part, "property": words, **counts})
    return rows


def _caption(timings: Sequence[Row]) -> str:
    first = timings[0]
    return (
        f"Milliseconds, forward / forward and backward: medians of {first['repeats']} samples by CUDA's events; batch "
        f"{first['batch']}, {first['heads']} heads of {first['head_dim']}. In brackets the speed-up against torch's "
        "scaled_dot_product_attention in the same dtype, more than 1 is faster. Mechanisms of quadratic cost stop at "
        "the middle length."
    )


def _times(timings: Sequence[Row], prefix: str) -> list[dict[str, str]]:
    """A row per mechanism: at each length, milliseconds and speed-ups of both directions."""
    wanted = (f"{prefix}forward", f"{prefix}forward+backward")
    own = [row for row in timings if row["direction"] in wanted]
    lengths = sorted({int(row["length"]) for row in own})
    rows = []
    for attn, num_features in dict.fromkeys((row["attn"], row["num_features"]) for row in own):
        shown = {"attn": attn, "features": num_features}
        for length in lengths:
            cell = [
                row
                for direction in wanted
                for row in own
                if (row["attn"], row["num_features"], row["direction"]) == (attn, num_features, direction)
                and int(row["length"]) == length
            ]
            shown[f"{length:,}"] = " / ".join(
                f"{_short(row['milliseconds'])} ({_short(row['speedup_vs_sdpa'])}×)" for row in cell
            )
        rows.append(shown)
    return rows


def _short(number: str) -> str:
    """Three digits, without an exponent."""
    value = float(number)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _facts() -> dict[str, dict[str, Any]]:
    return {path.stem: read_json(path) for path in RESULTS.glob("*.json")}


def _read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True)
