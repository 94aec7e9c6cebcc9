"""Near and heavy keys in the compiled form are those of the torch form, whatever stands at masked places."""

import pytest
import torch
from torch import Tensor

from schoenbat import Estimate
from schoenbat.ops import sparse
from schoenbat.ops.native import build
from schoenbat.ops.native import sparse as native_sparse
from schoenbat.ops.reference import AttentionInputs
from schoenbat.ops.sparse import HeadKernels

pytestmark = pytest.mark.skipif(build.load().library is None, reason=build.load().reason)

CASES = [
    # batch, heads, key heads, tokens, head_dim, window, heavy keys, features
    (2, 2, 2, 100, 32, 16, 16, 33),
    (2, 4, 2, 257, 32, 16, 16, 128),
    (1, 2, 2, 1000, 32, 16, 16, 561),
    (1, 2, 1, 77, 24, 5, 3, 30),
    (1, 2, 2, 77, 24, 5, 0, 400),
    (2, 2, 2, 10, 32, 16, 16, 128),
    (1, 2, 2, 300, 64, 40, 8, 200),
    (1, 1, 1, 1, 32, 16, 16, 33),
]


def inputs_of(batch: int, heads: int, key_heads: int, tokens: int, width: int) -> AttentionInputs:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads, width), (key_heads, width), (key_heads, 20))
    query, key, value = (torch.randn(batch, h, tokens, n, generator=generator) for h, n in shapes)
    return AttentionInputs(1.5 * query, 1.5 * key + 0.3, value, None, False, width**-0.5, True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that the compiled form computes an output."""
    found: list[int] = []
    attend = native_sparse.attend
    monkeypatch.setattr(native_sparse, "attend", lambda *given: found.append(1) or attend(*given))
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_both_forms_give_the_same(
    case: tuple[int, ...],
    masked: bool,
    with_kernels: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],
) -> None:
    *shape, window, heavy, num_features = case
    estimate = Estimate("exp", num_features, window=window, heavy=heavy)
    features = estimate.make(shape[-1])
    assert estimate.sparsity is not None
    inputs = inputs_of(*shape)
    if masked:
        mask = torch.rand(shape[0], shape[3], generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, :3] = True
        mask[1:, :] &= torch.arange(shape[3]) > shape[3] // 2
        inputs = inputs._replace(key_mask=mask)
    kernels = None
    if with_kernels:
        kernels = HeadKernels(shape[1])
        torch.nn.init.normal_(kernels.logarithms, std=0.3, generator=torch.Generator().manual_seed(2))
        kernels.requires_grad_(False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = sparse.attend(features, inputs, estimate.sparsity, kernels)
    finally:
        torch.set_num_threads(before)
    assert calls == [1]
    monkeypatch.setenv(build.VARIABLE, "torch")
    torch.testing.assert_close(found, sparse.attend(features, inputs, estimate.sparsity, kernels), rtol=1e-5, atol=5e-6)


def test_what_stands_at_masked_places_does_not_matter(calls: list[int]) -> None:
    estimate = Estimate("exp", 128, window=16, heavy=16)
    features, inputs = estimate.make(32), inputs_of(2, 2, 2, 100, 32)
    mask = torch.arange(100).expand(2, -1) < torch.tensor([[60], [0]])
    assert estimate.sparsity is not None

    def attend(fill: float) -> Tensor:
        assert estimate.sparsity is not None
        filled = (x.masked_fill(~mask[:, None, :, None], fill) for x in inputs[:3])
        out = sparse.attend(features, AttentionInputs(*filled, mask, *inputs[4:]), estimate.sparsity)
        return out.masked_fill(~mask[:, None, :, None], 0.0)

    expected = attend(0.0)
    assert expected[0].any()
    for fill in (float("nan"), float("inf"), 1e30):
        assert torch.equal(attend(fill), expected)
    assert len(calls) == 4


def test_gradients_other_dtypes_and_transforms_take_the_torch_form(calls: list[int]) -> None:
    estimate = Estimate("exp", 33, window=8, heavy=4)
    features, inputs = estimate.make(32), inputs_of(1, 2, 2, 50, 32)
    assert estimate.sparsity is not None
    expected = sparse.attend(features, inputs, estimate.sparsity)
    assert calls == [1]
    for query in (inputs.query.clone().requires_grad_(), inputs.query.double(), inputs.query.bfloat16()):
        dtype = query.dtype
        own = inputs._replace(query=query, key=inputs.key.to(dtype), value=inputs.value.to(dtype))
        out = sparse.attend(features, own, estimate.sparsity)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
    assert calls == [1]
