"""How long does one attention of each mechanism take on a GPU, and one training step of the model of Long Range Arena?

    python benchmarks/gpu.py docs

writes gpu.csv into that folder, by the stage `bench` (which says what is timed, and how), and prints the tables of
docs/gpu.md. Attention of batch 2 and 8 heads of 64, in bfloat16 and in float32; mechanisms of quadratic cost stop at
4,096 tokens. One process, with nothing else on the card.
"""

import argparse
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from pipeline.grid.params import BenchParams, Params, load_params
from pipeline.stages import bench
from schoenbat.attention import ATTENTIONS
from schoenbat.lra.data.arrays import Batch
from schoenbat.lra.encoder import Classifier, ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig
from schoenbat.lra.training import add_gradients, examples_at_once

LENGTHS = [512, 4096, 16384]
PROFILE = Path(__file__).parents[1] / "profiles/quick.yaml"


STEPS = ("softmax", "rmfa", "rmfa-sketch", "linear")
BATCH, LENGTH, VOCABULARY = 32, 4096, 257
"""Of the training steps: full-length batches of Text."""


def measure(device: str, lengths: list[int], repeats: int = 5, steps: Sequence[str] = STEPS) -> pd.DataFrame:
    """Return the rows of every mechanism in both dtypes; the training step stands with those of float32."""
    params = every_mechanism(BenchParams(lengths, repeats, threads=1, max_quadratic_length=4096), device)
    tables = []
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "bench.csv"
            bench.run(params, out, bench.Shape(batch=2, heads=8, head_dim=64, dtype=dtype))
            tables.append(pd.read_csv(out, dtype=str, keep_default_na=False))
    shared = ["heads", "head_dim", "dtype", "threads", "repeats", "device", "torch", "git_revision"]
    setting = tables[-1].iloc[0][shared].to_dict()
    rows = bench.time_passes(training_steps(steps, torch.device(device)), "softmax", repeats, torch.device(device))
    return pd.concat([*tables, pd.DataFrame([row | setting for row in rows], dtype=str)])


def every_mechanism(wanted: BenchParams, device: str) -> Params:
    """Return settings with all mechanisms that are installed, those with features at 128 of them."""
    found = {name: ATTENTIONS.get(name) for name in ATTENTIONS.names()}
    plain = [name for name, mechanism in found.items() if not mechanism.needs_kernel]
    kernel = [name for name in found if name not in plain]
    sized = {name: {"num_features": 128} for name, each in found.items() if hasattr(each.Config(), "num_features")}
    quick = load_params(PROFILE)
    grid = replace(
        quick.grid, plain=replace(quick.grid.plain, attn=plain), kernel=replace(quick.grid.kernel, attn=kernel)
    )
    run = replace(quick.run, device=device)
    return replace(quick, grid=grid, attention={name: {} for name in found} | sized, bench=wanted, run=run)


def training_steps(attns: Sequence[str], device: torch.device) -> Iterator[tuple[bench.Row, bench.Call]]:
    """Yield an optimiser step of the LRA model on full-length Text batches of each mechanism."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (BATCH, 1, LENGTH), generator=generator).to(device)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).to(device)
    key_mask = torch.ones_like(tokens, dtype=torch.bool)
    size = examples_at_once(tokens, device)
    split = zip(tokens.split(size), key_mask.split(size), labels.split(size), strict=True)
    parts = [Batch(some, mask, truth, len(truth)) for some, mask, truth in split]

    def step(model: Classifier, optimiser: torch.optim.Optimizer) -> None:
        optimiser.zero_grad()
        add_gradients(model, parts, device)
        optimiser.step()

    for attn in attns:
        dotf, former = ("exp", "maclauformer") if ATTENTIONS.get(attn).needs_kernel else (None, "transformer")
        model = build_model(
            vocab_size=VOCABULARY,
            num_classes=2,
            num_texts=1,
            max_length=LENGTH,
            model=ModelConfig(),
            attn=attn,
            attention={},
            dotf=dotf,
            former=former,
            former_config=FormerConfig(),
            seed=0,
        ).to(device)
        what = {"attn": attn, "dotf": dotf or "", "length": LENGTH, "direction": "training step", "batch": BATCH}
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        yield what | {"relative_error": None, "num_features": ""}, functools.partial(step, model, optimiser)


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
