"""Pictures of people with what a control network sees of them: everybody's pose, and circles on some of the faces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lib_portrait.attention.regions import Box, grown
from lib_portrait.control_picture import Circle, skeletons, with_circles
from lib_portrait.errors import PortraitError
from trainer.faces import ShardFace, by_identity, faces_of, region_of
from trainer.features import Features
from trainer.shards import FaceRecord, Shards, poses_of


class PicturesOfFamilies:
    """Pictures of people, of whom up to `most` are told, chosen at random, in random order (InstantFamily, sec. 4.2).

    "latent" (4, h, w), "caption_ids" (77); "control" (3, H, W) uint8, the poses of all people and the circles of those
    who are told; of these "embedding" (N, e) and "intrinsic" (N, m, d), "present" (N) bool, and "shares" (N, h, w), the
    part of each latent position that the grown box of the face covers. "faces" (h, w): the part that any face covers.
    """

    def __init__(
        self,
        shards: Shards,
        scale: float,
        most: int,
        pooled: Callable[[Tensor], Tensor],
        margin: float,
        circle: Callable[[Box, int], Circle],
        other_photos: float = 0.0,
    ):
        """scale: of the latents. pooled: makes embeddings (B, e) of local features (B, m, d). margin: by which share
        boxes are grown. circle: of the n-th face with this box, in shares of the picture. other_photos: the share of
        faces that are told by another photo of the same person.

        Raises PortraitError when no picture has a face with features, or the records have no poses.
        """
        self.shards, self.scale, self.most, self.pooled = shards, scale, most, pooled
        self.margin, self.circle, self.other_photos = margin, circle, other_photos
        self.features = Features(shards)
        found = [face for face in faces_of(shards)[0] if (face.sample, face.face) in self.features.faces]
        pictures: dict[int, list[ShardFace]] = {}
        for face in found:
            pictures.setdefault(face.sample, []).append(face)
        self.pictures = list(pictures.values())
        self.photos = by_identity(found, least=2)
        if not self.pictures:
            raise PortraitError("data", "its faces have no features", "Make them: portrait.py dataset features.")
        try:
            poses_of(shards.record(self.pictures[0][0].sample))
        except ValueError as error:
            raise PortraitError(
                "data",
                f"its records have no poses ({error})",
                "Make the shards with them: portrait.py dataset world --poses, or dataset photos --keypoints FILE.",
            ) from None

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
        record, shape = self.shards.record(sample), latent.shape[1:]
        chosen = [group[i] for i in rng.permutation(len(group))[: self.most]]
        local = torch.stack([self.features.face(*self._told_by(face, rng))[0].float() for face in chosen])
        missing = self.most - len(chosen)

        def filled(part: Tensor) -> Tensor:
            return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])

        picture = torch.from_numpy(skeletons(poses_of(record), (width, height))).permute(2, 0, 1).float() / 255
        circles = [self.circle(_in_shares(face.record, width, height), i) for i, face in enumerate(chosen)]
        regions = torch.stack([region_of(face, (width, height), shape) for face in record.faces])
        return {
            "latent": latent,
            "caption_ids": self.features.tokens[sample].long(),
            "control": (with_circles(picture, circles) * 255).round().byte(),
            "embedding": filled(self.pooled(local)),
            "intrinsic": filled(local),
            "present": torch.arange(self.most) < len(chosen),
            "shares": filled(torch.stack([self._grown(face.record, (width, height), shape) for face in chosen])),
            "faces": regions.amax(dim=0),
        }

    def _grown(self, record: FaceRecord, picture: Sequence[int], latent: Sequence[int]) -> Tensor:
        x0, y0, x1, y1 = record.box
        return region_of(replace(record, box=grown((x0, y0, x1, y1), self.margin)), picture, latent)

    def _told_by(self, face: ShardFace, rng: np.random.Generator) -> tuple[int, int]:
        """Sample and number of the face whose features tell of this one: its own, or another of the same person."""
        others = [one for one in self.photos.get(face.record.id or "", []) if one.sample != face.sample]
        if rng.random() < self.other_photos and others:
            other = others[int(rng.integers(len(others)))]
            return other.sample, other.face
        return face.sample, face.face


def _in_shares(record: FaceRecord, width: int, height: int) -> Box:
    x0, y0, x1, y1 = record.box
    return x0 / width, y0 / height, x1 / width, y1 / height
