"""The grid as a list of cells, their names, and what identifies the work of one."""

import json
from pathlib import Path

import pytest
from project_folder import Project

from pipeline.grid.cells import Cell, check_models, expand, make_cells, select
from pipeline.grid.freshness import Freshness
from pipeline.grid.params import load_params
from pipeline.grid.results import CellResults, Fingerprint
from pipeline.host.text import share
from schoenbat.errors import UserError


def test_the_grid_is_the_product_of_each_half(project: Project) -> None:
    cells = expand(load_params())
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 + 2 * 1 * 2 * 2
    assert Cell("lra-text", "softmax", None, "transformer", 1) in cells
    assert Cell("lra-text", "rmfa", "inverse", "maclauformer", 0) in cells
    assert not [cell for cell in cells if (cell.attn == "rmfa") == (cell.dotf is None)]


@pytest.mark.parametrize(
    ("axis", "left"),
    [
        ("grid.plain.attn", 8),
        ("grid.plain.former", 8),
        ("grid.kernel.attn", 8),
        ("grid.kernel.dotf", 8),
        ("grid.kernel.former", 8),
    ],
)
def test_an_empty_axis_gives_no_cells_of_its_half(project: Project, axis: str, left: int) -> None:
    project.set(axis, [])
    assert len(expand(load_params())) == left


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("grid.tasks", [], "params.yaml: grid.tasks is empty"),
        ("grid.seeds", [], "params.yaml: grid.seeds is empty"),
        (
            "grid.seeds",
            list(range(10_000)),
            "params.yaml: grid: 2 tasks, 4 models, 10,000 seeds make 80,000 cells; a profile has at most 20,000",
        ),
    ],
)
def test_a_grid_of_no_task_or_seed_or_of_too_many_cells_is_refused(
    project: Project, axis: str, values: list[int], message: str
) -> None:
    project.set(axis, values)
    with pytest.raises(UserError) as caught:
        expand(load_params())
    assert str(caught.value) == message


def test_a_part_of_the_grid_is_not_called_all_of_it() -> None:
    assert share(2, 4, "cell", "of profile p") == "2 of 4 cells of profile p are"
    assert share(1, 4, "cell", "of profile p") == "1 of 4 cells of profile p is"
    assert share(4, 4, "cell", "of profile p") == "all 4 cells of profile p are"
    assert share(1, 1, "cell", "of profile p") == "the only cell of profile p is"


def test_a_cell_has_one_name_everywhere(project: Project) -> None:
    plain = Cell("lra-text", "softmax", None, "transformer", 42)
    kernel = Cell("lra-text", "rmfa", "exp", "maclauformer", 42)
    assert plain.id == "lra-text-softmax-transformer-42"
    assert kernel.id == "lra-text-rmfa-exp-maclauformer-42"
    weights, *figures = (str(path) for path in CellResults("quick", kernel.id).files())
    assert weights == "weights/quick/lra-text-rmfa-exp-maclauformer/42.pt"
    assert figures == [
        f"runs/quick/lra-text-rmfa-exp-maclauformer/{name}"
        for name in ("curves/42.csv", "metrics/42.json", "predictions/42.npz", "test/42.json")
    ]


