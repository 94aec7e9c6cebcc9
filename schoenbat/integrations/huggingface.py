"""Dot-product-kernel attention for the models of Hugging Face transformers (extra `schoenbat[hf]`).

Importing this module registers the attention implementations "schoenbat" (kernel exp, 256 features of the sketch, seed
0) and "schoenbat-exact". Any model that goes through the attention interface of transformers then takes
`attn_implementation="schoenbat"`. Its features are a function of head_dim and these settings alone, drawn when first
needed and held outside the model; `install` instead draws them per layer, as buffers in the model's state_dict.
`register` gives another `schoenbat.Estimate` a name.

What linear attention cannot honour is a UserError: masks of pairs, packed sequences, sliding windows shorter than the
text, soft caps, attention sinks, dropout of weights, attention weights as an output, caches of fixed length. So is a
model that does not go through the interface: when it is built with one of our names, when it does arithmetic with our
mask, or by `install`.

`KernelCache` makes a causal model generate with a state of fixed size instead of all keys and values.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import CodeType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils.output_capturing import _active_collector

from schoenbat.calibration import CALIBRATOR, Calibrated
from schoenbat.errors import UserError, unknown_name
from schoenbat.estimate import Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.integrations.layers import (
    CONFIG_KEY,
    ESTIMATES,
    assign,
    build,
    estimate_of,
    features_of,
    give,
    kernels_of,
    record,
    scale_of,
    serves,
    take_away,
)
from schoenbat.ops import sparse
from schoenbat.ops.linear import attend, extend
from schoenbat.ops.reference import AttentionInputs
from schoenbat.ops.sparse import HeadKernels

_HARMLESS = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "shift_labels",
    "use_cache",
}

# Arguments of a layer of attention, none of which can be a second sequence.
_OF_ONE_SEQUENCE = {
    "self",
    "attention_mask",
    "cache",
    "cu_seqlens",
    "hidden_states",
    "kwargs",
    "max_seqlen",
    "output_attentions",
    "position_embeddings",
    "position_ids",
}


NAME, EXACT_NAME = "schoenbat", "schoenbat-exact"
EXACT = Estimate(num_features=None)


def register(name: str, estimate: Estimate) -> None:
    """Make `attn_implementation=name` known to transformers.

    Raises:
        UserError: a name that transformers reads in a way of its own or that means something else already, or an
            estimate whose kernel is not defined for what a model may ask.
    """
    if not name or "/" in name or any(word in name for word in ("flash", "flex_attention", "sdpa", "eager", "paged")):
        raise UserError(f"attn_implementation {name!r} means something else to transformers; choose another name")
    if ESTIMATES.get(name, estimate) != estimate:
        raise UserError(f"attn_implementation {name!r} is registered already, with {ESTIMATES[name]}")
    estimate.check_defined(0.0)
    ESTIMATES[name] = estimate
    AttentionInterface.register(name, _implementation(name, estimate))
    AttentionMaskInterface.register(name, _make_mask)


def install(model: PreTrainedModel, name: str = "schoenbat", layers: Sequence[str] | None = None) -> PreTrainedModel:
    """Give attention layers their own draws of features, as part of the state_dict, and switch to `name`.

    Draws of the layers follow each other from the seed of the implementation. They are saved with the model (see
    `schoenbat.integrations.layers`); `uninstall` takes them away.

    Args:
        layers: names of attention layers as in `named_modules`, or of modules that contain some; the other layers stay
            exact. None for all.

    Raises:
        UserError: a model whose attention does not go through the interface, or names that are not those of layers.
    """
    if name not in ESTIMATES:
        raise unknown_name("attn_implementation", name, list(ESTIMATES))
    estimate, generator = ESTIMATES[name], None
    if estimate.num_features is not None:
        generator = torch.Generator().manual_seed(estimate.seed)
    chosen = attention_layers(model, name)
    served = set(chosen) if layers is None else _named(chosen, layers)
    for path, layer in chosen.items():
        give_drawn(layer, estimate if path in served else EXACT, generator)
    switch(model, name)
    return model


def uninstall(model: PreTrainedModel, implementation: str = "sdpa") -> PreTrainedModel:
    """Undo `install`, `schoenbat.replace` and what was fitted since: the weights were never touched.

    Args:
        implementation: the attention of transformers that the model goes back to.
    """
    for layer in model.modules():
        take_away(layer)
    switch(model, implementation)
    return model


def attention_layers(model: PreTrainedModel, name: str = "schoenbat") -> dict[str, nn.Module]:
    """Return the layers that go through the attention interface, by name.

    Raises:
        UserError: there are none, a part of the model computes attention itself, or `model` is no whole model.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"give the whole model of transformers, not {type(model).__name__}, which may be a part of one")
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            _check_goes_through_interface(part, name)
    found = {path: module for path, module in model.named_modules() if _calls_interface(module)}
    if not found:
        raise UserError(f"{type(model).__name__} has no attention layer that goes through the attention interface")
    return found


