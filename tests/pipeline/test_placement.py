"""Which device takes a job: slots, memory, and cells that want a device for themselves; no device is needed."""

from pipeline.launch._job import Device, Job
from pipeline.launch._placement import GPU_CONTEXT_MB, MEMORY_FACTOR, Load, number_of_jobs, place


def gpus(*memory: float, slots: int = 8) -> list[Load]:
    return [Load(Device(f"cuda:{i}", slots, mb, unknown_alone=True)) for i, mb in enumerate(memory)]


def job(name: str, memory_mb: float | None = None) -> Job:
    return Job(name, (name,), memory_mb=memory_mb)


def fill(loads: list[Load], jobs: list[Job]) -> dict[str, str | None]:
    """Where each job goes when they come one after another and none ends."""
    placed: dict[str, str | None] = {}
    for each in jobs:
        load = place(each, loads, alone=False)
        placed[each.name] = None if load is None else load.device.name
        if load is not None:
            load.claim(each, alone=False)
    return placed


def test_cells_share_a_gpu_as_long_as_their_measured_peaks_fit() -> None:
    need = 1000 * MEMORY_FACTOR + GPU_CONTEXT_MB
    three = fill(gpus(3 * need), [job(name, 1000) for name in "abcd"])
    assert three == {"a": "cuda:0", "b": "cuda:0", "c": "cuda:0", "d": None}
    assert fill(gpus(3 * need - 1), [job(name, 1000) for name in "abc"])["c"] is None


def test_the_emptiest_gpu_is_taken_first() -> None:
    assert list(fill(gpus(40_000, 40_000), [job(name, 1000) for name in "abcd"]).values()) == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
    ]


def test_a_cell_that_was_never_measured_gets_a_gpu_for_itself() -> None:
    loads = gpus(40_000, 40_000)
    assert fill(loads, [job("new"), job("a", 1000), job("b", 1000), job("newer")]) == {
        "new": "cuda:0",
        "a": "cuda:1",
        "b": "cuda:1",
        "newer": None,
    }
    loads[0].release("new")
    assert place(job("newer"), loads, alone=False) is loads[0]


def test_on_a_cpu_an_unmeasured_cell_shares() -> None:
    loads = [Load(Device("cpu", 2, 1000.0))]
    assert fill(loads, [job("a"), job("b"), job("c")]) == {"a": "cpu", "b": "cpu", "c": None}


def test_after_running_out_of_memory_a_cell_waits_for_an_empty_device_and_keeps_it_so() -> None:
    loads = gpus(40_000)
    loads[0].claim(job("a", 10), alone=False)
    assert place(job("b", 10), loads, alone=True) is None
    loads[0].release("a")
    assert place(job("b", 10), loads, alone=True) is loads[0]
    loads[0].claim(job("b", 10), alone=True)
    assert place(job("c", 10), loads, alone=False) is None
    loads[0].release("b")
    assert place(job("c", 10), loads, alone=False) is loads[0]


def test_a_cell_larger_than_the_device_is_tried_when_the_device_is_empty() -> None:
    assert fill(gpus(1000), [job("huge", 50_000)]) == {"huge": "cuda:0"}


def test_threads_of_all_jobs_together_do_not_outnumber_the_cores() -> None:
    assert number_of_jobs(8, 2, None) == 4
    assert number_of_jobs(8, 2, 3) == 3
    assert number_of_jobs(8, 2, 100) == 4
    assert number_of_jobs(2, 4, None) == 1
