"""The report of made-up results: complete, deterministic, and plain about what is missing."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import browser
import pandas as pd
import pytest
from figures import look_at_figures
from latex_document import has_tex, set_tables
from project_folder import write_results
from recompute import check_report

from pipeline import reporting
from pipeline.grid.cells import Cell, expand
from pipeline.grid.freshness import Freshness
from pipeline.grid.params import Params, load_params
from pipeline.grid.results import CellResults, Fingerprint
from pipeline.reporting._answers import answers
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._figure import Figure
from pipeline.reporting._results import collect
from pipeline.reporting._table import Table, Text, escape_latex, show_interval, show_number
from pipeline.reporting.accuracy import Accuracy
from pipeline.reporting.cost import leads_from
from pipeline.reporting.findings import Findings
from schoenbat.errors import UserError

pytestmark = pytest.mark.xdist_group("reporting")

PARAMS = """
profile: cpu
note: A note with 100 % of the | awkward_characters.
grid:
  tasks: [lra-listops, lra-text]
  seeds: [42, 43, 44]
  plain: {attn: [softmax, mean], former: [transformer]}
  kernel: {attn: [kernelized, rmfa], dotf: [exp], former: [maclauformer]}
task:
  lra-listops:
    data: {max_length: 600, min_length: 100, train_size: 2000, dev_size: 200, test_size: 200}
    model: {num_layers: 2, width: 64, ffn_width: 128, num_heads: 2, dropout: 0.1, head_width: 128}
    training: {batch_size: 32, learning_rate: 1.0e-3, warmup_steps: 20, steps: 100, eval_every: 25}
  lra-text:
    data: {max_length: 700, train_size: 2000, dev_size: 200, test_size: 200}
    model: {num_layers: 2, width: 64, ffn_width: 128, num_heads: 2, dropout: 0.1, head_width: 128}
    training: {batch_size: 16, learning_rate: 1.0e-3, warmup_steps: 20, steps: 100, eval_every: 25}
attention: {softmax: {}, mean: {}, kernelized: {}, rmfa: {num_features: 128, max_degree: 20}}
former: {transformer: {}, maclauformer: {power: false}}
bench: {lengths: [512, 1024], repeats: 5}
errors: {num_features: [16], tokens: 8, draws: 2, trained: []}
trained: {cells: {}}
"""


@pytest.fixture
def params(tmp_path: Path) -> Params:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return load_params(path)


def write_data(root: Path, task: str) -> None:
    folder = root / "runs/cpu/data"
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "fingerprint": f"data of {task}",
        "label": "IMDB bytes" if task == "lra-text" else "generated ListOps, seed 0",
        "notes": ["3 duplicates dropped"],
        "splits": {"train": 2000, "dev": 200, "test": 200},
        "lengths": {"median": 130, "p95": 240, "max": 800},
        "num_classes": 2,
        "vocab_size": 257,
        "num_texts": 1,
        "max_length": 700,
        "baselines": {"majority class": 0.5} | ({"byte frequencies": 0.62} if task == "lra-text" else {}),
    }
    (folder / f"{task}.json").write_text(json.dumps(summary))


def made_up_accuracy(cell: Cell) -> float:
    """A multiple of 1 / 200, as there are 200 test examples."""
    return 0.5 + int(hashlib.sha256(cell.id.encode()).hexdigest()[:4], 16) % 20 / 200


def write_cell(root: Path, cell: Cell, params: Params, *, test_code: str = "code") -> None:
    accuracy = made_up_accuracy(cell)
    made_from = Fingerprint("code", Freshness(params.written).settings(cell), f"data of {cell.task}")
    write_results(CellResults("cpu", cell.id, root), cell, made_from, accuracy, test_code=test_code)


def write_bench(root: Path) -> None:
    rows = [
        {
            "attn": attn,
            "dotf": dotf,
            "length": length,
            "direction": direction,
            "milliseconds": (length / 512) ** power * factor * (2.5 if "backward" in direction else 1),
            "spread": 0.1,
            "peak_memory_mb": 4 * (length / 512) ** power * factor,
            "relative_error": error,
            "speedup_vs_sdpa": (length / 512) ** (2 - power) / factor,
            "threads": 2,
            "batch": 1,
            "heads": 2,
            "head_dim": 32,
            "num_features": num_features or "",
            "repeats": 5,
            "device": "cpu (made up)",
            "torch": "2.13.0",
            "git_revision": "abc123",
        }
        for attn, dotf, num_features, power, factor, error in (
            ("sdpa", "", None, 2, 1.0, 1e-7),
            ("softmax", "", None, 2, 1.1, 1e-7),
            ("mean", "", None, 1, 0.1, 1e-7),
            ("kernelized", "exp", None, 2, 2.0, 1e-7),
            ("rmfa", "exp", 128, 1, 1.5, 2e-2),
            ("rmfa", "exp", 256, 1, 3.0, 1e-2),
        )
        for direction in ("forward", "forward+backward", "causal forward", "causal forward+backward")
        for length in (512, 1024)
    ]
    (root / "runs/cpu").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(root / "runs/cpu/bench.csv", index=False)


def write_everything(root: Path, params: Params) -> None:
    for task in params.grid.tasks:
        write_data(root, task)
    for cell in expand(params):
        write_cell(root, cell, params)
    write_bench(root)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with everything finished, and its report; not to be changed."""
    root = tmp_path_factory.mktemp("complete")
    (root / "params.yaml").write_text(PARAMS)
    params = load_params(root / "params.yaml")
    write_everything(root, params)
    reporting.build(params, root)
    return root


