"""The network that finds the faces of drawn people, for `portrait.py evaluate`. Needs no other network.

Every cell of a 16 x 16 grid says whether a face's middle lies in it, and where the face's box and landmarks are; focal
loss (arXiv 1708.02002) for the first, absolute difference for the others, as in single-stage detectors.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_portrait.faces.heatmap_detector import CHANNELS, UNIT, DetectorNetwork, centres
from lib_portrait.faces.trunk import GRID, SIDE, STRIDE
from trainer.draws import Draws
from trainer.loop import Recipe
from trainer.recipes.attributes import degraded
from trainer.shards import Shards

# Pictures are shown this much smaller to larger, and shifted by up to this share of their side.
ZOOM, SHIFT = (0.75, 1.3), 0.12
MIRRORED = (1, 0, 2, 4, 3)
GAMMA, BALANCE = 2.0, 0.5
GREY = (128, 128, 128)


class DetectionDataset:
    """ "pixels" (3, 128, 128) in [-1, 1], "cells" (15, 16, 16) what they should say, "role" (16, 16): 1 the cell of a
    face's middle, 0 none, -1 beside one: free to say either, but bound to say right where the face is."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        image, record, rng = self.shards.picture(index), self.shards.record(index), np.random.default_rng(seed)
        points = np.array([[*face.box, *np.ravel(face.landmarks)] for face in record.faces], np.float64)
        points = points.reshape(len(record.faces), CHANNELS // 2, 2)
        zoom = rng.uniform(*ZOOM) * SIDE / max(image.shape[:2])
        middle = np.array(image.shape[1::-1]) / 2
        shift = SIDE / 2 - zoom * middle + rng.uniform(-SHIFT, SHIFT, 2) * SIDE
        matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
        image = cv2.warpAffine(image, matrix, (SIDE, SIDE), borderValue=GREY)
        points = points * zoom + shift
        if rng.random() < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
            points[:, :, 0] = SIDE - points[:, :, 0]
            points[:, :2] = np.stack([points[:, :2].min(axis=1), points[:, :2].max(axis=1)], axis=1)
            points[:, 2:] = points[:, 2:][:, MIRRORED]
        cells, role = targets(torch.from_numpy(points).float())
        return {"pixels": degraded(image, rng), "cells": cells, "role": role}


def targets(points: Tensor) -> tuple[Tensor, Tensor]:
    """points (F, 7, 2): corners of the box and landmarks of F faces, in pixels -> cells (15, 16, 16), role (16, 16)."""
    cells, role = torch.zeros(CHANNELS, GRID, GRID), torch.zeros(GRID, GRID, dtype=torch.long)
    middles = points[:, 2:].mean(dim=1)
    own = (middles / STRIDE).floor().long()
    inside = ((own >= 0) & (own < GRID)).all(dim=1)
    for face in inside.nonzero()[:, 0].tolist():
        column, row = own[face].tolist()
        rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        # A cell beside two faces belongs to the one that comes later, which stands in front.
        offsets = points[face].reshape(-1, 1, 1) - centres().repeat(CHANNELS // 2, 1, 1)
        cells[1:, rows, columns] = offsets[:, rows, columns] / UNIT
        role[rows, columns] = torch.where(role[rows, columns] == 1, 1, -1)
        role[row, column] = 1
    cells[0] = (role == 1).float()
    return cells, role


class DetectorRecipe(Recipe):
    """See the module."""

    name = "detector"

    def __init__(self, data: Path):
        super().__init__()
        self.data = DetectionDataset(Shards.under(data))
        self.network = DetectorNetwork().to(memory_format=torch.channels_last)

    def samples(self) -> DetectionDataset:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        predicted = self.network(batch["pixels"].contiguous(memory_format=torch.channels_last)).float()
        wanted, role = batch["cells"], batch["role"]
        faces = (role == 1).sum().clamp(min=1)
        score, truth = predicted[:, 0], wanted[:, 0]
        wrong = torch.where(truth > 0, 1 - score.sigmoid(), score.sigmoid())
        entropy = F.binary_cross_entropy_with_logits(score, truth, reduction="none")
        weight = torch.where(truth > 0, BALANCE, 1 - BALANCE) * (role >= 0)
        found = (weight * wrong**GAMMA * entropy).sum() / faces
        near = role != 0
        place = F.smooth_l1_loss(predicted[:, 1:], wanted[:, 1:], beta=0.05, reduction="none").sum(dim=1)
        placed = (place * near).sum() / near.sum().clamp(min=1)
        right = ((score > 0) == (truth > 0))[role >= 0].float().mean()
        return {"loss": 4 * found + placed, "found": found, "placed": placed, "right": right}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """world-detector.safetensors."""
        self.network.save(folder / "world-detector.safetensors", facts)


def configure(parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def build(options: argparse.Namespace) -> Recipe:
    return DetectorRecipe(options.data)
