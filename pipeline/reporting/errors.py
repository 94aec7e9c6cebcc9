"""Errors of the estimators of a kernel at equal numbers of features, on made-up and on trained vectors."""

from collections.abc import Iterator

import pandas as pd
from matplotlib.ticker import NullLocator

from pipeline.reporting import Report
from pipeline.reporting._collect import Setting
from pipeline.reporting._mechanisms import COLOURS, MARKERS, widened
from pipeline.reporting._output import MISSING, Figure, Table, new_canvas, set_log

PUBLISHED = "rmfa"
FIGURE_KERNEL = "exp"
FIGURE_PANELS = 3


class Errors(Report):
    """rmfa is the published form; the others are named in the captions."""

    title = "Errors of the estimators"

    def make(self, frame: pd.DataFrame, setting: Setting) -> Iterator[Table | Figure]:
        found = frame[frame.quantity.str.startswith("error_")]
        if found.empty:
            return
        wide = widened(found, "error_", ["direction", "dotf", "attn", "num_features"])
        errors = wide.rename(columns={"direction": "vectors", "attn": "estimator"})
        yield _table("errors-kernel", "kernel", "Relative error of the kernel matrix", errors, setting)
        yield _table("errors-output", "output", "Relative error of the attention output", errors, setting)
        for name, what in (("kernel", "kernel matrix"), ("output", "attention output")):
            yield _figure(name, what, errors[errors.dotf == FIGURE_KERNEL], setting)


def _table(name: str, quantity: str, title: str, errors: pd.DataFrame, setting: Setting) -> Table:
    sizes = sorted(errors.num_features.unique())
    shown = []
    for (vectors, dotf, estimator), rows in errors.groupby(["vectors", "dotf", "estimator"], sort=False):
        means = dict(zip(rows.num_features, rows[f"{quantity}_error"], strict=True))
        shown.append(
            {
                "vectors; argument": str(vectors),
                "kernel": str(dotf),
                "estimator": str(estimator),
                **{f"{size:,}": f"{means[size]:.1e}" if size in means else MISSING for size in sizes},
            }
        )
    return Table(
        name=name,
        title=f"{title}, by number of features",
        values=errors[["vectors", "dotf", "estimator", "num_features", f"{quantity}_error", f"{quantity}_spread"]],
        shown=pd.DataFrame(shown),
        caption="Norm of the difference over the norm of the exact result, mean over draws (spreads: CSV). rmfa: as "
        "published; rmfa-sketch: least expected error, centred where the kernel is exp; taylor1 has head_dim + 1 "
        f"features at any budget; FAVOR+: positive orthogonal. {setting.errors_caption()}",
    )


def _figure(name: str, what: str, errors: pd.DataFrame, setting: Setting) -> Figure:
    panels_of = list(dict.fromkeys(errors.vectors))
    # The argument of attention first, and with it whatever was trained.
    panels_of.sort(key=lambda vectors: not vectors.endswith("sqrt(d)"))
    panels_of = panels_of[:FIGURE_PANELS] + [vectors for vectors in panels_of[FIGURE_PANELS:] if "trained" in vectors]
    canvas, panels = new_canvas(3.2 * len(panels_of) + 2, 3.8, panels=len(panels_of))
    sizes = sorted(errors.num_features.unique())
    for axes, vectors in zip(panels, panels_of, strict=True):
        for index, estimator in enumerate(dict.fromkeys(errors.estimator)):
            rows = errors[(errors.vectors == vectors) & (errors.estimator == estimator)]
            axes.errorbar(
                rows.num_features,
                rows[f"{name}_error"],
                rows[f"{name}_spread"],
                label=estimator,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.5,
            )
        axes.set_xscale("log", base=2)
        set_log(axes, "y")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("features")
        axes.set_title(vectors.replace("; ", "\n"), fontsize=9)
    panels[0].set_ylabel(f"relative error of the {what}")
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return Figure(
        name=f"errors-{name}",
        title=f"Error of the {what} over the number of features, kernel {FIGURE_KERNEL}",
        canvas=canvas,
        caption=f"Mean and standard deviation over draws. {setting.errors_caption()}",
    )
