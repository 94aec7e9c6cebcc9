"""Errors of the estimators of a kernel at equal numbers of features, on made-up and on trained vectors."""

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.ticker import NullLocator

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._mechanisms import COLOURS, MARKERS, widened
from pipeline.reporting._output import Figure, add_legend, new_canvas, set_log
from pipeline.reporting._table import MISSING, Table

FIGURE_KERNEL = "exp"
FIGURE_PANELS = 3
LEAST_SHARE = -0.5
"""Where the axis of shares ends: an estimate that is off by more than uniform weights can be off without bound."""
AS_TRAINED = " as trained"
"""How the estimator is called that a cell has learned with."""
ESTIMATORS = (
    "rmfa: as published; rmfa-sketch: least expected error, shifted where the kernel is exp; ... as trained: the one "
    "draw that the cell has learned with; taylor1 has head_dim + 1 features at any budget; FAVOR+: positive orthogonal."
)


@dataclass(frozen=True)
class _Curve:
    """What a figure shows: a column of the frame and that of its spread."""

    name: str
    values: str
    spreads: str
    axis: str
    title: str


CURVES = (
    _Curve(
        "kernel", "kernel_error", "kernel_spread", "relative error of the kernel matrix", "Error of the kernel matrix"
    ),
    _Curve("output", "output_error", "output_spread", "relative error of the output", "Error of the attention output"),
    _Curve("share", "share", "share_spread", "share of the attention explained", "Share of the attention explained"),
)


class Errors(Report):
    """Relative errors hide what an estimate knows of attention that is close to uniform: the share does not."""

    title = "Errors of the estimators"
    order = 35

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table | Figure]:
        found = frame[frame.quantity.str.startswith("error_")]
        if found.empty:
            return
        wide = widened(found, "error_", ["direction", "dotf", "attn", "num_features"])
        errors = wide.rename(columns={"direction": "vectors", "attn": "estimator"})
        errors["share"] = 1 - errors.unexplained**2
        spread = 2 * errors.unexplained * errors.unexplained_spread
        errors["share_spread"] = spread.where(errors.share > LEAST_SHARE)
        beside = _beside_accuracy(errors, frame)
        if not beside.empty:
            yield _trained_table(beside, setting)
        yield _kernel_table(errors, setting)
        yield _output_table(errors, setting)
        for curve in CURVES:
            yield _figure(curve, errors[errors.dotf == FIGURE_KERNEL], setting)


