"""Memorisation: values that no sequence tells, to be learned by heart (Poli et al. 2024, MAD)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schoenbat.lra.tasks._recall import RecallConfig, RecallTask, no_labels


class Memorisation(RecallTask):
    """Keys, each followed by a mark: at the mark, what is the value of the key?

    With keys 0-4 and the mark (5, shown as ?), and a map in which key 3 has value 1 and key 0 value 6:

        column   0  1  2  3  4  5
        symbol   3  ?  0  ?  3  ?
        token    4  6  1  6  4  6
        label    .  1  .  6  .  1

    In the manner of MAD (arXiv 2403.17844, memorization): one map from keys to values, drawn from the seed, holds for
    all sequences and is never shown. What it takes is weights, and of attention only to look one position back: the
    control among the recall tasks.
    """

    name = "recall-memorisation"

    @dataclass(frozen=True, kw_only=True)
    class Config(RecallConfig):
        """How much is to be learned by heart.

        Attributes:
            num_keys: pairs in all.
            num_values: that a key may have.
        """

        max_length: int = 32
        num_keys: int = 256
        num_values: int = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            if min(self.num_keys, self.num_values) < 2:
                raise ValueError(
                    f"num_keys and num_values must be at least 2, not {self.num_keys} and {self.num_values}"
                )
            if self.max_length < 2:
                raise ValueError(f"max_length must be at least 2, a key and a mark, not {self.max_length}")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_classes = config.num_values
        self.vocab_size = config.num_keys + 2
        # A stream of its own, so that the map does not change with the sizes of the splits.
        self.values = np.random.default_rng([config.seed, 3]).integers(0, config.num_values, config.num_keys)

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Return a tiny configuration for tests."""
        return cls.Config(max_length=8, num_keys=12, num_values=5, train_size=60, dev_size=20, test_size=20)

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        symbols = generator.integers(0, config.num_keys, (count, config.max_length))
        labels = no_labels(symbols.shape)
        labels[:, 1::2] = self.values[symbols[:, 0:-1:2]]
        symbols[:, 1::2] = config.num_keys
        return symbols, labels

    def describe(self) -> str:
        config = self.config
        return f"{config.num_keys} keys with {config.num_values} values in {config.max_length} positions"
