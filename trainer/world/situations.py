"""What a person is doing in one picture: everything about a face that is not who it is."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

Colour = tuple[float, float, float]

# Expression: (smile, mouth open, brows up, brows together, eyes open), each the middle of what is drawn.
EXPRESSIONS: dict[str, tuple[float, float, float, float, float]] = {
    "neutral": (0.05, 0.0, 0.0, 0.0, 1.0),
    "smiling": (0.8, 0.0, 0.15, 0.0, 0.92),
    "laughing": (1.0, 0.75, 0.35, 0.0, 0.72),
    "sad": (-0.75, 0.0, 0.25, -0.55, 0.8),
    "angry": (-0.45, 0.0, -0.3, 0.9, 0.85),
    "surprised": (0.0, 0.9, 0.95, 0.0, 1.22),
}
EXPRESSION_ODDS = (0.3, 0.3, 0.14, 0.09, 0.08, 0.09)

CLOTHES_COLOURS: dict[str, Colour] = {
    "red": (0.80, 0.18, 0.20),
    "blue": (0.20, 0.38, 0.76),
    "green": (0.20, 0.55, 0.33),
    "yellow": (0.94, 0.76, 0.22),
    "purple": (0.50, 0.28, 0.64),
    "orange": (0.92, 0.48, 0.18),
    "pink": (0.94, 0.56, 0.68),
    "white": (0.93, 0.93, 0.91),
    "black": (0.15, 0.15, 0.18),
    "grey": (0.52, 0.54, 0.57),
}
GARMENTS = ("shirt", "sweater", "jacket", "dress")
PATTERNS = ("plain", "striped", "dotted")
HATS = ("beanie", "sun hat")


@dataclass(frozen=True)
class Situation:
    """Pose in degrees (yaw > 0 turns to the picture's right, pitch > 0 looks down, roll > 0 tilts clockwise).

    `expression` is its word, `smile` … `eyes_open` its strengths; `gaze` is where the eyes point, -1 to 1 each way.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    expression: str = "neutral"
    smile: float = 0.05
    mouth_open: float = 0.0
    brow_raise: float = 0.0
    brow_frown: float = 0.0
    eyes_open: float = 1.0
    gaze: tuple[float, float] = (0.0, 0.0)
    garment: str = "shirt"
    clothes_colour: str = "blue"
    pattern: str = "plain"
    hat: str | None = None
    hat_colour: str = "red"
    glasses: bool = False
    round_glasses: bool = False
    scarf: bool = False
    scarf_colour: str = "yellow"


T = TypeVar("T")


def pick(rng: np.random.Generator, choices: Sequence[T], odds: Sequence[float] | None = None) -> T:
    """One of the choices, with the given odds (which sum to 1) or equal ones."""
    if odds is None:
        return choices[int(rng.integers(len(choices)))]
    return choices[min(bisect(list(accumulate(odds)), rng.random()), len(choices) - 1)]


def sample_situation(rng: np.random.Generator, woman: bool) -> Situation:
    """A situation for a woman or a man: only the garments differ."""
    word = pick(rng, list(EXPRESSIONS), EXPRESSION_ODDS)
    strengths = [value + float(rng.normal(0, 0.06)) for value in EXPRESSIONS[word]]
    colours = list(CLOTHES_COLOURS)
    hat = pick(rng, HATS) if rng.random() < 0.15 else None
    return Situation(
        yaw=min(max(float(rng.normal(0, 20)), -50), 50),
        pitch=min(max(float(rng.normal(0, 8)), -20), 20),
        roll=min(max(float(rng.normal(0, 7)), -20), 20),
        expression=word,
        smile=strengths[0],
        mouth_open=max(strengths[1], 0.0) if EXPRESSIONS[word][1] else 0.0,
        brow_raise=strengths[2],
        brow_frown=strengths[3],
        eyes_open=strengths[4],
        gaze=(min(max(float(rng.normal(0, 0.35)), -1), 1), min(max(float(rng.normal(0, 0.2)), -1), 1)),
        garment=pick(rng, GARMENTS if woman else GARMENTS[:3]),
        clothes_colour=pick(rng, colours),
        pattern=pick(rng, PATTERNS, (0.7, 0.2, 0.1)),
        hat=hat,
        hat_colour=pick(rng, colours),
        glasses=bool(rng.random() < 0.2),
        round_glasses=bool(rng.random() < 0.5),
        scarf=bool(rng.random() < 0.1),
        scarf_colour=pick(rng, colours),
    )
