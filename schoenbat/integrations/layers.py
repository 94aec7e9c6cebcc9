"""Settings of single layers of a transformers model: given, taken away, and saved with the model.

A layer that has been given an `Estimate` attends by it, whatever the implementation's own is, through features and
kernels that are submodules and so part of the state_dict. What has to be known to build them anew stands in the model's
config, which `save_pretrained` writes: when `from_pretrained` puts such a model together, its layers get them before
weights are loaded, and the attention implementation is chosen again. That takes schoenbat.integrations.huggingface to
be imported; otherwise transformers leaves exact attention and lists the features as weights that it does not use.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from schoenbat.calibration import KEPT_AS, KERNELS_KEPT_AS, Calibrated, FittedFeatures, note_settings
from schoenbat.estimate import Estimate
from schoenbat.features.plan import FeatureMap
from schoenbat.ops.sparse import HeadKernels

CONFIG_KEY = "schoenbat"
ESTIMATES: dict[str, Estimate] = {}
"""The settings behind each attention implementation that was registered."""
_ESTIMATE, _IMPLEMENTATION = "kernel_estimate", "kernel_implementation"


def estimate_of(layer: nn.Module) -> Estimate | None:
    """Return the settings that a layer has of its own."""
    found = getattr(layer, _ESTIMATE, None)
    assert found is None or isinstance(found, Estimate)
    return found


def assign(layer: nn.Module, implementation: str) -> None:
    """Note for which attention implementation a layer has its settings."""
    setattr(layer, _IMPLEMENTATION, implementation)


def serves(layer: nn.Module, implementation: str, default: Estimate) -> bool:
    """Return whether the settings that a layer has of its own were given for this attention implementation."""
    expected = getattr(layer, _IMPLEMENTATION, None)
    return getattr(layer, _ESTIMATE) == default if expected is None else bool(expected == implementation)


def features_of(layer: nn.Module) -> FeatureMap | Calibrated | None:
    """Return the features that a layer has of its own, as its state_dict says that they are."""
    found = getattr(layer, KEPT_AS, None)
    if found is not None and not torch.compiler.is_compiling():
        for part in found.modules():
            if isinstance(part, FeatureMap):
                part.follow_buffers()
    return found


def kernels_of(layer: nn.Module) -> HeadKernels | None:
    """Return the kernels that the heads of a layer have of their own."""
    return getattr(layer, KERNELS_KEPT_AS, None)


def give(layer: nn.Module, estimate: Estimate, features: nn.Module | None, kernels: HeadKernels | None = None) -> None:
    """Let a layer attend by `estimate`, with these features; None where they are those of its seed, or it is exact."""
    take_away(layer)
    setattr(layer, _ESTIMATE, estimate)
    device = next((parameter.device for parameter in layer.parameters()), None)
    for name, module in ((KEPT_AS, features), (KERNELS_KEPT_AS, kernels)):
        if module is not None:
            layer.add_module(name, module if device is None or device.type == "meta" else module.to(device))


def take_away(layer: nn.Module) -> None:
    """Let a layer attend by the settings of the model's attention implementation."""
    for name in (_ESTIMATE, _IMPLEMENTATION, KEPT_AS, KERNELS_KEPT_AS):
        if hasattr(layer, name):
            delattr(layer, name)


@note_settings.register
def record(model: PreTrainedModel, implementation: str | None = None) -> None:
    """Write into the config of a model what its layers have been given."""
    config, layers = model.config, {}
    implementation = implementation or config._attn_implementation
    for name, layer in _layers(model):
        assign(layer, implementation)
        layers[name] = _describe(layer)
    default = ESTIMATES.get(implementation or "")
    written = None if default is None else _settings(default)
    if not layers or not written or not all(layers.values()):
        # A kernel that has no name cannot be written down.
        vars(config).pop(CONFIG_KEY, None)
        return
    setattr(config, CONFIG_KEY, {"attn_implementation": implementation, "estimate": written, "layers": layers})


def _layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that have settings of their own, by their names in the model without its head."""
    prefix = f"{model.base_model_prefix}."
    for name, layer in model.named_modules():
        if estimate_of(layer) is not None:
            yield name.removeprefix(prefix), layer


def _describe(layer: nn.Module) -> dict[str, Any]:
    estimate, features, kernels = estimate_of(layer), features_of(layer), kernels_of(layer)
    assert estimate is not None
    if not (settings := _settings(estimate)):
        return {}
    described: dict[str, Any] = {"estimate": settings, "has_features": features is not None}
    if isinstance(features, Calibrated) and (basis := features.basis()) is not None:
        described["calibrated"] = {"max_degree": features.max_degree, "key_heads": len(basis)}
    if kernels is not None:
        described["heads"] = len(kernels.logarithms)
    return described


def _settings(estimate: Estimate) -> dict[str, Any]:
    """Return the arguments of `Estimate`; none for a kernel that is an object."""
    if not isinstance(estimate.kernel, str):
        return {}
    return {field.name: getattr(estimate, field.name) for field in fields(estimate) if field.init}


def scale_of(layer: nn.Module) -> float | None:
    """Return the factor of a layer's dot products; None where it does not say one."""
    scale = getattr(layer, "scaling", None)
    return scale if isinstance(scale, float) else None


def build(layer: nn.Module, described: dict[str, Any], head_dim: int) -> None:
    """Give a layer modules in the form in which they were described, to be filled by a state_dict."""
    estimate = Estimate(**described["estimate"])
    features: nn.Module | None = None
    with torch.device("cpu"):
        if described["has_features"]:
            features = estimate.make(head_dim, scale_of(layer))
        if fitted := described.get("calibrated"):
            assert estimate.num_features is not None
            own = FittedFeatures(
                estimate.function,
                num_features=estimate.num_features,
                max_degree=fitted["max_degree"],
                spread=[1.0] * head_dim,
            )
            basis = torch.eye(head_dim).expand(fitted["key_heads"], -1, -1)
            features = Calibrated(estimate, own, basis, 0.0, 0.0)
        kernels = HeadKernels(described["heads"]) if "heads" in described else None
    give(layer, estimate, features, kernels)
