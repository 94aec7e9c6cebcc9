"""DVC's record: what is read of it is what DVC reads, only what is true gets into it, and no kill can damage it."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from dvc.utils.serialize import dumps_yaml
from pipeline.grid.graph import read_graph
from pipeline.hashes import Hashes, hash_of
from pipeline.record.freshness import stage_states, write_receipt
from pipeline.record.lock_file import Entry, parse_block, read_blocks
from project_folder import ROOT, init_dvc

from pipeline.files import git_revision
from pipeline.record import writer
from schoenbat.errors import UserError

COMMAND = "schoenbat-exp train --task lra-listops --attn mean --former transformer --seed 0 " + "--more " * 20
PARAMS = {
    "floats": [1e-05, 0.001, 1.0, -2.5e10, 1e22],
    "words": ["on", "no", "1e-5", "12", "null", "~", "a: b", "# c", "2026-01-01", "1:30", ""],
    "others": [True, False, None, 0, -7, 10],
    "section": {"dropout": 0.1, "nested": {"list": []}},
}
OUTS = ["out", "runs/" + "long" * 20 + "/test.json", "runs/" + "long and " * 20 + "more"]
"""DVC folds those that are too long for a line."""
STAGES = {
    "train@tiny-lra-listops-mean-transformer-0": {
        "cmd": COMMAND.strip(),
        "deps": [{"path": "a b/c", "hash": "md5", "md5": "00e6bd93cb9ed47dafb0d2ea91932365", "size": 3}],
        "params": {"params.yaml": PARAMS},
        "outs": [{"path": path, "hash": "md5", "md5": "11e6bd93cb9ed47dafb0d2ea91932365", "size": 3} for path in OUTS],
    },
    "b": {"cmd": "other"},
}
TEXT = dumps_yaml({"schema": "2.0", "stages": STAGES})


def test_a_block_is_read_as_dvc_reads_it(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text(TEXT)
    blocks = read_blocks(tmp_path / "dvc.lock")
    assert list(blocks) == list(STAGES)
    assert parse_block(blocks["b"]) == Entry("other", {}, {}, {})
    assert parse_block(blocks["train@tiny-lra-listops-mean-transformer-0"]) == Entry(
        COMMAND.strip(),
        {"a b/c": "00e6bd93cb9ed47dafb0d2ea91932365"},
        PARAMS,
        dict.fromkeys(OUTS, "11e6bd93cb9ed47dafb0d2ea91932365"),
    )
    assert read_blocks(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    "text",
    [TEXT + "datasets: []\n", TEXT[:-10] + "\nx", TEXT.replace("  b:\n", "  ? b\n  :\n"), "stages: {}\n", "<<<<<"],
)
def test_a_file_that_is_laid_out_otherwise_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match="not as DVC writes it"):
        read_blocks(tmp_path / "dvc.lock")


PIPELINE = """
stages:
  first:
    cmd: make first
    deps: [code.py]
    params: [a]
    outs: [first.txt]
  second:
    cmd: make second
    deps: [first.txt]
    outs: [second.txt]
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two stages that have run, of which DVC knows nothing."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("dvc.yaml", PIPELINE), ("params.yaml", "a: 1\n"), ("code.py", "x"), ("first.txt", "1")):
        Path(name).write_text(text)
    Path("second.txt").write_text("2")
    init_dvc(tmp_path)
    for name, stage in read_graph({"a": 1}).stages.items():
        deps, outs = ({path: hash_of(path) for path in paths} for paths in (stage.deps, stage.outs))
        write_receipt(name, Entry(stage.command, deps, {"a": 1} if stage.params else {}, outs))
    return tmp_path


def states(value: int = 1) -> dict[str, str]:
    return dict(stage_states(read_graph({"a": value}), {"a": value}, Hashes()))


def dvc_status() -> dict[str, object]:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_is_made_gets_on_record_and_dvc_is_content(made: Path) -> None:
    assert states() == {"first": "made", "second": "made"}
    assert writer.record(["first", "second"]) == {"first": "", "second": ""}
    assert states() == {"first": "recorded", "second": "recorded"}
    assert dvc_status() == {}


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("code.py", "y", "code.py has changed since it ran"),
        ("params.yaml", "a: 2\n", "params.yaml has changed since it ran"),
        ("first.txt", "3", "first.txt has changed since it ran"),
        ("dvc.yaml", PIPELINE.replace("make first", "make more"), "its command has changed since it ran"),
    ],
)
def test_nothing_is_recorded_under_other_hashes_than_those_it_was_made_from(
    made: Path, file: str, text: str, why: str
) -> None:
    Path(file).write_text(text)
    assert writer.record(["first"]) == {"first": why}
    assert read_blocks() == {}
    value = 2 if file == "params.yaml" else 1
    assert states(value) == {"first": "due", "second": "due"}
    # It is the same again, so it need not be computed again.
    original = {"code.py": "x", "params.yaml": "a: 1\n", "first.txt": "1", "dvc.yaml": PIPELINE}
    Path(file).write_text(original[file])
    assert writer.record(["first"]) == {"first": ""}


