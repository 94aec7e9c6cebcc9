"""How long those who watch a heartbeat wait for it."""

import threading
from pathlib import Path

import pytest

from pipeline.host import heartbeat


@pytest.mark.parametrize("there", [True, False])
def test_a_heartbeat_ends_when_it_is_not_renewed_or_at_once_when_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    turns: list[float] = []
    monkeypatch.setattr(heartbeat, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: turns.append(0.0) or float(len(turns)))
    if there:
        (tmp_path / "heartbeat").touch()
    watcher = threading.Thread(target=heartbeat.wait_for_end, args=(tmp_path / "heartbeat", 10.0))
    watcher.daemon = True
    watcher.start()
    watcher.join(timeout=30)
    assert not watcher.is_alive(), "it waits for ever"
    assert (len(turns) > 8) == there
