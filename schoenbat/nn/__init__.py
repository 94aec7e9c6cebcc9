"""Torch's multi-head attention with dot-product-kernel attention inside."""

from schoenbat.nn.mha import MultiheadKernelAttention

__all__ = ["MultiheadKernelAttention"]
