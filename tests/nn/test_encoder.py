"""The encoder: padding is invisible, dropout acts, construction is pure, and what does not fit is refused."""

from typing import Any

import pytest
import torch

from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.nn.encoder import Classifier, ModelConfig, build_model
from schoenbat.nn.multihead import FORMERS, FormerConfig

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
        (
            {"attn": "rmfaa"},
            "unknown attn 'rmfaa'; choose one of: bigbird, cosformer, gaussian, hedgehog, informer, kernelized, linear",
        ),
        ({"dotf": "cosh"}, "unknown dotf 'cosh'; choose one of: exp, inverse, log, sqrt, trigh"),
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
