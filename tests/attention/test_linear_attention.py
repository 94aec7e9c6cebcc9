"""Linear attention through elu + 1, against its quadratic form in NumPy."""

import numpy as np
import pytest
import torch
from heads import build, normal, ragged


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_the_quadratic_form(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 150, 6)
    lengths = (150, 70)
    found = build("linear", 6)(query, key, value, ragged(list(lengths), 150), is_causal)
    for example, length in enumerate(lengths):
        for head in range(2):
            q, k, v = (x[example, head, :length].numpy() for x in (query, key, value))
            q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
            weights = np.tril(q @ k.T) if is_causal else q @ k.T
            expected = weights / weights.sum(-1, keepdims=True) @ v
            torch.testing.assert_close(
                found[example, head, :length], torch.from_numpy(expected), rtol=1e-10, atol=1e-10
            )
