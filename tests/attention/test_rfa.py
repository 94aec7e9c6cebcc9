"""Random feature attention: its kernel against gpytorch's, and its approach to softmax of unit vectors."""

import pytest
import torch
from heads import build, normal, normalised, ragged, relative_error


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_its_kernel_is_gpytorchs() -> None:
    gpytorch = pytest.importorskip("gpytorch", reason="gpytorch (extra oracles) is not installed")
    query, key, value = (x[0, 0] for x in normal(1, 1, 30, 8))
    attention = build("rfa", 8, num_features=128)
    with torch.random.fork_rng(devices=[]):
        kernel = gpytorch.kernels.RFFKernel(num_samples=64, num_dims=8).double()
    kernel.lengthscale = 1.0
    kernel.randn_weights.copy_(attention.vectors.T)
    weights = kernel(unit(query), unit(key)).to_dense().detach()
    torch.testing.assert_close(attention.features(query) @ attention.features(key).mT, weights, rtol=0, atol=1e-12)
    expected = normalised(weights[None, None], value[None, None])
    torch.testing.assert_close(attention(query[None, None], key[None, None], value[None, None]), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_it_is_its_formula(is_causal: bool) -> None:
    query, key, value = normal(2, 2, 90, 8)
    mask = ragged([90, 50], 90)
    attention = build("rfa", 8, num_features=64, tau=0.8)
    angle = (unit(query) @ attention.vectors.T / 0.8)[..., :, None, :] - (unit(key) @ attention.vectors.T / 0.8)[
        ..., None, :, :
    ]
    expected = normalised(angle.cos().mean(-1), value, mask, is_causal)
    torch.testing.assert_close(attention(query, key, value, mask, is_causal), expected, rtol=1e-8, atol=1e-8)


def test_a_vector_of_length_0_has_finite_gradients() -> None:
    query, key, value = normal(1, 1, 5, 8)
    key[0, 0, 2] = 0
    key.requires_grad_()
    build("rfa", 8)(query, key, value).square().sum().backward()
    assert key.grad is not None
    assert torch.isfinite(key.grad).all()


def test_its_error_falls_with_the_number_of_features() -> None:
    # As 1 / sqrt(features): means of 5 draws, 8 times the features, and a factor of 2 is asked for.
    query, key, value = normal(1, 1, 60, 16)
    exact = normalised((unit(query) @ unit(key).mT).exp(), value)
    errors = [
        sum(relative_error(build("rfa", 16, seed, num_features=number)(query, key, value), exact) for seed in range(5))
        / 5
        for number in (128, 1024, 8192)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.1


def test_an_odd_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="num_features must be even"):
        build("rfa", 8, num_features=7)
