"""Trained models whose attention is replaced: what is measured, by which stage, and what the report shows."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from project_folder import Project
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.grid.freshness import PAPERS, REVIEWS, Freshness, data_folder, summary_file
from pipeline.grid.params import ReplacementParams, load_params
from pipeline.grid.results import Replaced
from pipeline.host.files import write_json
from pipeline.stages import replace
from schoenbat.errors import UserError
from schoenbat.integrations import huggingface
from schoenbat.lra.data.arrays import SPLITS, write_dataset
from schoenbat.lra.tasks import byte_tokens
from schoenbat.ops.reference import AttentionInputs

Invoke = Callable[..., tuple[int, str, str]]

WORDS = [f"w{i}" for i in range(50)]
CELLS = {
    "bert-exact": {},
    "bert-complete": {"estimate": {"window": 32, "heavy": 32, "num_features": 561}},
    "bert-share": {"share": 0.95},
    "bert-published": {"estimate": {"num_features": 64, "estimator": "maclaurin"}, "draws": 2},
    "bert-fitted": {"estimate": {"window": 4, "heavy": 2, "num_features": 33}, "fit": True},
    "bert-mean": {"attention": "mean"},
    "bert-landmarks": {"attention": "nystromformer", "options": {"num_landmarks": 8}},
    "llama-exact": {},
    "llama-near": {"estimate": {"window": 16, "heavy": 8, "num_features": 65}},
    "llama-bare": {"estimate": {"window": 16, "num_features": 65}, "bare": True},
    "llama-mean": {"attention": "mean"},
}


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, intermediate_size=32, **sizes)).eval()


def make_models(folder: Path) -> dict[str, dict[str, object]]:
    """Write two small models with their tokenizer, and return their sections of params.yaml."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Sharp enough that uniform weights are no good estimate.
    config = BertConfig(vocab_size=60, max_position_embeddings=64, initializer_range=0.1, **sizes)
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), special, strict=True))
    sections: dict[str, dict[str, object]] = {}
    for name, model, own in (
        ("bert", BertModel(config), {"texts": 4, "tokens": 48}),
        ("llama", make_llama(), {"texts": 2, "tokens": 100, "causal": True}),
    ):
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / name)
        digest = hashlib.sha256((folder / name / "model.safetensors").read_bytes())
        sections[name] = {"source": str(folder / name), "sha256": digest.hexdigest(), "install": "no way", **own}
    return sections


