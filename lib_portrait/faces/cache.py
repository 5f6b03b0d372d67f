"""What is kept between requests: uploaded photos by hash, and the features of faces."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Generic, TypeVar

import safetensors.torch
from safetensors import SafetensorError

from lib_portrait.faces.features import FaceFeatures

log = logging.getLogger(__name__)

_HASH = re.compile(r"[0-9a-f]{64}")
_ABANDONED_SECONDS = 3600

Value = TypeVar("Value")


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big")


class Recent(Generic[Value]):
    """The `size` values used last, by key."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


class Folder:
    """Files named by 64 hex digits in one folder, `max_bytes` in all; the least recently used go first.

    A file is whole or absent: it is written beside its place and moved there. Other files in the folder are never
    touched. A folder that cannot be written to is a warning in the log, not an error: it is only a cache.
    """

    def __init__(self, path: Path, suffix: str, max_bytes: int):
        self._path = Path(path)
        self._suffix = suffix
        self._max_bytes = max_bytes

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None where it is missing or `name` is no hash. Counts as a use."""
        if not _HASH.fullmatch(name):
            return None
        try:
            data = self._file(name).read_bytes()
        except OSError:
            return None
        self.touch(name)
        return data

    def write(self, name: str, data: bytes) -> None:
        """Keeps `data` under `name` (64 hex digits) and lets go of what no longer fits."""
        if not _HASH.fullmatch(name):
            raise ValueError(f"{name!r} is no hash")
        if len(data) > self._max_bytes:
            return
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(suffix=".part", dir=self._path)
            try:
                with open(handle, "wb") as file:
                    file.write(data)
                os.replace(beside, self._file(name))
            except BaseException:
                os.unlink(beside)
                raise
            self._trim()
        except OSError as error:
            log.warning("Portrait: the cache folder cannot be written to: %s", error)

    def touch(self, name: str) -> bool:
        """Marks the file as used now. False where there is none."""
        if not _HASH.fullmatch(name):
            return False
        try:
            os.utime(self._file(name))
        except OSError:
            return False
        return True

    def names(self) -> list[str]:
        """The names of all files that are this cache's."""
        return [file.name.removesuffix(self._suffix) for _, _, file in self._files()]

    def discard(self, name: str) -> None:
        if _HASH.fullmatch(name):
            self._remove(self._file(name))

    def clear(self) -> None:
        for _, _, file in self._files():
            self._remove(file)

    def _file(self, name: str) -> Path:
        return self._path / f"{name}{self._suffix}"

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of every file that is this cache's, the longest unused first."""
        found = []
        try:
            entries = list(os.scandir(self._path))
        except OSError:
            return []
        for entry in entries:
            stem = entry.name.removesuffix(self._suffix)
            own = _HASH.fullmatch(stem) and entry.name == f"{stem}{self._suffix}"
            try:
                facts = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if own:
                found.append((facts.st_mtime, facts.st_size, Path(entry.path)))
            elif entry.name.endswith(".part") and facts.st_mtime < time.time() - _ABANDONED_SECONDS:
                self._remove(Path(entry.path))
        return sorted(found)

    def _trim(self) -> None:
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, file in files:
            if total <= self._max_bytes:
                return
            self._remove(file)
            total -= size

    @staticmethod
    def _remove(file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("Portrait: a cached file cannot be removed: %s", error)


class PhotoCache:
    """Uploaded photos, byte for byte, by the sha256 of their bytes: an infotext refers to them by it."""

    def __init__(self, path: Path, max_bytes: int = 2**30):
        self._folder = Folder(path, "", max_bytes)

    def put(self, data: bytes) -> str:
        """Keeps the photo; its sha256 in hexadecimal."""
        name = hashlib.sha256(data).hexdigest()
        self._folder.write(name, data)
        return name

    def get(self, name: str) -> bytes | None:
        """The photo of that sha256, or None. What no longer has its hash is thrown away, not returned."""
        data = self._folder.read(name)
        if data is not None and hashlib.sha256(data).hexdigest() != name:
            self._folder.discard(name)
            return None
        return data

    def beginning(self, digits: str) -> list[str]:
        """The sha256 of every photo kept whose sha256 begins with these digits."""
        return [name for name in self._folder.names() if name.startswith(digits)]

    def touch(self, name: str) -> bool:
        """Marks the photo as used now. False where it is not kept."""
        return self._folder.touch(name)

    def clear(self) -> None:
        self._folder.clear()


class FeatureCache:
    """Features of faces by key, the latest in memory and more on disk: CRC-32 of the rest, then safetensors."""

    def __init__(self, path: Path, max_bytes: int = 2**29, recent: int = 128):
        self._folder = Folder(path, ".features", max_bytes)
        self._recent: Recent[FaceFeatures] = Recent(recent)

    @staticmethod
    def key(*parts: object) -> str:
        """A key from everything that decides the features: photo, choice of face, detector, weights."""
        # With their names: releases before this one may have kept others.
        return hashlib.sha256("\n".join(map(str, (*FaceFeatures.__dataclass_fields__, *parts))).encode()).hexdigest()

    def get(self, key: str) -> FaceFeatures | None:
        features = self._recent.get(key)
        if features is not None:
            self._folder.touch(key)
            return features
        data = self._folder.read(key)
        if data is None:
            return None
        try:
            body = data[4:]
            if _checksum(body) != data[:4]:
                raise ValueError("the checksum differs")
            tensors = safetensors.torch.load(body)
            features = FaceFeatures(**{name: tensors[name] for name in FaceFeatures.__dataclass_fields__})
        except (ValueError, KeyError, SafetensorError) as error:
            log.warning("Portrait: a cached face is damaged and computed anew: %s", error)
            self._folder.discard(key)
            return None
        self._recent.put(key, features)
        return features

    def put(self, key: str, features: FaceFeatures) -> None:
        self._recent.put(key, features)
        tensors = {name: tensor.contiguous() for name, tensor in vars(features).items()}
        data = safetensors.torch.save(tensors)
        self._folder.write(key, _checksum(data) + data)

    def clear(self) -> None:
        self._recent.clear()
        self._folder.clear()
