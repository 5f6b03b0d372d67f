"""The subjects of pictures: people of the world, trained on or held out by its rule, or of a folder of photos."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import RULES, Detector, detect_in_photo, turned
from lib_portrait.faces.images import decode_image
from lib_portrait.faces.order import TURNS
from lib_portrait.request import Limits, Photo
from trainer.evaluation.layouts import scene_of
from trainer.evaluation.prompts import Prompt
from trainer.photos import find_photos, label_of
from trainer.shards import encode_png
from trainer.world import Scene, Situation, WorldPerson, held_out, render, sample_scene, world_person
from trainer.world.render import Image
from trainer.world.situations import EXPRESSIONS

TRAINED, HELD_OUT = "train", "held-out"
# Number of the photo that faces are compared with where it must be none of the references; above any number of those.
UNSEEN_PHOTO = 1000


@dataclass(frozen=True)
class Subject:
    """Somebody that pictures are made of. word: "woman", "man", or "person" where it is not known."""

    name: str
    word: str


@dataclass(frozen=True)
class SubjectPhoto:
    """A photo of one person: (H, W, 3) uint8, and the five landmarks (5, 2) where they are known."""

    image: Image
    landmarks: NDArray[np.float32] | None = None

    def to_request(self, whole: bool = False) -> Photo:
        """The photo as a request has it: aligned already where its landmarks are known, or whole."""
        if self.landmarks is None or whole:
            return Photo.of(encode_png(self.image))
        return Photo.of(encode_png(np.asarray(align_face(self.image, self.landmarks), np.uint8)), aligned=True)


class Population(ABC):
    """People with photos. `people`: first those that pictures are made of, then further ones for the gallery."""

    people: Sequence[Subject]
    source: str

    @abstractmethod
    def photo(self, person: int, number: int) -> SubjectPhoto:
        """Photo number 0, 1, … of a person, the references, or another one (UNSEEN_PHOTO). The same at every call."""

    @abstractmethod
    def real(self, people: Sequence[int], prompt: Prompt, seed: int, size: int) -> Image:
        """A real picture (H, W, 3) of these people that is none of the photos used as references."""

    @abstractmethod
    def revision(self, people: Sequence[int]) -> str:
        """A text that changes when the real pictures of these people do."""

    def drawn(self, person: int) -> WorldPerson | None:
        """What the person is drawn from; None for photographs."""
        return None

    @property
    @abstractmethod
    def follows_prompts(self) -> bool:
        """Whether `real` shows what the prompt states."""


class WorldPopulation(Population):
    """People of the procedural world; real pictures of them show just what a prompt states."""

    follows_prompts = True

    def __init__(self, kind: str, number: int, size: int):
        """kind: TRAINED or HELD_OUT, see `trainer.world.held_out`. size: of the photos, in pixels."""
        wanted = kind == HELD_OUT
        self.numbers: list[int] = []
        index = 0
        while len(self.numbers) < number:
            if held_out(index) == wanted:
                self.numbers.append(index)
            index += 1
        self.size = size
        self.people = [Subject(str(index), world_person(index).word) for index in self.numbers]
        self.source = f"{kind} people of the world"
        self._photos: dict[tuple[int, int], SubjectPhoto] = {}

    def photo(self, person: int, number: int) -> SubjectPhoto:
        if (person, number) not in self._photos:
            self._photos[person, number] = self._render(person, number)
        return self._photos[person, number]

    def _render(self, person: int, number: int) -> SubjectPhoto:
        picture = render(photograph(self.numbers[person], number), self.size)
        return SubjectPhoto(picture.image, picture.faces[0].landmarks)

    def real(self, people: Sequence[int], prompt: Prompt, seed: int, size: int) -> Image:
        scene = scene_of(seed, len(people), [world_person(self.numbers[person]) for person in people])
        return render(scene_following(scene, prompt), size).image

    def drawn(self, person: int) -> WorldPerson:
        return world_person(self.numbers[person])

    def revision(self, people: Sequence[int]) -> str:
        return ""


def photograph(index: int, number: int) -> Scene:
    """The scene of photo `number` of a person of the world: no art style, age, accessories or large turn."""
    scene = sample_scene(_seed(index, number), [world_person(index)])
    sampled = scene.people[0].situation
    plain = replace(sampled, yaw=min(max(sampled.yaw, -25), 25), hat=None, glasses=False, scarf=False)
    return replace(_with_situation(scene, plain), style="photo", blur=0.0, noise=0.0, fade=0.0)


def scene_following(scene: Scene, prompt: Prompt) -> Scene:
    """The scene with everything that the prompt states, and otherwise as it was. Garments are of a single person."""
    stated = prompt.attributes([placement.person.word for placement in scene.people])
    style, background = stated.get("style", scene.style), stated.get("background", scene.background)
    scene = replace(scene, style=style, background=background)
    if len(scene.people) > 1:
        return scene
    situation = scene.people[0].situation
    if "expression" in stated:
        smile, mouth_open, brow_raise, brow_frown, eyes_open = EXPRESSIONS[stated["expression"]]
        situation = replace(
            situation,
            expression=stated["expression"],
            smile=smile,
            mouth_open=mouth_open,
            brow_raise=brow_raise,
            brow_frown=brow_frown,
            eyes_open=eyes_open,
        )
    if "garment" in stated:
        situation = replace(situation, garment=stated["garment"], clothes_colour=stated["clothes_colour"])
    if "hat" in stated:
        situation = replace(situation, hat=stated["hat"], hat_colour=prompt.hat_colour)
    if "scarf" in stated:
        situation = replace(situation, scarf=True, scarf_colour=prompt.scarf_colour)
    return _with_situation(scene, replace(situation, glasses=situation.glasses or "glasses" in stated))


def _with_situation(scene: Scene, situation: Situation) -> Scene:
    return replace(scene, people=(replace(scene.people[0], situation=situation),))


def _seed(*numbers: int) -> int:
    """A seed far from those of training scenes."""
    return int(np.random.SeedSequence([0xE7A1, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(2)) | 1 << 61


class PhotoFolder(Population):
    """Photographs in a sub-folder for each person, turned upright; one more folder, woman or man, may say their word.

    The first photos by name are the references, the last one is none: it is what faces are compared with and what
    stands for a real picture.
    """

    follows_prompts = False

    def __init__(self, folder: Path, references: int, detector: Detector, say: Callable[[str], object] = print):
        """references: the most photos that will be given of one person. detector: decides which way is up.

        Raises PortraitError when nobody has enough.
        """
        photos: dict[tuple[str, str], list[Path]] = {}
        for name in find_photos(folder):
            who, word = label_of(name)
            if who is not None:
                photos.setdefault((who, word or "person"), []).append(folder / name)
        enough = {who: found for who, found in photos.items() if len(found) > references}
        if not enough:
            raise PortraitError(
                "people",
                f"nobody in {folder} has {references + 1} photos",
                f"Make a sub-folder for each person, with {references} photos to give and another to compare with.",
            )
        self.left_out = len(photos) - len(enough)
        self.people = [Subject(*who) for who in enough]
        self.source = f"people of {folder.name}"
        self._photos = list(enough.values())
        self._detector, self._say = detector, say
        self._turns: dict[Path, int] = {}

    def photo(self, person: int, number: int) -> SubjectPhoto:
        photos = self._photos[person]
        return SubjectPhoto(self._read(photos[-1] if number == UNSEEN_PHOTO else photos[number]))

    def real(self, people: Sequence[int], prompt: Prompt, seed: int, size: int) -> Image:
        """The people's other photos, side by side."""
        shown = [self.photo(person, UNSEEN_PHOTO).image for person in people]
        height = min(len(image) for image in shown)
        scaled = [
            cv2.resize(image, (round(image.shape[1] * height / len(image)), height), interpolation=cv2.INTER_AREA)
            for image in shown
        ]
        return np.concatenate([np.asarray(image, np.uint8) for image in scaled], axis=1)

    def revision(self, people: Sequence[int]) -> str:
        return " ".join([RULES, *(file_sha256(self._photos[person][-1]) for person in people)])

    def _read(self, path: Path) -> Image:
        limits = Limits()
        with path.open("rb") as file:
            image = decode_image(file.read(limits.photo_bytes + 1), str(path), limits)
        if path not in self._turns:
            self._turns[path], _ = detect_in_photo(image, self._detector)
            if self._turns[path]:
                self._say(f"{path} was turned {TURNS[self._turns[path]]}.")
        return np.asarray(turned(image, self._turns[path]), np.uint8)
