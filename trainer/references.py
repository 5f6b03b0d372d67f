"""Pictures of one person, each with another photo of that person to be seen beside it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lib_portrait.errors import PortraitError
from trainer.faces import ShardFace, by_identity, faces_of, region_of
from trainer.features import Features
from trainer.shards import Shards


class PicturesWithReferences:
    """Pictures of one person.

    "latent" (4, h, w), "caption_ids" (77); "reference" (4, s, s), the square about a face of the same person in another
    picture; "region" (h, w), the part of each latent position that the picture's face covers.
    """

    def __init__(self, shards: Shards, scale: float):
        """scale: of the latents.

        Raises PortraitError when nobody has two photos that can be used.
        """
        self.features, self.scale = Features(shards), scale
        found, _ = faces_of(shards)
        self.photos = by_identity([face for face in found if (face.sample, face.face) in self.features.references])
        alone: dict[int, list[ShardFace]] = {}
        for face in found:
            alone.setdefault(face.sample, []).append(face)
        self.faces = [group[0] for group in alone.values() if len(group) == 1 and self._others(group[0])]
        if not self.faces:
            raise PortraitError(
                "data", "nobody is alone in one picture and in another one too", "Add photos, in a folder a person."
            )

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        face, rng = self.faces[index], np.random.default_rng(seed)
        if not self.features.usable[face.sample]:
            raise ValueError("its picture cannot be used")
        others = self._others(face)
        other = others[int(rng.integers(len(others)))]
        latent = self.features.latents[face.sample].float() * self.scale
        width, height = self.features.sizes[face.sample].tolist()
        return {
            "latent": latent,
            "caption_ids": self.features.tokens[face.sample].long(),
            "reference": self.features.references[other.sample, other.face].float() * self.scale,
            "region": region_of(face.record, (width, height), latent.shape[1:]),
        }

    def _others(self, face: ShardFace) -> list[ShardFace]:
        return [photo for photo in self.photos.get(face.record.id or "", []) if photo.sample != face.sample]
