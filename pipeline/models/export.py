"""A trained cell as a folder of its own: weights, config, model card, and the settings to train it again."""

import json
import shutil
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

import schoenbat
from pipeline.grid.cells import resolve
from pipeline.grid.params import load_params
from pipeline.grid.settings import PARAMS_FILE, read_yaml
from pipeline.host.text import counted
from pipeline.models.trained import TrainedCell, load_trained
from schoenbat.errors import UserError, unknown_name
from schoenbat.files import write_bytes
from schoenbat.lra.data.arrays import SPLITS
from schoenbat.lra.pretrained import ONNX
from schoenbat.lra.tasks import TASKS

CARD, SETTINGS = "README.md", "params.yaml"
FORMATS = ("safetensors", "onnx")


def run(cell: str, folder: Path, file_format: str = "safetensors") -> list[Path]:
    """Write the export, whole or not at all, and return its files; "onnx" adds the model as ONNX to the others.

    Raises:
        UserError: no such format or cell, a model that has no ONNX form, code or settings other than those that it was
            trained with, or a folder with something in it.
    """
    if file_format not in FORMATS:
        raise unknown_name("format", file_format, list(FORMATS))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and is no empty folder")
    trained = load_trained(cell)
    if trained.code_has_changed():
        raise UserError(
            f"the code has changed since {cell} was trained; check out git revision {trained.metrics.git_revision}, or "
            f"train again: schoenbat-exp run --cell {cell}"
        )
    params = load_params()
    if any(trained.description[key] != value for key, value in resolve(params, trained.cell).settings().items()):
        raise UserError(f"{cell} was trained with other settings than those of {PARAMS_FILE}; train it again")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        trained.classifier.save_pretrained(part)
        if file_format == "onnx":
            trained.classifier.save_onnx(part / ONNX)
        write_bytes(part / SETTINGS, _settings_of(trained).encode())
        write_bytes(part / CARD, card(trained, params.note).encode())
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return sorted(folder.iterdir())


def card(trained: TrainedCell, note: str) -> str:
    """Return the model card: what the model is, its scores, its data, how to use it, and how to train it again."""
    cell, metrics, meta = trained.cell, trained.metrics, trained.meta
    test = trained.results.test()
    paper = TASKS.get(cell.task).__doc__ or ""
    rows = [
        ("test accuracy", f"{100 * test.accuracy:.2f} % of {test.examples} examples" if test else "not tested"),
        ("test loss", f"{test.loss:.4f}" if test else "not tested"),
        ("best dev accuracy", f"{100 * metrics.best_dev_accuracy:.2f} % of {metrics.dev_examples} examples"),
        ("at step", f"{metrics.best_step} of {metrics.steps}"),
        ("parameters", f"{metrics.num_parameters:,}"),
    ]
    rules = [(f"without a model: {rule}", f"{100 * score:.2f} %") for rule, score in meta.get("baselines", {}).items()]
    kernel = f" with kernel `{cell.dotf}`" if cell.dotf else ""
    needed = f" with kernel `{cell.dotf}` in it" if cell.dotf else ""
    revision = metrics.git_revision.removesuffix("+")
    changes = ", with the changes that were not committed then," if revision != metrics.git_revision else ""
    threads = counted(metrics.threads, "thread")
    about = [
        ("task", f"`{cell.task}`: {paper.partition(chr(10))[0]}"),
        ("data", f"{meta['label']}; {meta['source']}"),
        ("examples", ", ".join(f"{split} {meta['splits'][split]}" for split in SPLITS)),
        ("data fingerprint", f"`{meta['fingerprint']}`"),
        ("attention", f"`{cell.attn}`{kernel}, former `{cell.former}`, options `{json.dumps(metrics.attention)}`"),
        ("model", f"`{json.dumps(trained.description['model'])}`"),
        ("training", f"`{json.dumps(trained.description['training'])}`"),
        ("seed", str(cell.seed)),
        ("profile", f"`{trained.profile}`: {note}"),
        ("git revision", f"`{metrics.git_revision}`"),
        ("fingerprint of code, settings, data", f"`{metrics.fingerprint}`"),
        ("made with", f"torch {metrics.torch}, schoenbat {schoenbat.__version__}, {metrics.device}, {threads}"),
    ]
    head = {"license": "mit", "library_name": "schoenbat", "pipeline_tag": "text-classification"}
    front = "".join(f"{key}: {value}\n" for key, value in head.items())
    return f"""---
{front}tags: [attention, {cell.attn}]
---
# {cell.id}

A small Transformer encoder with `{cell.attn}` attention{kernel}, trained from scratch on {meta["label"]}.
It is one cell of a comparison of attention mechanisms, with a budget that suits the comparison; do not rely on it.

{_table(("result", ""), rows + rules)}

{_table(("made from", ""), about)}

## Use

```python
from schoenbat import PretrainedClassifier

classifier = PretrainedClassifier.from_pretrained(".")
{_use(trained)}
```

It needs `schoenbat`{needed}, and `safetensors`, and no network. `classifier.model` is the torch module; it takes tokens
[batch, {meta["num_texts"]}, length], in which 0 is padding.

## Make it again

In a checkout of the project at git revision `{revision}`{changes or ","} and with the `{SETTINGS}` of this
folder in the place of its own:

```sh
schoenbat-exp run --cell {cell.id}
```

On the same number of CPU threads the result has the same bytes. Licences of the data are those of its source.
"""


def _use(trained: TrainedCell) -> str:
    if not trained.classifier.reads_texts:
        return "logits = classifier.model(tokens)"
    pair = trained.classifier.config.data["num_texts"] == 2
    example = '("one text", "another text")' if pair else '"a text"'
    return f"classifier.predict([{example}])  # the probability of each class"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [header, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _settings_of(trained: TrainedCell) -> str:
    """Return params.yaml for this one cell: its own sections, and a grid of nothing else."""
    cell, written = trained.cell, read_yaml(PARAMS_FILE)
    own: dict[str, list[str]] = {"attn": [cell.attn], "former": [cell.former]}
    none: dict[str, list[str]] = {"attn": [], "former": []}
    plain, kernel = (none, own) if cell.dotf else (own, none)
    dotf = {"dotf": [cell.dotf] if cell.dotf else []}
    axes = {"tasks": [cell.task], "seeds": [cell.seed], "plain": plain, "kernel": kernel | dotf}
    kept = {
        section: {name: written[section][name]}
        for section, name in (("task", cell.task), ("attention", cell.attn), ("former", cell.former))
    }
    text = StringIO()
    yaml = YAML()
    yaml.dump({**written, **kept, "grid": axes, "errors": {**written["errors"], "trained": []}}, text)
    return text.getvalue()
