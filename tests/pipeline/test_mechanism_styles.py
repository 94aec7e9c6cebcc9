"""How mechanisms are named and drawn."""

import itertools

import pandas as pd
import pytest

from pipeline.reporting._mechanisms import label, style


def made_up_frame(count: int) -> pd.DataFrame:
    rows = itertools.product([f"attention{number}" for number in range(count)], ("transformer", "maclauformer"))
    return pd.DataFrame([{"attn": attn, "dotf": "", "former": former} for attn, former in rows])


def test_22_mechanisms_differ_in_colour_or_marker_and_formers_in_filling_and_line() -> None:
    frame = made_up_frame(22)
    looks = [style(frame, (f"attention{number}", "", "transformer")) for number in range(22)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 22
    for number, look in enumerate(looks):
        other = style(frame, (f"attention{number}", "", "maclauformer"))
        assert (other["color"], other["marker"]) == (look["color"], look["marker"])
        assert other["markerfacecolor"] != look["markerfacecolor"]
        assert other["linestyle"] != look["linestyle"]


def test_a_mechanism_looks_the_same_whatever_part_of_it_is_drawn() -> None:
    frame = made_up_frame(5)
    whole, part = style(frame, ("attention3", "", "transformer")), style(frame, ("attention3", ""))
    assert whole == part


@pytest.mark.parametrize(
    ("mechanism", "expected"),
    [
        (("softmax", "", "transformer"), "softmax"),
        (("softmax", "", "maclauformer"), "softmax + ppSBN"),
        (("rmfa", "exp", "maclauformer"), "rmfa exp + ppSBN"),
        (("rmfa+64", "exp", "maclauformer+gain2"), "rmfa+64 exp + ppSBN + gain2"),
        (("rmfa", "exp"), "rmfa exp"),
    ],
)
def test_names_tell_ppsbn_and_variants_apart(mechanism: tuple[str, ...], expected: str) -> None:
    assert label(mechanism) == expected
