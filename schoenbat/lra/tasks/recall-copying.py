"""Selective copying: what was said between blanks, again and in order (Gu & Dao 2023; Poli et al. 2024, MAD)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from schoenbat.lra.data.arrays import IGNORED, Dataset
from schoenbat.lra.tasks._recall import RecallConfig, RecallTask, draw_positions, no_labels


class Copying(RecallTask):
    """Symbols among blanks, then a mark for each of them: at the marks, which symbols were these?

    With symbols 0-3, blank (4, shown as -), mark (5, shown as ?), 3 symbols to copy and 9 positions:

        column   0  1  2  3  4  5  6  7  8
        symbol   -  2  -  -  0  2  ?  ?  ?
        token    5  3  5  5  1  3  6  6  6
        label    .  .  .  .  .  .  2  0  2

    In the manner of MAD (arXiv 2403.17844, selective copying): the symbols are drawn with replacement, and their
    positions from all but the last `num_copied`.
    """

    name = "recall-copying"

    @dataclass(frozen=True, kw_only=True)
    class Config(RecallConfig):
        """What is said between how many blanks.

        Attributes:
            num_copied: symbols of a sequence that are to be said again.
            num_symbols: that there are.
        """

        max_length: int = 64
        num_copied: int = 8
        num_symbols: int = 16

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.num_copied < 1 or self.max_length < 2 * self.num_copied:
                raise ValueError(
                    f"num_copied must lie in 1..max_length / 2 = {self.max_length // 2}, not {self.num_copied}"
                )
            if self.num_symbols < 2:
                raise ValueError(f"num_symbols must be at least 2, not {self.num_symbols}")

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_classes = config.num_symbols
        self.vocab_size = config.num_symbols + 3

    @classmethod
    def sample(cls, raw: Path) -> Config:
        """Return a tiny configuration for tests."""
        return cls.Config(max_length=12, num_copied=3, num_symbols=6, train_size=60, dev_size=20, test_size=20)

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        blank, mark = config.num_symbols, config.num_symbols + 1
        symbols = np.full((count, config.max_length), blank)
        symbols[:, -config.num_copied :] = mark
        copied = generator.integers(0, config.num_symbols, (count, config.num_copied))
        positions = draw_positions(generator, count, config.max_length - config.num_copied, config.num_copied)
        symbols[np.arange(count)[:, None], positions] = copied
        labels = no_labels(symbols.shape)
        labels[:, -config.num_copied :] = copied
        return symbols, labels

    def describe(self) -> str:
        config = self.config
        return f"{config.num_copied} of {config.num_symbols} symbols in {config.max_length} positions"

    def baselines(self, dataset: Dataset) -> dict[str, float]:
        """Score the commonest symbol, and any of the symbols to be copied, drawn as often as they occur there."""
        labels = dataset.labels("test")
        copied = labels[labels != IGNORED].reshape(len(labels), -1)
        present = (copied[:, :, None] == copied[:, None, :]).mean()
        return super().baselines(dataset) | {"one of the symbols present": float(present)}
