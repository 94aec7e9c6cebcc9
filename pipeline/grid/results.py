"""What a cell writes, as types; read and written here alone.

The cells that differ in their seeds alone share folders that are outputs of DVC, with a file for each seed. In
weights/PROFILE/GROUP: SEED.pt, the weights after the best step and what they belong to. In runs/PROFILE/GROUP:
curves/SEED.csv, one `Evaluation` per row; metrics/SEED.json, `Metrics`, written last, so that a seed that has it has
all of the training; predictions/SEED.npz, the predictions of the best weights for each test example; test/SEED.json,
`TestScore`, written after them. Beside the checkpoint of a cell: resources.json, `Resources`, which differs from run
to run.
"""

import csv
import dataclasses
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.host.files import damaged, read_json, write_csv, write_json
from schoenbat.errors import UserError
from schoenbat.files import write_bytes
from schoenbat.lra.config import build_config

if TYPE_CHECKING:
    from schoenbat.lra.training import Evaluation, Predictions

T = TypeVar("T")
_SUFFIXES = {"curves": "csv", "metrics": "json", "predictions": "npz", "test": "json"}
_LEAST_LOG_PROBABILITY = -1000.0


@dataclass(frozen=True)
class Fingerprint:
    """What a cell's numbers are made from, as hex digests; neither the device nor the threads are part of it.

    Attributes:
        code: what the code of its mechanism, its kernel and its training computes: see `pipeline.grid.numerics`.
        settings: the cell, and its sections of params.yaml.
        data: its prepared data.
    """

    code: str
    settings: str
    data: str

    def __str__(self) -> str:
        return f"{self.code}-{self.settings}-{self.data}"


@dataclass(frozen=True)
class Metrics:
    """The figures of a training that do not depend on how fast it ran.

    Attributes:
        steps: updates that were made.
        best_step: of the dev accuracy.
        data: the label of the data.
        attention: the section of the mechanism.
        device: such as "cpu (AMD EPYC 9R14)".
        state_bytes: what causal attention keeps of the tokens before, in all layers, at the task's length; None where
            attention is not causal.
    """

    cell: str
    profile: str
    task: str
    attn: str
    dotf: str | None
    former: str
    seed: int
    steps: int
    best_step: int
    best_dev_accuracy: float
    best_dev_loss: float
    final_train_loss: float
    num_parameters: int
    train_examples: int
    dev_examples: int
    data: str
    attention: dict[str, Any]
    device: str
    threads: int
    torch: str
    git_revision: str
    fingerprint: Fingerprint
    state_bytes: int | None = None


@dataclass(frozen=True)
class TestScore:
    """What the best weights reach on the test split."""

    __test__ = False  # for pytest, which takes the name for that of a test

    cell: str
    accuracy: float
    loss: float
    examples: int
    best_step: int
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Resources:
    """What a training took, over all its processes.

    Attributes:
        device: as in `Metrics`.
        resumed: how often it went on from a checkpoint.
        run_id: of MLflow, in files of earlier versions.
    """

    device: str
    seconds: float
    steps_per_second: float
    tokens_per_second: float
    peak_memory_mb: float
    resumed: int
    run_id: str = ""


@dataclass(frozen=True)
class CellResults:
    """The results of a cell of a profile, by its id. What is absent is None; what is damaged is a UserError."""

    profile: str
    cell: str
    root: Path = Path()

    @property
    def group(self) -> str:
        return self.cell.rpartition("-")[0]

    @property
    def seed(self) -> str:
        return self.cell.rpartition("-")[2]

    @property
    def best(self) -> Path:
        return self.root / "weights" / self.profile / self.group / f"{self.seed}.pt"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoints" / self.profile / self.cell / "last.pt"

    def metrics(self) -> Metrics | None:
        return _read(Metrics, self._file("metrics"))

    def test(self) -> TestScore | None:
        return _read(TestScore, self._file("test"))

    def resources(self) -> Resources | None:
        return _read(Resources, self.checkpoint.with_name("resources.json"))

    def curve(self) -> list[dict[str, float]]:
        """Return the evaluations, in order; none if there is no file."""
        path = self._file("curves")
        return read_rows(path, None) if path.is_file() else []

    def fingerprints(self) -> list[str | None]:
        """Of the training and of the test, read without anything else; None where a file is absent or damaged."""
        found: list[str | None] = []
        for kind in ("metrics", "test"):
            try:
                found.append(str(Fingerprint(**read_json(self._file(kind))["fingerprint"])))
            except (FileNotFoundError, UserError, KeyError, TypeError):
                found.append(None)
        return found

    def files(self) -> list[Path]:
        """Return the files that a finished cell has, the weights first."""
        return [self.best, *map(self._file, _SUFFIXES)]

    def set_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Say of results that are there that they are made from this."""
        for path in (self._file("test"), self._file("metrics")):
            write_json(path, read_json(path) | {"fingerprint": dataclasses.asdict(fingerprint)})

    def remove_unfinished(self) -> None:
        """Delete what writers of this cell's files leave when they are killed; other seeds may be writing theirs."""
        for file in self.files():
            for leftover in file.parent.glob(f".{file.name}.*.tmp"):
                leftover.unlink(missing_ok=True)

    def _file(self, kind: str) -> Path:
        return self.root / "runs" / self.profile / self.group / kind / f"{self.seed}.{_SUFFIXES[kind]}"

    def predictions(self) -> "Predictions | None":
        """Those of the test split, in its order; log-probabilities to a hundredth."""
        path = self._file("predictions")
        return read_predictions(path) if path.is_file() else None

    def write_training(self, evaluations: "Iterable[Evaluation]", resources: Resources, metrics: Metrics) -> None:
        """Write the figures of a training, after its weights; the test of other weights goes."""
        self._file("test").unlink(missing_ok=True)
        self._file("predictions").unlink(missing_ok=True)
        write_csv(self._file("curves"), [dataclasses.asdict(evaluation) for evaluation in evaluations])
        write_json(self.checkpoint.with_name("resources.json"), dataclasses.asdict(resources))
        write_json(self._file("metrics"), dataclasses.asdict(metrics))

    def write_test(self, score: TestScore, predictions: "Predictions") -> None:
        write_bytes(self._file("predictions"), pack_predictions(predictions))
        write_json(self._file("test"), dataclasses.asdict(score))


