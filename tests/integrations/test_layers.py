"""Settings of single layers of transformers models: mixed, saved, loaded in another process, undone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForCausalLM, BartConfig, BertConfig, LlamaConfig, PreTrainedModel

import schoenbat
from schoenbat import Estimate, UserError
from schoenbat.integrations import huggingface, layers
from schoenbat.integrations.huggingface import KernelCache, install, register, uninstall

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
CONFIGS = {
    "bert": BertConfig(**SIZE, max_position_embeddings=64),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "bart": BartConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
    ),
}
SPARSE = Estimate(num_features=9, window=4, heavy=3, sinks=1)
register("schoenbat-test-layers", SPARSE)
LOAD = """
import sys, torch, schoenbat.integrations.huggingface
from transformers import AutoModel, AutoModelForCausalLM
model = getattr(sys.modules["transformers"], sys.argv[1]).from_pretrained(sys.argv[2]).eval()
ids = torch.load(sys.argv[3])
with torch.no_grad():
    torch.save(model(input_ids=ids)[0], sys.argv[4])
"""


def model_of(family: str, head: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    maker = AutoModelForCausalLM if head else AutoModel
    model = maker.from_config(CONFIGS[family], attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def ids_of(length: int = 40) -> torch.Tensor:
    return torch.randint(5, 99, (2, length), generator=torch.Generator().manual_seed(1))


def run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.mark.parametrize(
    "family", ["bert", *(pytest.param(other, marks=pytest.mark.slow) for other in ("llama", "bart"))]
)
@pytest.mark.parametrize("fitted", ["installed", "resampled", "calibrated", "kernels"])
def test_a_saved_model_comes_back_with_the_same_bits(family: str, fitted: str, tmp_path: Path) -> None:
    head = family == "llama"
    model, ids = model_of(family, head), ids_of()
    exact = run(model, ids)
    if fitted == "calibrated":
        register("schoenbat-test-16", Estimate(num_features=16))
        install(model, "schoenbat-test-16")
        schoenbat.calibrate(model, input_ids=ids)
    else:
        install(model, "schoenbat-test-layers")
    for layer in huggingface.attention_layers(model).values():
        features = layers.features_of(layer)
        assert features is not None
        if fitted == "resampled":
            features.resample(torch.Generator().manual_seed(7))  # type: ignore[operator]
        if fitted == "kernels":
            kernels = schoenbat.ops.sparse.HeadKernels(4)
            torch.nn.init.normal_(kernels.logarithms, generator=torch.Generator().manual_seed(3))
            layers.give(layer, SPARSE, features, kernels)
    layers.record(model)
    wanted = run(model, ids)
    assert not torch.equal(wanted, exact)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "model").eval(), ids), wanted)
    if fitted == "kernels":
        torch.save(ids, tmp_path / "ids.pt")
        maker = "AutoModelForCausalLM" if head else "AutoModel"
        command = [sys.executable, "-c", LOAD, maker, *(str(tmp_path / name) for name in ("model", "ids.pt", "out.pt"))]
        subprocess.run(command, check=True, capture_output=True)
        assert torch.equal(torch.load(tmp_path / "out.pt"), wanted)
    assert torch.equal(run(uninstall(model), ids), exact)
    assert not [name for name in model.state_dict() if "kernel" in name and "features" in name]
    model.save_pretrained(tmp_path / "undone")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "undone").eval(), ids), exact)


def test_only_the_layers_named_are_replaced() -> None:
    model, ids = model_of("bert"), ids_of()
    exact = run(model, ids)
    install(model, "schoenbat-test-layers", layers=["encoder.layer.2"])
    last = run(model, ids)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    uninstall(model)
    before = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[2], before[2])
    assert (last - exact).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"unknown layer 'encoder\.layer\.7'"):
        install(model, "schoenbat-test-layers", layers=["encoder.layer.7"])


@pytest.mark.parametrize("exact_layers", [[], ["model.layers.1"]])
def test_generates_with_a_state_as_in_parallel(exact_layers: list[str]) -> None:
    model, ids = model_of("llama", head=True), ids_of(30)
    kept = [f"model.layers.{i}" for i in range(3) if f"model.layers.{i}" not in exact_layers]
    install(model, "schoenbat-test-layers", layers=kept)
    whole = run(model, ids)
    cache, parts = KernelCache(), []
    with torch.no_grad():
        for part in ids.split([11, 1, 1, 7, 10], 1):
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    generated = model.generate(ids, max_new_tokens=12, do_sample=False, past_key_values=KernelCache())
    assert torch.equal(generated[:, 30:], run(model, generated)[:, 29:-1].argmax(-1))
    with pytest.raises(UserError, match="generate with KernelCache"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