def give_drawn(layer: nn.Module, estimate: Estimate, generator: torch.Generator | None) -> None:
    """Give a layer settings of its own, with the next draw of `generator`; None for that of the settings' seed."""
    features = None
    if estimate.num_features is not None:
        features = estimate.make(head_dim_of(layer), scale_of(layer), generator)
    give(layer, estimate, features)


def switch(model: PreTrainedModel, implementation: str) -> None:
    """Choose the attention implementation, and write down for `save_pretrained` what layers have of their own."""
    model.set_attn_implementation(implementation)
    record(model, implementation)


def _named(layers: dict[str, nn.Module], names: Sequence[str]) -> set[str]:
    served: set[str] = set()
    for name in names:
        own = {path for path in layers if path == name or path.startswith(f"{name}.")}
        if not own:
            raise unknown_name("layer", name, list(layers))
        served |= own
    return served


class KernelCache(Cache):
    """The sums that causal attention through features needs of all tokens so far, whatever their number.

    `model.generate(..., cache=KernelCache())`; one cache serves one batch of sequences, and `reset` empties it. Tokens
    cannot be taken out again, so assisted generation is refused; so are models some of whose layers keep a state of
    another kind.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_StateLayer)

    def _other_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "KernelCache keeps the state of attention alone, and this model has layers with a state of another kind; "
            "leave its cache to transformers"
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _other_state
    has_previous_state = update_indexer = _other_state


class _Grown(NamedTuple):
    """The state of a layer that is exact: all its keys, values and masks, of a size that grows with the text."""

    key: Tensor
    value: Tensor
    key_mask: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Grown":
        """Apply `function` to each tensor; all have the batch as their first dimension."""
        return _Grown(*map(function, self))

    def join(self, other: "_Grown") -> "_Grown":
        """Put the tokens of `other` after these."""
        return _Grown(*(torch.cat(pair, -1 if pair[0].ndim == 2 else 2) for pair in zip(self, other, strict=True)))


class NotReadable(UserError, AttributeError):
    """A model read what only our attention function can use; to `hasattr` it is not there."""


class _StateLayer(CacheLayerMixin):
    """One layer's state of `schoenbat.ops.linear.extend`.

    The attention function gets hold of it through the keyword arguments of the call, which `update` may extend: that
    is how transformers' own paged cache reaches its attention.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        del self.keys, self.values
        self.state: Any = None
        self.seen = 0
        self.is_taken = True

    def __getattr__(self, name: str) -> NoReturn:
        if name in ("keys", "values"):
            raise NotReadable("KernelCache has no keys and values, which this model reads; leave it its own cache")
        raise AttributeError(name)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first tokens make the state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        if kwargs is None:
            raise UserError("this model does not tell its cache about the attention call; use it without KernelCache")
        if not self.is_taken:
            raise UserError(
                "KernelCache serves models whose attn_implementation was registered by schoenbat; this one ignored it"
            )
        kwargs["kernel_state"] = self
        self.is_taken, self.is_initialized = False, True
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def take(self, causal: bool) -> None:
        """Claim the tokens of the last `update` for the attention of this call."""
        if not causal:
            raise UserError("KernelCache is for causal attention alone; leave the cache of this model to transformers")
        if self.is_taken:
            raise UserError("a layer of this model attends twice over the same tokens; use it without KernelCache")
        self.is_taken = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.seen

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.is_taken, self.is_initialized = None, 0, True, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.map(lambda x: x.index_select(0, indices.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError("KernelCache cannot take tokens out again; generate without an assistant model")

    def offload(self) -> None:
        raise UserError("KernelCache is not offloaded: its size does not grow")

    prefetch = offload


def _implementation(name: str, estimate: Estimate) -> Callable[..., tuple[Tensor, None]]:
    """Make the function that transformers calls from every attention layer."""
    default = estimate
    # torch.compile cannot look a kernel up by its name.
    fast = replace(estimate, kernel=estimate.function)

    def kernel_attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: KeyMask | Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        kernel_state: _StateLayer | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        # A mask of transformers says itself what a window leaves out.
        _refuse(dropout, kwargs, {"sliding_window"} if isinstance(attention_mask, KeyMask) else set())
        key_mask, causal = _read_mask(attention_mask, module, query, key, is_causal)
        if isinstance(attention_mask, KeyMask):
            _refuse_packed(attention_mask, kwargs.get("position_ids"))
        itself = _attends_to_itself(module)
        whole = kernel_state is None and (not causal or query.shape[2] == key.shape[2])
        given = (query, key, value, key_mask, causal)
        own = estimate_of(module)
        fit = None if torch.compiler.is_compiling() else CALIBRATOR.get()
        if fit is not None and whole:
            settings = own if own is not None and serves(module, name, default) else default
            fit(module, settings, *given, scale=scaling, self_attention=itself)
            if (own := estimate_of(module)) is not None:
                assign(module, name)
        if own is not None and not serves(module, name, default):
            raise UserError(
                f"this layer has features of its own for {own}, and its attn_implementation is now {name!r}; call "
                "install or calibrate with the new name"
            )
        settings = default if own is None else own
        estimate = fast if own is None else own
        if settings.num_features is None:
            out = _exact(estimate, *given, scaling, itself, kernel_state)
        else:
            features = features_of(module)
            inputs = estimate.prepare(*given, scale=scaling, self_attention=itself)
            if features is None:
                features = estimate.draw(query.shape[-1], inputs.scale, query.device)
            elif isinstance(features, Calibrated):
                inputs, features = features.turn(inputs), features.features
            out = _through(estimate, features, inputs, kernel_state, kernels_of(module))
            if whole:
                estimate.observe(out, inputs, features)
        return out.transpose(1, 2).contiguous(), None

    return kernel_attention_forward


def _through(
    estimate: Estimate,
    features: FeatureMap,
    inputs: AttentionInputs,
    layer: _StateLayer | None,
    kernels: HeadKernels | None,
) -> Tensor:
    query, key, value, key_mask, causal, scale, _ = inputs
    sparsity = estimate.sparsity
    if layer is not None:
        layer.take(causal)
        if sparsity is not None:
            out, layer.state = sparse.extend(features, layer.state, inputs, sparsity, kernels)
        else:
            out, layer.state = extend(features, layer.state, query, key, value, key_mask, scale)
        return out
    if sparsity is not None:
        if causal and key.shape[2] > query.shape[2]:
            raise UserError("heavy keys are chosen by all queries: generate with KernelCache, or use_cache=False")
        return sparse.attend(features, inputs, sparsity, kernels)
    if causal and key.shape[2] > query.shape[2]:
        # Keys and values of earlier tokens come from a cache of transformers: the queries are the last ones.
        return extend(features, None, query, key, value, key_mask, scale)[0]
    return attend(features, *inputs)


@torch.compiler.assume_constant_result
def _attends_to_itself(layer: nn.Module) -> bool:
    """Return whether the layer's signature shows that it is self-attention."""
    return set(inspect.signature(layer.forward).parameters) <= _OF_ONE_SEQUENCE


def _exact(
    estimate: Estimate,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    itself: bool,
    layer: _StateLayer | None,
) -> Tensor:
    if layer is not None:
        layer.take(causal)
        mask = (
            torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
            if key_mask is None
            else key_mask
        )
        before = layer.state
        now = _Grown(key, value, mask)
        assert before is None or isinstance(before, _Grown)
        now = now if before is None else before.join(now)
        layer.state, (key, value, key_mask) = now, now
    length, past = query.shape[2], key.shape[2] - query.shape[2]
    if causal and past:
        query = nn.functional.pad(query, (0, 0, past, 0))
    out = estimate.attend(query, key, value, key_mask, causal, scale=scaling, self_attention=itself)
    return out[:, :, out.shape[2] - length :]


def _refuse(dropout: float, kwargs: dict[str, Any], known: set[str]) -> None:
    """Raise UserError for what would have to be ignored."""
    if dropout:
        raise UserError(f"attention dropout is {dropout}, but there are no weights to drop; set it to 0 in the config")
    # Some models keep the request for attention weights to themselves: what will be collected tells.
    if any("attentions" in name for name in _active_collector.get() or ()):
        raise UserError("output_attentions is not supported: linear attention has no weights to return")
    for name, value in kwargs.items():
        if name not in _HARMLESS | known and value is not None and value is not False:
            raise UserError(f"attention argument {name} is not supported by a linear attention implementation")


def _used(*_: object, **__: object) -> NoReturn:
    raise NotReadable(
        "this model changes its attention mask or computes attention itself, so an attn_implementation of schoenbat "
        'cannot serve it; use attn_implementation="eager"'
    )


class KeyMask:
    """The meaning of a model's mask, readable by our attention function alone.

    It stands for [B, 1, queries, keys], True = attend. It can be passed on, moved to another device, and asked for its
    shape; whatever else a model does with it, such as adding it to scores of its own, is a UserError.

    Args:
        causal: query i sees keys up to its own place, the last query standing at the last key.
        key_mask: [B, keys] bool, True = attend, or None where nothing is padding.
        shape: (B, 1, queries, keys).
        refused: why our attention cannot honour it; some models prepare a mask that none of their layers uses.
    """

    ndim = 4

    def __init__(
        self, causal: bool, key_mask: Tensor | None, shape: tuple[int, int, int, int], refused: str | None = None
    ) -> None:
        self.causal, self.key_mask, self.shape, self.refused = causal, key_mask, shape, refused
        self.positions: Tensor | None = None  # of the tokens, once looked at

    def __repr__(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        return f"KeyMask({kind}, {list(self.shape)}, {'padded' if self.key_mask is not None else 'no padding'})"

    def dim(self) -> int:
        return self.ndim

    def to(self, device: object = None, non_blocking: bool = False, **other: object) -> "KeyMask":
        if other or not isinstance(device, torch.device | str | int):
            _used()
        moved = None if self.key_mask is None else self.key_mask.to(device, non_blocking=non_blocking)
        return KeyMask(self.causal, moved, self.shape, self.refused)

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> NoReturn:
        _used()

    def __getattr__(self, name: str) -> NoReturn:
        _used()

    __hash__ = object.__hash__
    __getitem__ = __setitem__ = __len__ = __iter__ = __bool__ = __invert__ = __neg__ = __float__ = __int__ = _used
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = _used
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = _used
    __rmatmul__ = __mod__ = __pow__ = __iadd__ = __isub__ = __imul__ = __itruediv__ = __array__ = _used


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | KeyMask | None = None,
    **kwargs: Any,
) -> KeyMask:
    """Make the mask that transformers prepares for this implementation."""
    if isinstance(attention_mask, KeyMask):
        return attention_mask
    refused = None
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        # Dynamo knows nothing of closures.
        whole = None if torch.compiler.is_compiling() else _WINDOWED.get(_codes(mask_function))
        if whole is None or kv_offset + kv_length > kwargs.get("local_size", 0):
            refused = (
                "this call needs a mask of pairs other than the causal one (a sliding window, chunks, packed sequences "
                "or, under torch.compile, a window of any length or no attention_mask), which has no meaning in linear "
                "time"
            )
        mask_function = whole or causal_mask_function
    causal = mask_function is causal_mask_function
    ends_with_queries = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if causal and not ends_with_queries:
        raise UserError("a cache of fixed length (static) is not supported; use KernelCache or the default cache")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise _of_pairs(attention_mask)
    key_mask = None if attention_mask is None else attention_mask[:, -kv_length:]
    return KeyMask(causal, key_mask, (batch_size, 1, q_length, kv_length), refused)


def _codes(mask_function: Callable[..., Any]) -> tuple[CodeType, ...]:
    """Return the code of a mask function of transformers, and of those that it puts together."""
    cells = mask_function.__closure__ or ()
    parts = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, tuple)]
    return (mask_function.__code__, *(code for functions in parts for part in functions for code in _codes(part)))


