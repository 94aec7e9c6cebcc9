"""What causal attention costs: not a test, a measurement.

    python tests/ops/causal_times.py [--tokens 16384] [--rounds 7]

Forward and backward, causal and not, and `step` after 100 and after 100,000 tokens; in turns, as the benchmark does it.
Medians, with the middle half of the values in brackets. Shapes: batch 1, 2 heads, head_dim 32, 128 features, 2 threads.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from pipeline.stages import bench
from schoenbat import Estimate
from schoenbat.functional import dot_product_kernel_attention
from schoenbat.ops.linear import extend

HEADS, HEAD_DIM, NUM_FEATURES = 2, 32, 128


def show(tasks: dict[str, Callable[[], object]], repeats: int) -> None:
    samples = bench._interleaved(tasks, repeats)
    for name, milliseconds in samples.items():
        low, middle, high = statistics.quantiles(milliseconds, n=4)
        print(f"{name:42} {middle:9.3f} ms [{low:.3f}, {high:.3f}]")
    first, second = (statistics.median(milliseconds) for milliseconds in samples.values())
    print(f"{'ratio of the second to the first':42} {second / first:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    shape = (1, HEADS, options.tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def work(is_causal: bool) -> Callable[[], object]:
        def forward_and_backward() -> None:
            out = dot_product_kernel_attention(q, k, v, is_causal=is_causal, num_features=NUM_FEATURES)
            torch.autograd.grad(out.sum(), (q, k, v))

        return forward_and_backward

    show({f"{options.tokens} tokens": work(False), "the same, causal": work(True)}, options.rounds)

    features = Estimate(num_features=NUM_FEATURES).draw(HEAD_DIM)
    with torch.no_grad():
        token = torch.randn(1, HEADS, 1, HEAD_DIM)
        states = {}
        for count in (100, 100_000):
            seen = torch.randn(1, HEADS, count, HEAD_DIM)
            states[f"step after {count:,} tokens"] = extend(features, None, seen[:, :, :0], seen, seen)[1]
        show(
            {name: lambda state=state: extend(features, state, token, token, token) for name, state in states.items()},
            repeats=30,
        )


if __name__ == "__main__":
    main()
