"""The checks of `schoenbat-exp doctor`. Each looks at one thing, changes nothing, and returns one line."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import Requirement

from pipeline.grid.checked import load_checked
from pipeline.grid.code import check_code
from pipeline.grid.freshness import check_folders, data_folder, raw_folder
from pipeline.grid.settings import MIRROR_VARIABLE, PARAMS_FILE, PROJECT_FILE
from pipeline.host.text import counted
from pipeline.mlflow import tracking
from pipeline.record.writer import changed_stages
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from pipeline.grid.params import Params

DISTRIBUTION = "schoenbat-experiments"
LEAST_DISK_GB, SCARCE_DISK_GB = 1.0, 5.0
"""Below the first a grid will fail, below the second a large one may."""


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        state: "wrong" if a grid would fail of it; "note" if something optional is missing or will be made.
        text: what was found.
        mend: what to do; empty where nothing is to be done.
        subject: what was looked at.
    """

    state: Literal["good", "note", "wrong"]
    text: str
    mend: str = ""
    subject: str = ""

    def line(self) -> str:
        state = "ok" if self.state == "good" else self.state
        return f"{state:5}  {self.subject:8}  {self.text}{f'; to mend it: {self.mend}' if self.mend else ''}"


def examine() -> Iterator[Finding]:
    """Yield all findings, one after the other as they are made."""
    try:
        params = load_checked()
    except UserError:
        params = None

    def informed(check: Callable[["Params"], Finding]) -> Callable[[], Finding]:
        return lambda: check(params) if params else Finding("note", "unknown without settings")

    checks: dict[str, Callable[[], Finding]] = {
        "python": _python,
        "packages": _packages,
        "settings": lambda: _settings(params),
        "code": _code,
        "git": _git,
        "torch": informed(_torch),
        "threads": informed(_threads),
        "dvc": _dvc,
        "mlflow": _mlflow,
        "disk": _disk,
        "memory": _memory,
        "data": informed(_data),
    }
    for subject, check in checks.items():
        try:
            found = check()
        except UserError as error:
            found = Finding("wrong", str(error))
        except ImportError as error:
            found = Finding("wrong", str(error), "make setup")
        yield replace(found, subject=subject)


def _python() -> Finding:
    where = f"{platform.system()} {platform.machine()}, {sys.executable}"
    return Finding("good", f"Python {platform.python_version()} on {where}")


