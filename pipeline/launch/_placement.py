"""Which device takes a job, by slots and memory; pure arithmetic, so that it is tested without any device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.launch._job import Device, Job

MEMORY_FACTOR = 1.15
"""A peak varies from run to run, and an allocator keeps more than it hands out."""
GPU_CONTEXT_MB = 600.0
"""What a process needs on a GPU before its first tensor."""


@dataclass
class Load:
    """What runs on a device; `claims` has the MB set aside for each job, infinitely many if it is to be alone."""

    device: Device
    claims: dict[str, float] = field(default_factory=dict)

    def claim(self, job: Job, alone: bool) -> None:
        self.claims[job.name] = self._need(job, alone)

    def release(self, name: str) -> None:
        del self.claims[name]

    def is_full(self) -> bool:
        """Return whether no job would be taken, however small."""
        return len(self.claims) >= self.device.slots or math.inf in self.claims.values()

    def takes(self, job: Job, alone: bool) -> bool:
        """Return whether the job fits beside what runs. Into an empty device any does: trying is the only way left."""
        if not self.claims:
            return self.device.slots > 0
        need, limit = self._need(job, alone), self.device.memory_mb
        if self.is_full() or need == math.inf:
            return False
        return limit is None or sum(self.claims.values()) + need <= limit

    def _need(self, job: Job, alone: bool) -> float:
        if alone or (job.memory_mb is None and self.device.unknown_alone):
            return math.inf
        if job.memory_mb is None:
            return 0.0
        return job.memory_mb * MEMORY_FACTOR + GPU_CONTEXT_MB * self.device.unknown_alone


def place(job: Job, loads: Sequence[Load], *, alone: bool) -> Load | None:
    """Return the device for a job, of those that take it the one with the fewest jobs; None if it has to wait."""
    fitting = [load for load in loads if load.takes(job, alone)]
    return min(fitting, key=lambda load: len(load.claims), default=None)


def number_of_jobs(cores: int, threads: int, wanted: int | None) -> int:
    """How many cells run at once, so that their threads do not outnumber the cores; at least one."""
    most = max(1, cores // threads)
    return most if wanted is None else max(1, min(wanted, most))