_WINDOWED = {
    _codes(sliding_window_causal_mask_function(1)): causal_mask_function,
    _codes(chunked_causal_mask_function(1, torch.zeros(1))): causal_mask_function,
    _codes(sliding_window_bidirectional_mask_function(1)): bidirectional_mask_function,
}
"""What masks of windows and chunks are where these are longer than the sequence."""


def _of_pairs(mask: Tensor) -> UserError:
    return UserError(
        f"attention_mask must be a mask of keys, [batch, keys], not {mask.dtype} {list(mask.shape)}; a mask of pairs "
        "has no meaning in linear time"
    )


def _read_mask(
    mask: KeyMask | Tensor | None, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None
) -> tuple[Tensor | None, bool]:
    """Return the mask of keys, [B, keys], and whether attention is causal.

    Every mask of transformers' own functions is a KeyMask here. None is the absence of one, and then each query sees
    each key, as in eager attention; a module that calls itself causal nevertheless is contradictory.
    """
    if mask is None:
        if query.shape[2] > 1 and (getattr(module, "is_causal", False) if is_causal is None else is_causal):
            raise UserError(
                f"{type(module).__name__} is causal but was given no mask; call it through its model, which makes one"
            )
        return None, False
    if not isinstance(mask, KeyMask):
        raise _of_pairs(mask)
    if mask.refused is not None:
        raise UserError(mask.refused)
    if not mask.causal and mask.key_mask is None:
        return None, False
    expected = (query.shape[0], 1, query.shape[2], key.shape[2])
    shapes = [tuple(mask.shape)]
    if mask.key_mask is not None:
        shapes.append((mask.key_mask.shape[0], 1, mask.shape[2], mask.key_mask.shape[1]))
    for shape in shapes:
        if shape != expected:
            raise UserError(
                f"the model made a mask of {list(shape)} (batch, heads, queries, keys), but this layer attends over "
                f"{list(expected)}"
            )
    return mask.key_mask, mask.causal