def _packages() -> Finding:
    try:
        written = importlib.metadata.requires(DISTRIBUTION) or []
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Finding("note", f"{DISTRIBUTION} is not installed; its code is used from PYTHONPATH")
    needed = [each for each in map(Requirement, written) if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in needed:
        found = next(iter(importlib.metadata.distributions(name=each.name)), None)
        if found is None:
            wrong.append(f"{each.name} is missing")
        elif not each.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{each.name} {found.version} is not {each.specifier}")
    if wrong:
        return Finding("wrong", ", ".join(wrong), "make setup")
    return Finding("good", f"{DISTRIBUTION} {version} and the {len(needed)} packages that it needs")


def _settings(params: "Params | None") -> Finding:
    from pipeline.grid.cells import expand

    if params is None and not PARAMS_FILE.exists():
        mend = "go to the folder of the project, or `schoenbat-exp use quick` in it"
        return Finding("wrong", f"no {PARAMS_FILE} in {Path.cwd()}", mend)
    params = params or load_checked()
    text = f"{PARAMS_FILE.absolute()}: profile {params.profile}, {counted(len(expand(params)), 'cell')}"
    return Finding("good", text)


def _code() -> Finding:
    check_code()
    if not PROJECT_FILE.is_file():
        return Finding("wrong", f"no {PROJECT_FILE} in {Path.cwd()}", "go to the folder of the project")
    return Finding("good", "what runs is the code of this folder")


def _git() -> Finding:
    try:
        asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return Finding("note", "git is not installed; results will not name a revision")
    if asked.returncode == 0:
        return Finding("good", f"revision {asked.stdout.strip()}")
    said = (asked.stderr.strip().splitlines() or ["git fails"])[0].removeprefix("fatal: ")
    mend = f"git config --global --add safe.directory {Path.cwd()}" if "dubious ownership" in said else ""
    return Finding("note", f"{said}; results will not name a revision", mend)


def _torch(params: "Params") -> Finding:
    import torch

    from pipeline.host.devices import ask_driver, get_device

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    text = f"torch {torch.__version__}, built {built}"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = [f"cuda:{i} {gpu.name} with {gpu.total_memory / 2**30:.0f} GB" for i, gpu in enumerate(found)]
    driver = ask_driver("driver_version")
    if devices:
        text += f", driver {driver or 'unknown'}: {', '.join(devices)}"
    wanted = params.run.device
    try:
        get_device(wanted)
    except UserError:
        mend = "set run.device to cpu"
        if driver and not torch.version.cuda:
            mend = "install a torch that is built for CUDA (pytorch.org/get-started)"
        return Finding("wrong", f"{text}; run.device is {wanted}, which is not there", mend)
    if driver and not devices:
        return Finding("note", f"{text}; the GPU here (driver {driver}) is not usable with it")
    return Finding("good", f"{text}; run.device is {wanted}")


def _threads(params: "Params") -> Finding:
    from pipeline.launch.plan import number_of_cores

    cores, threads = number_of_cores(), params.run.threads
    text = f"{counted(cores, 'core')}, run.threads is {threads}: {counted(max(1, cores // threads), 'cell')} at once"
    if threads > cores:
        return Finding("wrong", text, f"set run.threads to at most {cores}")
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) < threads:
        return Finding("wrong", f"{text}; OMP_THREAD_LIMIT is {limit}", "unset OMP_THREAD_LIMIT")
    return Finding("good", text)


def _dvc() -> Finding:
    version = importlib.metadata.version("dvc")
    if not Path(".dvc").is_dir():
        return Finding("wrong", f"DVC {version}; this folder is no repository of DVC", "dvc init")
    check_folders()
    if not os.access(".dvc", os.W_OK):
        return Finding("good", f"DVC {version}; it cannot be asked where it may not write")
    changed = changed_stages()
    return Finding("good", f"DVC {version}; {counted(len(changed), 'stage')} out of date, or not here")


def _mlflow() -> Finding:
    version = importlib.metadata.version("mlflow")
    try:
        experiment = tracking.find_experiment()
    except UserError as error:
        named = tracking.TRACKING_URI in os.environ
        mend = f"correct {tracking.TRACKING_URI}" if named else "move it away: reports do not need it"
        return Finding("wrong", str(error), "schoenbat-exp log" if "deleted" in str(error) else mend)
    if experiment is None:
        return Finding("note", f"MLflow {version}; the first run makes its database")
    return Finding("good", f"MLflow {version}; runs are in {tracking.shown(tracking.store_uri())}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 10**9
    text = f"{free:.1f} GB free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("wrong", f"{Path.cwd()} cannot be written to", "change its permissions or its owner")
    if free < LEAST_DISK_GB:
        return Finding("wrong", text, f"free {LEAST_DISK_GB:g} GB at least")
    if free < SCARCE_DISK_GB:
        return Finding("note", text, "`dvc gc --all-commits` deletes weights that no commit has on record")
    return Finding("good", text)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("good", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB free")


def _data(params: "Params") -> Finding:
    mirror = params.data.mirror_folder
    if mirror is not None and not mirror.is_dir():
        mend = f"correct {MIRROR_VARIABLE} or data.mirror"
        return Finding("wrong", f"the data mirror {mirror} is not a folder", mend)
    states = []
    for task in params.grid.tasks:
        prepared, fetched = (data_folder(params.profile, task) / "meta.json").is_file(), raw_folder(task).is_dir()
        states.append(f"{task} {'prepared' if prepared else 'fetched' if fetched else 'not fetched yet'}")
    text = f"{', '.join(states)}; mirror: {mirror.absolute() if mirror else 'none'}"
    if "not fetched yet" in text:
        return Finding("note", f"{text}; the next run fetches what is missing")
    return Finding("good", text)
