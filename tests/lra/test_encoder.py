"""The encoder: padding is invisible, dropout acts, construction is pure, and what does not fit is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.lra.config import build_config
from schoenbat.lra.encoder import Classifier, ModelConfig, ShortConvolution, build_model, sinusoidal_positions
from schoenbat.lra.multihead import FORMERS, FormerConfig

SMALL = ModelConfig(num_layers=2, width=16, ffn_width=24, num_heads=2, dropout=0.1, head_width=8)


def build(attn: str = "rmfa", dotf: str | None = "exp", former: str = "maclauformer", **changes: Any) -> Classifier:
    arguments: dict[str, Any] = {
        "vocab_size": 20,
        "num_classes": 3,
        "num_texts": 1,
        "max_length": 100,
        "model": SMALL,
        "attention": {},
        "former_config": FormerConfig(),
        "seed": 0,
    }
    return build_model(attn=attn, dotf=dotf, former=former, **{**arguments, **changes})


def batch(num_texts: int = 1, length: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 20, (4, num_texts, length), generator=generator)
    return tokens, torch.ones(4, num_texts, length, dtype=torch.bool)


MECHANISMS = [(name, "exp" if ATTENTIONS.get(name).needs_kernel else None) for name in ATTENTIONS.names()]


@pytest.mark.parametrize("former", FORMERS)
@pytest.mark.parametrize(("attn", "dotf"), MECHANISMS)
@pytest.mark.parametrize("num_texts", [1, 2])
def test_padding_is_invisible(attn: str, dotf: str | None, former: str, num_texts: int) -> None:
    model = build(attn, dotf, former, num_texts=num_texts).eval()
    tokens, mask = batch(num_texts)
    padded_tokens = torch.nn.functional.pad(tokens, (0, 34))
    padded_mask = torch.nn.functional.pad(mask, (0, 34))
    torch.testing.assert_close(model(padded_tokens, padded_mask), model(tokens, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("attn", "dotf"), MECHANISMS)
def test_every_parameter_gets_a_gradient(attn: str, dotf: str | None) -> None:
    model = build(attn, dotf, "maclauformer")
    model(*batch()).square().sum().backward()
    # Uniform attention reads neither query nor key; their share of project_in then has gradient 0, not none.
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_acts_in_training_only() -> None:
    model = build()
    assert not torch.equal(model(*batch()), model(*batch()))
    model.eval()
    assert torch.equal(model(*batch()), model(*batch()))


def test_construction_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, same, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(first.encoder.tokens.weight, other.encoder.tokens.weight)
    assert not torch.equal(
        first.state_dict()["encoder.blocks.0.attention.attention.features.signs"],
        first.state_dict()["encoder.blocks.1.attention.attention.features.signs"],
    )


def test_random_features_travel_with_the_weights() -> None:
    source, target = build(seed=1).eval(), build(seed=2).eval()
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*batch()), target(*batch()))


def test_texts_of_a_pair_go_through_the_same_encoder() -> None:
    model = build(num_texts=2).eval()
    tokens, mask = batch(2)
    encoded = model.encoder(tokens.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (4, 2))
    a, b = encoded[:, 0], encoded[:, 1]
    expected = model.head(torch.cat([a, b, a * b, a - b], -1))
    torch.testing.assert_close(model(tokens, mask), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": "rmfaa"}, "unknown attn 'rmfaa'; choose one of: "),
        ({"dotf": "cosh"}, "unknown dotf 'cosh'; choose one of: exp, inverse, log, "),
        ({"former": "macformer"}, "unknown former 'macformer'; choose one of: maclauformer, transformer"),
        ({"dotf": None}, "attn 'rmfa' needs a kernel; choose dotf from: exp"),
        ({"attn": "softmax"}, "attn 'softmax' takes no kernel; leave out dotf 'exp'"),
        ({"dotf": "log", "former": "transformer"}, "dotf 'log' is defined for |x| < 1 only"),
        ({"attention": {"features": 3}}, "attention.rmfa: unknown key 'features'; known keys: num_features"),
        ({"attention": {"num_features": "many"}}, "attention.rmfa.num_features must be an int, not 'many' (str)"),
        ({"attention": {"num_features": 0}}, "attention.rmfa: num_features must be at least 1, not 0"),
        (
            {"former": "transformer", "former_config": FormerConfig(power=True)},
            "has no SBN, so it takes no option 'power'",
        ),
        (
            {"former": "transformer", "former_config": FormerConfig(gain=2.0)},
            "former 'transformer' has no SBN, so it takes no option 'gain'",
        ),
        ({"model": replace(SMALL, pooling="cls"), "per_position": True}, "pooling 'cls' needs a task that classifies"),
        ({"model": replace(SMALL, pooling="cls"), "causal": True}, "pooling 'cls' needs a task that classifies"),
        (
            {"attn": "linformer", "dotf": None, "attention": {"max_length": 10}},
            "attn 'linformer' was made for 10 tokens at most",
        ),
        (
            {"former": "transformer", "former_config": FormerConfig(temperature=True)},
            "former 'transformer' has no SBN, so it takes no option 'temperature'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(**changes)
    assert message in str(caught.value)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="width 10 cannot be split over 3 heads"):
        ModelConfig(width=10, num_heads=3)
    with pytest.raises(ValueError, match="dropout must lie in"):
        ModelConfig(dropout=1.0)


SWITCHES: list[dict[str, Any]] = [
    {"pooling": "cls"},
    {"norm": "post"},
    {"positions": "sinusoidal"},
    {"positions": "none"},
    {"convolution": 3},
    {"pooling": "cls", "norm": "post", "positions": "sinusoidal", "convolution": 2},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("num_texts", [1, 2])
def test_padding_is_invisible_whatever_the_architecture(switches: dict[str, Any], num_texts: int) -> None:
    model = build(model=replace(SMALL, **switches), num_texts=num_texts).eval()
    tokens, mask = batch(num_texts)
    padded = torch.nn.functional.pad(tokens, (0, 34), value=7), torch.nn.functional.pad(mask, (0, 34))
    torch.testing.assert_close(model(*padded), model(tokens, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_changes_the_output_and_every_parameter_gets_a_gradient(switches: dict[str, Any]) -> None:
    model = build(model=replace(SMALL, **switches)).eval()
    out = model(*batch())
    assert not torch.allclose(out, build().eval()(*batch()))
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("switches", [*SWITCHES, {}], ids=str)
def test_a_state_dict_holds_all_that_a_new_model_needs(switches: dict[str, Any]) -> None:
    source, target = (build(model=replace(SMALL, **switches), seed=seed).eval() for seed in (1, 2))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*batch()), target(*batch()))


def test_without_positions_the_order_of_tokens_is_unknown() -> None:
    tokens, mask = batch()
    shuffled = tokens[..., torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    for positions, same in (("none", True), ("learned", False), ("sinusoidal", False)):
        model = build("softmax", None, "transformer", model=replace(SMALL, positions=positions)).eval()
        assert torch.allclose(model(tokens, mask), model(shuffled, mask), atol=1e-6) == same


def test_the_convolution_adds_to_a_token_weighted_ones_of_itself_and_those_before_it() -> None:
    generator = torch.Generator().manual_seed(0)
    convolution = ShortConvolution(3, 4)
    x = torch.randn(2, 7, 4, generator=generator)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 2] = False
    found = convolution(x.masked_fill(~mask[..., None], torch.nan), mask)
    for row, column in ((0, 0), (0, 1), (0, 6), (1, 3), (1, 6)):
        expected = x[row, column].clone()
        for i in range(3):
            if column >= i and mask[row, column - i]:
                expected += convolution.weight[i] * x[row, column - i]
        torch.testing.assert_close(found[row, column], expected)


def test_sinusoidal_positions_are_sines_and_cosines_of_falling_rates() -> None:
    """Row p, columns 2 i and 2 i + 1: sin and cos of p / 10000^(2 i / width), to the standard deviation 0.02."""
    table = sinusoidal_positions(50, 6) / (0.02 * 2**0.5)
    for position in (0, 1, 49):
        for i in range(3):
            angle = torch.tensor(position / 10_000 ** (2 * i / 6))
            torch.testing.assert_close(table[position, 2 * i : 2 * i + 2], torch.stack([angle.sin(), angle.cos()]))


def test_post_norm_leaves_normalised_vectors() -> None:
    model = build(model=replace(SMALL, norm="post"), per_position=True).eval()
    tokens, mask = batch()
    states = model.encoder(tokens[:, 0], mask[:, 0])
    torch.testing.assert_close(states.mean(-1), torch.zeros(4, 30), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.var(-1, correction=0), torch.ones(4, 30), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("attn", "dotf"), MECHANISMS)
def test_a_causal_model_of_positions_sees_nothing_of_later_tokens(attn: str, dotf: str | None) -> None:
    if not ATTENTIONS.get(attn).has_causal_form:
        with pytest.raises(UserError, match=f"attn '{attn}' has no causal form, which this task needs"):
            build(attn, dotf, "maclauformer", per_position=True, causal=True)
        return
    model = build(attn, dotf, "maclauformer", per_position=True, causal=True).eval()
    tokens, mask = batch()
    other = tokens.clone()
    other[..., 20:] = 1 + other[..., 20:] % 19
    first, second = model(tokens, mask), model(other, mask)
    assert first.shape == (4, 30, 3)
    torch.testing.assert_close(first[:, :20], second[:, :20], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first[:, 20:], second[:, 20:])


def test_an_unknown_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"here\.pooling must be one of: mean, cls; not 'max'"):
        build_config(ModelConfig, {"pooling": "max"}, "here")


FIRST_WEIGHTS = {
    "encoder.positions": -0.7944,
    "encoder.tokens.weight": -0.2138,
    "encoder.blocks.0.attention.project_in.weight": -0.4765,
    "encoder.blocks.1.mlp.3.bias": -0.2212,
    "head.0.weight": -1.9893,
    "head.2.bias": 0.025,
}


def test_the_default_model_has_the_weights_it_always_had() -> None:
    """Of seed 0; the order in which weights are drawn is part of what a seed means."""
    state = build().state_dict()
    assert list(state)[:2] == ["encoder.positions", "encoder.tokens.weight"]
    sums = {name: round(float(state[name].double().sum()), 4) for name in FIRST_WEIGHTS}
    assert sums == FIRST_WEIGHTS
