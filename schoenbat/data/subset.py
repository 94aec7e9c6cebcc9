"""Draw a smaller split that has as many examples of each label."""

import numpy as np

from schoenbat.errors import UserError


def check_size(name: str, size: int | None) -> None:
    """Refuse a split size that two labels cannot share; None (everything) passes.

    Raises:
        ValueError: the size is odd or below 2.
    """
    if size is not None and (size < 2 or size % 2):
        raise ValueError(f"{name} must be even and at least 2 (half of each label), not {size}")


def balanced_rows(labels: np.ndarray, size: int, generator: np.random.Generator, what: str) -> np.ndarray:
    """The rows of `size` examples, half with label 0 and half with label 1; label 0 first, else in their order.

    Args:
        labels: ints [n], each 0 or 1.
        what: what is being drawn, for the error.

    Raises:
        UserError: too few examples of a label.
    """
    rows = []
    for label in (0, 1):
        (candidates,) = np.nonzero(labels == label)
        if len(candidates) < size // 2:
            raise UserError(
                f"{what} {size} needs {size // 2} examples of each label, but label {label} has {len(candidates)}"
            )
        rows.append(np.sort(generator.permutation(candidates)[: size // 2]))
    return np.concatenate(rows)