@dataclass(frozen=True)
class Replaced:
    """What a trained model gives whose attention is replaced, by the name of its cell in `trained.cells`.

    In runs/PROFILE/trained: CELL.csv, a row for each text, and CELL.json, what it was made with, written last.
    """

    profile: str
    cell: str
    root: Path = Path()

    def files(self) -> list[Path]:
        folder = self.root / "runs" / self.profile / "trained"
        return [folder / f"{self.cell}.csv", folder / f"{self.cell}.json"]

    def read(self) -> tuple[list[dict[str, float]], dict[str, Any]] | None:
        """Return the rows and what they were made with; None where there is no result."""
        values, about = self.files()
        return (read_rows(values, None), read_json(about)) if about.is_file() else None

    def fingerprint(self) -> str | None:
        """Return that of the result; None where there is none."""
        about = self.files()[1]
        return str(Fingerprint(**read_json(about)["fingerprint"])) if about.is_file() else None

    def set_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Say of a result that is there that it is made from this."""
        about = self.files()[1]
        write_json(about, read_json(about) | {"fingerprint": dataclasses.asdict(fingerprint)})

    def write(self, rows: Sequence[Mapping[str, float]], about: Mapping[str, Any]) -> None:
        """Write the values of texts, rounded to six digits, and what they were made with."""
        values, described = self.files()
        described.unlink(missing_ok=True)
        write_csv(values, [{name: f"{value:.6g}" for name, value in row.items()} for row in rows])
        write_json(described, about)


def trained_cells(profile: str, root: Path = Path()) -> list[str]:
    """Return the ids of all cells of a profile whose training is finished, whatever it was made from."""
    found = (root / "runs" / profile).glob("*/metrics/*.json")
    return sorted(f"{path.parents[1].name}-{path.stem}" for path in found)


def pack_predictions(predictions: "Predictions") -> bytes:
    """Return the bytes of an .npz file of the smallest types, the same bytes for the same predictions."""
    packed = {
        name: array.astype(np.min_scalar_type(int(array.max())))
        for name, array in vars(predictions).items()
        if array is not None and array.dtype.kind != "f"
    }
    rounded = np.maximum(predictions.log_probability, _LEAST_LOG_PROBABILITY).round(2)
    content = io.BytesIO()
    np.savez_compressed(content, log_probability=rounded.astype(np.float16), **packed)
    return content.getvalue()


def read_predictions(path: Path) -> "Predictions":
    """Read what `pack_predictions` has made; raises UserError if the file is damaged."""
    from schoenbat.lra.training import Predictions

    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name].astype("f8" if name == "log_probability" else "i8") for name in arrays}
        if len({len(array) for array in found.values()}) != 1:
            raise ValueError("the columns differ in length")
        return Predictions(**{"predicted": None} | found)
    except (ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from None


def read_rows(path: Path, numbers: Iterable[str] | None) -> list[dict[str, Any]]:
    """Return the rows of a CSV file by column, with `numbers`, or all columns, as floats; an empty number is NaN.

    Raises:
        UserError: the file is damaged.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    try:
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("a row is cut short")
            for name in row if numbers is None else numbers:
                row[name] = float(row[name]) if row[name] else float("nan")
    except (ValueError, KeyError) as error:
        raise damaged(path, error) from None
    return rows


def _read(kind: type[T], path: Path) -> T | None:
    try:
        written = read_json(path)
    except FileNotFoundError:
        return None
    try:
        return build_config(kind, written, str(path))
    except UserError as error:
        raise damaged(path, error) from None