def test_a_complete_report_is_the_same_when_built_again(complete: Path, tmp_path: Path, params: Params) -> None:
    first = read_all(complete / "reports")
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    (tmp_path / "reports/cpu/stale.txt").write_text("from an earlier report")
    reporting.build(params, tmp_path)
    assert read_all(tmp_path / "reports") == first
    assert set(first) == {
        "cpu/index.md",
        "cpu/index.html",
        "cpu/findings.md",
        "cpu/tables/cells.csv",
        *(f"cpu/tables/{name}.{end}" for name in TABLES for end in ENDS),
        *(f"cpu/figures/{name}.{end}" for name in FIGURES for end in ("svg", "pdf", "png")),
    }


def test_what_the_numbers_show_is_a_file_to_quote(complete: Path) -> None:
    folder = complete / "reports/cpu"
    index = (folder / "index.md").read_text()
    quoted = (folder / "findings.md").read_text()
    assert quoted.startswith("**What the numbers show**\n\n- ")
    assert quoted in index


ENDS = ("md", "csv", "tex")
TABLES = (
    "accuracy-lra-listops",
    "accuracy-lra-text",
    "contrasts",
    "cost",
    "setup",
    "summary-lra-listops",
    "summary-lra-text",
)
FIGURES = ("bench-time", "curves-lra-listops", "curves-lra-text")


def test_no_figure_has_more_than_six_coloured_lines_or_labels_that_overlap(complete: Path) -> None:
    drawn = look_at_figures(load_params(complete / "params.yaml"), complete)
    assert drawn == sorted(FIGURES)


def test_the_length_from_which_a_mechanism_is_faster_is_told(complete: Path) -> None:
    """The times made up here are powers of the length: rmfa's, 1.5 (N / 512), meets torch's, (N / 512)^2, at 768."""
    table = pd.read_csv(complete / "reports/cpu/tables/cost.csv").set_index(["attn", "num_features", "direction"])
    for direction in ("forward", "causal forward+backward"):
        rmfa = table.loc[("rmfa", 128, direction)]
        assert rmfa.from_length == pytest.approx(768)
        assert rmfa["512"] == pytest.approx(1.5)
        assert table.loc[("rmfa", 256, direction)].from_length == math.inf
        assert table.loc[("mean", 0, direction)].from_length == 0
        assert table.loc[("kernelized", 0, direction)].from_length == math.inf
    shown = (complete / "reports/cpu/tables/cost.md").read_text()
    assert "| 768 " in shown
    assert "| below 512 " in shown
    assert "| never up to 1,024 " in shown


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 0.5, 0.5], 0),
        ([2, 2, 1], math.inf),
        ([2, 0.5, 0.5], 200),
        ([0.5, 4, 0.5], 400 * 2 ** (2 * 2 / 3)),
        ([1, 0.5, 0.5], 100),
    ],
)
def test_a_mechanism_leads_from_where_it_is_no_longer_overtaken(ratios: list[float], expected: float) -> None:
    assert leads_from([100, 400, 1600], ratios) == pytest.approx(expected)


