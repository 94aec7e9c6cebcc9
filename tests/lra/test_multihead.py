"""Gain and learned temperature: 1 at first, per head, and never beyond a kernel's radius; causal heads look back."""

import math

import pytest
import torch

from schoenbat.attention import ATTENTIONS, NoConfig
from schoenbat.kernels import KERNELS
from schoenbat.lra.multihead import FormerConfig, SelfAttention, Temperature
from schoenbat.norm import pre_sbn


def attention(dotf: str, head_dim: int = 8) -> torch.nn.Module:
    return ATTENTIONS.get("kernelized")(
        NoConfig(), head_dim=head_dim, kernel=KERNELS.get(dotf)(), generator=torch.Generator()
    )


def heads(dotf: str, temperature: bool) -> SelfAttention:
    torch.manual_seed(0)
    config = FormerConfig(temperature=temperature)
    return SelfAttention(attention(dotf), width=16, num_heads=2, former="maclauformer", config=config)


@pytest.mark.parametrize("dotf", KERNELS.names())
def test_temperature_starts_at_one_and_learns(dotf: str) -> None:
    x = torch.randn(2, 7, 16)
    warm = heads(dotf, temperature=True)
    torch.testing.assert_close(warm(x), heads(dotf, temperature=False)(x))
    warm(x).square().sum().backward()
    assert warm.temperature is not None
    assert (warm.temperature.logit.grad != 0).all()


@pytest.mark.parametrize("dotf", KERNELS.names())
@pytest.mark.parametrize("logit", [-50.0, 50.0])
def test_argument_stays_inside_the_radius(dotf: str, logit: float) -> None:
    mechanism = attention(dotf)
    temperature = Temperature(2, 8, mechanism)
    torch.nn.init.constant_(temperature.logit, logit)
    query = temperature(pre_sbn(torch.randn(1, 2, 50, 8, dtype=torch.float64)))
    largest = query.norm(dim=-1).max().item() / math.sqrt(8)
    assert largest <= 0.9901 * mechanism.kernel.radius


def test_no_room_below_the_radius_is_refused() -> None:
    config = FormerConfig(temperature=True)
    with pytest.raises(ValueError, match=r"gain 1 must stay below 0\.99, 0\.99 of the kernel's radius at head_dim 1"):
        SelfAttention(attention("log", head_dim=1), width=1, num_heads=1, former="maclauformer", config=config)


def plain_heads(dotf: str, config: FormerConfig, causal: bool = False) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(
        attention(dotf), width=16, num_heads=2, former="maclauformer", config=config, causal=causal
    ).double()


@pytest.mark.parametrize("gain", [0.5, 2.0])
@pytest.mark.parametrize("dotf", KERNELS.names())
def test_gain_multiplies_the_argument_of_the_kernel(dotf: str, gain: float) -> None:
    """Against the formula, from the module's own projections."""
    heads = plain_heads(dotf, FormerConfig(gain=gain))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = heads.project_in(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = KERNELS.get(dotf)()(gain * pre_sbn(q) @ pre_sbn(k).mT / math.sqrt(8))
    expected = heads.project_out((weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(heads(x), expected)


@pytest.mark.parametrize("dotf", KERNELS.names())
def test_temperature_starts_at_the_gain(dotf: str) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    learned = plain_heads(dotf, FormerConfig(gain=2.0, temperature=True))
    torch.testing.assert_close(learned(x), plain_heads(dotf, FormerConfig(gain=2.0))(x))
    assert [name for name, _ in learned.named_parameters() if "temperature" in name]


def test_gain_beyond_the_radius_or_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gain 3 must stay below 2\.8, 0\.99 of the kernel's radius at head_dim 8"):
        plain_heads("log", FormerConfig(gain=3.0))
    for gain in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gain must be positive"):
            FormerConfig(gain=gain)


@pytest.mark.parametrize("former", ["maclauformer", "transformer"])
def test_a_causal_token_sees_nothing_of_later_ones(former: str) -> None:
    torch.manual_seed(0)
    heads = SelfAttention(
        attention("exp"), width=16, num_heads=2, former=former, config=FormerConfig(), causal=True
    ).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 5:] = torch.randn(1, 4, 16, dtype=torch.float64)
    torch.testing.assert_close(heads(x)[:, :5], heads(other)[:, :5])
    assert not torch.allclose(heads(x)[:, 5:], heads(other)[:, 5:])
