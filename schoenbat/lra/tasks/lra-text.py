"""Sentiment of film reviews, read byte by byte: the Large Movie Review Dataset (Maas et al. 2011; Tay et al. 2021)."""

import json
import lzma
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import Dataset, write_dataset
from schoenbat.lra.data.bag import bag_accuracy
from schoenbat.lra.data.fetch import RemoteFile, fetch
from schoenbat.lra.data.subset import balanced_rows, check_size
from schoenbat.lra.tasks import MAX_LENGTH, Progress, Task, byte_tokens
from schoenbat.registry import check_bounds

LINES = RemoteFile(
    mirror_path="imdb/imdb.jsonl.xz",
    urls=(),
    size=18_324_080,
    checksum="sha256:7134b5d05862b169e73ccc2fd96c9a09fd62d1f396f4b8b84239a1cc59000e64",
)
"""One JSON object a line: split, label (0 negative, 1 positive), id, rating, text."""
ARCHIVE = RemoteFile(
    mirror_path="imdb/aclImdb_v1.tar.gz",
    urls=("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",),
    size=84_125_825,
    checksum="md5:7c2ac02c03563afcf9b574c7e56c153a",
)
"""The release: aclImdb/SPLIT/{neg,pos}/ID_RATING.txt, one review each."""
LABELS = {"neg": 0, "pos": 1}


@dataclass(frozen=True, order=True)
class Review:
    split: str
    label: int
    id: int
    text: bytes


