"""Every model type of transformers that builds as a tiny random configuration, under our attention and under its own.

    python -m tests.integrations.sweep [TYPE ...]

prints one line for each: equal, refused with the reason, does not build with the reason, or what is wrong with it.
Without names it takes all types; the exit code tells whether any was wrong. `test_every_model_type` runs a third.
"""

import copy
import inspect
import os
import re
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AttentionInterface, PreTrainedConfig, PreTrainedModel

from schoenbat.errors import UserError
from schoenbat.integrations.huggingface import KernelCache, Settings, install, register

register("sweep-exact", Settings(num_features=None))
register("sweep-64", Settings(num_features=64))
CALLS: list[str] = []


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function, noting in CALLS the layers that use it."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        CALLS.append(type(module).__name__)
        return function(module, *args, **kwargs)

    return attention


AttentionInterface.register("sweep-64", counted(AttentionInterface()["sweep-64"]))

TOLERANCE = 1e-4
LARGEST = 5_000_000
VOCABULARY = 128

# The first pattern that a field's name matches says how large it may be in a tiny configuration.
SIZES = [
    (r"vocab_size|vocab_size_.*|num_embeddings", VOCABULARY),
    (r".*rotary_dim", 8),
    (r".*head_dim.*|.*heads?_dim|.*head_size|d_kv|.*_lora_rank|.*mamba_d_head", 16),
    (r"(.*_)?(first_k_dense_replace|attn_layer_offset|expert_layer_offset|num_nextn_predict_layers)", 1),
    (r"(.*_)?(num_|n_)?.*(heads?|query_groups|head_kv)", 4),
    (r"(.*_)?(num_|n_)?.*(layers?|depth|blocks)", 2),
    (r"(.*_)?(num_|n_)?(routed_|local_)?experts", 4),
    (r"(.*_)?(num_experts_per_tok|top_k|moe_topk|moe_k|topk_group|n_group)", 2),
    (r"image_size|img_size|input_size|crop_size|resolution", 32),
    (r"patch_size|spatial_patch_size", 8),
    (
        r".*(hidden_size|d_model|n_embd|intermediate_size|embedding_size|d_ff|d_inner|n_inner|width|channels|inner_size|"
        r"_size_per_layer_input|ffn_size|out_features|d_embed|units|feature_size|dim)",
        64,
    ),
    (r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|seq_length|max_seq_len", 512),
]
SHARED_HEADS = r"(.*_)?(num_)?(query_groups|kv_heads|key_value_heads|n_head_kv|head_kv)"
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}


def tiny(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """What has to be said to the class of a configuration for one of the same kind to be small."""
    said: dict[str, Any] = {}
    names = inspect.signature(type(config).__init__).parameters
    special, heads = VOCABULARY - 1, getattr(config, "num_attention_heads", None)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            said[name] = {"model_type": value.model_type, **tiny(value, layers)}
        elif name.startswith("_") or isinstance(value, bool) or (name not in names and name not in vars(type(config))):
            continue
        elif name in TOKENS:
            said[name] = TOKENS[name]
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            half = int(16 * value.get("partial_rotary_factor", 1)) // 2
            said[name] = {**value, "mrope_section": [half // 3, half // 3 or 1, half - half // 3 - (half // 3 or 1)]}
        elif re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int) and value >= VOCABULARY:
            said[name] = special = special - 1
        elif isinstance(value, int):
            for pattern, size in SIZES:
                if re.fullmatch(pattern, name):
                    size = {2: layers}.get(size, size) if "layers" in pattern else size
                    size = 2 if re.fullmatch(SHARED_HEADS, name) and value != heads else size
                    if value > size:
                        said[name] = size
                    break
    return said


# What a few types need besides.
OPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 2]},
    "informer": {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 2]},
    "time_series_transformer": {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 2]},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "nemotron": {"num_key_value_heads": 2},
}


# Softmax of these is no attention.
NO_ATTENTION = {"patchtsmixer": "gates within a patch"}


