"""Linear-time dot-product-kernel attention, its rivals, and the tasks to compare them on."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schoenbat.attention import ATTENTIONS
    from schoenbat.diagnosis import PoorEstimateWarning, diagnose, diagnose_tensors
    from schoenbat.estimate import Estimate
    from schoenbat.functional import dot_product_kernel_attention
    from schoenbat.kernels import KERNELS, Kernel
    from schoenbat.nn.mha import MultiheadKernelAttention

__all__ = [
    "ATTENTIONS",
    "KERNELS",
    "Estimate",
    "Kernel",
    "MultiheadKernelAttention",
    "PoorEstimateWarning",
    "diagnose",
    "diagnose_tensors",
    "dot_product_kernel_attention",
]

_HOMES = {
    "ATTENTIONS": "schoenbat.attention",
    "Estimate": "schoenbat.estimate",
    "KERNELS": "schoenbat.kernels",
    "Kernel": "schoenbat.kernels",
    "MultiheadKernelAttention": "schoenbat.nn.mha",
    "PoorEstimateWarning": "schoenbat.diagnosis",
    "diagnose": "schoenbat.diagnosis",
    "diagnose_tensors": "schoenbat.diagnosis",
    "dot_product_kernel_attention": "schoenbat.functional",
}


def __getattr__(name: str) -> Any:
    # What only asks for names or errors need not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
