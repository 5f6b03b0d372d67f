"""The photos of one identity, as methods read them: what is asked for is computed then, and cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lib_portrait.faces.features import Encoder, FaceFeatures
    from lib_portrait.faces.parsing import MaskedPortrait
    from lib_portrait.faces.service import FaceService, FoundFace
    from lib_portrait.request import Photo


@dataclass(frozen=True)
class Reference:
    """One photo of a person. field: where it stands in the request. encoder: None for methods that read none."""

    faces: FaceService
    photo: Photo
    field: str
    encoder: Encoder | None = None

    @property
    def chosen(self) -> FoundFace:
        """The face that the photo's `face` chooses. Raises PortraitError as `FaceService.crop` does."""
        return self.faces.chosen(self.photo, self.field)

    @property
    def crop(self) -> np.ndarray:
        """The aligned crop (224, 224, 3) uint8 of that face."""
        return self.chosen.crop

    def portrait(self, size: int, face_only: bool = False) -> np.ndarray:
        """The square about that face, (size, size, 3) uint8, see `alignment.portrait`."""
        return self.faces.portrait(self.photo, self.field, size, face_only)

    def masked(self, size: int) -> MaskedPortrait:
        """The same square, and what of it is face, see `FaceService.reference`."""
        return self.faces.reference(self.photo, self.field, size)

    @property
    def features(self) -> FaceFeatures:
        """Its features. Raises PortraitError as `FaceService.features` does."""
        assert self.encoder is not None
        return self.faces.features(self.photo, self.field, self.encoder)


@dataclass(frozen=True)
class Mixed:
    """Somebody mixed into an identity. weight: the share of the identity, 0 to 1."""

    references: tuple[Reference, ...]
    weight: float


@dataclass(frozen=True)
class IdentityFaces:
    """The photos of one identity, and of those mixed into it."""

    references: tuple[Reference, ...]
    mixed: tuple[Mixed, ...] = ()

    @property
    def no_face(self) -> FaceFeatures:
        """The encoder's features of no face, see `FaceEncoder.zero`."""
        encoder = self.references[0].encoder
        assert encoder is not None
        return self.references[0].faces.zero(encoder)
