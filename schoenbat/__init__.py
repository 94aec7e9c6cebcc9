"""Linear-time dot-product-kernel attention, its rivals, and the tasks to compare them on."""

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
