"""The network that predicts a picture's attributes, for the prompt accuracy of `portrait.py evaluate`.

Trained on shards of the world: their scenes are sampled again from their seeds, which say more than captions do.
Needs no other network.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lib_portrait.faces.trunk import GRID, view
from trainer.attribute_network import HEADS, OF_THE_FACE, AttributeNetwork
from trainer.draws import Draws
from trainer.loop import Recipe
from trainer.shards import Record, Shards
from trainer.world import Scene, WorldPerson, caption, sample_scene, world_person
from trainer.world.attributes import attributes_of

UNKNOWN = -1
# Generated pictures are softer than rendered ones, and their colours are a little off.
COARSEST, SOFTENED = 0.6, 0.4
SHADE, NOISE = 0.06, 0.03
# Weight of looking at the face in the loss: without it the expression is not found within the first thousands of steps.
LOOKING = 0.2


def scene_of(record: Record) -> Scene:
    """The scene that a record of the world was drawn from. Raises ValueError for a record that is not the world's."""
    world = record.extra.get("world")
    seed = world.get("seed") if isinstance(world, dict) else None
    if not isinstance(seed, int) or any(face.id is None or not face.id.isdecimal() for face in record.faces):
        raise ValueError("it does not say which scene of the world it is")
    faces = [world_person(int(str(face.id))) for face in record.faces]
    # The record names people in drawing order; a scene is sampled from them in the order before it was shuffled.
    nobody = [replace(faces[0], number=place) for place in range(len(faces))]
    before: list[WorldPerson] = list(faces)
    for placement, person in zip(sample_scene(seed, nobody).people, faces):
        before[placement.person.number] = person
    scene = sample_scene(seed, before)
    if caption(scene).text != record.caption:
        raise ValueError("its caption is not that of its scene")
    return scene


class AttributeDataset:
    """ "pixels" (3, 128, 128) in [-1, 1], degraded as generated pictures may be, each head's class or -1, and
    "face" (16, 16): 1 where a single person's face is, 0 elsewhere."""

    def __init__(self, shards: Shards):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        record, image = self.shards.record(index), self.shards.picture(index)
        attributes = attributes_of(scene_of(record))
        pixels = degraded(image, np.random.default_rng(seed))
        cells = torch.zeros(GRID, GRID)
        if len(record.faces) == 1:
            left, top, right, bottom = (value * GRID / len(image) for value in record.faces[0].box)
            cells[int(top) : math.ceil(bottom), int(left) : math.ceil(right)] = 1
        classes = {
            name: torch.tensor(words.index(attributes[name]) if name in attributes else UNKNOWN)
            for name, words in HEADS.items()
        }
        return {"pixels": pixels, "face": cells, **classes}


def degraded(image: NDArray[Any], rng: np.random.Generator) -> Tensor:
    """The networks' view of a picture (H, W, 3) uint8, degraded at random: softened, its colours shifted, noisy."""
    sides = image.shape[1::-1]
    if rng.random() < SOFTENED:
        share = rng.uniform(COARSEST, 1)
        small = cv2.resize(image, (round(sides[0] * share), round(sides[1] * share)), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, sides, interpolation=cv2.INTER_CUBIC)
    pixels = view(image)
    gain, shift = (torch.from_numpy(rng.normal(0, SHADE, (2, 3, 1, 1))).float()).unbind()
    noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)) * rng.uniform(0, NOISE)
    return (pixels * (1 + gain) + shift + noise).clamp(-1, 1)


class AttributesRecipe(Recipe):
    """See the module."""

    name = "attributes"

    def __init__(self, data: Path):
        super().__init__()
        self.data = AttributeDataset(Shards.under(data))
        self.network = AttributeNetwork().to(memory_format=torch.channels_last)

    def samples(self) -> AttributeDataset:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last)
        mirrored = draws.rand()[:, None, None] < 0.5
        face = torch.where(mirrored, batch["face"].flip(-1), batch["face"])
        logits, looks = self.network(torch.where(mirrored[:, None], pixels.flip(-1), pixels))
        losses, right = [], {}
        for name, values in logits.items():
            known = batch[name] != UNKNOWN
            # A batch may hold nothing that a head could learn from.
            count = known.sum().clamp(min=1)
            entropy = F.cross_entropy(values, batch[name], ignore_index=UNKNOWN, reduction="sum")
            losses.append(entropy / count)
            right[name] = (values.argmax(dim=-1) == batch[name]).sum() / count
        alone = face.flatten(1).any(dim=1)
        at_face = [(looks[name].float() * face).flatten(1).sum(dim=1).clamp(min=1e-6) for name in OF_THE_FACE]
        looking = -(torch.stack(at_face).log() * alone).sum() / alone.sum().clamp(min=1)
        return {"loss": torch.stack(losses).sum() + LOOKING * looking, "looking": looking, **right}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """world-attributes.safetensors."""
        self.network.save(folder / "world-attributes.safetensors", facts)


def configure(parser: argparse.ArgumentParser) -> None:
    """It has no options of its own."""


def build(options: argparse.Namespace) -> Recipe:
    return AttributesRecipe(options.data)