def make_texts(settings: dict[str, object]) -> None:
    """Prepare short reviews, which are padded, and long papers, as the stage `preprocess` would leave them."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    texts = {REVIEWS: [text(20 + 5 * i) for i in range(40)], PAPERS: [text(300) for _ in range(6)]}
    freshness = Freshness(settings)
    for task, of_task in texts.items():
        examples = [[i] if task == REVIEWS else [i, (i + 1) % len(of_task)] for i in range(len(of_task))]
        labels = [i % 2 for i in range(len(of_task))]
        known = {"task": task, "num_classes": 2, "vocab_size": 257, "num_texts": len(examples[0]), "notes": []}
        meta = write_dataset(
            data_folder("tiny", task),
            [byte_tokens(each.encode()) for each in of_task],
            dict.fromkeys(SPLITS, (examples, labels)),  # type: ignore[arg-type]
            known | {"max_length": 4000, "label": "made up", "source": "made up"},
        )
        write_json(summary_file("tiny", task), {**meta, "baselines": {}, "made_from": freshness.made_from(task)})


@pytest.fixture
def replacing(project: Project) -> Project:
    """A project of small models, and no cells that are trained."""
    task = project.settings["task"]["lra-text"]
    project.settings["task"] = {REVIEWS: task, PAPERS: {**task, "data": {"max_length": 4000}}}
    project.set("grid.tasks", [REVIEWS, PAPERS])
    for half in ("plain", "kernel"):
        project.set(f"grid.{half}", {axis: [] for axis in project.settings["grid"][half]})
    project.set("trained", {"lengths": [40], "model": make_models(Path("models")), "cells": CELLS})
    make_texts(project.settings)
    return project


def test_each_method_is_measured_once_and_stands_in_the_report(
    replacing: Project, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing.set("bench", {"lengths": [], "repeats": 1, "threads": 1})
    for cell in CELLS:
        code, _, err = invoke("replace", "--cell", cell)
        assert code == 0, err
    assert Freshness(replacing.settings).cell_stages([]) == {f"replace@tiny-{cell}": True for cell in CELLS}
    found = {cell: Replaced("tiny", cell).read() for cell in CELLS}
    means = {
        cell: {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        for cell, (rows, _) in found.items()
    }
    heads = {cell: about["heads"] for cell, (_, about) in found.items()}
    assert {cell: len(rows) for cell, (rows, _) in found.items()} == {c: 4 if c[0] == "b" else 2 for c in CELLS}
    assert means["bert-exact"]["cosine"] == pytest.approx(1, abs=1e-5)
    assert min(heads["bert-exact"]) == pytest.approx(1, abs=1e-4)
    # Where padding were attended to as well, neither would hold.
    assert min(heads["bert-complete"]) > 0.99
    assert max(heads["bert-mean"]) == pytest.approx(0, abs=1e-3)
    assert means["bert-mean"]["cosine"] < means["bert-complete"]["cosine"]
    assert found["bert-published"][1]["spreads"]["cosine"] > 0
    assert found["bert-mean"][1]["spreads"]["cosine"] is None
    assert {layer["num_features"] for layer in found["bert-share"][1]["layers"]} <= {None, 33, 256, 561}
    assert abs(means["llama-near"]["loss"] - means["llama-exact"]["loss"]) < 0.1
    assert means["llama-bare"]["loss"] == pytest.approx(math.log(60), rel=0.3)
    replacing.set("grid.seeds", [0])
    assert invoke("bench")[0] == 0
    times = [line.split(",") for line in Path("runs/tiny/bench-trained.csv").read_text().splitlines()]
    assert [row[0] for row in times[1:]] == [cell for cell in sorted(CELLS) if cell != "llama-bare"]
    assert invoke("report")[0] == 0
    table = Path("reports/tiny/tables/trained-bert.md").read_text()
    assert [f"| {cell.partition('-')[2]} " in table for cell in CELLS if cell[0] == "b"] == [True] * 7
    assert "+0.000 to +0.000" in table
    assert Path("reports/tiny/figures/trained.svg").is_file()
    # The best of each kind, whatever it is, is the one that the answer names.
    kinds = {
        "of ours without training": ("complete", "share"),
        "of ours with fitted kernels or updates": ("fitted",),
        "of the others": ("mean", "landmarks", "published"),
    }
    answer = Path("reports/tiny/findings.md").read_text()
    for kind, names in kinds.items():
        best = max(names, key=lambda name: means[f"bert-{name}"]["cosine"])
        assert f"the best {kind}, {best}, has {means[f'bert-{best}']['cosine']:.3f} (" in answer
    assert json.loads(invoke("results", "--json")[1])["trained"]["bert-mean"] == pytest.approx(means["bert-mean"])
    assert invoke("golden", "golden.npz", "--cell", "bert-mean", "--cell", "llama-mean")[0] == 0
    with np.load("golden.npz") as golden:
        assert {name.partition("/")[0] for name in golden} == {"bert-mean", "llama-mean"}
    monkeypatch.delattr(replace, "embed")
    code, out, err = invoke("replace", "--cell", "bert-mean")
    assert (code, out) == (0, "bert-mean: up to date; --force measures it again\n"), err
    # It would measure, and what it measures with is gone.
    assert invoke("replace", "--cell", "bert-mean", "--force")[0] == 1
    replacing.set("trained.cells.bert-mean", {"attention": "linear"})
    assert not Freshness(replacing.settings).is_replaced("bert-mean")


def test_another_file_than_the_model_is_not_used(replacing: Project, invoke: Invoke) -> None:
    file = Path("models/bert/model.safetensors")
    save_file({name: 2 * value for name, value in load_file(file).items()}, file, {"format": "pt"})
    code, _, err = invoke("replace", "--cell", "bert-mean")
    assert code == 3
    assert "models/bert/model.safetensors has the SHA-256" in err
    assert not Path("runs/tiny/trained").exists()


def test_a_missing_model_is_one_line_that_says_what_to_install(replacing: Project, invoke: Invoke) -> None:
    replacing.set("trained.model.bert.source", "no_such_package/model.zip")
    code, _, err = invoke("replace", "--cell", "bert-mean")
    assert (code, len(err.splitlines())) == (3, 1)
    assert err.endswith(
        "trained.model.bert: no_such_package/model.zip is neither a folder nor in an installed package; no way\n"
    )


def test_a_grid_plans_what_is_not_measured(replacing: Project, invoke: Invoke) -> None:
    replacing.add_dvc()
    make_texts(replacing.settings)
    assert invoke("replace", "--cell", "bert-mean")[0] == 0
    planned = json.loads(invoke("run", "--grid", "--dry-run", "--json")[1])
    stages = {job["job"]: job["stages"] for job in planned["jobs"]}
    due = [cell for cell in sorted(CELLS) if cell != "bert-mean"]
    assert [name for name in stages if name in CELLS] == due
    assert [stages[name] for name in due] == [[f"replace@tiny-{name}"] for name in due]
    assert "report@tiny" in stages
    assert "replace@tiny-bert-mean" in planned["to_record"]
    chosen = json.loads(invoke("run", "--cell", "bert-share", "--dry-run", "--json")[1])["jobs"]
    assert [job["job"] for job in chosen] == ["bert-share", "report@tiny"]
    rows = {row["cell"]: row["state"] for row in json.loads(invoke("status", "--json")[1])["cells"]}
    assert rows == {cell: "done" if cell == "bert-mean" else "to run" for cell in CELLS}


@pytest.mark.parametrize(
    ("cell", "settings", "message"),
    [
        ("gpt-mean", {}, "MODEL-METHOD"),
        ("bert-both", {"share": 0.9, "attention": "mean"}, "one of estimate, share and attention"),
        ("bert-odd", {"estimate": {"windows": 3}}, "unknown argument of estimate 'windows'; choose one of: window"),
        ("bert-odd", {"attention": "informer"}, "unknown attention 'informer'"),
        ("bert-odd", {"fit": True}, "bare, fit and rank are for an estimate"),
        ("bert-odd", {"estimate": {"window": 4}, "rank": 2}, "a rank takes steps or own_steps"),
        ("bert-odd", {"estimate": {"window": 4}, "steps": 2}, "and these a rank"),
    ],
)
def test_what_is_no_way_to_attend_is_refused(
    replacing: Project, cell: str, settings: dict[str, object], message: str
) -> None:
    replacing.set("trained.cells", {cell: settings})
    with pytest.raises(UserError, match=message):
        load_params()


def test_texts_are_those_of_tasks_of_the_grid(replacing: Project, invoke: Invoke) -> None:
    replacing.set("grid.tasks", [REVIEWS])
    code, _, err = invoke("status")
    assert code == 2
    assert "list them in grid.tasks" in err


def test_without_features_only_sinks_and_the_blocks_of_the_window_are_seen() -> None:
    model = make_llama()
    method = ReplacementParams(estimate={"window": 32, "num_features": 65}, bare=True)
    replace.set_up(model, "bare", method, 0, torch.ones(2, 1, 8, dtype=torch.long))
    (layer,) = huggingface.attention_layers(model).values()
    query, key, value = torch.randn(1, 2, 150, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
    inputs = AttentionInputs(query, key, value, None, True, 64**-0.5, True)
    places = torch.arange(150)
    blocks = places // 32
    seen = (blocks[:, None] - blocks <= 1) | (places < 4)
    scores = (query @ key.mT / 8).masked_fill(~(seen & (places[:, None] >= places)), -math.inf)
    with torch.no_grad():
        torch.testing.assert_close(replace.attend(model, layer, inputs), scores.softmax(-1) @ value)


def test_updates_of_low_rank_are_fitted_to_the_texts_that_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    model, names = make_llama(), {name for name, _ in make_llama().named_parameters()}
    method = ReplacementParams(estimate={"window": 16, "heavy": 8, "num_features": 65}, rank=2, steps=3, own_steps=3)
    generator = torch.Generator().manual_seed(0)
    fitting = torch.stack([torch.randint(60, (2, 600), generator=generator), torch.ones(2, 600, dtype=torch.long)])
    batches = replace._batches(model, fitting)
    assert torch.cat([batch["labels"] for batch in batches], 1).equal(fitting[:1, :, :].flatten(1)[:, :1024])
    with torch.no_grad():
        replace.set_up(model, "updated", method, 0, fitting)
    assert "whole model" in capsys.readouterr().out
    added = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(added) == 4
    assert {name.replace(".base_layer", "") for name, _ in model.named_parameters()} >= names
    huggingface.uninstall(model)


def test_a_rank_counts_all_that_are_as_near() -> None:
    places = torch.eye(4)[:, :3]
    found = replace.reciprocal_ranks(places[:3], torch.stack([places[0], places[0], places[2]]))
    assert found.tolist() == [0.5, pytest.approx(1 / 3), 1.0]
