"""What `schoenbat-exp doctor` says: whether everything that a grid needs is there, and how to mend what is not."""

from dataclasses import dataclass
from typing import Literal

State = Literal["good", "note", "wrong"]
SIGNS: dict[State, str] = {"good": "ok", "note": "note", "wrong": "wrong"}


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        subject: what was looked at.
        state: "wrong" if a grid would fail of it; "note" if something optional is missing or will be made.
        text: what was found.
        mend: what to do; empty where nothing is to be done.
    """

    subject: str
    state: State
    text: str
    mend: str = ""

    def line(self, width: int) -> str:
        mend = f"; to mend it: {self.mend}" if self.mend else ""
        return f"{SIGNS[self.state]:5}  {self.subject:{width}}  {self.text}{mend}"
