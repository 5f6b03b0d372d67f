"""The people of the world: an identity is a point in continuous factors; the population is numbered.

A face factor lies in [0, 1]; what it moves, and by how much, is written where it is drawn (`head`, `skin`, `curves`,
`hair`, `person_renderer`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

POPULATION = 0x1DE17  # first word of every seed of the population: changing it changes everybody
HELD_OUT_EVERY = 10
MOLES = 5


@dataclass(frozen=True)
class Mole:
    """A mark that stays at its place: x, y in face coordinates (see `head`), radius in head units."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class WorldPerson:
    """The identity of a person of the world.

    `number` labels the person, `woman` chooses the class word, every float is a factor in [0, 1], 0.5 being ordinary.
    `moles` and `freckle_places` are the fine detail at fixed places; `freckles` says how many of the places show.
    """

    number: int
    woman: bool
    head_width: float
    forehead: float
    cheekbones: float
    cheeks: float
    jaw: float
    chin: float
    skin_tone: float
    skin_warmth: float
    blush: float
    eye_size: float
    eye_opening: float
    eye_spacing: float
    eye_tilt: float
    eye_line: float
    eye_hue: float
    eye_depth: float
    lashes: float
    brow_thickness: float
    brow_height: float
    brow_tilt: float
    brow_arch: float
    nose_width: float
    nose_length: float
    nose_bridge: float
    nose_tip: float
    mouth_width: float
    mouth_line: float
    lip_upper: float
    lip_lower: float
    lip_colour: float
    ear_size: float
    ear_angle: float
    hair_line: float
    hair_temples: float
    hair_length: float
    hair_volume: float
    hair_wave: float
    hair_part: float
    hair_sweep: float
    hair_dark: float
    hair_red: float
    hair_grey: float
    bun: float
    beard: float
    beard_shape: float
    moustache: float
    age: float
    freckles: float
    moles: tuple[Mole, ...]
    freckle_places: tuple[tuple[float, float], ...]

    @property
    def word(self) -> str:
        """The class word of captions."""
        return "woman" if self.woman else "man"


FACTORS = tuple(
    field.name for field in fields(WorldPerson) if field.name not in ("number", "woman", "moles", "freckle_places")
)


def sample_person(rng: np.random.Generator, number: int = -1) -> WorldPerson:
    """A new identity. `rng` decides everything; `number` is only the label (-1: outside the numbered population)."""
    woman = bool(rng.random() < 0.5)
    # Spread wider than uniform: ordinary faces are the ones that get mixed up.
    values = dict(zip(FACTORS, rng.beta(0.8, 0.8, len(FACTORS)).tolist()))
    values["age"] = float(rng.beta(0.9, 1.6))
    values["hair_dark"] = float(rng.random())
    values["hair_red"] = float(rng.random() ** 2)
    values["hair_grey"] = min(max(values["age"] * 1.7 - 0.75 + 0.25 * rng.standard_normal(), 0.0), 1.0)
    values["freckles"] = float(rng.random() ** 2) if rng.random() < 0.5 else 0.0
    values["skin_tone"] = float(rng.random())
    if woman:
        values["beard"] = values["moustache"] = 0.0
        values["hair_length"] = 0.12 + 0.88 * values["hair_length"]
        values["jaw"] *= 0.6
        values["brow_thickness"] *= 0.55
        values["hair_line"] *= 0.5
        values["hair_temples"] *= 0.3
        values["lip_colour"] = 0.25 + 0.75 * values["lip_colour"]
        values["lashes"] = 0.5 + 0.5 * values["lashes"]
        values["bun"] = values["bun"] if rng.random() < 0.35 else 0.0
    else:
        values["hair_length"] = values["hair_length"] * (0.3 if rng.random() < 0.88 else 0.9)
        values["jaw"] = 0.3 + 0.7 * values["jaw"]
        values["brow_thickness"] = 0.35 + 0.65 * values["brow_thickness"]
        values["lip_colour"] *= 0.4
        values["lashes"] *= 0.35
        values["bun"] = 0.0
        values["beard"] = values["beard"] if rng.random() < 0.6 else 0.0
        values["moustache"] = values["moustache"] if values["beard"] > 0.3 or rng.random() < 0.25 else 0.0
    moles = []
    for _ in range(int(rng.integers(0, MOLES + 1))):
        x, y = rng.uniform(-0.5, 0.5), rng.uniform(-0.35, 0.82)
        # Not on an eye or the mouth, where a mole would be drawn over or taken for something else.
        if (abs(abs(x) - 0.3) > 0.2 or abs(y - 0.02) > 0.2) and (abs(x) > 0.32 or abs(y - 0.64) > 0.14):
            moles.append(Mole(float(x), float(y), float(rng.uniform(0.017, 0.04))))
    across, down = rng.normal(0, 0.27, 60).clip(-0.6, 0.6), rng.normal(0.24, 0.11, 60)
    return WorldPerson(
        number=number,
        woman=woman,
        moles=tuple(moles),
        freckle_places=tuple(zip(across.tolist(), down.tolist())),
        **values,
    )


def world_person(index: int) -> WorldPerson:
    """Person `index` ≥ 0 of the population: the same for ever, in any process, without limit."""
    return sample_person(np.random.default_rng([POPULATION, index]), index)


def held_out(index: int) -> bool:
    """Whether person `index` is kept from all training: every tenth, those whose number ends in 9."""
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
