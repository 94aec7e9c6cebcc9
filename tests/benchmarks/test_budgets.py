"""More features never make softmax attention through the sketch worse, on isotropic and clustered vectors."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("budgets", ROOT / "benchmarks/budgets.py")
assert SPEC is not None
assert SPEC.loader is not None
budgets = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(budgets)


@pytest.mark.filterwarnings("ignore::schoenbat.PoorEstimateWarning")
@pytest.mark.parametrize("kind", budgets.KINDS)
@pytest.mark.parametrize(
    ("head_dim", "numbers"),
    [(32, (1, 16, 33, 100, 300, 545, 561, 562, 1024, 4096)), (64, (1, 32, 65, 500, 2145, 2146, 4290))],
)
def test_the_error_does_not_rise_with_the_number_of_features(
    kind: str, head_dim: int, numbers: tuple[int, ...]
) -> None:
    errors = [budgets.error(kind, head_dim, 3.0, number, sets=1, draws=2) for number in numbers]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_the_published_figures_do_not_rise() -> None:
    table = pd.read_csv(ROOT / "docs/budgets.csv")
    assert set(table.head_dim) == {32, 64, 128}
    rises = table.groupby(["vectors", "head_dim", "largest_argument"]).error.diff()
    assert not (rises > 0).any()
