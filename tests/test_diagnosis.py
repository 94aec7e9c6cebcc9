"""What `diagnose` says of a layer is what its replacement then does."""

import importlib
import re
import statistics
import warnings
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import schoenbat
from schoenbat import Estimate, MultiheadKernelAttention, PoorEstimateWarning, calibrate, diagnose, diagnose_tensors
from schoenbat.errors import UserError
from schoenbat.estimate import _COMPARED


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


def test_effective_keys_count_those_that_get_weight() -> None:
    """Of 200 keys: all where weights are uniform, one where one is far larger, and 4 where 4 are alike so."""
    _, key, value = tensors()
    uniform = diagnose_tensors(torch.zeros_like(key), key, value, num_features=(64,))
    assert [head.effective_keys for head in uniform] == pytest.approx([200, 200])
    for number in (1, 4):
        key = torch.zeros_like(key)
        key[:, :, 17 : 17 + number] = 20.0
        found = diagnose_tensors(torch.ones_like(key), key, value, num_features=(64,))
        assert [head.effective_keys for head in found] == pytest.approx([number, number])
        assert f"{number} effective keys" in str(found[0])


@pytest.mark.parametrize("is_causal", [False, True])
def test_settings_with_near_and_heavy_keys_are_compared(is_causal: bool) -> None:
    query, key, value = tensors(3.0, length=100)
    settings = [Estimate(num_features=64), Estimate(num_features=64, window=8, heavy=8), Estimate(num_features=None)]
    how = {"is_causal": is_causal, "self_attention": True}
    found = diagnose_tensors(query, key, value, **how, estimates=settings)
    counts = torch.arange(1, 101)[:, None]
    uniform = value.cumsum(2) / counts if is_causal else value.mean(2, keepdim=True)
    rows = torch.linspace(0, 99, 64).long()
    exact = settings[-1].attend(query, key, value, **how)
    for setting in settings:
        error = (setting.attend(query, key, value, **how) - exact)[:, :, rows].square().sum((0, 2, 3))
        expected = 1 - error / (exact - uniform)[:, :, rows].square().sum((0, 2, 3))
        assert [head.shares[setting] for head in found] == pytest.approx(expected.tolist(), abs=1e-3)
    assert all(list(head.shares) == settings for head in found)
    # Causal attention is exact within a chunk of 64 tokens without a window, too.
    assert is_causal or all(head.shares[settings[1]] > head.shares[settings[0]] + 0.1 for head in found)
    assert all(head.needed == next(s for s in settings if head.shares[s] >= 0.9) for head in found)
    assert "window 8, 8 heavy keys, 64 features 0." in str(found[0])
    assert diagnose_tensors(query, key, value, **how, estimates=settings[1:]) != found


def test_the_settings_of_a_layer_are_compared_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True), 2)
    settings = [Estimate(num_features=16, window=8), Estimate(num_features=64)]
    found = diagnose(model, torch.randn(2, 80, 32), estimates=settings)
    assert len(found) == 8
    assert all(list(head.shares) == settings and head.needed == settings[0] for head in found)
    assert "It can be replaced with window 8, 16 features." in str(found[0])
    assert model.training


def test_a_model_is_shown_as_a_table_of_layers_and_a_picture_of_heads() -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2, enable_nested_tensor=False
    )
    setting = Estimate(num_features=9, window=8, heavy=2)
    found = diagnose(model, torch.randn(2, 80, 32), estimates=[Estimate(num_features=64), setting])
    table = str(found).splitlines()
    assert len(table) == 4
    assert table[1].split("  ")[-1] == "window 8, 2 heavy keys, 9 features"
    shares = [head.shares[setting] for head in found.layers["layers.1.self_attn"]]
    assert table[3].startswith("layers.1.self_attn ")
    assert table[3].endswith(f"{statistics.median(shares):.2f}, {min(shares):.2f}")
    picture = ElementTree.fromstring(found.picture(setting))
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in found.layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert [f"{head.shares[setting]:.2f}" for head in found] == [
        text for text in texts if re.fullmatch(r"-?[0-9.]+", text)
    ]
    assert found.picture() == found.picture(setting)
    with pytest.raises(UserError, match="128 features were not measured; choose from: 64 features; window 8"):
        found.picture(128)


