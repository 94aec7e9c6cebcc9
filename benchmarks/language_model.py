"""What a drop-in costs a model that was trained with softmax: a byte language model, evaluated through each estimate.

    python benchmarks/language_model.py train TEXT MODEL      # 3 layers, 2 heads of 64, trained with softmax
    python benchmarks/language_model.py compare TEXT MODEL    # its loss with uniform attention and estimates, as they
                                                              # are and calibrated, and after further training

TEXT is a file of bytes (`.xz` is unpacked); its last tenth is never trained on. Losses are nats per byte.
"""

import argparse
import lzma
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schoenbat import MultiheadKernelAttention, calibrate, diagnose
from schoenbat.estimate import WATCHER, Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.ops.reference import AttentionInputs

WIDTH, HEADS, LAYERS = 128, 2, 3
BATCH, TEST_BATCHES = 8, 32
ESTIMATES = ("sketch", "calibrated", "maclaurin")


class Uniform(nn.Module):
    """The mean of the values so far, projected as attention would: what is left of attention without weights."""

    def __init__(self, attention: MultiheadKernelAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> tuple[Tensor, None]:
        _, _, v = self.attention._project(query, key, value)
        counts = torch.arange(1, v.shape[1] + 1, device=v.device)[:, None]
        return self.attention.out_proj(v.cumsum(1) / counts), None


class LanguageModel(nn.Module):
    """Bytes [B, N] to logits [B, N, 256] of the next one."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(torch.randn(length, WIDTH) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.attentions = nn.ModuleList(
            MultiheadKernelAttention(WIDTH, HEADS, batch_first=True, num_features=None) for _ in range(LAYERS)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions[: x.shape[1]]
        for i in range(LAYERS):
            n = self.norms[2 * i](h)
            h = h + self.attentions[i](n, n, n, is_causal=True, need_weights=False)[0]
            h = h + self.mlps[i](self.norms[2 * i + 1](h))
        return self.head(self.norms[-1](h))

    def switch(self, **settings: object) -> "LanguageModel":
        """Return the same weights with other attention: arguments of MultiheadKernelAttention, or `uniform`."""
        other = LanguageModel(len(self.positions))
        for i in range(LAYERS):
            if settings != {"uniform": True}:
                other.attentions[i] = MultiheadKernelAttention(WIDTH, HEADS, batch_first=True, **settings)  # type: ignore[arg-type]
        # Weights alone: the draw of the features is that of the settings.
        other.load_state_dict(self.state_dict(), strict=False)
        other.to(self.positions.device)
        if settings == {"uniform": True}:
            other.attentions = nn.ModuleList(Uniform(attention) for attention in other.attentions)  # type: ignore[arg-type]
        return other


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and to test on."""
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        content = file.read(40_000_000)
    data = np.frombuffer(content, dtype=np.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(model: LanguageModel, data: np.ndarray, generator: np.random.Generator, size: int) -> Tensor:
    """Bytes [size, length + 1], where the model is."""
    length = len(model.positions)
    starts = generator.integers(0, len(data) - length - 1, size)
    chosen = np.stack([data[s : s + length + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(chosen).to(model.positions.device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def train(model: LanguageModel, data: np.ndarray, steps: int, rate: float, seed: int, batch_size: int) -> None:
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    began = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, batch(model, data, generator, batch_size))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"step {step + 1}: {float(loss):.3f}, {time.perf_counter() - began:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model: LanguageModel, data: np.ndarray) -> float:
    generator = np.random.default_rng(1)
    batches = (batch(model, data, generator, BATCH) for _ in range(TEST_BATCHES))
    return float(torch.stack([loss_of(model, x) for x in batches]).mean())


@torch.no_grad()
def vectors_of(model: LanguageModel, x: Tensor) -> list[Tensor]:
    """Query, key and value [B, H, N, d] of the second layer, in float64."""
    seen: list[list[Tensor]] = []

    def watch(estimate: Estimate, inputs: AttentionInputs, features: FeatureMap | None) -> None:
        seen.append([tensor.double().cpu() for tensor in inputs[:3]])

    token = WATCHER.set(watch)
    model(x)
    WATCHER.reset(token)
    return seen[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "compare"))
    parser.add_argument("text", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--further", type=int, default=0, help="steps of further training through each estimate")
    parser.add_argument("--length", type=int, default=512, help="bytes that the model sees")
    parser.add_argument("--estimates", nargs="*", default=ESTIMATES, choices=ESTIMATES)
    parser.add_argument("--features", type=int, nargs="*", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=Path, help="write a layer's query, key and value for benchmarks/bounds.py")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    training, test = read(arguments.text)
    model = LanguageModel(arguments.length).to(arguments.device)
    if arguments.what == "train":
        train(model, training, arguments.steps, 2e-3, arguments.seed, arguments.batch_size)
        torch.save(model.state_dict(), arguments.model)
        print(f"softmax: {evaluate(model, test):.3f}")
        return
    model.load_state_dict(torch.load(arguments.model, map_location=arguments.device))
    print(f"softmax: {evaluate(model, test):.3f}", flush=True)
    print(f"uniform: {evaluate(model.switch(uniform=True), test):.3f}", flush=True)
    sample = batch(model, test, np.random.default_rng(2), BATCH)[:, :-1]
    print(*diagnose(model.switch(num_features=256), sample), sep="\n", flush=True)
    if arguments.vectors:
        torch.save(vectors_of(model, sample[:1]), arguments.vectors)
    # Of a text that it was trained on, as it is what a user has.
    for_basis = batch(model, training, np.random.default_rng(3), BATCH)[:, :-1]
    for name in arguments.estimates:
        for num_features in arguments.features:
            estimator = "sketch" if name == "calibrated" else name
            other = model.switch(num_features=num_features, estimator=estimator)
            if name == "calibrated":
                print(*calibrate(other, for_basis), sep="\n", flush=True)
            line = f"{name} {num_features}: {evaluate(other, test):.3f}"
            if arguments.further and name != "maclaurin":
                train(other, training, arguments.further, 5e-4, arguments.seed + 1, arguments.batch_size)
                line += f", after {arguments.further} further steps {evaluate(other, test):.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
