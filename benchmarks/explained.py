"""How much of softmax attention do linear attentions of equal size explain? One draw each, on one CPU thread.

The exact output is softmax(s <q_i, k_j>) v_j on random unit vectors q and k and normal v, so that the argument is
s cos(q, k). What is printed is

    |output of the method - exact output| / |uniform attention - exact output|      (Frobenius norms, all tokens)

which is 0 for the exact output and 1 for a method that knows nothing of the attention: answering the mean of v gives 1.
The plain relative error hides this, as the exact output is itself close to that mean where s is small.

Methods that divide by sqrt(d) themselves get q and k that are longer by as much; so does elu + 1, which is put in the
place of softmax(<q, k> / sqrt(d)). Packages that are not installed are listed as such; the extra `rivals` has them all.

    python benchmarks/explained.py --csv explained.csv
"""

import argparse
import csv
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.files import write_bytes
from schoenbat.functional import dot_product_kernel_attention
from schoenbat.kernels import KERNELS

Attend = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""query, key [1, 1, N, d], value [1, 1, N, d], s, number of features: to [1, 1, N, d]. Draws from the global source."""


def default(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    return dot_product_kernel_attention(query, key, value, scale=scale, num_features=num_features, seed=_seed())


def published_maclaurin(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    """Random Maclaurin features of degree up to 20 (arXiv 2505.12252) and the plain quotient."""
    features = RandomMaclaurin(
        KERNELS.get("exp")(),
        head_dim=query.shape[-1],
        num_features=num_features,
        max_degree=20,
        generator=torch.Generator().manual_seed(_seed()),
    )
    return _quotient(features(query * scale**0.5), features(key * scale**0.5), value)


def elu(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    """elu(x) + 1, with as many features as coordinates (Katharopoulos et al. 2020, arXiv 2006.16236)."""
    query, key = _for_root_of_dim(query, key, scale)
    return _quotient(F.elu(query) + 1, F.elu(key) + 1, value)


def performer(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    """FAVOR+ with orthogonal features (Choromanski et al. 2021, arXiv 2009.14794)."""
    from performer_pytorch import FastAttention

    attention = FastAttention(dim_heads=query.shape[-1], nb_features=num_features)
    return attention(*_for_root_of_dim(query, key, scale), value)


def darkformer(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    """Positive features whose distribution is calibrated on these queries and keys."""
    from darkformer_pytorch import DarkformerKernelAttention

    attention = DarkformerKernelAttention(query.shape[-1], num_heads=1, num_features=num_features).eval()
    query, key = _for_root_of_dim(query, key, scale)
    return attention.initialize_variance_optimal_proposal_(query, key)(query, key, value)


def simplex(query: Tensor, key: Tensor, value: Tensor, scale: float, num_features: int) -> Tensor:
    """Simplex random features (Reid et al. 2023, arXiv 2301.13856) as the package draws them.

    Its `Attention` module takes as many features as coordinates only, so its two parts are called themselves.
    """
    from srf_attention import simplex_random_matrix, softmax_kernel_bhld

    projection = simplex_random_matrix(nb_rows=num_features, nb_columns=query.shape[-1])
    query, key = _for_root_of_dim(query, key, scale)
    query_features = softmax_kernel_bhld(query, projection, is_query=True)
    key_features, _ = softmax_kernel_bhld(key, projection, is_query=False)
    return _quotient(query_features, key_features, value)


@dataclass(frozen=True)
class Method:
    name: str
    package: str
    attend: Attend
    takes_num_features: bool = True


METHODS = (
    Method("schoenbat, default", "schoenbat", default),
    Method("Maclaurin as published", "schoenbat", published_maclaurin),
    Method("Performer", "performer-pytorch", performer),
    Method("DARKFormer, calibrated", "darkformer-pytorch", darkformer),
    Method("simplex features", "srf-attention", simplex),
    Method("elu + 1", "torch", elu, takes_num_features=False),
)


def unexplained(
    method: Method, *, scale: float, num_features: int, tokens: int, head_dim: int, seed: int
) -> float | None:
    """Return the figure above; None where the package is not installed. Seed and sizes alone decide the vectors."""
    if _version(method.package) is None:
        return None
    source = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, tokens, head_dim, generator=source) for _ in range(3))
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    exact = torch.softmax(scale * (query.double() @ key.double().mT), -1) @ value.double()
    torch.manual_seed(seed)
    with torch.no_grad(), warnings.catch_warnings():
        # Old packages warn of what torch and Python have deprecated since.
        warnings.simplefilter("ignore")
        output = method.attend(query, key, value, scale, num_features)
    uniform = value.double().mean(-2, keepdim=True)
    return ((output - exact).norm() / (uniform - exact).norm()).item()


def _quotient(query_features: Tensor, key_features: Tensor, value: Tensor) -> Tensor:
    numerator = query_features @ (key_features.mT @ value)
    return numerator / (query_features @ key_features.sum(-2)[..., None])


def _for_root_of_dim(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k for which softmax(<q, k> / sqrt(d)) is that of s cos."""
    root = math.sqrt(scale * query.shape[-1] ** 0.5)
    return query * root, key * root


def _seed() -> int:
    """Draw a seed from the global source, which `unexplained` has set."""
    return int(torch.randint(2**31, ()).item())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[0.177, 1.0, 2.83], help="s, one or more")
    parser.add_argument("--num-features", type=int, nargs="+", default=[128, 561], help="one or more")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--head-dim", type=int, default=32, help="a power of 2, for the simplex features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write the figures there, one a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    sizes = {"tokens": arguments.tokens, "head_dim": arguments.head_dim, "seed": arguments.seed}
    rows: list[list[object]] = []
    table = []
    for method in METHODS:
        installed = _version(method.package)
        for num_features in arguments.num_features if method.takes_num_features else [arguments.head_dim]:
            figures = [unexplained(method, scale=s, num_features=num_features, **sizes) for s in arguments.scales]
            shown = ["not installed" if figure is None else f"{figure:.3g}" for figure in figures]
            table.append([method.name, f"{method.package} {installed or ''}", num_features, *shown])
            settings = [method.name, method.package, installed or "not installed", num_features]
            rows += [[*settings, s, *sizes.values(), x] for s, x in zip(arguments.scales, figures, strict=True)]
    print("Output error over the distance of the exact output from uniform attention; softmax of s cos, unit vectors,")
    print(f"{arguments.tokens} tokens, d = {arguments.head_dim}, seed {arguments.seed}, one draw\n")
    headers = ["method", "package", "features", *(f"s = {scale:g}" for scale in arguments.scales)]
    alignment = ["left", "left", *["right"] * (len(headers) - 2)]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True, colalign=alignment))
    if arguments.csv:
        text = io.StringIO(newline="")
        columns = ["method", "package", "version", "num_features", "scale", *sizes, "error_over_uniform"]
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        write_bytes(arguments.csv, text.getvalue().encode())


if __name__ == "__main__":
    main()
