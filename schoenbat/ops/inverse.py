"""The inverse of matrices by a fixed number of products."""

import torch
from torch import Tensor


def iterated_inverse(matrix: Tensor, steps: int = 6) -> Tensor:
    """Repeat Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4, for A [..., m, m] without negative entries.

    Source: Razavi et al. 2014, as in arXiv 2102.03902. It starts at A^T over the largest column sum, of each matrix
    alone: a maximum over the batch would couple examples. For a matrix of rows that sum to at most one this start
    converges; after six steps nearly singular matrices are far from inverted, and mechanisms that use it rely on that.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = matrix.mT / matrix.sum(-2).amax(-1)[..., None, None]
    for _ in range(steps):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = inverse @ (13 * identity - product @ inner) / 4
    return inverse
