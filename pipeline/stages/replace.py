"""Stage `replace`: what another attention makes of a trained model, on texts that nothing was fitted to.

Of an encoder, texts are embedded by the mean of their tokens. Of each review `cosine` is that of its embeddings by
replaced and by exact attention; of each paper `reciprocal_rank` is one over the rank at which its beginning finds its
middle among all middles, ties counting against it. The shares of the attention explained (`schoenbat.diagnosis`), one
for each head, are of a few of the reviews. Of a language model `loss` is that of a token in nats, in windows of reviews
one after another.

runs/PROFILE/trained/CELL.csv has these values text by text, for comparisons in pairs, as means over draws; CELL.json
what they were made with, and how attention was set, which `bench` times.
"""

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.grid.checked import check_code
from pipeline.grid.freshness import PAPERS, REVIEWS, Freshness, data_folder
from pipeline.grid.numerics import digest
from pipeline.grid.params import ModelParams, Params, ReplacementParams, model_of
from pipeline.grid.results import Replaced
from pipeline.grid.settings import params_file, read_yaml
from pipeline.host.devices import describe_device, prepare_host
from pipeline.host.files import git_revision
from pipeline.host.progress import Meter
from pipeline.stages._models import find_model
from schoenbat.attention import ATTENTIONS, Attention
from schoenbat.diagnosis import PoorEstimateWarning
from schoenbat.errors import UserError, unknown_name
from schoenbat.estimate import Estimate
from schoenbat.files import write_bytes
from schoenbat.fitting import transfer
from schoenbat.integrations import huggingface, layers
from schoenbat.lra.data.arrays import Dataset
from schoenbat.ops._share import compare_exactly
from schoenbat.ops.reference import AttentionInputs, fill_masked
from schoenbat.ops.sparse import HeadKernels
from schoenbat.replacement import _Transformers, replace

SEED, AT_ONCE, SHARE_TEXTS, SHARE_TOKENS, GOLDEN_TEXTS = 0, 20, 8, 2048, 2
BATCH, PIECE = 8, 512
"""Reviews, and tokens of a window, that updates of low rank are fitted to in one step."""


