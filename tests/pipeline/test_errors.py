"""The table of errors: what is in it, and that it measures what it says."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from project_folder import Project

from pipeline import reporting
from pipeline.grid.cells import expand, resolve, select
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults
from pipeline.host.files import write_csv
from pipeline.reporting._results import ERROR_SETTING
from pipeline.stages import errors
from schoenbat.attention import ATTENTIONS, KernelAttention
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS
from schoenbat.lra.training import save_model
from schoenbat.norm import pre_sbn
from schoenbat.ops.reference import kernel_attention

Invoke = Callable[..., tuple[int, str, str]]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("attn", ["rmfa", "rmfa-sketch", "taylor1"])
@pytest.mark.parametrize(("dotf", "units"), [("exp", True), ("inverse", True), ("exp", False)])
def test_the_output_error_is_that_of_the_attention_of_this_name(attn: str, dotf: str, units: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 30, 32, generator=generator, dtype=torch.float64)
    query, key = (pre_sbn(query), pre_sbn(key)) if units else (2 * query, 2 * key)
    kernel = KERNELS.get(dotf)()
    attention_class = ATTENTIONS.get(attn)
    options = {} if attn == "taylor1" else {"num_features": 50}
    q, k = (x * 32**-0.25 for x in (query, key))
    truth = kernel_attention(q, k, value, kernel)
    expected, uniform = [], (value.mean(-2, keepdim=True) - truth).norm()
    for seed in range(2):
        attention = attention_class(
            attention_class.Config(**options), head_dim=32, kernel=kernel, generator=torch.Generator().manual_seed(seed)
        )
        if isinstance(attention, KernelAttention):
            attention.gets_units = units
        expected.append((attention(query, key, value) - truth).norm())
    sets = [errors.Vectors(q[0], k[0], value[0])] * 2
    rows = {row["estimator"]: row for row in errors.measure(dotf, kernel, sets, 32**-0.5, [50], units)}
    mean = float(sum(expected)) / 2
    assert rows[attn]["output_error"] == pytest.approx(mean / float(truth.norm()), rel=1e-6)
    assert rows[attn]["unexplained"] == pytest.approx(mean / float(uniform), rel=1e-6)


def test_uniform_weights_explain_nothing_and_the_exact_ones_all() -> None:
    vectors = errors.Vectors(*torch.randn(3, 1, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    kernel = KERNELS.get("exp")()
    truth = errors.Truth.of(kernel, vectors)
    value = vectors.value.mean(-2, keepdim=True).expand(truth.output.shape)
    assert truth.errors(truth.kernel, value)[2] == pytest.approx(1)
    assert truth.errors(truth.kernel, truth.output) == (0, 0, 0)


def test_a_cell_that_is_not_in_the_grid_is_refused(project: Project, invoke: Invoke) -> None:
    project.set("errors.trained", ["lra-text-mean-transformer-0"])
    for arguments in (("run", "--grid"), ("errors", "--group", "lra-text-mean-transformer-0")):
        code, _, err = invoke(*arguments)
        assert code == 2
        assert "errors.trained: the grid has no 'lra-text-mean-transformer-0'; choose from: lra-text-mean-" in err


@pytest.mark.parametrize("attn", ["rmfa", "rmfa-sketch"])
def test_the_vectors_of_a_trained_cell_are_used_and_its_own_draw(project: Project, invoke: Invoke, attn: str) -> None:
    project.add_code()
    group = f"lra-listops-{attn}-exp-maclauformer"
    project.set("grid.kernel.attn", [attn])
    project.set("attention", {"softmax": {}, "mean": {}, attn: {"num_features": 7}})
    project.set("errors", {"num_features": [6], "tokens": 5, "draws": 2, "trained": [group]})
    code, _, err = invoke("errors", "--group", group)
    assert code == 2
    assert f"train first: schoenbat-exp train --task lra-listops --attn {attn} --dotf exp" in err
    for command in ("download", "preprocess"):
        assert invoke(command, "--task", "lra-listops")[0] == 0
    params = load_params()
    trained, _ = select(expand(params), group=[group])
    setup = resolve(params, trained)
    model = setup.build_model(setup.data.meta)
    save_model(CellResults("tiny", trained.id).best, model, {})
    code, _, err = invoke("errors", "--group", group)
    assert code == 0, err
    rows = read(Path(f"runs/tiny/errors/{group}.csv"))
    assert {row["points"] for row in rows} == {f"trained {group}-0"}, "the first seed"
    assert {row["dotf"] for row in rows} == {"exp"}, "the kernel of the cell, and no other"
    assert {(row["head_dim"], row["tokens"]) for row in rows} == {("4", "5")}
    (own,) = [row for row in rows if row["estimator"] == f"{attn} as trained"]
    assert (own["dotf"], own["num_features"], own["output_spread"]) == ("exp", "7", "")
    # The test model has one layer. What it computes inside is taken from a pass of the whole model.
    (attention,) = [module for module in model.modules() if isinstance(module, KernelAttention)]
    ((_, vectors),) = errors._trained(params, trained)
    query, key, value = (x[None].float() for x in vectors)
    with torch.no_grad():
        truth = kernel_attention(query * 4**-0.25, key * 4**-0.25, value, KERNELS.get("exp")())
        error = (attention(query, key, value) - truth).norm() / (value.mean(-2, keepdim=True) - truth).norm()
    assert float(own["unexplained"]) == pytest.approx(float(error), rel=1e-3)


def test_the_report_shows_every_estimator_and_names_what_is_missing(project: Project) -> None:
    measured, missing = "lra-text-rmfa-exp-maclauformer", "lra-text-rmfa-inverse-maclauformer"
    project.set("errors.trained", [measured, missing])
    rows = [
        {
            **dict.fromkeys(ERROR_SETTING, "x"),
            "points": f"trained {measured}-0",
            "dotf": dotf,
            "estimator": estimator,
            "num_features": size,
            **dict.fromkeys(("kernel_error", "output_error"), 0.25 / size),
            **dict.fromkeys(errors.SPREADS, 0.01 / size),
            "unexplained": (32 if estimator == "rmfa" else 16) / size,
        }
        for dotf in ("exp", "log")
        for estimator in ("rmfa", "rmfa-sketch")
        for size in (16, 128)
        if (estimator, size) != ("rmfa", 16)
    ]
    path = Path(f"runs/tiny/errors/{measured}.csv")
    write_csv(path, rows)
    reporting.build(load_params(), Path())
    folder = Path("reports/tiny")
    table = (folder / "tables/errors.md").read_text()
    assert table.count("| rmfa-sketch ") == 2
    assert table.count(" 0.938 ") == table.count(" 0.984 ") == 2
    assert table.count(" 0.000 ") == 2
    assert table.count("| — ") == 2
    assert f"Not trained yet, so left out: {missing}." in table
    assert "## Errors of the estimators in trained cells" in (folder / "index.md").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"num_features": [0]}, "num_features must be at least 1"), ({"draws": 1}, "draws must be at least 2")],
)
def test_sizes_that_give_no_spread_are_refused(project: Project, changed: dict[str, object], message: str) -> None:
    project.set("errors", project.settings["errors"] | changed)
    with pytest.raises(UserError, match=message):
        load_params()