def test_what_is_in_no_cache_any_more_only_has_to_be_recorded_again(made: Path) -> None:
    writer.record(["first", "second"])
    for path in Path(".dvc/cache/files/md5").glob("*/*"):
        path.chmod(0o644)
        path.unlink()
    assert states() == {"first": "made", "second": "made"}
    assert writer.record(["first", "second"]) == {"first": "", "second": ""}
    assert dvc_status() == {}


def test_a_stage_that_is_not_in_dvc_yaml_any_more_is_told_and_the_others_are_recorded(made: Path) -> None:
    results = writer.record(["gone", "first"])
    assert results["first"] == ""
    assert results["gone"]


CONFLICT = "<<<<<<< HEAD\n{}=======\n{}>>>>>>> theirs\n"


def test_a_merge_conflict_is_settled_without_losing_what_is_not_committed(made: Path) -> None:
    writer.record(["first", "second"])
    lock = Path("dvc.lock")
    ours = lock.read_text()
    stages = ours.partition("stages:\n")[2]
    lock.write_text(ours.replace(stages, CONFLICT.format(stages, "  third:\n    cmd: x\n")))
    with pytest.raises(UserError, match="settle it, or move it away") as refused:
        states()
    assert "git" not in str(refused.value)
    lock.rename("dvc.lock.conflict")
    # As it says: nothing is computed again.
    assert states() == {"first": "made", "second": "made"}
    assert writer.record(["first", "second"]) == {"first": "", "second": ""}
    assert lock.read_text() == ours


def test_a_recorder_waits_for_another_process_of_dvc_and_says_so_if_it_must_not(made: Path) -> None:
    code = "from dvc.repo import Repo\nwith Repo() as repo, repo.lock: print('held', flush=True), input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"  # noqa: PT018
        hurried = writer.Recorder()
        hurried.add(["first"])
        assert hurried.finish(patient=False) == []
        assert hurried.failed == {"first": "another process of DVC has locked the project"}
        patient = writer.Recorder()
        patient.add(["first"])
        release = threading.Timer(3.0, lambda: other.communicate("\n"))
        release.start()
        assert patient.finish(patient=True) == ["first"]
        assert patient.failed == {}
        release.join()


def test_what_was_unpacked_and_not_cloned_gets_on_record(made: Path) -> None:
    shutil.copy(ROOT / ".dvc/config", ".dvc/config")
    assert not any((folder / ".git").exists() for folder in (made, *made.parents))
    assert writer.record(["first", "second"]) == {"first": "", "second": ""}
    assert states() == {"first": "recorded", "second": "recorded"}
    assert git_revision() == "none"


def test_wherever_dvc_is_killed_while_it_writes_nothing_that_was_on_record_is_lost(made: Path) -> None:
    writer.record(["first"])
    before = Path("dvc.lock").read_bytes()
    writer.record(["second"])
    after = Path("dvc.lock").read_bytes()
    for length in range(len(after) + 1):
        Path("dvc.lock").write_bytes(after[:length])
        Path(".dvc/tmp/dvc.lock.before").write_bytes(before)
        writer.mend_lock()
        assert Path("dvc.lock").read_bytes() in (before, after[:length]), length
        assert states()["first"] == "recorded", length
        assert states()["second"] in ("made", "recorded"), length
        assert not Path(".dvc/tmp/dvc.lock.before").exists()


def run_notes() -> list[Path]:
    return [note for note in Path(".dvc/cache/runs").rglob("*") if note.is_file()]


def test_half_a_note_of_dvc_in_its_run_cache_keeps_nothing_off_the_record(made: Path) -> None:
    writer.record(["first"])
    (note,) = run_notes()
    whole = note.read_bytes()
    for length in range(len(whole)):
        Path("dvc.lock").unlink(missing_ok=True)
        Path(".dvc/tmp/dvc.lock.before").touch()
        note.write_bytes(whole[:length])
        writer.mend_lock()
        assert writer.record(["first"]) == {"first": ""}, length
        assert note.read_bytes() == whole, length


def test_a_stage_that_dvc_trips_over_leaves_the_others_alone(made: Path) -> None:
    writer.record(["first"])
    (note,) = run_notes()
    note.write_bytes(note.read_bytes().partition(b"outs:")[0])
    Path("dvc.lock").unlink()
    results = writer.record(["first", "second"])
    assert results["first"]
    assert results["second"] == ""


def test_a_full_disk_leaves_the_record_as_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    writer.record(["first"])
    before = Path("dvc.lock").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        results = writer.record(["second"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert results["second"]
    assert Path("dvc.lock").read_bytes() == before
    assert writer.record(["second"]) == {"second": ""}


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
