"""Which device takes a job, by slots and memory; pure arithmetic, so that it is tested without any device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.launch._job import Device, Job

MEMORY_FACTOR = 1.15
"""A peak varies from run to run, and an allocator keeps more than it hands out."""
GPU_CONTEXT_MB = 600.0
"""What a process needs on a GPU before its first tensor."""


@dataclass
class Load:
    """What runs on a device.

    Attributes:
        claims: job names and the MB set aside for each; the whole device for one that is alone on it.
        closed: one job has the device for itself.
    """

    device: Device
    claims: dict[str, float] = field(default_factory=dict)
    closed: bool = False

    def claim(self, job: Job, alone: bool) -> None:
        memory = self._need(job)
        self.closed = alone or memory is None
        self.claims[job.name] = memory or 0.0

    def release(self, name: str) -> None:
        del self.claims[name]
        self.closed = self.closed and bool(self.claims)

    def is_full(self) -> bool:
        """Whether no job would be taken, however small."""
        return self.closed or len(self.claims) >= self.device.slots

    def takes(self, job: Job, alone: bool) -> bool:
        """Whether the job fits beside what runs. Into an empty device everything fits: trying is the only way left."""
        if not self.claims:
            return self.device.slots > 0
        memory = self._need(job)
        if self.is_full() or alone or memory is None:
            return False
        limit = self.device.memory_mb
        return limit is None or sum(self.claims.values()) + memory <= limit

    def _need(self, job: Job) -> float | None:
        """MB to set aside; None for the whole device."""
        if job.memory_mb is None:
            return None if self.device.unknown_alone else 0.0
        context = GPU_CONTEXT_MB if self.device.unknown_alone else 0.0
        return job.memory_mb * MEMORY_FACTOR + context


def place(job: Job, loads: Sequence[Load], *, alone: bool) -> Load | None:
    """Return the device for a job, of those that take it the one with the fewest jobs; None if it has to wait.

    Args:
        alone: after it ran out of memory beside others.
    """
    fitting = [load for load in loads if load.takes(job, alone)]
    return min(fitting, key=lambda load: len(load.claims), default=None)


def number_of_jobs(cores: int, threads: int, wanted: int | None) -> int:
    """How many cells run at once, so that their threads do not outnumber the cores; at least one."""
    most = max(1, cores // threads)
    return most if wanted is None else max(1, min(wanted, most))
