"""schoenbat inside what other people's projects are made of; docs/integrations.md is the table of it.

A library that `make setup` does not install is asked for in the test that needs it, which is skipped without.
"""

import copy
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from schoenbat import Estimate, MultiheadKernelAttention, UserError, dot_product_kernel_attention
from schoenbat.integrations.huggingface import install, register

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/integrations.md"
WIDTH, HEADS, TOKENS = 16, 2, 12
PROCESSES = 2


class Block(nn.Module):
    """Self-attention with projections of its own, as models of transformers have them, and through the function."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = dot_product_kernel_attention(q, k, v, num_features=32, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    """A layer of torch's encoder whose attention is ours, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layer.self_attn = MultiheadKernelAttention(WIDTH, HEADS, batch_first=True, num_features=32)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def inputs(batch: int = 4) -> Tensor:
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def llama() -> Any:
    """A tiny Llama with features of its own in each layer."""
    transformers = pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = transformers.LlamaConfig(vocab_size=40, eos_token_id=None, **sizes)
    model = seeded(lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()
    register("ecosystem", Estimate(num_features=32))
    install(model, "ecosystem")
    return model


PATHS = {"path": "train", "dev_path": "dev", "test_path": "test"}
WORDS = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 40


# The table.


def test_the_page_names_a_test_for_each_row() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1:]
    assert sum(state == "works" for _, state, _ in rows) >= 20
    for what, state, tests in rows:
        assert state in ("works", "refused"), what
        path = Path(__file__)
        named = re.findall(r"`(\S+)`", tests)
        assert named, what
        for name in named:
            if name.endswith(".py"):
                path = ROOT / name
                assert path.exists(), name
            else:
                assert re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), name
                path = Path(__file__)


# torch.


