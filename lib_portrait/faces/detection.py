"""Face detectors behind one interface: SCRFD of insightface where its weights are, otherwise MTCNN."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lib_portrait.errors import PortraitError

log = logging.getLogger(__name__)

DETECTORS = ("mtcnn", "insightface")
# By what rules faces are found, counted and cut out of photos. What was kept by other ones is not used again.
RULES = "rules 2"
SCRFD_FILE = "det_10g.onnx"
_SCRFD_PLACES = ("", "buffalo_l", "models/buffalo_l", "insightface/models/buffalo_l")

# MTCNN needs memory and time in proportion to the pixels; a face of 20 pixels at this size is still found.
_MTCNN_SIDE = 2048
_MTCNN_MIN_FACE = 20
# Between the network's own threshold (0.7) and this lie hands and curtains, which would shift the counting of faces.
_MTCNN_SCORE = 0.9
# Of 23 photographs 20 gave their face more than this at first sight; no lying, upside-down or half face had more than
# 0.9987, and the same face upright was at most a seventh as doubtful. Of drawn people, whom this network does not know,
# wrong orientations come up to a fifth.
_MTCNN_SURE = 0.9995
_MTCNN_SURER = 0.15
_SCRFD_SCORE = 0.5
_GREY = (128, 128, 128)
# Second looks are for faces that fill the picture, or for the largest: they are seen in a smaller one as well.
_SECOND_SIDE = 1024


@dataclass(frozen=True)
class Face:
    """One face of a picture, in the picture's pixels.

    box: (4,) float32: left, top, right, bottom. landmarks: (5, 2) float32: left eye, right eye, nose, left and right
    corner of the mouth, as seen by the viewer. score: the detector's confidence, 0 to 1.
    """

    box: np.ndarray
    landmarks: np.ndarray
    score: float

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


@dataclass(frozen=True)
class Detector:
    """A way to find faces. find: (H, W, 3) uint8 RGB -> faces in any order. version: tells its weights apart.

    How far it is believed: a first look whose surest face has a score below `sure` is followed by others; with 0,
    whatever is found is believed. least: the lowest score that it gives. surer: a turned picture is taken where its
    doubt, 1 - score, is below this share of the doubt of the picture as it came.
    """

    name: str
    version: str
    find: Callable[[np.ndarray], list[Face]]
    sure: float = 0.0
    least: float = 0.0
    surer: float = 1.0

    @property
    def key(self) -> str:
        return f"{self.name}-{self.version}"


def detect_faces(image: np.ndarray, detector: Detector) -> list[Face]:
    """The faces of a picture (H, W, 3) uint8 RGB, left to right by the middle of their boxes.

    Where none is found, or none that the detector is sure of, the picture gets a grey border of a quarter of its size
    and a second look: detectors miss faces that fill the frame (UniPortrait, gradio_app.py: process_faceid_image), or
    find half of one. Of two answers about one face the surer counts.
    """
    faces = _sound(detector.find(image), image)
    if not _is_sure(faces, detector):
        faces = _surer(faces, _look_again(image, detector))
    return sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))


def detect_in_photo(photo: np.ndarray, detector: Detector) -> tuple[int, list[Face]]:
    """How a photo (H, W, 3) uint8 RGB must be turned for its people to be upright, and its faces once it is.

    For photographs only: who has drawn a picture knows which way is up. The turn is 0 to 3 quarters clockwise, see
    `turned`. The faces are as `detect_faces` gives them, in pixels of the turned photo. Where the detector is sure of a
    face in the photo as it came, no other orientation is looked at.
    """
    faces = detect_faces(photo, detector)
    if _is_sure(faces, detector):
        return 0, faces
    small = _shrunk(photo)
    surest = {turn: _surest(detect_faces(turned(small, turn), detector), detector) for turn in (1, 2, 3)}
    turn = max(surest, key=lambda turn: surest[turn])
    if 1 - surest[turn] >= detector.surer * (1 - _surest(faces, detector)):
        return 0, faces
    return turn, detect_faces(turned(photo, turn), detector)


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """A picture (H, W, 3) turned clockwise by so many quarters."""
    return np.ascontiguousarray(np.rot90(image, -turn)) if turn else image


def turned_back(face: Face, turn: int, width: int, height: int) -> Face:
    """A face of the picture that `turned` gave, in pixels of the one it was given, of `width` x `height` pixels.

    Its landmarks keep their order: the first is still the eye at the left of the upright face.
    """
    points = np.concatenate([face.box.reshape(2, 2), face.landmarks])
    x, y = points.T
    # Whole numbers are the middles of pixels.
    right, bottom = np.float32(width - 1), np.float32(height - 1)
    back = {0: (x, y), 1: (y, bottom - x), 2: (right - x, bottom - y), 3: (right - y, x)}[turn % 4]
    points = np.stack(back, axis=1)
    corners = np.stack([points[:2].min(axis=0), points[:2].max(axis=0)])
    return Face(corners.reshape(4), points[2:], face.score)


def _look_again(image: np.ndarray, detector: Detector) -> list[Face]:
    """The sound faces of a picture within a border, in the picture's pixels."""
    small = _shrunk(image)
    left, top = small.shape[1] // 4, small.shape[0] // 4
    found = detector.find(cv2.copyMakeBorder(small, top, top, left, left, cv2.BORDER_CONSTANT, value=_GREY))
    shift = np.array([left, top], dtype=np.float32)
    scale = np.array([image.shape[1] / small.shape[1], image.shape[0] / small.shape[0]], dtype=np.float32)
    moved = [
        Face(((face.box.reshape(2, 2) - shift) * scale).reshape(4), (face.landmarks - shift) * scale, face.score)
        for face in found
    ]
    return _sound(moved, image)


