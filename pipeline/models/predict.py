"""Classify texts with a trained cell."""

import json
import sys
import warnings
from collections.abc import Sequence

from pipeline.host.devices import get_device
from pipeline.models.trained import TrainedCell, load_trained
from schoenbat.errors import UserError

Example = str | tuple[str, ...]


def run(cell: str, texts: Sequence[str], *, top: int, device_name: str, profile: str | None, as_json: bool) -> None:
    """Print the `top` likeliest classes of each text; without texts, of each line of standard input."""
    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}")
    trained = load_trained(cell, profile)
    examples = _examples(trained, texts)
    device = get_device(device_name)
    if trained.code_has_changed():
        print(f"warning: the code has changed since {cell} was trained, so its answers may have, too", file=sys.stderr)
    trained.classifier.model.to(device)
    with warnings.catch_warnings(record=True, action="always") as told:
        found = [dict(list(ranked.items())[:top]) for ranked in trained.classifier.predict(examples)]
    for warning in told:
        print(f"warning: {warning.message}", file=sys.stderr)
    if as_json:
        answers = [{"text": example, "classes": ranked} for example, ranked in zip(examples, found, strict=True)]
        print(json.dumps({"cell": cell, "profile": trained.profile, "predictions": answers}))
        return
    for example, ranked in zip(examples, found, strict=True):
        shown = example if isinstance(example, str) else " | ".join(example)
        classes = "  ".join(f"{name} {100 * share:.1f} %" for name, share in ranked.items())
        print(f"{classes}  {_short(shown)}")


def _examples(trained: TrainedCell, texts: Sequence[str]) -> list[Example]:
    """Return the examples in the form that the task takes: texts, or pairs."""
    pairs = trained.classifier.config.data["num_texts"] == 2
    if texts:
        if not pairs:
            return list(texts)
        if len(texts) % 2:
            raise UserError(f"{trained.cell.task} compares two texts: give them in pairs")
        return list(zip(texts[::2], texts[1::2], strict=True))
    examples: list[Example] = []
    for number, line in enumerate(_read().split("\n"), start=1):
        first, *others = line.split("\t") if pairs else [line]
        if not line.strip():
            continue
        if len(others) != pairs:
            raise UserError(f"line {number}: {trained.cell.task} compares two texts, with a tab between them")
        examples.append((first, *others) if pairs else first)
    if not examples:
        raise UserError("standard input holds no text")
    return examples


def _read() -> str:
    if sys.stdin.isatty():
        print("a text a line, then Ctrl-D:", file=sys.stderr)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding} (byte 0x{error.object[error.start]:02x})") from None


def _short(text: str, most: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
