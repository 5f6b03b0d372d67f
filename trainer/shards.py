"""WebDataset shards: tar files of pictures, each with a JSON of its faces, and random access to their samples.

A sample KEY is KEY.png (or .jpg, .webp, .bmp), KEY.json and, where masks are known, KEY.mask.png. The webdataset
package streams such files; training reads them by index instead, because only then is the order of an interrupted run
something one can return to.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lib_portrait.errors import PortraitError

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp")
MASK = "mask.png"
RECORD = "json"


@dataclass(frozen=True)
class FaceRecord:
    """One face of a picture: box (4) x0, y0, x1, y1 and landmarks (5, 2) in pixels.

    id: who it is, or None where that is not known. word: "woman", "man" or None.
    """

    id: str | None
    word: str | None
    box: tuple[float, ...]
    landmarks: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Record:
    """What is known about a picture. `extra` holds the JSON's other entries."""

    caption: str
    faces: tuple[FaceRecord, ...]
    extra: dict[str, Any]

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """Raises ValueError, saying what is wrong, for a record that is not one."""
        try:
            data = json.loads(text)
            caption, faces = data.pop("caption"), data.pop("faces")
            if not isinstance(caption, str):
                raise ValueError("the caption is not text")
            record = Record(caption, tuple(_face(face) for face in faces), data)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"no record of faces: {error!r}") from None
        known = [face.id for face in record.faces if face.id is not None]
        if len(set(known)) < len(known):
            raise ValueError("two faces of one picture have the same id")
        return record

    def to_json(self) -> str:
        faces = [{"id": f.id, "word": f.word, "box": list(f.box), "landmarks": list(f.landmarks)} for f in self.faces]
        return json.dumps({"caption": self.caption, "faces": faces, **self.extra})


def _face(data: dict[str, Any]) -> FaceRecord:
    box = tuple(_number(value) for value in data["box"])
    landmarks = tuple((_number(x), _number(y)) for x, y in data["landmarks"])
    name, word = data.get("id"), data.get("word")
    if len(box) != 4 or len(landmarks) != 5 or not np.isfinite([*box, *np.ravel(landmarks)]).all():
        raise ValueError("a face needs a box of 4 and landmarks of 5 x 2 finite numbers")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"the box {box} of a face is empty")
    if len(set(landmarks)) == 1:
        raise ValueError("the landmarks of a face all coincide")
    if not isinstance(name, str | None) or word not in ("woman", "man", None):
        raise ValueError(f"a face's id is text and its word woman or man, not {name!r:.50} and {word!r:.50}")
    return FaceRecord(name, word, box, landmarks)


def pose_to_json(points: NDArray[np.floating]) -> list[list[float] | None]:
    """A pose (n, 2) in pixels as a record has it: null for points that are not seen, which are NaN."""
    return [None if np.isnan(point).any() else [round(float(value), 2) for value in point] for point in points]


