"""`schoenbat.transfer` with a rank: low-rank updates of queries and keys, what they reach, leave alone and resume."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import schoenbat
from schoenbat import Estimate, UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
huggingface = pytest.importorskip("schoenbat.integrations.huggingface")
lowrank = pytest.importorskip("schoenbat.integrations.lowrank")
huggingface.register("schoenbat-test-low-rank", Estimate(num_features=9, window=4, heavy=2, sinks=1))


def replaced(kind: str) -> nn.Module:
    """Return a model with sharp attention."""
    torch.manual_seed(0)
    size: dict[str, float] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    size["initializer_range"] = 0.15
    if kind == "bert":
        config = transformers.BertConfig(**size, vocab_size=99, max_position_embeddings=64)
        model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    else:
        config = transformers.LlamaConfig(**size, vocab_size=99, num_key_value_heads=2)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, part in model.named_modules():
            if name.endswith((".query", ".key", ".q_proj", ".k_proj")):
                part.weight.mul_(3)
    return huggingface.install(model, "schoenbat-test-low-rank")


def batches_of(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(5, 99, (3, 40), generator=generator)} for _ in range(4)]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 30:] = 0
        if kind == "llama":
            batch["labels"] = batch["input_ids"]
    return batches


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch)
    return out.logits if "logits" in out else out[0]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_layers_come_nearer_to_exact_attention_and_no_weight_changes(kind: str) -> None:
    # A model of chance has nothing to learn but these texts, so they judge as well.
    model, batches = replaced(kind), batches_of(kind)[:1] * 2
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = output(model, batches[1])
    result = schoenbat.transfer(model, batches, 40, rank=4, learning_rate=1e-2)
    assert len(result.layers) == 2
    assert all(after < 0.9 * before for before, after in result.layers.values()), str(result)
    assert len(str(result).splitlines()) == 4
    kept = {name.replace(".base_layer", ""): x for name, x in model.state_dict().items()}
    assert all(torch.equal(x, kept[name]) for name, x in weights.items())
    assert not torch.equal(output(model, batches[1]), before)
    result.undo()
    assert torch.equal(output(model, batches[1]), before)
    assert list(model.state_dict()) == list(weights)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_whole_model_is_fitted_to_itself_or_to_its_own_loss() -> None:
    bert = schoenbat.transfer(replaced("bert"), batches_of("bert")[:1] * 2, 0, rank=4, own_steps=20)
    assert bert.whole[1] < bert.whole[0]
    assert bert.exact == 0
    llama = schoenbat.transfer(replaced("llama"), batches_of("llama")[:1] * 2, 0, rank=4, own_steps=20)
    assert llama.whole[1] < llama.whole[0]
    assert llama.exact > 1


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, whole = batches_of("bert"), replaced("bert")
    expected = schoenbat.transfer(whole, batches, 25, rank=2)
    monkeypatch.setattr(lowrank, "CHECKPOINT_EVERY", 10)
    write, file = lowrank.write_bytes, tmp_path / "state.pt"

    def stop(path: Path, content: bytes) -> None:
        write(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(lowrank, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        schoenbat.transfer(replaced("bert"), batches, 25, rank=2, checkpoint=file)
    monkeypatch.setattr(lowrank, "write_bytes", write)
    assert torch.load(file, weights_only=True)["step"] == 10
    again = replaced("bert")
    assert schoenbat.transfer(again, batches, 25, rank=2, checkpoint=file).layers == expected.layers
    assert torch.equal(output(again, batches[0]), output(whole, batches[0]))


def test_merged_updates_are_saved_with_the_model_and_undone(tmp_path: Path) -> None:
    model, batches = replaced("bert"), batches_of("bert")
    before = copy.deepcopy(model.state_dict())
    result = schoenbat.transfer(model, batches, 10, rank=2, merge=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(output(loaded, batches[0]), output(model, batches[0]))
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    result.undo()
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(x, state[name]) for name, x in before.items())


def test_what_has_no_replaced_layers_is_refused() -> None:
    model = huggingface.uninstall(replaced("bert"))
    with pytest.raises(UserError, match=r"is replaced; call schoenbat\.replace first"):
        schoenbat.transfer(model, batches_of("bert"), 1, rank=2)
    with pytest.raises(UserError, match="low-rank updates are for models of transformers, not for Linear"):
        schoenbat.transfer(nn.Linear(2, 2), batches_of("bert"), 1, rank=2)
