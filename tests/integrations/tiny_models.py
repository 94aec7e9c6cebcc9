"""Tiny random models of any type that transformers knows, and calls that such a model may take."""

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

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


def tiny(config: PreTrainedConfig, layers: int, sections: bool) -> dict[str, Any]:
    """What has to be said to the class of a configuration for one of the same kind to be small.

    `sections` makes the parts of rotary embeddings explicit that models of images and text have.
    """
    said: dict[str, Any] = {}
    names = inspect.signature(type(config).__init__).parameters
    special, heads = VOCABULARY - 1, getattr(config, "num_attention_heads", None)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            said[name] = {"model_type": value.model_type, **tiny(value, layers, sections)}
        elif name.startswith("_") or isinstance(value, bool) or (name not in names and name not in vars(type(config))):
            continue
        elif name in TOKENS:
            said[name] = TOKENS[name]
        elif name == "rope_parameters" and isinstance(value, dict) and (sections or "mrope_section" in value):
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
    "led": {"attention_window": 8},
    "longformer": {"attention_window": 8},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "nemotron": {"num_key_value_heads": 2},
}


class DoesNotBuild(Exception):
    """A type that cannot be made tiny here, and why."""


def class_of(model_type: str) -> type[PreTrainedModel]:
    """The model without a head; of a part of a larger model, the class that such a configuration belongs to."""
    config_class = CONFIG_MAPPING[model_type]
    try:
        found = MODEL_MAPPING[config_class]
    except (KeyError, ValueError):
        name = config_class.__module__.replace(".configuration_", ".modeling_")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise DoesNotBuild(str(error)) from error
        found = [
            thing
            for thing in vars(module).values()
            if isinstance(thing, type)
            and issubclass(thing, PreTrainedModel)
            and thing.config_class is config_class
            and thing.__name__.endswith(("Model", "Encoder", "Transformer"))
            and not thing.__name__.endswith("PreTrainedModel")
        ]
    if isinstance(found, tuple | list):
        if not found:
            raise DoesNotBuild("has no model without a head")
        found = min(found, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))
    return found


def config_of(model_type: str, layers: int = 2, sections: bool = False, **options: Any) -> PreTrainedConfig:
    config_class, more = CONFIG_MAPPING[model_type], OPTIONS.get(model_type, {})
    return config_class(**{**tiny(config_class(**more), layers, sections), **more, **options})


def model_of(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """The model with weights that make attention matter: of order one over the square root of the inputs."""
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise DoesNotBuild(f"has {size / 1e6:.0f} million parameters even so")
    torch.manual_seed(0)
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
            yield (
                lambda batch, n="hidden_states" if "hidden_states" in names else "pixel_values", w=width: {
                    n: noise(w)(16 * batch),
                    "grid_thw": torch.tensor([[1, 4, 4]]).expand(batch, 3).contiguous(),
                }
            )
    if "pixel_values" in names:
        sizes = [
            getattr(c, "image_size", 32) for c in (config, getattr(config, "vision_config", None)) if c is not None
        ]
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
            for n in (
                "num_mel_bins",
                "feature_size",
                "input_channels",
                "feature_projection_input_dim",
                "input_feat_per_channel",
            )
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
