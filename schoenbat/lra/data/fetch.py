"""Fetch one file: from a mirror folder or over HTTP, resumable, verified before it appears under its name.

What has arrived so far lies beside the destination as NAME.part, and where it came from as NAME.part.json. A line that
breaks, a kill or a full disk leaves both, and the next call asks the server for the rest only (`Range`), on condition
that the file is still the same one (`If-Range`). The finished file is checked, synced and renamed, so a file under
the destination's name is always whole and verified.
"""

import fcntl
import filecmp
import gzip
import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from schoenbat.errors import DataUnavailable

TIMEOUT_SECONDS = 10
"""For connecting, and for silence on an open line."""
ANSWER_SECONDS = 60.0
"""Until a server has answered, however many redirections that takes."""
SPAN_SECONDS, LEAST_BYTES = 30.0, 30_000
"""What a line must bring in every such span of time."""
ATTEMPTS = 5
"""How often one URL is asked in all, as long as something came before the line broke."""
BLOCK = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file that can be had elsewhere, and how to know that it is the right one."""

    mirror_path: str
    """Where it lies inside a mirror folder."""
    urls: tuple[str, ...]
    """Tried in this order; may be empty."""
    size: int
    """Bytes. Exact, unless `size_is_exact` is False: then it only decides whether a download may begin."""
    checksum: str | None
    """`sha256:HEX` or `md5:HEX`; None where no checksum is published."""
    size_is_exact: bool = True
    is_gzip: bool = False
    """Without a published checksum, the ones inside a gzip file tell whether it is whole."""
    most_unpacked: int = 2**38
    """Bytes: a gzip file that unpacks to more is refused."""


class CorruptFile(DataUnavailable):
    """A complete file whose content is not the expected one; what was written of it has been removed."""


class _SourceFailed(Exception):
    """A URL that did not deliver; the text says why."""


def fetch(
    file: RemoteFile,
    destination: Path,
    *,
    mirror: Path | None,
    limit_bytes: int | None,
    on_progress: Progress | None = None,
) -> str:
    """Put `file` at `destination`, from the mirror folder if it lies there, else from the first URL that works.

    A destination that is already there is verified and kept; one without a published checksum is replaced where the
    mirror has another file now, or where it came from a URL that is not among those of `file`. Concurrent calls wait
    for each other.

    Args:
        mirror: a folder, only ever read; None for none.
        limit_bytes: the largest download to begin; None for no limit. Copies from the mirror are not limited.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        Where the file came from: "mirror", a URL, or "already there".

    Raises:
        DataUnavailable: too large, no source answered, or (CorruptFile) what came is not the expected file. The
            message is one line.
        OSError: the file cannot be written.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_part(destination)) as target:
        origin = mirror / file.mirror_path if mirror else None
        if destination.exists() and not (file.checksum is None and _is_other(file, origin, destination)):
            with open(destination, "rb") as present:
                problem = _problem(present, file, file.size if file.size_is_exact else None, is_new=False)
            if problem:
                destination.unlink()
                raise CorruptFile(f"{destination} was corrupt and has been removed, run again: {problem}")
            return "already there"
        if origin and origin.is_file():
            size = _copy(origin, destination, target, on_progress)
            problem = _problem(target, file, file.size if file.size_is_exact else size)
            if problem:
                target.truncate(0)
                raise CorruptFile(f"{origin} is corrupt: {problem}")
            _url_record(destination).unlink(missing_ok=True)
            _put_in_place(target, destination)
            return "mirror"
        if not file.urls:
            raise DataUnavailable(f"{file.mirror_path} is in no mirror folder and has no other source")
        _check_limit(file.size, limit_bytes, destination.name)
        failures, corrupt = [], False
        for url in file.urls:
            try:
                size = _receive(url, file, destination, target, limit_bytes, on_progress)
            except _SourceFailed as failure:
                failures.append(f"{url}: {failure}")
                continue
            problem = _problem(target, file, size)
            if not problem:
                if file.checksum is None:
                    _url_record(destination).write_text(url, encoding="utf-8")
                _put_in_place(target, destination)
                return url
            target.truncate(0)
            corrupt = True
            failures.append(f"{url} is corrupt: {problem}")
        kind = CorruptFile if corrupt else DataUnavailable
        raise kind(f"{destination.name} cannot be downloaded: {'; '.join(failures)}")


