"""What does a picture show? CIFAR-10 in grayscale, read pixel by pixel (Krizhevsky 2009; Tay et al. 2021)."""

import io
import lzma
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import SPLITS, write_dataset
from schoenbat.lra.data.fetch import RemoteFile, fetch
from schoenbat.lra.data.subset import balanced_rows, check_size
from schoenbat.lra.tasks import Progress, Task

NUM_LABELS = 10
SIDE = 32


def _gray(name: str, size: int, checksum: str) -> RemoteFile:
    return RemoteFile(mirror_path=f"cifar10/{name}.npy.xz", urls=(), size=size, checksum=f"sha256:{checksum}")


TRAIN_PARTS = (
    _gray("gray_train_0", 7_265_516, "8f6d9ee5301564ae2b4382d0fa825781b22f01c9080c2af52e76eeda8391501a"),
    _gray("gray_train_1", 7_259_328, "5db700381dfcd2bde75baaaf11a27d5c90d5e180acb3086d551214ead84841b6"),
    _gray("gray_train_2", 7_155_168, "3e3a30df585b7119a9904177f08b92fc848fc29b32122a976208b0201bdd5275"),
    _gray("gray_train_3", 7_229_160, "12ea734c8ee6f08f0c6c8ebd1610a25572e06eb8e66bb34bb666eeb4cb509fcf"),
    _gray("gray_train_4", 7_223_108, "a1ab65041e0def6fd12323a42731652f00fb2d45f093e6bcd2db115cbb28c508"),
)
TEST_PART = _gray("gray_test", 7_230_332, "d0b601c3e3b7a11ab03b71ee306b6e5a257bb0bb877eeea5b7d5d7d3b22fb62d")
LABELS = _gray("labels", 1_232, "8e06060db3ad209ae32e814ff2585959df02549f1cd4c9068994b7e41d7a9777")
"""Gray pictures, uint8 [n, 32, 32] each; the labels of all, first those of train."""
ARCHIVE = RemoteFile(
    mirror_path="cifar10/cifar-10-python.tar.gz",
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    size=170_498_071,
    checksum="md5:c58f30108f718f92721af3b95e74349a",
)
"""The release in colour: pickled batches with `data`, uint8 [n, 3072] (red, green, blue plane), and `labels`."""

Pictures = dict[str, tuple[np.ndarray, np.ndarray]]
"""For train and test the pictures, uint8 [n, 32, 32], and their labels, int64 [n]."""