def parts_of(report: reporting.Report, params: Params, root: Path) -> list[Text | Table | Figure]:
    return list(report.make(Comparison(collect(params, root))))


def test_accuracy_is_mean_and_sample_deviation_over_seeds(complete: Path) -> None:
    table = pd.read_csv(complete / "reports/cpu/tables/accuracy-lra-text.csv").set_index("attn")
    scores = pd.Series(
        [100 * made_up_accuracy(Cell("lra-text", "rmfa", "exp", "maclauformer", seed)) for seed in (42, 43, 44)]
    )
    assert table.loc["rmfa", "mean"] == pytest.approx(scores.mean())
    assert table.loc["rmfa", "std"] == pytest.approx(scores.std(ddof=1))
    shown = (complete / "reports/cpu/tables/accuracy-lra-text.md").read_text()
    assert f"{scores.mean():.2f} ± {scores.std(ddof=1):.2f}" in shown


@pytest.mark.parametrize("name", ["accuracy-lra-text", "contrasts"])
def test_every_table_says_how_it_came_about(complete: Path, name: str) -> None:
    shown = (complete / f"reports/cpu/tables/{name}.md").read_text()
    for part in (
        "Profile cpu",
        "awkward",
        "42, 43, 44",
        "cpu (made up), 2 threads",
        "abc123",
        "IMDB bytes",
    ):
        assert part in shown


def test_one_seed_has_no_spread(tmp_path: Path, params: Params) -> None:
    params = dataclasses.replace(params, grid=dataclasses.replace(params.grid, seeds=[42]))
    write_everything(tmp_path, params)
    reporting.build(params, tmp_path)
    assert "± " not in (tmp_path / "reports/cpu/tables/accuracy-lra-text.csv").read_text()
    assert not re.search(r"\d ± \d", (tmp_path / "reports/cpu/index.md").read_text())
    index = (tmp_path / "reports/cpu/index.md").read_text()
    assert "There is one seed: no difference can be tested." in index
    assert "points (95 %" not in index
    assert "**This is a check, not a result.**" in index
    assert "This is a check, not a result." in (tmp_path / "reports/cpu/index.html").read_text()


def test_nothing_finished_gives_a_report_that_says_so(tmp_path: Path, params: Params) -> None:
    reporting.build(params, tmp_path)
    index = (tmp_path / "reports/cpu/index.md").read_text()
    assert "0 of 24 cells are finished" in index
    assert "No prepared data, so no results, for lra-text" in index
    for text in (index, (tmp_path / "reports/cpu/index.html").read_text()):
        assert "Nothing yet: no cell is finished." in text


def test_what_is_missing_is_named_and_spoils_what_is_over_all_tasks(tmp_path: Path, params: Params) -> None:
    write_data(tmp_path, "lra-listops")
    cells = [cell for cell in expand(params) if cell.task == "lra-listops"]
    for cell in cells[1:]:
        write_cell(tmp_path, cell, params)
    reporting.build(params, tmp_path)
    index = (tmp_path / "reports/cpu/index.md").read_text()
    assert "11 of 24 cells are finished" in index
    page = (tmp_path / "reports/cpu/index.html").read_text()
    for text in (index, page):
        assert f"Not finished: {cells[0].id}." in text
        assert "No prepared data, so no results, for lra-text: " in text
        assert "No benchmark." in text
    assert "Not complete:" in page
    assert "(2 of 3)" in (tmp_path / "reports/cpu/tables/accuracy-lra-listops.md").read_text()


