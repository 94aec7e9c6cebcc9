"""Attention leaves Python: exported graphs give, at any length, what the eager form gives."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from schoenbat import MultiheadKernelAttention, dot_product_kernel_attention
from schoenbat.estimate import Estimate
from schoenbat.integrations.huggingface import install
from schoenbat.lra.encoder import ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig
from schoenbat.ops.linear import State, attend, extend, fixed_state

TRACED = (2, 40)
NOT_TRACED = [(1, 1), (3, 64), (2, 201)]
"""Batches and lengths; a chunk of causal attention is 64 tokens."""
BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=1, max=1024)
VOCABULARY = 50
Inputs = tuple[Tensor, ...]


class Layer(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.attention = MultiheadKernelAttention(32, 2, num_features=24, batch_first=True)
        self.is_causal = is_causal

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, is_causal=self.is_causal)[0]


class Function(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return dot_product_kernel_attention(
            query, key, value, num_features=24, is_causal=self.is_causal, enable_gqa=True
        )


class Model(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=tokens, attention_mask=mask)[0]


def states(batch: int, length: int) -> Inputs:
    return torch.randn(batch, length, 32), torch.rand(batch, length) < 0.2


def heads(batch: int, length: int) -> Inputs:
    """Queries, and keys and values that two heads of them share."""
    return torch.randn(batch, 4, length, 16), *torch.randn(2, batch, 2, length, 16)


def tokens(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, length // 2 + 1 :] = 0
    return torch.randint(1, VOCABULARY, (batch, length)), mask


def texts(batch: int, length: int) -> Inputs:
    return (torch.randint(0, VOCABULARY, (batch, 1, length)),)


def cell() -> nn.Module:
    return build_model(
        vocab_size=VOCABULARY,
        num_classes=3,
        num_texts=1,
        max_length=1024,
        model=ModelConfig(width=32),
        attn="rmfa-sketch",
        attention={"num_features": 24},
        dotf="exp",
        former="maclauformer",
        former_config=FormerConfig(),
        seed=0,
    )


class Step(nn.Module):
    """One token, after those of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.features = Estimate(num_features=24).make(16)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: State) -> tuple[Tensor, State]:
        return extend(self.features, state, query, key, value, scale=0.25)

    def after(self, tokens: Inputs) -> State:
        return fixed_state(self.features, extend(self.features, None, *tokens, scale=0.25)[1])


def step(is_dynamic: bool) -> tuple[Step, ExportedProgram]:
    module, batch = Step(), {0: BATCH}
    given = (*(x[:, :, :1] for x in heads(2, 1)), module.after(heads(2, 40)))
    shapes = (batch, batch, batch, [[batch] * 4, batch, batch, {}])
    return module, export(module, given, dynamic_shapes=shapes if is_dynamic else None)


def check_steps(module: Step, run: Callable[[Inputs], list[Tensor]], is_dynamic: bool) -> None:
    """Tokens one at a time across the ends of chunks give what the whole gives, after any number of tokens."""
    for batch, length in NOT_TRACED if is_dynamic else [(2, 40)]:
        given = heads(batch, length + 70)
        expected = attend(module.features, *given, None, True, 0.25)
        state = tree_leaves(module.after(tuple(x[:, :, :length] for x in given)))
        for i in range(length, length + 70):
            out, *state = run((*(x[:, :, i : i + 1] for x in given), *state))
            torch.testing.assert_close(out, expected[:, :, i : i + 1], rtol=1e-5, atol=1e-5)


DYNAMIC = pytest.mark.parametrize("is_dynamic", [False, True], ids=["fixed", "dynamic"])


@DYNAMIC
def test_an_exported_step_gives_what_the_whole_gives(is_dynamic: bool) -> None:
    module, program = step(is_dynamic)
    like = tree_structure(module.after(heads(2, 40)))
    graph = program.module()

    def run(given: Inputs) -> list[Tensor]:
        return tree_leaves(graph(*given[:3], tree_unflatten(given[3:], like)))

    check_steps(module, run, is_dynamic)


@pytest.mark.slow
@DYNAMIC
def test_onnxruntime_takes_steps(is_dynamic: bool, tmp_path: Path) -> None:
    module, program = step(is_dynamic)
    session = onnx_session(program, tmp_path)
    names = [entry.name for entry in session.get_inputs()]

    def run(given: Inputs) -> list[Tensor]:
        found = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
        return [torch.from_numpy(x) for x in found]

    check_steps(module, run, is_dynamic)


def onnx_session(program: ExportedProgram, folder: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    converted.save(folder / "model.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx")


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}


def bert() -> nn.Module:
    return Model(install(BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, **SIZES))))


def llama() -> nn.Module:
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, use_cache=False, **SIZES)
    return Model(install(LlamaForCausalLM(config)))


BY_TOKEN, BY_HEAD = {0: BATCH, 1: LENGTH}, {0: BATCH, 2: LENGTH}
Case = tuple[Callable[[], nn.Module], Callable[[int, int], Inputs], tuple[dict[int, Dim], ...]]
CASES: dict[str, Case] = {
    "layer": (lambda: Layer(False), states, (BY_TOKEN, BY_TOKEN)),
    "layer, causal": (lambda: Layer(True), states, (BY_TOKEN, BY_TOKEN)),
    "function": (lambda: Function(False), heads, (BY_HEAD, BY_HEAD, BY_HEAD)),
    "function, causal": (lambda: Function(True), heads, (BY_HEAD, BY_HEAD, BY_HEAD)),
    "cell": (cell, texts, (BY_HEAD,)),
    "bert": (bert, tokens, (BY_TOKEN, BY_TOKEN)),
    "llama": (llama, tokens, (BY_TOKEN, BY_TOKEN)),
}
QUICK = {"layer", "function, causal"}
MARKED = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]


def exported(name: str, is_dynamic: bool) -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    make, inputs, dynamic = CASES[name]
    module = make().eval()
    return module, export(module, inputs(*TRACED), dynamic_shapes=dynamic if is_dynamic else None)


@pytest.mark.parametrize("name", MARKED)
@DYNAMIC
def test_an_exported_graph_gives_what_the_eager_form_gives(name: str, is_dynamic: bool) -> None:
    module, program = exported(name, is_dynamic)
    for batch, length in NOT_TRACED if is_dynamic else [TRACED]:
        given = CASES[name][1](batch, length)
        torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
@DYNAMIC
def test_onnxruntime_gives_what_torch_gives(name: str, is_dynamic: bool, tmp_path: Path) -> None:
    module, program = exported(name, is_dynamic)
    session = onnx_session(program, tmp_path)
    names = [entry.name for entry in session.get_inputs()]
    for batch, length in NOT_TRACED if is_dynamic else [TRACED]:
        given = CASES[name][1](batch, length)
        (found,) = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
        torch.testing.assert_close(torch.from_numpy(found), module(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="AOTInductor needs a compiler")
def test_a_graph_compiled_ahead_of_time_gives_what_torch_gives(tmp_path: Path) -> None:
    name = "layer, causal"
    module, program = exported(name, True)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for batch, length in NOT_TRACED:
        given = CASES[name][1](batch, length)
        torch.testing.assert_close(compiled(*given), module(*given), rtol=1e-5, atol=1e-5)
