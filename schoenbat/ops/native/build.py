"""The compiled form of an operation: C++ that is built at first use, kept in a cache, and called through ctypes.

Where nothing can be built, as without a compiler, `load` says why, and the torch form does the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from schoenbat.errors import UserError
from schoenbat.files import write_bytes

VARIABLE = "SCHOENBAT_OPS"
"""The environment variable that chooses a form: "torch", or "compiled", which makes it an error if there is none."""
FORMS = ("torch", "compiled")
SOURCES = ("attention.cpp", "sparse.cpp")
HEADERS = ("lanes.h",)
FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fPIC", "-shared")
"""No -ffast-math: NaN at masked places must not spread."""
_COMPILERS = ("g++", "clang++", "c++")
_LOG = logging.getLogger("schoenbat")


class Loaded(NamedTuple):
    """The library, None for the torch form, in words why that one, and whether it has yet to be compiled."""

    library: ctypes.CDLL | None
    reason: str
    is_pending: bool = False


def load(*, build: bool = True) -> Loaded:
    """Return the compiled form, which is built if need be and `build`, or why there is none.

    Raises:
        UserError: the environment variable names no form, or asks for a compiled one that cannot be had.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in FORMS:
        raise UserError(f"{VARIABLE} must be one of {', '.join(FORMS)}, not {wanted!r}")
    if wanted == "torch":
        return Loaded(None, f"{VARIABLE} is torch")
    loaded = _load(os.environ.get("CXX", ""), build)
    if wanted == "compiled" and loaded.library is None and not loaded.is_pending:
        raise UserError(f"{VARIABLE} is compiled, but {loaded.reason}")
    return loaded


def cache_folder() -> Path:
    """Return where builds are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "schoenbat"


@functools.cache
def _load(named: str, build: bool) -> Loaded:
    """Load what the compiler of that name builds, or the first that is there."""
    if sys.platform == "win32":
        return Loaded(None, "it is not made for Windows")
    compiler = next((found for name in ([named] if named else _COMPILERS) if (found := shutil.which(name))), None)
    if compiler is None:
        return Loaded(None, f"there is no compiler of C++ ({', '.join(_COMPILERS)}, or that of CXX)")
    folder = Path(__file__).parent
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        texts = [(folder / name).read_text() for name in (*SOURCES, *HEADERS)]
        key = hashlib.sha256("\0".join([*texts, *FLAGS, version, _processor()]).encode()).hexdigest()[:16]
        path = cache_folder() / f"attention-{key}.so"
        if not (path.is_file() or build):
            return Loaded(None, f"compiled at the first call by {version.splitlines()[0]}", is_pending=True)
        if not path.is_file():
            _build(compiler, [folder / name for name in SOURCES], path)
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        reason = f"{compiler} fails: {said[0] if said else error}"
        _LOG.warning("attention runs in its torch form, as %s", reason)
        return Loaded(None, reason)
    except (OSError, RuntimeError) as error:
        reason = f"it cannot be built or loaded: {error}"
        _LOG.warning("attention runs in its torch form, as %s", reason)
        return Loaded(None, reason)
    return Loaded(library, f"compiled by {version.splitlines()[0]}")


def _build(compiler: str, sources: Sequence[Path], path: Path) -> None:
    """Compile into `path`, in one process at a time; what stands there is whole."""
    import fcntl

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory() as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return
        _LOG.warning("compiling attention for this processor into %s, once; it takes some seconds", path.parent)
        built = Path(scratch, path.name)
        command = [compiler, *FLAGS, *map(str, sources), "-o", str(built)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        write_bytes(path, built.read_bytes())


def _processor() -> str:
    """Describe what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Return whether there is a compiled form to run."""
    return load().library is not None
