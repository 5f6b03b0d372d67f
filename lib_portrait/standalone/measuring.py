"""How much a picture shows the people it was asked to show, by a face recognition network that did not condition it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import Detector, detect_faces
from lib_portrait.faces.features import pixels_of, recognition_view
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict


@dataclass(frozen=True)
class Likeness:
    """Of one person in one picture: cosine similarities of identity embeddings, -1 to 1.

    own: of the face that was taken for this person's to the reference, or None where no face was left for it.
    others: of that face to the other references, the highest; None where there are none.
    """

    own: float | None
    others: float | None


class Measurer:
    """Compares faces by a recognition network of its own."""

    def __init__(self, network: Backbone, detector: Detector):
        self.network = network
        self.detector = detector

    @staticmethod
    def load(weights: Path, detector: Detector) -> Measurer:
        """From a recognition network's file. Raises PortraitError when it is missing or something else."""
        network = backbone_from_state_dict(read_tensors(weights, "backbone").tensors, weights.name)
        # Crops come as float32, and the world's file is in half precision.
        return Measurer(network.float(), detector)

    @torch.no_grad()
    def embed(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Identity embeddings (n, D) of unit length, of aligned faces (224, 224, 3) uint8."""
        seen = recognition_view(pixels_of(crops), self.network.image_size)
        return functional.normalize(self.network(seen)[0], dim=-1)

    def references(self, people: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """One embedding (n, D) of unit length a person: the mean over the aligned faces of that person's photos."""
        return functional.normalize(torch.stack([self.embed(own).mean(dim=0) for own in people]), dim=-1)

    def faces(self, picture: np.ndarray) -> list[np.ndarray]:
        """The aligned faces (224, 224, 3) uint8 of a picture (H, W, 3) uint8, from left to right."""
        return [align_face(picture, face.landmarks) for face in detect_faces(picture, self.detector)]

    def likeness(self, picture: np.ndarray, references: Tensor, people: Sequence[int]) -> list[Likeness]:
        """Of each of `people` (rows of `references` (n, D)) that the picture was asked to show.

        Faces and people are paired greedily by similarity, each at most once (FastComposer, sec. 5.1).
        """
        crops = self.faces(picture)
        if not crops:
            return [Likeness(None, None) for _ in people]
        similar = self.embed(crops) @ references.T
        pairs = greedy_pairs(similar[:, list(people)])
        measured = []
        for column, person in enumerate(people):
            face = pairs.get(column)
            if face is None:
                measured.append(Likeness(None, None))
                continue
            others = [float(similar[face, other]) for other in range(len(references)) if other not in people]
            measured.append(Likeness(float(similar[face, person]), max(others) if others else None))
        return measured


def greedy_pairs(similar: Tensor) -> dict[int, int]:
    """{column: row} of a matrix (rows, columns): the highest entry, then the highest of what is left, and so on."""
    rest = similar.clone()
    pairs = {}
    for _ in range(min(rest.shape)):
        row, column = divmod(int(rest.argmax()), rest.shape[1])
        pairs[column] = row
        rest[row], rest[:, column] = -torch.inf, -torch.inf
    return pairs
