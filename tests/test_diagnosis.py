"""What `diagnose` says of a layer is what its replacement then does."""

import importlib
import warnings

import pytest
import torch
from torch import Tensor, nn

import schoenbat
from schoenbat import Estimate, MultiheadKernelAttention, PoorEstimateWarning, diagnose, diagnose_tensors
from schoenbat.errors import UserError
from schoenbat.ops._share import _SEEN


def tensors(size: float = 1.0, length: int = 200) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, length, 16, generator=generator).unbind(0)
    return [size * query, key, value]


def share(num_features: int, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> float:
    exact, found = (
        Estimate(num_features=n).attend(query, key, value, is_causal=is_causal) for n in (None, num_features)
    )
    counts = torch.arange(1, query.shape[2] + 1)[:, None]
    uniform = value.cumsum(2) / counts if is_causal else value.mean(2, keepdim=True)
    return float(1 - (found - exact).square().sum() / (exact - uniform).square().sum())


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_share_is_that_of_the_outputs(is_causal: bool) -> None:
    query, key, value = tensors(length=60)
    found = diagnose_tensors(query, key, value, is_causal=is_causal, num_features=(64, 150))
    for num_features in (64, 150):
        own = [head.shares[num_features] for head in found]
        expected = [share(num_features, *(x[:, [h]] for x in (query, key, value)), is_causal) for h in (0, 1)]
        assert own == pytest.approx(expected, abs=1e-3)


def test_arguments_are_described() -> None:
    query, key, value = tensors(2.0)
    found = diagnose_tensors(query, key, value, num_features=(64,))
    scores = query @ key.mT / 4
    for head in (0, 1):
        assert found[head].largest <= float(scores[:, head].abs().max())
        assert found[head].spread == pytest.approx(float(scores[:, head].std(-1).mean()), rel=0.1)


def test_padding_does_not_matter() -> None:
    query, key, value = tensors()
    mask = torch.arange(200).expand(2, -1) < 150
    soiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (key, value)]
    clean = [x[:, :, :150] for x in (key, value)]
    found = diagnose_tensors(query[:, :, :150], *clean, num_features=(64,))
    padded = diagnose_tensors(query, *soiled, key_mask=mask, num_features=(64,))
    for a, b in zip(found, padded, strict=True):
        assert a.shares[64] == pytest.approx(b.shares[64], abs=0.1)


def test_layers_of_torch_and_their_replacements_are_found_by_name() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 80, 32)
    before = diagnose(model, x, num_features=(64,))
    for each in model.layers:
        replaced = MultiheadKernelAttention(32, 4, batch_first=True)
        replaced.load_state_dict(each.self_attn.state_dict())
        each.self_attn = replaced
    after = diagnose(model, x, num_features=(64,))
    names = [f"layers.{i}.self_attn" for i in (0, 1) for _ in range(4)]
    assert [head.layer for head in before] == [head.layer for head in after] == names
    for a, b in zip(before[:4], after[:4], strict=True):
        assert a.shares == pytest.approx(b.shares, abs=1e-4)
    assert "can be replaced with 64 features" in str(before[0])


def test_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(UserError, match="Linear called no attention layer that schoenbat knows"):
        diagnose(nn.Linear(2, 2), torch.ones(1, 2))


def test_a_poor_drop_in_warns_once() -> None:
    query, key, value = tensors(8.0, length=400)
    _SEEN.clear()
    with pytest.warns(PoorEstimateWarning, match=r"256 features explain .* of the attention"):
        schoenbat.dot_product_kernel_attention(query, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schoenbat.dot_product_kernel_attention(query, key, value)
        schoenbat.dot_product_kernel_attention(*tensors(0.5), num_features=128)


def test_models_of_transformers_are_looked_at_through_our_attention() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")
    importlib.import_module("schoenbat.integrations.huggingface")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=60, num_key_value_heads=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="schoenbat")
    found = diagnose(model, torch.randint(0, 60, (2, 90)), num_features=(64,))
    assert [head.layer for head in found] == [f"model.layers.{i}.self_attn" for i in (0, 1) for _ in range(4)]
    assert all(head.needed == 64 for head in found)
