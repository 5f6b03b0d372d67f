"""What generates the pictures, and the cache that keeps them: of the same settings a picture is generated once."""

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
from lib_portrait.attention.regions import Box, coverage
from lib_portrait.conditioning import Conditioner
from lib_portrait.faces.features import Encoder, FaceFeatures
from lib_portrait.faces.recognition import Backbone
from lib_portrait.faces.service import FaceService
from lib_portrait.guidance.reference import GuidedStep
from lib_portrait.methods.base import Person
from lib_portrait.methods.declarations import declaration
from lib_portrait.options import Option, Value
from lib_portrait.request import Identity, Photo, PortraitRequest, Region, to_json
from lib_portrait.standalone import sampling
from lib_portrait.standalone.control import KitControls
from lib_portrait.standalone.measuring import owners_of
from lib_portrait.standalone.model import Model
from lib_portrait.standalone.sampling import Sampling
from trainer.evaluation.layouts import layout_of
from trainer.evaluation.plans import Sample, Variant
from trainer.evaluation.populations import Population
from trainer.features import global_feature
from trainer.world.render import Image

# How many different layouts there are.
LAYOUTS = 2**31
# The entry of a picture's file that says to whom its parts were routed.
OWNERS = "routing"
# The entry that says on whom of its people reference guidance acted.
GUIDED = "guided"


@dataclass(frozen=True)
class Generated:
    """A picture (H, W, 3) uint8.

    owners: of several people whom each of its parts was routed to (`owners_of`); where all have regions and nothing is
    routed, whose region it is. guided: whether reference guidance acted on each person at some step; None without it.
    """

    image: Image
    owners: Tensor | None = None
    guided: tuple[bool, ...] | None = None


class Generator(Protocol):
    """Generates pictures with one checkpoint and one adapter. method: the adapter's. finder: tells which detector finds
    the faces in photos and for reference guidance."""

    method: str

    @property
    def finder(self) -> str: ...

    def weights(self, people: int) -> Mapping[str, str]:
        """Hashes, by role, of all files that decide a picture with so many injected people."""

    def resolved(self, request: PortraitRequest) -> PortraitRequest:
        """The request with all that the adapter's kit says of reference guidance where the request leaves it open."""

    def generate(
        self, samplings: Sequence[Sampling], request: PortraitRequest | None, pose: Image | None = None
    ) -> list[Generated]:
        """The pictures as one batch, with the request's people in each, or nobody.

        pose: skeletons of the pictures' size, for methods with a ControlNet. Where reference guidance does not find
        somebody, the picture is one without it.
        """


class GlobalFeatureService(FaceService):
    """Faces for an adapter that was trained on the global feature (Table 3), which inference does not offer."""

    backbone: Backbone

    def features(self, photo: Photo, field: str, encoder: Encoder) -> FaceFeatures:
        local = super().features(photo, field, encoder)
        return dataclasses.replace(local, intrinsic=global_feature(self.backbone, local.intrinsic[None]))

    def zero(self, encoder: Encoder) -> FaceFeatures:
        unconditional = super().zero(encoder)
        last = cast(nn.Linear, self.backbone.output_layer[3])
        return dataclasses.replace(unconditional, intrinsic=torch.zeros(1, last.out_features))


