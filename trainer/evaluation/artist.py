"""Who draws the pictures, and the pool that keeps them: a picture with the same settings is never drawn twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from lib_portrait import __version__
from lib_portrait.attention import RoutingMaps
from lib_portrait.conditioning import Conditioner
from lib_portrait.faces.features import FaceEncoder, FaceFeatures
from lib_portrait.faces.recognition import Backbone
from lib_portrait.faces.service import FaceService
from lib_portrait.methods.declarations import declaration
from lib_portrait.options import Option, Value
from lib_portrait.request import Identity, Photo, PortraitRequest, Region, to_json
from lib_portrait.standalone.measuring import owners_of
from lib_portrait.standalone.model import Model
from lib_portrait.standalone.sampling import Sampling, sample
from trainer.evaluation.people import Image, Population
from trainer.evaluation.plans import Row, Shot
from trainer.features import global_feature

# The entry of a picture's file that says whose its parts are.
OWNERS = "routing"


class Artist(Protocol):
    """Draws with one checkpoint and one adapter. method: the adapter's."""

    method: str

    def weights(self, people: int) -> Mapping[str, str]:
        """Hashes, by role, of all files that decide a picture with so many injected people."""

    def draw(self, samplings: Sequence[Sampling], request: PortraitRequest | None) -> list[tuple[Image, Tensor | None]]:
        """The pictures (H, W, 3) uint8 as one batch, with the request's people in each, or nobody.

        Of several people each comes with whose its parts are (`owners_of`).
        """


class GlobalFaces(FaceService):
    """The faces of an adapter that was trained with the global feature (Table 3), which inference knows nothing of."""

    backbone: Backbone

    def features(self, photo: Photo, field: str, encoder: FaceEncoder) -> FaceFeatures:
        local = super().features(photo, field, encoder)
        return dataclasses.replace(local, intrinsic=global_feature(self.backbone, local.intrinsic[None]))

    def zero(self, encoder: FaceEncoder) -> FaceFeatures:
        nobody = super().zero(encoder)
        last = cast(nn.Linear, self.backbone.output_layer[3])
        return dataclasses.replace(nobody, intrinsic=torch.zeros(1, last.out_features))


class ModelArtist:
    """The standalone generator. hashes: of the checkpoint and its description, by role."""

    def __init__(
        self,
        model: Model,
        hashes: Mapping[str, str],
        conditioner: Conditioner | None,
        name: str = "",
        method: str = "",
    ):
        """conditioner, name, method: who makes requests ready, the name of the adapter, and its method; None where
        nobody is injected."""
        self.model, self.hashes, self.conditioner = model, dict(hashes), conditioner
        self.name, self.method = name, method
        self._prepared: tuple[object, Any] = (None, None)

    def weights(self, people: int) -> dict[str, str]:
        if self.conditioner is None or not people:
            return self.hashes
        kit = self.conditioner.store.kit(self.name, self.method)
        kit.check_people(people)
        # What several people need is not read for one.
        unread = {part.role for files in self.conditioner.store.methods for part in files.parts if part.people > people}
        files = {role: path for role, path in kit.files.items() if role not in unread}
        return {**self.hashes, **{role: self.conditioner.store.sha256(path) for role, path in files.items()}}

    def draw(self, samplings: Sequence[Sampling], request: PortraitRequest | None) -> list[tuple[Image, Tensor | None]]:
        conditioning, routing = None, None
        if request is not None and self.conditioner is not None:
            size, request = (samplings[0].width, samplings[0].height), replace(request, checkpoint=self.name)
            if self._prepared[0] != (request, size):
                self._prepared = (request, size), self.conditioner.prepare(request, size, self.model.device)
            conditioning = self._prepared[1]
            routing = RoutingMaps() if len(request.identities) > 1 else None
        images = [np.asarray(image, np.uint8) for image in sample(self.model, samplings, conditioning, routing)]
        mean = routing.mean() if routing is not None else None
        return [(image, None if mean is None else owners_of(mean[row])) for row, image in enumerate(images)]


