"""Stage `bench`: every mechanism of the grid timed side by side, in one process, against torch's exact attention.

Queries and keys have unit length, which mechanisms know, as behind pre-SBN; values are Gaussian. A mechanism has its
section of params.yaml and each kernel of the grid. It is timed forward, and forward and backward; and its causal form
as well. Each round times every mechanism once, in turn, so that what disturbs the machine disturbs all
alike; a row holds the median over rounds and the interquartile range, per call. Beside them stands
dot_product_kernel_attention with each of `bench.num_features`, and one token after so many others: for it through the
state of fixed size that these leave, for sdpa over a cache of their keys and values.

Nothing is timed before its result has been compared, at the same length, with exact attention in float64, for 128
queries spread over the sequence: outputs, and the gradients of query, key and value that those outputs cause.
`relative_error` is the norm of the difference over the norm of the truth, for the outputs ("forward", "causal forward")
or for the three gradients together ("forward+backward", "causal forward+backward"). The truth is exact attention with
the mechanism's kernel, or softmax. Mechanisms that are exact must be within 1e-4, in bfloat16 within 3e-2. Those that
estimate a kernel must be within 1, the error of an output of zeros. The others are attentions of their own and must be
finite; their error says how far from softmax they are.

Peak memory is what torch's allocator held at most, beyond the inputs, during one call of its own: on the CPU from the
allocations and releases that torch.profiler records, on CUDA from its counter. Scratch space inside the BLAS library is
not seen. Mechanisms of quadratic cost are left out above `bench.max_quadratic_length`, except torch's own, which the
speed-ups refer to.

For cells of `trained.cells` that are measured, bench-trained.csv beside it has the time of a layer's forward pass on
random tensors of the model's heads, next to torch's exact attention.
"""

import functools
import itertools
import math
import os
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import timer

from pipeline.grid.params import Params, ReplacementParams, model_of
from pipeline.grid.results import Replaced
from pipeline.host.devices import describe_device, get_device, prepare_host
from pipeline.host.files import git_revision, write_csv
from schoenbat.attention import ATTENTIONS, Attention, KernelAttention
from schoenbat.errors import TrainingFailed
from schoenbat.estimate import Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.functional import dot_product_kernel_attention
from schoenbat.kernels import KERNELS
from schoenbat.lra.config import build_config
from schoenbat.norm import pre_sbn
from schoenbat.ops._share import PoorEstimateWarning
from schoenbat.ops.linear import State, extend
from schoenbat.ops.reference import normalise
from schoenbat.registry import base_name

CHECKS = ("attn", "dotf", "length", "direction", "num_features", "relative_error")
DOTF = "exp"
EXACT = ("softmax", "kernelized")
EXACT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
ESTIMATE_TOLERANCE = 1.0
CHECKED_QUERIES = 128
FUNCTION = "dot_product_kernel_attention"
UNSTEADY, AGAIN = 0.2, 2
"""Interquartile range over median above which a pass is measured again, and how often."""
SAMPLE_SECONDS = 0.02
"""A sample repeats a short call for about so long."""

Attend = Callable[..., Tensor]
Call = Callable[[], Any]
Row = dict[str, Any]
K = TypeVar("K")


@dataclass(frozen=True)
class Shape:
    """Of the queries, keys and values: [batch, heads, length, head_dim]."""

    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Contender:
    """One mechanism, in which every query sees every key, or with `is_causal` those up to its own.

    Attributes:
        num_features: None where it has no such option.
        tolerance: of its relative errors.
        longest: the greatest length.
    """

    attn: str
    dotf: str | None
    num_features: int | None
    attend: Attend
    tolerance: float
    is_causal: bool = False
    longest: float = math.inf


