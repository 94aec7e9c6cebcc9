"""What a basis that fits the data is worth: the share of softmax attention explained, before and after `calibrate`.

    python benchmarks/calibration.py

The published features stand beside them, as the sketch is made for isotropic vectors. Queries and keys are made up,
four sequences of 512 tokens to make the basis from, and four others to judge it. Queries see all keys. The vectors:

- isotropic: unit vectors of independent directions, the case in which there is nothing to fit;
- 8 clusters: unit vectors around eight directions, with a mean cosine of 0.6 within a cluster;
- 8 tight clusters: the same with 0.9;
- decaying: the i-th of d orthogonal directions has the size 1 / i.

The argument of exp is s cos(q, k) for unit vectors, and has the standard deviation s for others. One draw of each.
"""

import argparse
import math

import torch
from tabulate import tabulate
from torch import Tensor

from schoenbat import Estimate, calibrate_tensors
from schoenbat.kernels import KERNELS
from schoenbat.ops.exact import exact_attention

MEAN_COSINE = {"8 clusters": 0.6, "8 tight clusters": 0.9}
KINDS = ("isotropic", *MEAN_COSINE, "decaying")
TOKENS, SEQUENCES, CLUSTERS = 512, 4, 8


def vectors(kind: str, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [SEQUENCES, 1, TOKENS, head_dim]; what they have in common does not depend on the seed."""
    generator, common = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000)
    query, key, value = torch.randn(3, SEQUENCES, 1, TOKENS, head_dim, generator=generator).unbind()
    if kind == "decaying":
        directions = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=common)).Q
        size = 1 / torch.arange(1, head_dim + 1)
        turned = size / size.square().square().sum() ** 0.25 * directions.T
        return query @ turned.T, key @ turned.T, value
    query, key = _unit(query), _unit(key)
    if kind in MEAN_COSINE:
        cosine = MEAN_COSINE[kind]
        centres = _unit(torch.randn(CLUSTERS, head_dim, generator=common))
        chosen = torch.randint(0, CLUSTERS, (2, SEQUENCES, 1, TOKENS), generator=generator)
        query, key = (
            _unit(math.sqrt(cosine) * centres[which] + math.sqrt(1 - cosine) * x)
            for which, x in zip(chosen, (query, key), strict=True)
        )
    return query, key, value


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def share(found: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float) -> float:
    root = math.sqrt(scale)
    truth = exact_attention(query * root, key * root, value, KERNELS.get("exp")(), None, False)
    error, distance = found - truth, value.mean(2, keepdim=True) - truth
    return float(1 - error.square().sum() / distance.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.83])
    parser.add_argument("--num-features", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.kinds:
        for head_dim in arguments.head_dims:
            for scale in arguments.scales:
                for num_features in arguments.num_features:
                    estimate = Estimate(num_features=num_features)
                    seen, new = (vectors(kind, head_dim, 2 * arguments.seed + i) for i in range(2))
                    fitted = calibrate_tensors(*seen, scale=scale, self_attention=True, estimate=estimate)
                    published = Estimate(num_features=num_features, estimator="maclaurin")
                    shares = [
                        share(attend(*new, scale=scale, self_attention=True), *new, scale)
                        for attend in (published.attend, estimate.attend, fitted)
                    ]
                    rows.append((kind, head_dim, scale, num_features, *shares, fitted.max_degree or "as it was"))
    headers = ("vectors", "head_dim", "s", "features", "published", "before", "calibrated", "degree")
    print(f"share of softmax attention explained on new vectors, seed {arguments.seed}, torch {torch.__version__}")
    print(tabulate(rows, headers, floatfmt=("", "", "g", "", ".3f", ".3f", ".3f", ""), disable_numparse=[7]))


if __name__ == "__main__":
    main()
