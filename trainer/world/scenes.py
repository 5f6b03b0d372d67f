"""What one picture shows: people at their places, the place itself, light, style and the age of the photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lib_portrait.errors import PortraitError

from .backgrounds import BACKGROUNDS
from .people import WorldPerson, held_out, world_person
from .situations import Situation, pick, sample_situation

MOST_PEOPLE = 4
COUNT_ODDS = (0.52, 0.26, 0.13, 0.09)
# Half a head's height over the picture's side, by the number of people.
HEAD_SIZES = ((0.25, 0.35), (0.17, 0.225), (0.135, 0.17), (0.115, 0.145))
STYLES = ("photo", "painting", "watercolour", "pencil drawing", "cartoon")
STYLE_ODDS = (0.56, 0.11, 0.11, 0.11, 0.11)
# Old photos are blurred, grainy and faded.
OLD_ODDS = 0.15
LIGHT_COLOURS = ((1.0, 1.0, 1.0), (1.06, 1.0, 0.90), (0.93, 0.98, 1.07))
# Faces of different people keep this distance, in half-heads of both: beside one another, or one above the other.
APART_ACROSS, APART_DOWN = 1.08, 1.32
TRIES = 300


@dataclass(frozen=True)
class Placement:
    """A person in a scene: centre of the head and half its height (one head unit), over the picture's side."""

    person: WorldPerson
    situation: Situation
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """All that `render` needs. `people` are in drawing order, the farthest first.

    `light` comes from azimuth and elevation in degrees (0, 0 is from the viewer). `blur` is in 128ths of the picture's
    side, `noise` and `fade` in [0, 1]; `seed` decides what has no name: clouds, grain, the wording of the caption.
    """

    people: tuple[Placement, ...]
    background: str = "studio"
    style: str = "photo"
    light: tuple[float, float] = (-35.0, 35.0)
    contrast: float = 0.6
    light_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blur: float = 0.0
    noise: float = 0.0
    fade: float = 0.0
    seed: int = 0


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """(x, y, size) of `count` heads that keep apart, the farthest (highest) first."""
    low, high = HEAD_SIZES[count - 1]
    for trial in range(TRIES):
        shrink = 1 - 0.2 * trial / TRIES
        found = []
        for across, down, big in rng.random((count, 3)).tolist():
            size = (low + (high - low) * big) * shrink
            if count == 1:
                x, top, bottom = 0.38 + 0.24 * across, max(0.38, 1.45 * size), 0.50
            else:
                x, top, bottom = 1.25 * size + (1 - 2.5 * size) * across, 1.5 * size, 0.70
            found.append((x, top + (bottom - top) * down, size))
        pairs = ((a, b) for i, a in enumerate(found) for b in found[:i])
        if all(
            abs(a[0] - b[0]) > APART_ACROSS * (a[2] + b[2]) or abs(a[1] - b[1]) > APART_DOWN * (a[2] + b[2])
            for a, b in pairs
        ):
            return sorted(found, key=lambda place: place[1] + place[2])
    # Never seen at these sizes; a row always fits.
    size = low * 0.8
    return [((index + 0.5) / count, 0.45, size) for index in range(count)]


def sample_scene(seed: int, people: Sequence[WorldPerson] | None = None, count: int | None = None) -> Scene:
    """Scene number `seed`: the same for ever.

    people: who is in it (1 to 4), in no particular place; without them `count` people (a random number when None)
    of the population's training part. Situations, places, light and style do not depend on who it is.
    Raises PortraitError for a number of people outside 1 to 4.
    """
    rng = np.random.default_rng([seed, 0x5CE4E])
    if people is None:
        sampled = pick(rng, range(1, MOST_PEOPLE + 1), COUNT_ODDS)
        chosen = np.random.default_rng([seed, 0x1D])
        people = []
        while len(people) < (count or sampled):
            index = int(chosen.integers(0, 2**40))
            if not held_out(index):
                people.append(world_person(index))
    if not 1 <= len(people) <= MOST_PEOPLE or (count is not None and count != len(people)):
        raise PortraitError(
            "people", f"a scene with {len(people)} people was asked for", f"Give 1 to {MOST_PEOPLE} people."
        )
    places = _places(rng, len(people))
    order = rng.permutation(len(people))
    placements = tuple(
        Placement(people[index], sample_situation(rng, people[index].woman), *places[place])
        for place, index in enumerate(order)
    )
    old = rng.random() < OLD_ODDS
    return Scene(
        people=placements,
        background=pick(rng, list(BACKGROUNDS)),
        style=pick(rng, STYLES, STYLE_ODDS),
        light=(min(max(rng.normal(0, 40), -80.0), 80.0), rng.uniform(5, 60)),
        contrast=float(rng.uniform(0.35, 0.85)),
        light_colour=pick(rng, LIGHT_COLOURS),
        blur=float(rng.uniform(0.2, 0.75)) if old else 0.0,
        noise=float(rng.uniform(0.1, 1.0)) if old else 0.0,
        fade=float(rng.uniform(0.2, 1.0)) if old and rng.random() < 0.5 else 0.0,
        seed=seed,
    )
