"""Texts and labels of one's own: a csv, tsv, jsonl or parquet file becomes a task by what params.yaml says of it."""

import codecs
import csv
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from schoenbat.errors import UserError, list_choices, shorten, unknown_name
from schoenbat.lra.data.arrays import SPLITS, write_dataset
from schoenbat.lra.tasks import MAX_LENGTH, Progress, Task, byte_tokens
from schoenbat.registry import check_bounds

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
UNKNOWN = 1
"""The token of a character or word that is not in the vocabulary."""
FIRST_TOKEN = 2
MAX_VOCABULARY = 2**16 - FIRST_TOKEN
MAX_CLASSES = 1000
_SPLIT_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_FIELD = 2**27


class Row(NamedTuple):
    """One example, and where it stands."""

    where: str
    texts: tuple[str, ...]
    label: str
    split: str | None


class Table(Task):
    """Which of the labels that occur in a file belongs to a text, or to two texts?

    Each row of the file is an example:

        text,label
        "Not again, please.",bad
        A gem.,good

    `tokens` says what of a text is a token: `bytes` of its UTF-8, plus 1, so that 0 stays free for padding; or
    `characters`, or `words` in lower case with punctuation apart, of which the `vocab_size` most frequent of the
    training texts get numbers from 2 on, and all others are token 1.

    Dev and test are drawn by `seed`, the same share of each label, unless a column or files of their own say which rows
    they are. A text never stands in two splits: of rows with the same text the first one counts where the split is
    drawn, and where it is given, the one in test before that in dev before that in train.
    """

    how_to_get = "name a file with texts and labels in task.table.data.path of params.yaml"

    @dataclass(frozen=True)
    class Config:
        """The file, and what becomes of it.

        Attributes:
            path: a .csv, .tsv, .jsonl or .parquet file; paths are those from the project's folder.
            dev_path, test_path: files of their own for dev and test, in the same form.
            columns: the names of the columns of a csv or tsv file that has no line with them.
            text, other_text: the columns of the texts; the second one only where two texts make an example.
            label: the column of the labels.
            labels: the only ones that may occur, in the order of their numbers; by default those that occur, sorted.
            split: a column that says train, dev or test.
            dev_share, test_share: of the rows of each label, where nothing else says which rows they are.
            tokens: what of a text is one: bytes of UTF-8; characters; or words in lower case, with punctuation apart.
            vocab_size: so many of them, the most frequent of the training texts, have a number of their own.
            max_length: tokens of a text; longer ones are cut.
            encoding: of a csv, tsv or jsonl file, by Python's name.
            seed: of the draw of dev and test.
        """

        path: str = ""
        dev_path: str | None = None
        test_path: str | None = None
        columns: list[str] | None = None
        text: str = "text"
        other_text: str | None = None
        label: str = "label"
        labels: list[str] | None = None
        split: str | None = None
        dev_share: float = 0.1
        test_share: float = 0.1
        tokens: Literal["bytes", "characters", "words"] = "bytes"
        vocab_size: int = 20_000
        max_length: int = 1000
        encoding: str = "utf-8"
        seed: int = 0

        def __post_init__(self) -> None:
            check_bounds(self, max_length=(1, MAX_LENGTH), vocab_size=(1, MAX_VOCABULARY), seed=(0, 2**63 - 1))
            for name in ("dev_share", "test_share"):
                if not 0 < getattr(self, name) < 1:
                    raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
            if self.dev_share + self.test_share >= 1:
                raise ValueError("dev_share and test_share leave nothing for training")
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"unknown encoding {shorten(self.encoding)}; such as: utf-8, latin-1") from None
            if self.split is not None and (self.dev_path or self.test_path):
                raise ValueError("split goes with one file; leave out dev_path and test_path")
            for path in filter(None, (self.path, self.dev_path, self.test_path)):
                if Path(path).suffix.lower() not in SUFFIXES:
                    raise ValueError(f"{path} is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_texts = 1 if config.other_text is None else 2

    def download(
        self, folder: Path, mirror: Path | None, limit_bytes: int | None, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Copy the files.

        Raises:
            UserError: no path is set, or there is no such file.
        """
        if not self.config.path:
            raise UserError("task.table.data.path is not set: name a file with texts and labels")
        copied = []
        for split, path in self._files():
            if not path.is_file():
                raise UserError(f"task.table.data: there is no file {path}")
            shutil.copyfile(path, _copy(folder, split, path))
            copied.append({"name": _copy(folder, split, path).name, "from": str(path)})
        return {"files": copied}

    def prepare(self, raw: Path, out: Path) -> dict[str, Any]:
        """Read all rows, split them, and write the arrays.

        Raises:
            UserError: a row, a label, a file or an encoding that is wrong; it names the file and the line.
        """
        config = self.config
        rows = [
            row if split is None else row._replace(split=split)
            for split, path in self._files()
            for row in self._read(_copy(raw, split, path), path)
        ]
        labels = self._labels(rows)
        parts, notes = self._split(rows)
        vocabulary = self._vocabulary(parts["train"])
        meta: dict[str, Any] = {
            "task": "table",
            "num_classes": len(labels),
            "vocab_size": 257 if config.tokens == "bytes" else FIRST_TOKEN + len(vocabulary),
            "num_texts": self.num_texts,
            "max_length": config.max_length,
            "label": f"{Path(config.path).name}, {config.tokens}",
            "source": ", ".join(str(path) for _, path in self._files()),
            "notes": notes,
            "class_names": labels,
            "tokens": config.tokens,
            "vocabulary": vocabulary,
        }
        self.num_classes, self.vocab_size = meta["num_classes"], meta["vocab_size"]
        number = {label: index for index, label in enumerate(labels)}
        encode = _encoder(config.tokens, vocabulary)
        docs: list[np.ndarray] = []
        splits = {}
        for split in SPLITS:
            first, chosen = len(docs), parts[split]
            docs.extend(encode(text) for row in chosen for text in row.texts)
            examples = np.arange(first, len(docs)).reshape(len(chosen), self.num_texts)
            splits[split] = (examples, np.array([number[row.label] for row in chosen]))
        return write_dataset(out, docs, splits, meta)

    @classmethod
    def encode(cls, text: str, meta: Mapping[str, Any]) -> np.ndarray:
        return _encoder(meta["tokens"], meta["vocabulary"])(text)

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Write sixty made-up reviews of three kinds, two of them the same."""
        raw.mkdir(parents=True, exist_ok=True)
        config = cls.Config(path="reviews.csv", dev_share=0.2, test_share=0.2, max_length=40)
        with _copy(raw, None, Path(config.path)).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(
                (f"Review {number}, which is {kind}.", kind) for number in range(20) for kind in ("bad", "fair", "good")
            )
            writer.writerow(["Review 0, which is bad.", "bad"])
        return config

    def _files(self) -> list[tuple[str | None, Path]]:
        """Return the files and the split that each is; None where the rows are still to be split."""
        config = self.config
        whole = bool(config.dev_path and config.test_path)
        given = (("train" if whole else None, config.path), ("dev", config.dev_path), ("test", config.test_path))
        return [(split, Path(path)) for split, path in given if path]

    def _read(self, path: Path, name: Path) -> Iterator[Row]:
        """Return the rows of a file, which is called `name` in errors."""
        config = self.config
        if not path.is_file():
            raise UserError(f"no raw data of table in {path.parent}; download the task")
        if path.stat().st_size == 0:
            raise UserError(f"{name} is empty")
        text_columns = [config.text, *([config.other_text] if config.other_text else [])]
        columns = [*text_columns, config.label, *([config.split] if config.split else [])]
        empty = True
        for where, values in _READERS[path.suffix.lower()](path, str(name), config, columns):
            empty = False
            texts = tuple(_text(values[column], f"{where}, {column}") for column in text_columns)
            label = _label(values[config.label], f"{where}, {config.label}")
            split = None
            if config.split:
                said = str(values[config.split]).strip().lower()
                if said not in _SPLIT_NAMES:
                    raise UserError(f"{where}: {unknown_name(config.split, said, SPLITS)}")
                split = _SPLIT_NAMES[said]
            yield Row(where, texts, label, split)
        if empty:
            raise UserError(f"{name} has no rows")

    def _labels(self, rows: Sequence[Row]) -> list[str]:
        """List the labels by their numbers: those that may occur or that do, sorted as integers if all are."""
        if (known := self.config.labels) is not None:
            for row in rows:
                if row.label not in known:
                    raise UserError(f"{row.where}: {unknown_name('label', row.label, known)}")
            return known
        found = {row.label for row in rows}
        if len(found) < 2:
            raise UserError(f"{self.config.path}: all rows have the label {shorten(rows[0].label)}; two are needed")
        if len(found) > MAX_CLASSES:
            raise UserError(
                f"{self.config.path}: column {self.config.label!r} has {len(found)} different labels, more than "
                f"{MAX_CLASSES}; is it the right column?"
            )
        whole = all(re.fullmatch(r"-?\d{1,9}", label) for label in found)
        return sorted(found, key=int) if whole else sorted(found)

    def _split(self, rows: list[Row]) -> tuple[dict[str, list[Row]], list[str]]:
        """Return the rows of each split, none of whose texts stands in another, and what is to be said of that."""
        given = [row for split in ("test", "dev", "train") for row in rows if row.split == split]
        unique: dict[tuple[str, ...], Row] = {}
        for row in chain(given, (row for row in rows if row.split is None)):
            unique.setdefault(row.texts, row)
        two_labels = len({(row.texts, row.label) for row in rows}) - len(unique)
        kept = set(map(id, unique.values()))
        rows, dropped = [row for row in rows if id(row) in kept], len(rows) - len(unique)
        notes = [f"{dropped} rows dropped: another row has the same text"] if dropped else []
        if two_labels:
            notes.append(f"{two_labels} of them with another label")
        parts = {split: [row for row in rows if row.split == split] for split in SPLITS}
        undecided = [row for row in rows if row.split is None]
        if undecided:
            shares = [("dev", self.config.dev_share), ("test", self.config.test_share)]
            drawn = self._draw(undecided, {split: share for split, share in shares if not parts[split]})
            parts = {split: parts[split] + drawn.get(split, []) for split in SPLITS}
            notes.append(f"drawn from {self.config.path} with seed {self.config.seed}: {', '.join(drawn)}")
        for split in SPLITS:
            if not parts[split]:
                raise UserError(f"{self.config.path}: no row is left for {split}")
        return parts, notes

    def _draw(self, rows: list[Row], shares: Mapping[str, float]) -> dict[str, list[Row]]:
        """Return the rows of each split, in their order: of each label the same shares, one row at least."""
        generator = np.random.default_rng(self.config.seed)
        by_label: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            by_label.setdefault(row.label, []).append(index)
        chosen: dict[str, list[int]] = {split: [] for split in ("train", *shares)}
        for label in sorted(by_label):
            places = by_label[label]
            if len(places) <= len(shares):
                raise UserError(
                    f"{rows[places[0]].where}: label {shorten(label)} has too few different texts, {len(places)}; one "
                    f"each is needed for {', '.join(chosen)}"
                )
            order = [places[position] for position in generator.permutation(len(places))]
            # The training keeps one row, whatever the shares.
            for left, (split, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
                size = min(max(1, round(share * len(places))), len(order) - left)
                chosen[split] += order[:size]
                order = order[size:]
            chosen["train"] += order
        return {split: [rows[index] for index in sorted(places)] for split, places in chosen.items()}

    def _vocabulary(self, rows: Iterable[Row]) -> list[str]:
        """Return the characters or words that get a number, the most frequent first; none where bytes are tokens."""
        if self.config.tokens == "bytes":
            return []
        counts = Counter(piece for row in rows for text in row.texts for piece in _pieces(text, self.config.tokens))
        ordered = sorted(counts, key=lambda piece: (-counts[piece], piece))
        return ordered[: self.config.vocab_size]


def _pieces(text: str, tokens: str) -> Sequence[str]:
    return text if tokens == "characters" else _WORD.findall(text.lower())


def _encoder(tokens: str, vocabulary: Sequence[str]) -> Callable[[str], np.ndarray]:
    if tokens == "bytes":
        return lambda text: byte_tokens(text.encode())
    number = {piece: FIRST_TOKEN + index for index, piece in enumerate(vocabulary)}
    return lambda text: np.array([number.get(piece, UNKNOWN) for piece in _pieces(text, tokens)], dtype=np.uint16)


def _copy(folder: Path, split: str | None, path: Path) -> Path:
    return folder / f"{split or 'all'}{path.suffix.lower()}"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: a text is expected, not {shorten(value)}")
    if not value.strip():
        raise UserError(f"{where}: the text is empty")
    return value


def _label(value: Any, where: str) -> str:
    label = str(value).strip() if isinstance(value, str | int) else ""
    if not label:
        what = "there is no label" if value in (None, "") else f"a text or an integer is expected, not {shorten(value)}"
        raise UserError(f"{where}: {what}")
    return label


Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""Where a row stands, and its values by column."""


def _read_csv(path: Path, name: str, config: Table.Config, columns: Sequence[str]) -> Rows:
    lines = io.StringIO(_decoded(path, name, config.encoding), newline="")
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    limit = csv.field_size_limit(_MAX_FIELD)
    header = config.columns
    line = 1
    try:
        for fields in reader:
            where = f"{name}, line {line}"
            line = reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [field.strip() for field in fields]
                _check_columns(header, columns, f"{name}, line 1")
                continue
            if len(fields) != len(header):
                raise UserError(f"{where}: the row has {len(fields)} of {len(header)} fields")
            yield where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _read_jsonl(path: Path, name: str, config: Table.Config, columns: Sequence[str]) -> Rows:
    for number, line in enumerate(_decoded(path, name, config.encoding).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: no JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f'{where}: an object is expected, such as {{"text": ..., "label": ...}}')
        _check_columns(values, columns, where)
        yield where, values


def _read_parquet(path: Path, name: str, config: Table.Config, columns: Sequence[str]) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{name}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, columns, name)
            row = 0
            for batch in file.iter_batches(columns=list(columns)):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{name}, row {row}", values
    except pyarrow.ArrowException as error:
        raise UserError(f"{name} is no parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path, str, Table.Config, Sequence[str]], Rows]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _check_columns(there: Iterable[str], wanted: Iterable[str], where: str) -> None:
    there = list(there)
    for column in wanted:
        if column not in there:
            raise UserError(f"{where}: no column {column!r}; there are: {list_choices(column, there)}")


def _decoded(path: Path, name: str, encoding: str) -> str:
    content = path.read_bytes()
    try:
        # A mark at the beginning, as spreadsheets write it, is not part of the first column's name.
        return content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: not {encoding} (byte 0x{content[error.start]:02x}); name the file's own encoding, "
            "such as encoding: latin-1"
        ) from None
