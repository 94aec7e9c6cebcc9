"""`schoenbat.transfer` on models of transformers: what it fits, leaves alone, keeps and saves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import schoenbat
from schoenbat import Estimate, UserError, fitting
from schoenbat.ops.sparse import HeadKernels

transformers = pytest.importorskip("transformers")
huggingface = pytest.importorskip("schoenbat.integrations.huggingface")
huggingface.register("schoenbat-test-transfer", Estimate(num_features=45, window=4, heavy=3, sinks=1))
LOAD = """
import sys, torch, schoenbat.integrations.huggingface
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.load(sys.argv[2]))[0], sys.argv[3])
"""


def replaced(layers: list[str] | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**size, vocab_size=99, max_position_embeddings=64)
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for layer in model.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key):
                part.weight.mul_(14)
    return huggingface.install(model, "schoenbat-test-transfer", layers=layers)


def batches_of(number: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 99, (3, 40), generator=generator) for _ in range(number)]


def has_kernels(model: torch.nn.Module) -> list[bool]:
    return [hasattr(layer.attention.self, "head_kernels") for layer in model.encoder.layer]


def test_transfer_fits_the_replaced_layers_alone_and_no_weight(tmp_path: Path) -> None:
    model, batches = replaced(["encoder.layer.0", "encoder.layer.2"]), batches_of()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    result = schoenbat.transfer(model, [{"input_ids": batch} for batch in batches])
    assert [fit.layer.split(".")[2] for fit in result.layers] == ["0", "2"]
    assert all(fit.gains and len(fit.after) == 4 for fit in result.layers), str(result)
    assert has_kernels(model) == [True, False, True]
    state = model.state_dict()
    assert {name for name in state if name not in weights} == {
        f"encoder.layer.{n}.attention.self.head_kernels.logarithms" for n in (0, 2)
    }
    assert all(torch.equal(x, state[name]) for name, x in weights.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "encoder.layer.2.attention.self" in str(result)

    with torch.no_grad():
        wanted = model(input_ids=batches[0])[0]
    model.save_pretrained(tmp_path / "model")
    torch.save(batches[0], tmp_path / "ids.pt")
    command = [sys.executable, "-c", LOAD, *(str(tmp_path / name) for name in ("model", "ids.pt", "out.pt"))]
    subprocess.run(command, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), wanted)


def test_a_layer_without_gain_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fit = replaced(), fitting._fit

    def spoil(*given: object) -> HeadKernels:
        kernels = fit(*given)
        with torch.no_grad():
            kernels.logarithms[:, 1] = 5.0
        return kernels

    monkeypatch.setattr(fitting, "_fit", spoil)
    result = schoenbat.transfer(model, batches_of(2))
    assert has_kernels(model) == [False] * 3
    assert str(result).count("left as it was") == 3


def test_resume_goes_on_with_layers_that_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole, batches = replaced(), replaced(), batches_of(2)
    schoenbat.transfer(whole, batches)
    fit, calls = fitting._fit, []

    def stop(*given: object) -> HeadKernels:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(given)
        return fit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_fit", stop)
        with pytest.raises(KeyboardInterrupt):
            schoenbat.transfer(model, batches)
    assert has_kernels(model) == [True, False, False]
    first = model.encoder.layer[0].attention.self.head_kernels.logarithms.clone()
    result = schoenbat.transfer(model, batches, resume=True)
    assert [fit.layer.split(".")[2] for fit in result.layers] == ["1", "2"]
    assert has_kernels(model) == [True] * 3
    assert torch.equal(model.encoder.layer[0].attention.self.head_kernels.logarithms, first)
    assert torch.equal(whole.encoder.layer[0].attention.self.head_kernels.logarithms, first)


def test_a_model_without_such_layers_and_too_few_batches_are_refused() -> None:
    with pytest.raises(UserError, match="no layer of Linear has a window"):
        schoenbat.transfer(torch.nn.Linear(2, 2), batches_of(2))
    with pytest.raises(UserError, match="no layer of BertModel has a window"):
        schoenbat.transfer(huggingface.uninstall(replaced()), batches_of(2))
    with pytest.raises(UserError, match="at least 2 batches"):
        schoenbat.transfer(replaced(), batches_of(1))


def test_layers_of_torch_get_kernels_too() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for part in encoder.layers:
            part.self_attn.in_proj_weight[:64].mul_(3)
    batches = list(torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(2)))
    with torch.no_grad():
        exact = encoder(batches[1])
        schoenbat.replace(encoder, batches[0], share=-9.0, candidates=[Estimate(num_features=45, window=4, heavy=3)])
        before = encoder(batches[1])
        result = schoenbat.transfer(encoder, batches)
        after = encoder(batches[1])
    assert [fit.gains for fit in result.layers] == [True, True], str(result)
    assert (after - exact).square().sum() < (before - exact).square().sum()
