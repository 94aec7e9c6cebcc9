"""Attention in pieces is the attention of the features it is made of, and can be differentiated and transformed."""

import pytest
import torch
from torch import Tensor

from schoenbat.features.plan import expand, pull_back, push_forward
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS
from schoenbat.ops import _planned
from schoenbat.ops._planned import attend_plainly
from schoenbat.ops.linear import linear_attention
from schoenbat.ops.reference import divide, split

SMALLEST = 1e-6


@pytest.fixture(params=["at once", "in pieces"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways that tokens can go, however few they are."""
    monkeypatch.setattr(_planned, "FEW_ROWS", 2**20 if request.param == "at once" else 0)


def make(head_dim: int, num_features: int) -> Sketch:
    return Sketch(
        KERNELS.get("inverse")(),
        head_dim=head_dim,
        num_features=num_features,
        max_degree=6,
        scale=0.3,
        fixed_norm=True,
        generator=torch.Generator().manual_seed(0),
    )


def product_attention(query: Tensor, key: Tensor, value: Tensor, features: Sketch, key_weight: Tensor | None) -> Tensor:
    weight = torch.ones_like(key[..., :1]) if key_weight is None else key_weight
    products = attend_plainly(query, key, torch.cat([value * weight, weight], -1), features.products(query.dtype, 1.0))
    return divide(*split(products), SMALLEST)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype).mul_(0.3).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("num_features", [1, 3, 5, 9, 15, 27, 60])
def test_pull_back_and_push_forward_are_the_gradients_of_expand(num_features: int) -> None:
    features = make(4, num_features)
    projected = torch.randn(7, features.projection_bits.shape[1], dtype=torch.float64, requires_grad=True)
    out = expand(projected, features.plan)
    assert out.shape == (7, features.allocation.num_features)
    grad = torch.randn_like(out)
    expected = torch.zeros_like(projected)
    if out.requires_grad:
        (expected,) = torch.autograd.grad(out, projected, grad)
    torch.testing.assert_close(pull_back(projected.detach(), features.plan, grad), expected)
    tangent = torch.randn_like(projected)
    pushed = push_forward(projected.detach(), features.plan, tangent)
    torch.testing.assert_close((pushed * grad).sum(), (expected * tangent).sum())


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("length", [1, 63, 5000])
def test_neither_way_changes_outputs_or_gradients(length: int) -> None:
    features = make(6, 40)
    tensors = inputs(1, 2, length, 6)
    mask = torch.rand(1, length, generator=torch.Generator().manual_seed(2)) < 0.8
    mask[:, 0] = True
    out = product_attention(*tensors, features, mask[:, None, :, None].double().expand(1, 2, length, 1))
    query, key, value = tensors
    truth = linear_attention(features(query), features(key), value, mask)
    torch.testing.assert_close(out, truth)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, weight)
    for a, b in zip(found, torch.autograd.grad(truth, tensors, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("size", [1.0, -1.0, 1e-9])
def test_gradients_are_those_of_the_definition(size: float) -> None:
    # With the smallest weights all denominators are moved away from 0, which ends their influence.
    features = make(6, 40)
    tensors = [*inputs(2, 1, 17, 6), size * torch.linspace(0, 1, 34, dtype=torch.float64).view(2, 1, 17, 1)]
    tensors[3].requires_grad_()
    query, key, value, key_weight = tensors
    out = product_attention(query, key, value, features, key_weight)
    products = features.relative(query) @ (features.relative(key).mT @ torch.cat([value * key_weight, key_weight], -1))
    truth = divide(products[..., :-1], products[..., -1:])
    torch.testing.assert_close(out, truth)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, tensors, weight)
    for a, b in zip(found, torch.autograd.grad(truth, tensors, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("_way")
def test_it_can_be_differentiated_twice() -> None:
    features = make(3, 12)
    key_weight = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)[None, None, :, None]

    def attend(*tensors: Tensor) -> Tensor:
        return product_attention(*tensors, features, key_weight)

    assert torch.autograd.gradgradcheck(attend, inputs(1, 1, 4, 3))


@pytest.mark.usefixtures("_way")
def test_function_transforms_give_the_same_as_loops() -> None:
    features = make(4, 20)
    query, key, value = (x.detach() for x in inputs(3, 1, 2, 9, 4))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return product_attention(q, k, v, features, None).square().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    together = torch.func.vmap(gradient)(query, key, value)
    for i in range(3):
        for a, b in zip(together, gradient(query[i], key[i], value[i]), strict=True):
            torch.testing.assert_close(a[i], b)

    def attend(q: Tensor) -> Tensor:
        return product_attention(q, key[0], value[0], features, None)

    jacobian = torch.func.jacrev(attend)(query[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(attend, query[0]))
