"""dvc.lock in blocks: what DVC wrote is read as DVC reads it, and written back byte for byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.utils.serialize import dumps_yaml, parse_yaml

from pipeline.record.dvc_lock import Blocks, Entries, read_blocks
from pipeline.record.dvc_project import drop_damaged_rwlock, drop_stale_rwlock
from schoenbat.errors import UserError

STAGES = {
    "train@tiny-lra-listops-mean-transformer-0": {
        "cmd": "schoenbat-exp train --task lra-listops --attn mean --former transformer --seed 0 " + "--more " * 20,
        "deps": [{"path": "a b/c", "hash": "md5", "md5": "00e6bd93cb9ed47dafb0d2ea91932365", "size": 3}],
        "params": {
            "params.yaml": {
                "floats": [1e-05, 0.001, 1.0, -2.5e10, 1e22],
                "words": ["on", "no", "1e-5", "12", "null", "~", "a: b", "# c", "2026-01-01", "1:30", ""],
                "others": [True, False, None, 0, -7, 10],
                "section": {"dropout": 0.1, "nested": {"list": []}},
            }
        },
    },
    "b": {"cmd": "line one\nline two\n"},
}
TEXT = dumps_yaml({"schema": "2.0", "stages": STAGES})


def test_entries_are_those_that_dvc_reads() -> None:
    assert dict(Entries(Blocks(TEXT))) == parse_yaml(TEXT, "dvc.lock")["stages"] == STAGES


def test_written_back_nothing_changes_and_a_replaced_block_is_the_only_change(tmp_path: Path) -> None:
    blocks = Blocks(TEXT)
    blocks.write(tmp_path / "dvc.lock")
    assert (tmp_path / "dvc.lock").read_text() == TEXT
    changed = {**STAGES, "b": {"cmd": "other"}, "c": {"cmd": "new"}}
    for name in ("b", "c"):
        ((_, block),) = Blocks(dumps_yaml({"schema": "2.0", "stages": {name: changed[name]}})).items()
        blocks.replace(name, block)
    blocks.write(tmp_path / "dvc.lock")
    assert (tmp_path / "dvc.lock").read_text() == dumps_yaml({"schema": "2.0", "stages": changed})


@pytest.mark.parametrize(
    "text",
    [TEXT + "datasets: []\n", TEXT[:-30] + "\nx", TEXT.replace("  b:\n", "  ? b\n  :\n"), "stages: {}\n", "<<<<<"],
)
def test_a_file_that_is_laid_out_otherwise_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match="not laid out as DVC writes it"):
        read_blocks(tmp_path / "dvc.lock")


def test_no_file_has_no_stages(tmp_path: Path) -> None:
    assert len(read_blocks(tmp_path / "dvc.lock")) == 0


def test_a_record_of_locks_is_dropped_when_it_is_damaged_or_nobody_in_it_runs_dvc(tmp_path: Path) -> None:
    path = tmp_path / "rwlock"
    path.write_text('{"write": {"a": {"pi')
    drop_damaged_rwlock(path)
    assert not path.exists()
    for arguments, stays in (([], False), (["dvc"], True)):
        with subprocess.Popen([sys.executable, "-c", "input()", *arguments], stdin=subprocess.PIPE) as process:
            holder = {"pid": process.pid, "cmd": "dvc repro"}
            path.write_text(json.dumps({"write": {"a": holder}, "read": {"b": [holder]}}))
            drop_damaged_rwlock(path)
            assert path.exists()
            drop_stale_rwlock(path)
            assert path.exists() == stays
            process.communicate(b"\n")
    drop_stale_rwlock(path)
    assert not path.exists()


WRITES_SLOWLY = """
import pathlib, sys, time
from dvc.lock import make_lock
path = pathlib.Path(sys.argv[1])
with make_lock(f"{path}.lock", tmp_dir=str(path.parent)):
    path.write_text("")
    print("began", flush=True)
    time.sleep(1)
    path.write_text("{}")
"""


def test_a_record_that_is_being_written_is_not_taken_for_damaged(tmp_path: Path) -> None:
    path = tmp_path / "rwlock"
    command = [sys.executable, "-c", WRITES_SLOWLY, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        drop_damaged_rwlock(path)
    assert path.read_text() == "{}"