class StandaloneGenerator:
    """Generation without the WebUI. hashes: of the checkpoint and its description, by role. base: the checkpoint's
    file."""

    def __init__(
        self,
        model: Model,
        hashes: Mapping[str, str],
        conditioner: Conditioner | None,
        name: str = "",
        method: str = "",
        base: Path | None = None,
    ):
        """conditioner, name, method: what makes conditions of requests, the adapter's name and its method; None where
        nobody is injected."""
        self.model, self.hashes, self.conditioner = model, dict(hashes), conditioner
        self.name, self.method, self.base = name, method, base
        self._prepared: tuple[object, Any] = (None, None)
        self._controls = KitControls()

    @property
    def finder(self) -> str:
        return self.conditioner.faces.detector.key if self.conditioner is not None else ""

    def weights(self, people: int) -> dict[str, str]:
        if self.conditioner is None or not people or not declaration(self.method).has_adapter:
            return self.hashes
        kit = self.conditioner.store.kit(self.name, self.method)
        kit.check_people(people)
        # What several people need is not read for one.
        unread = {part.role for files in self.conditioner.store.methods for part in files.parts if part.people > people}
        files = {role: path for role, path in kit.files.items() if role not in unread}
        control = kit.manifest.control if kit.manifest is not None else None
        hashes = {"control": str(control.sha256)} if control is not None else {}
        return {**self.hashes, **hashes, **{role: self.conditioner.store.sha256(path) for role, path in files.items()}}

    def resolved(self, request: PortraitRequest) -> PortraitRequest:
        if self.conditioner is None:
            return request
        resolved = self.conditioner.resolved(replace(request, checkpoint=self.name), self.base)
        return replace(resolved, checkpoint=request.checkpoint)

    def generate(
        self, samplings: Sequence[Sampling], request: PortraitRequest | None, pose: Image | None = None
    ) -> list[Generated]:
        conditioning, routing = None, None
        control: dict[str, Any] = {}
        steps: list[GuidedStep] | None = None
        if request is not None and self.conditioner is not None:
            size, request = (samplings[0].width, samplings[0].height), replace(request, checkpoint=self.name)
            if self._prepared[0] != (request, size):
                prepared = self.conditioner.prepare(request, size, self.model.device, base=self.base)
                self._prepared = (request, size), prepared
            conditioning = self._prepared[1]
            routing = RoutingMaps() if len(request.identities) > 1 else None
            if pose is not None:
                store = self.conditioner.store
                control = {"control": self._controls.control(conditioning, store, self.model, pose, "pose")}
            if request.guidance.enabled:
                done = steps = []
                control |= {"guided": lambda of_batch, notices: done.extend(of_batch), "must_act": False}
        drawn = sampling.sample(self.model, samplings, conditioning, routing, **control)
        images = [np.asarray(image, np.uint8) for image in drawn]
        mean = routing.mean() if routing is not None else None
        if mean is None and routing is not None and conditioning is not None:
            mean = _places(conditioning.people, samplings[0])
            mean = None if mean is None else mean.expand(len(images), -1, -1, -1)
        return [
            Generated(
                image,
                None if mean is None else owners_of(mean[row]),
                None if steps is None else _acted([step for step in steps if step.picture == row], request),
            )
            for row, image in enumerate(images)
        ]


def _acted(steps: Sequence[GuidedStep], request: PortraitRequest | None) -> tuple[bool, ...]:
    """Whether any of a picture's steps was guided by each of the request's people."""
    count = len(request.identities) if request is not None else 0
    return tuple(any(step.similarity[person] is not None for step in steps) for person in range(count))