def _refuse_packed(mask: KeyMask, positions: object) -> None:
    """Raise UserError where the positions of tokens that count start anew, in a causal mask that does not say so.

    Without a mask of the tokens transformers looks for this itself, and asks for a mask of pairs. One look serves all
    layers of a call; under torch.compile there is none, as it would have to read the positions.
    """
    if not mask.causal or not isinstance(positions, Tensor) or positions.dim() != 2 or positions is mask.positions:
        return
    mask.positions, length = positions, positions.shape[1]
    if length < 2 or torch.compiler.is_compiling():
        return
    starts = positions[:, 1:] <= positions[:, :-1]
    if mask.key_mask is not None:
        counts = mask.key_mask[:, -length:]
        starts = starts & counts[:, 1:] & counts[:, :-1]
    if starts.any():
        raise UserError(
            "position_ids start anew within a sequence: packed sequences need a mask of pairs, which has no meaning in "
            "linear time"
        )


@cache
def _bypass(files: tuple[str, ...]) -> str | None:
    """Say how the models of these modules get round the attention interface; None where nothing shows that they do.

    Layers of attention without an interface tell, or a table from the names of implementations to classes of attention.
    """
    things = [thing for file in files for thing in vars(sys.modules[file]).values()]
    for thing in things:
        if type(thing) is dict and isinstance(thing.get("eager"), type) and issubclass(thing["eager"], nn.Module):
            return f"it has attentions of its own for the names {', '.join(thing)}"
    layers = [thing.__name__ for thing in things if isinstance(thing, type) and issubclass(thing, nn.Module)]
    own = [name for name in layers if "Attention" in name]
    if own and not any(isinstance(thing, AttentionInterface) for thing in things):
        return f"its {own[0]} computes attention itself"
    return None


