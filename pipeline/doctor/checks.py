"""The checks of `schoenbat-exp doctor`. Each looks at one thing, changes nothing, and returns one line."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.grid.checked import check_code, load_checked
from pipeline.grid.freshness import check_folders, data_folder, raw_folder
from pipeline.grid.settings import MIRROR_VARIABLE, PARAMS_FILE, PROJECT_FILE
from pipeline.host.text import counted
from pipeline.mlflow import tracking
from pipeline.record.writer import changed_stages
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from pipeline.grid.params import Params

LEAST_DISK_GB, SCARCE_DISK_GB = 1.0, 5.0
"""Below the first a grid will fail, below the second a large one may."""


class Finding(NamedTuple):
    """One line.

    Attributes:
        subject: what was looked at.
        state: "wrong" if a grid would fail of it; "note" if something optional is missing or will be made.
        text: what was found.
        mend: what to do; empty where nothing is to be done.
    """

    subject: str
    state: Literal["good", "note", "wrong"]
    text: str
    mend: str = ""

    def line(self) -> str:
        state = "ok" if self.state == "good" else self.state
        return f"{state:5}  {self.subject:8}  {self.text}{f'; to mend it: {self.mend}' if self.mend else ''}"


class _Note(Exception):
    """What was found instead of what is good, and what to do."""

    state: Literal["note", "wrong"] = "note"

    def __init__(self, text: str, mend: str = "") -> None:
        self.text, self.mend = text, mend


class _Wrong(_Note):
    state = "wrong"


def examine() -> Iterator[Finding]:
    """Yield all findings, one after the other as they are made."""
    try:
        params = load_checked()
    except UserError:
        params = None
    needs_params = (_torch, _threads, _data)
    for check in (_python, _settings, _code, _git, _torch, _compiled, _threads, _dvc, _mlflow, _disk, _data):
        subject = check.__name__[1:]
        try:
            if params is None and check in needs_params:
                raise _Note("unknown without settings")
            yield Finding(subject, "good", check(params))  # type: ignore[arg-type]
        except _Note as found:
            yield Finding(subject, found.state, found.text, found.mend)
        except UserError as error:
            yield Finding(subject, "wrong", str(error))
        except ImportError as error:
            yield Finding(subject, "wrong", str(error), "make setup")


def _python(_: object) -> str:
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def _settings(params: "Params | None") -> str:
    from pipeline.grid.cells import expand

    if params is None and not PARAMS_FILE.exists():
        mend = "go to the folder of the project, or `schoenbat-exp use quick` in it"
        raise _Wrong(f"no {PARAMS_FILE} in {Path.cwd()}", mend)
    params = params or load_checked()
    return f"{PARAMS_FILE.absolute()}: profile {params.profile}, {counted(len(expand(params)), 'cell')}"


def _code(_: object) -> str:
    check_code()
    if not PROJECT_FILE.is_file():
        raise _Wrong(f"no {PROJECT_FILE} in {Path.cwd()}", "go to the folder of the project")
    return "what runs is the code of this folder"


def _git(_: object) -> str:
    try:
        asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise _Note("git is not installed; results will not name a revision") from None
    if asked.returncode == 0:
        return f"revision {asked.stdout.strip()}"
    said = (asked.stderr.strip().splitlines() or ["git fails"])[0].removeprefix("fatal: ")
    mend = f"git config --global --add safe.directory {Path.cwd()}" if "dubious ownership" in said else ""
    raise _Note(f"{said}; results will not name a revision", mend)


def _torch(params: "Params") -> str:
    import torch

    from pipeline.host.devices import ask_driver, get_device

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [f"; cuda:{i} {gpu.name} with {gpu.total_memory / 2**30:.0f} GB" for i, gpu in enumerate(found)]
    text = f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    driver = ask_driver("driver_version")
    text += f"{f', driver {driver}' if driver else ''}{''.join(devices)}; run.device is {params.run.device}"
    try:
        get_device(params.run.device)
    except UserError:
        no_cuda = driver and not torch.version.cuda
        mend = (
            "install a torch that is built for CUDA (pytorch.org/get-started)" if no_cuda else "set run.device to cpu"
        )
        raise _Wrong(f"{text}, which is not there", mend) from None
    if driver and not devices:
        raise _Note(f"{text}; the GPU here is not usable with it")
    return text


def _compiled(_: object) -> str:
    from schoenbat.ops.native.build import load

    found = load(build=False)
    if found.library is None and not found.is_pending:
        raise _Note(f"attention through features runs in its torch form: {found.reason}")
    return f"attention through features is {found.reason}"


def _threads(params: "Params") -> str:
    from pipeline.launch.plan import number_of_cores

    cores, threads = number_of_cores(), params.run.threads
    text = f"{counted(cores, 'core')}, run.threads is {threads}: {counted(max(1, cores // threads), 'cell')} at once"
    if threads > cores:
        raise _Wrong(text, f"set run.threads to at most {cores}")
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) < threads:
        raise _Wrong(f"{text}; OMP_THREAD_LIMIT is {limit}", "unset OMP_THREAD_LIMIT")
    return text


def _dvc(_: object) -> str:
    version = f"DVC {importlib.metadata.version('dvc')}"
    if not Path(".dvc").is_dir():
        raise _Wrong(f"{version}; this folder is no repository of DVC", "dvc init")
    check_folders()
    if not os.access(".dvc", os.W_OK):
        return f"{version}; it cannot be asked where it may not write"
    return f"{version}; {counted(len(changed_stages()), 'stage')} out of date, or not here"


def _mlflow(_: object) -> str:
    version = f"MLflow {importlib.metadata.version('mlflow')}"
    try:
        experiment = tracking.find_experiment()
    except UserError as error:
        named = tracking.TRACKING_URI in os.environ
        mend = f"correct {tracking.TRACKING_URI}" if named else "move it away: reports do not need it"
        raise _Wrong(str(error), "schoenbat-exp log" if "deleted" in str(error) else mend) from None
    if experiment is None:
        raise _Note(f"{version}; the first run makes its database")
    return f"{version}; runs are in {tracking.shown(tracking.store_uri())}"


def _disk(_: object) -> str:
    free = shutil.disk_usage(Path.cwd()).free / 10**9
    text = f"{free:.1f} GB free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        raise _Wrong(f"{Path.cwd()} cannot be written to", "change its permissions or its owner")
    if free < LEAST_DISK_GB:
        raise _Wrong(text, f"free {LEAST_DISK_GB:g} GB at least")
    if free < SCARCE_DISK_GB:
        raise _Note(text, "`dvc gc --all-commits` deletes weights that no commit has on record")
    return text


def _data(params: "Params") -> str:
    mirror = params.data.mirror_folder
    if mirror is not None and not mirror.is_dir():
        raise _Wrong(f"the data mirror {mirror} is not a folder", f"correct {MIRROR_VARIABLE} or data.mirror")
    states = []
    for task in params.grid.tasks:
        prepared, fetched = (data_folder(params.profile, task) / "meta.json").is_file(), raw_folder(task).is_dir()
        states.append(f"{task} {'prepared' if prepared else 'fetched' if fetched else 'not fetched yet'}")
    text = f"{', '.join(states)}; mirror: {mirror.absolute() if mirror else 'none'}"
    if "not fetched yet" in text:
        raise _Note(f"{text}; the next run fetches what is missing")
    return text
