"""What the process from which workers are forked imports: what takes long and is not this project's.

Code of this project that computes is imported by each worker, after the fork, so that it is the code of that moment.
"""

import os

# Asked in the usual way whether there is a GPU, CUDA would start here, and its state does not survive a fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch._dynamo  # noqa: F401 - torch.optim imports it when it is first used
