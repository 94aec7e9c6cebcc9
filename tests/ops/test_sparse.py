"""Attention with near and heavy keys: its formula, what it may see, its parts, and its bound."""

import math

import pytest
import torch
from torch import Tensor

from schoenbat import Estimate, UserError
from schoenbat.features.plan import FeatureMap
from schoenbat.ops import sparse
from schoenbat.ops.reference import AttentionInputs
from schoenbat.ops.sparse import HeadKernels, Sparsity

HEAD_DIM, COMPLETE = 8, 1 + 8 + 36
SPARSITY = Sparsity(window=6, heavy=5, sinks=2)
BUDGETS = (1 + HEAD_DIM, 20, COMPLETE)


def draw(length: int = 50, batch: int = 2, heads: int = 4, key_heads: int = 2, size: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, heads, length, HEAD_DIM), (batch, key_heads, length, HEAD_DIM), (batch, key_heads, length, 5)]
    query, key, value = (size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [query, key + 1.0, value]


def features_of(num_features: int) -> FeatureMap:
    estimate = Estimate(num_features=num_features, window=SPARSITY.window, heavy=SPARSITY.heavy)
    return estimate.make(HEAD_DIM, 1.0)


def attend(num_features: int, *tensors: Tensor, **named: object) -> Tensor:
    kernels = named.pop("kernels", None)
    inputs = AttentionInputs(*tensors, **{"scale": 0.4, "self_attention": True} | named)  # type: ignore[arg-type]
    return sparse.attend(features_of(num_features), inputs, SPARSITY, kernels)  # type: ignore[arg-type]


def naive(
    features: FeatureMap, query: Tensor, key: Tensor, value: Tensor, exact: Tensor, centre: Tensor, abc: Tensor
) -> Tensor:
    """Evaluate the formulas of the module for one head: [N, d], [M, d], [M, v], which pairs are exact [N, M]."""
    scores = query @ key.T
    y_all = query @ (key - centre).T
    out = []
    second = (
        (features(query) @ features(key - centre).T - 1 - y_all) if features.plan.runs else torch.zeros_like(scores)
    )
    covariance = (key - centre)[~exact.all(0)]
    size = (covariance.T @ covariance).diagonal().mean() / len(covariance)
    for i, row in enumerate(exact):
        rest = ~row
        weights, n = scores[i][row].exp(), int(rest.sum())
        x, v, p = y_all[i][rest], value[rest], second[i][rest]
        mu, variance, m = x.mean(), x.var(correction=0), value[rest].mean(0)
        a, b, c = abc
        limit = max(1.0, features.reach)
        t = (limit / variance.clamp_min(limit)).sqrt()
        numerator = b * t * x @ (v - m)
        denominator = n * torch.ones(())
        if features.plan.runs:
            share, r = features.shares[2], (x.square().mean() / (query[i].square().sum() * size)).clamp(0, 1) ** 2
            reached = c * t**2 * (1.0 if share == 1 else r / (share * r + 1 - share))
            numerator = numerator + reached * (p - mu * x) @ (v - m)
            denominator = n * (1 + c * t**2 * variance / 2)
        output = m + n / (n + 4 * features.unexplained) * numerator / denominator
        beyond = (variance.sqrt() - sparse.WIDE).clamp_min(0) * math.sqrt(2 * math.log(n))
        mass = a * n * (mu + query[i] @ centre + beyond).exp() * (1 + c * variance / 2)
        out.append((weights @ value[row] + mass * output) / (weights.sum() + mass))
    return torch.stack(out)


@pytest.mark.parametrize("num_features", BUDGETS)
@pytest.mark.parametrize("own", [False, True])
def test_computes_its_formulas(num_features: int, own: bool) -> None:
    query, key, value = draw()
    kernels = HeadKernels(4).double()
    if own:
        torch.nn.init.normal_(kernels.logarithms, std=0.3, generator=torch.Generator().manual_seed(0))
    out = attend(num_features, query, key, value, kernels=kernels if own else None)
    features, length = features_of(num_features), key.shape[2]
    block = torch.arange(length) // SPARSITY.window
    near = (block[:, None] - block).abs() <= 1
    real = torch.ones(1, length, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            rows = 0.4 * query[b : b + 1, h // 2 * 2 : h // 2 * 2 + 2][:, None]
            shared = key[b : b + 1, h // 2 : h // 2 + 1]
            places, missed = sparse._choose_heavy(rows, shared, real, SPARSITY.heavy, SPARSITY.window, True)
            places = places[0, 0]
            exact = near.index_fill(1, places, True)
            free = torch.ones(length, dtype=torch.bool).index_fill(0, places, False)
            centre = shared[0, 0][free].mean(0)
            assert missed is not None
            own = kernels()[h] * torch.tensor([missed[0, 0, h % 2].exp(), 1, 1])
            wanted = naive(features, 0.4 * query[b, h], shared[0, 0], value[b, h // 2], exact, centre, own)
            assert (out[b, h] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("is_causal", [False, True])
def test_few_tokens_are_attended_exactly(is_causal: bool) -> None:
    query, key, value = draw(length=SPARSITY.window)
    wanted = Estimate(num_features=None).attend(query, key, value, is_causal=is_causal, scale=0.4)
    assert torch.allclose(attend(COMPLETE, query, key, value, is_causal=is_causal), wanted, atol=1e-10)


@pytest.mark.parametrize("num_features", BUDGETS)
def test_no_later_token_is_seen(num_features: int) -> None:
    query, key, value = (x.requires_grad_() for x in draw(length=40, batch=1))
    out = attend(num_features, query, key, value, is_causal=True)
    for i in range(40):
        for grad in torch.autograd.grad(out[:, :, i].sum(), (query, key, value), retain_graph=True):
            assert not grad[:, :, i + 1 :].any(), i
    # A choice has no gradient: what later tokens are must not change it either.
    changed = [torch.cat([x[:, :, :25], 3 * x[:, :, 25:].flip(2)], 2) for x in (query, key, value)]
    assert torch.equal(attend(num_features, *changed, is_causal=True)[:, :, :25], out[:, :, :25])


@pytest.mark.parametrize("parts", [[1] * 50, [7, 1, 13, 29], [50], [0, 50, 0]])
def test_parts_give_what_the_whole_does(parts: list[int]) -> None:
    tensors = draw()
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 20:23] = False
    whole = attend(20, *tensors, mask, is_causal=True)
    state, outputs, features = None, [], features_of(20)
    for part in zip(*(x.split(parts, 2) for x in tensors), mask.split(parts, 1), strict=True):
        out, state = sparse.extend(features, state, AttentionInputs(*part, True, 0.4), SPARSITY)
        outputs.append(out)
    seen = mask[:, None, :, None]
    assert torch.allclose(torch.cat(outputs, 2) * seen, whole * seen, atol=1e-9)
    assert state is not None
    assert state.heavy.keys.shape[2] == SPARSITY.heavy + SPARSITY.sinks
    assert state.recent.keys.shape[2] < 2 * SPARSITY.window


def test_first_tokens_that_count_stay() -> None:
    tensors = draw(length=60)
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, :10] = False
    _, state = sparse.extend(features_of(20), None, AttentionInputs(*tensors, mask, True, 0.4), SPARSITY)
    for b, first in ((0, 10), (1, 0)):
        kept = state.heavy.keys[b, 0]
        for place in range(first, first + SPARSITY.sinks):
            assert (kept == tensors[1][b, 0, place]).all(-1).any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("self_attention", [False, True])
def test_masked_keys_and_other_examples_do_not_matter(is_causal: bool, self_attention: bool) -> None:
    query, key, value = draw()
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 30:] = False
    named = {"is_causal": is_causal, "self_attention": self_attention}
    out = attend(20, query, key, value, mask, **named)
    spoilt = [x.clone() for x in (key, value)]
    for x in spoilt:
        x[1, :, 30:] = math.nan
    seen = slice(None, 30)
    assert torch.equal(attend(20, query, *spoilt, mask, **named)[1, :, seen], out[1, :, seen])
    if self_attention:
        alone = attend(20, query[1:, :, seen], key[1:, :, seen], value[1:, :, seen], **named)
        assert torch.allclose(alone[0], out[1, :, seen], atol=1e-10)
        assert torch.allclose(attend(20, query[:1], key[:1], value[:1], **named), out[:1], atol=1e-10)
    nothing = attend(20, query, key, value, torch.zeros_like(mask), **named)
    assert not nothing.any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_right(is_causal: bool) -> None:
    # No key is chosen, whose choice a small change could turn.
    tensors = [x.requires_grad_() for x in draw(length=14, batch=1, size=0.5)]
    features = Estimate(num_features=20, window=3, heavy=1).make(HEAD_DIM, 1.0)

    def run(*given: Tensor) -> Tensor:
        return sparse.attend(features, AttentionInputs(*given, None, is_causal, 0.4, True), Sparsity(3, 0, 0))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)


def test_cross_attention_does_not_tell_of_other_queries() -> None:
    query, key, value = draw()
    named = {"self_attention": False}
    together = attend(20, query, key, value, **named)
    assert torch.allclose(attend(20, query[:, :, :1], key, value, **named), together[:, :, :1], atol=1e-10)


@pytest.mark.parametrize("num_features", BUDGETS)
@pytest.mark.parametrize("size", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("clusters", [0, 6])
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_not_further_off_than_uniform_weights(
    num_features: int, size: float, clusters: int, is_causal: bool
) -> None:
    generator = torch.Generator().manual_seed(int(10 * size) + clusters)
    shape = (2, 4, 400, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    if clusters:
        centres = 2 * torch.randn(2, 4, clusters, HEAD_DIM, generator=generator)
        places = torch.randint(clusters, (2, 4, 400, 1), generator=generator).expand(shape)
        key = 0.3 * key + centres.gather(2, places)
        value = value + key
    query = size * query
    out = attend(num_features, query, key, value, is_causal=is_causal)
    exact = Estimate(num_features=None).attend(query, key, value, is_causal=is_causal, scale=0.4)
    counts = torch.arange(1, 401)[:, None]
    uniform = value.cumsum(2) / counts if is_causal else value.mean(2, keepdim=True)
    error, distance = (x.square().sum((0, 1, 2, 3)).sqrt() for x in (out - exact, uniform - exact))
    assert error <= 1.05 * distance


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(UserError, match="num_features must be above head_dim"):
        Estimate(num_features=8, window=4).make(8)
    with pytest.raises(UserError, match="for the kernel exp"):
        Estimate("inverse", window=4)
    with pytest.raises(UserError, match="set num_features"):
        Estimate(num_features=None, heavy=4)
    with pytest.raises(UserError, match="window must be at least 0, not -1"):
        Estimate(window=-1)
    with pytest.raises(UserError, match=r"num_features must be an integer, not 2\.5"):
        Estimate(num_features=2.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed must be an integer, not 'a'"):
        Estimate(seed="a")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs a window"):
        Estimate(heavy=4).attend(*draw(), is_causal=True)
