"""Draw pathfinder pictures on several cores, into files that appear whole or not at all.

Apart from the task, so that a new process imports little before it draws.
"""

import io
import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from schoenbat.files import write_bytes
from schoenbat.lra.data.pathfinder import SIDE, draw

SHARD_SIZE = 250


class Shard(NamedTuple):
    """Pictures `start` to `stop` of a split; on disk uint8 [stop - start, 1 + 1024], each label before its pixels."""

    split: str
    start: int
    stop: int

    @property
    def file_name(self) -> str:
        return f"{self.split}-{self.start:06}-{self.stop:06}.npy"


def cut(split: str, size: int) -> list[Shard]:
    """Return the shards of a split of `size` pictures."""
    return [Shard(split, start, min(start + SHARD_SIZE, size)) for start in range(0, size, SHARD_SIZE)]


def draw_shards(folder: Path, jobs: Sequence[Shard], level: str, seed: int, processes: int) -> None:
    """Draw those shards that `folder` lacks; few pictures in this process, more in up to `processes` others.

    Raises:
        RuntimeError: a process ended before its work was done; what is complete stays.
    """
    missing = [job for job in jobs if not (folder / job.file_name).is_file()]
    if processes < 2 or sum(job.stop - job.start for job in missing) < SHARD_SIZE:
        _draw_all(folder, missing, level, seed)
        return
    # Not forked: this process may have threads, of torch for one, and what they hold locked would stay so.
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_work, args=(folder, missing[rank::processes], level, seed), daemon=True)
        for rank in range(min(processes, len(missing)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            if worker.exitcode != 0:
                raise RuntimeError(f"a process that draws pictures ended with {worker.exitcode}")
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()


def _work(folder: Path, jobs: Sequence[Shard], level: str, seed: int) -> None:
    """Draw shards in a process of its own; it leaves an interrupt to its parent, and ends when that is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _draw_all(folder, jobs, level, seed)


def _draw_all(folder: Path, jobs: Sequence[Shard], level: str, seed: int) -> None:
    parent = multiprocessing.parent_process()
    for job in jobs:
        rows = np.empty((job.stop - job.start, 1 + SIDE * SIDE), np.uint8)
        for row, index in zip(rows, range(job.start, job.stop), strict=True):
            if parent is not None and not parent.is_alive():
                return
            picture = draw(level, seed, job.split, index)
            row[0], row[1:] = picture.label, picture.pixels.ravel()
        content = io.BytesIO()
        np.save(content, rows)
        write_bytes(folder / job.file_name, content.getbuffer())