@pytest.mark.parametrize("build", [Model, Block])
def test_a_deep_copy_is_the_same_and_apart(build: Callable[[], nn.Module]) -> None:
    model, x = seeded(build), inputs()
    before = model(x)
    again = copy.deepcopy(model)
    assert torch.equal(again(x), before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kernel", ["exp", "inverse"])
def test_a_pickled_model_is_the_same(kernel: str) -> None:
    model = seeded(lambda: MultiheadKernelAttention(WIDTH, HEADS, batch_first=True, kernel=kernel, normalize=True))
    x = inputs()
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, x, x)[0], model(x, x, x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_near_to_float32(dtype: torch.dtype) -> None:
    model, x = seeded(Model).train(), inputs()
    expected = model(x)
    with torch.autocast("cpu", dtype):
        out = model(x)
    assert out.dtype == dtype
    assert (out - expected).norm() < 0.02 * expected.norm()
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_dynamic_int8_of_the_linear_layers_is_near() -> None:
    model, x = seeded(Block).eval(), inputs()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert type(quantised.q_proj).__module__.startswith("torch.ao")
    assert (quantised(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_jagged_tensors_are_refused_in_one_line() -> None:
    x = torch.nested.nested_tensor([inputs()[0], inputs()[1, :5]], layout=torch.jagged)
    with pytest.raises(UserError, match="nested tensors are not supported"):
        MultiheadKernelAttention(WIDTH, HEADS, batch_first=True)(x, x, x)
    heads = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    with pytest.raises(UserError, match="nested tensors are not supported"):
        dot_product_kernel_attention(heads, heads, heads)


def test_weights_travel_in_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = seeded(Model), Model()
    other.layer.self_attn.features.reset_parameters()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    assert safetensors.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(other(inputs()), model(inputs()))


# Several processes.


def _one_process(rank: int, port: int, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(PROCESSES)}
    torch.distributed.init_process_group("gloo")
    work()
    torch.distributed.destroy_process_group()


def in_two_processes(work: Callable[[], None]) -> None:
    """Run `work` in two processes that are connected by gloo; raise what one of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_process, (port, work), nprocs=PROCESSES)


def step(model: nn.Module, x: Tensor) -> None:
    """One step of training on the mean square of the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()


def stepped(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The weights after one step on the whole batch, in one process."""
    model = seeded(build)
    step(model, inputs())
    return model.state_dict()


def part() -> Tensor:
    """The half of the batch that belongs to this process."""
    return inputs().chunk(PROCESSES)[torch.distributed.get_rank()]


def _train_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(seeded(Model))
    step(model, part())
    torch.testing.assert_close(model.module.state_dict(), stepped(Model))


def _train_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    model = seeded(Model)
    fully_shard(model.layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, part())
    assert isinstance(model.layer.self_attn.in_proj_weight, DTensor)
    gathered = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in model.state_dict().items()}
    torch.testing.assert_close(gathered, stepped(Model))


def _train_tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj": RowwiseParallel()}
    model = parallelize_module(seeded(Block), mesh, plan)
    assert model.q_proj.weight.to_local().shape == (WIDTH // PROCESSES, WIDTH)
    step(model, inputs())
    gathered = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
    torch.testing.assert_close(gathered, stepped(Block))


@pytest.mark.slow
@pytest.mark.parametrize("work", [_train_ddp, _train_fsdp, _train_tensor_parallel])
def test_two_processes_train_as_one_does(work: Callable[[], None]) -> None:
    in_two_processes(work)


# The libraries of Hugging Face, and lightning.


def test_a_lora_trains_on_the_projections_of_a_model_with_ours() -> None:
    peft = pytest.importorskip("peft", reason="peft (extra oracles) is not installed")
    model = llama()
    exact = model(WORDS).logits
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(tuned(WORDS).logits, exact), "an adapter begins with nothing"
    loss = tuned(WORDS, labels=WORDS).loss
    loss.backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(trained) == 4
    assert all("lora_B" in name for name in trained)


def test_a_lora_on_the_parameters_of_the_module_trains() -> None:
    peft = pytest.importorskip("peft", reason="peft (extra oracles) is not installed")
    model, x = seeded(Model), inputs()
    before = model(x)
    config = peft.LoraConfig(r=2, target_parameters=["self_attn.in_proj_weight"])
    tuned = peft.get_peft_model(model, config)
    torch.testing.assert_close(tuned(x), before)
    tuned(x).square().mean().backward()
    trained = [name for name, p in tuned.named_parameters() if p.grad is not None and p.grad.any()]
    assert trained
    assert all("lora_B" in name for name in trained)


def test_an_empty_model_is_dispatched_with_its_weights(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate (extra oracles) is not installed")
    safetensors = pytest.importorskip("safetensors.torch")
    model = seeded(Model).eval()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    with accelerate.init_empty_weights():
        empty = Model().eval()
    assert empty.head.weight.is_meta
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(loaded(inputs()), model(inputs()))


def test_accelerate_prepares_a_model_and_trains_it() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate (extra oracles) is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = seeded(Model)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(inputs()).square().mean())
    optimizer.step()
    torch.testing.assert_close(accelerator.unwrap_model(model).state_dict(), stepped(Model))


def test_lightning_trains_and_its_checkpoint_comes_back(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning (extra oracles) is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = seeded(Model)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(list(inputs()), batch_size=4))
    torch.testing.assert_close(module.model.state_dict(), stepped(Model))
    trainer.save_checkpoint(tmp_path / "checkpoint")
    again = Module.load_from_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(again.model(inputs()), module.model(inputs()))


def test_a_model_of_ones_own_goes_to_the_hub_and_back(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="transformers (extra hf) is not installed")

    class Shared(Model, hub.PyTorchModelHubMixin):
        pass

    model = seeded(Shared)
    model.save_pretrained(tmp_path)
    assert torch.equal(Shared.from_pretrained(str(tmp_path))(inputs()), model.eval()(inputs()))


def test_a_model_of_transformers_comes_back_through_auto_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(WORDS).logits, model(WORDS).logits)


def test_a_data_set_of_hugging_face_is_a_task(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets (extra oracles) is not installed")
    from schoenbat.lra.data.arrays import Dataset
    from schoenbat.lra.tasks import TASKS

    rows = [{"text": f"film {number} is {word}", "label": word} for number in range(20) for word in ("good", "bad")]
    for split, part_of in (("train", rows[:24]), ("dev", rows[24:32]), ("test", rows[32:])):
        datasets.Dataset.from_list(part_of).to_parquet(str(tmp_path / f"{split}.parquet"))
    table = TASKS.get("table")
    paths = {name: str(tmp_path / f"{split}.parquet") for name, split in PATHS.items()}
    task = table(table.Config(**paths))
    (tmp_path / "raw").mkdir()
    task.download(tmp_path / "raw", None, None, None)
    assert task.prepare(tmp_path / "raw", tmp_path / "prepared")["splits"] == {"train": 24, "dev": 8, "test": 8}
    assert Dataset(tmp_path / "prepared").meta["class_names"] == ["bad", "good"]