def test_results_of_other_settings_or_weights_are_left_out(tmp_path: Path, params: Params) -> None:
    write_everything(tmp_path, params)
    first, second = expand(params)[:2]
    for cell in (first, second):
        for file in CellResults("cpu", cell.id, tmp_path).files()[1:]:
            file.unlink()
    wider = copy.deepcopy(dict(params.written))
    wider["task"][first.task]["model"]["width"] = 32
    write_cell(tmp_path, first, dataclasses.replace(params, written=wider))
    write_cell(tmp_path, second, params, test_code="other code")
    status = collect(params, tmp_path).status()
    assert f"Left out because they are out of date: {first.id}." in status
    assert f"Not finished: {second.id}." in status


DAMAGES = {"json": ["", "{", "[1, 2]", '{"a": 1}'], "csv": ["attn,length\nx", "step,loss\n1,x\n"]}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("metrics/42.json", "test/42.json", "curves/42.csv", "bench.csv")
        for damage in DAMAGES[name.partition(".")[2]]
    ],
)
def test_a_damaged_result_is_one_line_that_names_it(tmp_path: Path, params: Params, name: str, damage: str) -> None:
    write_everything(tmp_path, params)
    folder = tmp_path / "runs/cpu" / ("" if name == "bench.csv" else expand(params)[0].group)
    (folder / name).write_text(damage)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        reporting.build(params, tmp_path)


def test_cells_outside_the_grid_are_left_out(tmp_path: Path, params: Params) -> None:
    write_everything(tmp_path, params)
    smaller = dataclasses.replace(params, grid=dataclasses.replace(params.grid, tasks=["lra-text"]))
    results = collect(smaller, tmp_path)
    assert set(results.cells.task) == {"lra-text"}
    assert {task for task, _ in results.scores} == {"lra-text"}


def test_latex_specials_are_escaped(complete: Path) -> None:
    assert escape_latex(r"a_b & 5 % {x}\y ± ~^") == (
        r"a\_b \& 5 \% \{x\}\textbackslash{}y $\pm$ \textasciitilde{}\textasciicircum{}"
    )
    text = (complete / "reports/cpu/tables/accuracy-lra-text.tex").read_text()
    assert r"100 \% of the \textbar{} awkward\_characters" in text
    assert r"\toprule" in text
    assert "±" not in text


def test_a_report_is_not_replaced_by_one_without_results_that_are_gone(
    complete: Path, tmp_path: Path, params: Params
) -> None:
    shutil.copytree(complete / "reports", tmp_path / "reports")
    before = read_all(tmp_path / "reports")
    message = (
        "reports/cpu shows 24 finished cells without results by now, such as lra-listops-softmax-transformer-42; "
        "`schoenbat-exp report --force` builds it without"
    )
    with pytest.raises(UserError, match=message):
        reporting.build(params, tmp_path)
    assert read_all(tmp_path / "reports") == before
    reporting.build(params, tmp_path, force=True)
    assert "0 of 24 cells are finished." in (tmp_path / "reports/cpu/index.md").read_text()


def test_a_grid_made_smaller_gets_its_smaller_report(complete: Path, tmp_path: Path, params: Params) -> None:
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    reporting.build(dataclasses.replace(params, grid=dataclasses.replace(params.grid, tasks=["lra-text"])), tmp_path)
    assert "12 of 12 cells are finished." in (tmp_path / "reports/cpu/index.md").read_text()


@pytest.fixture
def recall(tmp_path: Path) -> Params:
    """One causal task with ppSBN as an axis, whose cells have a state."""
    text = PARAMS.replace("[lra-listops, lra-text]", "[recall-mqar]").replace("  lra-text:\n", "  recall-mqar:\n")
    text = text.replace("dotf: [exp], former: [maclauformer]", "dotf: [exp], former: [maclauformer, transformer]")
    path = tmp_path / "recall.yaml"
    path.write_text(text.replace("data: {max_length: 700,", "data: {max_length: 64, num_pairs: 8, num_symbols: 64,"))
    return load_params(path)


