"""What a picture's caption says, as words and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .scenes import Placement, Scene
from .situations import pick

# The world's pictures show four people at most; what is asked for may be more.
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLURALS = {"woman": "women", "man": "men", "person": "people"}
# The place as a phrase; "against" one it is for those that are hardly a place.
PLACES = {
    "studio": ("in a studio", "against a plain background"),
    "park": ("in a park", "in the park"),
    "beach": ("at the beach", "on a beach"),
    "street": ("on a city street", "in the city"),
    "room": ("in a room", "at home"),
    "mountains": ("in the mountains", "in front of mountains"),
    "forest": ("in a forest", "in the woods"),
    "sunset": ("at sunset", "in front of a sunset"),
    "night": ("at night", "under a night sky"),
}
STYLE_PHRASES = {
    "photo": ("a photo of", "a photograph of", "a portrait of", ""),
    "painting": ("a painting of", "an oil painting of"),
    "watercolour": ("a watercolour of", "a watercolour painting of"),
    "pencil drawing": ("a pencil drawing of", "a pencil sketch of"),
    "cartoon": ("a cartoon of", "a cartoon picture of"),
}


@dataclass(frozen=True)
class Caption:
    """A caption, and as data what it says.

    people: by class word, how many. style, background: None when not mentioned. faces: by the person's place in the
    scene, what is stated of that person: expression, garment, clothes_colour, hat, hat_colour, glasses, scarf_colour.
    """

    text: str
    people: dict[str, int]
    style: str | None
    background: str | None
    faces: dict[int, dict[str, str | bool]] = field(default_factory=dict)


def with_article(words: str) -> str:
    """ "a red shirt", "an orange scarf"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def enumeration(parts: list[str]) -> str:
    """ "glasses", "a red shirt, a scarf and glasses"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted_people(people: Mapping[str, int]) -> str:
    """ "two women", "a man and a woman": people by class word, of each as many as given."""
    return enumeration(
        [with_article(word) if number == 1 else f"{NUMBERS[number]} {PLURALS[word]}" for word, number in people.items()]
    )


def _person(placement: Placement, rng: np.random.Generator, detail: float) -> tuple[str, dict[str, str | bool]]:
    """A noun phrase for one person, and what it states; each fact is mentioned with probability `detail`."""
    situation = placement.situation
    stated: dict[str, str | bool] = {}
    words = placement.person.word
    if situation.expression != "neutral" and rng.random() < detail:
        stated["expression"] = situation.expression
        words = f"{situation.expression} {words}"
    wears = []
    if rng.random() < detail:
        stated["garment"], stated["clothes_colour"] = situation.garment, situation.clothes_colour
        wears.append(with_article(f"{situation.clothes_colour} {situation.garment}"))
    if situation.hat and rng.random() < detail + 0.2:
        stated["hat"], stated["hat_colour"] = situation.hat, situation.hat_colour
        wears.append(with_article(f"{situation.hat_colour} {situation.hat}"))
    if situation.scarf and rng.random() < detail + 0.2:
        stated["scarf_colour"] = situation.scarf_colour
        wears.append(with_article(f"{situation.scarf_colour} scarf"))
    if situation.glasses and rng.random() < detail + 0.2:
        stated["glasses"] = True
        wears.append("glasses")
    phrase = with_article(words)
    if wears:
        phrase += f" {pick(rng, ('wearing', 'in'))} {enumeration(wears)}"
    return phrase, stated


def caption(scene: Scene) -> Caption:
    """A caption of a scene, worded by the scene's seed. People are described from left to right, or only counted."""
    rng = np.random.default_rng([scene.seed, 0xCA9])
    count = Counter(placement.person.word for placement in scene.people)
    style_words = STYLE_PHRASES[scene.style]
    opening = pick(rng, style_words)
    place = pick(rng, PLACES[scene.background]) if rng.random() < 0.75 else ""
    faces: dict[int, dict[str, str | bool]] = {}
    if len(scene.people) == 1 or rng.random() < 0.45:
        detail = (0.75, 0.5, 0.35, 0.3)[min(len(scene.people), 4) - 1]
        phrases = []
        for index in sorted(range(len(scene.people)), key=lambda index: scene.people[index].x):
            phrase, stated = _person(scene.people[index], rng, detail)
            phrases.append(phrase)
            if stated:
                faces[index] = stated
        who = enumeration(phrases)
    else:
        who = counted_people(count)
    if scene.style == "photo" and opening == "a portrait of" and len(scene.people) > 1:
        opening = "a group portrait of" if len(scene.people) > 2 else "a portrait of"
    text = " ".join(part for part in (opening, who, place) if part)
    if place and rng.random() < 0.25:
        text = " ".join(part for part in (opening, who) if part) + f", {place}"
    mentioned = scene.style if scene.style != "photo" or "photo" in opening else None
    return Caption(text, dict(count), mentioned, scene.background if place else None, faces)