def run(params: Params, out: Path, shape: Shape = Shape()) -> None:
    """Time all mechanisms and write `out`, or nothing if a result is wrong.

    Beside it bench-checks.csv has how far each is from the exact result, which is the same each time.

    Raises:
        UserError: the device of `run.device` is not there.
        TrainingFailed: a mechanism is further from the exact result than it may be.
    """
    device, repeats = get_device(params.run.device), params.bench.repeats
    # The profiler's library would announce every start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    prepare_host(params.bench.threads)
    timed: list[Row] = []
    contenders = list(_contenders(params, shape, device))
    for length in params.bench.lengths:
        able = [contender for contender in contenders if length <= contender.longest]
        timed += time_passes(_passes(able, shape, length, device), "sdpa", repeats, device)
        timed += time_passes(_tokens(params, shape, length, device), "sdpa", repeats, device)
    where = {
        "threads": params.bench.threads,
        "repeats": repeats,
        "device": describe_device(device),
        "torch": torch.__version__,
        "git_revision": git_revision(),
    }
    sizes = {"heads": shape.heads, "head_dim": shape.head_dim, "dtype": str(shape.dtype).removeprefix("torch.")}
    write_csv(out, [row | sizes | where for row in timed])
    checks = [
        {name: row[name] for name in CHECKS} | {"relative_error": f"{row['relative_error']:.1e}"} for row in timed
    ]
    write_csv(out.with_name("bench-checks.csv"), checks)
    print(f"{len(timed)} rows: {out}")
    if replaced := [row | where for row in _time_replaced(params)]:
        write_csv(out.with_name("bench-trained.csv"), replaced)


def _time_replaced(params: Params) -> Iterator[Row]:
    """Yield the times of one layer of each cell of `trained.cells` that is measured, the mean where layers differ."""
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for name, method in params.trained.cells.items():
        found = Replaced(params.profile, name).read()
        # What a cell without features computes in vain has to be left out first.
        if found is not None and not method.bare:
            measured.setdefault(model_of(name), {})[name] = found[1]
    for length in params.trained.lengths:
        for model, cells in measured.items():
            first, *_ = cells.values()
            shape, generator = first["shape"], torch.Generator().manual_seed(length)
            head_dim = shape["head_dim"]
            query, key, value = (
                torch.randn(1, shape[heads], length, head_dim, generator=generator)
                for heads in ("heads", "key_heads", "key_heads")
            )
            layers = {name: _layers(params.trained.cells[name], cells[name]) for name in cells}
            calls = {
                setting: functools.partial(_call_replaced, setting, query, key, value, shape["causal"])
                for setting in dict.fromkeys([None, *itertools.chain(*layers.values())])
            }
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", PoorEstimateWarning)
                samples = _interleaved(calls, params.bench.repeats)
            for name in cells:
                of_layers = np.mean([samples[setting] for setting in layers[name]], 0)
                low, median, high = np.percentile(of_layers, (25, 50, 75)).tolist()
                print(f"{length:>6} {name:<40} {median:10.3f} ms", flush=True)
                yield {
                    **{"cell": name, "model": model, "length": length, "milliseconds": median, "spread": high - low},
                    **{"of_sdpa": median / float(np.median(samples[None]))},
                }


def _layers(method: ReplacementParams, about: Mapping[str, Any]) -> list[Estimate | Attention | None]:
    """Return how each layer of a cell attends; None for torch's exact attention."""
    if method.attention is not None:
        found, generator = ATTENTIONS.get(method.attention), torch.Generator().manual_seed(0)
        head_dim = about["shape"]["head_dim"]
        return [found(found.Config(**method.options), head_dim=head_dim, kernel=None, generator=generator)]
    given = [layer if layer and layer["num_features"] else None for layer in about["layers"]]
    return [layer and Estimate(**method.estimate | layer) for layer in given]


