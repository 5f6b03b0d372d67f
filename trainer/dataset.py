"""Shards made of photographs or of the world, and what is wrong with the shards there are.

Samples of photographs are made by several processes and written by one, in order; shards of the world by a process
each, for nothing is passed on among its samples. Either way the same input gives the same bytes. A shard that is there
whole is kept: a command that was broken off goes on with those missing.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import RULES, Detector, Face, detect_in_photo, get_detector, turned
from lib_portrait.faces.images import decode_photo
from lib_portrait.faces.order import TURNS
from lib_portrait.picture_files import SUFFIXES, is_picture
from lib_portrait.request import Limits
from trainer.shards import FaceRecord, Record, Shards, ShardWriter, encode_png, pose_to_json, writing
from trainer.world import render, sample_scene, world_person
from trainer.world.people import HELD_OUT_EVERY
from trainer.world.scenes import COUNT_ODDS
from trainer.world.situations import pick

MODELS = Path(__file__).resolve().parents[1] / "models"
Job = TypeVar("Job")
Result = TypeVar("Result")
WORLD_KINDS = ("png", "bmp")
# How many results of a process may wait for the writer.
PENDING_PER_PROCESS = 8


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


def ordered_map(function: Callable[[Job], Result], jobs: Iterable[Job], processes: int) -> Iterator[Result]:
    """The function's results in the order of the jobs, computed by that many processes."""
    if processes == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(function, job))
                if len(pending) == PENDING_PER_PROCESS * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """The processes share the cores already. OpenMP reads its variable when torch is imported, which comes later."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)


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


# ------------------------------------------------------------------------------------------------------------- photos


@dataclass(frozen=True)
class PhotoSettings:
    """How photographs become samples.

    size: side of the written pictures in pixels: the short side is brought to it, then a square is cut out that keeps
    the faces. caption: where no PHOTO.txt stands beside a photo; {word} becomes "woman", "man", "person" or, for
    several faces, "group of people". smallest_face: width in the written picture, in pixels, of a face that counts.
    identities: whether sub-folders name people. detector: its name, or None for the best there is.
    """

    size: int = 512
    caption: str = "a photo of a {word}"
    kind: str = "jpg"
    quality: int = 95
    smallest_face: int = 48
    most_faces: int = 8
    identities: bool = True
    detector: str | None = None
    shard: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in QUALITY:
            raise PortraitError("kind", f"{self.kind!r} was given", f"Give one of: {', '.join(QUALITY)}.")
        if not 1 <= self.quality <= 100:
            raise PortraitError("quality", f"{self.quality} was given", "Give 1 to 100.")
        for name, least in (("size", 64), ("smallest_face", 1), ("most_faces", 1), ("shard", 1)):
            if getattr(self, name) < least:
                raise PortraitError(name, f"{getattr(self, name)} was given", f"Give {least} or more.")


@dataclass(frozen=True)
class Skipped:
    """A photo that makes no sample. reason: one of few, to be counted; detail: what exactly, or nothing."""

    photo: str
    reason: str
    detail: str = ""


QUALITY: dict[str, int | None] = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY, "png": None}
WORDS = {"woman": "woman", "women": "woman", "man": "man", "men": "man"}
# A face counts when at least this share of its box, and all its landmarks, lie in the picture.
LEAST_VISIBLE = 0.75
# Of two faces of much the same size it is not known which one the folder is named after: the largest gets the name only
# where every other has at most this share of its area.
MOST_BESIDE = 0.25
# Room for hair and chin that a cut leaves on both sides of a face where it can, over the width of its box.
MARGIN = 0.3


def find_photos(folder: Path) -> list[str]:
    """The picture files below a folder, at any depth, as sorted names relative to it, with / between their parts."""
    found = []
    for place, _, names in os.walk(folder):
        found += [(Path(place) / name) for name in names if is_picture(name)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def label_of(photo: str) -> tuple[str | None, str | None]:
    """Who a photo shows and the word for them, by its folders: alice/1.jpg, woman/alice/1.jpg, alice/2019/1.jpg.

    The first folder names the person; one called woman or man (women, men) is their word instead.
    """
    folders = photo.split("/")[:-1]
    word = next((WORDS[folder.lower()] for folder in folders if folder.lower() in WORDS), None)
    return next((folder for folder in folders if folder.lower() not in WORDS), None), word


def photo_sample(job: tuple[int, str], folder: Path, settings: PhotoSettings) -> EncodedSample | Skipped:
    """The sample of a photo, or why there is none. job: the photo's number, which becomes the key, and its name."""
    number, name = job
    limits = Limits()
    try:
        with (folder / name).open("rb") as file:
            image, notices = decode_photo(file.read(limits.photo_bytes + 1), name, limits)
    except (OSError, PortraitError) as error:
        return Skipped(name, "unreadable picture", error.problem if isinstance(error, PortraitError) else str(error))
    height, width = image.shape[:2]
    if min(height, width) < settings.size:
        return Skipped(name, f"picture smaller than {settings.size} pixels", f"{width}x{height}")
    try:
        turn, found = detect_in_photo(image, _detector(settings.detector))
    except PortraitError:
        raise  # there is no detector
    except Exception as error:  # detectors answer odd pictures with exceptions of many packages
        return Skipped(name, "face detector failed", f"{type(error).__name__}: {str(error)[:200]}")
    if not found:
        return Skipped(name, "no face")
    if len(found) > settings.most_faces:
        return Skipped(name, f"more than {settings.most_faces} faces", str(len(found)))
    try:
        caption = _caption_beside(folder / name)
    except (OSError, ValueError) as error:
        return Skipped(name, "unreadable caption", str(error))
    if turn:
        image, notices = turned(image, turn), (*notices, f"it was turned {TURNS[turn]}")
    found.sort(key=lambda face: -face.area)
    picture, shown = square_crop(image, found, settings.size)
    who, word = label_of(name) if settings.identities else (None, None)
    if len(found) > 1 and found[1].area > MOST_BESIDE * found[0].area:
        who = word = None
    faces = [
        FaceRecord(who if place == 0 else None, word if place == 0 else None, _rounded(face.box), _points(face))
        for place, face in enumerate(shown)
        if face is not None and face.box[2] - face.box[0] >= settings.smallest_face
    ]
    if not faces:
        return Skipped(name, f"all faces smaller than {settings.smallest_face} pixels or cut off")
    if caption is None:
        subject = "group of people" if len(faces) > 1 else word or "person"
        caption = settings.caption.replace("{word}", subject)
    quality = QUALITY[settings.kind]
    options = [] if quality is None else [quality, settings.quality]
    encoded = cv2.imencode(f".{settings.kind}", picture[:, :, ::-1], options)[1].tobytes()
    extra = {"photo": name, **({"notices": list(notices)} if notices else {})}
    return EncodedSample(f"{number:08d}", encoded, settings.kind, Record(caption, tuple(faces), extra))