class Pool:
    """Pictures on disk under the hash of all that decides them. A picture appears under its name only when whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.drawn = 0

    def path(self, facts: Mapping[str, Any]) -> Path:
        """Where the picture with these facts lies, once it is there."""
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.png"

    def put(self, image: Image, facts: Mapping[str, Any], owners: Tensor | None = None) -> None:
        """owners: whose the parts of the picture are (`owners_of`), which goes into its file as rows of digits."""
        path = self.path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        text.add_itxt("portrait", json.dumps(facts, sort_keys=True))
        if owners is not None:
            rows = ["".join("." if who < 0 else str(who) for who in row) for row in owners.tolist()]
            text.add_text(OWNERS, "\n".join(rows))
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        PILImage.fromarray(image).save(part, "PNG", pnginfo=text)
        os.replace(part, path)
        self.drawn += 1

    @staticmethod
    def read(path: Path) -> Image:
        with PILImage.open(path) as picture:
            return np.asarray(picture.convert("RGB"), np.uint8)

    @staticmethod
    def owners(path: Path) -> Tensor | None:
        """Whose the parts of a picture of the pool are; None where that was not noted."""
        with PILImage.open(path) as picture:
            text = picture.info.get(OWNERS)
        if text is None:
            return None
        return torch.tensor([[-1 if who == "." else int(who) for who in row] for row in text.splitlines()])


@dataclass(frozen=True)
class Style:
    """What is the same for all pictures: see `Sampling` and `PortraitRequest`. size: side in pixels.

    scale: for methods that declare one. options: of the adapters' methods, beside, by name.
    """

    size: int
    steps: int
    guidance: float = 5.0
    sampler: str = "ddim"
    negative_prompt: str = ""
    scale: float = 0.7
    batch: int = 8
    options: Mapping[str, Value] = field(default_factory=dict)


class Studio:
    """Makes the rows of plans, out of the pool as far as the pictures are there."""

    def __init__(self, population: Population, artists: Mapping[str | None, Artist], style: Style, pool: Pool):
        """artists: by the label of their adapter; None draws without people."""
        self.population, self.artists, self.style, self.pool = population, artists, style, pool

    def make(self, row: Row, shots: Sequence[Shot], progress: Callable[[int], object]) -> list[Path]:
        """The pictures of a row, where they lie. progress: told how many pictures have just become ready."""
        if row.real:
            return self.real(shots, progress)
        artist, facts = self.artists[row.adapter], self._facts(row, shots)
        missing = defaultdict(list)
        for number, shot in enumerate(shots):
            if self.pool.path(facts[number]).is_file():
                progress(1)
            else:
                missing[None if row.adapter is None else shot.people].append(number)
        for people, numbers in missing.items():
            request = self._request(row, people) if people is not None else None
            for batch in _batches(numbers, self.style.batch):
                drawn = artist.draw([self._sampling(shots[number]) for number in batch], request)
                for number, (image, owners) in zip(batch, drawn, strict=True):
                    self.pool.put(image, facts[number], owners)
                progress(len(batch))
        return [self.pool.path(one) for one in facts]

    def missing(self, row: Row, shots: Sequence[Shot]) -> int:
        """How many pictures of a row have yet to be drawn. Real ones take no time and do not count."""
        if row.real:
            return 0
        return sum(not self.pool.path(facts).is_file() for facts in self._facts(row, shots))

    def real(self, shots: Sequence[Shot], progress: Callable[[int], object], again: int = 0) -> list[Path]:
        """Real pictures of the shots' people, showing what the prompts say where the population can.

        again: number of the set; another one has other pictures, where the population can.
        """
        paths = []
        for shot in shots:
            names = [self.population.people[person].name for person in shot.people]
            size = self.style.size
            facts = {
                "real": self.population.source,
                "people": names,
                "stamp": self.population.stamp(shot.people),
                "prompt": shot.text,
                "seed": shot.seed,
                "again": again,
                "size": size,
                "version": __version__,
            }
            path = self.pool.path(facts)
            if not path.is_file():
                self.pool.put(self.population.real(shot.people, shot.prompt, shot.seed + again, size), facts)
            paths.append(path)
            progress(1)
        return paths

    def _facts(self, row: Row, shots: Sequence[Shot]) -> list[dict[str, Any]]:
        """All that decides each picture of a row."""
        artist = self.artists[row.adapter]
        groups = dict.fromkeys(shot.people for shot in shots)
        requests = {people: self._request(row, people) for people in groups}
        plain = {people: None if request is None else to_json(request) for people, request in requests.items()}
        injected = {people: 0 if row.adapter is None else len(people) for people in groups}
        weights = {number: dict(artist.weights(number)) for number in set(injected.values())}
        return [
            {
                "weights": weights[injected[shot.people]],
                "sampling": dataclasses.asdict(self._sampling(shot)),
                "request": plain[shot.people],
                "version": __version__,
            }
            for shot in shots
        ]

    def _request(self, row: Row, people: Sequence[int]) -> PortraitRequest | None:
        if row.adapter is None:
            return None
        method = self.artists[row.adapter].method
        declared = declaration(method)
        # What reads no network of faces sees the photo itself, and more of it than an aligned face.
        whole = not declared.encoders
        own = _of(declared.identity_options, {"structure": row.structure, **self.style.options})
        identities = tuple(
            Identity(
                tuple(self.population.photo(person, number).request(whole) for number in range(row.photos)),
                region=Region((place / len(people), 0.0, (place + 1) / len(people), 1.0)) if row.sides else None,
                options=own,
            )
            for place, person in enumerate(people)
        )
        options = _of(declared.options, {"scale": self.style.scale, **self.style.options})
        return PortraitRequest(identities, method=method, options=options)

    def _sampling(self, shot: Shot) -> Sampling:
        style = self.style
        return Sampling(
            shot.text,
            style.negative_prompt,
            style.size,
            style.size,
            style.steps,
            style.guidance,
            shot.seed,
            style.sampler,
        )


def _of(declared: Sequence[Option], given: Mapping[str, Value]) -> dict[str, Value]:
    """The values of declared options: those that are given, else their defaults."""
    return {option.name: given.get(option.name, option.default) for option in declared}


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