def _call_replaced(how: Estimate | Attention | None, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    if isinstance(how, Estimate):
        how.attend(query, key, value, None, causal, self_attention=True)
        return
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    if how is None:
        F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    else:
        how(query, key, value, None, causal)


def _contenders(params: Params, shape: Shape, device: torch.device) -> Iterator[Contender]:
    """Yield torch's attention, and the mechanisms of the grid."""
    grid, exact = params.grid, EXACT_TOLERANCE[shape.dtype]
    sdpa = Contender("sdpa", None, None, F.scaled_dot_product_attention, exact)
    yield from (sdpa, _causal(sdpa))
    for budget in params.bench.num_features:
        attend = functools.partial(dot_product_kernel_attention, num_features=budget, self_attention=True)
        function = Contender(FUNCTION, DOTF, budget, attend, ESTIMATE_TOLERANCE)
        yield from (function, _causal(function))
    plain: list[tuple[str, str | None]] = [(name, None) for name in grid.plain.attn]
    for name, dotf in [*plain, *itertools.product(grid.kernel.attn, grid.kernel.dotf)]:
        found = ATTENTIONS.get(name)
        config: Any = build_config(found.Config, params.attention[name], f"attention.{name}")
        if found.needs_max_length:
            config = replace(config, max_length=max([config.max_length, *params.bench.lengths]))
        kernel = None if dotf is None else KERNELS.get(dotf)()
        generator = torch.Generator().manual_seed(0)
        module = found(config, head_dim=shape.head_dim, kernel=kernel, generator=generator).to(device)
        if isinstance(module, KernelAttention):
            module.gets_units = True
        tolerance = exact if base_name(name) in EXACT else ESTIMATE_TOLERANCE if kernel else math.inf
        longest = params.bench.max_quadratic_length if found.cost == "quadratic" else math.inf
        num_features = getattr(config, "num_features", None)
        contender = Contender(name, dotf, num_features, module, tolerance, longest=longest)
        yield from (contender, _causal(contender)) if found.has_causal_form else (contender,)


def _causal(contender: Contender) -> Contender:
    return replace(contender, attend=functools.partial(contender.attend, is_causal=True), is_causal=True)


def _inputs(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = (shape.batch, shape.heads, length, shape.head_dim)
    query, key, value = (torch.randn(sizes, generator=generator) for _ in range(3))
    query, key, value = (x.to(device, shape.dtype).requires_grad_() for x in (pre_sbn(query), pre_sbn(key), value))
    return query, key, value


def _passes(
    contenders: Sequence[Contender], shape: Shape, length: int, device: torch.device
) -> Iterator[tuple[Row, Call]]:
    """Yield the passes to be timed at one length, as rows that say what each is, after a check of their results."""
    inputs = _inputs(shape, length, device)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(length + 1)).to(device, shape.dtype)

    def forward(attend: Attend) -> None:
        with torch.no_grad():
            attend(*inputs)

    def both(attend: Attend) -> None:
        torch.autograd.grad(attend(*inputs), inputs, weight, allow_unused=True)

    for contender in contenders:
        errors = _errors(contender, inputs, weight)
        for name, call, error in zip(("forward", "forward+backward"), (forward, both), errors, strict=True):
            what = {
                "attn": contender.attn,
                "dotf": contender.dotf,
                "length": length,
                "direction": f"causal {name}" if contender.is_causal else name,
                "relative_error": error,
                "batch": shape.batch,
                "num_features": contender.num_features,
            }
            yield what, functools.partial(call, contender.attend)


@torch.no_grad()
def _tokens(params: Params, shape: Shape, length: int, device: torch.device) -> Iterator[tuple[Row, Call]]:
    """Yield a causal step of one token after `length` others, exactly and through features."""
    scale = shape.head_dim**-0.5
    query, key, value = (x.detach() for x in _inputs(shape, 1, device))
    queries, keys, values = (x.detach() for x in _inputs(shape, length, device))
    cache = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    steps: dict[int | None, Attend] = {None: functools.partial(F.scaled_dot_product_attention, query, *cache)}
    for num_features in params.bench.num_features:
        features = Estimate(DOTF, num_features).draw(shape.head_dim, device=device)
        _, state = extend(features, None, queries, keys, values, scale=scale)
        steps[num_features] = functools.partial(_extend, features, state, query, key, value, scale)
    truth = steps[None]()
    for budget, step in steps.items():
        what = {
            "attn": FUNCTION if budget else "sdpa",
            "dotf": DOTF if budget else None,
            "length": length,
            "direction": "one token",
            "relative_error": _relative_error([step()], [truth]),
            "batch": shape.batch,
            "num_features": budget,
        }
        yield what, torch.no_grad()(step)


def _extend(features: FeatureMap, state: State, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return extend(features, state, query, key, value, scale=scale)[0]


def time_passes(
    passes: Iterable[tuple[Row, Call]], reference: str, repeats: int, device: torch.device
) -> Iterator[Row]:
    """Yield a row with the times and the memory of each pass; speed-ups are over the same pass of `reference`."""
    rows, calls = zip(*passes, strict=True)
    tasks = dict(enumerate(calls))
    quartiles: dict[int, list[float]] = {}
    for _ in range(1 + AGAIN):
        for number, times in _interleaved(tasks, repeats).items():
            quartiles[number] = np.percentile(times, (25, 50, 75)).tolist()
        tasks = {i: calls[i] for i, (low, median, high) in quartiles.items() if high - low > UNSTEADY * median}
    baselines = {row["direction"]: quartiles[number][1] for number, row in enumerate(rows) if row["attn"] == reference}
    for number, (what, call) in enumerate(zip(rows, calls, strict=True)):
        low, median, high = quartiles[number]
        memory, error = _peak_memory_mb(call, device), what["relative_error"]
        print(
            f"{what['length']:>6} {what['attn']:<12} {what['num_features'] or '':>5} {what['direction']:<24} "
            f"{median:10.3f} ms {memory:9.2f} MB{'' if error is None else f'  error {error:.1e}'}",
            flush=True,
        )
        yield {
            **what,
            "milliseconds": median,
            "spread": high - low,
            "peak_memory_mb": memory,
            "speedup_vs_sdpa": baselines[what["direction"]] / median,
        }


def _errors(contender: Contender, inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor) -> tuple[float, float]:
    """Return relative errors of outputs and of gradients; raise TrainingFailed where they may not be timed."""
    length = inputs[0].shape[-2]
    picked = torch.linspace(0, length - 1, min(length, CHECKED_QUERIES), device=weight.device).long()
    weight = weight[..., picked, :]
    output = contender.attend(*inputs)[..., picked, :]
    gradients = torch.autograd.grad(output, inputs, weight, allow_unused=True)
    query, key, value = (x.detach().double().requires_grad_() for x in inputs)
    allowed = torch.arange(length, device=weight.device) <= picked[:, None] if contender.is_causal else None
    scores = query[..., picked, :] @ key.mT * query.shape[-1] ** -0.5
    truth = normalise(KERNELS.get(contender.dotf or DOTF)(), scores, allowed) @ value
    true_gradients = torch.autograd.grad(truth, (query, key, value), weight.double())
    found = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, gradients, strict=True)]
    errors = _relative_error([output.detach()], [truth.detach()]), _relative_error(found, true_gradients)
    if not all(math.isfinite(error) and error <= contender.tolerance for error in errors):
        form = "causal " if contender.is_causal else ""
        raise TrainingFailed(
            f"{form}{contender.attn} at length {length} is not timed: its relative error is {errors[0]:.2g} (outputs) "
            f"and {errors[1]:.2g} (gradients), and may be {contender.tolerance:g}"
        )
    return errors


def _relative_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    wrong = sum(float((a.double() - b).square().sum()) for a, b in zip(found, truth, strict=True))
    return (wrong / sum(float(b.square().sum()) for b in truth)) ** 0.5


def _interleaved(tasks: Mapping[K, Call], repeats: int) -> dict[K, list[float]]:
    """Return milliseconds per call, `repeats` samples of each; every other round runs the tasks backwards."""
    loops = {}
    for name, call in tasks.items():
        first = timeit.timeit(call, timer=timer, number=1)
        # The first call of a short one is slower than the others.
        again = first if first > 1 else timeit.timeit(call, timer=timer, number=1)
        loops[name] = max(1, round(SAMPLE_SECONDS / again))
    samples: dict[K, list[float]] = {name: [] for name in tasks}
    for number in range(repeats):
        for name in list(tasks)[:: 1 if number % 2 == 0 else -1]:
            seconds = timeit.timeit(tasks[name], timer=timer, number=loops[name])
            samples[name].append(1e3 * seconds / loops[name])
    return samples


def _peak_memory_mb(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max([0, *np.cumsum(sizes)]) / 2**20
