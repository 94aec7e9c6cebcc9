"""Where there is no GPU the kernels are interpreted: triton has to know that when it is imported first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
