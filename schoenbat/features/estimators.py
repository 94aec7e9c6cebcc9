"""The estimates that the pieces in place of torch's and transformers' attention offer, by name.

- `sketch`: the features of least expected error (`schoenbat.features.sketch`). Of exp, not causal, keys are centred
  first (`schoenbat.ops.blockwise.centre_keys`).
- `maclaurin`: random Maclaurin features as published (`schoenbat.features.maclaurin`), on keys as they are.

Vectors have any length there, so the sketch weights every degree by its Maclaurin term. On unit vectors its error is
within a factor of 1.5, up or down, of that of weights for a fixed length, which would be wrong for others. The scale
that the allocation is made for has no influence up to 4,096 features: what comes next is the lowest degree left.

Measured at 32 and 64 coordinates and 64 to 512 features, on unit vectors and on those two and three times as long, with
independent, shared and clustered directions, and on the queries and keys of random BERT and GPT-2 models, `maclaurin`
had from 2 to 100 times the error of `sketch`.
"""

import torch
from torch import nn

from schoenbat.errors import unknown_name
from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import Kernel

ESTIMATORS = ("sketch", "maclaurin")


def check_estimator(estimator: str) -> None:
    """Raise UserError for a name that is not in ESTIMATORS."""
    if estimator not in ESTIMATORS:
        raise unknown_name("estimator", estimator, list(ESTIMATORS))


def make_features(
    estimator: str,
    kernel: Kernel,
    *,
    head_dim: int,
    num_features: int,
    max_degree: int,
    generator: torch.Generator,
) -> nn.Module:
    """phi: [..., N, head_dim] to [..., N, num_features] for vectors of any length; raises UserError."""
    check_estimator(estimator)
    if estimator == "maclaurin":
        return RandomMaclaurin(
            kernel, head_dim=head_dim, num_features=num_features, max_degree=max_degree, generator=generator
        )
    return Sketch(
        kernel,
        head_dim=head_dim,
        num_features=num_features,
        max_degree=max_degree,
        scale=min(1.0, kernel.radius / 2),
        fixed_norm=False,
        generator=generator,
    )


def centres_keys(estimator: str, kernel: Kernel) -> bool:
    """Whether keys are centred for this estimate where attention is not causal."""
    return estimator == "sketch" and kernel.is_exponential
