"""A face recognition network of the IR layout, trained with CurricularFace on labelled faces.

`--network conditioning` is the one whose features adapters read, `--network measuring` another one, which only ever
measures. On faces of the world `--factors` adds a second task, to tell the person's factors (jaw, eye colour, ...):
with that truth a tenth of the faces is enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from lib_portrait.checkpoints.formats import write_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import pixels_of, recognition_view
from trainer.architectures import EMBEDDING, world_measuring, world_recognition
from trainer.draws import Draws
from trainer.faces import aligned, by_identity, faces_of
from trainer.loop import Recipe
from trainer.losses import CurricularFace
from trainer.shards import Shards
from trainer.world import FACTORS, world_person
from trainer.world.people import MOLES

NETWORKS = {"conditioning": world_recognition, "measuring": world_measuring}
# A face narrower than this (pixels of the box) says little about who it is.
SMALLEST = 18.0
# Faces of made pictures are softer than those of photographs: up to this much smaller, and back.
COARSEST = 0.5


class LabelledFaces:
    """Aligned faces: "face" (3, size, size) in [-1, 1], "identity" its class; asked for, the person's "factors" (F)."""

    def __init__(self, shards: Shards, size: int, factors: bool = False):
        faces, _ = faces_of(shards, SMALLEST)
        groups = by_identity(faces, least=2)
        if len(groups) < 2:
            raise PortraitError(
                "data",
                f"only {len(groups)} identities have two faces or more",
                "Label the faces: portrait.py dataset photos with a folder for each person.",
            )
        self.shards, self.size, self.classes = shards, size, len(groups)
        self.factors = [_factors(name) for name in groups] if factors else None
        self.faces = [(face, number) for number, group in enumerate(groups.values()) for face in group]

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        face, number = self.faces[index]
        rng = np.random.default_rng(seed)
        crop = aligned(self.shards.picture(face.sample), face.record, 2 * self.size, rng)
        if rng.random() < 0.5:
            side = round(len(crop) * rng.uniform(COARSEST / 2, 1))
            crop = cv2.resize(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA), crop.shape[:2])
        view = recognition_view(pixels_of([crop]), self.size)[0]
        sample = {"face": view, "identity": torch.tensor(number)}
        return sample if self.factors is None else {**sample, "factors": self.factors[number]}


def _factors(name: str) -> Tensor:
    """Who somebody of the world is, as numbers in [0, 1]: the factors, the class word, how many moles."""
    if not name.isdigit():
        raise PortraitError("factors", f"{name!r} is nobody of the world", "Leave --factors away.")
    person = world_person(int(name))
    values = [getattr(person, factor) for factor in FACTORS]
    return torch.tensor([*values, float(person.woman), len(person.moles) / MOLES])


class RecognitionRecipe(Recipe):
    """See the module."""

    def __init__(self, data: Path, network: str, factors: float = 0.0, side: int | None = None):
        super().__init__()
        self.name = f"recognition {network}"
        self.kind = network
        self.network = NETWORKS[network]() if side is None else NETWORKS[network](side)
        self.data = LabelledFaces(Shards.under(data), self.network.image_size, factors > 0)
        self.head = CurricularFace(EMBEDDING, self.data.classes, margin=0.4, scale=32.0)
        self.factors = factors
        if self.data.factors is not None:
            self.tell = nn.Linear(EMBEDDING, len(self.data.factors[0]))

    def samples(self) -> LabelledFaces:
        return self.data

    def tables(self) -> list[Tensor]:
        return [*super().tables(), self.head.weight]

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        embeddings, _ = self.network(batch["face"])
        loss, right = self.head(embeddings, batch["identity"])
        losses = {"loss": loss, "margin": loss, "right": right, "t": self.head.t.clone()}
        if self.factors > 0:
            told = (self.tell(embeddings) - batch["factors"]).square().mean()
            losses |= {"loss": loss + self.factors * told, "factors": told}
        return losses

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """world-recognition.safetensors or world-measuring.safetensors, in the published IR names, fp16."""
        name = {"conditioning": "world-recognition", "measuring": "world-measuring"}[self.kind]
        tensors = {
            key: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
            for key, tensor in self.network.state_dict().items()
        }
        write_tensors(folder / f"{name}.safetensors", tensors, facts)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=sorted(NETWORKS), default="conditioning")
    parser.add_argument(
        "--factors", type=float, default=0.0, help="the world only: weight of telling a person's factors"
    )
    parser.add_argument(
        "--side", type=int, help="of the faces it sees, a multiple of 16; default 80, and 64 to measure, for 128 px"
    )


def build(options: argparse.Namespace) -> Recipe:
    return RecognitionRecipe(options.data, options.network, options.factors, options.side)
