"""The device that a cell runs on, by the name a user types."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import torch

from schoenbat.errors import UserError


def get_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda" or "cuda:N"; raises UserError if this machine has no such one."""
    kind, _, index = name.partition(":")
    if (kind != "cpu" or index or ":" in name) and (kind != "cuda" or (":" in name and not index.isdecimal())):
        raise UserError(f"unknown device {name!r}; choose one of: {', '.join(_available())}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not available here; choose one of: {', '.join(_available())}")
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device("cpu")


def prepare_host(threads: int) -> None:
    """Set the number of CPU threads, and keep freed memory in the process.

    glibc hands large blocks back to the system at once, so that each step pays page faults for the same megabytes
    again. The numbers computed do not depend on it.
    """
    torch.set_num_threads(threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, largest = -3, -1, 2**30
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, largest)


def describe_device(device: torch.device) -> str:
    """Return the device with the name of its hardware, such as "cpu (AMD EPYC 9R14)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({_processor()})"


def physical_gpu(index: int) -> str:
    """Return what the driver calls a GPU that is visible here as number `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def ask_driver(what: str, *options: str) -> str:
    """Return what nvidia-smi says of the first GPU or, with --id, of that one; empty where there is none.

    Asking torch instead would take memory of the GPU into this process for good.
    """
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _available() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
