"""Shards made of photographs, in stages that are the same for every engine.

A stage is a function of a photo, which it hands on with what it found, or drops with a reason. One process writes the
shards, in the order of the photos, so that the same photos give the same bytes with any engine and number of workers. A
shard that is there whole is kept: a command that was broken off goes on with those missing.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import DETECTORS, RULES, Detector, Face, detect_in_photo, get_detector, turned
from lib_portrait.faces.images import decode_photo
from lib_portrait.faces.order import TURNS, sharpness
from lib_portrait.picture_files import SUFFIXES, is_picture
from lib_portrait.request import Limits
from trainer.engines import Engine, LocalEngine, Step
from trainer.shards import EncodedSample, FaceRecord, Record, pose_to_json, writing

if TYPE_CHECKING:
    from lib_portrait.faces.parsing import ParseNet
    from trainer.keypoints import Person

MODELS = Path(__file__).resolve().parents[1] / "models"
# How many photos a worker is given at once.
TOGETHER = 16


@dataclass(frozen=True)
class PhotoSettings:
    """How photographs become samples, and which do.

    size: side of the written pictures in pixels: the short side is brought to it, then a square is cut out that keeps
    the faces. caption: where no PHOTO.txt stands beside a photo; {word} becomes "woman", "man", "person" or, for
    several faces, "group of people". smallest_face: width in the written picture, in pixels, of a face that counts.
    identities: whether sub-folders name people. detector: its name or its file, or None for the best there is.

    Filters, of the kind that OmniPortrait-1M was made with (sec. A.1): least_side: of the photo, in pixels, not less
    than `size` anyway. least_faces, most_faces: as many are found in the photo; so many must count. face_share: least
    and most of the photo's area that the box of its largest face covers. sharpness: the least of its largest face, see
    `lib_portrait.faces.order.sharpness`. nouns: whether the caption must have a word for a person.

    keypoints: file of a network that finds people, see `trainer.keypoints`: then records have "poses", and each face
    must lie in a person. parser: file of a face parser: then samples have the masks of their faces.
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
    least_side: int = 0
    least_faces: int = 1
    face_share: tuple[float, float] = (0.0, 1.0)
    sharpness: float = 0.0
    nouns: bool = False
    keypoints: Path | None = None
    parser: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.kind not in QUALITY:
            raise PortraitError("kind", f"{self.kind!r} was given", f"Give one of: {', '.join(QUALITY)}.")
        if not 1 <= self.quality <= 100:
            raise PortraitError("quality", f"{self.quality} was given", "Give 1 to 100.")
        least = {"size": 64, "smallest_face": 1, "most_faces": 1, "shard": 1, "least_side": 0, "least_faces": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise PortraitError(name, f"{getattr(self, name)} was given", f"Give {number} or more.")
        if self.least_faces > self.most_faces:
            raise PortraitError(
                "least_faces",
                f"{self.least_faces} was given, and at most {self.most_faces} faces",
                "Give no more than --most-faces, or as many for exactly so many faces.",
            )
        low, high = self.face_share
        if not 0 <= low < high <= 1:
            raise PortraitError("face_share", f"{low:g} {high:g} was given", "Give two shares, 0 <= LEAST < MOST <= 1.")
        if not (self.sharpness >= 0 and math.isfinite(self.sharpness)):
            raise PortraitError("sharpness", f"{self.sharpness:g} was given", "Give 0 or more.")


@dataclass(frozen=True)
class Photo:
    """A photo on its way to a sample: what the stages found so far.

    number: becomes the sample's key. name: relative to the `folder`, with / between its parts. image: (H, W, 3) uint8
    RGB; the photo, then the upright one, from `cut` on the written picture. found: all faces in the upright photo,
    the largest first. faces: those that count. poses: (18, 2) each, of everybody in the written picture. labels: (H, W)
    uint8, see `trainer.shards.ShardSample`. encoded: the written picture's file. notices: what a user should know.
    """

    number: int
    name: str
    folder: Path
    image: NDArray[np.uint8] | None = None
    found: tuple[Face, ...] = ()
    caption: str | None = None
    faces: tuple[FaceRecord, ...] = ()
    poses: tuple[NDArray[np.float32], ...] | None = None
    labels: NDArray[np.uint8] | None = None
    encoded: bytes = b""
    notices: tuple[str, ...] = ()

    @property
    def pixels(self) -> NDArray[np.uint8]:
        assert self.image is not None, "it is decoded first, and encoded last"
        return self.image

    def sample(self, kind: str) -> EncodedSample:
        extra: dict[str, Any] = {"photo": self.name}
        if self.notices:
            extra["notices"] = list(self.notices)
        if self.poses is not None:
            extra["poses"] = [pose_to_json(pose) for pose in self.poses]
        record = Record(self.caption or "", self.faces, extra)
        return EncodedSample(f"{self.number:08d}", self.encoded, kind, record, self.labels)


@dataclass(frozen=True)
class Skipped:
    """A photo that makes no sample. stage: at which it was dropped. reason: one of few, to be counted; detail: what
    exactly, or nothing."""

    photo: str
    stage: str
    reason: str
    detail: str = ""


class Dropped(Exception):
    """What a stage raises of a photo that makes no sample: the reason and the detail of `Skipped`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


QUALITY: dict[str, int | None] = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "webp": cv2.IMWRITE_WEBP_QUALITY, "png": None}
WORDS = {"woman": "woman", "women": "woman", "man": "man", "men": "man"}
# What a caption may call the one face that it tells of.
OWN_WORDS = ("woman", "man")
# A face counts when at least this share of its box, and all its landmarks, lie in the picture; and it lies in a person
# with this share of its box.
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


# ------------------------------------------------------------------------------------------------------------- stages


def decode(photo: Photo, settings: PhotoSettings) -> Photo:
    """The picture in the file; of so many pixels at least."""
    limits = Limits()
    try:
        with (photo.folder / photo.name).open("rb") as file:
            image, notices = decode_photo(file.read(limits.photo_bytes + 1), photo.name, limits)
    except (OSError, PortraitError) as error:
        problem = error.problem if isinstance(error, PortraitError) else str(error)
        raise Dropped("unreadable picture", problem) from None
    height, width = image.shape[:2]
    side = max(settings.size, settings.least_side)
    if min(height, width) < side:
        raise Dropped(f"picture smaller than {side} pixels", f"{width}x{height}")
    return replace(photo, image=image, notices=notices)


def find_faces(photo: Photo, settings: PhotoSettings) -> Photo:
    """Faces, the largest first, and the photo turned so that they are upright."""
    image, notices = photo.pixels, photo.notices
    try:
        turn, found = detect_in_photo(image, _detector(settings.detector, settings.device))
    except PortraitError:
        raise  # there is no detector
    except Exception as error:  # detectors answer odd pictures with exceptions of many packages
        raise Dropped("face detector failed", f"{type(error).__name__}: {str(error)[:200]}") from None
    if not found:
        raise Dropped("no face")
    if len(found) > settings.most_faces:
        raise Dropped(f"more than {settings.most_faces} faces", str(len(found)))
    if len(found) < settings.least_faces:
        raise Dropped(f"fewer than {settings.least_faces} faces", str(len(found)))
    if turn:
        image, notices = turned(image, turn), (*notices, f"it was turned {TURNS[turn]}")
    found = sorted(found, key=lambda face: -face.area)
    share, (low, high) = found[0].area / (image.shape[0] * image.shape[1]), settings.face_share
    if share < low:
        raise Dropped(f"largest face covers less than {low:g} of the photo", f"{share:.4f}")
    if share > high:
        raise Dropped(f"largest face covers more than {high:g} of the photo", f"{share:.4f}")
    if settings.sharpness:
        sharp = sharpness(align_face(image, found[0].landmarks, filtered=True))
        if sharp < settings.sharpness:
            raise Dropped(f"largest face less sharp than {settings.sharpness:g}", f"{sharp:.4f}")
    return replace(photo, image=image, found=tuple(found), notices=notices)


def read_caption(photo: Photo, settings: PhotoSettings) -> Photo:
    """The text beside the photo, where there is one."""
    try:
        return replace(photo, caption=_caption_beside(photo.folder / photo.name))
    except (OSError, ValueError) as error:
        raise Dropped("unreadable caption", str(error)) from None


def cut(photo: Photo, settings: PhotoSettings) -> Photo:
    """The square that is written, the faces of it that count, who they are, and a caption where there was none."""
    picture, shown = square_crop(photo.pixels, photo.found, settings.size)
    who, word = label_of(photo.name) if settings.identities else (None, None)
    if len(photo.found) > 1 and photo.found[1].area > MOST_BESIDE * photo.found[0].area:
        who = word = None
    faces = tuple(
        FaceRecord(who if place == 0 else None, word if place == 0 else None, _rounded(face.box), _points(face))
        for place, face in enumerate(shown)
        if face is not None and face.box[2] - face.box[0] >= settings.smallest_face
    )
    if not faces:
        raise Dropped(f"all faces smaller than {settings.smallest_face} pixels or cut off")
    if len(faces) < settings.least_faces:
        raise Dropped(f"fewer than {settings.least_faces} faces of {settings.smallest_face} pixels, and whole")
    caption = photo.caption
    if caption is None:
        subject = "group of people" if len(faces) > 1 else word or "person"
        caption = settings.caption.replace("{word}", subject)
    return replace(photo, image=picture, found=(), faces=faces, caption=caption)


def find_people(photo: Photo, settings: PhotoSettings) -> Photo:
    """Everybody's pose; each face that counts must lie in somebody, which patterns and animals' faces do not."""
    people = _people(settings.keypoints, settings.device)(photo.pixels)
    for face in photo.faces:
        if not any(_share_within(face.box, one.box) >= LEAST_VISIBLE for one in people):
            raise Dropped("face that is no person's", str(face.box))
    return replace(photo, poses=tuple(one.pose for one in people))


def parse(photo: Photo, settings: PhotoSettings) -> Photo:
    """Which pixels are whose face, the larger of two in front."""
    from lib_portrait.faces.parsing import face_mask

    labels = np.zeros(photo.pixels.shape[:2], np.uint8)
    for number in reversed(range(len(photo.faces))):
        landmarks = np.array(photo.faces[number].landmarks, np.float32)
        labels[face_mask(photo.pixels, landmarks, _parser(settings.parser))] = number + 1
    return replace(photo, labels=labels)


def find_noun(photo: Photo, settings: PhotoSettings) -> Photo:
    """A word for a person in the caption, which also is the one of a face that is alone."""
    from lib_portrait.attention.rows import PERSON_WORDS

    nouns = [word for word in re.findall(r"[a-z]+", (photo.caption or "").lower()) if word in PERSON_WORDS]
    if not nouns:
        raise Dropped("caption without a word for a person", photo.caption or "")
    faces = photo.faces
    if len(faces) == 1 and faces[0].word is None and len(nouns) == 1 and nouns[0] in OWN_WORDS:
        faces = (replace(faces[0], word=nouns[0]),)
    return replace(photo, faces=faces)


def encode(photo: Photo, settings: PhotoSettings) -> Photo:
    """The written picture's file."""
    quality = QUALITY[settings.kind]
    options = [] if quality is None else [quality, settings.quality]
    encoded = cv2.imencode(f".{settings.kind}", photo.pixels[:, :, ::-1], options)[1].tobytes()
    return replace(photo, image=None, encoded=encoded)


@dataclass(frozen=True)
class Stage:
    """name: in the report. network: whether networks are behind it, see `trainer.engines.Step`."""

    name: str
    function: Callable[[Photo, PhotoSettings], Photo]
    network: bool = False


def stages_of(settings: PhotoSettings) -> tuple[Stage, ...]:
    """The stages that photos go through, in order. Steps that pass on whole photos are as few as can be."""
    stages = [Stage("decode", decode), Stage("faces", find_faces, True), Stage("captions", read_caption, True)]
    stages.append(Stage("cut", cut, True))
    if settings.keypoints is not None:
        stages.append(Stage("keypoints", find_people, True))
    if settings.parser is not None:
        stages.append(Stage("parsing", parse, True))
    if settings.nouns:
        stages.append(Stage("nouns", find_noun))
    return (*stages, Stage("shards", encode))


def through(photo: Photo | Skipped, stages: Sequence[Stage], settings: PhotoSettings) -> Photo | Skipped:
    """A photo after these stages, or at which it was dropped; one that was dropped before is let through."""
    for stage in stages:
        if isinstance(photo, Skipped):
            break
        try:
            photo = stage.function(photo, settings)
        except Dropped as dropped:
            photo = Skipped(photo.name, stage.name, dropped.reason, dropped.detail)
    return photo


def steps_of(settings: PhotoSettings) -> list[Step]:
    """Neighbouring stages of a kind in one step of an engine."""
    grouped = groupby(stages_of(settings), key=lambda stage: stage.network)
    return [Step(functools.partial(through, stages=tuple(own), settings=settings), net) for net, own in grouped]


# Of each process one. They are imported where they are wanted: who writes the shards has no use for them.


@functools.cache
def _detector(choice: str | None, device: str) -> Detector:
    if choice is None:
        return get_detector(None, [MODELS])
    from lib_portrait.faces.heatmap_detector import open_detector

    return open_detector(choice, [MODELS], device)


@functools.cache
def _people(file: Path, device: str) -> Callable[[NDArray[np.uint8]], list[Person]]:
    from trainer.keypoints import people_finder

    return people_finder(file, device)


@functools.cache
def _parser(file: Path) -> ParseNet:
    from lib_portrait.checkpoints.formats import read_tensors
    from lib_portrait.faces.parsing import parser_from_state_dict

    return parser_from_state_dict(read_tensors(file, "parser").tensors, file.name)


def _share_within(box: Sequence[float], other: Sequence[float]) -> float:
    """The share of a box that lies in another."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0) / ((box[2] - box[0]) * (box[3] - box[1]))


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


# ------------------------------------------------------------------------------------------------------------- shards


class Journal:
    """What was made of a folder of photos so far, NAME.jsonl: the settings, then a line for each shard that is whole.

    A line has "end", the number of the photo to go on with, "samples", "skipped", the photos that were passed over,
    "notices", what a user should know of those that were not, and "people", how many samples there are by their number
    of faces.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Raises PortraitError when the journal there is of other photos or settings."""
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.lines: list[dict[str, Any]] = []
        lines = _whole_lines(path)
        if not lines:
            self._write([self.settings])
            return
        if lines[0] != self.settings:
            other = [name for name, value in self.settings.items() if lines[0].get(name) != value]
            raise PortraitError(
                "output",
                f"{path.parent} holds shards made of other photos or with other settings ({', '.join(other)})",
                "Give the settings they were made with, or another --output or --name.",
            )
        self.lines = lines[1:]
        # Without a line that a killed process did not write to its end.
        self._write(lines)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, self.path)

    def add(
        self, end: int, samples: int, skipped: Sequence[Skipped], notices: Sequence[str], people: Counter[int]
    ) -> None:
        passed = [list(asdict(one).values()) for one in skipped]
        numbers = [[number, people[number]] for number in sorted(people)]
        self.lines.append(
            {"end": end, "samples": samples, "skipped": passed, "notices": list(notices), "people": numbers}
        )
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

    @property
    def people(self) -> Counter[int]:
        found: Counter[int] = Counter()
        for line in self.lines:
            found.update(dict(line["people"]))
        return found


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def make_photos(
    folder: Path, output: Path, settings: PhotoSettings, name: str = "photos", engine: Engine | None = None
) -> Journal:
    """Writes NAME-NNNNN.tar of the photos below a folder, and tells of all photos there, see `Journal`.

    NAME-report.md counts what each stage dropped, NAME-skipped.txt lists each photo that made no sample, and why,
    NAME-notices.txt the others that there is something to say of: that they were turned upright, that only the first
    frame was taken. engine: this very process where none is given. Raises PortraitError for a folder without photos, an
    output that holds shards of other photos or settings, or when no face detector is installed.
    """
    names = find_photos(folder)
    if not names:
        raise PortraitError("folder", f"{folder} holds no pictures", f"Known are {', '.join(sorted(SUFFIXES))}.")
    files = _networks(settings)
    output.mkdir(parents=True, exist_ok=True)
    facts = {**asdict(settings), **files, "photos": len(names), "list": _digest(folder, names)}
    journal = Journal(output / f"{name}.jsonl", facts)
    place = folder.absolute()
    jobs = [Photo(number, names[number], place) for number in range(journal.end, len(names))]
    results = (engine or LocalEngine()).map(steps_of(_anywhere(settings)), jobs, TOGETHER)
    with (
        contextlib.closing(results),
        tqdm(initial=journal.end, total=len(names), unit="photo", mininterval=1) as bar,
    ):
        while journal.end < len(names):
            end, samples, skipped, notices, people = journal.end, 0, [], [], Counter[int]()
            path = output / f"{name}-{len(journal.lines):05d}.tar"
            with writing(path) as shard:
                while end < len(names) and samples < settings.shard:
                    result = next(results)
                    end += 1
                    bar.update()
                    if isinstance(result, Skipped):
                        skipped.append(result)
                    else:
                        result.sample(settings.kind).add_to(shard)
                        samples += 1
                        people[len(result.faces)] += 1
                        notices += [f"{result.name!r}: {clause}" for clause in result.notices]
            if not samples:  # all that was left was skipped
                path.unlink()
            journal.add(end, samples, skipped, notices, people)
    skipped_lines = (f"{one.reason}: {one.photo!r} {one.detail}".rstrip() for one in journal.skipped)
    for kind, text in (
        ("skipped.txt", "".join(f"{line}\n" for line in skipped_lines)),
        ("notices.txt", "".join(f"{line}\n" for line in journal.notices)),
        ("report.md", report(journal, name, stages_of(settings))),
    ):
        (output / f"{name}-{kind}").write_text(text, encoding="utf-8", errors="backslashreplace")
    return journal


def _anywhere(settings: PhotoSettings) -> PhotoSettings:
    """The same for workers that began in another folder."""
    detector, keypoints, parser = settings.detector, settings.keypoints, settings.parser
    if detector is not None and detector not in DETECTORS:
        detector = str(Path(detector).absolute())
    return replace(
        settings, detector=detector, keypoints=keypoints and keypoints.absolute(), parser=parser and parser.absolute()
    )


def _networks(settings: PhotoSettings) -> dict[str, str | None]:
    """The networks behind the settings, by content. Raises PortraitError for one that cannot be had."""
    # The device may be another machine's.
    files: dict[str, str | None] = {"detector": f"{_detector(settings.detector, 'cpu').key} {RULES}"}
    if settings.keypoints is not None:
        _people(settings.keypoints, "cpu")
    if settings.parser is not None:
        _parser(settings.parser)
    for role in ("keypoints", "parser"):
        file = getattr(settings, role)
        files[role] = file and file_sha256(file)
    return files


def report(journal: Journal, name: str, stages: Sequence[Stage]) -> str:
    """What became of the photos, as a page of Markdown: how many each stage was given, dropped and why, handed on."""
    dropped = Counter((one.stage, one.reason) for one in journal.skipped)
    lines = [f"# {name}: {journal.samples} samples of {journal.end} photos", ""]
    lines += ["| stage | in | dropped | out |", "| --- | ---: | ---: | ---: |"]
    left = journal.end
    for stage in stages:
        lost = sum(count for (where, _), count in dropped.items() if where == stage.name)
        lines.append(f"| {stage.name} | {left} | {lost} | {left - lost} |")
        left -= lost
    lines += ["", "| dropped at | photos | why |", "| --- | ---: | --- |"]
    order = {stage.name: place for place, stage in enumerate(stages)}
    for (where, reason), count in sorted(dropped.items(), key=lambda one: (order[one[0][0]], -one[1], one[0][1])):
        lines.append(f"| {where} | {count} | {reason} |")
    lines += ["", "| faces in a sample | samples |", "| ---: | ---: |"]
    lines += [f"| {number} | {count} |" for number, count in sorted(journal.people.items())]
    lines += ["", "| setting | |", "| --- | --- |"]
    # A bar would end the cell, in a caption as anywhere.
    values = {setting: json.dumps(value).replace("|", "\\|") for setting, value in journal.settings.items()}
    lines += [f"| {setting} | {value} |" for setting, value in values.items()]
    return "\n".join([*lines, "", f"{name}-skipped.txt names each photo that was dropped.", ""])


def _digest(folder: Path, photos: Sequence[str]) -> str:
    """Of the photos' names and sizes, and of those of the captions beside them."""
    digest = hashlib.sha256()
    for photo in photos:
        for path in (folder / photo, _caption_file(folder / photo)):
            size = path.stat().st_size if path.is_file() else None
            digest.update(f"{photo}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
