"""Tasks of the Long Range Arena: one file per task, found by its exact name.

A task knows where its data comes from (or how to generate it), how an example becomes tokens, and the shape of the
problem. Token 0 is padding everywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from schoenbat.registry import Registry

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while something is fetched."""


MAX_LENGTH = 2**20
"""The most tokens of a text."""


class Task(ABC):
    """One classification problem over one text, or over a pair of texts.

    A subclass nests a frozen dataclass `Config`, which is the section `task.NAME.data` of params.yaml.
    """

    Config: ClassVar[type]
    num_classes: ClassVar[int]
    vocab_size: ClassVar[int]
    num_texts: ClassVar[int] = 1
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
    @abstractmethod
    def sample(cls, raw: Path) -> Any:
        """Write tiny raw files into `raw` and return a tiny `Config` that goes with them, for tests without data."""


TASKS: Registry[Task] = Registry("task", "schoenbat.tasks", Task)  # type: ignore[type-abstract]