class DoesNotBuild(Exception):
    """A type that cannot be made tiny here, and why."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise DoesNotBuild(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def config_of(model_type: str, layers: int = 2, **options: Any) -> PreTrainedConfig:
    config_class, more = CONFIG_MAPPING[model_type], OPTIONS.get(model_type, {})
    return config_class(**{**tiny(config_class(**more), layers), **more, **options})


def model_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """The model with weights that make attention matter: of order one over the square root of the inputs."""
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise DoesNotBuild(f"has {size / 1e6:.0f} million parameters even so")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.dtype.is_floating_point:
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                fan_in = weight.numel() / weight.shape[0]
                weight.copy_(noise * (1.5 * fan_in**-0.5 if fan_in < 1000 else 0.1))
            else:
                weight.add_(0.1 * noise)
    return model


Inputs = dict[str, Any]


@dataclass
class Case:
    """One call: its arguments, what of the output counts, and the same call with the last token another one."""

    name: str
    inputs: Inputs
    real: Tensor | None = None
    changed: Inputs | None = None


def masks(length: int) -> Iterator[tuple[str, int, Tensor | None]]:
    """Names, batch sizes and attention masks, True = attend."""
    places = torch.arange(length)
    yield "batch 3", 3, None
    yield "batch 1", 1, None
    yield "right padding", 3, places < torch.tensor([length, length - 2, length - 4])[:, None]
    yield "left padding", 3, places >= torch.tensor([0, 2, 4])[:, None]
    yield "right padding, batch 1", 1, places < torch.tensor([[length - 3]])
    yield "left padding, batch 1", 1, places >= torch.tensor([[3]])


def ids_of(batch: int, length: int, seed: int, mask: Tensor | None = None) -> Tensor:
    ids = torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))
    return ids if mask is None else ids.masked_fill(~mask, TOKENS["pad_token_id"])


def with_last_token_changed(ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :-1], 5 + (ids[:, -1:] + 7) % 55], 1)


def text_cases(names: set[str], is_pair: bool) -> Iterator[Case]:
    """Calls of a model that takes token ids; a pair is an encoder with a decoder."""
    for name, batch, mask in masks(7):
        if mask is not None and "attention_mask" not in names:
            continue
        ids = ids_of(batch, 7, 1, mask)
        if mask is not None:  # where the last token of a text is looked for by its id, it must be no padding
            last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
            ids[torch.arange(batch), last] = TOKENS["eos_token_id"]
        inputs: Inputs = {"input_ids": ids}
        if "bbox" in names:
            inputs["bbox"] = torch.tensor([1, 2, 3, 4]).expand(batch, 7, 4)
        if mask is not None:
            inputs["attention_mask"] = mask.long()
        if not is_pair:
            changed = {**inputs, "input_ids": with_last_token_changed(ids)} if mask is None else None
            yield Case(name, inputs, mask, changed)
            continue
        wanted = ids_of(batch, 5, 2)
        inputs["decoder_input_ids"] = wanted
        changed = {**inputs, "decoder_input_ids": with_last_token_changed(wanted)}
        yield Case(name, inputs, None, changed)
        if "decoder_attention_mask" in names and mask is not None:
            own = torch.arange(5) < torch.tensor([5, 4, 3][:batch])[:, None]
            if "left" in name:
                own = own.flip(1)
            masked = {**inputs, "decoder_input_ids": ids_of(batch, 5, 2, own), "decoder_attention_mask": own.long()}
            yield Case(name + " in both", masked, own)


def decoder_cases(names: set[str], width: int) -> Iterator[Case]:
    """Calls of a text model made a decoder with cross attention."""
    states = torch.randn(3, 6, width, generator=torch.Generator().manual_seed(3))
    seen = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    for case in text_cases(names, is_pair=False):
        batch = len(case.inputs["input_ids"])
        for how, more in (
            ("", {}),
            (", cross attention", {"encoder_hidden_states": states[:batch]}),
            (
                ", padded cross attention",
                {"encoder_hidden_states": states[:batch], "encoder_attention_mask": seen[-batch:].long()},
            ),
        ):
            changed = None if case.changed is None else {**case.changed, **more}
            yield Case(f"decoder, {case.name}{how}", {**case.inputs, **more}, case.real, changed)


def other_inputs(model: PreTrainedModel, names: set[str]) -> Iterator[Callable[[int], Inputs]]:
    """What a model of images or sounds may take, by batch size; which of these it does is tried."""

    def noise(*shape: int) -> Callable[[int], Tensor]:
        return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))

    config = model.config
    if "past_values" in names:
        yield lambda batch: {
            "past_values": noise(8)(batch),
            "past_time_features": torch.zeros(batch, 8, 0),
            "past_observed_mask": torch.ones(batch, 8),
            "future_values": noise(4)(batch),
            "future_time_features": torch.zeros(batch, 4, 0),
        }
        yield lambda batch: {"past_values": noise(getattr(config, "context_length", 32), 1)(batch)}
    if "grid_thw" in names:
        side, frames = getattr(config, "patch_size", 8), getattr(config, "temporal_patch_size", 1)
        channels = getattr(config, "in_channels", getattr(config, "in_chans", getattr(config, "num_channels", 3)))
        for width in dict.fromkeys([channels * frames * side**2, channels * side**2]):
            yield lambda batch, n="hidden_states" if "hidden_states" in names else "pixel_values", w=width: {
                n: noise(w)(16 * batch),
                "grid_thw": torch.tensor([[1, 4, 4]]).expand(batch, 3).contiguous(),
            }
    if "pixel_values" in names:
        sizes = [getattr(c, "image_size", 32) for c in (config, getattr(config, "vision_config", None)) if c is not None]
        for size in dict.fromkeys([*(s if isinstance(s, int) else 32 for s in sizes), 32, 64]):
            for channels in (3, 1):
                yield lambda batch, s=size, c=channels: {"pixel_values": noise(c, s, s)(batch)}
            frames = getattr(config, "num_frames", 4)
            yield lambda batch, s=size, f=frames: {"pixel_values": noise(f, 3, s, s)(batch)}
    if "pixel_values_videos" in names:
        frames = getattr(config, "frames_per_clip", 4)
        yield lambda batch: {"pixel_values_videos": noise(frames, 3, 32, 32)(batch)}
    if "input_values" in names:
        yield lambda batch: {"input_values": noise(2000)(batch)}
        yield lambda batch: {"input_values": noise(1, 2000)(batch)}
        bins, length = getattr(config, "num_mel_bins", 16), getattr(config, "max_length", 64)
        yield lambda batch: {"input_values": noise(length, bins)(batch)}
    if "input_features" in names:
        for width in dict.fromkeys(
            getattr(c, n)
            for c in (config, getattr(config, "audio_config", None))
            for n in ("num_mel_bins", "feature_size", "input_channels", "feature_projection_input_dim", "input_feat_per_channel")
            if isinstance(getattr(c, n, None), int)
        ):
            decoder = {"decoder_input_ids": ids_of(1, 5, 2)} if "decoder_input_ids" in names else {}
            for shape in ((32, width), (width, 2 * getattr(config, "max_source_positions", 32)), (1, width, 64)):
                yield lambda batch, shape=shape, d=decoder: {
                    "input_features": noise(*shape)(batch),
                    **{n: ids.expand(batch, -1) for n, ids in d.items()},
                }
    for name in ("inputs_embeds", "hidden_states"):
        if name in names and getattr(config, "hidden_size", None):
            yield lambda batch, n=name: {n: noise(7, config.hidden_size)(batch)}


def first_tensor(out: Any) -> Tensor:
    values = out.values() if hasattr(out, "values") else out if isinstance(out, tuple | list) else [out]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            return value
        if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            return value[0]
    raise DoesNotBuild("its output holds no tensor to compare")


class OtherAttention(TorchDispatchMode):
    """Counts what looks like attention that is not ours: fused attention, or a softmax over rows of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if "scaled_dot_product" in name or ("softmax" in name and args[0].dim() >= 3 and "backward" not in name):
            self.seen.append(f"{name.split('::')[-1]} of {list(args[0].shape)}")
        return func(*args, **(kwargs or {}))


