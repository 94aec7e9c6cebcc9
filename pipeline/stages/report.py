"""Stage `report`: tables, figures and the page, from whatever is finished."""

from pathlib import Path

from pipeline import reporting
from pipeline.grid.params import Params
from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError


def run(params: Params, *, reference: str, margin: float, force: bool) -> None:
    """Write reports/PROFILE; cells that are missing are shown as such. Options are as in `reporting.build`."""
    ATTENTIONS.get(reference)
    if not 0 < margin <= 100:
        raise UserError(f"--margin must lie between 0 and 100 points, not {margin:g}")
    reporting.build(params, Path(), reference=reference, margin=margin, force=force)
    print(f"report: reports/{params.profile}/index.html")
