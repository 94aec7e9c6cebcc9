"""What every attention mechanism promises, with each kernel where it takes one."""

import pytest
import torch
from torch import Tensor

from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.kernels import KERNELS
from schoenbat.norm import pre_sbn

HEAD_DIM = 8


def make(name: str, dotf: str | None, seed: int = 0) -> Attention:
    attention_class = ATTENTIONS.get(name)
    return attention_class(
        attention_class.Config(),
        head_dim=HEAD_DIM,
        kernel=None if dotf is None else KERNELS.get(dotf)(),
        generator=torch.Generator().manual_seed(seed),
    )


CASES = [
    (name, dotf)
    for name in ATTENTIONS.names()
    for dotf in (KERNELS.names() if ATTENTIONS.get(name).needs_kernel else [None])
]
pytestmark = pytest.mark.parametrize(("name", "dotf"), CASES, ids=["-".join(filter(None, case)) for case in CASES])


def inputs(length: int, *, seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query and key on the unit sphere, inside every kernel's domain, and a value."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, 2, length, HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return [x.to(dtype) for x in (pre_sbn(query), pre_sbn(key), value)]


@pytest.mark.parametrize("length", [1, 5, 63, 257])
def test_padding_changes_nothing(name: str, dotf: str | None, length: int) -> None:
    attention = make(name, dotf)
    query, key, value = inputs(length + 9)
    mask = torch.arange(length + 9).expand(2, -1) < length
    short = attention(query[:, :, :length], key[:, :, :length], value[:, :, :length], mask[:, :length])
    without = attention(query[:, :, :length], key[:, :, :length], value[:, :, :length])
    padded = attention(query, key, 1e6 * mask[:, None, :, None].logical_not() + value, mask)[:, :, :length]
    torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without, short, rtol=1e-4, atol=1e-5)


def test_every_token_sees_every_token(name: str, dotf: str | None) -> None:
    attention = make(name, dotf)
    query, key, value = inputs(12)
    changed = value.clone()
    changed[:, :, -1] += 1
    assert ((attention(query, key, changed) - attention(query, key, value)).abs().amax(-1) > 1e-3).all()


def test_causal_token_sees_no_later_token(name: str, dotf: str | None) -> None:
    attention = make(name, dotf)
    query, key, value = inputs(200)
    full = attention(query, key, value, is_causal=True)
    for length in (1, 2, 128, 129):
        first = attention(query[:, :, :length], key[:, :, :length], value[:, :, :length], is_causal=True)
        torch.testing.assert_close(full[:, :, :length], first, rtol=1e-4, atol=1e-5)
    # The last token sees everything, as it does without the mask. An estimate may be a better one where it sees all
    # tokens from the start; leaving out one key would change an output by about 5e-3.
    torch.testing.assert_close(full[:, :, -1], attention(query, key, value)[:, :, -1], rtol=1e-3, atol=1e-4)


def test_nothing_to_attend_to_gives_zero(name: str, dotf: str | None) -> None:
    attention = make(name, dotf)
    query, key, value = (x.requires_grad_() for x in inputs(6))
    mask = torch.tensor([[True] * 6, [False] * 6])
    out = attention(query, key, value, mask)
    out.sum().backward()
    assert (out[1] == 0).all()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in (query, key, value))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_exact(name: str, dotf: str | None, is_causal: bool) -> None:
    attention = make(name, dotf)
    query, key, value = (x[:, :1].requires_grad_() for x in inputs(3, batch=1, dtype=torch.float64))
    mask = torch.tensor([[True, False, True]])

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, is_causal)

    assert torch.autograd.gradcheck(outputs, (query, key, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_and_close(name: str, dotf: str | None, dtype: torch.dtype) -> None:
    attention = make(name, dotf)
    query, key, value = inputs(3000, batch=1)
    exact = attention(query, key, value)
    half = attention(query.to(dtype), key.to(dtype), value.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_weights_are_a_mean(name: str, dotf: str | None) -> None:
    attention = make(name, dotf)
    query, key, _ = inputs(40)
    ones = torch.ones(2, 2, 40, HEAD_DIM)
    torch.testing.assert_close(attention(query, key, ones), ones, rtol=1e-4, atol=1e-4)


def test_order_of_keys_does_not_matter(name: str, dotf: str | None) -> None:
    attention = make(name, dotf)
    query, key, value = inputs(33)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    shuffled = attention(query, key[:, :, order], value[:, :, order])
    torch.testing.assert_close(shuffled, attention(query, key, value), rtol=1e-4, atol=1e-5)


def test_state_dict_carries_all_randomness(name: str, dotf: str | None) -> None:
    first, second = make(name, dotf, seed=1), make(name, dotf, seed=2)
    second.load_state_dict(first.state_dict())
    query, key, value = inputs(20)
    assert torch.equal(first(query, key, value), second(query, key, value))


def test_construction_is_a_function_of_the_seed(name: str, dotf: str | None) -> None:
    query, key, value = inputs(20)
    assert torch.equal(make(name, dotf, 7)(query, key, value), make(name, dotf, 7)(query, key, value))
