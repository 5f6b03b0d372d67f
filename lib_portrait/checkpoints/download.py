"""Fetching published weights: resumed where it stopped, checked before it is used.

A file arrives as ``NAME.part`` beside its place, and gets its name only after its SHA-256 was found right. The hash is
the registry's, the user's, or the one the publisher announces: Hugging Face answers the address of a large file with a
redirect that carries its SHA-256 in ``X-Linked-Etag`` and its size in ``X-Linked-Size``. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from lib_portrait import __version__
from lib_portrait.checkpoints.files import KnownWeight
from lib_portrait.checkpoints.hashes import BLOCK, file_sha256
from lib_portrait.checkpoints.registry import Registry
from lib_portrait.checkpoints.store import Store
from lib_portrait.errors import PortraitError

Progress = Callable[[int, int], None]
NamedProgress = Callable[[str, int, int], None]

TIMEOUT = 30.0
REDIRECTS = 5
# A download under way whose connection breaks is taken up again this often without a byte of progress between.
TRIES = 3
PAUSE = 1.0
# No published weight comes near it; a server that does not say how much it sends is stopped there.
LARGEST = 16 * 2**30
SPARE_DISK = 64 * 2**20

_busy: set[Path] = set()
_busy_lock = threading.Lock()


class _Interrupted(Exception):
    """The connection failed; what has arrived so far is kept."""


@dataclass(frozen=True)
class _Answer:
    """A server's last answer, after redirects, and what the publisher said of the file on the way.

    start: first byte it sends. total: size of the whole file in bytes, or None. sha256: as announced, or None.
    """

    stream: Any
    start: int
    total: int | None
    sha256: str | None


def fetch_known(
    name_or_group: str,
    folder: Path,
    registry: Registry,
    progress: NamedProgress | None = None,
    sha256: str | None = None,
    store: Store | None = None,
) -> list[Path]:
    """Fetch a published file, or all files of a group of the registry, into `folder`; returns the paths.

    progress: called with (file name, bytes done, bytes in all). sha256: for a single file, see `download`.
    store: files it finds elsewhere already (another extension's image encoder) are left where they are.
    Raises PortraitError: an unknown name (422), and as `download` does.
    """
    wanted = registry.select(name_or_group)
    if not wanted:
        choices = ", ".join(registry.choices())
        raise PortraitError(name_or_group[:200], "no published weight has this name", f"Use one of: {choices}.")
    if sha256 is not None and len(wanted) > 1:
        raise PortraitError("sha256", f"one hash cannot be that of {len(wanted)} files", "Name a single file.")
    paths = []
    for known in wanted:
        present = store.published(known.role, known) if store is not None else None
        if present is not None:
            paths.append(present)
            continue

        def report(done: int, total: int, name: str = known.filename) -> None:
            if progress is not None:
                progress(name, done, total)

        paths.append(download(known, folder, report, sha256))
    return paths


def download(
    known: KnownWeight,
    folder: Path,
    progress: Progress | None = None,
    sha256: str | None = None,
    timeout: float = TIMEOUT,
) -> Path:
    """Fetch one published file into `folder` and return its path; a file that is there already is checked and kept.

    progress: called with (bytes done, bytes in all, or 0 where that is not told).
    sha256: the hash of the file at `known.url`, for a file whose hash neither the registry nor its publisher tells.
    timeout: seconds without an answer or a byte.
    Raises PortraitError: 503 when the source cannot be reached (what arrived is kept for the next try), 502 when it
    answers something else than this file, 507 when the disk is too small, 409 when the file is being fetched already or
    another file has its name, 422 when there is no hash to check against.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise PortraitError("sha256", "it is no SHA-256", "Give 64 hexadecimal digits.")
    expected = sha256.lower() if sha256 else known.sha256
    if known.sha256 not in (None, expected):
        raise PortraitError("sha256", f"{known.filename} is known to have another one", "Leave the hash out.")
    target = Path(folder) / known.filename
    with _alone(known, target):
        try:
            if target.exists():
                return _kept(known, target, expected)
            target.parent.mkdir(parents=True, exist_ok=True)
            return _fetch(known, target, expected, progress or _silent, timeout)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            problem = f"it cannot be kept in {target.parent} ({reason})"
            raise PortraitError(known.filename, problem, "Make room there, or check the rights.", 507) from error


def _silent(done: int, total: int) -> None:
    pass


@contextlib.contextmanager
def _alone(known: KnownWeight, target: Path) -> Iterator[None]:
    """One download of a file at a time: two clicks must not write into one .part."""
    key = target.absolute()
    with _busy_lock:
        if key in _busy:
            raise PortraitError(known.filename, "it is being downloaded already", "Wait until that is done.", 409)
        _busy.add(key)
    try:
        yield
    finally:
        with _busy_lock:
            _busy.discard(key)


def _kept(known: KnownWeight, target: Path, expected: str | None) -> Path:
    """A file with the right name was there before; its content must be right where that can be told offline."""
    right = known.member.sha256 if known.member else expected
    if right is not None and file_sha256(target) != right:
        raise PortraitError(
            known.filename,
            f"another file of this name is in {target.parent}, not the one published at {known.url}",
            "Move it away, then download again.",
            409,
        )
    return target


def _fetch(known: KnownWeight, target: Path, expected: str | None, progress: Progress, timeout: float) -> Path:
    part = target.with_name(target.name + ".part")
    resumed = part.exists() and part.stat().st_size > 0
    reached = False
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            digest, right = _transfer(known, part, expected, progress, timeout)
        except _Interrupted as error:
            now = part.stat().st_size if part.exists() else 0
            reached = reached or now > before
            failures = 0 if now > before else failures + 1
            # Offline is told at once; only what was flowing is waited for.
            if not reached or failures >= TRIES:
                raise _unreachable(known, target, str(error), now) from error
            resumed = now > 0
            time.sleep(PAUSE * failures)
            continue
        if digest == right:
            break
        part.unlink()
        if not resumed:
            raise PortraitError(
                known.filename,
                f"what {known.url} sent has SHA-256 {digest}, not {right}",
                "Try again later; if it stays so, take the file from its publisher by hand and compare.",
                502,
            )
        # What an earlier try left may have been of another version of the file: once more, from the start.
        resumed = False
    if known.member is not None:
        _extract(known, part, target)
    else:
        part.replace(target)
    return target


def _transfer(
    known: KnownWeight, part: Path, expected: str | None, progress: Progress, timeout: float
) -> tuple[str, str]:
    """Bring `part` to its full size; (its SHA-256, the SHA-256 it should have). Raises _Interrupted, PortraitError."""
    have = part.stat().st_size if part.exists() else 0
    answer = _ask(known, have, timeout)
    with contextlib.closing(answer.stream):
        right = expected or answer.sha256
        if answer.sha256 not in (None, right):
            raise PortraitError(
                known.filename,
                f"{known.url} now has SHA-256 {answer.sha256} instead of {right}",
                "It is not the file this version knows; look for an update of this extension.",
                502,
            )
        if right is None:
            raise PortraitError(
                known.filename,
                f"neither this version nor {urlsplit(known.url).hostname} tells its SHA-256, so it cannot be checked",
                f"Give its SHA-256, or put the file from {known.url} into {part.parent} yourself.",
            )
        if known.size is not None and answer.total not in (None, known.size):
            raise PortraitError(
                known.filename,
                f"{known.url} now has {answer.total} bytes instead of {known.size}",
                "It is not the file this version knows; look for an update of this extension.",
                502,
            )
        total = known.size or answer.total or 0
        limit = total or LARGEST
        free = shutil.disk_usage(part.parent).free
        if free < total - answer.start + SPARE_DISK:
            raise PortraitError(
                known.filename,
                f"{part.parent} has {free // 2**20} MiB free, and {(total - answer.start) // 2**20} MiB are to come",
                "Make room there.",
                507,
            )
        sha = hashlib.sha256()
        with part.open("r+b" if answer.start else "wb") as out:
            while block := out.read(BLOCK) if out.tell() < answer.start else b"":
                sha.update(block)
            done = told = out.tell()
            progress(done, total)
            for block in _blocks(answer.stream):
                done += len(block)
                if done > limit:
                    raise _refused(known, f"it sends more than {limit} bytes")
                out.write(block)
                sha.update(block)
                if done - told >= BLOCK:
                    told = done
                    progress(done, total)
            progress(done, total)
            out.flush()
            os.fsync(out.fileno())
    if done < total:
        raise _Interrupted(f"the connection ended after {done} of {total} bytes")
    return sha.hexdigest(), right


def _blocks(stream: Any) -> Iterator[bytes]:
    while True:
        try:
            # What is there, not a full block: a block half received would be lost when the connection breaks.
            block = stream.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        if not block:
            return
        yield block


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves redirects to `_ask`, which must see the headers of each answer."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _ask(known: KnownWeight, have: int, timeout: float) -> _Answer:
    """Ask for the bytes from `have` on, following redirects, but never from https to anything else."""
    opener = urllib.request.build_opener(_NoRedirect)
    url = known.url
    announced: dict[str, str] = {}
    for _ in range(REDIRECTS + 1):
        if urlsplit(url).scheme not in ("https", "http"):
            raise _refused(known, f"it points to {url[:200]}")
        headers = {"User-Agent": f"portrait/{__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            stream = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            error.close()
            _listen(announced, error.headers, url, known.url)
            location = error.headers.get("Location")
            if error.code in (301, 302, 303, 307, 308) and location:
                onward = urljoin(url, location)
                if urlsplit(url).scheme == "https" and urlsplit(onward).scheme != "https":
                    raise _refused(known, "it redirects from https to an unprotected address") from None
                url = onward
                continue
            if error.code == 416 and have:
                if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                    # Everything had arrived before, and only was not checked yet.
                    return _Answer(io.BytesIO(), have, have, _announced_sha256(announced))
                # What lies here is longer than the file: from the start, without a Range.
                have = 0
                continue
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _Interrupted(f"the server answered {error.code}") from None
            raise _refused(known, f"it answered {error.code}") from None
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        _listen(announced, stream.headers, url, known.url)
        return _answer(known, stream, have, announced)
    raise _refused(known, f"it redirects more than {REDIRECTS} times")


def _listen(announced: dict[str, str], headers: Any, url: str, source: str) -> None:
    """Keep what the publisher itself says of the file; what a redirect's target says of itself proves nothing."""
    if urlsplit(url).netloc == urlsplit(source).netloc:
        for name in ("X-Linked-Etag", "X-Linked-Size"):
            if headers.get(name):
                announced[name] = headers[name]


def _answer(known: KnownWeight, stream: Any, have: int, announced: dict[str, str]) -> _Answer:
    start, sizes = 0, []
    if stream.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", stream.headers.get("Content-Range", "").strip())
        if match is None or int(match.group(1)) != have:
            stream.close()
            raise _refused(known, "it sends another part of the file than was asked for")
        start = have
        sizes.append(match.group(2))
    elif stream.status != 200:
        stream.close()
        raise _refused(known, f"it answered {stream.status}")
    else:
        sizes.append(stream.headers.get("Content-Length", ""))
    sizes.append(announced.get("X-Linked-Size", ""))
    told = [int(size) for size in sizes if size.isdecimal()]
    if len(set(told)) > 1:
        stream.close()
        raise _refused(known, f"it announces {told[1]} bytes and sends {told[0]}")
    return _Answer(stream, start, told[0] if told else None, _announced_sha256(announced))


def _announced_sha256(announced: dict[str, str]) -> str | None:
    """The hash in an X-Linked-Etag. That of a file outside LFS is a git hash of 40 digits, and no use here."""
    match = re.fullmatch(r'(?:W/)?"?([0-9a-fA-F]{64})"?', announced.get("X-Linked-Etag", "").strip())
    return match.group(1).lower() if match else None


def _extract(known: KnownWeight, archive: Path, target: Path) -> None:
    """Take the one wanted file out of a verified zip archive, check it too, and drop the archive."""
    member = known.member
    assert member is not None
    new = target.with_name(target.name + ".new")
    sha = hashlib.sha256()
    try:
        with zipfile.ZipFile(archive) as packed:
            info = next(item for item in packed.infolist() if item.filename.rpartition("/")[2] == member.filename)
            if info.file_size != member.size:
                raise ValueError(f"{member.filename} has {info.file_size} bytes there instead of {member.size}")
            with packed.open(info) as stream, new.open("wb") as out:
                while block := stream.read(BLOCK):
                    sha.update(block)
                    out.write(block)
        if sha.hexdigest() != member.sha256:
            raise ValueError(f"{member.filename} has SHA-256 {sha.hexdigest()} there instead of {member.sha256}")
        new.replace(target)
        archive.unlink()
    except (zipfile.BadZipFile, StopIteration, ValueError) as error:
        problem = f"the archive from {known.url} does not hold it ({error or 'no such file in it'})"
        raise PortraitError(known.filename, problem, "Take the file from its publisher by hand.", 502) from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error
    return str(inner)[:200] or type(inner).__name__


def _unreachable(known: KnownWeight, target: Path, reason: str, done: int) -> PortraitError:
    there = f"{known.member.filename} out of {known.url}" if known.member else known.url
    kept = f" {done // 2**20} MiB are kept, the next try goes on from there." if done else ""
    return PortraitError(
        known.filename,
        f"its source cannot be reached ({reason})",
        f"Check the connection and try again, or get {there} elsewhere and put it into {target.parent} under the name "
        f"{known.filename}.{kept}",
        503,
    )


def _refused(known: KnownWeight, why: str) -> PortraitError:
    return PortraitError(
        known.filename, f"{known.url} does not give it: {why}", "Try again later, or get the file by hand.", 502
    )
