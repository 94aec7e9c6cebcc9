"""How many features of each degree the sketch of a kernel takes, and the error to expect: computed, not measured."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._mechanisms import COLOURS, DASHES, MARKERS
from pipeline.reporting._output import Figure, add_legend, new_canvas
from pipeline.reporting._table import MISSING, Table
from schoenbat.attention import ATTENTIONS
from schoenbat.features.allocation import Allocation
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS
from schoenbat.registry import build_config

MECHANISM = "rmfa-sketch"
BUDGETS = (16, 32, 64, 128, 256, 512, 1024)
LEAST_LABELLED = 5
"""Percent of a bar from which a segment has room for its number."""

Key = tuple[int, str, int]
"""head_dim, kernel and budget."""
Bar = tuple[tuple[int, int], ...]
"""Degrees, ascending, and their numbers of features."""


class Features(Report):
    """The mechanism is asked for its allocations, so that they are those of its cells."""

    title = "Features by degree"
    order = 60

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table | Figure]:
        config: Any = build_config(ATTENTIONS.get(MECHANISM).Config, setting.sketch, f"attention.{MECHANISM}")
        chosen = config.num_features
        allocations = {
            (head_dim, dotf, budget): allocation_of(config, head_dim, dotf, budget)
            for head_dim in setting.head_dims
            for dotf in setting.kernels
            # Where the dot products leave the kernel's radius there are no features, nor cells.
            if head_dim**-0.5 < KERNELS.get(dotf)().radius
            for budget in sorted({*BUDGETS, chosen})
        }
        circumstances = (
            f"{MECHANISM} with the options of profile {setting.profile}, for unit vectors in independent directions, "
            "whose dot products are divided by sqrt(head_dim)."
        )
        yield _degrees_table(allocations, chosen, circumstances)
        yield _errors_table(allocations, circumstances)
        for head_dim in setting.head_dims:
            own = {(dotf, budget): found for (width, dotf, budget), found in allocations.items() if width == head_dim}
            yield _degrees_figure(head_dim, own, circumstances)
            yield _errors_figure(head_dim, own, circumstances)


def allocation_of(config: Any, head_dim: int, dotf: str, budget: int) -> Allocation:
    """What the mechanism's features are with `budget` in place of the `num_features` of its options."""
    mechanism = ATTENTIONS.get(MECHANISM)(
        dataclasses.replace(config, num_features=budget),
        head_dim=head_dim,
        kernel=KERNELS.get(dotf)(),
        generator=torch.Generator().manual_seed(0),
    )
    assert isinstance(mechanism.features, Sketch)
    return mechanism.features.allocation


def _degrees_table(allocations: dict[Key, Allocation], chosen: int, circumstances: str) -> Table:
    values = pd.DataFrame(
        [
            {"head_dim": head_dim, "kernel": dotf, "budget": budget, **row}
            for (head_dim, dotf, budget), allocation in allocations.items()
            for row in allocation.rows()
        ]
    )
    shown = [
        {
            "head_dim": str(row["head_dim"]),
            "kernel": row["kernel"],
            "degree": str(row["degree"]),
            "features": f"{row['num_features']:,}",
            "of": f"{row['of']:,}",
            "exact": "yes" if row["exact"] else "",
            "gain": f"{row['gain']:.1e}" if row["gain"] else MISSING,
        }
        for row in values[values.budget == chosen].to_dict("records")
    ]
    return Table(
        name="allocation",
        title=f"Features of each degree at {chosen:,} features",
        values=values,
        shown=pd.DataFrame(shown),
        caption="of: how many describe all of it; exact: they do, so that this term of the series comes out exactly "
        "for all vectors; gain: what the degree takes off the expected squared error, relative to the mean of f^2. "
        "Harmonics of low degrees are part of higher powers, so that a kernel whose series lacks a degree may have "
        f"features of it. {circumstances} Other numbers of features: CSV.",
    )


