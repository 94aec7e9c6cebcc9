"""Noisy recall: pairs of key and value in any order with noise between them (Poli et al. 2024, MAD)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schoenbat.lra.data.arrays import IGNORED, Dataset
from schoenbat.lra.tasks._recall import RecallConfig, RecallTask, no_labels


class Noisy(RecallTask):
    """Each sequence has a map of its own from keys to values; where a key comes again, what is its value?

    With keys 0-2, values 3-5 and noise 6-7, one line each for the column, the symbol, the token and the label:

        column   0  1  2  3  4  5  6  7  8
        symbol   1  4  7  0  3  1  4  6  6
        token    2  5  8  1  4  2  5  7  7
        label    .  .  .  .  .  4  .  .  .

    In the manner of MAD (arXiv 2403.17844, noisy in-context recall): a sequence is made of steps, each a pair with a
    random key or, with probability `noise`, one symbol of noise. The label is at the key, and only where it has come
    before. What does not fit at the end is noise, and a sequence in which no key comes again is drawn again.
    """

    name = "recall-noisy"

    @dataclass(frozen=True, kw_only=True)
    class Config(RecallConfig):
        """How many symbols there are, and how much noise.

        Attributes:
            num_keys: keys.
            num_values: values.
            num_noise: symbols of noise.
            noise: the share of steps that are noise.
        """

        max_length: int = 64
        num_keys: int = 8
        num_values: int = 16
        num_noise: int = 16
        noise: float = 0.2

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("num_keys", "num_values", "num_noise"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
            if not 0 <= self.noise < 1:
                raise ValueError(f"noise must lie in [0, 1), not {self.noise:g}")
            if self.max_length < 4:
                raise ValueError(f"max_length must be at least 4, two pairs, not {self.max_length}")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_classes = config.num_values
        self.vocab_size = config.num_keys + config.num_values + config.num_noise + 1

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Return a tiny configuration for tests."""
        return cls.Config(
            max_length=16, num_keys=3, num_values=4, num_noise=2, train_size=60, dev_size=40, test_size=40
        )

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        length = config.max_length
        first_noise = config.num_keys + config.num_values
        maps = generator.integers(0, config.num_values, (count, config.num_keys))
        is_noise = generator.random((count, length)) < config.noise
        keys = generator.integers(0, config.num_keys, (count, length))
        symbols = generator.integers(first_noise, first_noise + config.num_noise, (count, length))
        labels = no_labels(symbols.shape)
        for row in range(count):
            known: set[int] = set()
            column = 0
            for step_is_noise, key in zip(is_noise[row], keys[row], strict=True):
                if column > length - 2:
                    break
                if not step_is_noise:
                    value = maps[row, key]
                    symbols[row, column : column + 2] = key, config.num_keys + value
                    if key in known:
                        labels[row, column] = value
                    known.add(key)
                column += 1 if step_is_noise else 2
        asking = (labels != IGNORED).any(axis=1)
        return symbols[asking], labels[asking]

    def describe(self) -> str:
        config = self.config
        return f"{config.num_keys} keys, noise {config.noise:g}, {config.max_length} positions"

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Score the commonest value, and any of the values seen so far, drawn as often as they occur."""
        config = self.config
        labels = dataset.labels("test")
        tokens = dataset.batch("test", np.arange(len(labels))).tokens[:, 0].numpy()
        values = tokens - 1 - config.num_keys
        is_value = (values >= 0) & (values < config.num_values)
        shares = []
        for row, column in zip(*np.nonzero(labels != IGNORED), strict=True):
            seen = values[row, :column][is_value[row, :column]]
            shares.append((seen == labels[row, column]).mean())
        return super().baselines(dataset) | {"one of the values present": float(np.mean(shares))}
