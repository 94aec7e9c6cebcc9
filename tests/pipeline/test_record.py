"""DVC's record: only what is true gets into it, DVC is content with it, and no kill can damage it."""

import contextlib
import errno
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from project_folder import ROOT, Project, make_up_results

from pipeline.grid.results import CellResults
from pipeline.host.files import git_revision
from pipeline.record import writer
from schoenbat.errors import UserError

if TYPE_CHECKING:
    from dvc.stage import PipelineStage

MEAN, SOFTMAX = ("lra-listops-mean-transformer", "lra-listops-softmax-transformer")
TRAIN, EVALUATE = f"train@tiny-{MEAN}", f"evaluate@tiny-{MEAN}"
DATA = ("download@tiny-lra-listops", "preprocess@tiny-lra-listops")
STAGES = ("numerics", *DATA, TRAIN, EVALUATE, f"train@tiny-{SOFTMAX}", f"evaluate@tiny-{SOFTMAX}")
NOT_CELLS = {"bench@tiny", "report@tiny"}
CHANGED = "code, settings or data have changed since it ran; run again"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the results of two groups of cells, of which DVC knows nothing."""
    folder = tmp_path_factory.mktemp("template") / "project"
    folder.mkdir()
    with contextlib.chdir(folder):
        project = Project(folder)
        project.set("grid.tasks", ["lra-listops"])
        project.set("grid.kernel.dotf", [])
        project.add_dvc()
        make_up_results()
    return folder


@pytest.fixture
def made(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    return folder


def recorded() -> set[str]:
    """Return the stages that are in the lock file."""
    return set(yaml.safe_load(Path("dvc.lock").read_text())["stages"]) if Path("dvc.lock").exists() else set()


def dvc_changes() -> set[str]:
    """Return the stages that DVC finds changed, but those that nobody has run here."""
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    return set(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)) - NOT_CELLS


def test_what_is_made_gets_on_record_and_dvc_is_content(made: Path) -> None:
    assert writer.record(STAGES) == dict.fromkeys(STAGES, "")
    assert recorded() == set(STAGES)
    assert dvc_changes() == set()
    assert writer.changed_stages().keys() == NOT_CELLS
    # It holds every stage once more, and nobody reads it.
    assert not Path(".dvc/cache/runs").exists()


def edit(path: str, change: Callable[[str], str]) -> Callable[[], None]:
    def apply() -> None:
        Path(path).write_text(change(Path(path).read_text()))

    return apply


METRICS, SUMMARY = f"runs/tiny/{MEAN}/metrics/1.json", "runs/tiny/data/lra-listops.json"


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (edit("numerics/attention/mean.json", lambda text: text.replace('": "', '": "0', 1)), (TRAIN, EVALUATE)),
        (edit("params.yaml", lambda text: text.replace("steps: 6", "steps: 7")), (TRAIN, EVALUATE)),
        (edit("params.yaml", lambda text: text.replace("seeds:", "seeds:\n  - 2")), (TRAIN, EVALUATE)),
        (edit("params.yaml", lambda text: text.replace("train_size: 64", "train_size: 65")), (DATA[1], TRAIN)),
        (edit(SUMMARY, lambda text: text.replace('"made_from": "', '"made_from": "0')), DATA[1:]),
        (edit(METRICS, lambda text: text.replace('"settings": "', '"settings": "0')), (TRAIN, EVALUATE)),
        (Path(METRICS).unlink, (TRAIN, EVALUATE)),
        (Path(METRICS.replace("metrics", "test")).unlink, (EVALUATE,)),
    ],
    ids=["code", "settings", "a seed more", "settings of data", "data", "another fingerprint", "no metrics", "no test"],
)
def test_nothing_is_recorded_that_was_made_from_something_else(
    made: Path, change: Callable[[], None], stages: tuple[str, ...]
) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    change()
    assert writer.record(stages) == dict.fromkeys(stages, CHANGED)
    assert recorded() == set()
    # It is the same again, so it need not be computed again.
    for path, content in before.items():
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)
    assert writer.record(stages) == dict.fromkeys(stages, "")


def test_what_the_code_computes_now_is_compared_with_what_is_on_record_as_numerics(made: Path) -> None:
    edit("numerics/attention/mean.json", lambda text: text.replace('": "', '": "0', 1))()
    assert writer.record(["numerics", f"train@tiny-{SOFTMAX}"]) == {"numerics": CHANGED, f"train@tiny-{SOFTMAX}": ""}


def test_what_is_in_no_cache_any_more_only_has_to_be_recorded_again(made: Path) -> None:
    writer.record(STAGES)
    for path in Path(".dvc/cache/files/md5").glob("*/*"):
        path.chmod(0o644)
        path.unlink()
    lost = {TRAIN, f"train@tiny-{SOFTMAX}", DATA[1]}
    assert {name for name, more in writer.changed_stages().items() if more} - NOT_CELLS == lost
    assert writer.record(STAGES) == dict.fromkeys(STAGES, "")
    assert dvc_changes() == set()


def test_weights_that_are_not_here_stay_on_record(made: Path) -> None:
    writer.record(STAGES)
    before = Path("dvc.lock").read_bytes()
    shutil.rmtree("weights")
    assert writer.record(STAGES) == dict.fromkeys(STAGES, "")
    assert Path("dvc.lock").read_bytes() == before
    assert not any(more for name, more in writer.changed_stages().items() if name not in NOT_CELLS)
    subprocess.run([sys.executable, "-m", "dvc", "checkout", "--quiet", TRAIN], check=True)
    best = CellResults("tiny", f"{MEAN}-0").best
    assert best.read_bytes() == f"weights of {MEAN}-0".encode()


def test_a_stage_that_is_not_in_dvc_yaml_any_more_is_told_and_the_others_are_recorded(made: Path) -> None:
    assert writer.record(["gone", TRAIN]) == {"gone": "dvc.yaml does not have it", TRAIN: ""}


CONFLICT = "<<<<<<< HEAD\n{}=======\n{}>>>>>>> theirs\n"


def test_a_merge_conflict_is_settled_without_losing_what_is_not_committed(made: Path) -> None:
    writer.record(STAGES)
    lock = Path("dvc.lock")
    ours = lock.read_text()
    stages = ours.partition("stages:\n")[2]
    lock.write_text(ours.replace(stages, CONFLICT.format(stages, "  third:\n    cmd: x\n")))
    with pytest.raises(UserError, match=r"DVC cannot read dvc\.yaml and dvc\.lock"):
        writer.changed_stages()
    lock.unlink()
    # Nothing has to be computed again.
    assert writer.record(STAGES) == dict.fromkeys(STAGES, "")
    assert yaml.safe_load(lock.read_text()) == yaml.safe_load(ours)


def test_a_recorder_waits_for_another_process_of_dvc_and_says_so_if_it_must_not(made: Path) -> None:
    code = "from dvc.repo import Repo\nwith Repo() as repo, repo.lock: print('held', flush=True), input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"  # noqa: PT018
        hurried = writer.Recorder()
        hurried.add([TRAIN])
        assert hurried.finish(patient=False) == []
        assert hurried.failed == {TRAIN: "another process of DVC has locked the project; run again when it has ended"}
        patient = writer.Recorder()
        patient.add([TRAIN])
        release = threading.Timer(3.0, lambda: other.communicate("\n"))
        release.start()
        assert patient.finish(patient=True) == [TRAIN]
        assert patient.failed == {}
        release.join()


def test_what_was_unpacked_and_not_cloned_gets_on_record(made: Path) -> None:
    shutil.copy(ROOT / ".dvc/config", ".dvc/config")
    assert not any((folder / ".git").exists() for folder in (made, *made.parents))
    assert writer.record(STAGES) == dict.fromkeys(STAGES, "")
    assert git_revision() == "none"


def test_wherever_dvc_is_killed_while_it_writes_nothing_that_was_on_record_is_lost(made: Path) -> None:
    writer.record([TRAIN])
    before = Path("dvc.lock").read_bytes()
    writer.record([EVALUATE])
    after = Path("dvc.lock").read_bytes()
    for length in range(len(after) + 1):
        Path("dvc.lock").write_bytes(after[:length])
        Path(".dvc/tmp/dvc.lock.before").write_bytes(before)
        writer.mend_lock()
        assert Path("dvc.lock").read_bytes() == before, length
        assert not Path(".dvc/tmp/dvc.lock.before").exists()
    Path("dvc.lock").write_bytes(after[: len(after) // 2])
    # There was none before.
    Path(".dvc/tmp/dvc.lock.before").touch()
    writer.mend_lock()
    assert not Path("dvc.lock").exists()
    writer.mend_lock()
    assert writer.record([TRAIN]) == {TRAIN: ""}
    assert Path("dvc.lock").read_bytes() == before


def test_a_clone_gets_the_record_of_its_profile_in_place_and_one_that_is_there_stays(made: Path) -> None:
    writer.record(STAGES)
    ours = Path("dvc.lock").read_bytes()
    Path("profiles").mkdir(exist_ok=True)
    Path("dvc.lock").rename("profiles/tiny.lock")
    writer.exchange_record("tiny", "tiny")
    assert Path("dvc.lock").read_bytes() == ours
    Path("dvc.lock").write_bytes(b"newer")
    writer.exchange_record("tiny", "tiny")
    assert Path("dvc.lock").read_bytes() == b"newer"
    assert Path("profiles/tiny.lock").read_bytes() == ours


def test_a_stage_that_dvc_trips_over_leaves_the_others_alone(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = writer._commit

    def trip(stage: "PipelineStage") -> None:
        if stage.name == TRAIN:
            raise OSError(errno.EIO, "Input/output error")
        commit(stage)

    monkeypatch.setattr(writer, "_commit", trip)
    assert writer.record([TRAIN, EVALUATE]) == {TRAIN: "Input/output error", EVALUATE: ""}
    assert recorded() == {EVALUATE}


def test_a_full_disk_leaves_the_record_as_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    writer.record([TRAIN])
    before = Path("dvc.lock").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        results = writer.record([EVALUATE])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert results[EVALUATE]
    assert Path("dvc.lock").read_bytes() == before
    assert writer.record([EVALUATE]) == {EVALUATE: ""}


def test_a_list_of_readers_and_writers_is_dropped_when_it_is_damaged_or_nobody_in_it_runs_dvc(tmp_path: Path) -> None:
    path = tmp_path / "rwlock"
    path.write_text('{"write": {"a": {"pi')
    writer.drop_stale_rwlock(path)
    assert not path.exists()
    for arguments, stays in (([], False), (["dvc"], True)):
        command = [sys.executable, "-c", "print(flush=True); input()", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:  # type: ignore[call-overload]
            # Before it runs it has no command yet.
            process.stdout.readline()
            holder = {"pid": process.pid, "cmd": "dvc repro"}
            path.write_text(json.dumps({"write": {"a": holder}, "read": {"b": [holder]}}))
            writer.drop_stale_rwlock(path)
            assert path.exists() == stays
            process.communicate(b"\n")
    writer.drop_stale_rwlock(path)
    assert not path.exists()
