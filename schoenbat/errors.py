"""What a user can get wrong, as exceptions whose text is one line fit to be shown as it is."""


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


def unknown_name(kind: str, name: object, choices: list[str]) -> UserError:
    """The error for a name that is not in a closed set."""
    return UserError(f"unknown {kind} {name!r}; choose one of: {', '.join(choices)}")
