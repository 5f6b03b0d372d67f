"""Shards made of the world, and what is wrong with the shards there are.

Each shard is made by one process, for nothing is passed on among its samples; the same settings give the same bytes. A
shard that is there whole is kept: a command that was broken off goes on with those missing.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lib_portrait.errors import PortraitError
from trainer.engines import ordered_map
from trainer.shards import EncodedSample, FaceRecord, Record, Shards, encode_png, pose_to_json, writing
from trainer.world import render, sample_scene, world_person
from trainer.world.people import HELD_OUT_EVERY
from trainer.world.scenes import COUNT_ODDS
from trainer.world.situations import pick

WORLD_KINDS = ("png", "bmp")


# -------------------------------------------------------------------------------------------------------------- world


@dataclass(frozen=True)
class WorldSettings:
    """Scenes `first` to `first + number - 1` of the world, `size` pixels a side, `shard` of them to a shard.

    identities: how many people of the population's training part appear. poses: whether the records have everybody's
    pose, which other shards leave out. kind: of their files, png, or bmp, which is twice as large and read in no time.
    """

    first: int
    number: int
    identities: int = 6000
    size: int = 128
    shard: int = 1000
    poses: bool = False
    kind: str = "png"

    def __post_init__(self) -> None:
        if self.kind not in WORLD_KINDS:
            raise PortraitError("kind", f"{self.kind!r} was given", f"Give one of: {', '.join(WORLD_KINDS)}.")
        for name, least in (("first", 0), ("number", 1), ("identities", len(COUNT_ODDS)), ("shard", 1)):
            if getattr(self, name) < least:
                raise PortraitError(name, f"{getattr(self, name)} was given", f"Give {least} or more.")
        if self.first % self.shard:
            raise PortraitError(
                "first", f"{self.first} is no multiple of {self.shard}, the size of a shard", "Begin at a whole shard."
            )


def training_person(k: int) -> int:
    """The number in the population of the k-th person of its training part (see `trainer.world.held_out`)."""
    return k + k // (HELD_OUT_EVERY - 1)


def world_sample(seed: int, identities: int, size: int, poses: bool = False, kind: str = "png") -> EncodedSample:
    """Scene `seed` with people drawn from the first `identities` of the training part. A pure function.

    poses: whether the record has "poses", in the order of its faces 18 points [x, y] each, null where one is not seen.
    kind: of the picture's file.
    """
    rng = np.random.default_rng([seed, 0xDA7A])
    count = pick(rng, range(1, len(COUNT_ODDS) + 1), COUNT_ODDS)
    chosen = rng.choice(identities, count, replace=False)
    scene = sample_scene(seed, [world_person(training_person(int(k))) for k in chosen])
    picture = render(scene, size)
    labels = np.zeros(picture.image.shape[:2], np.uint8)
    faces = []
    for number, (face, placement) in enumerate(zip(picture.faces, scene.people)):
        labels[face.mask] = number + 1
        box = tuple(round(float(value), 2) for value in face.box)
        landmarks = tuple((round(float(x), 2), round(float(y), 2)) for x, y in face.landmarks)
        faces.append(FaceRecord(str(face.id), placement.person.word, box, landmarks))
    stated = picture.attributes
    attributes = {
        "style": stated.style,
        "background": stated.background,
        "people": stated.people,
        "faces": {str(number): words for number, words in stated.faces.items()},
    }
    extra: dict[str, Any] = {"attributes": attributes, "world": {"seed": seed}}
    if poses:
        extra["poses"] = [pose_to_json(face.pose) for face in picture.faces]
    record = Record(picture.caption, tuple(faces), extra)
    return EncodedSample(f"{seed:08d}", _encoded(picture.image, kind), kind, record, labels)


def _encoded(image: NDArray[np.uint8], kind: str) -> bytes:
    return encode_png(image) if kind == "png" else cv2.imencode(f".{kind}", image[:, :, ::-1])[1].tobytes()


def make_world(output: Path, settings: WorldSettings, name: str = "world", processes: int = 1) -> int:
    """Writes the shards NAME-NNNNN.tar that are not there yet, NNNNN being first seed / shard. Returns how many.

    Raises PortraitError for a shard that is there and holds something else.
    """
    output.mkdir(parents=True, exist_ok=True)
    missing = []
    for start in range(settings.first, settings.first + settings.number, settings.shard):
        seeds = range(start, min(start + settings.shard, settings.first + settings.number))
        path = output / f"{name}-{start // settings.shard:05d}.tar"
        if path.exists():
            _same_world(path, seeds, settings)
        else:
            missing.append((path, seeds))
    write = functools.partial(_write_world_shard, settings=settings)
    with tqdm(total=sum(len(seeds) for _, seeds in missing), unit="picture", mininterval=1) as bar:
        for number in ordered_map(write, missing, min(processes, max(len(missing), 1))):
            bar.update(number)
    return len(missing)


def _sample(seed: int, settings: WorldSettings) -> EncodedSample:
    return world_sample(seed, settings.identities, settings.size, settings.poses, settings.kind)


def _write_world_shard(job: tuple[Path, range], settings: WorldSettings) -> int:
    """Writes the shard of scenes with these seeds; returns how many."""
    path, seeds = job
    with writing(path) as shard:
        for seed in seeds:
            _sample(seed, settings).add_to(shard)
    return len(seeds)


def _same_world(path: Path, seeds: range, settings: WorldSettings) -> None:
    there = Shards([path])
    expected = _sample(seeds[0], settings)
    same = [there.key(index) for index in range(len(there))] == [f"{seed:08d}" for seed in seeds]
    if same:
        sample = there[0]
        same = (
            _encoded(sample.image, settings.kind) == expected.picture
            and sample.record.to_json() == expected.record.to_json()
        )
    if not same:
        raise PortraitError(
            "output",
            f"{path.name} is there but holds other samples than scenes {seeds[0]} to {seeds[-1]} of these settings",
            "Give the settings it was made with, or another --output or --name.",
        )


# -------------------------------------------------------------------------------------------------------------- check


@dataclass
class Report:
    """What shards hold. Every number counts samples but where it says otherwise.

    unusable: by reason, what training passes over. doubtful: by reason, what it takes but a person may want to see.
    list: a line for each of both. identities: faces of each labelled person. people: by number of faces.
    digests: of pictures, with the key and the person of each.
    """

    shards: int = 0
    samples: int = 0
    faces: int = 0
    unlabelled: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    doubtful: Counter[str] = field(default_factory=Counter)
    identities: Counter[str] = field(default_factory=Counter)
    people: Counter[int] = field(default_factory=Counter)
    list: list[str] = field(default_factory=list)
    digests: dict[bytes, tuple[str, frozenset[str]]] = field(default_factory=dict)

    def found(self, where: Counter[str], reason: str, place: str, detail: str = "") -> None:
        where[reason] += 1
        self.list.append(f"{reason}: {place} {detail}".rstrip())

    def digest(self, digest: bytes, place: str, people: frozenset[str]) -> None:
        """Notes a picture, and whether it was there before."""
        if digest in self.digests:
            first, before = self.digests[digest]
            reason = "same picture twice" if before == people else "same picture under different people"
            self.found(self.doubtful, reason, place, f"as {first}")
        else:
            self.digests[digest] = (place, people)

    def add(self, other: Report) -> None:
        self.shards += other.shards
        self.samples += other.samples
        self.faces += other.faces
        self.unlabelled += other.unlabelled
        self.unusable += other.unusable
        self.doubtful += other.doubtful
        self.identities += other.identities
        self.people += other.people
        self.list += other.list
        for digest, (place, people) in other.digests.items():
            self.digest(digest, place, people)


def check_shard(path: Path) -> Report:
    """What one shard holds."""
    report = Report(shards=1)
    try:
        shards = Shards([path])
    except PortraitError as error:
        report.found(report.unusable, "shard that is no tar file", path.name, error.problem)
        return report
    first: tuple[int, ...] = ()
    for index in range(len(shards)):
        place = f"{path.name} {shards.key(index)}"
        report.samples += 1
        try:
            sample = shards[index]
        except ValueError as error:
            report.found(report.unusable, f"unusable {_faulty_part(shards, index)}", place, str(error))
            continue
        record, (height, width) = sample.record, sample.image.shape[:2]
        first = first or (height, width)
        if (height, width) != first:
            # Latents of a shard are one tensor.
            what = f"{width}x{height}, not {first[1]}x{first[0]}"
            report.found(report.unusable, "picture of another size than the shard's first", place, what)
            continue
        report.people[len(record.faces)] += 1
        report.faces += len(record.faces)
        known = frozenset(face.id for face in record.faces if face.id is not None)
        report.identities.update(known)
        report.unlabelled += len(record.faces) - len(known)
        report.digest(hashlib.sha256(sample.image.tobytes()).digest()[:16], place, known)
        if not record.faces:
            report.found(report.doubtful, "no face", place)
        if not record.caption.strip():
            report.found(report.doubtful, "empty caption", place)
        for face in record.faces:
            x0, y0, x1, y1 = face.box
            if x0 < -1 or y0 < -1 or x1 > width + 1 or y1 > height + 1:
                report.found(report.doubtful, "face outside the picture", place, str(face.box))
    return report


def _faulty_part(shards: Shards, index: int) -> str:
    for name, read in (("record", shards.record), ("picture", shards.picture)):
        try:
            read(index)
        except ValueError:
            return name
    return "mask"


def check_shards(data: Path, processes: int = 1) -> Report:
    """What a shard or the shards of a folder hold, and which of their samples cannot be used.

    Raises PortraitError when there are none.
    """
    paths = [data] if data.is_file() else sorted(data.glob("*.tar"))
    if not paths:
        raise PortraitError("data", f"{data} holds no shards", "Make some with: python portrait.py dataset --help")
    report = Report()
    for one in tqdm(ordered_map(check_shard, paths, processes), total=len(paths), unit="shard"):
        report.add(one)
    for name, faces in sorted(report.identities.items()):
        if faces == 1:
            report.found(report.doubtful, "person with one face only", name)
    return report
