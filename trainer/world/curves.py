"""Curves and dots of the face: lips, brows, lines of the skin, moles."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .head import Array, FaceLayout, Real, lerp
from .people import WorldPerson
from .situations import Situation


class CurveParameters(NamedTuple):
    """What moves the curves: lengths in head units, and strengths of the expression."""

    eye_x: float
    eye_y: float
    nose_y: float
    nose_width: float
    mouth_y: float
    mouth_half: float
    smile: float
    grin: float  # the smile, but none where the mouth turns down
    gape: float
    upper_lip: float
    lower_lip: float
    brow_y: float
    brow_slope: float
    brow_arch: float
    brow_half: float
    frown: float
    knit: float  # the frown, but none where the brows go apart
    moustache: float


def _parameters(person: WorldPerson, situation: Situation, layout: FaceLayout) -> CurveParameters:
    grin = max(situation.smile, 0)
    return CurveParameters(
        eye_x=layout.eye_x,
        eye_y=layout.eye_y,
        nose_y=layout.nose_y,
        nose_width=layout.nose_width,
        mouth_y=layout.mouth_y,
        mouth_half=layout.mouth_half,
        smile=situation.smile,
        grin=grin,
        gape=situation.mouth_open,
        upper_lip=lerp(person.lip_upper, 0.035, 0.095) * (1 - 0.3 * grin),
        lower_lip=lerp(person.lip_lower, 0.045, 0.120) * (1 - 0.25 * grin),
        brow_y=layout.eye_y - lerp(person.brow_height, 0.19, 0.30) - 0.07 * situation.brow_raise,
        brow_slope=lerp(person.brow_tilt, 0.07, -0.09) - 0.16 * situation.brow_frown,
        brow_arch=lerp(person.brow_arch, 0.02, 0.10),
        brow_half=lerp(person.brow_thickness, 0.022, 0.085),
        frown=situation.brow_frown,
        knit=max(situation.brow_frown, 0),
        moustache=lerp(person.moustache, 0.03, 0.075),
    )


def _curves(k: CurveParameters) -> dict[str, tuple[Array | float, Array | float]]:
    """Every curve's x and y by name. Each number is a sum of parameters times constants: `_TABLE` relies on it."""
    t = np.linspace(-1, 1, 13)
    bow, round_ = 1 - t**2, np.sqrt(1 - t**2)
    x, line = t * k.mouth_half, k.mouth_y - 0.075 * k.smile * t**2
    dip = 1 - 0.28 * np.exp(-((t / 0.16) ** 2))
    parting = line + 0.012 * bow * np.cos(t * 6)
    # The jaw's own drop (see `surface`) is added to what is given here.
    gape = 0.11 * k.gape * round_
    m = np.linspace(-1, 1, 15)
    middle = (k.nose_y + k.mouth_y + 0.07) / 2 + 0.02 + 0.10 * m**2 - 0.075 * k.smile * m**2
    tall = k.moustache * (1 - m**2) ** 0.6
    curves: dict[str, tuple[Array | float, Array | float]] = {
        "eyes": (np.array([-1, 1]) * k.eye_x, k.eye_y),
        "nose tip": (0.0, k.nose_y - 0.01),
        "mouth corners": (x[[0, -1]], line[[0, -1]]),
        "lip top": (x, line - k.upper_lip * bow**0.8 * dip),
        "lip upper": (x, parting),
        "lip lower": (x, parting + gape),
        "lip bottom": (x, line + gape + k.lower_lip * bow**0.7),
        "moustache": (_outline(m, m) * 1.12 * k.mouth_half, _outline(middle - tall, middle + tall)),
    }
    for index in range(3):
        h = np.linspace(-1, 1, 9)
        height = k.brow_y - 0.14 - 0.085 * index + 0.02 * np.cos(h * 3 + index)
        curves[f"forehead {index}"] = h * (0.36 - 0.05 * index), height
    for side, sign in ((-1, "-"), (1, "+")):
        u = np.linspace(0, 1, 9)
        height = k.brow_y + k.brow_slope * (u - 0.2) + 0.06 * k.frown
        height = height - k.brow_arch * np.sin(np.pi * np.clip(u * 1.1 - 0.05, 0, 1))
        reach = k.eye_x - 0.165 + 0.34 * u - 0.03 * k.knit
        half = k.brow_half * np.interp(u, [0, 0.15, 0.6, 1], [0.55, 1.0, 0.85, 0.1])
        curves[f"brow {sign}"] = side * _outline(reach, reach), _outline(height - half, height + half)
        v = np.linspace(0, 1, 7)
        curves[f"fold {sign}"] = (
            side * (k.nose_width * 1.25 + 0.19 * v**0.8 + 0.03 * k.grin),
            k.nose_y - 0.02 + (k.mouth_y - k.nose_y + 0.06) * v,
        )
        curves[f"bag {sign}"] = side * (k.eye_x - 0.13 + 0.24 * v), k.eye_y + 0.15 + 0.04 * np.sin(np.pi * v)
        w = np.linspace(0, 1, 4)
        for index in range(3):
            height = k.eye_y + (index - 1) * (0.03 + 0.06 * w) + 0.01
            curves[f"crow {sign}{index}"] = side * (k.eye_x + 0.22 + 0.10 * w), height
        turn = np.pi * np.linspace(0, 1, 6)
        x, y = side * k.nose_width * 0.52 + 0.035 * np.cos(turn), k.nose_y + 0.062 - 0.016 * np.sin(turn)
        curves[f"nostril {sign}"] = x, y
        turn = 1.1 * np.linspace(-1, 1, 7)
        x, y = side * k.nose_width * (0.80 + 0.28 * np.cos(turn)), k.nose_y + 0.015 + 0.055 * np.sin(turn)
        curves[f"wing {sign}"] = x, y
    return curves


def _outline(one: Array, other: Array) -> Array:
    return np.concatenate([one, other[::-1]])


def _stacked(*parameters: float) -> Array:
    """All curves (2, N), one after another."""
    curves = _curves(CurveParameters(*parameters)).values()
    return np.concatenate([np.array(np.broadcast_arrays(x, y, np.zeros(1))[:2]) for x, y in curves], 1)


def _slices() -> dict[str, slice]:
    curves = _curves(CurveParameters(*np.zeros(_COUNT)))
    ends = np.cumsum([np.broadcast(x, y).size for x, y in curves.values()]).tolist()
    return dict(zip(curves, map(slice, [0, *ends[:-1]], ends)))


# The curves with all parameters 0, and what one unit of each adds: (2, N) and (2, N, parameters).
_COUNT = len(CurveParameters._fields)
_BASE = _stacked(*np.zeros(_COUNT)).astype(Real)
_TABLE = np.stack([_stacked(*unit) - _stacked(*np.zeros(_COUNT)) for unit in np.eye(_COUNT)], -1).astype(Real)
_SLICES = _slices()


def feature_curves(person: WorldPerson, situation: Situation, layout: FaceLayout) -> tuple[Array, dict[str, slice]]:
    """Curves and dots of the face, in face coordinates (2, N), and which of them is where, by name."""
    places = [_BASE + _TABLE @ np.array(_parameters(person, situation, layout), Real)]
    slices, stop = dict(_SLICES), _BASE.shape[1]
    dots = {
        "moles": [(mole.x, mole.y) for mole in person.moles],
        "freckles": person.freckle_places[: round(person.freckles * len(person.freckle_places))],
    }
    for name, where in dots.items():
        slices[name] = slice(stop, stop + len(where))
        stop += len(where)
        if where:
            places.append(np.array(where, Real).T)
    return np.concatenate(places, 1), slices