def write_recall(root: Path, params: Params, accuracies: dict[str, list[float]]) -> None:
    """Write all cells, with the accuracy at each seed by the id of the mechanism; the rest has 0.9."""
    write_data(root, "recall-mqar")
    for cell in expand(params):
        of_seeds = accuracies.get(cell.id.removeprefix("recall-mqar-").rpartition("-")[0], [0.9, 0.9, 0.9])
        made_from = Fingerprint("code", Freshness(params.written).settings(cell), "data of recall-mqar")
        write_results(CellResults("cpu", cell.id, root), cell, made_from, of_seeds[params.grid.seeds.index(cell.seed)])


def lines_of(report: reporting.Report, params: Params, root: Path) -> list[str]:
    return [line for text in parts_of(report, params, root) if isinstance(text, Text) for line in text.lines]


def test_cells_that_are_trained_and_not_tested_give_a_report(tmp_path: Path, recall: Params) -> None:
    write_recall(tmp_path, recall, {})
    for cell in expand(recall):
        results = CellResults("cpu", cell.id, tmp_path)
        metrics = results.metrics()
        assert metrics is not None
        state = dataclasses.replace(metrics, state_bytes=100)
        results.files()[2].write_text(json.dumps(dataclasses.asdict(state)))
    assert {part.name for part in parts_of(Accuracy(), recall, tmp_path) if not isinstance(part, Text)} == {
        "accuracy-recall-mqar",
        "state-recall-mqar",
    }
    for cell in expand(recall):
        CellResults("cpu", cell.id, tmp_path).files()[4].unlink()
    assert parts_of(Accuracy(), recall, tmp_path) == []
    reporting.build(recall, tmp_path)
    assert "0 of 18 cells are finished" in (tmp_path / "reports/cpu/index.md").read_text()


def test_the_table_counts_the_seeds_that_passed_the_baseline(tmp_path: Path, recall: Params) -> None:
    """The baseline is right in 50 %; write_results gives dev the same accuracy as test."""
    some = {"rmfa-exp-transformer": [0.9, 0.2, 0.2], "mean-transformer": [0.3, 0.3, 0.3]}
    write_recall(tmp_path, recall, some)
    (table,) = (part for part in parts_of(Accuracy(), recall, tmp_path) if isinstance(part, Table))
    passed = table.values.set_index(["attn", "former"]).passed
    assert passed["softmax", "transformer"] == 3
    assert passed["rmfa", "transformer"] == 1
    assert passed["mean", "transformer"] == 0
    marked = table.shown.set_index("method").accuracy
    assert marked["mean"].endswith("†")
    assert "†" not in marked["softmax"]


def test_bold_is_the_best_and_what_is_equal_to_it_within_the_margin(tmp_path: Path, recall: Params) -> None:
    lower = {"mean-transformer": [0.3, 0.3, 0.3], "rmfa-exp-transformer": [0.84, 0.9, 0.9]}
    write_recall(tmp_path, recall, lower)
    # 200 examples show no equality within a point.
    comparison = Comparison(collect(recall, tmp_path, margin=3.0))
    bold = {(m[0], m[2]) for m in comparison.leaders["recall-mqar"]}
    everything = {(m[0], m[2]) for m in comparison.mechanisms}
    assert bold == everything - {("mean", "transformer"), ("rmfa", "transformer")}
    write_recall(tmp_path, recall, {cell.id[12:-3]: [0.4, 0.4, 0.4] for cell in expand(recall)})
    assert Comparison(collect(recall, tmp_path, margin=3.0)).leaders["recall-mqar"] == [], "nothing has learned"


def test_effects_of_ppsbn_are_told_in_both_signs(tmp_path: Path, recall: Params) -> None:
    write_recall(
        tmp_path, recall, {"kernelized-exp-maclauformer": [0.8, 0.8, 0.8], "rmfa-exp-transformer": [0.6, 0.6, 0.6]}
    )
    (line,) = [line for line in lines_of(Findings(), recall, tmp_path) if line.startswith("What does ppSBN do")]
    assert "with gain 1? recall-mqar: of 2 pairs with and without it 1 are higher with it, 1 lower, 0 equal" in line
    assert "rmfa exp with ppSBN is above rmfa exp by 30.0 points" in line
    assert "kernelized exp with ppSBN is below kernelized exp by 10.0 points" in line


