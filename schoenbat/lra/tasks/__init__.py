"""Tasks: one file per task, found by its exact name. `lra-` is the Long Range Arena, `recall-` needs attention.

A task knows where its data comes from (or how to generate it), how an example becomes tokens, the shape of the
problem, and what can be scored without a model. Token 0 is padding everywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from schoenbat.errors import UserError
from schoenbat.registry import Registry

if TYPE_CHECKING:
    # It imports torch, and names of tasks are listed without.
    from schoenbat.lra.data.arrays import Dataset

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while something is fetched."""


MAX_LENGTH = 2**20
"""The most tokens of a text."""


class Task(ABC):
    """One classification problem: over a text, over a pair of texts, or at positions of a text.

    A subclass nests a frozen dataclass `Config`, which is the section `task.NAME.data` of params.yaml. Its options
    include `max_length`, at which texts are cut.

    Attributes:
        num_classes, vocab_size: of labels and tokens; where they depend on the options, set by `__init__`, and where
            they depend on the data, by `prepare`.
        num_texts: 1 or 2 texts make an example; may be set by `__init__`.
        class_names: of the labels by their numbers; empty where they are the numbers, or where the data has them.
        per_position: labels belong to positions of a text and not to the whole.
        causal: a position may attend to itself and earlier ones only.
        pad_to_multiple: batches are padded to a multiple of this length.
    """

    Config: ClassVar[type]
    num_classes: int
    vocab_size: int
    num_texts: int = 1
    class_names: ClassVar[tuple[str, ...]] = ()
    per_position: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    pad_to_multiple: ClassVar[int] = 64
    how_to_get: ClassVar[str] = ""
    """One line: what to do when the data cannot be had. Empty for a task that generates its data."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def download(
        self, folder: Path, mirror: Path | None, limit_bytes: int | None, on_progress: Progress | None
    ) -> dict[str, Any]:
        """Put the verified raw files into `folder` and return where each came from.

        Raises:
            DataUnavailable: no source could be reached, or the only one is larger than `limit_bytes`.
        """

    @abstractmethod
    def prepare(self, raw: Path, out: Path) -> dict[str, Any]:
        """Encode the raw files into arrays in `out` and return their description (`meta.json`)."""

    @classmethod
    def encode(cls, text: str, meta: Mapping[str, Any]) -> np.ndarray:
        """Encode a text that is in no split, whole, as `prepare` would.

        Args:
            text: what a user types.
            meta: what `prepare` returned.

        Raises:
            UserError: the text is none of this task's, or its examples are no texts.
        """
        raise UserError("examples of this task are no texts")

    def baselines(self, dataset: "Dataset") -> dict[str, float]:
        """Return the test accuracy of rules that need no model, by the name of the rule.

        Args:
            dataset: what `prepare` wrote.
        """
        # Labels are not negative, except where a position has none.
        train, test = (labels[labels >= 0] for labels in (dataset.labels("train"), dataset.labels("test")))
        commonest = np.bincount(train, minlength=dataset.meta["num_classes"]).argmax()
        return {"majority class": float((test == commonest).mean())}

    @classmethod
    @abstractmethod
    def sample(cls, raw: Path) -> Any:
        """Write tiny raw files into `raw` and return a tiny `Config` that goes with them, for tests without data."""


def byte_tokens(content: bytes) -> np.ndarray:
    """Add 1 to each byte, so that 0 stays free for padding; uint16."""
    return np.frombuffer(content, np.uint8).astype(np.uint16) + 1


TASKS: Registry[Task] = Registry(
    "task",
    "schoenbat.lra.tasks",
    Task,  # type: ignore[type-abstract]
    has_variants=True,
    group="schoenbat.tasks",
)
