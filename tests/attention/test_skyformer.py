"""Skyformer against scikit-learn's Nyström method, and its approach to the Gaussian kernel."""

import pytest
import torch
from heads import build, normal, ragged, relative_error

from schoenbat.ops.places import places_of

approximation = pytest.importorskip(
    "sklearn.kernel_approximation", reason="scikit-learn (extra oracles) is not installed"
)


def test_it_is_scikit_learns_nystroem_with_the_same_landmarks() -> None:
    length, landmarks = 40, 12
    query, key, value = (x for x in normal(1, 1, length, 8))
    q, k = (x[0, 0].numpy() * 8**-0.25 for x in (query, key))
    attention = build("skyformer", 8, num_landmarks=landmarks, gamma=0.0, solve="cholesky")
    nystroem = approximation.Nystroem(kernel="rbf", gamma=0.5, n_components=landmarks, random_state=0)
    nystroem.fit(torch.cat([torch.from_numpy(q), torch.from_numpy(k)]).numpy())
    # Places among queries and keys together as numbers in [0, 1).
    attention.uniform = (torch.from_numpy(nystroem.component_indices_).double() + 0.5) / (2 * length)
    expected = torch.from_numpy(nystroem.transform(q) @ nystroem.transform(k).T) @ value[0, 0]
    torch.testing.assert_close(attention(query, key, value)[0, 0], expected, rtol=1e-8, atol=1e-8)


def test_it_is_its_formula_on_the_real_tokens() -> None:
    length, padded = 30, 45
    query, key, value = normal(1, 1, padded, 8)
    attention = build("skyformer", 8, num_landmarks=10)
    found = attention(query, key, value, ragged([length], padded))[0, 0, :length]
    q, k, v = (x[0, 0, :length] for x in (query * 8**-0.25, key * 8**-0.25, value))
    chosen = [int(u * 2 * length) for u in attention.uniform]
    assert sum(place < length for place in chosen) == 5
    landmarks = torch.cat([q, k])[chosen]

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.cdist(x, y).square() / 2)

    gram = kernel(landmarks, landmarks) + 0.1 * torch.eye(10)
    scale = torch.diag(gram.sum(-1) ** -0.5)
    matrix = scale @ gram @ scale
    inverse = matrix.T / matrix.sum(0).max()
    for _ in range(6):
        product = matrix @ inverse
        inner = 15 * torch.eye(10) - product @ (7 * torch.eye(10) - product)
        inverse = inverse @ (13 * torch.eye(10) - product @ inner) / 4
    expected = kernel(q, landmarks) @ scale @ inverse @ scale @ kernel(landmarks, k) @ v
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_its_error_falls_with_the_number_of_landmarks() -> None:
    # 32 queries and 32 keys; with each of the 64 as a landmark and without gamma it is the Gaussian kernel.
    query, key, value = normal(1, 1, 32, 8)
    exact = build("gaussian", 8)(query, key, value)

    def error(number: int) -> float:
        total = 0.0
        for seed in range(5):
            attention = build("skyformer", 8, num_landmarks=number, gamma=0.0, solve="cholesky")
            order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
            attention.uniform = (order[:number].double() + 0.5) / 64
            total += relative_error(attention(query, key, value), exact) / 5
        return total

    errors = [error(number) for number in (8, 32, 48, 64)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-10


def test_half_of_the_landmarks_are_queries() -> None:
    attention = build("skyformer", 8, num_landmarks=20)
    real = torch.ones(1, 14, dtype=torch.bool)
    assert int((places_of(attention.uniform, real) < 7).sum()) == 10