def poses_of(record: Record, points: int = 18) -> list[NDArray[np.float32]]:
    """The poses (points, 2) that a record holds, NaN for what is not seen: of everybody in the picture.

    Raises ValueError for a record without, or with what are none.
    """
    try:
        poses = [
            np.array([[np.nan, np.nan] if one is None else [_number(value) for value in one] for one in pose])
            for pose in record.extra["poses"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record of poses: {error!r}") from None
    if any(pose.shape != (points, 2) for pose in poses):
        raise ValueError(f"a pose has {points} points of 2 numbers each, or null")
    return [pose.astype(np.float32) for pose in poses]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r:.50} stands where a number should")
    return float(value)


@dataclass(frozen=True)
class ShardSample:
    """A picture (H, W, 3) uint8 RGB, its labels (H, W) uint8 (0 nobody, i + 1 face i) or None, and its record."""

    key: str
    image: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None
    record: Record


class ShardWriter:
    """Writes the samples of one shard; use `writing`."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar

    def add(self, key: str, picture: bytes, suffix: str, record: Record, labels: NDArray[np.uint8] | None) -> None:
        """picture: an encoded picture of the kind `suffix` says."""
        self._put(f"{key}.{suffix}", picture)
        if labels is not None:
            self._put(f"{key}.{MASK}", cv2.imencode(".png", labels)[1].tobytes())
        self._put(f"{key}.{RECORD}", record.to_json().encode())

    def _put(self, name: str, data: bytes) -> None:
        # Nothing but name and size, so that equal samples make equal files.
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class EncodedSample:
    """A sample with its picture encoded, as `ShardWriter.add` takes it."""

    key: str
    picture: bytes
    suffix: str
    record: Record
    labels: NDArray[np.uint8] | None = None

    def add_to(self, shard: ShardWriter) -> None:
        shard.add(self.key, self.picture, self.suffix, self.record, self.labels)


@contextmanager
def writing(path: Path) -> Iterator[ShardWriter]:
    """A shard that appears under its name only when it is whole."""
    part = path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        yield ShardWriter(tar)
    os.replace(part, path)


def encode_png(image: NDArray[np.uint8], effort: int = 1) -> bytes:
    """RGB (H, W, 3) as PNG. effort: 1 (quick) to 9 (small)."""
    return cv2.imencode(".png", image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, effort])[1].tobytes()


@dataclass(frozen=True)
class _Entry:
    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class Shards:
    """The samples of shards, by number. Processes may share one object: files are opened at each read."""

    def __init__(self, paths: Sequence[Path]):
        """Raises PortraitError for no shards, or one that is no tar file."""
        self.paths = sorted(Path(path) for path in paths)
        if not self.paths:
            raise PortraitError("data", "there are no shards", "Make some with: python portrait.py dataset --help")
        self._entries: list[_Entry] = []
        self.starts: list[int] = []
        for path in self.paths:
            self.starts.append(len(self._entries))
            self._entries += _index(path)

    @staticmethod
    def under(place: Path) -> Shards:
        """A shard, or all shards of a folder. Raises PortraitError when there is none."""
        return Shards([place] if place.is_file() else sorted(place.glob("*.tar")))

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        return self._entries[index].key

    def record(self, index: int) -> Record:
        """Raises ValueError for a sample that has no readable record."""
        return Record.from_json(self._read(self._entries[index], RECORD))

    def picture(self, index: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB. Raises ValueError for a picture that cannot be decoded."""
        entry = self._entries[index]
        for suffix in PICTURES:
            if suffix in entry.members:
                return _decode(self._read(entry, suffix), cv2.IMREAD_COLOR)[:, :, ::-1]
        raise ValueError(f"{entry.key} has no picture ({', '.join(PICTURES)})")

    def labels(self, index: int) -> NDArray[np.uint8] | None:
        """(H, W) uint8: 0 nobody, i + 1 the visible pixels of face i; None without a mask."""
        entry = self._entries[index]
        return _decode(self._read(entry, MASK), cv2.IMREAD_GRAYSCALE) if MASK in entry.members else None

    def __getitem__(self, index: int) -> ShardSample:
        """Raises ValueError for a sample that cannot be used."""
        picture, labels, record = self.picture(index), self.labels(index), self.record(index)
        if labels is not None and labels.shape != picture.shape[:2]:
            raise ValueError(f"the mask is {labels.shape[1]}x{labels.shape[0]} pixels, unlike the picture")
        if labels is not None and labels.max(initial=0) > len(record.faces):
            raise ValueError(f"the mask shows face {labels.max()} of {len(record.faces)}")
        return ShardSample(self.key(index), picture, labels, record)

    def _read(self, entry: _Entry, suffix: str) -> bytes:
        if suffix not in entry.members:
            raise ValueError(f"{entry.key} has no {suffix}")
        offset, size = entry.members[suffix]
        try:
            with entry.shard.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise ValueError(f"{entry.key} cannot be read: {error}") from None


def _decode(data: bytes, how: int) -> NDArray[np.uint8]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), how) if data else None
    except cv2.error:  # more pixels than OpenCV takes
        image = None
    if image is None:
        raise ValueError("the picture cannot be decoded")
    return np.asarray(image, np.uint8)


def _index(path: Path) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    key = f"{folder}/{key}" if folder else key
                    entry = entries.setdefault(key, _Entry(path, key, {}))
                    entry.members[suffix.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise PortraitError(
            "data", f"{path.name} is no shard ({error})", "Make it again: portrait.py dataset."
        ) from None
    return list(entries.values())