@pytest.mark.parametrize("estimates", [64, (), [64], Estimate()])
def test_settings_to_try_are_estimates(estimates: Any) -> None:
    with pytest.raises(UserError, match="estimates must be settings to try, such as"):
        diagnose_tensors(*tensors(), estimates=estimates)


def test_self_attention_of_vectors_that_share_a_mean_is_looked_at_as_it_is_computed() -> None:
    """Without that, the estimate around the mean query, which explains most, would be told to explain little."""
    torch.manual_seed(0)
    layer = MultiheadKernelAttention(64, 1, batch_first=True)
    with torch.no_grad():
        layer.in_proj_bias.normal_(std=4.0)
    x = torch.randn(2, 150, 64)
    others = torch.randn(2, 150, 64)
    for key, least, most in ((x, 0.75, 1.0), (others, -0.05, 0.4)):
        seen, outputs = [], []
        handle = layer.out_proj.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        (head,) = diagnose(layer, x, key, key, num_features=(256,))
        handle.remove()
        exact = MultiheadKernelAttention(64, 1, batch_first=True, num_features=None)
        exact.load_state_dict(layer.state_dict(), strict=False)
        handle = exact.out_proj.register_forward_pre_hook(lambda _, given, outputs=outputs: outputs.append(given[0]))
        exact(x, key, key)
        handle.remove()
        uniform = exact._project(x, key, key)[2].mean(1, keepdim=True)
        error, distance = ((outputs[0] - other).square().sum() for other in (seen[0], uniform))
        assert head.shares[256] == pytest.approx(float(1 - error / distance), abs=0.1)
        assert least < head.shares[256] < most


@pytest.mark.parametrize("is_causal", [False, True])
def test_queries_that_are_padding_are_not_looked_at(is_causal: bool) -> None:
    query, key, value = tensors()
    mask = torch.arange(200).expand(2, -1) < torch.tensor([[200], [140]])
    how = {"key_mask": mask, "is_causal": is_causal, "self_attention": True, "num_features": (64,)}
    clean = diagnose_tensors(query, key, value, **how)
    soiled = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (query, key, value))
    assert diagnose_tensors(*soiled, **how) == clean
    assert all(0 < head.shares[64] < 1 for head in clean)


def test_a_normalised_layer_is_looked_at_with_its_own_draw() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 100, 32)
    layer = MultiheadKernelAttention(32, 1, batch_first=True, kernel="inverse", normalize=True, num_features=32)
    (head,) = diagnose(layer, x, x, x, num_features=(32,))
    q, k, v = (part.unsqueeze(1) for part in layer._project(x, x, x))
    expected = diagnose_tensors(q, k, v, self_attention=True, estimate=layer.estimate, num_features=(32,))
    exact, found = (Estimate("inverse", n, normalize=True).attend(q, k, v, self_attention=True) for n in (None, 32))
    share = 1 - (found - exact).square().sum() / (exact - v.mean(2, keepdim=True)).square().sum()
    assert head.shares[32] == pytest.approx(float(share), abs=0.05)
    assert head.shares == expected[0].shares


