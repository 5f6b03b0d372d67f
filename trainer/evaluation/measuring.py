"""From pictures to what was seen in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import Detector
from lib_portrait.standalone.measuring import greedy_pairs, owner, recognised_people
from trainer.attribute_network import AttributeNetwork
from trainer.evaluation.artist import Pool
from trainer.evaluation.instruments import Clip, Recogniser, embedding_of, faces_of
from trainer.evaluation.metrics import multisim, rank
from trainer.evaluation.people import Image, Population
from trainer.evaluation.plans import Shot
from trainer.world.attributes import Attributes

Floats = NDArray[np.floating]
CLIP, FACE = "clip", "face"
BATCH = 32


@dataclass(frozen=True)
class Instruments:
    """detector and recogniser measure identity, clip and attributes the prompt. fid: whose features FID compares, CLIP
    or FACE. attributes: None where there is no network for the kind of pictures."""

    detector: Detector
    recogniser: Recogniser
    clip: Clip
    attributes: AttributeNetwork | None
    fid: str = CLIP

    @property
    def features(self) -> str:
        """What the features of FID are, for people."""
        if self.fid == FACE:
            return f"embeddings of the largest face by {self.recogniser.name}"
        return f"pooled features of {self.clip.name}"


@dataclass(frozen=True)
class Seen:
    """What was seen in one picture of one or several people, in the order of `Shot.people`.

    faces: how many were found. similarity: of each person's face to their reference, None where no face was left for
    them. ranks: place of that person among the people of the gallery, from 1. between: similarity of the two people's
    faces to each other. clip_t: cosine of picture and prompt. shown: whether each attribute that the prompt states is
    there. features (d) for FID, None where there is no face to take them from. recognised: whether each person has a
    face that is most similar to them among the picture's people. placed: whether the centre of each
    one's face lies where the picture was routed to them; None where nobody knows how it was routed.
    """

    faces: int
    similarity: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    between: float | None
    clip_t: float | None
    shown: dict[str, bool]
    features: Floats | None = field(repr=False, compare=False)
    recognised: tuple[bool, ...] = ()
    placed: tuple[bool, ...] | None = None

    @property
    def lowest(self) -> float:
        """The lowest similarity of all people, a missing face counting 0 (FastComposer)."""
        return min(value or 0.0 for value in self.similarity)

    @property
    def multisim(self) -> float | None:
        return multisim(self.similarity, self.between) if len(self.similarity) == 2 else None

    @property
    def shows_everybody(self) -> bool:
        """Whether each person has a face of their own that is more similar to them than to the picture's others.

        For two faces of nobody in particular that is true of about every second picture.
        """
        return all(self.recognised)

    @property
    def places_everybody(self) -> bool | None:
        """Whether that is so with each face where the picture was routed to that person; None where nobody knows."""
        return None if self.placed is None else self.shows_everybody and all(self.placed)

    def within(self, places: int) -> float:
        """Share of the people who are among the first of the gallery by their face; who has none is not."""
        return _share(place is not None and place <= places for place in self.ranks)

    @property
    def found(self) -> float:
        """Share of the people for whom there is a face."""
        return _share(value is not None for value in self.similarity)

    @property
    def accuracy(self) -> float | None:
        """Share of the stated attributes that the picture shows; None where nothing is stated or none can be told."""
        return _share(self.shown.values()) if self.shown else None

    def to_json(self) -> dict[str, Any]:
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "features"}
        return {**plain, "lowest": self.lowest, "multisim": self.multisim}


def _share(values: Any) -> float:
    told = [bool(value) for value in values]
    return sum(told) / len(told)


@dataclass(frozen=True)
class Gallery:
    """Embeddings (N, d) of the population's people: of the first reference, or of another photo."""

    embeddings: Floats

    @staticmethod
    def of(population: Population, number: int, instruments: Instruments) -> Gallery:
        """Photo `number` of everybody. Raises PortraitError for a photo in which no face is found."""
        embeddings = []
        for place, person in enumerate(population.people):
            embedding = embedding_of(population.photo(place, number), instruments.recogniser, instruments.detector)
            if embedding is None:
                raise PortraitError(
                    "people", f"no face was found in a photo of {person.name}", "Use another photo, or leave them out."
                )
            embeddings.append(embedding)
        return Gallery(np.stack(embeddings))


def measure(
    paths: Sequence[Path],
    shots: Sequence[Shot],
    gallery: Gallery,
    instruments: Instruments,
    obeys: bool,
    progress: Callable[[int], object] = lambda number: None,
) -> list[Seen]:
    """What is seen in the pictures of the shots. obeys: whether they were made to show what the prompts say."""
    clip = instruments.clip
    captions = sorted({shot.text for shot in shots})
    texts: dict[str, Floats] = {}
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        texts.update(zip(part, clip.texts(part)))
    seen = []
    for start in range(0, len(paths), BATCH):
        images = [Pool.read(path) for path in paths[start : start + BATCH]]
        embeddings, features = clip.pictures(images)
        told = instruments.attributes.tell(images) if instruments.attributes is not None and obeys else None
        for place, (image, shot, path) in enumerate(zip(images, shots[start:], paths[start:])):
            seen.append(
                _seen(
                    image,
                    shot.people,
                    gallery,
                    instruments,
                    float(embeddings[place] @ texts[shot.text]) if obeys else None,
                    agreement(shot.attributes, told[place]) if told is not None else {},
                    features[place],
                    Pool.owners(path),
                )
            )
        progress(len(images))
    return seen


def _seen(
    image: Image,
    people: Sequence[int],
    gallery: Gallery,
    instruments: Instruments,
    clip_t: float | None,
    shown: dict[str, bool],
    features: Floats | None,
    owners: Tensor | None,
) -> Seen:
    faces = faces_of(image, instruments.detector)
    similarity: list[float | None] = [None] * len(people)
    ranks: list[int | None] = [None] * len(people)
    recognised = (False,) * len(people)
    placed = [False] * len(people)
    between, embeddings = None, None
    if faces:
        embeddings = instruments.recogniser.embed(image, faces)
        similar = embeddings @ gallery.embeddings[list(people)].T
        pairs = greedy_pairs(torch.from_numpy(similar))
        recognised = recognised_people(torch.from_numpy(similar), pairs)
        for place, face in pairs.items():
            similarity[place] = float(similar[face, place])
            ranks[place] = rank(embeddings[face], gallery.embeddings, people[place])
            placed[place] = owners is not None and owner(faces[face], image.shape[:2], owners) == place
        if len(people) == 2 and len(pairs) == 2:
            between = float(embeddings[pairs[0]] @ embeddings[pairs[1]])
    if instruments.fid == FACE:
        largest = max(range(len(faces)), key=lambda number: faces[number].area, default=None)
        features = None if largest is None or embeddings is None else embeddings[largest]
    return Seen(
        len(faces),
        tuple(similarity),
        tuple(ranks),
        between,
        clip_t,
        shown,
        features,
        recognised,
        None if owners is None else tuple(placed),
    )


def agreement(stated: Attributes, told: Attributes) -> dict[str, bool]:
    """For each attribute that a caption states and the network knows: whether the picture shows it."""
    return {name: told[name] == value for name, value in stated.items() if name in told}
