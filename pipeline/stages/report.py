"""Stage `report`: tables and figures from whatever is finished."""

from pathlib import Path

from pipeline import reporting
from pipeline.grid.params import Params


def run(params: Params) -> None:
    """Write reports/PROFILE; cells that are missing are shown as such."""
    reporting.build(params.profile, params, Path())
    print(f"report: reports/{params.profile}/index.md")
