"""Whether Linux kills for lack of memory."""

from pathlib import Path


def kills_for_memory() -> int:
    """How many processes of this machine Linux has killed for lack of memory; 0 where it cannot be told."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
