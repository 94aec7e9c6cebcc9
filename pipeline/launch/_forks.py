"""Processes that begin where another one stands, with what it has imported.

Importing torch, MLflow and DVC takes longer than a short cell. So one process imports them, and others are forked from
it; it has one thread and computes nothing. Code whose changes DVC looks for is imported after the fork.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path


def preload() -> None:
    """Import what takes long and is not this project's."""
    # Asked in the usual way whether there is a GPU, CUDA would start here, and its state does not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import dvc.repo  # noqa: F401
    import torch._dynamo  # torch.optim imports it when it is first used

    from pipeline.quiet_mlflow import import_mlflow

    import_mlflow()
    import mlflow.pytorch
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    assert not torch.cuda.is_initialized()


def fork(name: str, action: Callable[[], int], *unused: Connection) -> int:
    """Run `action` in a new process, which ends with the status that it returns; the id of the process.

    Args:
        name: see `name_process`.
        unused: connections that the process must not hold open.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for connection in unused:
            connection.close()
        name_process(name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        status = action()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as at the end of any process: shown, and then it is over
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def name_process(name: str) -> None:
    """What `ps` and `top` call this process, where the system can do it; at most 14 characters."""
    if sys.platform == "linux":
        Path("/proc/self/comm").write_text(name)


def set_environment(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
