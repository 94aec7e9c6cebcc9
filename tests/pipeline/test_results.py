"""What a cell writes is read back as it was, in few bytes."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.grid.results import CellResults, pack_predictions, read_predictions
from schoenbat.errors import UserError
from schoenbat.lra.training import Predictions


def some_predictions(examples: int, targets: int = 1) -> Predictions:
    generator = np.random.default_rng(0)
    correct = generator.integers(0, targets + 1, examples)
    classes = generator.integers(0, 300, examples) if targets == 1 else None
    return Predictions(correct, np.full(examples, targets), -generator.exponential(1, examples), classes)


@pytest.mark.parametrize("targets", [1, 4])
def test_predictions_come_back_with_log_probabilities_to_a_hundredth(tmp_path: Path, targets: int) -> None:
    given = some_predictions(2000, targets)
    (tmp_path / "predictions.npz").write_bytes(pack_predictions(given))
    found = read_predictions(tmp_path / "predictions.npz")
    assert (found.correct == given.correct).all()
    assert (found.targets == given.targets).all()
    assert found.log_probability == pytest.approx(given.log_probability, abs=0.0075)
    assert found.score().accuracy == given.score().accuracy
    if targets == 1:
        assert found.predicted is not None
        assert (found.predicted == given.predicted).all()
    else:
        assert found.predicted is None


def test_predictions_take_a_few_kilobytes_and_the_same_bytes_each_time() -> None:
    given = some_predictions(2000)
    packed = pack_predictions(given)
    assert packed == pack_predictions(given)
    assert len(packed) < 8000


def test_a_certain_mistake_is_kept_as_a_finite_number(tmp_path: Path) -> None:
    given = Predictions(np.array([0]), np.array([1]), np.array([-1e9]), np.array([1]))
    (tmp_path / "predictions.npz").write_bytes(pack_predictions(given))
    assert read_predictions(tmp_path / "predictions.npz").log_probability.tolist() == [-1000]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"\x93NUMPY", b"correct"])
def test_damaged_predictions_are_one_line_that_names_the_file(tmp_path: Path, damage: bytes) -> None:
    results = CellResults("tiny", "a-cell-0", tmp_path)
    assert results.predictions() is None
    path = tmp_path / "runs/tiny/a-cell/predictions/0.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"predictions/0\.npz is damaged"):
        results.predictions()