def test_a_calibrated_layer_is_looked_at_in_its_basis() -> None:
    torch.manual_seed(0)
    layer = MultiheadKernelAttention(64, 2, batch_first=True, num_features=16)
    with torch.no_grad():
        layer.in_proj_weight[:128] *= 10
    x = torch.randn(4, 150, 64) * torch.arange(1, 65) ** -0.75
    before = diagnose(layer, x, x, x, num_features=(16, 32))
    (done,) = calibrate(layer, x, x, x)
    assert done.max_degree is not None
    assert done.after > done.before + 0.2
    after = diagnose(layer, x, x, x, num_features=(16, 32))
    for a, b in zip(before, after, strict=True):
        assert b.shares[16] > a.shares[16] + 0.1
        assert b.shares[32] >= b.shares[16] - 0.05
        assert b.largest == pytest.approx(a.largest, rel=1e-3)
    mean = sum(head.shares[16] for head in after) / 2
    assert mean == pytest.approx(done.after, abs=0.1)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_of_torch_in_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True), torch.randn(2, 80, 32)
    expected = diagnose(layer, x, num_features=(64,))
    found = diagnose(layer.to(dtype), x.to(dtype), num_features=(64,))
    for a, b in zip(expected, found, strict=True):
        assert a.shares[64] == pytest.approx(b.shares[64], abs=0.02)


