"""The learned temperature: 1 at first, per head, and never beyond a kernel's radius."""

import math

import pytest
import torch

from schoenbat.attention import ATTENTIONS, NoConfig
from schoenbat.kernels import KERNELS
from schoenbat.nn.multihead import FormerConfig, SelfAttention, Temperature
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
