"""What do the matrix products of causal attention through features take by themselves, against torch's exact attention?

Causal attention in chunks of C tokens needs, forward: the projections of queries and keys; what a chunk adds to the
running sums, phi(K)^T [V, 1]; what a query looks up in them, phi(Q) S; and inside the chunk Q K^T and its product with
[V, 1]. These products are timed here, forward and backward, on features that are given, with nothing between them: no
products of coordinates, no exponentials, no masks, no running sums, no bounds. That is the least that any
implementation takes which uses the same matrix products, so torch's time over theirs bounds the speed-up.

    python benchmarks/causal_products.py

One process, float32, batch 1, 2 heads of 32, medians over rounds in which all are timed in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from schoenbat import dot_product_kernel_attention
from schoenbat.estimate import Estimate

HEADS, HEAD_DIM = 2, 32
CHUNKS = (64, 128, 256)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Time torch's exact attention, the reference."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def products(length: int, features: int, columns: int, chunk: int, generator: torch.Generator) -> Callable[[], None]:
    """Time the products alone, forward and backward, on random numbers of the right shapes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    chunks = -(-length // chunk)
    query, key = draw(HEADS, chunks, chunk, HEAD_DIM), draw(HEADS, chunks, chunk, HEAD_DIM)
    phi_query, phi_key = draw(HEADS, chunks, chunk, features), draw(HEADS, chunks, chunk, features)
    extended, sums = draw(HEADS, chunks, chunk, HEAD_DIM + 1), draw(HEADS, chunks, features, HEAD_DIM + 1)
    weights = draw(HEADS, chunks, chunk, chunk)
    projection = torch.randn(HEAD_DIM, columns, generator=generator)
    pairs = [(query, projection), (key, projection), (phi_key.mT, extended), (phi_query, sums)]
    pairs += [(query, key.mT), (weights, extended)]
    gradients = [torch.ones_like(a.detach() @ b.detach()) for a, b in pairs]

    def run() -> None:
        torch.autograd.backward([a @ b for a, b in pairs], gradients)
        for leaf in (query, key, phi_query, phi_key, extended, sums, weights):
            leaf.grad = None

    return run


def trained(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, generator: torch.Generator
) -> Callable[[], None]:
    """Time an attention, forward and backward, on queries and keys of unit length."""
    shape = (1, HEADS, length, HEAD_DIM)
    query, key = (F.normalize(torch.randn(shape, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    value = torch.randn(shape, generator=generator).requires_grad_()

    def run() -> None:
        attend(query, key, value).sum().backward()
        for leaf in (query, key, value):
            leaf.grad = None

    return run


def median_times(programs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds a call, in the median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, run in programs.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--num-features", type=int, nargs="+", default=[128, 561])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in options.lengths:
        for count in options.num_features:
            columns = Estimate("exp", num_features=count).draw(HEAD_DIM).projection(torch.float32).shape[1]

            def estimated(query: Tensor, key: Tensor, value: Tensor, count: int = count) -> Tensor:
                return dot_product_kernel_attention(query, key, value, kernel="exp", num_features=count, is_causal=True)

            programs = {"exact": trained(exact, length, generator), "ours": trained(estimated, length, generator)}
            programs |= {f"products, C = {c}": products(length, count, columns, c, generator) for c in CHUNKS}
            found = median_times(programs, options.rounds)
            rows += [
                (length, count, name, f"{1e3 * seconds:.1f}", f"{found['exact'] / seconds:.2f}")
                for name, seconds in found.items()
            ]
    print(tabulate(rows, headers=("tokens", "features", "what", "ms", "exact / it")))


if __name__ == "__main__":
    main()