@pytest.mark.parametrize("rising", [False, True])
def test_what_was_best_at_its_last_evaluation_learns_more_slowly(tmp_path: Path, recall: Params, rising: bool) -> None:
    write_recall(tmp_path, recall, {"rmfa-exp-maclauformer": [0.7, 0.7, 0.7]})
    results = collect(recall, tmp_path)
    results.cells["best_step"] = float(results.curves.step.max()) if rising else 0.0
    lines = [line for line in answers(Comparison(results)) if line.startswith("Is the published form")]
    assert len(lines) == 1
    assert "rmfa exp with ppSBN is below softmax by 20.0 points" in lines[0]
    assert ("rmfa exp with ppSBN still rising" in lines[0]) == rising


def test_the_first_table_has_at_most_eight_rows_by_accuracy(tmp_path: Path, recall: Params) -> None:
    write_recall(tmp_path, recall, {"mean-transformer": [0.3, 0.3, 0.3]})
    (table,) = [part for part in parts_of(Findings(), recall, tmp_path) if isinstance(part, Table)]
    assert len(table.shown) <= 8
    assert table.values["mean"].is_monotonic_decreasing
    assert table.shown.role.iloc[-1] == "uniform"


def test_no_number_is_a_negative_zero_and_no_interval_leaves_what_accuracies_can_differ_by() -> None:
    assert [show_number(x, "+z.2f") for x in (-0.001, 0.001, -1)] == ["+0.00", "+0.00", "-1.00"]
    assert show_number(-0.001) == "0.00"
    assert show_number(math.nan) == show_interval(math.nan, math.nan) == "—"
    assert show_interval(21, 101.5) == "+21.00 to +100.00"
    assert show_interval(-120, -0.004) == "-100.00 to +0.00"


def test_every_number_of_the_main_tables_follows_from_the_raw_files(complete: Path) -> None:
    assert check_report(complete, "cpu") > 400


@pytest.mark.slow
@pytest.mark.skipif(not has_tex(), reason="no pdflatex, or no adjustbox")
def test_tables_fit_the_page_of_the_article_class(complete: Path, tmp_path: Path) -> None:
    overfull = set_tables(complete / "reports/cpu/tables", tmp_path)
    assert max(overfull, default=0.0) <= 5


@pytest.mark.slow
@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_page_fits_every_screen_and_is_accessible(complete: Path) -> None:
    page = complete / "reports/cpu/index.html"
    assert page.stat().st_size < 3e6
    with browser.chromium() as started:
        for width, scheme, media in (
            *((width, scheme, "screen") for width in (400, 1000, 1600) for scheme in ("light", "dark")),
            (794, "light", "print"),
        ):
            found = browser.look(started, page, width, scheme, media)
            assert found == {"console": [], "wide": [], "axe": []}, (width, scheme, media)


@pytest.mark.slow
@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_tables_of_the_page_sort_by_number_and_filter(complete: Path) -> None:
    with browser.chromium() as started:
        page = started.new_page()
        page.goto((complete / "reports/cpu/index.html").as_uri())
        for details in page.locator("details.section > summary").all():
            details.click()
        heading = page.locator("#table-contrasts thead th", has_text="visible")
        number = heading.evaluate("heading => heading.cellIndex + 1")
        column = page.locator(f"#table-contrasts tbody tr:not([hidden]) > :nth-child({number})")
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == "ascending"
        numbers = [float(text) for text in column.all_inner_texts()]
        assert numbers == sorted(numbers)
        heading.get_by_role("button").click()
        assert [float(text) for text in column.all_inner_texts()] == sorted(numbers, reverse=True)
        page.locator("#filter-contrasts").fill("lra-text rmfa")
        shown = page.locator("#table-contrasts tbody tr:not([hidden])").count()
        assert 0 < shown < len(numbers)
        box = page.locator(".filter", has=page.locator("#filter-contrasts"))
        assert f"{shown} of {len(numbers)} rows" in box.inner_text()