@functools.cache
def _detector(name: str | None) -> Detector:
    return get_detector(name, [MODELS])


def _caption_beside(photo: Path) -> str | None:
    """The words of PHOTO.txt on one line, or None. Raises OSError, ValueError for a file that is no text."""
    file = _caption_file(photo)
    if not file.is_file():
        return None
    text = " ".join(_decoded(file).split())
    if not text:
        raise ValueError(f"{file.name} is empty")
    return text


def _decoded(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 as its mark tells; without the mark. Raises OSError, ValueError."""
    data = file.read_bytes()
    coding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(coding)
    except UnicodeDecodeError:
        raise ValueError(f"{file.name} is no text in UTF-8; save it as that") from None


def _caption_file(photo: Path) -> Path:
    return photo.with_suffix(".txt")


def square_crop(
    image: NDArray[np.uint8], faces: Sequence[Face], size: int
) -> tuple[NDArray[np.uint8], list[Face | None]]:
    """The picture with its short side brought to `size` and cut square, and the faces in its pixels.

    The cut is the middle one of those that keep all faces; where none does, later faces give way to earlier ones. A
    face that the cut leaves out, or cuts through, is None.
    """
    height, width = image.shape[:2]
    factor = size / min(height, width)
    wide, high = max(size, round(width * factor)), max(size, round(height * factor))
    scale = np.array([wide / width, high / height])
    boxes = [_scaled(face.box.reshape(2, 2), scale).clip(0, [wide, high]) for face in faces]
    corner = np.array(
        [_crop_start(extent, size, [box[:, axis] for box in boxes]) for axis, extent in enumerate((wide, high))]
    )
    left, top = corner.tolist()
    resized = cv2.resize(image, (wide, high), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    moved: list[Face | None] = []
    for face, box in zip(faces, boxes):
        inside = (box - corner).clip(0, size)
        landmarks = _scaled(face.landmarks, scale) - corner
        whole = np.prod(np.ptp(inside, axis=0)) >= LEAST_VISIBLE * np.prod(np.ptp(box, axis=0)) > 0
        if whole and (landmarks >= 0).all() and (landmarks < size).all():
            moved.append(Face(inside.reshape(4).astype(np.float32), landmarks.astype(np.float32), face.score))
        else:
            moved.append(None)
    return np.ascontiguousarray(resized[top : top + size, left : left + size]), moved


def _scaled(points: NDArray[Any], scale: NDArray[Any]) -> NDArray[np.float64]:
    """Points (n, 2) of a picture in the resized one; whole numbers are the middles of pixels in both."""
    return (points.astype(np.float64) + 0.5) * scale - 0.5


def _crop_start(extent: int, size: int, spans: Sequence[NDArray[np.float64]]) -> int:
    """Where along an axis of `extent` pixels to cut out `size` of them so that the spans (2) lie inside."""
    low, high = 0, extent - size
    for start, end in spans:
        for margin in (MARGIN * (end - start), 0.0):
            least = max(low, math.ceil(min(end + margin, extent) - size))
            most = min(high, math.floor(max(start - margin, 0)))
            if least <= most:
                low, high = least, most
                break
    return min(max((extent - size) // 2, low), high)


def _rounded(values: NDArray[np.float32]) -> tuple[float, ...]:
    return tuple(round(float(value), 2) for value in values)


def _points(face: Face) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in face.landmarks)


class Journal:
    """What was made of a folder of photos so far, NAME.jsonl: the settings, then a line for each shard that is whole.

    A line has "end", the number of the photo to go on with, "samples", "skipped", the photos that were passed over, and
    "notices", what a user should know of those that were not.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Raises PortraitError when the journal there is of other photos or settings."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        lines = _whole_lines(path)
        if not lines:
            path.write_text(json.dumps(settings) + "\n")
            return
        if lines[0] != json.loads(json.dumps(settings)):
            other = [name for name, value in settings.items() if lines[0].get(name) != value]
            raise PortraitError(
                "output",
                f"{path.parent} holds shards made of other photos or with other settings ({', '.join(other)})",
                "Give the settings they were made with, or another --output or --name.",
            )
        self.lines = lines[1:]
        # Without a line that a killed process did not write to its end.
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def add(self, end: int, samples: int, skipped: Sequence[Skipped], notices: Sequence[str]) -> None:
        passed = [list(asdict(one).values()) for one in skipped]
        self.lines.append({"end": end, "samples": samples, "skipped": passed, "notices": list(notices)})
        with self.path.open("a") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    @property
    def end(self) -> int:
        return int(self.lines[-1]["end"]) if self.lines else 0

    @property
    def samples(self) -> int:
        return sum(int(line["samples"]) for line in self.lines)

    @property
    def skipped(self) -> list[Skipped]:
        return [Skipped(*one) for line in self.lines for one in line["skipped"]]

    @property
    def notices(self) -> list[str]:
        return [one for line in self.lines for one in line["notices"]]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def make_photos(
    folder: Path, output: Path, settings: PhotoSettings, name: str = "photos", processes: int = 1
) -> tuple[int, list[Skipped], list[str]]:
    """Writes NAME-NNNNN.tar of the photos below a folder.

    Returns how many samples there are, what was skipped, and what a user should know of the rest: which photos were
    turned upright, of which only the first frame was taken. NAME-skipped.txt lists each photo that made no sample, and
    why, NAME-notices.txt the others that there is something to say of. Raises PortraitError for a folder without
    photos, an output that holds shards of other photos or settings, or when no face detector is installed.
    """
    names = find_photos(folder)
    if not names:
        raise PortraitError("folder", f"{folder} holds no pictures", f"Known are {', '.join(sorted(SUFFIXES))}.")
    detector = f"{_detector(settings.detector).key} {RULES}"
    output.mkdir(parents=True, exist_ok=True)
    facts = {**asdict(settings), "detector": detector, "photos": len(names), "list": _digest(folder, names)}
    journal = Journal(output / f"{name}.jsonl", facts)
    jobs = enumerate(names[journal.end :], journal.end)
    results = ordered_map(functools.partial(photo_sample, folder=folder, settings=settings), jobs, processes)
    with tqdm(initial=journal.end, total=len(names), unit="photo", mininterval=1) as bar:
        while journal.end < len(names):
            end, samples, skipped, notices = journal.end, 0, [], []
            path = output / f"{name}-{len(journal.lines):05d}.tar"
            with writing(path) as shard:
                while end < len(names) and samples < settings.shard:
                    result = next(results)
                    end += 1
                    bar.update()
                    if isinstance(result, Skipped):
                        skipped.append(result)
                    else:
                        result.add_to(shard)
                        samples += 1
                        extra = result.record.extra
                        notices += [f"{extra['photo']!r}: {clause}" for clause in extra.get("notices", ())]
            if not samples:  # all that was left was skipped
                path.unlink()
            journal.add(end, samples, skipped, notices)
    listed = "".join(f"{one.reason}: {one.photo!r} {one.detail}".rstrip() + "\n" for one in journal.skipped)
    (output / f"{name}-skipped.txt").write_text(listed, encoding="utf-8", errors="backslashreplace")
    noted = "".join(f"{line}\n" for line in journal.notices)
    (output / f"{name}-notices.txt").write_text(noted, encoding="utf-8", errors="backslashreplace")
    return journal.samples, journal.skipped, journal.notices


def _digest(folder: Path, photos: Sequence[str]) -> str:
    """Of the photos' names and sizes, and of those of the captions beside them."""
    digest = hashlib.sha256()
    for photo in photos:
        for path in (folder / photo, _caption_file(folder / photo)):
            size = path.stat().st_size if path.is_file() else None
            digest.update(f"{photo}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


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