def _errors_table(allocations: dict[Key, Allocation], circumstances: str) -> Table:
    values = pd.DataFrame(
        [
            {
                "head_dim": head_dim,
                "kernel": dotf,
                "root_mean_square": allocation.root_mean_square,
                "budget": budget,
                "expected_error": allocation.expected_error,
            }
            for (head_dim, dotf, budget), allocation in allocations.items()
        ]
    )
    shown = [
        {
            "head_dim": str(head_dim),
            "kernel": dotf,
            "size of f": f"{size:.2g}",
            **{f"{row.budget:,}": f"{row.expected_error:.1e}" for row in rows.itertuples()},
        }
        for (head_dim, dotf, size), rows in values.groupby(["head_dim", "kernel", "root_mean_square"], sort=False)
    ]
    return Table(
        name="allocation-error",
        title="Expected relative error of the kernel, by number of features",
        values=values,
        shown=pd.DataFrame(shown),
        caption="Root of the expected squared error over the mean of f^2, whose root is the size of f. "
        f"{circumstances}",
    )


def _degrees_figure(head_dim: int, own: dict[tuple[str, int], Allocation], circumstances: str) -> Figure:
    """One panel for all kernels that share their allocations."""
    budgets = sorted({budget for _, budget in own})
    kernels_of: dict[tuple[Bar, ...], list[str]] = {}
    for dotf in dict.fromkeys(dotf for dotf, _ in own):
        bars = tuple(
            tuple((share.degree, share.num_features) for share in own[dotf, budget].shares) for budget in budgets
        )
        kernels_of.setdefault(bars, []).append(dotf)
    degrees = sorted({degree for bars in kernels_of for bar in bars for degree, _ in bar})
    colours = _colours(degrees)
    canvas, panels = new_canvas(4.5 * len(kernels_of) + 1.5, 3.8, panels=len(kernels_of))
    for axes, (bars, kernels) in zip(panels, kernels_of.items(), strict=True):
        for position, bar in enumerate(bars):
            _draw_bar(axes, position, bar, colours)
        axes.set_xticks(range(len(budgets)), [f"{budget:,}" for budget in budgets])
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="features", ylim=(0, 100), title=", ".join(kernels))
    panels[0].set_ylabel("share of the features (%)")
    legend = [Patch(color=colours[degree], label=f"degree {degree}") for degree in reversed(degrees)]
    panels[-1].legend(handles=legend, loc="upper left", bbox_to_anchor=(1.01, 1))
    return Figure(
        name=f"allocation-{head_dim}",
        title=f"Features of each degree (the number in each part) at head_dim {head_dim}",
        canvas=canvas,
        caption=f"Kernels with the same numbers share a panel. {circumstances}",
    )


def _colours(degrees: list[int]) -> dict[int, tuple[float, float, float, float]]:
    """From light to dark as the degree rises, so that they differ without colour as well."""
    return {degree: colormaps["cividis_r"](index / max(len(degrees) - 1, 1)) for index, degree in enumerate(degrees)}


def _draw_bar(axes: Axes, position: int, bar: Bar, colours: dict[int, tuple[float, float, float, float]]) -> None:
    total = sum(count for _, count in bar)
    bottom = 0.0
    for degree, count in bar:
        height = 100 * count / total
        axes.bar(position, height, bottom=bottom, color=colours[degree], edgecolor="white")
        if height >= LEAST_LABELLED:
            ink = "white" if sum(colours[degree][:3]) < 1.5 else "black"
            axes.text(position, bottom + height / 2, f"{count:,}", ha="center", va="center", color=ink, fontsize=8)
        bottom += height


def _errors_figure(head_dim: int, own: dict[tuple[str, int], Allocation], circumstances: str) -> Figure:
    budgets = sorted({budget for _, budget in own})
    canvas, (axes,) = new_canvas(6, 3.8)
    for index, dotf in enumerate(dict.fromkeys(dotf for dotf, _ in own)):
        axes.plot(
            budgets,
            # There is no 0 on a logarithmic axis: the line ends before.
            [own[dotf, budget].expected_error or math.nan for budget in budgets],
            label=dotf,
            color=COLOURS[index % len(COLOURS)],
            linestyle=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=6,
            fillstyle="none",
            # Narrower and narrower, so that lines on top of each other can all be seen.
            linewidth=max(1.0, 3.0 - index / 2),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="features", ylabel="expected relative error of the kernel")
    add_legend(axes)
    return Figure(
        name=f"allocation-error-{head_dim}",
        title=f"Expected relative error of the kernel over the number of features at head_dim {head_dim}",
        canvas=canvas,
        caption=f"A line ends where features leave no error. {circumstances}",
    )