def _beside_accuracy(errors: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """The shares of what cells were trained with, on their own vectors, with the accuracies of these cells."""
    cells = frame[frame.quantity == "test_accuracy"]
    parts = cells[["task", "attn", "dotf", "former"]].to_numpy().tolist()
    accuracies = {
        "-".join([*filter(None, axes), str(seed)]): value
        for axes, seed, value in zip(parts, cells.seed, cells.value, strict=True)
    }
    own = errors[errors.estimator.str.endswith(AS_TRAINED)].copy()
    own["cell"] = [vectors.removeprefix("trained ").partition("; ")[0] for vectors in own.vectors]
    own["accuracy"] = own.cell.map(accuracies)
    return own[["cell", "estimator", "num_features", "kernel_error", "output_error", "share", "accuracy"]]


def _trained_table(beside: pd.DataFrame, setting: Setting) -> Table:
    shown = [
        {
            "cell": row["cell"],
            "features": f"{row['num_features']:,}",
            "kernel error": f"{row['kernel_error']:.1e}",
            "output error": f"{row['output_error']:.1e}",
            "share explained": _share(row["share"]),
            "test accuracy": MISSING if pd.isna(row["accuracy"]) else f"{100 * row['accuracy']:.2f}",
        }
        for row in beside.to_dict("records")
    ]
    return Table(
        name="explained",
        title="Share of the exact attention that a trained cell computes, beside its test accuracy in percent",
        values=beside,
        shown=pd.DataFrame(shown),
        caption="On the queries, keys and values inside the cell, with the one draw of features that it has learned "
        "with. Share: 1 is the exact kernel's attention, 0 knows nothing of it, less is further off than uniform "
        "weights: a cell may be accurate without being an estimate of its kernel any more.",
        provenance=setting.errors_caption(),
    )


def _kernel_table(errors: pd.DataFrame, setting: Setting) -> Table:
    return Table(
        name="errors-kernel",
        title="Relative error of the kernel matrix, by number of features",
        values=errors[[*_KEYS, "kernel_error", "kernel_spread"]],
        shown=_by_size(errors, [f"{error:.1e}" for error in errors.kernel_error]),
        caption="Norm of the difference over the norm of the exact matrix, mean over draws (spreads: CSV). "
        f"{ESTIMATORS}",
        provenance=setting.errors_caption(),
    )


def _output_table(errors: pd.DataFrame, setting: Setting) -> Table:
    texts = [f"{e:.1e}; {_share(share)}" for e, share in zip(errors.output_error, errors.share, strict=True)]
    columns = ["output_error", "output_spread", "unexplained", "unexplained_spread", "share"]
    return Table(
        name="errors-output",
        title="Relative error of the attention output; share of the attention explained, by number of features",
        values=errors[[*_KEYS, *columns]],
        shown=_by_size(errors, texts),
        caption="Error: norm of the difference over the norm of the exact output. Share: 1 - u^2, with u the norm of "
        "the difference over the distance of the exact output from that of uniform weights; 1 is exact, 0 knows "
        "nothing of the attention, and less than 0 is further off than uniform weights. Means over draws (spreads: "
        f"CSV). {ESTIMATORS}",
        provenance=setting.errors_caption(),
    )


_KEYS = ["vectors", "dotf", "estimator", "num_features"]


def _share(share: float) -> str:
    """Three decimals, which do not round up to all of the attention."""
    if share > 0.999:
        return "> 0.999"
    return "< -99" if share < -99 else f"{share:.3f}"


def _by_size(errors: pd.DataFrame, texts: list[str]) -> pd.DataFrame:
    """One row per estimator, with the text for each number of features."""
    sizes = sorted(errors.num_features.unique())
    shown = []
    for (vectors, dotf, estimator), rows in errors.assign(text=texts).groupby(_KEYS[:-1], sort=False):
        found = dict(zip(rows.num_features, rows.text, strict=True))
        shown.append(
            {
                "vectors; argument": str(vectors),
                "kernel": str(dotf),
                "estimator": str(estimator),
                **{f"{size:,}": found.get(size, MISSING) for size in sizes},
            }
        )
    return pd.DataFrame(shown)


def _panels(curve: _Curve, errors: pd.DataFrame) -> list[str]:
    """The vectors of the panels: errors by how points lie, shares by the argument, and whatever was trained."""
    every = list(dict.fromkeys(errors.vectors))
    trained = [vectors for vectors in every if vectors.startswith("trained ")]
    made_up = [vectors for vectors in every if vectors not in trained]
    position = 0 if curve.name == "share" else 1
    shared = made_up[0].split("; ")[position] if made_up else ""
    return [vectors for vectors in made_up if vectors.split("; ")[position] == shared][:FIGURE_PANELS] + trained


def _figure(curve: _Curve, errors: pd.DataFrame, setting: Setting) -> Figure:
    panels_of = _panels(curve, errors)
    canvas, panels = new_canvas(3.2 * len(panels_of) + 2, 3.8, panels=len(panels_of))
    sizes = sorted(errors.num_features.unique())
    for axes, vectors in zip(panels, panels_of, strict=True):
        for index, estimator in enumerate(dict.fromkeys(errors.estimator)):
            rows = errors[(errors.vectors == vectors) & (errors.estimator == estimator)]
            axes.errorbar(
                rows.num_features,
                rows[curve.values],
                rows[curve.spreads],
                label=estimator,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.5,
            )
        axes.set_xscale("log", base=2)
        if curve.name == "share":
            axes.axhline(0, color="0.5", linewidth=1)
            axes.set_ylim(LEAST_SHARE, 1.05)
        else:
            set_log(axes, "y")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("features")
        axes.set_title(vectors.replace("; ", "\n"), fontsize=9)
    panels[0].set_ylabel(curve.axis)
    add_legend(panels[-1])
    below = " Uniform weights are at 0; what lies below the axis is in the table." if curve.name == "share" else ""
    return Figure(
        name=f"errors-{curve.name}",
        title=f"{curve.title} over the number of features, kernel {FIGURE_KERNEL}",
        canvas=canvas,
        caption=f"Mean and standard deviation over draws.{below}",
        provenance=setting.errors_caption(),
    )
