"""The table of errors: what is in it, and that it measures what it says."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from project_folder import Project

from pipeline import reporting
from pipeline.files import write_csv
from pipeline.grid.cells import data_meta, trained_cells
from pipeline.grid.params import ErrorsParams, load_params
from pipeline.stages import errors
from pipeline.stages.train import model_of
from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS
from schoenbat.norm import pre_sbn
from schoenbat.ops.reference import kernel_attention
from schoenbat.training import save_model

Invoke = Callable[..., tuple[int, str, str]]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_estimator_is_measured_wherever_it_exists(project: Project, invoke: Invoke) -> None:
    project.set("errors", {"num_features": [15, 40], "tokens": 20, "draws": 2, "trained": []})
    code, _, err = invoke("errors")
    assert code == 0, err
    rows = read(Path("runs/tiny/errors.csv"))
    assert list(rows[0]) == list(errors.COLUMNS)
    cases = {(row["dotf"], row["argument"]) for row in rows}
    wide = {name: "0.9 cos" if KERNELS.get(name).radius == 1 else "cos" for name in KERNELS.names()}
    assert cases == {(name, argument) for name in wide for argument in ("cos/sqrt(d)", wide[name])}
    assert {row["points"] for row in rows} == {"isotropic", "shared mean", "8 clusters"}
    anywhere = {"rmfa", "rmfa-sketch"}
    expected = {
        ("exp", "15"): {*anywhere, "rmfa-sketch, not centred", "FAVOR+"},
        ("exp", "40"): {*anywhere, "rmfa-sketch, not centred", "FAVOR+", "taylor1", "random Fourier"},
        ("trigh", "15"): {*anywhere, "rmfa-sketch, not centred"},
        ("log", "40"): {*anywhere, "taylor1"},
    }
    for (dotf, size), names in expected.items():
        assert {row["estimator"] for row in rows if (row["dotf"], row["num_features"]) == (dotf, size)} == names
    assert all(float(row["kernel_error"]) > 0 and float(row["output_error"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("attn", "estimator"), [("rmfa", "rmfa"), ("rmfa-sketch", "rmfa-sketch"), ("taylor1", "taylor1")]
)
def test_the_output_error_is_that_of_the_attention_of_this_name(project: Project, attn: str, estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 30, 32, generator=generator, dtype=torch.float64)
    query, key = pre_sbn(query), pre_sbn(key)
    kernel = KERNELS.get("exp")()
    attention_class = ATTENTIONS.get(attn)
    options = {} if attn == "taylor1" else {"num_features": 50}
    attention = attention_class(
        attention_class.Config(**options), head_dim=32, kernel=kernel, generator=torch.Generator().manual_seed(0)
    )
    q, k = (x * 32**-0.25 for x in (query, key))
    truth = kernel_attention(q, k, value, kernel)
    expected = float((attention(query, key, value) - truth).norm() / truth.norm())
    sets = [(q[0], k[0], value[0])] * 2
    params = ErrorsParams(num_features=[50], tokens=256, draws=2, trained=[])
    rows = {row["estimator"]: row for row in errors._measure("exp", kernel, sets, 32**-0.5, params)}
    draws = rows[estimator]
    if attn == "taylor1":
        assert draws["output_error"] == pytest.approx(expected, rel=1e-6)
    else:
        # The first of two draws is the attention's.
        first = draws["output_error"] - draws["output_spread"] / 2**0.5
        second = draws["output_error"] + draws["output_spread"] / 2**0.5
        assert min(abs(first - expected), abs(second - expected)) < 1e-4 * expected


def test_a_cell_that_is_not_in_the_grid_is_refused(project: Project, invoke: Invoke) -> None:
    project.set("errors.trained", ["lra-text-mean-transformer-9"])
    for arguments in (("run", "--grid"), ("errors", "--cell", "lra-text-mean-transformer-9")):
        code, _, err = invoke(*arguments)
        assert code == 2
        assert "the grid has no cell 'lra-text-mean-transformer-9'; choose from: lra-text-mean-transformer-" in err
    with pytest.raises(UserError, match=r"errors\.trained"):
        trained_cells(load_params())


def test_the_vectors_of_a_trained_cell_are_used(project: Project, invoke: Invoke) -> None:
    project.add_code()
    cell = "lra-listops-rmfa-exp-maclauformer-0"
    project.set("errors", {"num_features": [6], "tokens": 5, "draws": 2, "trained": [cell]})
    code, _, err = invoke("errors", "--cell", cell)
    assert code == 2
    assert "train first: schoenbat-exp train --task lra-listops --attn rmfa --dotf exp" in err
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    params = load_params()
    (trained,) = trained_cells(params)
    model = model_of(trained, params, data_meta(trained, params))
    save_model(trained.run_folder("tiny") / "best.pt", model, {})
    code, _, err = invoke("errors", "--cell", cell)
    assert code == 0, err
    rows = read(Path(f"runs/tiny/errors/{cell}.csv"))
    assert {row["points"] for row in rows} == {f"trained {cell}"}
    assert {row["dotf"] for row in rows} == set(KERNELS.names())
    assert {(row["head_dim"], row["tokens"]) for row in rows} == {("4", "5")}


def test_the_report_shows_every_estimator_and_names_what_is_missing(project: Project) -> None:
    project.set("errors.trained", ["lra-text-rmfa-exp-maclauformer-0"])
    rows = [
        {
            **dict.fromkeys(errors.COLUMNS, "x"),
            "points": points,
            "argument": argument,
            "dotf": dotf,
            "estimator": estimator,
            "num_features": size,
            **dict.fromkeys(("kernel_error", "output_error"), 0.25 / size),
            **dict.fromkeys(("kernel_spread", "output_spread"), 0.01 / size),
        }
        for points in ("isotropic", "shared mean")
        for argument in ("cos/sqrt(d)", "cos")
        for dotf in ("exp", "log")
        for estimator in ("rmfa", "rmfa-sketch")
        for size in (16, 128)
        if (estimator, size) != ("rmfa", 16)
    ]
    write_csv(Path("runs/tiny/errors.csv"), errors.COLUMNS, [[row[name] for name in errors.COLUMNS] for row in rows])
    reporting.build("tiny", load_params(), Path())
    folder = Path("reports/tiny")
    for name in ("errors-kernel", "errors-output"):
        table = (folder / f"tables/{name}.md").read_text()
        assert table.count("| rmfa-sketch ") == 8
        assert table.count("2.0e-03") == 16
        assert table.count("—") == 8
        assert "Not trained yet, so left out: lra-text-rmfa-exp-maclauformer-0." in table
        assert (folder / f"figures/{name}.svg").is_file()
    assert "## Errors of the estimators" in (folder / "index.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"num_features": [0]}, "num_features must be at least 1"), ({"draws": 1}, "draws must be at least 2")],
)
def test_sizes_that_give_no_spread_are_refused(project: Project, changed: dict[str, object], message: str) -> None:
    project.set("errors", project.settings["errors"] | changed)
    with pytest.raises(UserError, match=message):
        load_params()
