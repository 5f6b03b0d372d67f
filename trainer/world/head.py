"""The head as a surface, and how it turns.

Face coordinates (x, y): as seen from the front, in head units; x to the viewer's right, y down, crown -1, chin 1.
Head coordinates add z towards the viewer. The surface is an ellipsoid whose half-width is modulated along y and which
is pushed out and in along its radius (nose, brows, cheeks, eye sockets, lips), so what is fixed to it (moles, hair
line, wrinkles) moves and disappears with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .people import Identity
from .situations import Situation

Array = NDArray[np.float64]

PIVOT = np.array([0.0, 0.55, -0.25])  # where the neck turns
PERSPECTIVE = 0.09


def spread(value: float, low: float, high: float) -> float:
    """A factor in [0, 1] as a length between two limits."""
    return low + (high - low) * value


def together(arrays: list[Array]) -> Array:
    """Arrays of one shape as the last axis of one array: np.stack at a fifth of its cost for small ones."""
    stacked = np.array(arrays)
    return stacked.transpose(*range(1, stacked.ndim), 0)


def bell(distance: Array, width: float) -> Array:
    return np.exp(distance * distance * (-0.5 / width**2))


def smoothstep(value: Array) -> Array:
    clipped = np.minimum(np.maximum(value, 0), 1)
    return clipped * clipped * (3 - 2 * clipped)


@dataclass(frozen=True)
class Plan:
    """Where the features of one face are, in face coordinates: factors turned into lengths, expression included."""

    width: float
    eye_x: float
    eye_y: float
    nose_y: float
    nose_height: float
    nose_width: float
    mouth_y: float
    mouth_half: float


def plan(person: Identity, situation: Situation) -> Plan:
    mouth_half = spread(person.mouth_width, 0.18, 0.31)
    nose_y = spread(person.nose_length, 0.30, 0.47)
    return Plan(
        width=spread(person.head_width, 0.66, 0.84),
        eye_x=spread(person.eye_spacing, 0.25, 0.37),
        eye_y=spread(person.eye_line, -0.05, 0.08),
        nose_y=nose_y,
        nose_height=spread(person.nose_bridge, 0.10, 0.22),
        nose_width=spread(person.nose_width, 0.085, 0.18),
        mouth_y=max(spread(person.mouth_line, 0.58, 0.72), nose_y + 0.16),
        mouth_half=mouth_half * (1 + 0.16 * max(situation.smile, 0) - 0.22 * (situation.expression == "surprised")),
    )


def half_width(person: Identity, lengths: Plan, y: Array) -> Array:
    """Half the head's width at height y."""
    profile = (
        1
        + spread(person.forehead, -0.07, 0.08) * bell(y + 0.45, 0.25)
        + spread(person.cheekbones, -0.03, 0.10) * bell(y - 0.14, 0.16)
        + spread(person.cheeks, -0.07, 0.12) * bell(y - 0.45, 0.18)
        + spread(person.jaw, -0.12, 0.26) * bell(y - 0.76, 0.17)
        + spread(person.chin, -0.30, 0.35) * bell(y - 0.98, 0.11)
    )
    return lengths.width * profile * np.sqrt(np.maximum(1 - y * y, 0))


def skull(person: Identity, lengths: Plan, lon: Array, y: Array) -> Array:
    """The bare head under hair and hats: points (N, 3) at longitude `lon` and height y, both (N,)."""
    cosine = np.cos(lon)
    ring = np.sqrt(np.maximum(1 - y * y, 0))
    front, back = 0.80 * ring**0.55 + 0.05 * bell(y, 0.6), 0.92 * ring * (1 - 0.3 * np.maximum(y, 0))
    return together([half_width(person, lengths, y) * np.sin(lon), y, np.where(cosine > 0, front, back) * cosine])


def surface(person: Identity, situation: Situation, lengths: Plan, lon: Array, y: Array) -> Array:
    """Points of the skin at longitude `lon` (0 is the face's middle, positive to x > 0) and height y.

    lon, y: (N,). Returns (N, 3) in head coordinates, before the head turns.
    """
    sine, cosine = np.sin(lon), np.cos(lon)
    bare = skull(person, lengths, lon, y)
    x, z = bare[:, 0], bare[:, 2]
    side = np.abs(x)
    out = (
        -0.075 * bell(side - lengths.eye_x, 0.15) * bell(y - lengths.eye_y, 0.12)
        + (0.025 + 0.02 * (not person.woman)) * bell(side - 0.26, 0.2) * bell(y - lengths.eye_y + 0.2, 0.07)
        + (spread(person.cheeks, 0.0, 0.06) + 0.035 * max(situation.smile, 0))
        * bell(side - 0.40, 0.14)
        * bell(y - 0.32, 0.13)
        + 0.05 * bell(x, 0.24) * bell(y - lengths.mouth_y, 0.15)
        - 0.03 * bell(x, 0.2) * bell(y - lengths.mouth_y - 0.15, 0.05)
        + spread(person.chin, 0.03, 0.07) * bell(x, 0.17) * bell(y - 0.91, 0.09)
    )
    start = lengths.eye_y - 0.12
    along = (y - start) / (lengths.nose_y - start)
    inside = np.minimum(np.maximum(along, 0), 1)
    base = (y - lengths.nose_y) / 0.11
    rise = np.where(along < 1, smoothstep(along * 3) * (0.3 + 0.7 * inside**1.4), 1 - smoothstep(base))
    slim = lengths.nose_width * (0.38 + 0.42 * inside * inside)
    nose = lengths.nose_height * rise * bell(x / slim, 1.0)
    wing = 0.055 * bell(side - lengths.nose_width * 0.75, 0.035) * bell(y - lengths.nose_y - 0.02, 0.045)
    out = np.where(cosine > 0, out + nose + wing, 0.0)
    jaw = smoothstep((y - lengths.mouth_y + 0.05) / 0.25) * np.minimum(np.maximum(cosine + 0.2, 0), 1)
    drop = 0.13 * situation.mouth_open * jaw
    tip = spread(person.nose_tip, 0.03, -0.06) * np.where(cosine > 0, nose, 0) / lengths.nose_height
    return together([x + out * sine, y + drop + tip, z + out * cosine])


def longitude(person: Identity, lengths: Plan, x: Array, y: Array) -> Array:
    """The longitude of face coordinates (x, y); x beyond the head's edge gives the edge."""
    return np.arcsin(np.clip(x / np.maximum(half_width(person, lengths, y), 1e-6), -0.985, 0.985))


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """The 3×3 matrix of a turn by yaw, then pitch, then roll, all in degrees (see `Situation` for the signs)."""
    yaw, pitch, roll = np.deg2rad([yaw, pitch, roll])
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]])
    tilt = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return tilt @ nod @ turn


@dataclass(frozen=True)
class View:
    """A head's place in a picture: the turn, the picture position of the head's centre, pixels a head unit."""

    turn: Array
    centre: tuple[float, float]
    scale: float

    def rotate(self, points: Array) -> Array:
        """Head coordinates (..., 3) after the turn, still in head units."""
        return (points - PIVOT) @ self.turn.T + PIVOT

    def flatten(self, rotated: Array) -> Array:
        """Turned points (..., 3) to pixels (..., 2), nearer ones a little larger."""
        near = self.scale / (1 - PERSPECTIVE * rotated[..., 2:3])
        return rotated[..., :2] * near + np.asarray(self.centre)
