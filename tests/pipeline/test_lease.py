"""How long those who watch a lease wait for it."""

import threading
from pathlib import Path

import pytest

from pipeline.host import lease


@pytest.mark.parametrize(("there", "kept", "waits"), [(True, False, True), (False, False, False), (False, True, True)])
def test_a_lease_ends_when_it_is_not_renewed_or_at_once_when_it_is_deleted_unless_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, kept: bool, waits: bool
) -> None:
    turns: list[float] = []
    monkeypatch.setattr(lease, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(lease.time, "monotonic", lambda: turns.append(0.0) or float(len(turns)))
    if there:
        (tmp_path / "lease").touch()
    watcher = threading.Thread(target=lease.wait_for_end, args=(tmp_path / "lease", 10.0), kwargs={"kept": kept})
    watcher.daemon = True
    watcher.start()
    watcher.join(timeout=30)
    assert not watcher.is_alive(), "it waits for ever"
    assert (len(turns) > 8) == waits