def output_of(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return first_tensor(model(**inputs, **options))


def in_steps(model: PreTrainedModel, case: Case, name: str, cache: Any = None) -> Tensor:
    """The outputs of a causal model that is given 4 tokens, 2 and 1, with the cache that it makes itself."""
    prefix = "decoder_" if "decoder_input_ids" in case.inputs else ""
    ids, mask = case.inputs[prefix + "input_ids"], case.inputs.get(prefix + "attention_mask")
    parts, done = [], 0
    for step in (4, 2, 1) if ids.shape[1] == 7 else (2, 2, 1):
        inputs = {**case.inputs, prefix + "input_ids": ids[:, done : done + step], "use_cache": True, name: cache}
        if mask is not None:
            inputs[prefix + "attention_mask"] = mask[:, : done + step]
        with torch.no_grad():
            out = model(**inputs)
        cache = getattr(out, name, None)
        if cache is None:
            raise DoesNotBuild("makes no cache")
        parts.append(first_tensor(out))
        done += step
    return torch.cat(parts, 1)


@dataclass
class Verdict:
    """Of one type: what each case gave."""

    model_type: str
    family: str = ""
    missing: str = ""
    equal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    without: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def state(self) -> str:
        if self.missing:
            return "does not build"
        if self.wrong:
            return "WRONG"
        if self.refused:
            return "refused in part" if self.equal else "refused"
        return "equal"

    def __str__(self) -> str:
        what = {
            "does not build": self.missing,
            "WRONG": "; ".join(self.wrong[:3]),
        }.get(self.state, "; ".join(f"{n} x {reason}" for reason, n in self.refused.items()))
        if self.without and self.state != "does not build":
            what = "; ".join([what, *(f"without: {reason}" for reason in sorted(self.without))]).removeprefix("; ")
        return f"{self.model_type:32} {self.state:16} {self.equal:3} equal  {what}"


def differs(found: Tensor, expected: Tensor, real: Tensor | None) -> float:
    """The largest difference where it counts, relative to the largest output."""
    if real is not None and found.shape[: real.dim()] == real.shape:
        found, expected = found[real], expected[real]
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1)).item()


