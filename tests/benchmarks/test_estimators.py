"""The program that measures estimates of a kernel on random vectors."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline.stages import errors
from schoenbat.kernels import KERNELS

PROGRAM = Path(__file__).parents[2] / "benchmarks/estimators.py"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimators")
    sizes = ["--tokens", "20", "--draws", "2", "--num-features", "15", "40"]
    environment = {"PYTHONPATH": str(PROGRAM.parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(PROGRAM), str(folder), *sizes], check=True, env=environment)
    return folder


def test_every_estimator_is_measured_wherever_it_exists(tables: Path) -> None:
    rows = pd.read_csv(tables / "estimators.csv")
    arguments = rows.groupby("dotf").argument.unique().map(set)
    everywhere, within_one = {"cos/sqrt(d)", "cos", "2.83 cos"}, {"cos/sqrt(d)", "0.9 cos"}
    assert arguments["exp"] == arguments["trigh"] == arguments["power2"] == everywhere
    assert arguments["inverse"] == arguments["log"] == arguments["sqrt"] == within_one
    assert arguments["yat"] == {"cos/sqrt(d)", "cos"}
    assert set(rows.points) == {"isotropic", "shared mean", "8 clusters"}
    anywhere = {"rmfa", "rmfa-sketch"}
    expected = {
        ("exp", 15): {*anywhere, "FAVOR+"},
        ("exp", 40): {*anywhere, "FAVOR+", "taylor1", "random Fourier"},
        ("trigh", 15): anywhere,
        ("log", 40): {*anywhere, "taylor1"},
        ("power2", 40): anywhere,
        ("yat", 40): anywhere,
    }
    found = rows.groupby(["dotf", "num_features"]).estimator.unique().map(set)
    assert {key: found[key] for key in expected} == expected
    assert (rows[list(errors.MEASURES)] > 0).all(axis=None)
    assert (rows[list(errors.SPREADS)] >= 0).all(axis=None)
    assert (tables / "estimators.svg").stat().st_size > 0


def test_features_by_degree_add_up_and_leave_less_error_the_more_there_are(tables: Path) -> None:
    degrees = pd.read_csv(tables / "estimators-degrees.csv", dtype=str)
    counts = degrees.set_index(["kernel", "degree"]).apply(lambda column: column.str.split(" ").str[0].astype(int))
    assert set(degrees.kernel) == set(KERNELS.names())
    assert counts.groupby("kernel").sum().to_numpy().tolist() == [[15, 40]] * len(KERNELS.names())
    # Of exp, 40 features describe the constant and the 32 linear terms exactly.
    assert degrees[degrees.kernel == "exp"]["40"].tolist() == ["1 (all)", "32 (all)", "7"]
    expected = pd.read_csv(tables / "estimators-expected.csv")
    assert (expected["40"] < expected["15"]).all()


def test_the_errors_of_a_complete_series_are_those_of_rounding() -> None:
    """Features of 3 dimensions soon describe everything: then what a shift does to exp must have been undone."""
    spec = importlib.util.spec_from_file_location("estimators", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    vectors = errors.Vectors(*(x[..., :3] for x in program.random_vectors("shared mean", 1.0, 40, 0)))
    found = errors.measure("exp", KERNELS.get("exp")(), [vectors] * 2, 1.0, [2000])
    rows = {row["estimator"]: row for row in found}
    assert rows["rmfa-sketch"]["kernel_error"] < 1e-6
    assert rows["rmfa-sketch"]["unexplained"] < 1e-5