def _places(people: Sequence[Person], sampling: Sampling) -> Tensor | None:
    """Whose region each part of a picture is in, (1, N, h, w); None where somebody has none."""
    regions = [person.region for person in people if person.region is not None]
    if len(regions) < len(people):
        return None
    shape = (sampling.height // 8, sampling.width // 8)
    return torch.stack([coverage(region, shape) for region in regions])[None]


class PictureCache:
    """Pictures on disk under the hash of all that decides them. A picture appears under its name only when whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.written = 0

    def path(self, facts: Mapping[str, Any]) -> Path:
        """Where the picture with these facts lies, once it is there."""
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.png"

    def put(
        self,
        image: Image,
        facts: Mapping[str, Any],
        owners: Tensor | None = None,
        guided: Sequence[bool] | None = None,
    ) -> None:
        """owners, guided: see `Generated`; they go into the file as rows of digits."""
        path = self.path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = PngInfo()
        text.add_itxt("portrait", json.dumps(facts, sort_keys=True))
        if owners is not None:
            rows = ["".join("." if who < 0 else str(who) for who in row) for row in owners.tolist()]
            text.add_text(OWNERS, "\n".join(rows))
        if guided is not None:
            text.add_text(GUIDED, "".join(str(int(acted)) for acted in guided))
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        PILImage.fromarray(image).save(part, "PNG", pnginfo=text)
        os.replace(part, path)
        self.written += 1

    @staticmethod
    def read(path: Path) -> Image:
        with PILImage.open(path) as picture:
            return np.asarray(picture.convert("RGB"), np.uint8)

    @staticmethod
    def read_owners(path: Path) -> Tensor | None:
        """To whom the parts of a cached picture were routed; None where the file does not say."""
        with PILImage.open(path) as picture:
            text = picture.info.get(OWNERS)
        if text is None:
            return None
        return torch.tensor([[-1 if who == "." else int(who) for who in row] for row in text.splitlines()])

    @staticmethod
    def read_guided(path: Path) -> tuple[bool, ...] | None:
        """On whom of a cached picture's people reference guidance acted; None where the file does not say."""
        with PILImage.open(path) as picture:
            text = picture.info.get(GUIDED)
        return None if text is None else tuple(digit == "1" for digit in text)


@dataclass(frozen=True)
class SamplingSettings:
    """What is the same for all pictures: see `Sampling` and `PortraitRequest`. size: side in pixels.

    scale: for methods that declare one. options: of the adapters' methods, beside it, by name.
    """

    size: int
    steps: int
    guidance: float = 5.0
    sampler: str = "ddim"
    negative_prompt: str = ""
    scale: float = 0.7
    batch: int = 8
    options: Mapping[str, Value] = field(default_factory=dict)


class SampleProvider:
    """Provides the samples of a plan's variants: those in the cache as they are, the others generated."""

    def __init__(
        self,
        population: Population,
        generators: Mapping[str | None, Generator],
        settings: SamplingSettings,
        cache: PictureCache,
    ):
        """generators: by the label of their adapter; None for the one without people."""
        self.population, self.generators, self.settings, self.cache = population, generators, settings, cache

    def provide(self, variant: Variant, samples: Sequence[Sample], progress: Callable[[int], object]) -> list[Path]:
        """The files of a variant's pictures. progress: called with how many have just become ready."""
        if variant.real:
            return self.real(samples, progress)
        facts = self._facts(variant, samples)
        missing = defaultdict(list)
        for number, sample in enumerate(samples):
            if self.cache.path(facts[number]).is_file():
                progress(1)
            else:
                missing[None if variant.adapter is None else self._group(variant, sample)].append(number)
        for numbers in missing.values():
            for batch in _batches(numbers, self.settings.batch):
                pictures = self.draw(variant, [samples[number] for number in batch])
                for number, made in zip(batch, pictures, strict=True):
                    self.cache.put(made.image, facts[number], made.owners, made.guided)
                progress(len(batch))
        return [self.cache.path(one) for one in facts]

    def draw(self, variant: Variant, samples: Sequence[Sample]) -> list[Generated]:
        """Generates pictures of the same people, in the same places, as one batch, whether they are in the cache or
        not."""
        request = self._request(variant, *self._group(variant, samples[0]))
        pose = self._pose(variant, samples[0])
        shown = {} if pose is None else {"pose": pose}
        samplings = [self._sampling(sample) for sample in samples]
        return self.generators[variant.adapter].generate(samplings, request, **shown)

    def missing(self, variant: Variant, samples: Sequence[Sample]) -> int:
        """How many pictures of a variant have yet to be generated. Real ones take no time and do not count."""
        if variant.real:
            return 0
        return sum(not self.cache.path(facts).is_file() for facts in self._facts(variant, samples))

    def real(self, samples: Sequence[Sample], progress: Callable[[int], object], repeat: int = 0) -> list[Path]:
        """Real pictures of the samples' people, showing what the prompts say where the population can.

        repeat: number of the set; another one has other pictures, where the population can.
        """
        paths = []
        for sample in samples:
            names = [self.population.people[person].name for person in sample.people]
            size = self.settings.size
            facts = {
                "real": self.population.source,
                "people": names,
                "stamp": self.population.revision(sample.people),
                "prompt": sample.text,
                "seed": sample.seed,
                "again": repeat,
                "size": size,
                "version": __version__,
            }
            path = self.cache.path(facts)
            if not path.is_file():
                self.cache.put(self.population.real(sample.people, sample.prompt, sample.seed + repeat, size), facts)
            paths.append(path)
            progress(1)
        return paths

    def _facts(self, variant: Variant, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """All that decides each picture of a variant."""
        generator = self.generators[variant.adapter]
        groups = dict.fromkeys(self._group(variant, sample) for sample in samples)
        requests = {group: self._request(variant, *group) for group in groups}
        plain = {group: None if request is None else to_json(request) for group, request in requests.items()}
        injected = {group: 0 if variant.adapter is None else len(group[0]) for group in groups}
        weights = {number: dict(generator.weights(number)) for number in set(injected.values())}
        found = []
        for sample in samples:
            group, pose = self._group(variant, sample), self._pose(variant, sample)
            facts = {
                "weights": weights[injected[group]],
                "sampling": dataclasses.asdict(self._sampling(sample)),
                "request": plain[group],
                "version": __version__,
            }
            if variant.guidance.enabled:
                facts["finder"] = generator.finder
            found.append(facts if pose is None else {**facts, "pose": hashlib.sha256(pose.tobytes()).hexdigest()})
        return found

    @staticmethod
    def _group(variant: Variant, sample: Sample) -> tuple[tuple[int, ...], int]:
        """What decides a sample's request: the people, and the number of their layout where they have one."""
        return sample.people, sample.seed % LAYOUTS if variant.laid_out else 0

    def boxes(self, variant: Variant, sample: Sample) -> Sequence[Box] | None:
        """Where the faces, or people, of a sample are asked for, in shares of the picture; None where that is left
        open."""
        if variant.adapter is None:
            return None
        return _boxes(variant, *self._group(variant, sample))

    def _pose(self, variant: Variant, sample: Sample) -> Image | None:
        """What the ControlNet is shown; None for methods without."""
        if variant.adapter is None or not declaration(self.generators[variant.adapter].method).control:
            return None
        people, seed = self._group(variant, sample)
        return layout_of(seed, len(people)).picture(self.settings.size)

    def _request(self, variant: Variant, people: Sequence[int], layout: int) -> PortraitRequest | None:
        if variant.adapter is None:
            return None
        generator = self.generators[variant.adapter]
        method, count = generator.method, len(people)
        declared = declaration(method)
        # What reads no network of faces sees the photo itself, and more of it than an aligned face.
        whole = variant.whole or not declared.encoders
        found = _boxes(variant, people, layout)
        boxes: Sequence[Box | None] = [None] * count if found is None else found
        own = _values(declared.identity_options, {"structure": variant.structure, **self.settings.options})
        identities = tuple(
            Identity(
                tuple(self.population.photo(person, number).to_request(whole) for number in range(variant.photos)),
                region=Region(box) if box is not None else None,
                options=own,
            )
            for person, box in zip(people, boxes)
        )
        options = _values(declared.options, {"scale": self.settings.scale, **self.settings.options})
        request = PortraitRequest(identities, method=method, options=options, guidance=variant.guidance)
        return generator.resolved(request)

    def _sampling(self, sample: Sample) -> Sampling:
        settings = self.settings
        return Sampling(
            sample.text,
            settings.negative_prompt,
            settings.size,
            settings.size,
            settings.steps,
            settings.guidance,
            sample.seed,
            settings.sampler,
        )


def _boxes(variant: Variant, people: Sequence[int], layout: int) -> Sequence[Box] | None:
    """Where people have their places; None where they have none. layout: its number."""
    count = len(people)
    if variant.laid_out:
        return layout_of(layout, count).boxes
    if variant.sides:
        return [(place / count, 0.0, (place + 1) / count, 1.0) for place in range(count)]
    return None


def _values(declared: Sequence[Option], given: Mapping[str, Value]) -> dict[str, Value]:
    """The values of declared options: those that are given, else their defaults."""
    return {option.name: given.get(option.name, option.default) for option in declared}


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))
