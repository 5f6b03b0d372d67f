"""Faces of shards, aligned as at inference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_portrait.faces.alignment import CROP_SIZE, align_face, similarity, template
from trainer.shards import FaceRecord, Shards

# Detectors miss the true points by a few hundredths of the distance between the eyes.
JITTER = 0.04


@dataclass(frozen=True)
class ShardFace:
    """Face number `face` of sample number `sample`."""

    sample: int
    face: int
    record: FaceRecord


def faces_of(shards: Shards, smallest: float = 0.0) -> tuple[list[ShardFace], int]:
    """All faces whose box is at least `smallest` pixels wide, and how many records could not be read."""
    found, unreadable = [], 0
    for sample in range(len(shards)):
        try:
            record = shards.record(sample)
        except ValueError:
            unreadable += 1
            continue
        found += [
            ShardFace(sample, number, face)
            for number, face in enumerate(record.faces)
            if face.box[2] - face.box[0] >= smallest
        ]
    return found, unreadable


def by_identity(faces: list[ShardFace], least: int = 1) -> dict[str, list[ShardFace]]:
    """Labelled faces by who it is, sorted by name; identities with fewer than `least` pictures are left out."""
    groups: dict[str, list[ShardFace]] = defaultdict(list)
    for face in faces:
        if face.record.id is not None:
            groups[face.record.id].append(face)
    return {name: groups[name] for name in sorted(groups) if len(groups[name]) >= least}


def aligned(
    picture: NDArray[np.uint8], record: FaceRecord, size: int, rng: np.random.Generator | None = None
) -> NDArray[np.uint8]:
    """The face on the ArcFace template, (size, size, 3) uint8; with `rng` as if a detector had found its landmarks."""
    landmarks = np.array(record.landmarks, np.float32)
    if rng is not None:
        eyes = float(np.linalg.norm(landmarks[0] - landmarks[1]))
        landmarks = landmarks + rng.normal(0, JITTER * max(eyes, 1.0), (5, 2)).astype(np.float32)
    return align_face(picture, landmarks, size)


def crop_to(landmarks: NDArray[np.float32], picture: Sequence[int]) -> Tensor:
    """Where the aligned face lies: takes places (x, y, 1) of its crop to places in the picture, both in [0, 1]: (2, 3).

    landmarks (5, 2) in pixels. picture: width and height in pixels.
    """
    from_crop = cv2.invertAffineTransform(similarity(landmarks, template()))
    # Both count pixels from the middle of the first one, and [0, 1] begins at its edge.
    shift = 0.5 - from_crop[:, :2].sum(axis=1) / 2
    in_pixels = np.column_stack([from_crop[:, :2] * CROP_SIZE, from_crop[:, 2] + shift])
    return torch.from_numpy(in_pixels / np.array(picture)[:, None]).float()


def region_of(record: FaceRecord, picture: Sequence[int], latent: Sequence[int]) -> Tensor:
    """The part of each latent position that the face's box covers, in [0, 1]: (h, w).

    picture: width and height in pixels, which the box is in. latent: (h, w).
    """
    (width, height), (h, w) = picture, latent
    x0, y0, x1, y1 = record.box
    across = _coverage(x0 * w / width, x1 * w / width, w)
    down = _coverage(y0 * h / height, y1 * h / height, h)
    return down[:, None] * across[None, :]


def _coverage(low: float, high: float, cells: int) -> Tensor:
    """How much of each of `cells` unit intervals lies between low and high."""
    edges = torch.arange(cells + 1.0)
    return (edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)).clamp(0, 1)