def run(params: Params, name: str, *, force: bool = False) -> None:
    """Measure one cell of `trained.cells`, unless that is up to date; DataUnavailable if the model is not here."""
    if name not in params.trained.cells:
        raise unknown_name("cell", name, params.trained.cells)
    results, made_from = Replaced(params.profile, name), Freshness(read_yaml(params_file())).replaced(name)
    if made_from is None:
        raise UserError(f"no prepared data for {name}; preprocess {REVIEWS} and {PAPERS}")
    if not force and results.fingerprint() == str(made_from):
        print(f"{name}: up to date; --force measures it again", flush=True)
        return
    check_code()
    prepare_host(params.run.threads)
    values, about = measure(params, name, f"{made_from.code}-{made_from.data}")
    means = {measured: of_draws.mean(0).tolist() for measured, of_draws in values.items()}
    about |= {
        "spreads": {measured: spread(of_draws) for measured, of_draws in values.items()},
        "threads": params.run.threads,
        "device": describe_device(torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "git_revision": git_revision(),
        "fingerprint": asdict(made_from),
    }
    results.write([dict(zip(means, row, strict=True)) for row in zip(*means.values(), strict=True)], about)
    print(f"{name}: " + ", ".join(f"{measured} {np.mean(of):.4f}" for measured, of in means.items()), flush=True)


def golden_record(params: Params, name: str) -> dict[str, np.ndarray]:
    """Return what a cell gives on few texts, to compare two revisions of the code."""
    model, trained = model_of(name), params.trained
    few = with_changes(trained, model={**trained.model, model: with_changes(trained.model[model], texts=GOLDEN_TEXTS)})
    values, _ = measure(with_changes(params, trained=few), name, git_revision())
    return {"outputs": torch.cat([of_draws.flatten() for of_draws in values.values()]).numpy()}


def measure(params: Params, name: str, code: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the values of each text, [draws, n] by what they are, and how attention was set.

    Args:
        code: names what embeddings by exact attention are made from; these are kept, as all methods need them.
    """
    model_params, method = params.trained.model[model_of(name)], params.trained.cells[name]
    # What is measured is what they warn of.
    warnings.simplefilter("ignore", PoorEstimateWarning)
    folder = find_model(model_of(name), model_params)
    kind = AutoModelForCausalLM if model_params.causal else AutoModel
    model = kind.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    texts = read_texts(params.profile, AutoTokenizer.from_pretrained(folder), model_params, method.fitting)
    heads: list[float] = []
    with torch.no_grad(), Meter(f"{name}: texts") as meter:
        if model_params.causal:
            values = {"loss": _measure_losses(model, texts, name, method, meter)}
        else:
            known = digest([code, asdict(model_params)])
            cache = Path("checkpoints", params.profile, f"{model_of(name)}-{known}.npy")
            values, heads = _measure_embeddings(model, texts, name, method, cache, meter)
    config = model.config
    shape = {
        "heads": config.num_attention_heads,
        "key_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": config.hidden_size // config.num_attention_heads,
        "causal": model_params.causal,
    }
    described = [_describe(layer) for layer in huggingface.attention_layers(model).values()]
    return values, {"shape": shape, "layers": described, "heads": heads, "draws": method.draws}


def spread(of_draws: Tensor) -> float | None:
    """Return the standard deviation of the means of several draws [draws, n]."""
    return float(of_draws.mean(1).std()) if len(of_draws) > 1 else None


def _describe(layer: nn.Module) -> dict[str, Any] | None:
    """Return what a layer has of its own of the arguments of `Estimate`; None where it has nothing."""
    found = layers.estimate_of(layer)
    return None if found is None else {name: getattr(found, name) for name in ("num_features", "window", "heavy")}


class Texts(NamedTuple):
    """What a model is given.

    Attributes:
        measured: token ids with the mask of real tokens: of an encoder reviews, beginnings and middles of papers,
            [3, 2, n, tokens]; of a language model windows, [1, 2, n, tokens].
        fitting: others, [2, m, tokens].
    """

    measured: Tensor
    fitting: Tensor


def read_texts(profile: str, tokenizer: Any, model: ModelParams, fitting: int) -> Texts:
    """Read reviews of the test split, `fitting` more to fit to, and papers of its pairs, as `SEED` orders them."""

    def tokens_of(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    number, size = model.texts, model.tokens
    reviews = _read(profile, REVIEWS)
    if model.causal:
        found: list[int] = []
        while len(found) < (number + fitting) * size:
            found += tokens_of(f"{next(reviews)}\n\n")
        ids = torch.tensor(found[: (number + fitting) * size]).unflatten(0, (number + fitting, size))
        both = torch.stack([ids, torch.ones_like(ids)])
        return Texts(both[None, :, :number], both[:, number:])

    def pack(rows: Sequence[list[int]]) -> Tensor:
        ids = torch.full((2, len(rows), size), tokenizer.pad_token_id)
        ids[1] = 0
        for i, row in enumerate(rows):
            row = [tokenizer.cls_token_id, *row[: size - 2], tokenizer.sep_token_id]
            ids[0, i, : len(row)], ids[1, i, : len(row)] = torch.tensor(row), 1
        return ids

    of_reviews = [tokens_of(next(reviews)) for _ in range(number + fitting)]
    # The middle is not to be the beginning.
    long = (tokens for tokens in map(tokens_of, _read(profile, PAPERS)) if len(tokens) >= 4 * size)
    of_papers = [next(long) for _ in range(number)]
    middles = [tokens[len(tokens) // 2 :] for tokens in of_papers]
    return Texts(torch.stack([pack(x) for x in (of_reviews[:number], of_papers, middles)]), pack(of_reviews[number:]))


def _read(profile: str, task: str) -> Iterator[str]:
    """Yield the texts of the test split, each once; raises UserError after the last."""
    data, seen = Dataset(data_folder(profile, task)), set()
    for index in np.random.default_rng(SEED).permutation(data.num_examples("test")):
        batch = data.batch("test", np.array([index]))
        for tokens, mask in zip(batch.tokens[0], batch.key_mask[0], strict=True):
            content = bytes((tokens[mask] - 1).tolist())
            if content not in seen:
                seen.add(content)
                yield content.decode(errors="ignore").replace("<br />", " ")
    raise UserError(f"the test split of {task} has too few texts: lower trained.model.*.texts, or raise its max_length")


class Rival:
    """An attention implementation of transformers: a mechanism of `schoenbat.attention`, drawn for each layer."""

    def __init__(self, method: ReplacementParams, seed: int) -> None:
        assert method.attention is not None
        self.found, self.options = ATTENTIONS.get(method.attention), method.options
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
        head_dim, groups = query.shape[-1], query.shape[1] // key.shape[1]
        assert scaling is None or math.isclose(scaling, head_dim**-0.5)
        if module not in self.drawn:
            config = self.found.Config(**self.options)
            self.drawn[module] = self.found(config, head_dim=head_dim, kernel=None, generator=self.generator)
        key_mask, causal = huggingface._read_mask(attention_mask, module, query, key, is_causal)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return self.drawn[module](query, key, value, key_mask, causal).transpose(1, 2).contiguous(), None


def set_up(model: Any, name: str, method: ReplacementParams, draw: int, fitting: Tensor) -> None:
    """Let a model attend by a method.

    Args:
        name: of the attention implementation.
        fitting: what settings are chosen on, and kernels and updates fitted to: [2, m, tokens].
    """
    huggingface.uninstall(model)
    name = f"{name}-{draw}"
    if method.share is not None:
        replace(model, call(fitting[:, : max(1, SHARE_TOKENS // fitting.shape[2])]), method.share)
    elif method.attention is not None:
        AttentionInterface.register(name, Rival(method, SEED + draw))
        AttentionMaskInterface.register(name, huggingface._make_mask)
        model.set_attn_implementation(name)
    elif method.estimate:
        huggingface.register(name, with_changes(Estimate(**method.estimate), seed=SEED + draw))
        huggingface.install(model, name)
    if method.bare:
        for layer in huggingface.attention_layers(model).values():
            kernels = HeadKernels(model.config.num_attention_heads)
            nn.init.constant_(kernels.logarithms[:, 0], -math.inf)
            estimate = layers.estimate_of(layer)
            assert estimate is not None
            layers.give(layer, estimate, layers.features_of(layer), kernels)
        huggingface.switch(model, name)
    if method.fit:
        print(transfer(model, [call(half) for half in fitting.chunk(2, 1)]), flush=True)
    if method.rank:
        batches = _batches(model, fitting)
        with torch.enable_grad():
            updates = transfer(model, batches, method.steps, rank=method.rank, own_steps=method.own_steps)
        print(updates, flush=True)


def _batches(model: Any, fitting: Tensor) -> list[dict[str, Tensor]]:
    """Return what a step fits updates of low rank to: some reviews, or a piece of a window with its own next tokens."""
    if model.get_output_embeddings() is None:
        return [call(ids) for ids in fitting.split(BATCH, 1)]
    size = min(PIECE, fitting.shape[2])
    pieces = fitting.flatten(1).unfold(1, size, size).split(1, 1)
    return [{**call(ids), "labels": ids[0]} for ids in pieces]


def call(ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a model for some [2, n, tokens] of `Texts`."""
    return {"input_ids": ids[0], "attention_mask": ids[1]}


def embed(model: Any, ids: Tensor) -> Tensor:
    """Embed texts [2, n, tokens]: [n, width]."""
    hidden: Tensor = model(**call(ids)).last_hidden_state
    there = ids[1].unsqueeze(-1)
    return (hidden * there).sum(1) / there.sum(1)


def reciprocal_ranks(beginnings: Tensor, middles: Tensor) -> Tensor:
    """Return one over the rank of its own middle among all, for each beginning; ties count against it."""
    similarities = F.normalize(beginnings, dim=-1) @ F.normalize(middles, dim=-1).mT
    own = similarities.diagonal()[:, None]
    return 1.0 / (similarities >= own).sum(-1)


def _measure_embeddings(
    model: Any, texts: Texts, name: str, method: ReplacementParams, cache: Path, meter: Meter
) -> tuple[dict[str, Tensor], list[float]]:
    """Return cosines and reciprocal ranks, [draws, n] each, and the share explained of each head.

    Args:
        cache: keeps the embeddings of reviews by exact attention, which all methods are compared with.
    """
    reviews = texts.measured[0].split(AT_ONCE, 1)
    if not cache.is_file():
        content = io.BytesIO()
        np.save(content, torch.cat([embed(model, ids) for ids in reviews]).numpy())
        write_bytes(cache, content.getvalue())
    exact = torch.from_numpy(np.load(cache))
    compared: dict[str, AttentionInputs] = {}
    _Transformers(model).run(call(texts.measured[0, :, :SHARE_TEXTS]), compared.__setitem__)
    cosines, ranks, heads = [], [], []
    total = 3 * method.draws * len(reviews)
    for draw in range(method.draws):
        set_up(model, name, method, draw, texts.fitting)
        # Updated queries and keys are not those that exact attention was given.
        heads.append(torch.tensor([] if method.rank else shares(model, compared)))
        embedded = []
        for part in texts.measured:
            for ids in part.split(AT_ONCE, 1):
                embedded.append(embed(model, ids))
                meter.update(len(embedded) + 3 * draw * len(reviews), total)
        own, beginnings, middles = torch.cat(embedded).unflatten(0, (3, -1))
        cosines.append(F.cosine_similarity(own, exact, dim=-1))
        ranks.append(reciprocal_ranks(beginnings, middles))
    found = {"cosine": torch.stack(cosines), "reciprocal_rank": torch.stack(ranks)}
    return found, torch.stack(heads).mean(0).tolist()


def shares(model: Any, inputs: Mapping[str, AttentionInputs]) -> list[float]:
    """Return the share of the exact attention that each head of a model explains, layer by layer."""
    found, every = [], huggingface.attention_layers(model)
    for layer, given in inputs.items():
        given = given._replace(value=fill_masked(given.value, given.key_mask))
        exact = compare_exactly(Estimate().function, given)
        found += exact.share_explained(attend(model, every[layer], given), dim=(0, 2, 3))
    return found


def attend(model: Any, layer: nn.Module, inputs: AttentionInputs) -> Tensor:
    """Call the attention implementation of a model as one of its layers does: [B, H, N, v]."""
    query, key, value, key_mask, causal, scale, _ = inputs
    implementation = model.config._attn_implementation
    mask: Any = huggingface.KeyMask(causal, key_mask, (query.shape[0], 1, query.shape[2], key.shape[2]))
    if implementation == "sdpa":
        mask = None if key_mask is None else key_mask[:, None, None]
    function = ALL_ATTENTION_FUNCTIONS[implementation]
    out: Tensor = function(layer, query, key, value, mask, scaling=scale, is_causal=causal)[0]
    return out.transpose(1, 2)


def _measure_losses(model: Any, texts: Texts, name: str, method: ReplacementParams, meter: Meter) -> Tensor:
    """Return the losses of windows, [draws, n]."""
    windows, losses = texts.measured[0, 0], []
    for draw in range(method.draws):
        set_up(model, name, method, draw, texts.fitting)
        for number, window in enumerate(windows):
            logits = model(window[None], use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits, window[1:]))
            meter.update(draw * len(windows) + number + 1, method.draws * len(windows))
    return torch.stack(losses).unflatten(0, (method.draws, -1))
