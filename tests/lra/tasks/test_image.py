"""CIFAR-10 in gray: both raw forms give the same arrays, and the real pictures have the known statistics."""

import importlib
import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schoenbat.errors import DataUnavailable, UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.data.arrays import SPLITS, Dataset
from schoenbat.lra.tasks import TASKS

Image: Any = TASKS.get("lra-image")
module: Any = importlib.import_module("schoenbat.lra.tasks.lra-image")
MIRROR = os.environ.get("SCHOENBAT_DATA_MIRROR")
needs_mirror = pytest.mark.skipif(
    not MIRROR or not (Path(MIRROR) / "cifar10/labels.npy.xz").is_file(),
    reason="SCHOENBAT_DATA_MIRROR names no folder with cifar10/labels.npy.xz",
)


def prepare(raw: Path, out: Path, **options: Any) -> Dataset:
    Image(Image.Config(**options)).prepare(raw, out)
    return Dataset(out)


def pictures(dataset: Dataset, split: str) -> np.ndarray:
    batch = dataset.batch(split, np.arange(dataset.num_examples(split)))
    assert batch.key_mask.all()
    return batch.tokens[:, 0].numpy() - 1


def write_archive(colours: np.ndarray, labels: np.ndarray, path: Path) -> None:
    """Pictures [60, 3072] as the release packs them: five batches of ten for training, one for test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for name, rows in zip(names, np.split(np.arange(60), 6), strict=True):
            content = pickle.dumps({b"data": colours[rows], b"labels": labels[rows].tolist()})
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    Image.sample(tmp_path / "raw")
    return tmp_path / "raw"


def test_colours_become_gray_as_in_tensorflow() -> None:
    """Values of tf.image.rgb_to_grayscale by its formula in exact arithmetic: floor(255.5 gray / 255)."""
    colours = np.array([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
    data = np.repeat(colours, 1024, axis=1).reshape(len(colours), 3072)
    gray = module.to_gray(data)
    assert gray.shape == (6, 32, 32)
    assert (gray == gray[:, :1, :1]).all()
    exact = [int((2989 * r + 5870 * g + 1140 * b) * 2555 / 25_500_000) for r, g, b in colours.tolist()]
    assert gray[:, 0, 0].tolist() == exact == [0, 255, 76, 149, 29, 18]


def test_planes_are_red_green_blue_and_rows_come_first() -> None:
    data = np.zeros((1, 3072), np.uint8)
    data[0, 1024 + 33] = 255
    assert module.to_gray(data)[0, 1, 1] == 149
    assert module.to_gray(data).sum() == 149


def test_both_forms_give_the_same_arrays_in_whatever_order_they_come(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    colours = generator.integers(0, 256, (60, 3072), dtype=np.uint8)
    labels = np.tile(np.arange(10), 6)
    write_archive(colours, labels, tmp_path / "colour" / "cifar-10-python.tar.gz")
    gray = module.to_gray(colours)
    order = np.concatenate([generator.permutation(50), 50 + generator.permutation(10)])
    for part, rows in zip((*module.TRAIN_PARTS, module.TEST_PART), np.split(order, 6), strict=True):
        module._write(module._raw(tmp_path / "gray", part), gray[rows])
    module._write(module._raw(tmp_path / "gray", module.LABELS), labels[order])
    from_colour = prepare(tmp_path / "colour", tmp_path / "a", dev_size=10)
    from_gray = prepare(tmp_path / "gray", tmp_path / "b", dev_size=10)
    assert from_colour.meta["fingerprint"] == from_gray.meta["fingerprint"]
    assert from_colour.meta["splits"] == {"train": 40, "dev": 10, "test": 10}


def test_black_is_a_token(raw: Path, tmp_path: Path) -> None:
    dataset = prepare(raw, tmp_path / "a", dev_size=10)
    values = np.concatenate([pictures(dataset, split) for split in SPLITS])
    assert values.shape == (60, 1024)
    assert values.min() == 0


def test_splits_are_balanced_and_follow_the_seed(raw: Path, tmp_path: Path) -> None:
    one, same = (prepare(raw, tmp_path / name, dev_size=20, train_size=size) for name, size in (("a", None), ("b", 10)))
    other = prepare(raw, tmp_path / "c", dev_size=20, seed=1)
    assert np.bincount(one.labels("dev")).tolist() == [2] * 10
    assert (pictures(one, "dev") == pictures(same, "dev")).all()
    assert (pictures(one, "dev") != pictures(other, "dev")).any()
    assert [dataset.meta["label"] for dataset in (one, same)] == ["CIFAR-10 gray", "CIFAR-10 gray, subset"]
    assert np.bincount(same.labels("train")).tolist() == [1] * 10


@pytest.mark.parametrize("options", [{"dev_size": 15}, {"train_size": 0}, {"max_length": 0}, {"seed": -1}])
def test_wrong_settings_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="here: "):
        build_config(Image.Config, options, "here")


def test_missing_or_damaged_raw_files_say_what_to_do(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="download the task"):
        prepare(tmp_path, tmp_path / "a")
    path = raw / "gray_train_3.npy.xz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read, remove it and download again"):
        prepare(raw, tmp_path / "a", dev_size=10)
    (tmp_path / "other").mkdir()
    with tarfile.open(tmp_path / "other" / "cifar-10-python.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="has no data_batch_1, data_batch_2"):
        prepare(tmp_path / "other", tmp_path / "a", dev_size=10)


def test_the_release_is_subject_to_the_limit(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"cifar-10-python\.tar\.gz is 170 MB, more than data\.download_limit_mb"):
        Image(Image.Config()).download(tmp_path / "raw", None, 10_000_000, None)


@needs_mirror
@pytest.mark.slow
def test_the_real_pictures_have_the_known_statistics(tmp_path: Path) -> None:
    assert MIRROR
    provenance = Image(Image.Config()).download(tmp_path / "raw", Path(MIRROR), 0, None)
    assert [file["from"] for file in provenance["files"]] == ["mirror"] * 7
    dataset = prepare(tmp_path / "raw", tmp_path / "a")
    assert dataset.meta["splits"] == {"train": 45_000, "dev": 5_000, "test": 10_000}
    assert dataset.meta["lengths"] == {"median": 1024, "p95": 1024, "max": 1024}
    train = np.concatenate([pictures(dataset, split) for split in ("train", "dev")])
    test = pictures(dataset, "test")
    assert (round(train.mean(), 3), round(train.std(), 3)) == (122.364, 61.106)
    assert (round(test.mean(), 3), round(test.std(), 3)) == (123.137, 60.989)
    both = np.concatenate([train, test])
    assert round(float((both == 0).mean()), 4) == 0.0019
    assert round(float((both == 255).mean()), 4) == 0.0082
    assert round(float((both == 0).any(axis=1).mean()), 3) == 0.116
    assert np.bincount(np.concatenate([dataset.labels("train"), dataset.labels("dev")])).tolist() == [5_000] * 10
    assert np.bincount(dataset.labels("test")).tolist() == [1_000] * 10
    assert np.bincount(dataset.labels("dev")).tolist() == [500] * 10
    seen = {row.tobytes() for row in train.astype(np.uint8)}
    assert len(seen) == 50_000
    assert not seen & {row.tobytes() for row in test.astype(np.uint8)}
