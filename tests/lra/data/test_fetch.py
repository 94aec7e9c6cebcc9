"""Downloads against a real server on this machine that breaks in the ways servers break."""

import gzip
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from schoenbat.errors import DataUnavailable
from schoenbat.lra.data import fetch as fetching
from schoenbat.lra.data.fetch import CorruptFile, RemoteFile, fetch

CONTENT = bytes(range(256)) * 12_000
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


@dataclass
class Behaviour:
    """What the server does; `requests` is what it was asked: the path and the Range header.

    With `pause_seconds` it pauses after each byte, of the headers or of the content.
    """

    content: bytes = CONTENT
    etag: str | None = '"one"'
    cut_after: int | None = None
    cuts: int = 1
    knows_ranges: bool = True
    status: int = 200
    announces_length: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    pause_seconds: float = 0.0
    pauses_before_headers: bool = False
    redirects: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def do_GET(self) -> None:
        behaviour = self.behaviour
        behaviour.requests.append((self.path, self.headers.get("Range")))
        if behaviour.status != 200 or self.path == "/missing":
            self.send_error(behaviour.status if behaviour.status != 200 else 404)
            return
        if behaviour.redirects:
            self.send_response(302)
            self.send_header("Location", behaviour.headers["Location"])
            self.end_headers()
            return
        if behaviour.pauses_before_headers:
            self.dribble(b"HTTP/1.1 200 OK\r\n" + b"X-Long: 1\r\n" * 100_000)
            return
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and behaviour.knows_ranges and self.headers.get("If-Range") == behaviour.etag:
            start = int(asked[1])
            self.send_response(206)
            total = len(behaviour.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = behaviour.content[start:]
        if behaviour.announces_length and "Content-Length" not in behaviour.headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in behaviour.headers.items():
            self.send_header(name, value)
        if behaviour.etag:
            self.send_header("ETag", behaviour.etag)
        self.end_headers()
        if behaviour.cut_after is not None and behaviour.cuts > 0:
            behaviour.cuts -= 1
            body = body[: behaviour.cut_after]
        with suppress(ConnectionError):  # the other side may hang up on what it does not want
            self.dribble(body) if behaviour.pause_seconds else self.wfile.write(body)

    def dribble(self, content: bytes) -> None:
        with suppress(ConnectionError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(self.behaviour.pause_seconds)

    def log_message(self, *arguments: object) -> None:
        pass


@dataclass
class Server:
    url: str
    behaviour: Behaviour

    def file(self, **changes: object) -> RemoteFile:
        file = RemoteFile("set/file.bin", (f"{self.url}/file.bin",), len(CONTENT), SHA256)
        return replace(file, **changes)  # type: ignore[arg-type]


@pytest.fixture
def server() -> Iterator[Server]:
    behaviour = Behaviour()
    handler = type("BoundHandler", (Handler,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Server(f"http://127.0.0.1:{running.server_address[1]}", behaviour)
        running.shutdown()
        thread.join()


def get(file: RemoteFile, destination: Path, mirror: Path | None = None, limit: int | None = None) -> str:
    return fetch(file, destination, mirror=mirror, limit_bytes=limit)


def refused_url() -> str:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{closed.getsockname()[1]}/file.bin"


def test_a_file_arrives_whole_and_alone(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = server.file()
    source = fetch(
        file, tmp_path / "raw" / "f", mirror=None, limit_bytes=None, on_progress=lambda *done: seen.append(done)
    )
    assert source == file.urls[0]
    assert (tmp_path / "raw" / "f").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["f"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert seen == sorted(seen)


def test_a_verified_file_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    get(server.file(checksum=MD5), tmp_path / "f")
    assert get(server.file(checksum=MD5), tmp_path / "f") == "already there"
    assert len(server.behaviour.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_broken_line_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after = 1_000_000
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [asked for _, asked in server.behaviour.requests] == [None, "bytes=1000000-"]


def test_what_arrived_survives_until_the_next_call(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after, server.behaviour.cuts = 1000, 1_000_000
    with pytest.raises(DataUnavailable, match="broke off after 5000 of"):
        get(server.file(), tmp_path / "f")
    assert not (tmp_path / "f").exists()
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:5000]
    server.behaviour.cuts = 0
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.behaviour.requests[-1][1] == "bytes=5000-"


def test_a_part_file_that_is_already_whole_only_needs_its_check(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after, server.behaviour.cuts = 1000, 1_000_000
    with pytest.raises(DataUnavailable):
        get(server.file(), tmp_path / "f")
    (tmp_path / "f.part").write_bytes(CONTENT)
    asked = len(server.behaviour.requests)
    get(server.file(), tmp_path / "f")
    assert len(server.behaviour.requests) == asked


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after, server.behaviour.knows_ranges = 1_000_000, False
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_validators_is_never_asked_for_a_range(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after, server.behaviour.etag = 1_000_000, None
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert {asked for _, asked in server.behaviour.requests} == {None}


def test_a_file_that_changed_meanwhile_is_not_mixed_with_its_past(server: Server, tmp_path: Path) -> None:
    server.behaviour.cut_after, server.behaviour.cuts = 1000, 1_000_000
    server.behaviour.content = CONTENT[::-1]
    with pytest.raises(DataUnavailable):
        get(server.file(), tmp_path / "f")
    server.behaviour.cuts, server.behaviour.content, server.behaviour.etag = 0, CONTENT, '"two"'
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_garbled_record_means_starting_over(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * (len(CONTENT) + 1))
    (tmp_path / "f.part.json").write_text("{")
    get(server.file(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_is_one_line_that_names_it(server: Server, tmp_path: Path, status: int) -> None:
    server.behaviour.status = status
    with pytest.raises(DataUnavailable, match=f"f cannot be downloaded: .*HTTP {status}") as caught:
        get(server.file(), tmp_path / "f")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", [refused_url(), "http://host.invalid/file.bin"], ids=["refused", "unknown host"])
def test_no_network_is_one_line_and_leaves_nothing(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataUnavailable, match="cannot be downloaded") as caught:
        get(RemoteFile("f", (url,), len(CONTENT), SHA256), tmp_path / "f")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["abc", "-5", "", "1e6", "9" * 5000])
@pytest.mark.parametrize("size_is_exact", [True, False])
def test_a_size_that_is_none_is_data_that_cannot_be_had(
    server: Server, tmp_path: Path, size: str, size_is_exact: bool
) -> None:
    server.behaviour.headers = {"Content-Length": size}
    with pytest.raises(DataUnavailable, match="says that the file has"):
        get(server.file(size_is_exact=size_is_exact), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "place", ["http://[::bad/", "http://127.0.0.1:port/", "gopher://a/", "http://\u00e9\u00e9/", "//["]
)
def test_a_redirection_to_nowhere_is_data_that_cannot_be_had(server: Server, tmp_path: Path, place: str) -> None:
    server.behaviour.headers, server.behaviour.redirects = {"Location": place}, True
    with pytest.raises(DataUnavailable, match=r"^f cannot be downloaded: [^\n]+$"):
        get(server.file(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_none_is_data_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match="cannot be downloaded"):
        get(RemoteFile("f", ("http://[::bad/f",), 1, SHA256), tmp_path / "f")


def test_a_line_that_brings_next_to_nothing_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SPAN_SECONDS", 0.2)
    server.behaviour.pause_seconds = 0.01
    with pytest.raises(DataUnavailable, match="is too slow"):
        get(server.file(), tmp_path / "f")
    assert len(server.behaviour.requests) == fetching.ATTEMPTS
    assert (tmp_path / "f.part").stat().st_size > 0


def test_a_server_that_dribbles_its_answer_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "ANSWER_SECONDS", 0.2)
    server.behaviour.pause_seconds, server.behaviour.pauses_before_headers = 0.01, True
    with pytest.raises(DataUnavailable, match="does not answer"):
        get(server.file(), tmp_path / "f")
    server.behaviour.pause_seconds = 0.0


def test_urls_are_tried_in_turn(server: Server, tmp_path: Path) -> None:
    urls = (refused_url(), f"{server.url}/missing", f"{server.url}/file.bin")
    assert get(server.file(urls=urls), tmp_path / "f") == urls[2]


def test_corrupt_content_names_both_checksums_and_is_gone(server: Server, tmp_path: Path) -> None:
    server.behaviour.content = b"?" + CONTENT[1:]
    found = hashlib.sha256(server.behaviour.content).hexdigest()
    with pytest.raises(CorruptFile, match=f"file.bin is corrupt: its sha256 is {found}, expected {SHA256[7:]}"):
        get(server.file(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    server.behaviour.content = CONTENT
    get(server.file(), tmp_path / "f")


def test_another_size_is_refused_before_a_byte_is_taken(server: Server, tmp_path: Path) -> None:
    server.behaviour.content = CONTENT[:-1]
    with pytest.raises(DataUnavailable, match=f"offers {len(CONTENT) - 1} bytes instead of {len(CONTENT)}"):
        get(server.file(), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_short_body_without_announced_length_is_noticed(server: Server, tmp_path: Path) -> None:
    server.behaviour.content, server.behaviour.announces_length = CONTENT[:-1], False
    with pytest.raises(DataUnavailable, match=f"broke off after {len(CONTENT) - 1} of {len(CONTENT)} bytes"):
        get(server.file(), tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_large_file_is_not_begun(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataUnavailable, match=r"f is 3 MB, more than data.download_limit_mb allows \(1 MB\)"):
        get(server.file(), tmp_path / "f", limit=1_000_000)
    assert server.behaviour.requests == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_larger_than_thought_is_not_begun(server: Server, tmp_path: Path) -> None:
    file = server.file(size=10, size_is_exact=False, checksum=None)
    with pytest.raises(DataUnavailable, match="download_limit_mb"):
        get(file, tmp_path / "f", limit=1_000_000)
    assert list(tmp_path.iterdir()) == []
    get(file, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_file_damaged_on_disk_is_named_and_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * len(CONTENT))
    found = hashlib.sha256(b"x" * len(CONTENT)).hexdigest()
    with pytest.raises(CorruptFile, match=f"{tmp_path / 'f'} was corrupt .*{found}, expected {SHA256[7:]}"):
        get(server.file(), tmp_path / "f")
    assert get(server.file(), tmp_path / "f") == server.file().urls[0]


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    folder = tmp_path / "mirror"
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "file.bin").write_bytes(CONTENT)
    return folder


def test_a_read_only_mirror_comes_first_and_has_no_limit(server: Server, mirror: Path, tmp_path: Path) -> None:
    (mirror / "set" / "file.bin").chmod(0o444)
    (mirror / "set").chmod(0o555)
    assert get(server.file(), tmp_path / "raw" / "f", mirror, limit=10) == "mirror"
    assert (tmp_path / "raw" / "f").read_bytes() == CONTENT
    assert os.access(tmp_path / "raw" / "f", os.W_OK)
    assert server.behaviour.requests == []


def test_a_mirror_without_the_file_is_passed_over(server: Server, tmp_path: Path) -> None:
    assert get(server.file(), tmp_path / "f", tmp_path / "no mirror") == server.file().urls[0]
    with pytest.raises(DataUnavailable, match=r"set/file\.bin is in no mirror folder"):
        get(server.file(urls=()), tmp_path / "g", tmp_path / "no mirror")


def test_a_corrupt_mirror_is_named_and_not_silently_replaced(server: Server, mirror: Path, tmp_path: Path) -> None:
    (mirror / "set" / "file.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptFile, match=f"{mirror}/set/file.bin is corrupt: it has {len(CONTENT) - 1} bytes"):
        get(server.file(), tmp_path / "raw" / "f", mirror)
    assert server.behaviour.requests == []
    assert list((tmp_path / "raw").iterdir()) == []


def test_concurrent_calls_fetch_once(server: Server, tmp_path: Path) -> None:
    sources: list[str] = []
    threads = [threading.Thread(target=lambda: sources.append(get(server.file(), tmp_path / "f"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sources) == sorted(["already there"] * 5 + [server.file().urls[0]])
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_gzip_file_without_published_checksum_is_checked_by_its_own(server: Server, tmp_path: Path) -> None:
    server.behaviour.content = b"<!DOCTYPE html><title>Sign in</title>"
    with pytest.raises(CorruptFile, match="is corrupt: it is no gzip file but begins with b'<!DOCTYPE html>"):
        get(server.file(size_is_exact=False, checksum=None, is_gzip=True), tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    server.behaviour.content = gzip.compress(CONTENT)
    with pytest.raises(CorruptFile, match="it unpacks to more than 1,000,000 bytes"):
        get(server.file(size_is_exact=False, checksum=None, is_gzip=True, most_unpacked=10**6), tmp_path / "f")
    get(server.file(size_is_exact=False, checksum=None, is_gzip=True), tmp_path / "f")


FULL_DISK = """
import resource, sys
from pathlib import Path
from schoenbat.lra.data import fetch as fetching
from schoenbat.lra.data.fetch import RemoteFile, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
url, size, checksum, destination = sys.argv[1:]
try:
    fetch(RemoteFile("f", (url,), int(size), checksum), Path(destination), mirror=None, limit_bytes=None)
except OSError as error:
    print(type(error).__name__, error.strerror)
"""


def test_a_full_disk_is_an_os_error_and_the_rest_comes_later(server: Server, tmp_path: Path) -> None:
    file, destination = server.file(), tmp_path / "f"
    arguments = [file.urls[0], str(file.size), SHA256, str(destination)]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "OSError File too large"
    assert not destination.exists()
    get(file, destination)
    assert destination.read_bytes() == CONTENT
    assert server.behaviour.requests[-1][1] is not None
