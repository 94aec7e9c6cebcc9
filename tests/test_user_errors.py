"""The errors for names: what may have been meant comes first, and a line stays a line."""

from schoenbat.errors import list_choices, unknown_name


def test_the_name_that_may_have_been_meant_comes_first() -> None:
    error = unknown_name("attn", "sofmax", ["mean", "rmfa", "softmax"])
    assert str(error) == "unknown attn 'sofmax'; choose one of: softmax, mean, rmfa"


def test_upper_case_and_underscores_are_spellings_of_a_name() -> None:
    assert list_choices("RMFA_Sketch", ["mean", "rmfa-sketch"]) == "rmfa-sketch, mean"


def test_without_a_likely_one_the_choices_keep_their_order() -> None:
    assert list_choices("zzz", ["b", "a", 3]) == "b, a, 3"
    assert list_choices("zzz", []) == "none"


def test_of_many_choices_the_likely_ones_and_their_number_are_shown() -> None:
    cells = [f"lra-text-softmax-transformer-{seed}" for seed in range(2000)]
    shown = list_choices("lra-text-sofmax-transformer-77", cells)
    assert shown.startswith("lra-text-softmax-transformer-77, ")
    assert shown.endswith(", ... (2000 in all)")
    assert len(shown) < 200
    assert list_choices("x", cells).count("lra-text") == 3