def test_a_trained_encoder_of_torch_with_padding_is_looked_at_as_it_is() -> None:
    """In eval mode it makes nested tensors of padded inputs, which no layer takes that is watched."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), torch.randn(2, 80, 32)
    padding = torch.arange(80) >= torch.tensor([[80], [50]])
    expected = diagnose(model, x, src_key_padding_mask=padding, num_features=(64,))
    assert diagnose(model.eval(), x, src_key_padding_mask=padding, num_features=(64,)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_attention_of_torch_that_schoenbat_does_not_have_is_an_error(option: str) -> None:
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True, **{option: True}), torch.randn(2, 80, 32)
    with pytest.raises(UserError, match="add_bias_kv and add_zero_attn are not supported"):
        diagnose(layer, x, x, x)


def test_a_model_without_attention_is_an_error() -> None:
    with pytest.raises(UserError, match="Linear called no attention layer that schoenbat knows"):
        diagnose(nn.Linear(2, 2), torch.ones(1, 2))


@pytest.mark.parametrize("num_features", [64, (), (64, None)])
def test_budgets_are_numbers_of_features(num_features: Any) -> None:
    message = "num_features must be the numbers of features to try"
    with pytest.raises(UserError, match=message):
        diagnose_tensors(*tensors(), num_features=num_features)
    with pytest.raises(UserError, match=message):
        diagnose(MultiheadKernelAttention(8, 1), *torch.ones(3, 1, 9, 8), num_features=num_features)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    query, key, value = tensors()
    with pytest.raises(UserError, match="do not fit together"):
        diagnose_tensors(query[0], key[0], value[0])


def test_a_drop_in_worse_than_uniform_weights_is_said_to_explain_nothing() -> None:
    query, key, value = tensors(30.0)
    _COMPARED.set(frozenset())
    with pytest.warns(PoorEstimateWarning, match="^64 features explain nothing of the attention of this batch"):
        schoenbat.dot_product_kernel_attention(query, key, value, estimator="maclaurin", num_features=64)


def test_a_poor_drop_in_warns_once() -> None:
    query, key, value = tensors(8.0, length=400)
    _COMPARED.set(frozenset())
    with pytest.warns(PoorEstimateWarning, match=r"256 features explain .* of the attention"):
        schoenbat.dot_product_kernel_attention(query, key, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schoenbat.dot_product_kernel_attention(query, key, value)
        schoenbat.dot_product_kernel_attention(*tensors(0.5), num_features=128)


def test_no_warning_where_self_attention_is_explained() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, means = torch.randn(4, 1, 2, 200, 64, generator=generator).unbind(0)
    query, key = query + 3 * means[:, :, :1], key + 3 * means[:, :, 1:2]
    _COMPARED.set(frozenset())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schoenbat.dot_product_kernel_attention(query, key, value, self_attention=True)
    _COMPARED.set(frozenset())
    with pytest.warns(PoorEstimateWarning):
        schoenbat.dot_product_kernel_attention(query, key, value)


def test_a_share_is_the_same_whatever_the_padding() -> None:
    inputs = [x[:1] for x in tensors(length=60)]
    padded = [nn.functional.pad(x, (0, 0, 0, 40), value=2.0) for x in inputs]
    mask = torch.arange(100)[None] < 60
    short = diagnose_tensors(*inputs, self_attention=True, num_features=(64,))
    found = diagnose_tensors(*padded, mask, self_attention=True, num_features=(64,))
    # Other queries are looked at.
    assert [head.shares[64] for head in found] == pytest.approx([head.shares[64] for head in short], abs=0.05)


def test_padding_hides_no_warning() -> None:
    query, key, value = tensors(8.0, length=400)
    mask = torch.arange(400).expand(2, -1) < 300
    soiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (query, key, value)]
    _COMPARED.set(frozenset())
    with pytest.warns(PoorEstimateWarning, match="256 features explain"):
        schoenbat.dot_product_kernel_attention(*soiled, key_mask=mask, self_attention=True)


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_plain_models_of_transformers_are_looked_at_and_stay_as_they_are(family: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[family](vocab_size=60, **sizes)
    ids = torch.randint(0, 60, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(90) < torch.tensor([[90], [70]])).long()

    def model(attention: str) -> Any:
        torch.manual_seed(0)
        return transformers.AutoModel.from_config(config, attn_implementation=attention)

    plain = model(attention)
    plain.eval()
    before = plain(ids, attention_mask=mask)[0]
    plain.train()
    found = diagnose(plain, ids, attention_mask=mask, num_features=(64,))
    assert plain.config._attn_implementation == attention
    assert plain.training
    assert torch.equal(plain.eval()(ids, attention_mask=mask)[0], before)
    importlib.import_module("schoenbat.integrations.huggingface")
    expected = diagnose(model("schoenbat"), ids, attention_mask=mask, num_features=(64,))
    assert [(head.layer, head.head) for head in found] == [(head.layer, head.head) for head in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.shares[64] == pytest.approx(b.shares[64], abs=0.02)
        assert a.effective_keys == pytest.approx(b.effective_keys, rel=0.01)


def test_a_model_with_parts_that_attend_otherwise_gets_all_of_them_back() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")
    importlib.import_module("schoenbat.integrations.huggingface")
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 60, **text}, vision_config={"image_size": 32, "patch_size": 8, **text}
    )
    model = transformers.CLIPModel._from_config(
        config, attn_implementation={"text_config": "schoenbat", "vision_config": "eager"}
    )
    given = {"input_ids": torch.randint(3, 60, (2, 20)), "pixel_values": torch.randn(2, 3, 32, 32)}
    for _ in range(2):
        found = diagnose(model, **given, num_features=(64,))
        assert len({head.layer for head in found}) == 2
        assert model.text_model.config._attn_implementation == "schoenbat"
        assert model.vision_model.config._attn_implementation == "eager"


def test_a_calibrated_model_of_transformers_is_looked_at_in_its_bases() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra schoenbat[hf]")
    module = importlib.import_module("schoenbat.integrations.huggingface")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=60, **sizes)
    module.register("diagnosed", Estimate(num_features=16))
    model = transformers.AutoModel.from_config(config, attn_implementation="diagnosed").eval()
    with torch.no_grad():
        for layer in model.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight.mul_(60 * torch.arange(1, 65) ** -1.0)
    ids = torch.randint(0, 60, (4, 90))
    before = diagnose(model, ids, num_features=(16,))
    done = calibrate(model, ids)
    after = diagnose(model, ids, num_features=(16,))
    assert all(layer.max_degree is not None for layer in done)
    assert len(before) == len(after) == 4
    for number, layer in enumerate(done):
        own = [head.shares[16] for head in after[2 * number : 2 * number + 2]]
        assert sum(own) / 2 == pytest.approx(layer.after, abs=0.1)
    assert sum(head.shares[16] for head in after) > sum(head.shares[16] for head in before)