class Image(Task):
    """Which of ten classes does a gray picture of 32 x 32 pixels belong to?

    Each pixel is a token, row after row: its gray value plus 1, because 0 is padding. (The Long Range Arena takes the
    value itself, so that black pixels, 0.2 % of them, are not attended to.)

        column   0    1    2    ...  1023   label
        gray     0    17   255  ...  130
        token    1    18   256  ...  131    3

    Test is the official one. Dev is cut from the 50,000 training pictures, as many of each label. Which pictures are
    drawn for dev, and for a smaller train or test, depends on `seed` alone and not on the order in which they come.
    """

    num_classes = NUM_LABELS
    vocab_size = 257
    how_to_get = (
        "connect to www.cs.toronto.edu, or put cifar10/cifar-10-python.tar.gz or the gray pictures cifar10/*.npy.xz "
        "into a folder and name that folder in SCHOENBAT_DATA_MIRROR"
    )

    @dataclass(frozen=True)
    class Config:
        max_length: int = SIDE * SIDE
        dev_size: int = 5000
        train_size: int | None = None
        test_size: int | None = None
        seed: int = 0

        def __post_init__(self) -> None:
            if self.max_length < 1:
                raise ValueError(f"max_length must be at least 1, not {self.max_length}")
            for split in SPLITS:
                check_size(f"{split}_size", getattr(self, f"{split}_size"), NUM_LABELS)
            if self.seed < 0:
                raise ValueError(f"seed must not be negative, but is {self.seed}")

    config: Config

    def download(
        self, folder: Path, mirror: Path | None, limit_bytes: int | None, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Fetch the gray pictures where a mirror has them, else the release."""
        in_mirror = mirror is not None and (mirror / LABELS.mirror_path).is_file()
        provenance = []
        for file in (*TRAIN_PARTS, TEST_PART, LABELS) if in_mirror else (ARCHIVE,):
            path = _raw(folder, file)
            source = fetch(file, path, mirror=mirror, limit_bytes=limit_bytes, on_progress=on_progress)
            provenance.append({"name": path.name, "from": source, "size": file.size, "checksum": file.checksum})
        return {"files": provenance}

    def prepare(self, raw: Path, out: Path) -> dict[str, Any]:
        """Cut dev and write the arrays; the gray pictures are preferred where both forms are there.

        Raises:
            UserError: no raw files, some that cannot be read, or a split larger than what there is.
        """
        config = self.config
        gray = _raw(raw, LABELS).exists()
        if not gray and not _raw(raw, ARCHIVE).exists():
            raise UserError(f"no raw data of lra-image in {raw}; download the task")
        try:
            pictures = read_gray(raw) if gray else read_archive(_raw(raw, ARCHIVE))
        except (EOFError, lzma.LZMAError, tarfile.TarError, pickle.UnpicklingError, OSError, ValueError) as error:
            raise UserError(f"raw data in {raw} cannot be read, remove it and download again: {error!r}") from error
        (train, train_labels), (test, test_labels) = (in_own_order(*pictures[half]) for half in ("train", "test"))
        dev_rows = self._draw("dev_size", train_labels, 0)
        assert dev_rows is not None
        left = np.setdiff1d(np.arange(len(train)), dev_rows)
        train_rows, test_rows = self._draw("train_size", train_labels[left], 1), self._draw("test_size", test_labels, 2)
        subset = train_rows is not None or test_rows is not None
        chosen = {
            "train": (train, train_labels, left if train_rows is None else left[train_rows]),
            "dev": (train, train_labels, dev_rows),
            "test": (test, test_labels, np.arange(len(test)) if test_rows is None else test_rows),
        }
        docs: list[np.ndarray] = []
        splits = {}
        for split, (images, labels, rows) in chosen.items():
            examples = np.arange(len(docs), len(docs) + len(rows))
            splits[split] = (examples[:, None], labels[rows])
            docs.extend(images[rows].reshape(len(rows), -1).astype(np.uint16) + 1)
        return write_dataset(
            out,
            docs,
            splits,
            {
                "task": "lra-image",
                "num_classes": self.num_classes,
                "vocab_size": self.vocab_size,
                "num_texts": self.num_texts,
                "max_length": config.max_length,
                "label": "CIFAR-10 gray, subset" if subset else "CIFAR-10 gray",
                "source": f"CIFAR-10, {'gray copies' if gray else 'converted from colour'}",
                "notes": [
                    f"dev: {len(dev_rows)} of the training pictures, drawn with seed {config.seed}",
                    "token = gray value + 1, so black pixels are tokens too",
                ],
            },
        )

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Write made-up gray pictures, brighter with a larger label."""
        generator = np.random.default_rng(0)
        labels = np.tile(np.arange(NUM_LABELS), 6)
        pictures = (generator.integers(0, 100, (60, SIDE, SIDE)) + 15 * labels[:, None, None]).astype(np.uint8)
        for part, rows in zip((*TRAIN_PARTS, TEST_PART), np.split(pictures, 6), strict=True):
            _write(_raw(raw, part), rows)
        _write(_raw(raw, LABELS), labels)
        return cls.Config(dev_size=10)

    def _draw(self, name: str, labels: np.ndarray, stream: int) -> np.ndarray | None:
        """Draw as many rows as the option `name` says, as many of each label; None for all."""
        size = getattr(self.config, name)
        if size is None:
            return None
        generator = np.random.default_rng([self.config.seed, stream])
        return balanced_rows(labels, size, generator, f"lra-image: {name}", NUM_LABELS)


def _raw(folder: Path, file: RemoteFile) -> Path:
    return folder / PurePosixPath(file.mirror_path).name


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(path, "wb") as file:
        np.save(file, array)


def read_gray(raw: Path) -> Pictures:
    """Read the gray pictures and their labels."""

    def read(file: RemoteFile) -> np.ndarray:
        with lzma.open(_raw(raw, file)) as content:
            return np.load(io.BytesIO(content.read()))

    train, test = np.concatenate([read(part) for part in TRAIN_PARTS]), read(TEST_PART)
    labels = read(LABELS).astype(np.int64)
    if len(labels) != len(train) + len(test):
        raise ValueError(f"{len(labels)} labels for {len(train)} and {len(test)} pictures")
    return {"train": (train, labels[: len(train)]), "test": (test, labels[len(train) :])}


def read_archive(path: Path) -> Pictures:
    """Read the pictures of the release, made gray."""
    names = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
    batches: dict[str, dict[bytes, Any]] = {}
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if member.isfile() and name in (*names["train"], *names["test"]):
                content = archive.extractfile(member)
                assert content is not None
                # Trusted: `fetch` has verified the archive.
                batches[name] = pickle.load(content, encoding="bytes")
    missing = [name for half in names.values() for name in half if name not in batches]
    if missing:
        raise ValueError(f"{path.name} has no {', '.join(missing)}")
    return {
        half: (
            np.concatenate([to_gray(np.asarray(batches[name][b"data"])) for name in parts]),
            np.concatenate([np.asarray(batches[name][b"labels"], np.int64) for name in parts]),
        )
        for half, parts in names.items()
    }


def to_gray(data: np.ndarray) -> np.ndarray:
    """Convert as TensorFlow's rgb_to_grayscale does for uint8: uint8 [n, 3072] to uint8 [n, 32, 32].

    In float32: colours / 255, weighted by 0.2989, 0.5870 and 0.1140, times 255.5, cut to integers.
    """
    red, green, blue = (data.reshape(-1, 3, SIDE, SIDE).astype(np.float32) / np.float32(255)).swapaxes(0, 1)
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    return ((red * weights[0] + green * weights[1] + blue * weights[2]) * np.float32(255.5)).astype(np.uint8)


def in_own_order(pictures: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by content, so that a seed draws the same pictures from every form of the data."""
    flat = np.ascontiguousarray(pictures.reshape(len(pictures), -1))
    order = sorted(range(len(flat)), key=lambda row: (flat[row].tobytes(), labels[row]))
    return pictures[order], labels[order]
