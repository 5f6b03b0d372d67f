"""How much a picture shows the people it was asked to show, by a face recognition network that did not condition it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import Detector, Face, detect_faces
from lib_portrait.faces.features import pixels_of, recognition_view
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict


@dataclass(frozen=True)
class FaceSimilarity:
    """Of one person in one picture: cosine similarities of identity embeddings, -1 to 1.

    own: of the face that was taken for this person's to the reference, or None where no face was left for it.
    others: of that face to the other references, the highest; None where there are none.
    recognised: whether there is such a face and, of the people whom the picture was asked to show, it is most similar
    to this one.
    placed: whether its centre lies where the picture was given to this person; None where nobody knows, or there is no
    face.
    """

    own: float | None
    others: float | None
    recognised: bool
    placed: bool | None = None


def shows_everybody(measured: Sequence[FaceSimilarity]) -> bool:
    """Whether a picture shows each person by a face of their own, where it was routed to them as far as that is known.

    Each has a face (FastComposer's greedy matching, one face a person), that face is more similar to them than to any
    other person of the picture, and its centre is not in somebody else's part.
    """
    return all(one.recognised and one.placed is not False for one in measured)


class Measurer:
    """Compares faces by a recognition network of its own."""

    def __init__(self, network: Backbone, detector: Detector):
        self.network = network
        self.detector = detector

    @staticmethod
    def load(weights: Path, detector: Detector) -> Measurer:
        """From a recognition network's file. Raises PortraitError when it is missing or something else."""
        network = backbone_from_state_dict(read_tensors(weights, "backbone").tensors, weights.name)
        # Crops come as float32, and files may be in half precision.
        return Measurer(network.float(), detector)

    @torch.no_grad()
    def embed(self, crops: Sequence[np.ndarray]) -> Tensor:
        """Identity embeddings (n, D) of unit length, of aligned faces (224, 224, 3) uint8."""
        seen = recognition_view(pixels_of(crops), self.network.image_size)
        return functional.normalize(self.network(seen)[0], dim=-1)

    def references(self, people: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """One embedding (n, D) of unit length a person: the mean over the aligned faces of that person's photos."""
        return functional.normalize(torch.stack([self.embed(own).mean(dim=0) for own in people]), dim=-1)

    def faces(self, picture: np.ndarray) -> list[Face]:
        """The faces of a picture (H, W, 3) uint8, from left to right."""
        return detect_faces(picture, self.detector)

    def similarities(
        self, picture: np.ndarray, references: Tensor, people: Sequence[int], owners: Tensor | None = None
    ) -> list[FaceSimilarity]:
        """Of each of `people` (rows of `references` (n, D)) that the picture was asked to show.

        Faces and people are paired greedily by similarity, each at most once (FastComposer, sec. 5.1).
        owners: to which of them each part of the picture was routed, see `owners_of`.
        """
        faces = self.faces(picture)
        if not faces:
            return [FaceSimilarity(None, None, False) for _ in people]
        similar = self.embed([align_face(picture, face.landmarks) for face in faces]) @ references.T
        pairs = greedy_pairs(similar[:, list(people)])
        recognised = recognised_people(similar[:, list(people)], pairs)
        measured = []
        for column, person in enumerate(people):
            face = pairs.get(column)
            if face is None:
                measured.append(FaceSimilarity(None, None, False))
                continue
            others = [float(similar[face, other]) for other in range(len(references)) if other not in people]
            measured.append(
                FaceSimilarity(
                    float(similar[face, person]),
                    max(others) if others else None,
                    recognised[column],
                    None if owners is None else owner(faces[face], picture.shape[:2], owners) == column,
                )
            )
        return measured


def recognised_people(similar: Tensor, pairs: Mapping[int, int]) -> tuple[bool, ...]:
    """Of each column (a person) whether its row (a face), in pairs {column: row}, has no higher entry than there."""
    people = range(similar.shape[1])
    return tuple(column in pairs and int(similar[pairs[column]].argmax()) == column for column in people)


def owners_of(routing: Tensor) -> Tensor:
    """The person (h, w) with the largest share of each part, -1 where nobody has one, of a routing map (N, h, w)."""
    return torch.where(routing.sum(dim=0) > 0, routing.argmax(dim=0), -1)


def owner(face: Face, size: tuple[int, int], owners: Tensor) -> int:
    """Whose the part of the picture is in which the face's centre lies; size: the picture's height and width."""
    left, top, right, bottom = face.box
    places = zip(((top + bottom) / 2, (left + right) / 2), size, owners.shape)
    row, column = (min(max(int(at / extent * cells), 0), cells - 1) for at, extent, cells in places)
    return int(owners[row, column])


def greedy_pairs(similar: Tensor) -> dict[int, int]:
    """{column: row} of a matrix (rows, columns): the highest entry, then the highest of what is left, and so on."""
    rest = similar.clone()
    pairs = {}
    for _ in range(min(rest.shape)):
        row, column = divmod(int(rest.argmax()), rest.shape[1])
        pairs[column] = row
        rest[row], rest[:, column] = -torch.inf, -torch.inf
    return pairs
