"""From a photo of a request to its faces and their features, each computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lib_portrait.attention.regions import Box
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.control_picture import heads
from lib_portrait.errors import NoSuchFace, Notice, PortraitError
from lib_portrait.faces import order
from lib_portrait.faces.alignment import align_face, fit_aligned, oval_radius, portrait, template
from lib_portrait.faces.cache import FeatureCache, PhotoCache, Recent
from lib_portrait.faces.detection import (
    RULES,
    Detector,
    Face,
    detect_faces,
    detect_in_photo,
    get_detector,
    turned,
    turned_back,
)
from lib_portrait.faces.features import Encoder, FaceFeatures
from lib_portrait.faces.images import decode_mask, decode_photo
from lib_portrait.faces.parsing import MaskedPortrait, ParseNet, masked_portrait, parser_from_state_dict
from lib_portrait.request import Limits, Photo


@dataclass(frozen=True)
class FoundFace:
    """A face of a photo: where it is, and its aligned crop (224, 224, 3) uint8 RGB.

    face: in pixels of the photo upright by its EXIF data, whichever way its people stand. turn: by how many degrees
    the photo was turned to the right for them to stand upright: 0, 90, 180 or 270. bystander: whether it is counted
    after the photo's main faces, see `order.counted`. notices: what a user should know of it, each a clause without a
    full stop.
    """

    face: Face
    crop: np.ndarray
    notices: tuple[str, ...] = ()
    turn: int = 0
    bystander: bool = False


def largest(found: Sequence[FoundFace]) -> int:
    """Which of the faces `FaceService.find` gives is the largest: a bystander only where there is nobody else."""
    return max(range(len(found)), key=lambda index: (not found[index].bystander, found[index].face.area))


class FaceService:
    """Everything a host asks about faces. One per process; calls from several threads wait for each other.

    detector_dirs: folders in which insightface's weights may lie. cache_dir: where photos and features are kept.
    detector: the one to use or its name, or None for the best available (see `detection`). cache_bytes: how much photos
    (two thirds) and features (one third) may take on disk. filter_crops: see `align_face`. parser: where the weights of
    the face parser lie at the moment, None where they do not.
    """

    def __init__(
        self,
        detector_dirs: Sequence[Path],
        cache_dir: Path,
        limits: Limits | None = None,
        detector: str | Detector | None = None,
        cache_bytes: int = 2**30,
        filter_crops: bool = False,
        parser: Callable[[], Path | None] = lambda: None,
    ):
        self.limits = limits or Limits()
        self.photos = PhotoCache(Path(cache_dir) / "photos", cache_bytes * 2 // 3)
        self._features = FeatureCache(Path(cache_dir) / "features", cache_bytes // 3)
        self._found: Recent[list[FoundFace]] = Recent(32)
        self._detector_dirs = detector_dirs
        self._chosen = detector
        self.filter_crops = filter_crops
        self._detector: Detector | None = None
        self._masked: Recent[MaskedPortrait] = Recent(32)
        self._parser_file = parser
        self._parser: tuple[ParseNet, object] | None = None
        self._lock = threading.RLock()

    @property
    def detector(self) -> Detector:
        """The detector in use. Raises PortraitError when there is none."""
        with self._lock:
            if self._detector is None:
                chosen = self._chosen
                self._detector = chosen if isinstance(chosen, Detector) else get_detector(chosen, self._detector_dirs)
            return self._detector

    def find(self, photo: Photo, field: str) -> list[FoundFace]:
        """All faces of a photo as they are counted: the main ones from the left as one sees them, then the bystanders.

        Of a photo that is aligned already, that face alone.

        Raises PortraitError naming `field`: what `decode_image` refuses, a hash of no kept photo, no face.
        """
        photo = self.named(photo, field)
        with self._lock:
            key = FeatureCache.key(photo.sha256, photo.aligned, self._how(photo))
            found = self._found.get(key)
            if found is None:
                found = self._aligned(photo, field) if photo.aligned else self._detected(photo, field)
                self._found.put(key, found)
            else:
                self._keep(photo)
            return found

    def crop(self, photo: Photo, field: str) -> np.ndarray:
        """The aligned crop (224, 224, 3) uint8 of the face that the photo's `face` chooses.

        Raises PortraitError as `find` does, and when there are fewer faces than `face` counts.
        """
        return self.chosen(photo, field).crop

    def portrait(self, photo: Photo, field: str, size: int, face_only: bool = False) -> np.ndarray:
        """The square about the face that the photo's `face` chooses, (size, size, 3) uint8, see `alignment.portrait`.

        Raises PortraitError as `crop` does.
        """
        return portrait(*self._upright(photo, field), size, face_only)

    def reference(self, photo: Photo, field: str, size: int) -> MaskedPortrait:
        """The same square, and what of it is face: by the parser, where there is one, else by the face's landmarks.

        The last ones asked for are kept. Raises PortraitError as `crop` does, and for damaged weights of the parser.
        """
        photo = self.named(photo, field)
        with self._lock:
            parser, made_by = self._face_parser()
            key = FeatureCache.key(photo.sha256, photo.face, photo.aligned, self._how(photo), size, made_by)
            found = self._masked.get(key)
            if found is None:
                found = masked_portrait(*self._upright(photo, field), size, parser)
                self._masked.put(key, found)
            else:
                self._keep(photo)
            return found

    def ovals(self, picture: np.ndarray) -> list[np.ndarray]:
        """Where the faces of a drawn picture (H, W, 3) uint8 RGB are, from the left: of each the oval of its landmarks,
        (H, W) bool. Raises PortraitError when there is no detector."""
        height, width = picture.shape[:2]
        with self._lock:
            found = detect_faces(picture, self.detector)
        return [oval_radius(face.landmarks, max(height, width))[:height, :width] <= 1 for face in found]

    def notices(self, photo: Photo, field: str) -> list[Notice]:
        """What a user should know of the face that the photo's `face` chooses. Raises PortraitError as `crop` does."""
        return [Notice(field, text) for text in self.chosen(photo, field).notices]

    def chosen(self, photo: Photo, field: str) -> FoundFace:
        """The face that the photo's `face` chooses. Raises PortraitError as `crop` does."""
        found = self.find(photo, field)
        if photo.aligned or photo.face is None:
            return found[largest(found)]
        if photo.face >= len(found):
            raise NoSuchFace(f"{field}.face", photo.face, len(found))
        return found[photo.face]

    def features(self, photo: Photo, field: str, encoder: Encoder) -> FaceFeatures:
        """The features of the face that the photo's `face` chooses, cached. Raises as `crop` and `encode` do."""
        photo = self.named(photo, field)
        with self._lock:
            key = FeatureCache.key("face", photo.sha256, photo.face, photo.aligned, self._how(photo), encoder.key)
            features = self._features.get(key)
            if features is None:
                features = encoder.encode([self.crop(photo, field)])[0]
                self._features.put(key, features)
            else:
                self._keep(photo)
            return features

    def zero(self, encoder: Encoder) -> FaceFeatures:
        """The encoder's features of no face, cached like those of a face."""
        with self._lock:
            key = FeatureCache.key("zero", encoder.key)
            features = self._features.get(key)
            if features is None:
                features = encoder.zero()
                self._features.put(key, features)
            return features

    def mask(self, photo: Photo, field: str) -> np.ndarray:
        """The photo as a region's mask (H, W) float32 in [0, 1]. Raises PortraitError as `decode_mask` does."""
        return decode_mask(self._bytes(self.named(photo, field), field), field, self.limits)

    def places(self, photo: Photo, field: str) -> tuple[list[Box], tuple[int, int]]:
        """Where the faces of a picture are, in shares of its width and height, and these in pixels.

        They are counted as `find` does; of a skeleton as `control_picture.skeletons` draws it, from the left. Raises
        PortraitError as `find` does.
        """
        photo = self.named(photo, field)
        image, _ = decode_photo(self._bytes(photo, field), field, self.limits)
        height, width = image.shape[:2]
        boxes = heads(image) or [tuple(found.face.box.tolist()) for found in self.find(photo, field)]
        return [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in boxes], (width, height)

    def named(self, photo: Photo, field: str) -> Photo:
        """The photo by its whole hash, where it is kept and only the hash's first digits were given.

        Raises PortraitError naming `field` where several photos are kept that these digits begin.
        """
        if len(photo.sha256) == 64:
            return photo
        found = self.photos.beginning(photo.sha256)
        if len(found) > 1:
            raise PortraitError(
                field,
                f"sha256:{photo.sha256} begins the hashes of {len(found)} photos kept here",
                "Give more digits of the hash (up to 64), or the photo itself.",
            )
        return replace(photo, sha256=found[0]) if found else photo

    def drop(self) -> None:
        """Forgets everything, in memory and on disk: photos, faces, features, the loaded detector."""
        with self._lock:
            self.photos.clear()
            self._features.clear()
            self._found.clear()
            self._masked.clear()
            self._detector = self._parser = None

    def _upright(self, photo: Photo, field: str) -> tuple[np.ndarray, np.ndarray]:
        """The photo (H, W, 3) turned so that its people stand upright, and in its pixels the landmarks (5, 2) of the
        face that its `face` chooses."""
        chosen = self.chosen(photo, field)
        if photo.aligned:
            return chosen.crop, template()
        image, _ = decode_photo(self._bytes(self.named(photo, field), field), field, self.limits)
        quarters = chosen.turn // 90
        upright = turned(image, quarters)
        return upright, turned_back(chosen.face, -quarters, upright.shape[1], upright.shape[0]).landmarks

    def _face_parser(self) -> tuple[ParseNet | None, object]:
        """The parser, None where its weights are not there, and what changes when their file does."""
        path = self._parser_file()
        if path is None:
            return None, None
        stat = path.stat()
        made_by = (str(path), stat.st_size, stat.st_mtime_ns)
        if self._parser is None or self._parser[1] != made_by:
            self._parser = parser_from_state_dict(read_tensors(path, "parser").tensors, path.name), made_by
        return self._parser

    def _how(self, photo: Photo) -> str:
        """What decides the crop of a photo besides its bytes. No detector is needed for one aligned already."""
        if photo.aligned:
            return "aligned"
        return f"{self.detector.key} {RULES}{' filtered' if self.filter_crops else ''}"

    def _aligned(self, photo: Photo, field: str) -> list[FoundFace]:
        image, notices = decode_photo(self._bytes(photo, field), field, self.limits)
        try:
            crop = fit_aligned(image)
        except ValueError as error:
            raise PortraitError(
                field, f"{error}, but an aligned crop is square", "Crop it square, or do not mark it aligned."
            ) from None
        size = crop.shape[0]
        return [FoundFace(Face(np.array([0, 0, size, size], np.float32), template(size), 1.0), crop, notices)]

    def _detected(self, photo: Photo, field: str) -> list[FoundFace]:
        image, notices = decode_photo(self._bytes(photo, field), field, self.limits)
        detector = self.detector
        try:
            turn, faces = detect_in_photo(image, detector)
        except PortraitError:
            raise
        except Exception as error:
            raise PortraitError(
                field,
                f"the face detector {detector.name} failed on it ({type(error).__name__}: {str(error)[:200]})",
                "Crop the photo around the face, use another one, or choose another detector.",
                status_code=500,
            ) from error
        if not faces:
            raise PortraitError(
                field,
                "no face was found",
                "It was turned all four ways. "
                "Use a photo where the face is large, sharp and seen from the front, or mark a face crop as aligned.",
            )
        height, width = image.shape[:2]
        upright = turned(image, turn)
        size = (upright.shape[1], upright.shape[0])
        crops = [align_face(upright, face.landmarks, filtered=self.filter_crops) for face in faces]
        return [
            FoundFace(
                turned_back(faces[index], turn, width, height),
                crops[index],
                (*notices, *order.notices(faces[index], why, turn, size)),
                90 * turn,
                bool(why),
            )
            for index, why in order.counted(faces, crops, size)
        ]

    def _bytes(self, photo: Photo, field: str) -> bytes:
        if photo.data is not None:
            self._keep(photo)
            return photo.data
        data = self.photos.get(photo.sha256)
        if data is None:
            raise PortraitError(
                field,
                f"the photo sha256:{photo.sha256[:12]}... is not kept here (any more)",
                "Add the photo itself again.",
            )
        return data

    def _keep(self, photo: Photo) -> None:
        """Keeps the bytes that came with a request, so that a later one can name them by hash alone."""
        data = photo.data
        if data is not None and len(data) <= self.limits.photo_bytes and not self.photos.touch(photo.sha256):
            self.photos.put(data)