def _check_goes_through_interface(model: PreTrainedModel, name: str) -> None:
    bases = [c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    if reason := _bypass(tuple(base.__module__ for base in bases)):
        raise UserError(
            f"{type(model).__name__} does not go through the attention interface of transformers ({reason}), so "
            f"attn_implementation {name!r} has no effect on it; leave it out, or name the parts that shall have it, "
            f"such as {{'text_config': {name!r}}}"
        )


def _check_model(module: nn.Module, name: str, submodule: nn.Module) -> None:
    """Check, while a model is put together, that our implementation can serve it.

    A model that never asks for a mask nor for the attention function is noticed nowhere else.
    """
    if isinstance(module, PreTrainedModel):
        implementation = getattr(module.__dict__.get("config"), "_attn_implementation", None)
        if isinstance(implementation, str) and implementation in ESTIMATES:
            _check_goes_through_interface(module, implementation)


def _build_anew(model: nn.Module, name: str, part: nn.Module) -> None:
    """Give layers what a config says, while a model is put together and before its weights are loaded."""
    if not isinstance(model, PreTrainedModel) or part is None:
        return
    config = model.__dict__.get("config")
    saved = getattr(config, CONFIG_KEY, None)
    if config is None or not isinstance(saved, dict):
        return
    implementation = saved["attn_implementation"]
    if implementation not in ESTIMATES:
        register(implementation, Estimate(**saved["estimate"]))
    for path, layer in part.named_modules(prefix=name):
        described = saved["layers"].get(path.removeprefix(f"{model.base_model_prefix}."))
        if described is not None and estimate_of(layer) is None:
            build(layer, described, head_dim_of(layer))
            assign(layer, implementation)
            config._attn_implementation = implementation


def _calls_interface(layer: nn.Module) -> bool:
    """Return whether its `forward` takes the attention function from an interface of transformers."""
    forward = inspect.unwrap(type(layer).forward)
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return code is not None and any(isinstance(known.get(name), AttentionInterface) for name in code.co_names)


def head_dim_of(layer: nn.Module) -> int:
    """Return the width of the queries of a layer."""
    for name in (
        "qk_head_dim",
        "head_dim",
        "attention_head_size",
        "head_size",
        "attention_head_dim",
        "key_value_proj_dim",
    ):
        if isinstance(getattr(layer, name, None), int):
            return int(getattr(layer, name))
    raise UserError(f"the width of the heads of {type(layer).__name__} is not known, so install cannot serve it")


register(NAME, Estimate())
register(EXACT_NAME, EXACT)
register_module_module_registration_hook(_check_model)
register_module_module_registration_hook(_build_anew)
