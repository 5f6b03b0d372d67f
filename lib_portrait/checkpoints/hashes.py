"""SHA-256 of files, remembered, so that gigabytes of weights are read for it once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path

CACHE_FILE = "file-hashes.json"
CACHE_ENTRIES = 256
BLOCK = 1 << 20

_lock = threading.Lock()
_memory: dict[str, str] = {}


def file_sha256(path: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of the file's bytes as 64 hex digits.

    Remembered by (real path, size, modification time): in memory, and with `cache_dir` in a small JSON file there.
    A cache that cannot be read or written only costs time. Raises OSError when the file itself cannot be read.
    """
    real = path.resolve(strict=True)
    stat = real.stat()
    # Not the path itself: an evaluation's results, which people hand on, hold such a file.
    key = hashlib.blake2b(os.fsencode(f"{real}|{stat.st_size}|{stat.st_mtime_ns}"), digest_size=16).hexdigest()
    with _lock:
        digest = _memory.get(key)
        if digest is None and cache_dir is not None:
            digest = _load(cache_dir).get(key)
    if digest is None:
        sha = hashlib.sha256()
        with real.open("rb") as stream:
            while block := stream.read(BLOCK):
                sha.update(block)
        digest = sha.hexdigest()
    with _lock:
        _memory[key] = digest
        if cache_dir is not None:
            _remember(cache_dir, key, digest)
    return digest


def _load(cache_dir: Path) -> dict[str, str]:
    try:
        stored = json.loads((cache_dir / CACHE_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {k: v for k, v in stored.items() if isinstance(v, str) and len(v) == 64}


def _remember(cache_dir: Path, key: str, digest: str) -> None:
    stored = _load(cache_dir)
    if stored.get(key) == digest:
        return
    stored[key] = digest
    newest = dict(list(stored.items())[-CACHE_ENTRIES:])
    part = cache_dir / f"{CACHE_FILE}.{os.getpid()}.part"
    with contextlib.suppress(OSError):
        cache_dir.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(newest, indent=0), "utf-8")
        part.replace(cache_dir / CACHE_FILE)
