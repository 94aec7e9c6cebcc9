"""How mechanisms are named and drawn."""

from pathlib import Path

import pytest

from pipeline.grid.params import load_params
from pipeline.reporting._mechanisms import COLOURS, columns, label, style

ROOT = Path(__file__).parents[2]


def test_a_mechanism_has_one_colour_whatever_its_variant_and_a_cache_is_dashed() -> None:
    ours = [
        style((attn, "exp", former), True) for attn, former in (("rmfa-sketch", "transformer"), ("rmfa-sketch+64", "x"))
    ]
    assert ours[0] == ours[1]
    assert ours[0]["color"] == COLOURS["rmfa-sketch"]
    assert style(("softmax", ""), True)["linestyle"] == "--"
    assert style(("reformer", ""), True) == style(("reformer", "", "transformer"), True)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_what_is_not_compared_first_is_grey() -> None:
    assert style(("softmax", ""), False) == style(("rmfa", "exp"), False)


@pytest.mark.parametrize(
    ("mechanism", "expected"),
    [
        (("softmax", "", "transformer"), "softmax"),
        (("softmax", "", "maclauformer"), "softmax with ppSBN"),
        (("rmfa", "exp", "maclauformer"), "rmfa exp with ppSBN"),
        (("rmfa+64", "exp", "maclauformer+gain2"), "rmfa exp 64 with ppSBN gain2"),
        (("softmax", "", "transformer+low"), "softmax low"),
        (("rmfa", "exp"), "rmfa exp"),
    ],
)
def test_names_tell_ppsbn_and_variants_apart(mechanism: tuple[str, ...], expected: str) -> None:
    assert label(mechanism) == expected


def test_tables_have_a_column_for_each_axis() -> None:
    params = load_params(ROOT / "profiles/recall.yaml")
    of_ours = columns(params, ("rmfa-sketch+64", "exp", "maclauformer+gain8"))
    assert list(of_ours.values()) == ["rmfa-sketch exp (ours)", "64", "yes", "8", ""]
    assert list(of_ours) == ["method", "features", "ppSBN", "gain", "variant"]
    assert columns(params, ("softmax", "", "transformer")) == dict.fromkeys(of_ours, "") | {
        "method": "softmax",
        "ppSBN": "no",
    }