def test_filters_keep_the_cells_that_have_one_of_the_values(project: Project) -> None:
    cells = expand(load_params())
    assert len(select(cells, task=["lra-text"])) == 8
    assert len(select(cells, task=["lra-text"], attn=["softmax", "rmfa"], seed=[1])) == 3
    assert [cell.id for cell in select(cells, id=["lra-text-mean-transformer-0"])] == ["lra-text-mean-transformer-0"]
    assert select(cells, task=None, attn=[]) == cells


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("task", "lra-image", "the grid has no task 'lra-image'; choose from: lra-listops, lra-text"),
        ("attn", "kernelized", "no attn 'kernelized'; choose from: softmax, mean, rmfa"),
        ("dotf", "sqrt", "no dotf 'sqrt'; choose from: exp, inverse"),
        ("seed", 7, "no seed 7; choose from: 0, 1"),
        ("id", "x", "no cell 'x'; choose from: lra-listops-softmax-transformer-0, "),
    ],
)
def test_a_filter_that_fits_no_cell_is_refused(
    project: Project, attribute: str, value: str | int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        select(expand(load_params()), **{attribute: [value]})
    assert message in str(caught.value)


def test_a_combination_that_fits_no_cell_is_refused(project: Project) -> None:
    with pytest.raises(UserError, match="no cell of the grid has this combination"):
        select(expand(load_params()), attn=["softmax"], dotf=["exp"])


def test_a_cell_is_checked_by_name_before_anything_runs(project: Project) -> None:
    params = load_params()
    names = ("lra-text", "mean", None, "transformer")
    assert [cell.seed for cell in make_cells(params, *names, None)] == [0, 1], "the seeds of the grid"
    assert [cell.seed for cell in make_cells(params, *names, 7)] == [7], "inside the grid or not"
    for arguments, message in (
        (("lra-text", "rmfa", None, "maclauformer", 0), "needs a kernel; choose dotf from: exp"),
        (("lra-text", "mean", "exp", "transformer", 0), "takes no kernel; leave out dotf 'exp'"),
        (("lra-text", "mean", None, "transformer", -1), "--seed must lie between 0 and 9223372036854775807, not -1"),
        (("lra-retrieval", "mean", None, "transformer", 0), "missing section task.lra-retrieval"),
        (("lra-text", "taylor1", "exp", "maclauformer", 0), "missing section attention.taylor1"),
    ):
        with pytest.raises(UserError) as caught:
            make_cells(params, *arguments)
        assert message in str(caught.value)


def test_a_kernel_that_the_former_does_not_bound_is_found_before_the_grid_starts(project: Project) -> None:
    params = load_params()
    check_models(params, expand(params))
    project.set("grid.kernel.former", ["transformer"])
    params = load_params()
    with pytest.raises(UserError, match="dotf 'inverse'"):
        check_models(params, expand(params))


def test_the_fingerprint_changes_with_what_decides_the_numbers_and_with_nothing_else(project: Project) -> None:
    cell = Cell("lra-text", "rmfa", "exp", "maclauformer", 0)
    code = dict.fromkeys((("attention", "rmfa"), ("kernel", "exp"), ("kernel", "inverse"), ("task", "lra-text")), "a")
    summary = Path("runs/tiny/data/lra-text.json")

    def found(of: Cell = cell) -> Fingerprint | None:
        return Freshness(project.settings, lambda kind, name: code[kind, name]).fingerprint(of)

    def prepare(fingerprint: str) -> None:
        made_from = Freshness(project.settings, lambda kind, name: code[kind, name]).made_from("lra-text")
        summary.write_text(json.dumps({"fingerprint": fingerprint, "made_from": made_from}))

    assert found() is None, "nobody knows before the data is there"
    summary.parent.mkdir(parents=True)
    prepare("a")
    first = found()
    assert first is not None

    project.set("run.threads", 2)
    project.set("note", "another")
    project.set("grid.seeds", [0, 1, 2])
    project.set("task.lra-listops.training.steps", 9)
    code["kernel", "inverse"] = "b"
    assert found() == first

    seen = {first, found(Cell("lra-text", "rmfa", "exp", "maclauformer", 1))}
    for key, value in (
        ("task.lra-text.training.steps", 9),
        ("task.lra-text.model.dropout", 0.2),
        ("attention.rmfa.num_features", 16),
        ("former.maclauformer.power", True),
    ):
        project.set(key, value)
        seen.add(found())
    for component in (("kernel", "exp"), ("attention", "rmfa")):
        code[component] = "b"
        seen.add(found())
    prepare("b")
    seen.add(found())
    assert len(seen) == 9

    code["task", "lra-text"] = "b"
    assert found() is None, "other data would be made now"
    prepare("b")
    project.set("task.lra-text.data.max_length", 32)
    assert found() is None
