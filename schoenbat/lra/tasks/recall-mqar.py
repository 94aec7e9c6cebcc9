"""Multi-query associative recall: several keys of one sequence are asked for again (Arora et al. 2023, Zoology)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.tasks._recall import RecallConfig, RecallTask, draw_distinct, no_labels

EXPONENT = 0.01
"""The i-th place for a query, counted from the pairs, is drawn in proportion to i^(EXPONENT - 1): mostly near them."""


class Mqar(RecallTask):
    """Keys and their values, then the keys again among random symbols: which value belongs to each?

    With 4 symbols as keys (0-3) and 4 as values (4-7), 2 pairs and 10 positions, one line each for the column, the
    symbol, the token and the label:

        column   0  1  2  3  4  5  6  7  8  9
        symbol   2  5  0  7  0  6  1  4  2  3
        token    3  6  1  8  1  7  2  5  3  4
        label    .  .  .  .  7  .  .  .  5  .

    The rule is that of Zoology (arXiv 2312.04927, `multiquery_ar`): the first half of the symbols are keys and the
    second half values; `num_pairs` of each, all different, stand at the beginning. Behind them every second position is
    a place for a query; each key gets a place of its own, drawn by a power law, and the label there is its value. All
    other positions behind the pairs hold random symbols, keys and values alike, which ask for nothing.

    A model that knows which values occur and no more is right once in `num_pairs` times.
    """

    name = "recall-mqar"

    @dataclass(frozen=True, kw_only=True)
    class Config(RecallConfig):
        """How much a sequence holds.

        Attributes:
            num_pairs: of key and value in a sequence, each asked for once.
            num_symbols: even: keys and values, half each.
        """

        max_length: int = 32
        num_pairs: int = 4
        num_symbols: int = 64

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.num_pairs < 1 or self.max_length < 4 * self.num_pairs:
                raise ValueError(
                    f"num_pairs must lie in 1..max_length / 4 = {self.max_length // 4}, not {self.num_pairs}: "
                    "a pair takes two positions and its query two more"
                )
            if self.num_symbols % 2 or self.num_symbols < 2 * self.num_pairs:
                raise ValueError(
                    f"num_symbols must be even and at least {2 * self.num_pairs} for num_pairs {self.num_pairs}, "
                    f"not {self.num_symbols}"
                )

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_classes = config.num_symbols
        self.vocab_size = config.num_symbols + 1

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Return a tiny configuration for tests."""
        return cls.Config(max_length=12, num_pairs=2, num_symbols=12, train_size=60, dev_size=20, test_size=20)

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        length, pairs, half = self.config.max_length, self.config.num_pairs, self.config.num_symbols // 2
        keys = draw_distinct(generator, count, half, pairs)
        values = draw_distinct(generator, count, half, pairs) + half
        symbols = generator.integers(0, 2 * half, (count, length))
        symbols[:, 0 : 2 * pairs : 2], symbols[:, 1 : 2 * pairs : 2] = keys, values
        places = (length - 2 * pairs) // 2
        weight = np.arange(1, places + 1) ** (EXPONENT - 1)
        # The first of exponential waiting times with these rates is a draw without replacement with these weights.
        drawn = (generator.standard_exponential((count, places)) / weight).argsort(axis=1)[:, :pairs]
        positions = 2 * pairs + 2 * drawn
        rows = np.arange(count)[:, None]
        symbols[rows, positions] = keys
        labels = no_labels(symbols.shape)
        labels[rows, positions] = values
        return symbols, labels

    def describe(self) -> str:
        config = self.config
        return f"{config.num_pairs} pairs of {config.num_symbols} symbols in {config.max_length} positions"

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Score the commonest value, and any of the values that occur among the pairs."""
        return super().baselines(dataset) | {"one of the values present": 1 / self.config.num_pairs}
