"""`schoenbat.replace`: the cheapest settings that explain enough, in models of transformers and of torch; undone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import schoenbat
from schoenbat import Estimate, MultiheadKernelAttention, UserError
from schoenbat.ops.reference import AttentionInputs
from schoenbat.replacement import candidates_for, cost_of

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
WIDE = {**TEXT, "intermediate_size": 48}
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**WIDE, "max_position_embeddings": 64}),
    "roberta": ("RobertaConfig", {**WIDE, "max_position_embeddings": 66}),
    "vit": ("ViTConfig", {**WIDE, "image_size": 24, "patch_size": 4}),
    "whisper": ("WhisperConfig", {**ENCODER_DECODER, "max_source_positions": 30, "num_mel_bins": 8}),
    "bart": ("BartConfig", {**ENCODER_DECODER, "max_position_embeddings": 64}),
    "llama": ("LlamaConfig", {**WIDE, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {**WIDE, "num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}),
    "mistral": ("MistralConfig", {**WIDE, "num_key_value_heads": 2, "sliding_window": None}),
}


def model_of(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config, settings = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (2, 40), generator=generator)
    if name == "vit":
        return model, {"pixel_values": torch.randn(2, 3, 24, 24, generator=generator)}
    if name == "whisper":
        return model, {"input_features": torch.randn(2, 8, 60, generator=generator), "decoder_input_ids": ids}
    return model, {"input_ids": ids}


def run(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", schoenbat.PoorEstimateWarning)
        out = model(**batch)[0]
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_replaced_saved_loaded_and_undone(name: str, tmp_path: Path) -> None:
    model, batch = model_of(name)
    exact = run(model, batch)
    done = schoenbat.replace(model, batch, share=0.5)
    assert any(choice.estimate.num_features is not None for choice in done.choices)
    assert all(choice.worst >= 0.5 for choice in done.choices)
    out = run(model, batch)
    assert not torch.equal(out, exact)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path).eval(), batch), out)
    done.undo()
    assert torch.equal(run(model, batch), exact)


def test_a_model_that_computes_attention_itself_is_refused() -> None:
    config = transformers.ProphetNetConfig(vocab_size=99, hidden_size=32, num_encoder_layers=1, num_decoder_layers=1)
    with pytest.raises(UserError, match="does not go through the attention interface"):
        schoenbat.replace(transformers.AutoModel.from_config(config), torch.ones(1, 4, dtype=torch.long))


def test_the_cheapest_that_explains_enough_is_chosen() -> None:
    model, batch = model_of("bert")
    few = Estimate(num_features=9, window=2, heavy=1)
    many = Estimate(num_features=9, window=40, heavy=1)
    done = schoenbat.replace(model, batch, share=0.0, candidates=[many, few])
    assert {choice.estimate for choice in done.choices} == {few}
    done.undo()
    done = schoenbat.replace(model, batch, share=0.9999, candidates=[many, few], length=4096)
    assert {choice.estimate for choice in done.choices} == {many}
    assert done.length == 4096
    done.undo()
    done = schoenbat.replace(model, batch, share=1.0, candidates=[few])
    assert {choice.estimate.num_features for choice in done.choices} == {None}
    table = str(done).splitlines()
    assert table[0].split() == ["layer", "setting", "share", "worst", "head", "cost", "at", "40", "tokens"]
    assert table[1].split() == ["encoder.layer.0.attention.self", "exact", "1.000", "1.000", "1.00"]


def test_the_worst_head_of_a_layer_decides() -> None:
    model, batch = model_of("bert")
    few = Estimate(num_features=9, window=2, heavy=1)
    done = schoenbat.replace(model, batch, share=-9.0, candidates=[few])
    done.undo()
    measured = done.choices[0]
    assert measured.worst < measured.share
    between = (measured.worst + measured.share) / 2
    assert schoenbat.replace(model, batch, share=between, candidates=[few]).choices[0].estimate.num_features is None


def test_costs_are_those_of_a_linear_form() -> None:
    inputs = AttentionInputs(*(torch.zeros(1, 1, 8, 32) for _ in range(3)), self_attention=True)
    for estimate in candidates_for(32):
        assert cost_of(estimate, inputs, 32_768) == pytest.approx(cost_of(estimate, inputs, 16_384) / 2)
    costs = [cost_of(Estimate(num_features=33, window=n, heavy=n), inputs, 4096) for n in (8, 16, 32)]
    assert costs == sorted(costs)


@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_of_torch_are_exchanged(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = 3 * torch.randn(30, 30, 32)
    with torch.no_grad():
        exact = model(x)
    names = [name for name, _ in model.named_parameters()]
    done = schoenbat.replace(model, x, share=0.5)
    assert [choice.layer for choice in done.choices] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(isinstance(layer.self_attn, MultiheadKernelAttention) for layer in model.layers)
    assert [name for name, _ in model.named_parameters()] == names
    with torch.no_grad():
        out = model(x)
    assert not torch.equal(out, exact)
    assert (out - exact).norm() < 0.5 * exact.norm()
    done.undo()
    with torch.no_grad():
        assert torch.equal(model(x), exact)


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(UserError, match="share must be at most 1"):
        schoenbat.replace(nn.Linear(2, 2), torch.ones(1, 2), share=2)
    with pytest.raises(UserError, match="candidates must be settings"):
        schoenbat.replace(nn.Linear(2, 2), torch.ones(1, 2), candidates=[])
    with pytest.raises(UserError, match="Linear called no attention layer"):
        schoenbat.replace(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(UserError, match="put this layer into one"):
        schoenbat.replace(nn.MultiheadAttention(8, 2), torch.ones(1, 2, 8))


def test_modules_keep_their_modes() -> None:
    model, batch = model_of("bert")
    model.train()
    model.embeddings.eval()
    modes = [module.training for module in model.modules()]
    done = schoenbat.replace(model, batch, share=1.0, candidates=[Estimate(num_features=9, window=2, heavy=1)])
    assert [module.training for module in model.modules()] == modes
    done.undo()
    assert [module.training for module in model.modules()] == modes
