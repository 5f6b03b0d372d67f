"""From a photo of a request to its faces and their features, each computed once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib_portrait.errors import NoSuchFace, Notice, PortraitError
from lib_portrait.faces.alignment import align_face, fit_aligned, template
from lib_portrait.faces.cache import FeatureCache, PhotoCache, Recent
from lib_portrait.faces.detection import Detector, Face, detect_faces, get_detector
from lib_portrait.faces.features import FaceEncoder, FaceFeatures
from lib_portrait.faces.images import decode_image, decode_mask
from lib_portrait.request import Limits, Photo


@dataclass(frozen=True)
class FoundFace:
    """A face of a photo: where it is, and its aligned crop (224, 224, 3) uint8 RGB.

    notices: what a user should know of it, each a clause without a full stop. bystander: it is far smaller or less
    sharp than the photo's main faces.
    """

    face: Face
    crop: np.ndarray
    notices: tuple[str, ...] = ()
    bystander: bool = False


class FaceService:
    """Everything a host asks about faces. One per process; calls from several threads wait for each other.

    detector_dirs: folders in which insightface's weights may lie. cache_dir: where photos and features are kept.
    detector: name of the one to use, or None for the best available (see `detection`). cache_bytes: how much photos
    (two thirds) and features (one third) may take on disk.
    """

    def __init__(
        self,
        detector_dirs: Sequence[Path],
        cache_dir: Path,
        limits: Limits | None = None,
        detector: str | None = None,
        cache_bytes: int = 2**30,
    ):
        self.limits = limits or Limits()
        self.photos = PhotoCache(Path(cache_dir) / "photos", cache_bytes * 2 // 3)
        self._features = FeatureCache(Path(cache_dir) / "features", cache_bytes // 3)
        self._found: Recent[list[FoundFace]] = Recent(32)
        self._detector_dirs = detector_dirs
        self._detector_name = detector
        self._detector: Detector | None = None
        self._lock = threading.RLock()

    @property
    def detector(self) -> Detector:
        """The detector in use. Raises PortraitError when there is none."""
        with self._lock:
            if self._detector is None:
                self._detector = get_detector(self._detector_name, self._detector_dirs)
            return self._detector

    def find(self, photo: Photo, field: str) -> list[FoundFace]:
        """All faces of a photo, left to right; of one that is aligned already, that face alone.

        Raises PortraitError naming `field`: what `decode_image` refuses, a hash of no kept photo, no face.
        """
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

    def notices(self, photo: Photo, field: str) -> list[Notice]:
        """What a user should know of the face that the photo's `face` chooses. Raises PortraitError as `crop` does."""
        return [Notice(field, text) for text in self.chosen(photo, field).notices]

    def chosen(self, photo: Photo, field: str) -> FoundFace:
        """The face that the photo's `face` chooses. Raises PortraitError as `crop` does."""
        found = self.find(photo, field)
        if photo.aligned or photo.face is None:
            return max(found, key=lambda one: one.face.area)
        if photo.face >= len(found):
            raise NoSuchFace(f"{field}.face", photo.face, len(found))
        return found[photo.face]

    def features(self, photo: Photo, field: str, encoder: FaceEncoder) -> FaceFeatures:
        """The features of the face that the photo's `face` chooses, cached. Raises as `crop` and `encode` do."""
        with self._lock:
            key = FeatureCache.key("face", photo.sha256, photo.face, photo.aligned, self._how(photo), encoder.key)
            features = self._features.get(key)
            if features is None:
                features = encoder.encode([self.crop(photo, field)])[0]
                self._features.put(key, features)
            else:
                self._keep(photo)
            return features

    def zero(self, encoder: FaceEncoder) -> FaceFeatures:
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
        return decode_mask(self._bytes(photo, field), field, self.limits)

    def drop(self) -> None:
        """Forgets everything, in memory and on disk: photos, faces, features, the loaded detector."""
        with self._lock:
            self.photos.clear()
            self._features.clear()
            self._found.clear()
            self._detector = None

    def _how(self, photo: Photo) -> str:
        """What decides the crop of a photo besides its bytes. No detector is needed for one aligned already."""
        return "aligned" if photo.aligned else self.detector.key

    def _aligned(self, photo: Photo, field: str) -> list[FoundFace]:
        image = decode_image(self._bytes(photo, field), field, self.limits)
        try:
            crop = fit_aligned(image)
        except ValueError as error:
            raise PortraitError(
                field, f"{error}, but an aligned crop is square", "Crop it square, or do not mark it aligned."
            ) from None
        size = crop.shape[0]
        return [FoundFace(Face(np.array([0, 0, size, size], np.float32), template(size), 1.0), crop)]

    def _detected(self, photo: Photo, field: str) -> list[FoundFace]:
        image = decode_image(self._bytes(photo, field), field, self.limits)
        detector = self.detector
        try:
            faces = detect_faces(image, detector)
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
                "Use a photo where the face is large, sharp and seen from the front, or mark a face crop as aligned.",
            )
        return [FoundFace(face, align_face(image, face.landmarks)) for face in faces]

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
