"""Words for people."""


def counted(number: int, noun: str) -> str:
    """Return such as "1 cell" and "2 cells"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share(number: int, total: int, noun: str, of: str) -> str:
    """Return `number` of `total`, with its verb, such as "all 4 cells of X are", "1 of 4 cells of X is"."""
    if number == total:
        return f"the only {noun} {of} is" if total == 1 else f"all {counted(total, noun)} {of} are"
    return f"{number:,} of {counted(total, noun)} {of} {'is' if number == 1 else 'are'}"
