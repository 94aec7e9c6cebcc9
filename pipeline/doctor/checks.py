"""The checks of `schoenbat-exp doctor`. Each looks at one thing, changes nothing, and returns one line."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement

from pipeline.doctor import Finding
from pipeline.grid.code import check_code
from pipeline.grid.settings import MIRROR_VARIABLE, PARAMS_FILE, PROJECT_FILE
from pipeline.host.text import counted
from pipeline.mlflow import tracking
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from pipeline.grid.params import Params

DISTRIBUTION = "schoenbat-experiments"
LEAST_PYTHON = (3, 11)
LEAST_DISK_GB, SCARCE_DISK_GB = 1.0, 5.0
"""Below the first a grid will fail, below the second a large one may."""


def examine() -> Iterator[Finding]:
    """Yield all findings, one after the other as they are made."""
    yield _python()
    yield _packages()
    params, finding = _settings()
    yield finding
    yield from (
        _guarded(subject, check)
        for subject, check in (
            ("code", _code),
            ("git", _git),
            ("torch", lambda: _torch(params)),
            ("threads", lambda: _threads(params)),
            ("dvc", _dvc),
            ("mlflow", _mlflow),
            ("disk", _disk),
            ("memory", _memory),
            ("data", lambda: _data(params)),
        )
    )


def _guarded(subject: str, check: Callable[[], Finding]) -> Finding:
    """Return what a check finds; a UserError that it raises says what is wrong and what to do."""
    try:
        return check()
    except UserError as error:
        return Finding(subject, "wrong", str(error))


def _python() -> Finding:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info < LEAST_PYTHON:
        return Finding("python", "wrong", text, f"use Python {'.'.join(map(str, LEAST_PYTHON))} or newer")
    return Finding("python", "good", text)


def _packages() -> Finding:
    try:
        written = importlib.metadata.requires(DISTRIBUTION) or []
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "note", f"{DISTRIBUTION} is not installed; its code is used from PYTHONPATH")
    needed = [each for each in map(Requirement, written) if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in needed:
        try:
            found = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{each.name} is missing")
            continue
        if not each.specifier.contains(found, prereleases=True):
            wrong.append(f"{each.name} {found} is not {each.specifier}")
    if wrong:
        return Finding("packages", "wrong", ", ".join(wrong), "make setup")
    return Finding("packages", "good", f"{DISTRIBUTION} {version} and the {len(needed)} packages that it needs")


def _settings() -> tuple["Params | None", Finding]:
    from pipeline.grid.cells import expand
    from pipeline.grid.checked import load_checked

    try:
        params = load_checked()
    except UserError as error:
        mend = "" if PARAMS_FILE.exists() else "go to the folder of the project, or `schoenbat-exp use quick` in it"
        return None, Finding("settings", "wrong", str(error), mend)
    text = f"{PARAMS_FILE.absolute()}: profile {params.profile}, {counted(len(expand(params)), 'cell')}"
    return params, Finding("settings", "good", text)


def _code() -> Finding:
    check_code()
    if not PROJECT_FILE.is_file():
        return Finding("code", "wrong", f"no {PROJECT_FILE} in {Path.cwd()}", "go to the folder of the project")
    return Finding("code", "good", "what runs is the code of this folder")


def _git() -> Finding:
    try:
        asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return Finding("git", "note", "git is not installed; results will not name a revision")
    if asked.returncode == 0:
        return Finding("git", "good", f"revision {asked.stdout.strip()}")
    said = (asked.stderr.strip().splitlines() or ["git fails"])[0].removeprefix("fatal: ")
    mend = f"git config --global --add safe.directory {Path.cwd()}" if "dubious ownership" in said else ""
    return Finding("git", "note", f"{said}; results will not name a revision", mend)


def _torch(params: "Params | None") -> Finding:
    import torch

    from pipeline.host.devices import ask_driver, get_device

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    text = f"torch {torch.__version__}, built {built}"
    devices = [
        f"cuda:{index} {found.name} with {found.total_memory / 2**30:.0f} GB"
        for index, found in ((i, torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count()))
    ]
    driver = ask_driver("driver_version")
    if devices:
        text += f", driver {driver or 'unknown'}: {', '.join(devices)}"
    wanted = "cpu" if params is None else params.run.device
    try:
        get_device(wanted)
    except UserError:
        mend = "set run.device to cpu"
        if driver and not torch.version.cuda:
            mend = "install a torch that is built for CUDA (pytorch.org/get-started)"
        return Finding("torch", "wrong", f"{text}; run.device is {wanted}, which is not there", mend)
    if driver and not devices:
        return Finding("torch", "note", f"{text}; the GPU here (driver {driver}) is not usable with it")
    return Finding("torch", "good", f"{text}; run.device is {wanted}")


def _threads(params: "Params | None") -> Finding:
    from pipeline.launch.plan import number_of_cores

    cores = number_of_cores()
    if params is None:
        return Finding("threads", "good", counted(cores, "core"))
    threads = params.run.threads
    text = f"{counted(cores, 'core')}, run.threads is {threads}: {counted(max(1, cores // threads), 'cell')} at once"
    if threads > cores:
        return Finding("threads", "wrong", text, f"set run.threads to at most {cores}")
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) < threads:
        return Finding("threads", "wrong", f"{text}; OMP_THREAD_LIMIT is {limit}", "unset OMP_THREAD_LIMIT")
    return Finding("threads", "good", text)


def _dvc() -> Finding:
    from pipeline.grid.freshness import check_folders
    from pipeline.record.writer import changed_stages

    try:
        version = importlib.metadata.version("dvc")
    except importlib.metadata.PackageNotFoundError:
        return Finding("dvc", "wrong", "DVC is not installed", "make setup")
    if not Path(".dvc").is_dir():
        return Finding("dvc", "wrong", f"DVC {version}; this folder is no repository of DVC", "dvc init")
    check_folders()
    if not os.access(".dvc", os.W_OK):
        return Finding("dvc", "good", f"DVC {version}; it cannot be asked where it may not write")
    changed = changed_stages()
    return Finding("dvc", "good", f"DVC {version}; {counted(len(changed), 'stage')} out of date, or not here")


def _mlflow() -> Finding:
    try:
        version = importlib.metadata.version("mlflow")
    except importlib.metadata.PackageNotFoundError:
        return Finding("mlflow", "wrong", "MLflow is not installed", "make setup")
    try:
        experiment = tracking.find_experiment()
    except UserError as error:
        named = tracking.TRACKING_URI in os.environ
        mend = f"correct {tracking.TRACKING_URI}" if named else "move it away: reports do not need it"
        return Finding("mlflow", "wrong", str(error), "schoenbat-exp log" if "deleted" in str(error) else mend)
    if experiment is None:
        return Finding("mlflow", "note", f"MLflow {version}; the first run makes its database")
    return Finding("mlflow", "good", f"MLflow {version}; runs are in {tracking.shown(tracking.store_uri())}")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 10**9
    text = f"{free:.1f} GB free in {Path.cwd()}"
    if not os.access(Path.cwd(), os.W_OK):
        return Finding("disk", "wrong", f"{Path.cwd()} cannot be written to", "change its permissions or its owner")
    if free < LEAST_DISK_GB:
        return Finding("disk", "wrong", text, f"free {LEAST_DISK_GB:g} GB at least")
    if free < SCARCE_DISK_GB:
        return Finding("disk", "note", text, "`dvc gc --all-commits` deletes weights that no commit has on record")
    return Finding("disk", "good", text)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", "good", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GB free")


def _data(params: "Params | None") -> Finding:
    from pipeline.grid.freshness import data_folder, raw_folder

    if params is None:
        return Finding("data", "note", "unknown without settings")
    mirror = params.data.mirror_folder
    if mirror is not None and not mirror.is_dir():
        mend = f"correct {MIRROR_VARIABLE} or data.mirror"
        return Finding("data", "wrong", f"the data mirror {mirror} is not a folder", mend)
    tasks = {
        task: "prepared"
        if (data_folder(params.profile, task) / "meta.json").is_file()
        else "fetched"
        if raw_folder(task).is_dir()
        else "not fetched yet"
        for task in params.grid.tasks
    }
    text = ", ".join(f"{task} {how}" for task, how in tasks.items())
    text += f"; mirror: {mirror.absolute() if mirror else 'none'}"
    if "not fetched yet" in tasks.values():
        return Finding("data", "note", f"{text}; the next run fetches what is missing")
    return Finding("data", "good", text)
