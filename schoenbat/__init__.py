"""Linear-time dot-product-kernel attention, its rivals, and the tasks to compare them on.

The public names are imported when they are first asked for: the names of components can be listed without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schoenbat.attention import ATTENTIONS
    from schoenbat.calibration import calibrate, calibrate_tensors
    from schoenbat.diagnosis import PoorEstimateWarning, diagnose, diagnose_tensors
    from schoenbat.errors import UserError
    from schoenbat.estimate import Estimate
    from schoenbat.functional import dot_product_kernel_attention
    from schoenbat.kernels import KERNELS, Kernel
    from schoenbat.lra.pretrained import PretrainedClassifier
    from schoenbat.lra.tasks import TASKS
    from schoenbat.nn.mha import MultiheadKernelAttention

__version__ = "0.1.0"

__all__ = [
    "ATTENTIONS",
    "KERNELS",
    "TASKS",
    "Estimate",
    "Kernel",
    "MultiheadKernelAttention",
    "PoorEstimateWarning",
    "PretrainedClassifier",
    "UserError",
    "__version__",
    "calibrate",
    "calibrate_tensors",
    "diagnose",
    "diagnose_tensors",
    "dot_product_kernel_attention",
]
_HOMES = {
    "ATTENTIONS": "attention",
    "KERNELS": "kernels",
    "TASKS": "lra.tasks",
    "Estimate": "estimate",
    "Kernel": "kernels",
    "MultiheadKernelAttention": "nn.mha",
    "PoorEstimateWarning": "diagnosis",
    "PretrainedClassifier": "lra.pretrained",
    "UserError": "errors",
    "calibrate": "calibration",
    "calibrate_tensors": "calibration",
    "diagnose": "diagnosis",
    "diagnose_tensors": "diagnosis",
    "dot_product_kernel_attention": "functional",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'schoenbat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"schoenbat.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