def _shrunk(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    shrink = _SECOND_SIDE / max(height, width)
    if shrink >= 1:
        return image
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _sound(faces: Sequence[Face], image: np.ndarray) -> list[Face]:
    """The faces with a place in the picture, their boxes cut off at its edge; landmarks may lie beyond."""
    edge = np.array(image.shape[1::-1], dtype=np.float32)
    cut = [Face(face.box.reshape(2, 2).clip(0, edge).reshape(4), face.landmarks, face.score) for face in faces]
    return [face for face in cut if face.area > 0 and np.isfinite(face.landmarks).all() and np.ptp(face.landmarks)]


def _surer(first: Sequence[Face], second: Sequence[Face]) -> list[Face]:
    """The faces of two looks at one picture; where both saw something in the same place, what the surer one says."""

    def rivals(face: Face, others: Sequence[Face]) -> list[Face]:
        return [one for one in others if _overlap(one.box, face.box) > min(one.area, face.area) / 2]

    kept = [face for face in first if all(face.score >= one.score for one in rivals(face, second))]
    return kept + [face for face in second if all(face.score > one.score for one in rivals(face, first))]


def _surest(faces: Sequence[Face], detector: Detector) -> float:
    return max((face.score for face in faces), default=detector.least)


def _is_sure(faces: Sequence[Face], detector: Detector) -> bool:
    return bool(faces) and _surest(faces, detector) >= detector.sure


def available_detectors(model_dirs: Sequence[Path]) -> list[str]:
    """Names of the detectors that can be used here, the preferred one first. Nothing is imported for it."""
    names = []
    if _installed("insightface") and _installed("onnxruntime") and _scrfd_file(model_dirs):
        names.append("insightface")
    if _installed("facenet_pytorch"):
        names.append("mtcnn")
    return names


def get_detector(name: str | None, model_dirs: Sequence[Path]) -> Detector:
    """The detector of that name, or the preferred one of those available (None).

    model_dirs: folders in which insightface's `buffalo_l` may lie. Raises PortraitError when it cannot be had. An
    insightface that is there but does not start is passed over with a warning, unless it was asked for by name.
    """
    makers = {"insightface": _insightface, "mtcnn": _mtcnn}
    if name is not None:
        if name not in makers:
            raise PortraitError("detector", f"{name!r} is not a detector", f"Use one of: {', '.join(makers)}.")
        return makers[name](model_dirs)
    if "insightface" in available_detectors(model_dirs):
        try:
            return _insightface(model_dirs)
        except PortraitError as error:
            log.warning("Portrait: %s Using mtcnn instead.", error.detail)
    return _mtcnn(model_dirs)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _scrfd_file(model_dirs: Sequence[Path]) -> Path | None:
    folders = [Path(folder) for folder in model_dirs] + [Path.home() / ".insightface"]
    files = (folder / place / SCRFD_FILE for folder in folders for place in _SCRFD_PLACES)
    return next((file for file in files if file.is_file()), None)


def _insightface(model_dirs: Sequence[Path]) -> Detector:
    """SCRFD at 640 pixels, as the official demo has it (gradio_app.py: face_app.prepare)."""
    file = _scrfd_file(model_dirs)
    if file is None:
        folders = ", ".join(str(folder) for folder in model_dirs) or "~/.insightface"
        raise PortraitError(
            "detector",
            f"the detector's weights {SCRFD_FILE} were not found",
            f"Put insightface's buffalo_l folder into one of: {folders}; or use the detector mtcnn.",
        )
    try:
        from insightface.model_zoo import get_model
    except Exception as error:  # a broken onnxruntime, protobuf, numpy ABI: each has its own exception
        raise PortraitError(
            "detector",
            f"insightface does not start ({type(error).__name__}: {error})",
            "Repair or remove the packages insightface and onnxruntime, or use the detector mtcnn.",
            status_code=500,
        ) from error
    again = f"Fetch {SCRFD_FILE} of insightface's buffalo_l again, or use the detector mtcnn."
    try:
        model = get_model(str(file), providers=["CPUExecutionProvider"])
        detects = getattr(model, "taskname", None) == "detection" and getattr(model, "use_kps", False)
        if detects:
            model.prepare(ctx_id=-1, input_size=(640, 640), det_thresh=_SCRFD_SCORE)
    except Exception as error:  # what onnxruntime says of a cut or foreign file depends on where it is cut
        raise PortraitError(
            "detector",
            f"the weights file {file} is damaged or incomplete ({type(error).__name__}: {str(error)[:200]})",
            again,
            status_code=500,
        ) from error
    if not detects:
        raise PortraitError(
            "detector", f"{file} holds a model that finds no faces with landmarks", again, status_code=500
        )

    def find(image: np.ndarray) -> list[Face]:
        boxes, landmarks = model.detect(np.ascontiguousarray(image[..., ::-1]), max_num=0, metric="default")
        if landmarks is None:
            return []
        return [
            Face(box[:4].astype(np.float32), five.astype(np.float32), float(box[4]))
            for box, five in zip(boxes, landmarks, strict=True)
        ]

    # It is never so sure of a face as to make other looks needless, and of two orientations the surer one is right.
    return Detector("insightface", hashlib.sha256(file.read_bytes()).hexdigest()[:16], find, 1.0, _SCRFD_SCORE, 1.0)


def _mtcnn(model_dirs: Sequence[Path]) -> Detector:
    """MTCNN of facenet-pytorch, whose weights are part of the package. It loads when a face is first sought."""
    if not _installed("facenet_pytorch"):
        raise PortraitError(
            "detector",
            "no face detector is installed",
            "Run: pip install --no-deps facenet-pytorch (its own pins would replace torch), then restart.",
            status_code=500,
        )

    @functools.cache
    def network():  # type: ignore[no-untyped-def]
        again = "Run: pip install --no-deps --force-reinstall facenet-pytorch, then restart."
        try:
            from facenet_pytorch import MTCNN
        except Exception as error:
            raise PortraitError(
                "detector", f"facenet-pytorch does not start ({type(error).__name__}: {error})", again, status_code=500
            ) from error
        try:
            return MTCNN(keep_all=True, min_face_size=_MTCNN_MIN_FACE, device="cpu")
        except Exception as error:  # files cut short, emptied or exchanged
            raise PortraitError(
                "detector",
                f"the weights that come with facenet-pytorch are damaged ({type(error).__name__}: {str(error)[:200]})",
                again,
                status_code=500,
            ) from error

    def look(image: np.ndarray) -> list[Face]:
        height, width = image.shape[:2]
        shrink = min(1.0, _MTCNN_SIDE / max(height, width))
        if shrink < 1:
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        if min(image.shape[:2]) < _MTCNN_MIN_FACE:
            return []  # the package's image pyramid would be empty, which it does not expect
        boxes, scores, landmarks = network().detect(image, landmarks=True)
        if boxes is None:
            return []
        scale = np.array([width / image.shape[1], height / image.shape[0]], dtype=np.float32)
        return [
            Face(
                (np.asarray(box, np.float32).reshape(2, 2) * scale).reshape(4),
                np.asarray(five, np.float32) * scale,
                float(score),
            )
            for box, score, five in zip(boxes, scores, landmarks, strict=True)
            if score >= _MTCNN_SCORE
        ]

    def look_closer(image: np.ndarray, face: Face) -> Face:
        """The same face in a window of twice its size, grey beyond the picture, or as it was where none is seen."""
        side = 2 * float(np.ptp(face.box.reshape(2, 2), axis=0).max())
        corner = face.box.reshape(2, 2).mean(axis=0) - side / 2
        scale = min(1.0, _MTCNN_SIDE / side)
        matrix = np.array([[scale, 0, -scale * corner[0]], [0, scale, -scale * corner[1]]])
        size = max(1, round(scale * side))
        window = cv2.warpAffine(image, matrix, (size, size), borderValue=_GREY)
        seen = [
            Face(
                (one.box.reshape(2, 2) / scale + corner).reshape(4).astype(np.float32),
                (one.landmarks / scale + corner).astype(np.float32),
                one.score,
            )
            for one in look(window)
        ]
        same = [one for one in seen if _overlap(one.box, face.box) > one.area / 2]
        return max(same, key=lambda one: one.area, default=face)

    def find(image: np.ndarray) -> list[Face]:
        return [look_closer(image, face) if _leaves(face.box, image) else face for face in look(image)]

    version = importlib.metadata.version("facenet-pytorch")
    return Detector("mtcnn", version, find, _MTCNN_SURE, _MTCNN_SCORE, _MTCNN_SURER)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """The area that two boxes share, in square pixels."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return float(sides.clip(0).prod())


def _leaves(box: np.ndarray, image: np.ndarray) -> bool:
    """Whether the square around a box leaves the picture.

    The package cuts that square off at the picture's edge and stretches what remains back to a square, on which the
    last network then places the landmarks: off by a tenth to half of the face in photos that are cut to the face.
    """
    corners = box.reshape(2, 2)
    reach = np.ptp(corners, axis=0).max() / 2
    centre = corners.mean(axis=0)
    return bool((centre < reach).any() or (centre + reach > image.shape[1::-1]).any())