def _is_other(file: RemoteFile, origin: Path | None, destination: Path) -> bool:
    """Return whether what is there is not the file of the mirror, or came from a URL that is not asked any more."""
    if origin is not None and origin.is_file():
        return not filecmp.cmp(origin, destination, shallow=False)
    record = _url_record(destination)
    return record.is_file() and record.read_text(encoding="utf-8") not in file.urls


def _url_record(destination: Path) -> Path:
    """Return where a file without a published checksum came from."""
    return destination.with_name(destination.name + ".url")


def _part(destination: Path) -> Path:
    return destination.with_name(destination.name + ".part")


def _origin_record(destination: Path) -> Path:
    """Return where the bytes of the part file come from: url, validator (ETag or date) and size."""
    return destination.with_name(destination.name + ".part.json")


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Return the part file, open for reading and writing and locked against others; removed again if it stays empty.

    Whoever held the lock may have renamed the file meanwhile; then the lock is on the wrong file and is sought again.
    """
    while True:
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as target:
            fcntl.flock(target, fcntl.LOCK_EX)
            if not _is_at(target, part):
                continue
            try:
                yield target
            finally:
                if os.fstat(target.fileno()).st_size == 0 and _is_at(target, part):
                    part.unlink()
                    part.with_name(part.name + ".json").unlink(missing_ok=True)
            return


def _is_at(target: BinaryIO, path: Path) -> bool:
    try:
        # Another process may rename the file at any moment.
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(target.fileno()), there)


def _copy(origin: Path, destination: Path, target: BinaryIO, on_progress: Progress | None) -> int:
    """Copy a mirror's file and return its size."""
    _origin_record(destination).unlink(missing_ok=True)
    target.truncate(0)
    total, done = origin.stat().st_size, 0
    with open(origin, "rb") as source:
        while block := source.read(BLOCK):
            target.write(block)
            done += len(block)
            if on_progress:
                on_progress(done, total)
    return total


def _check_limit(size: int, limit_bytes: int | None, name: str) -> None:
    if limit_bytes is not None and size > limit_bytes:
        raise DataUnavailable(
            f"{name} is {size / 1e6:,.0f} MB, more than data.download_limit_mb allows ({limit_bytes / 1e6:,.0f} MB)"
        )


def _receive(
    url: str,
    file: RemoteFile,
    destination: Path,
    target: BinaryIO,
    limit_bytes: int | None,
    on_progress: Progress | None,
) -> int:
    """Bring the part file to its full size from `url`, and return that size."""
    for attempt in range(1, ATTEMPTS + 1):
        before = target.seek(0, os.SEEK_END)
        try:
            return _receive_rest(url, file, destination, target, limit_bytes, on_progress)
        except _SourceFailed:
            target.flush()
            if target.seek(0, os.SEEK_END) == before or attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _receive_rest(
    url: str,
    file: RemoteFile,
    destination: Path,
    target: BinaryIO,
    limit_bytes: int | None,
    on_progress: Progress | None,
) -> int:
    """Request the rest of the part file where the server can tell that it is the same file, else all."""
    have = target.seek(0, os.SEEK_END)
    record = _read_record(destination)
    headers = {"User-Agent": "schoenbat", "Accept-Encoding": "identity"}
    if have and record.get("url") == url:
        if have == record["size"]:
            return have
        headers |= {"Range": f"bytes={have}-", "If-Range": record["validator"]}
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            target.truncate(0)
        raise _SourceFailed(f"HTTP {error.code} {error.reason}") from None
    except TimeoutError:
        raise _SourceFailed("does not answer") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        # A ValueError is about an address that is none, in a redirection too, or a header that is none.
        raise _SourceFailed(_reason(error)) from None
    with response:
        if response.status == 206 and "Range" in headers:
            if response.headers.get("Content-Range") != f"bytes {have}-{record['size'] - 1}/{record['size']}":
                target.truncate(0)
                raise _SourceFailed(f"answered with another range: {response.headers.get('Content-Range')}")
            total = record["size"]
        else:
            total = _announced_size(response, file)
            _check_limit(total, limit_bytes, destination.name)
            target.truncate(0)
            have = 0
            _write_record(destination, url, response, total)
        target.seek(have)
        before, began = have, time.monotonic()
        while have < total:
            try:
                block = response.read1(min(BLOCK, total - have))
            except (OSError, http.client.HTTPException) as error:
                raise _SourceFailed(f"broke off after {have} of {total} bytes: {_reason(error)}") from None
            if not block:
                raise _SourceFailed(f"broke off after {have} of {total} bytes")
            target.write(block)
            have += len(block)
            if time.monotonic() - began > SPAN_SECONDS:
                if have - before < LEAST_BYTES:
                    raise _SourceFailed(f"is too slow: {have} of {total} bytes have come")
                before, began = have, time.monotonic()
            if on_progress:
                on_progress(have, total)
    return total


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Return the answer to a request; raises TimeoutError after ANSWER_SECONDS, as urllib's only counts silence."""
    answer: Future[http.client.HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(
                urllib.request.urlopen(urllib.request.Request(url, headers=headers), None, TIMEOUT_SECONDS)
            )
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, name="fetch", daemon=True).start()
    return answer.result(ANSWER_SECONDS)


