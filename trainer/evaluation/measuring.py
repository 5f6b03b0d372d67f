"""From pictures to the measurements of each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib_portrait.attention.regions import Box
from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.standalone.measuring import greedy_pairs, owner, recognised_people
from trainer.attribute_network import AttributeNetwork
from trainer.evaluation.details import FaceDetails, find_details
from trainer.evaluation.generators import PictureCache
from trainer.evaluation.instruments import Clip, Recogniser, embedding_of, find_faces
from trainer.evaluation.metrics import Floats, multisim, rank
from trainer.evaluation.plans import Sample
from trainer.evaluation.populations import Population
from trainer.world import WorldPerson
from trainer.world.attributes import Attributes
from trainer.world.render import Image

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
    def fid_features(self) -> str:
        """What the features of FID are, in words."""
        if self.fid == FACE:
            return f"embeddings of the largest face by {self.recogniser.name}"
        return f"pooled features of {self.clip.name}"


@dataclass(frozen=True)
class Measurements:
    """The measurements of one picture of one or several people, in the order of `Sample.people`.

    faces: how many were detected. similarity: of each person's face to their reference, None where no face was left for
    them. ranks: place of that person among the people of the gallery, from 1. between: similarity to each other of the
    faces of each two people, the first with the second, with the third, …, None where one has none. clip_t: cosine of
    picture and prompt. shown: whether each attribute that the prompt states is there. features (d) for FID, None where
    there is no face to take them from. recognised: whether each person has a face that is most similar to them among
    the picture's people. placed: whether the centre of each one's face lies where the picture was routed to them; None
    where it is not known how it was routed. hit: whether the centre of a face, whoever's, lies in each box that a face
    was asked for in, a face counting for one box; None where none was. guided: whether reference guidance acted on each
    person; None where there was none. details: moles and freckles of a single person of the world, whose face is there.
    """

    faces: int
    similarity: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    between: tuple[float | None, ...]
    clip_t: float | None
    shown: dict[str, bool]
    features: Floats | None = field(repr=False, compare=False)
    recognised: tuple[bool, ...] = ()
    placed: tuple[bool, ...] | None = None
    hit: tuple[bool, ...] | None = None
    guided: tuple[bool, ...] | None = None
    details: FaceDetails | None = None

    @property
    def mean(self) -> float:
        """The mean similarity of all people, a missing face counting 0."""
        return sum(value or 0.0 for value in self.similarity) / len(self.similarity)

    @property
    def lowest(self) -> float:
        """The lowest similarity of all people, a missing face counting 0 (FastComposer)."""
        return min(value or 0.0 for value in self.similarity)

    @property
    def multisim(self) -> float | None:
        return multisim(self.similarity, self.between) if len(self.similarity) > 1 else None

    @property
    def shows_everybody(self) -> bool:
        """Whether each person has a face of their own that is more similar to them than to the picture's others.

        For two faces of nobody in particular that is true of about every second picture, for more of ever fewer.
        """
        return all(self.recognised)

    @property
    def places_everybody(self) -> bool | None:
        """Whether, besides, each face lies where the picture was routed to that person; None where that is unknown."""
        return None if self.placed is None else self.shows_everybody and all(self.placed)

    @property
    def boxes_hit(self) -> float | None:
        """Share of the boxes that a face was asked for in which have one; None where none was asked for."""
        return None if self.hit is None else _share(self.hit)

    @property
    def guided_share(self) -> float | None:
        """Share of the people on whom reference guidance acted; None where there was none."""
        return None if self.guided is None else _share(self.guided)

    @property
    def moles_kept(self) -> float | None:
        """Share of the moles that should be seen which are found; None where none should be."""
        return (
            self.details.moles.found / self.details.moles.moles if self.details and self.details.moles.moles else None
        )

    @property
    def moles_elsewhere(self) -> float | None:
        """Share of the mirrored places, where the person has none, that have a mole all the same."""
        return self.details.moles.false / self.details.moles.bare if self.details and self.details.moles.bare else None

    def top_k(self, k: int) -> float:
        """Top-k identification: share of the people whose face has a rank of at most k; who has no face has no rank."""
        return _share(place is not None and place <= k for place in self.ranks)

    @property
    def detection_rate(self) -> float:
        """Share of the people for whom there is a face."""
        return _share(value is not None for value in self.similarity)

    @property
    def accuracy(self) -> float | None:
        """Share of the stated attributes that the picture shows; None where nothing is stated or predicted."""
        return _share(self.shown.values()) if self.shown else None

    def to_json(self) -> dict[str, Any]:
        plain = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "features"}
        plain["details"] = None if self.details is None else dataclasses.asdict(self.details)
        return {**plain, "lowest": self.lowest, "multisim": self.multisim}


def _share(values: Any) -> float:
    flags = [bool(value) for value in values]
    return sum(flags) / len(flags)


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
    samples: Sequence[Sample],
    gallery: Gallery,
    instruments: Instruments,
    prompted: bool,
    progress: Callable[[int], object] = lambda number: None,
    boxes: Sequence[Sequence[Box] | None] | None = None,
    drawn: Callable[[int], WorldPerson | None] = lambda person: None,
) -> list[Measurements]:
    """The measurements of the samples' pictures.

    prompted: whether these were made to show what the prompts state. boxes: of each picture where faces were asked for,
    in shares of it. drawn: see `Population.drawn`, for moles and freckles.
    """
    asked = [None] * len(samples) if boxes is None else boxes
    clip = instruments.clip
    captions = sorted({sample.text for sample in samples})
    texts: dict[str, Floats] = {}
    for start in range(0, len(captions), BATCH):
        part = captions[start : start + BATCH]
        texts.update(zip(part, clip.encode_text(part)))
    measurements = []
    for start in range(0, len(paths), BATCH):
        images = [PictureCache.read(path) for path in paths[start : start + BATCH]]
        embeddings, features = clip.encode_image(images)
        predicted = instruments.attributes.predict(images) if instruments.attributes is not None and prompted else None
        rest = zip(images, samples[start:], paths[start:], asked[start:])
        for place, (image, sample, path, own) in enumerate(rest):
            measurements.append(
                _measure_picture(
                    image,
                    sample.people,
                    gallery,
                    instruments,
                    float(embeddings[place] @ texts[sample.text]) if prompted else None,
                    agreement(sample.attributes, predicted[place]) if predicted is not None else {},
                    features[place],
                    PictureCache.read_owners(path),
                    own,
                    PictureCache.read_guided(path),
                    drawn(sample.people[0]) if len(sample.people) == 1 else None,
                )
            )
        progress(len(images))
    return measurements


def _measure_picture(
    image: Image,
    people: Sequence[int],
    gallery: Gallery,
    instruments: Instruments,
    clip_t: float | None,
    shown: dict[str, bool],
    features: Floats | None,
    owners: Tensor | None,
    boxes: Sequence[Box] | None,
    guided: tuple[bool, ...] | None,
    alone: WorldPerson | None,
) -> Measurements:
    faces = find_faces(image, instruments.detector)
    similarity: list[float | None] = [None] * len(people)
    ranks: list[int | None] = [None] * len(people)
    recognised = (False,) * len(people)
    placed = [False] * len(people)
    between: list[float | None] = [None] * math.comb(len(people), 2)
    embeddings, details = None, None
    if faces:
        embeddings = instruments.recogniser.embed(image, faces)
        similar = embeddings @ gallery.embeddings[list(people)].T
        pairs = greedy_pairs(torch.from_numpy(similar))
        recognised = recognised_people(torch.from_numpy(similar), pairs)
        for place, face in pairs.items():
            similarity[place] = float(similar[face, place])
            ranks[place] = rank(embeddings[face], gallery.embeddings, people[place])
            placed[place] = owners is not None and owner(faces[face], image.shape[:2], owners) == place
        if alone is not None and 0 in pairs:
            details = find_details(image, faces[pairs[0]].landmarks, alone)
        own = [embeddings[pairs[place]] if place in pairs else None for place in range(len(people))]
        between = [
            None if one is None or other is None else float(one @ other)
            for one, other in itertools.combinations(own, 2)
        ]
    if instruments.fid == FACE:
        largest = max(range(len(faces)), key=lambda number: faces[number].area, default=None)
        features = None if largest is None or embeddings is None else embeddings[largest]
    return Measurements(
        len(faces),
        tuple(similarity),
        tuple(ranks),
        tuple(between),
        clip_t,
        shown,
        features,
        recognised,
        None if owners is None else tuple(placed),
        None if boxes is None else boxes_hit(faces, boxes, image.shape[:2]),
        guided,
        details,
    )


def boxes_hit(faces: Sequence[Face], boxes: Sequence[Box], size: tuple[int, int]) -> tuple[bool, ...]:
    """Whether the centre of a face lies in each of the boxes, which are in shares of the picture; one that lies in
    several counts for the box whose centre is nearest. size: the picture's height and width."""
    hit = [False] * len(boxes)
    for face in faces:
        x, y = (face.box[0] + face.box[2]) / 2 / size[1], (face.box[1] + face.box[3]) / 2 / size[0]
        around = [i for i, (left, top, right, bottom) in enumerate(boxes) if left <= x <= right and top <= y <= bottom]
        if around:
            middles = {i: ((boxes[i][0] + boxes[i][2]) / 2 - x, (boxes[i][1] + boxes[i][3]) / 2 - y) for i in around}
            hit[min(middles, key=lambda i: math.hypot(*middles[i]))] = True
    return tuple(hit)


def agreement(stated: Attributes, predicted: Attributes) -> dict[str, bool]:
    """For each attribute that a caption states and the network knows: whether the picture shows it."""
    return {name: predicted[name] == value for name, value in stated.items() if name in predicted}