class Text(Task):
    """Is a review negative (0) or positive (1)?

    Each byte of the UTF-8 text plus 1 is a token, so that 0 stays free for padding:

        column   0    1    2    3    4    5   ...  label
        text     A    ' '  g    e    m    .
        token    66   33   104  102  110  47  ...  1

    Test is the official test half. Dev is cut from the training half, as many of each label, only from reviews whose
    text occurs nowhere else in either half. Training reviews whose text occurs in the test half are dropped; copies
    within the training half stay in training. `train_size` and `test_size` draw a subset, as many of each label.
    Which reviews are drawn depends on `seed` only, and dev and test not on `train_size`.
    """

    num_classes = 2
    vocab_size = 257
    class_names = ("negative", "positive")
    how_to_get = (
        "connect to ai.stanford.edu, or put imdb/imdb.jsonl.xz or imdb/aclImdb_v1.tar.gz into a folder and name that "
        "folder in SCHOENBAT_DATA_MIRROR"
    )

    @dataclass(frozen=True)
    class Config:
        max_length: int = 4000
        dev_size: int = 2500
        train_size: int | None = None
        test_size: int | None = None
        seed: int = 0

        def __post_init__(self) -> None:
            check_bounds(self, max_length=(1, MAX_LENGTH))
            for name in ("dev_size", "train_size", "test_size"):
                check_size(name, getattr(self, name))
            if self.seed < 0:
                raise ValueError(f"seed must not be negative, but is {self.seed}")

    config: Config

    def download(
        self, folder: Path, mirror: Path | None, limit_bytes: int | None, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Fetch the JSON lines where a mirror has them, else the release."""
        file = LINES if mirror and (mirror / LINES.mirror_path).is_file() else ARCHIVE
        name = PurePosixPath(file.mirror_path).name
        source = fetch(file, folder / name, mirror=mirror, limit_bytes=limit_bytes, on_progress=on_progress)
        return {"files": [{"name": name, "from": source, "size": file.size, "checksum": file.checksum}]}

    def prepare(self, raw: Path, out: Path) -> dict[str, Any]:
        """Cut dev, drop what leaks, and write the arrays.

        Raises:
            UserError: no raw file, one that cannot be read, or a split larger than what there is.
        """
        config = self.config
        path, reviews = self._read(raw)
        train = [review for review in reviews if review.split == "train"]
        test = [review for review in reviews if review.split == "test"]
        copies = Counter(review.text for review in reviews)
        tested = {review.text for review in test}
        leaking = [review for review in train if review.text in tested]
        dev = self._draw("dev_size", [review for review in train if copies[review.text] == 1], 0)
        taken = {(review.label, review.id) for review in dev}
        train = [review for review in train if review.text not in tested and (review.label, review.id) not in taken]
        repeated = sum(copies[review.text] > 1 for review in train)
        notes = [
            f"{len(leaking)} training reviews dropped: their text occurs in the test half",
            f"{len(dev)} training reviews moved to dev, all with a text that occurs once",
            f"{repeated} training reviews share their text with another training review",
        ]
        train, test = self._draw("train_size", train, 1), self._draw("test_size", test, 2)
        subset = config.train_size is not None or config.test_size is not None
        if subset:
            notes.append(f"a subset: {len(train)} training and {len(test)} test reviews drawn with seed {config.seed}")
        docs: list[np.ndarray] = []
        splits = {}
        for split, chosen in (("train", train), ("dev", dev), ("test", test)):
            rows = np.arange(len(docs), len(docs) + len(chosen))
            splits[split] = (rows[:, None], np.array([review.label for review in chosen]))
            docs.extend(byte_tokens(review.text) for review in chosen)
        return write_dataset(
            out,
            docs,
            splits,
            {
                "task": "lra-text",
                "num_classes": self.num_classes,
                "vocab_size": self.vocab_size,
                "num_texts": self.num_texts,
                "max_length": config.max_length,
                "label": "IMDB bytes, subset" if subset else "IMDB bytes",
                "source": f"Large Movie Review Dataset v1.0, from {path.name}",
                "notes": notes,
            },
        )

    @classmethod
    def encode(cls, text: str, meta: Mapping[str, Any]) -> np.ndarray:
        return byte_tokens(text.encode())

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Score the commonest label, and logistic regression on the frequencies of bytes."""
        return super().baselines(dataset) | {"byte frequencies": bag_accuracy(dataset)}

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Write eighty made-up reviews, some of them copies within the training half and across the halves."""
        raw.mkdir(parents=True, exist_ok=True)
        with lzma.open(raw / "imdb.jsonl.xz", "wt", encoding="utf-8") as file:
            for split in ("train", "test"):
                for label, word in enumerate(("dull", "gripping")):
                    for number in range(20):
                        text = (
                            f"Number {number} of {split}: a {word} film{' indeed' * number} \N{EM DASH} see it or not."
                        )
                        if number in (0, 1):
                            text = f"Copied everywhere: {word}."
                        if split == "train" and number in (2, 3):
                            text = f"Twice in training: {word}."
                        record = {"split": split, "label": label, "id": number, "rating": 1 + 8 * label, "text": text}
                        file.write(json.dumps(record) + "\n")
        return cls.Config(max_length=64, dev_size=8)

    def _draw(self, name: str, reviews: list[Review], stream: int) -> list[Review]:
        """Draw as many reviews as the option `name` says, half of each label, in their order; all where it is None."""
        size = getattr(self.config, name)
        if size is None:
            return reviews
        generator = np.random.default_rng([self.config.seed, stream])
        labels = np.array([review.label for review in reviews])
        return [reviews[row] for row in balanced_rows(labels, size, generator, f"lra-text: {name}")]

    def _read(self, raw: Path) -> tuple[Path, list[Review]]:
        """Return the raw file that is there, and its reviews sorted by split, label and id."""
        for file, read in ((LINES, read_lines), (ARCHIVE, read_archive)):
            path = raw / PurePosixPath(file.mirror_path).name
            if path.exists():
                try:
                    return path, sorted(read(path))
                except (EOFError, lzma.LZMAError, tarfile.TarError, OSError, ValueError, KeyError) as error:
                    raise UserError(f"{path} cannot be read, remove it and download again: {error!r}") from error
        raise UserError(f"no raw data of lra-text in {raw}; download the task")


def read_lines(path: Path) -> Iterator[Review]:
    """Return the reviews of the JSON lines."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            yield Review(record["split"], record["label"], record["id"], record["text"].encode())


def read_archive(path: Path) -> Iterator[Review]:
    """Return the labelled reviews of the release, read in one pass without unpacking."""
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) == 4 and parts[2] in LABELS:
                content = archive.extractfile(member)
                assert content is not None
                yield Review(parts[1], LABELS[parts[2]], int(parts[3].split("_")[0]), content.read())