def _announced_size(response: http.client.HTTPResponse, file: RemoteFile) -> int:
    length = response.headers.get("Content-Length")
    if length is None:
        if not file.size_is_exact:
            raise _SourceFailed("does not say how long the file is")
        return file.size
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise _SourceFailed(f"says that the file has {length[:40]!r} bytes")
    if file.size_is_exact and int(length) != file.size:
        raise _SourceFailed(f"offers {length} bytes instead of {file.size}")
    return int(length)


def _read_record(destination: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(_origin_record(destination).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _write_record(destination: Path, url: str, response: http.client.HTTPResponse, size: int) -> None:
    """Remember what a later request needs; nothing where the server gives no strong validator."""
    tag = response.headers.get("ETag")
    validator = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")
    record = _origin_record(destination)
    if validator:
        record.write_text(json.dumps({"url": url, "validator": validator, "size": size}), encoding="utf-8")
    else:
        record.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__


def _problem(content: BinaryIO, file: RemoteFile, size: int | None, *, is_new: bool = True) -> str | None:
    """Return what is wrong with a complete file, or None.

    Args:
        is_new: it has just come. A gzip file of old has been unpacked then, which can take minutes.
    """
    content.flush()
    found = content.seek(0, os.SEEK_END)
    if size is not None and found != size:
        return f"it has {found} bytes, expected {size}"
    if found == 0:
        return "it is empty"
    content.seek(0)
    if file.checksum is None:
        return _gzip_problem(content, file.most_unpacked, whole=is_new) if file.is_gzip else None
    algorithm, expected = file.checksum.split(":")
    digest = hashlib.new(algorithm, usedforsecurity=False)
    while block := content.read(BLOCK):
        digest.update(block)
    return None if digest.hexdigest() == expected else f"its {algorithm} is {digest.hexdigest()}, expected {expected}"


def _gzip_problem(content: BinaryIO, most: int, *, whole: bool) -> str | None:
    """Return whether a file is a gzip file, and, if `whole`, whether all of it fits its own checksums."""
    beginning = content.read(40)
    content.seek(0)
    if not beginning.startswith(b"\x1f\x8b\x08"):
        return f"it is no gzip file but begins with {beginning!r}"
    if not whole:
        return None
    unpacked = 0
    try:
        with gzip.GzipFile(fileobj=content) as archive:
            while block := archive.read(BLOCK):
                unpacked += len(block)
                if unpacked > most:
                    return f"it unpacks to more than {most:,} bytes"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        return f"it cannot be unpacked: {_reason(error)}"
    return None


def _put_in_place(target: BinaryIO, destination: Path) -> None:
    """Make the verified part file the destination, durably."""
    target.flush()
    os.fsync(target.fileno())
    _part(destination).rename(destination)
    _origin_record(destination).unlink(missing_ok=True)
    folder = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
