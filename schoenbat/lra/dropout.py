"""Dropout by random bits: on a CPU torch's own draws a number for each value, the dearest part of a small layer."""

import torch
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """torch's Dropout, but on a CPU p is rounded to a multiple of 2^-16 and a value costs 16 bits of the generator."""

    def forward(self, x: Tensor) -> Tensor:
        """Set values of x [...] to 0 with the probability p, and divide the others by 1 - p, while in training."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        # Four values of 16 bits from a number of 64.
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = numbers.view(torch.int16)[: x.numel()].view(x.shape)
        keep = torch.ge(bits, dropped - _LEVELS // 2, out=torch.empty(x.shape, dtype=x.dtype))
        return x * keep.mul_(_LEVELS / (_LEVELS - dropped))
