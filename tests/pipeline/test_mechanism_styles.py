"""How mechanisms are named and drawn."""

import pytest

from pipeline.reporting._mechanisms import label, style


def made_up(count: int) -> list[tuple[str, str, str]]:
    return [(f"attention{number}", "", former) for number in range(count) for former in ("transformer", "maclauformer")]


def test_22_mechanisms_differ_in_colour_or_marker_and_formers_in_filling_and_line() -> None:
    known = made_up(22)
    looks = [style(known, (f"attention{number}", "", "transformer")) for number in range(22)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 22
    for number, look in enumerate(looks):
        other = style(known, (f"attention{number}", "", "maclauformer"))
        assert (other["color"], other["marker"]) == (look["color"], look["marker"])
        assert other["markerfacecolor"] != look["markerfacecolor"]
        assert other["linestyle"] != look["linestyle"]


def test_a_mechanism_looks_the_same_whatever_part_of_it_is_drawn() -> None:
    known = made_up(5)
    whole, part = style(known, ("attention3", "", "transformer")), style(known, ("attention3", ""))
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
