"""Pre-SBN puts vectors on the unit sphere; post-SBN scales, and its power keeps sign and finite gradients."""

import pytest
import torch

from schoenbat.norm import PostSBN, pre_sbn


def test_pre_sbn_gives_centred_unit_vectors() -> None:
    x = torch.randn(3, 2, 50, 32, dtype=torch.float64) * 7 + 3
    y = pre_sbn(x)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(3, 2, 50, dtype=torch.float64))
    torch.testing.assert_close(y.mean(-1), torch.zeros(3, 2, 50, dtype=torch.float64))
    torch.testing.assert_close(pre_sbn(5 * x - 2), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pre_sbn_of_a_constant_vector_is_zero_with_finite_gradient(dtype: torch.dtype) -> None:
    x = torch.full((1, 4), 2.0, dtype=dtype, requires_grad=True)
    y = pre_sbn(x)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("length", [1e-9, 1e-6, 1.0, 1e9, 1e18])
def test_pre_sbn_does_not_depend_on_the_length_of_a_vector(length: float) -> None:
    x = torch.randn(50, 32)
    torch.testing.assert_close(pre_sbn(length * x), pre_sbn(x.double()).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("head_dim", [1, 2, 24, 33, 128])
def test_pre_sbn_of_constant_vectors_is_zero_whatever_they_hold(head_dim: int) -> None:
    constants = torch.logspace(-6, 6, 500)[:, None].expand(-1, head_dim)
    assert not pre_sbn(constants).any()


def test_pre_sbn_has_exact_gradients() -> None:
    assert torch.autograd.gradcheck(pre_sbn, (torch.randn(2, 5, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("power", [False, True])
def test_post_sbn_starts_as_the_identity(power: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(PostSBN(3, 5, power=power)(x), x, rtol=1e-5, atol=1e-6)


def test_power_keeps_sign_and_has_a_finite_gradient_at_zero() -> None:
    norm = PostSBN(1, 3, power=True)
    assert norm.beta is not None
    with torch.no_grad():
        norm.beta.fill_(0.5)
    x = torch.tensor([[[[-4.0, 0.0, 9.0]]]], requires_grad=True)
    y = norm(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach().flatten(), torch.tensor([-2.0, 0.0, 3.0]), rtol=0, atol=2e-3)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(norm.beta.grad).all()
