"""Words for people."""


def counted(number: int, noun: str) -> str:
    """Such as "1 cell" and "2 cells"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
