"""User-facing exceptions; each message is one printable line."""

import difflib
import reprlib
from collections.abc import Iterable

MOST_CHOICES = 20
"""So many names are listed in an error; of a longer list the likely ones and how many there are."""


class UserError(ValueError):
    """A wrong name, key, type or value; the message names it and the choices."""


class DataUnavailable(UserError):
    """The data of a task cannot be had here; the message says what to do about it."""


class TrainingStopped(Exception):
    """A run that ended at `step` because it was asked to; its checkpoint, if it keeps one, is of that step."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}")
        self.step = step


class TrainingFailed(RuntimeError):
    """A run that cannot go on, such as a loss that is no longer a number."""


class OutOfMemory(TrainingFailed):
    """The device or the machine has too little memory for what runs on it now."""


class _Short(reprlib.Repr):
    """Any value in one line of bounded length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Of an integer of thousands of digits Python makes no text.
        return repr(x) if x.bit_length() <= 256 else f"{hex(x)[:20]}..."


shorten = _Short().repr


def unknown_name(kind: str, name: object, choices: Iterable[object]) -> UserError:
    """Make the error for a name that is not in a closed set."""
    return UserError(f"unknown {kind} {shorten(name)}; choose one of: {list_choices(name, choices)}")


def list_choices(name: object, choices: Iterable[object]) -> str:
    """List `choices` in one line, those that `name` may be a misspelling of first, the others in their order."""
    known = [str(choice) for choice in choices]
    folded: dict[str, list[str]] = {}
    for choice in known:
        folded.setdefault(_fold(choice), []).append(choice)
    close = difflib.get_close_matches(_fold(str(name)[:200]), folded)
    likely = [choice for match in close for choice in folded[match]]
    ordered = [*likely, *(choice for choice in known if choice not in likely)]
    shown = ordered if len(ordered) <= MOST_CHOICES else ordered[: max(len(likely), 3)]
    more = [] if shown is ordered else [f"... ({len(ordered)} in all)"]
    return ", ".join([*shown, *more]) or "none"


def _fold(name: str) -> str:
    """Ignore case, and _ in the place of -: to who types a name they are no difference."""
    return name.casefold().replace("_", "-")
