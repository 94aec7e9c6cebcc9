"""How long does one attention of each mechanism take on a GPU, and one training step of the model of Long Range Arena?

    python benchmarks/gpu.py docs

writes gpu.csv into that folder, by the stage `bench` (which says what is timed, and how), and prints the tables of
docs/gpu.md. Attention of batch 2 and 8 heads of 64, in bfloat16 and in float32; mechanisms of quadratic cost stop at
4,096 tokens. One process, with nothing else on the card.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from pipeline.grid.params import BenchParams, load_params
from pipeline.stages import bench

LENGTHS = [512, 4096, 16384]
PROFILE = Path(__file__).parents[1] / "profiles/quick.yaml"


def measure(device: str, lengths: list[int], repeats: int = 5) -> pd.DataFrame:
    """Return the rows of both dtypes; the training step stands with those of float32."""
    quick = load_params(PROFILE)
    tables = []
    for dtype, step in ((torch.bfloat16, []), (torch.float32, ["rmfa", "rmfa-sketch", "linear"])):
        wanted = BenchParams(lengths, repeats, num_features=[128], threads=[1], max_quadratic_length=4096, step=step)
        params = dataclasses.replace(quick, bench=wanted, run=dataclasses.replace(quick.run, device=device))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bench.csv"
            bench.run(params, out, bench.Shape(batch=2, heads=8, head_dim=64, dtype=dtype))
            tables.append(pd.read_csv(out, dtype=str, keep_default_na=False))
    return pd.concat(tables)


def tables(rows: pd.DataFrame) -> Iterator[str]:
    """Yield Markdown: milliseconds of both passes with speed-ups in brackets, then the training step."""
    numbers = rows.astype({"milliseconds": float, "speedup_vs_sdpa": float, "peak_memory_mb": float})
    shown = numbers.milliseconds.map(_short) + " (" + numbers.speedup_vs_sdpa.map(_short) + "×)"
    timed = rows.assign(shown=shown, length=rows.length.astype(int).map("{:,}".format))
    steps = numbers[rows.direction == "training step"]
    for dtype in rows.dtype.unique():
        for title, prefix in (("Every query sees every key", ""), ("Causal", "causal ")):
            passes = rows.direction.isin([f"{prefix}forward", f"{prefix}forward+backward"])
            own = timed[passes & (rows.dtype == dtype)]
            cells = own.groupby(["attn", "num_features", "length"], sort=False).shown.agg(" / ".join)
            table = cells.unstack(fill_value="").reset_index().rename(columns={"num_features": "features"})
            yield f"{title}, {dtype}\n\n{table.to_markdown(index=False, disable_numparse=True)}\n"
    columns = {
        "attn": steps.attn,
        "ms": steps.milliseconds.map("{:.1f}".format),
        "speed-up": steps.speedup_vs_sdpa.map("{:.2f}×".format),
        "peak MB": steps.peak_memory_mb.map("{:,.0f}".format),
    }
    yield pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True)


def _short(value: float) -> str:
    """Format three digits without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    rows = measure(options.device, options.lengths)
    rows.to_csv(options.folder / "gpu.csv", index=False)
    print(*tables(rows), sep="\n")


if __name__ == "__main__":
    main()
