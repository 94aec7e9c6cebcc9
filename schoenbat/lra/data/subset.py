"""Draw a smaller split that has as many examples of each label."""

import numpy as np

from schoenbat.errors import UserError


def check_size(name: str, size: int | None, num_classes: int = 2) -> None:
    """Refuse a split size that the labels cannot share alike; None (everything) passes.

    Raises:
        ValueError: the size is no positive multiple of `num_classes`.
    """
    if size is not None and (size < 1 or size % num_classes):
        raise ValueError(f"{name} must be a positive multiple of {num_classes} (as many of each label), not {size}")


def balanced_rows(
    labels: np.ndarray, size: int, generator: np.random.Generator, what: str, num_classes: int = 2
) -> np.ndarray:
    """Return the rows of `size` examples, as many of each label; label after label, else in their order.

    Args:
        labels: ints [n], each in 0..num_classes - 1.
        what: what is being drawn, for the error.

    Raises:
        UserError: too few examples of a label.
    """
    rows = []
    share = size // num_classes
    for label in range(num_classes):
        (candidates,) = np.nonzero(labels == label)
        if len(candidates) < share:
            raise UserError(
                f"{what} {size} needs {share} examples of each label, but label {label} has {len(candidates)}"
            )
        rows.append(np.sort(generator.permutation(candidates)[:share]))
    return np.concatenate(rows)
