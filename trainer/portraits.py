"""The dataset that adapters are trained on: pictures of people with the features of their faces."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lib_portrait.errors import PortraitError
from trainer.faces import ShardFace, by_identity, faces_of, region_of
from trainer.features import Features
from trainer.shards import Shards

# Another photo of the same person feeds the intrinsic branch in this share of the samples (UniPortrait, sec. 3.4).
OTHER_PHOTO = 0.1


class PortraitDataset:
    """Pictures with their people.

    "latent" (4, h, w), "caption_ids" (77); for up to N people intrinsic (N, m, d), structure (N, g, d'), present (N)
    bool, who (N) a number for each person, and "regions" (N, h, w), the part of each latent position that the face's
    box covers. A face without a label is a person of its own.
    """

    def __init__(
        self, shards: Shards, scale: float, people: tuple[int, int], pooled: Callable[[Tensor], Tensor] | None = None
    ):
        """people: fewest and most of a picture. pooled: makes global features (B, d) of intrinsic ones (B, m, d').

        Raises PortraitError when no picture has that many people.
        """
        self.pooled = pooled
        self.features, self.scale, self.most = Features(shards), scale, people[1]
        self.shards = shards
        found, self.unreadable = faces_of(shards)
        pictures: dict[int, list[ShardFace]] = {}
        for face in found:
            pictures.setdefault(face.sample, []).append(face)
        self.pictures = [group for group in pictures.values() if people[0] <= len(group) <= people[1]]
        self.photos = by_identity(found, least=2)
        known = {name: number for number, name in enumerate(by_identity(found))}
        self.numbers = {
            (face.sample, face.face): len(known) + number if face.record.id is None else known[face.record.id]
            for number, face in enumerate(found)
        }
        if not self.pictures:
            raise PortraitError("data", f"no picture shows {people[0]} to {people[1]} people", "Add such pictures.")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        group, rng = self.pictures[index], np.random.default_rng(seed)
        sample = group[0].sample
        if not self.features.usable[sample]:
            raise ValueError("its picture cannot be used")
        latent = self.features.latents[sample].float() * self.scale
        width, height = self.features.sizes[sample].tolist()
        intrinsic, structure, regions = [], [], []
        for face in group:
            own = self.features.face(face.sample, face.face)
            other = self._other_photo(face, rng)
            local = (own if other is None else self.features.face(other.sample, other.face))[0]
            intrinsic.append(local if self.pooled is None else self.pooled(local[None]))
            structure.append(own[1])
            regions.append(region_of(face.record, (width, height), latent.shape[1:]))
        missing = self.most - len(group)
        who = [self.numbers[face.sample, face.face] for face in group]

        def filled(parts: list[Tensor]) -> Tensor:
            return torch.stack([*parts, *[torch.zeros_like(parts[0])] * missing]).float()

        return {
            "latent": latent,
            "caption_ids": self.features.tokens[sample].long(),
            "intrinsic": filled(intrinsic),
            "structure": filled(structure),
            "regions": filled(regions),
            "present": torch.arange(self.most) < len(group),
            "who": torch.tensor([*who, *[-1] * missing]),
        }

    def distinct_faces(self, most: int) -> tuple[Tensor, Tensor]:
        """Faces of up to `most` different people, taken evenly from all: intrinsic (K, m, d), and their numbers (K)."""
        first: dict[int, tuple[int, int]] = {}
        for place, number in self.numbers.items():
            if place in self.features.faces:
                first.setdefault(number, place)
        taken = list(first.items())[:: math.ceil(len(first) / most)]
        faces = torch.stack([self.features.face(*place)[0] for _, place in taken]).float()
        return faces, torch.tensor([number for number, _ in taken])

    def _other_photo(self, face: ShardFace, rng: np.random.Generator) -> ShardFace | None:
        """Another photo of the same person for the intrinsic branch, with probability OTHER_PHOTO (sec. 3.4)."""
        photos = self.photos.get(face.record.id or "", [])
        if rng.random() >= OTHER_PHOTO or len(photos) < 2:
            return None
        others = [photo for photo in photos if photo.sample != face.sample]
        return others[int(rng.integers(len(others)))] if others else None
