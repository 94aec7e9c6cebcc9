"""What do the kernels of `schoenbat.ops.triton` take of a GPU? Compiled for GPUs that need not be there.

    python benchmarks/gpu_kernels.py docs

writes gpu-kernels.csv into that folder and prints the tables of docs/gpu.md: for each kernel, GPU, dtype and head_dim
the registers of a thread, the bytes that are spilled from them, the shared memory of a program, and how many
instructions for tensor cores there are; then a model of the speed. The arguments are those of a launch, of a small
attention forward and backward; nothing is run.
"""

import argparse
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import pandas as pd
import torch
import triton
from triton.backends.compiler import GPUTarget

from schoenbat.features.maclaurin import RandomMaclaurin
from schoenbat.features.plan import FeatureMap
from schoenbat.features.sketch import Sketch
from schoenbat.kernels import KERNELS
from schoenbat.ops.triton import attend, kernels, launch

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64)
SOURCES = Path(kernels.__file__).parent
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LAUNCHES, SECONDS_OF_A_LAUNCH = 51, 4e-6
BYTES, PRODUCTS = 4.0e12, 3.0e14
"""What the model assumes of an H200 in a second."""
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
COLUMNS = (
    "kernel", "features", "dtype", "head_dim", "capability", "warps", "rows", "registers", "spilled_bytes",
    "shared_bytes", "tensor_core_instructions", "source",
)  # fmt: skip


class _Driver:
    """As far as triton asks before it launches; the number of the device is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _: int) -> int:
        return 0


def maps_of(head_dim: int) -> dict[str, tuple[FeatureMap, bool]]:
    """Return a bounded map of the second degree, and an unbounded one of all degrees."""
    kernel, generator = KERNELS.get("exp")(), torch.Generator().manual_seed(0)
    sizes = {"head_dim": head_dim, "num_features": 128, "max_degree": 20, "generator": generator}
    return {
        "bounded": (Sketch(kernel, **sizes, scale=1.0, fixed_norm=False), True),
        "all degrees": (RandomMaclaurin(kernel, **sizes), False),
    }


def compiled(capability: int, dtype: torch.dtype, head_dim: int, features: FeatureMap, bounded: bool) -> Iterator[Any]:
    """Yield each kernel that a forward and a backward pass launch, with its launch options."""
    found = []

    def compile_only(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            found.append((kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **options), options))

        return launch

    triton.runtime.driver.set_active(_Driver(capability))
    original = triton.runtime.jit.KernelInterface.__getitem__
    triton.runtime.jit.KernelInterface.__getitem__ = compile_only
    try:
        query, key, value = (torch.zeros(2, 2, 256, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
        attend(features, query, key, value, None, head_dim**-0.5, True, bounded).sum().backward()
    finally:
        triton.runtime.jit.KernelInterface.__getitem__ = original
    yield from found


def measure(binary: bytes) -> dict[str, int]:
    """Read the use of resources off a program of the GPU."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        usage, code = (
            subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout
            for name, *options in commands
        )
    (function,) = (line for line in usage.splitlines() if "REG:" in line)
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", function)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "tensor_core_instructions": len(TENSOR_CORES.findall(code)),
    }


def rows(capabilities: tuple[int, ...], dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...]) -> Iterator[dict]:
    """Yield the rows of the table."""
    for head_dim in head_dims:
        for kind, (features, bounded) in maps_of(head_dim).items():
            for dtype in dtypes:
                for capability in capabilities:
                    for name, kernel, options in compiled(capability, dtype, head_dim, features, bounded):
                        own = (name, kind, str(dtype).removeprefix("torch."), head_dim, capability)
                        yield dict(
                            zip(COLUMNS, own, strict=False),
                            warps=kernel.metadata.num_warps,
                            rows=options.get("ROWS", ""),
                            shared_bytes=kernel.metadata.shared,
                            source=digest(),
                            **measure(kernel.asm["cubin"]),
                        )


def digest() -> str:
    """Return the digest of what the kernels are made of, in short."""
    sources = (SOURCES / name for name in ("kernels.py", "launch.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12]


def model(length: int, num_features: int, batch: int = 2, heads: int = 8, head_dim: int = 64) -> float:
    """Return milliseconds forward and backward in bfloat16 if all assumptions of docs/gpu.md held."""
    kernel, generator = KERNELS.get("exp")(), torch.Generator().manual_seed(0)
    sizes = {"head_dim": head_dim, "num_features": num_features, "max_degree": 20, "generator": generator}
    tiles = launch.tiles_of(Sketch(kernel, **sizes, scale=1.0, fixed_norm=False).plan)
    features, factors = launch.TILE * len(tiles.degrees), launch.TILE * len(tiles.columns)
    # Products of a token with a row of d numbers: projections, then features with values, then moments.
    sums_and_look_up = 2 * (factors + features + head_dim)
    gradients = 2 * (2 * factors + features) + features + 3 * head_dim + (factors + features + head_dim)
    tokens = batch * heads * length
    products = 2 * head_dim * (sums_and_look_up + gradients) * tokens
    # Rows of d numbers of two bytes that are read or written: where queries and keys are clamped, forward and backward;
    # of a, b, c; of d, the sums over queries, e, f.
    rows = (4 + 6) + (3 + 2 + 2) + (5 + 2 + 5 + 4 + 3)
    return 1e3 * max(LAUNCHES * SECONDS_OF_A_LAUNCH, rows * 2 * head_dim * tokens / BYTES + products / PRODUCTS)


def documents(folder: Path) -> Iterator[str]:
    """Yield the tables of docs/gpu.md: the kernels with products, as written into `folder`, and the model."""
    table = pd.read_csv(folder / "gpu-kernels.csv").query("tensor_core_instructions > 0").drop(columns="source")
    table = table.drop_duplicates(["kernel", "features", "dtype", "head_dim", "capability"], keep="last")
    yield table.rename(columns=lambda name: name.replace("_", " ")).to_markdown(index=False)
    lengths = (512, 1024, 4096, 16_384, 65_536)
    times = {f"{length:,}": [f"{model(length, n):.2f}" for n in (128, 561)] for length in lengths}
    yield pd.DataFrame({"features": [128, 561], **times}).to_markdown(index=False, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--dtype", nargs="+", default=[str(x).removeprefix("torch.") for x in DTYPES])
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    options = parser.parse_args()
    dtypes = tuple(getattr(torch, name) for name in options.dtype)
    found = rows(tuple(options.capability), dtypes, tuple(options.head_dim))
    pd.DataFrame(found, columns=COLUMNS).to_csv(options.folder / "gpu-kernels.csv", index=False)
    print(*documents(options.folder), sep="\n\n")


if __name__ == "__main__":
    main()