def cases_of(model: PreTrainedModel) -> list[Case]:
    """The calls that the model itself can take."""
    names = set(inspect.signature(model.forward).parameters)
    text = list(text_cases(names, "decoder_input_ids" in names)) if "input_ids" in names else []
    if any(works(model, case.inputs) for case in text[:2]):
        return [case for case in text if works(model, case.inputs)]
    for inputs in other_inputs(model, names):
        alone = [Case(f"batch {batch}", inputs(batch)) for batch in (1, 3)]
        if works(model, alone[0].inputs):
            return [case for case in alone if works(model, case.inputs)]
        both = [Case(case.name, {**inputs(len(case.inputs["input_ids"])), **case.inputs}) for case in text]
        if both and works(model, both[0].inputs):
            return [case for case in both if works(model, case.inputs)]
    return []


def works(model: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether the unchanged model takes this call: what it does not take says nothing about ours."""
    try:
        return bool(torch.isfinite(output_of(model, inputs)).all())
    except DoesNotBuild:
        raise
    except Exception:  # noqa: BLE001 (any of a thousand complaints of foreign code)
        return False


Take = Callable[[PreTrainedModel], Tensor]


def judge(model_type: str) -> Verdict:
    """One type through all of its cases."""
    verdict, start = Verdict(model_type), time.monotonic()
    try:
        with within(40):
            _judge(verdict)
    except DoesNotBuild as error:
        verdict.missing = str(error)
    verdict.seconds = time.monotonic() - start
    return verdict


def _judge(verdict: Verdict) -> None:
    try:
        model_class = MODEL_MAPPING[CONFIG_MAPPING[verdict.model_type]]
    except (KeyError, ValueError) as error:
        raise DoesNotBuild(f"has no model without a head: {one_line(error)}") from error
    if isinstance(model_class, tuple | list):
        model_class = model_class[0]
    for layers in (2, 4):  # some kinds of layers come third or fourth only
        try:
            config = config_of(verdict.model_type, layers)
            eager = model_of(model_class, config, "eager")
            cases = cases_of(eager)
        except DoesNotBuild:
            raise
        except Exception as error:  # noqa: BLE001
            raise DoesNotBuild(one_line(error)) from error
        if cases:
            break
    else:
        raise DoesNotBuild("no input found that it takes")
    verdict.family = model_class.__name__
    _compare(verdict, model_class, config, eager, cases)
    decoder = _decoder_of(verdict.model_type, model_class)
    if decoder is not None:
        names = set(inspect.signature(decoder.forward).parameters)
        wanted = [case for case in decoder_cases(names, decoder.config.hidden_size) if works(decoder, case.inputs)]
        if wanted:
            _compare(verdict, model_class, decoder.config, decoder, wanted)


def _decoder_of(model_type: str, model_class: type[PreTrainedModel]) -> PreTrainedModel | None:
    """The same text model as a causal decoder with cross attention, where there is such a thing."""
    if "encoder_hidden_states" not in inspect.signature(model_class.forward).parameters:
        return None
    try:
        return model_of(model_class, config_of(model_type, is_decoder=True, add_cross_attention=True), "eager")
    except DoesNotBuild:
        raise
    except Exception:  # noqa: BLE001
        return None


def blind_alone(model: PreTrainedModel, case: Case) -> bool:
    """Whether the unchanged model is causal: its last token changes no output before it."""
    assert case.changed is not None
    first, second = (output_of(model, inputs)[:, :-1] for inputs in (case.inputs, case.changed))
    return first.shape == second.shape and torch.equal(first, second)


def _compare(
    verdict: Verdict,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    eager: PreTrainedModel,
    cases: list[Case],
) -> None:
    def note(name: str, do: Callable[[], str | None]) -> None:
        """Count what `do` comes to: nothing, a refusal, or something wrong."""
        try:
            wrong = do()
        except UserError as error:
            verdict.refused[one_line(error)] += 1
        except DoesNotBuild:
            raise
        except Exception as error:  # noqa: BLE001
            verdict.wrong.append(f"{name}: {one_line(error)}")
        else:
            if wrong is None:
                verdict.equal += 1
            else:
                verdict.wrong.append(f"{name}: {wrong}")

    models: dict[str, PreTrainedModel] = {}

    def build(attention: str) -> str | None:
        models[attention] = model_of(model_class, config, attention)
        return None

    for attention in ("sweep-exact", "sweep-64"):
        note(f"building {attention}", lambda a=attention: build(a))
    if len(models) < 2:
        return
    verdict.equal -= 2

    def equal(model: PreTrainedModel, case: Case, take: Take) -> str | None:
        error = differs(take(model), take(eager), case.real)
        return None if error <= TOLERANCE else f"differs by {error:.2g}"

    def same_with_kernel_cache(case: Case) -> str | None:
        model = models["sweep-64"]
        expected = in_steps(model, case, name_of_cache)
        try:
            found = in_steps(model, case, name_of_cache, KernelCache())
        except UserError as error:
            verdict.without.add(str(error))
            return None
        except ValueError as error:
            if "KernelCache" not in str(error):  # a model may itself say that it needs another cache
                raise
            verdict.without.add(str(error))
            return None
        error = differs(found, expected, case.real)
        return None if error <= 10 * TOLERANCE else f"differs by {error:.2g}"

    def blind(case: Case) -> str | None:
        assert case.changed is not None
        first, second = (output_of(models["sweep-64"], inputs)[:, :-1] for inputs in (case.inputs, case.changed))
        change = (first - second).abs().max().item()
        return f"sees the future by {change:.2g}" if change > 1e-5 else None

    def all_ours(case: Case) -> str | None:
        CALLS.clear()
        with OtherAttention() as other:
            output_of(models["sweep-64"], case.inputs)
        verdict.other += other.seen
        if other.seen and not CALLS and verdict.model_type not in NO_ATTENTION:
            return f"pays no attention to the name: {other.seen[0]}"
        return None

    def packed(case: Case, mask: Tensor | None) -> str | None:
        ids = case.inputs["input_ids"]
        more = {"position_ids": (torch.arange(ids.shape[1]) % 4).expand_as(ids), "attention_mask": mask}
        if not works(eager, {**case.inputs, **more}):
            return None
        whole = Case(case.name, {**case.inputs, **more, "use_cache": False})
        try:
            return equal(models["sweep-exact"], whole, lambda m: output_of(m, whole.inputs))
        except UserError as error:
            return None if "packed sequences" in str(error) else f"is refused with {error}"

    for case in cases:
        note(case.name, lambda case=case: equal(models["sweep-exact"], case, lambda m: output_of(m, case.inputs)))
        if case.changed is not None and blind_alone(eager, case):
            note(case.name + ", future", lambda case=case: blind(case))
    note("other attention", lambda: all_ours(cases[0]))
    names = inspect.signature(inspect.unwrap(type(eager).forward)).parameters
    causal = cases[0].changed is not None and blind_alone(eager, cases[0])
    if causal and "position_ids" in names and "decoder_input_ids" not in names:
        for mask in (None, torch.ones_like(cases[0].inputs["input_ids"])):
            note("packed", lambda mask=mask: packed(cases[0], mask))
    name_of_cache = next((name for name in ("cache", "past_key_values") if name in names), None)
    if name_of_cache is not None and "input_ids" in cases[0].inputs:
        for case in cases:
            if case.name in ("batch 3", "left padding"):
                try:
                    in_steps(eager, case, name_of_cache)
                except DoesNotBuild:
                    continue
                except Exception:  # noqa: BLE001
                    continue
                note(
                    f"in steps, {case.name}",
                    lambda case=case: equal(models["sweep-exact"], case, lambda m: in_steps(m, case, name_of_cache)),
                )

                if name_of_cache is not None:
                    note(f"KernelCache, {case.name}", lambda case=case: same_with_kernel_cache(case))

    def switched() -> str | None:
        model = copy.deepcopy(eager)
        model.set_attn_implementation("sweep-exact")
        return equal(model, cases[0], lambda m: output_of(m, cases[0].inputs))

    def installed() -> str | None:
        try:
            output_of(install(copy.deepcopy(eager), "sweep-64"), cases[0].inputs)
        except UserError as error:
            if CALLS or "has no attention layer" not in str(error):
                raise
            verdict.without.add(str(error))
        return None

    note("set_attn_implementation", switched)
    note("install", installed)


def all_types() -> list[str]:
    """Each type whose model class no earlier type has."""
    seen, names = set(), []
    for name in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[name]
        if config_class in MODEL_MAPPING and config_class not in seen:
            seen.add(config_class)
            names.append(name)
    return sorted(names)


def third(names: list[str], which: int = 0) -> list[str]:
    return [name for name in names if zlib.crc32(name.encode()) % 3 == which]


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()


def main(names: list[str]) -> int:
    quiet()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    start = time.monotonic()
    for name in names or all_types():
        verdict = judge(name)
        counts[verdict.state] += 1
        print(verdict, f"[{verdict.seconds:.1f} s]" if verdict.seconds > 5 else "", flush=True)
        if verdict.other:
            print(f"{'':32} other attention: {Counter(verdict.other).most_common(3)}", flush=True)
    print(", ".join(f"{n} {state}" for state, n in counts.most_common()), f"in {time.monotonic() - start:.0f} s")
    return int(counts["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
