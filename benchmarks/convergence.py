"""How fast mechanisms approach what they approximate, as their budget grows.

    python benchmarks/convergence.py OUT [--length 256] [--draws 5]

writes OUT/convergence.csv and OUT/convergence.svg. One head of 32 on two kinds of tokens: independent ones, normal with
standard deviation 1/2, and drifting ones, where a token differs little from the one before. The error is the norm of
the difference over the norm of the exact output, in float64; a mechanism that is random is drawn several times, and the
table has mean, least and largest. Budgets end where a mechanism is exact, or at 32 times the length for features.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.kernels import KERNELS

HEAD_DIM = 32
COLUMNS = ("inputs", "attn", "approximates", "option", "budget", "draws", "error", "least", "largest")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A mechanism, the option that is its budget, and what it approximates (`exact`, called `target`)."""

    attn: str
    option: str
    target: str
    exact: Attend
    options: dict[str, Any] = field(default_factory=dict)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def softmax_of_directions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=1.0)


def softmax_without_oneself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Draw vectors of length 1, which are queries and keys."""
    others = ~torch.eye(q.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, F.normalize(q, dim=-1), v, attn_mask=others, scale=1.0)


def gaussian(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return build(Subject("gaussian", "", "", softmax), {}, 0)(q, k, v)


def fourth_degree(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (F.layer_norm(x, x.shape[-1:]) * x.shape[-1] ** -0.25 for x in (q, k))
    weights = (q @ k.mT) ** 4
    return weights @ v / (1 + weights.sum(-1, keepdim=True))


SUBJECTS = [
    Subject("rmfa", "num_features", "softmax", softmax),
    Subject("rmfa-sketch", "num_features", "softmax", softmax),
    Subject("performer", "num_features", "softmax", softmax),
    Subject("rfa", "num_features", "softmax of directions", softmax_of_directions),
    Subject("polysketch", "num_features", "4th degree over 1 + sum", fourth_degree),
    Subject("nystromformer", "num_landmarks", "softmax", softmax),
    Subject("skyformer", "num_landmarks", "gaussian", gaussian),
    Subject("informer", "num_samples", "softmax", softmax),
    Subject("skeinformer", "num_samples", "softmax", softmax),
    Subject("window", "window", "softmax", softmax),
    Subject("bigbird", "num_random_blocks", "softmax", softmax, {"block_size": 8}),
    Subject("reformer", "num_hashes", "softmax without oneself", softmax_without_oneself, {"chunk_size": 8}),
]


def build(subject: Subject, options: dict[str, Any], seed: int) -> Attention:
    found = ATTENTIONS.get(subject.attn)
    return found(
        found.Config(**options),
        head_dim=HEAD_DIM,
        kernel=KERNELS.get("exp")() if found.needs_kernel else None,
        generator=torch.Generator().manual_seed(seed),
    ).double()


def budgets(subject: Subject, length: int) -> list[int]:
    if subject.option == "num_hashes":
        return [1, 2, 4, 8, 16]
    if subject.option == "num_random_blocks":
        # Where no block is left to draw, the others do nothing.
        blocks = length // 8
        return [*(number for number in (0, 1, 2, 4, 8, 16, 32) if number < blocks), blocks]
    last = {"num_features": 32 * length, "window": 2 * length}.get(subject.option, length)
    doubled = [2**power for power in range(3, last.bit_length()) if 2**power < last]
    return [*doubled, last]


def inputs(length: int) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, length, HEAD_DIM, generator=generator, dtype=torch.float64)
    yield "independent", (query / 2, key / 2, value)
    steps = torch.randn(3, 1, 1, length, HEAD_DIM, generator=generator, dtype=torch.float64)
    query, key, value = F.layer_norm(steps.cumsum(-2), (HEAD_DIM,))
    yield "drifting", (query / 2, key / 2, value)


@torch.no_grad()
def measure(length: int, draws: int) -> Iterator[dict[str, Any]]:
    for kind, tensors in inputs(length):
        for subject in SUBJECTS:
            exact = subject.exact(*tensors)
            number = draws if ATTENTIONS.get(subject.attn).is_random else 1
            for budget in budgets(subject, length):
                options = {**subject.options, subject.option: budget}
                found = [build(subject, options, seed)(*tensors) for seed in range(number)]
                errors = [float((x - exact).norm() / exact.norm()) for x in found]
                values = (sum(errors) / number, min(errors), max(errors))
                head = (kind, subject.attn, subject.target, subject.option, budget, number)
                yield dict(zip(COLUMNS, (*head, *values), strict=True))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    # The same rows give the same bytes.
    rcParams["svg.hashsalt"] = "schoenbat"
    kinds = list(dict.fromkeys(row["inputs"] for row in rows))
    figure = Figure(figsize=(5 * len(kinds) + 2, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0], kinds, strict=True):
        for place, subject in enumerate(SUBJECTS):
            own = [row for row in rows if row["inputs"] == kind and row["attn"] == subject.attn]
            # An error of rounding is as good as none.
            axes.plot(
                [max(row["budget"], 0.5) for row in own],
                [max(row["error"], 1e-4) for row in own],
                color=f"C{place % 6}",
                linestyle="-" if place < 6 else "--",
                marker="os^Dv"[place % 5],
                markersize=4,
                label=f"{subject.attn} → {subject.target}",
            )
        axes.set(xscale="log", yscale="log", title=f"{kind} tokens", xlabel="budget (features, landmarks, ...)")
        axes.grid(color="0.9")
    figure.axes[0].set_ylabel("relative error of the output (1e-4: or less)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for convergence.csv and convergence.svg")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    rows = list(measure(arguments.length, arguments.draws))
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "convergence.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.out / "convergence.svg")
    print(f"{len(rows)} rows: {arguments.out / 'convergence.csv'}")


if __name__ == "__main__":
    main()
