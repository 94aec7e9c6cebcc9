"""What the process from which workers are forked imports: what takes long and is not this project's.

Code of this project that computes is imported by each worker, after the fork, so that it is the code of that moment.
"""

import contextlib
import os
import tempfile

# Asked in the usual way whether there is a GPU, CUDA would start here, and its state does not survive a fork.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch._dynamo  # torch.optim imports it when it is first used

from pipeline.quiet_mlflow import import_mlflow

import_mlflow()

import mlflow.pytorch  # noqa: E402
import mlflow.store.tracking.sqlalchemy_store  # noqa: E402

# With the first model that a process saves, MLflow lists what all installed packages hold, which takes a second: here,
# and not in each cell. Where the disk is full, cells say so.
with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
    mlflow.pytorch.save_model(
        torch.nn.Identity(), folder, serialization_format="pickle", pip_requirements=[f"torch=={torch.__version__}"]
    )
