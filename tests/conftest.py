"""Tensors of the tests are tiny: one thread each is faster than handing work to others."""

import torch

torch.set_num_threads(1)
