"""The head as a surface, and how it turns.

Face coordinates (x, y): as seen from the front, in head units; x to the viewer's right, y down, crown -1, chin 1.
Head coordinates add z towards the viewer. The surface is an ellipsoid whose half-width is modulated along y and which
is pushed out and in along its radius (nose, brows, cheeks, eye sockets, lips), so what is fixed to it (moles, hair
line, wrinkles) moves and disappears with it.

Points are columns, (3, N) or (2, N), of 32-bit floats: numpy works fastest along the last axis, and skia has no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, radians, sin

import numpy as np
from numpy.typing import NDArray

from .people import WorldPerson
from .situations import Situation

Real = np.float32
Array = NDArray[np.floating]

PIVOT = np.array([[0.0], [0.55], [-0.25]], Real)  # where the neck turns
PERSPECTIVE = 0.09
# Where the head's width is modulated: forehead, cheek bones, cheeks, jaw, chin; heights and how far each reaches.
PROFILE_HEIGHTS = np.array([[-0.45], [0.14], [0.45], [0.76], [0.98]], Real)
PROFILE_REACH = -0.5 / np.array([[0.25], [0.16], [0.18], [0.17], [0.11]], Real) ** 2


def lerp(value: float, low: float, high: float) -> float:
    """Linear interpolation: a factor in [0, 1] as a length between two limits."""
    return low + (high - low) * value


def gaussian(distance: Array, width: float) -> Array:
    return np.exp(distance * distance * (-0.5 / width**2))


def smoothstep(value: Array) -> Array:
    clipped = value.clip(0.0, 1.0)
    return clipped * clipped * (3.0 - 2.0 * clipped)


def gaussian_sum(across: Array, down: Array, table: Sequence[tuple[float, float, float, float, float]]) -> Array:
    """The sum (N,) of Gaussians on the face, at places (N,) each.

    A row of the table is a Gaussian: its height; its middle and its width across; its middle and its width down.
    """
    height, x, width, y, tall = np.array(table, Real).T
    # Every exponent is a quadratic of the place: one product of matrices makes them all.
    a, b = -0.5 / width**2, -0.5 / tall**2
    quadratics = np.array([a, -2 * a * x, b, -2 * b * y, a * x * x + b * y * y]).T
    places = np.array([across * across, across, down * down, down, np.ones_like(down)])
    return np.asarray(height @ np.exp(quadratics @ places))


@dataclass(frozen=True)
class FaceLayout:
    """Where the features of one face are, in face coordinates: factors turned into lengths, expression included."""

    width: float
    hair_x: float  # half the head's width where long hair, the arms of glasses and the ears begin
    temple_x: float
    ear_x: float
    eye_x: float
    eye_y: float
    nose_y: float
    nose_height: float
    nose_width: float
    mouth_y: float
    mouth_half: float


def face_layout(person: WorldPerson, situation: Situation) -> FaceLayout:
    mouth_half = lerp(person.mouth_width, 0.18, 0.31)
    nose_y = lerp(person.nose_length, 0.30, 0.47)
    hair_x, temple_x, ear_x = half_width(person, np.array([-0.1, 0.0, 0.14], Real)).tolist()
    return FaceLayout(
        width=head_width(person),
        hair_x=hair_x,
        temple_x=temple_x,
        ear_x=ear_x,
        eye_x=lerp(person.eye_spacing, 0.25, 0.37),
        eye_y=lerp(person.eye_line, -0.05, 0.08),
        nose_y=nose_y,
        nose_height=lerp(person.nose_bridge, 0.10, 0.22),
        nose_width=lerp(person.nose_width, 0.085, 0.18),
        mouth_y=max(lerp(person.mouth_line, 0.58, 0.72), nose_y + 0.16),
        mouth_half=mouth_half * (1 + 0.16 * max(situation.smile, 0) - 0.22 * (situation.expression == "surprised")),
    )


def head_width(person: WorldPerson) -> float:
    """Half the head's width, but for what cheeks and jaw add to it."""
    return lerp(person.head_width, 0.66, 0.84)


def half_width(person: WorldPerson, y: Array) -> Array:
    """Half the head's width at heights y (N,)."""
    heights = np.array(
        [
            lerp(person.forehead, -0.07, 0.08),
            lerp(person.cheekbones, -0.03, 0.10),
            lerp(person.cheeks, -0.07, 0.12),
            lerp(person.jaw, -0.12, 0.26),
            lerp(person.chin, -0.30, 0.35),
        ],
        Real,
    )
    away = y - PROFILE_HEIGHTS
    profile = heights @ np.exp(away * away * PROFILE_REACH)
    return head_width(person) * (1 + profile) * np.sqrt(np.maximum(1.0 - y * y, 0.0))


def skull(person: WorldPerson, lon: Array, y: Array) -> Array:
    """The bare head under hair and hats: points (3, N) at longitude `lon` and height y, both (N,)."""
    cosine = np.cos(lon)
    ring = np.sqrt(np.maximum(1.0 - y * y, 0.0))
    front, back = 0.80 * ring**0.55 + 0.05 * gaussian(y, 0.6), 0.92 * ring * (1.0 - 0.3 * np.maximum(y, 0.0))
    return np.array([half_width(person, y) * np.sin(lon), y, np.where(cosine > 0.0, front, back) * cosine])


def surface(person: WorldPerson, situation: Situation, layout: FaceLayout, lon: Array, y: Array) -> Array:
    """Points of the skin at longitude `lon` (0 is the face's middle, positive to x > 0) and height y.

    lon, y: (N,). Returns (3, N) in head coordinates, before the head turns.
    """
    sine, cosine = np.sin(lon), np.cos(lon)
    points = skull(person, lon, y)
    side = np.abs(points[0])
    out = gaussian_sum(
        side,
        y,
        [
            (-0.075, layout.eye_x, 0.15, layout.eye_y, 0.12),  # sockets
            (0.025 + 0.02 * (not person.woman), 0.26, 0.2, layout.eye_y - 0.2, 0.07),  # ridge of the brows
            (lerp(person.cheeks, 0.0, 0.06) + 0.035 * max(situation.smile, 0), 0.40, 0.14, 0.32, 0.13),
            (0.05, 0.0, 0.24, layout.mouth_y, 0.15),  # lips
            (-0.03, 0.0, 0.2, layout.mouth_y + 0.15, 0.05),
            (lerp(person.chin, 0.03, 0.07), 0.0, 0.17, 0.91, 0.09),
            (0.055, layout.nose_width * 0.75, 0.035, layout.nose_y + 0.02, 0.045),  # the nose's wings
        ],
    )
    start = layout.eye_y - 0.12
    along = (y - start) / (layout.nose_y - start)
    inside = along.clip(0.0, 1.0)
    base = (y - layout.nose_y) / 0.11
    rise = np.where(along < 1.0, smoothstep(along * 3.0) * (0.3 + 0.7 * inside**1.4), 1.0 - smoothstep(base))
    slim = layout.nose_width * (0.38 + 0.42 * inside * inside)
    front = cosine > 0.0
    nose = front * rise * gaussian(side / slim, 1.0)
    out = front * out + layout.nose_height * nose
    jaw = smoothstep((y - layout.mouth_y + 0.05) / 0.25) * (cosine + 0.2).clip(0.0, 1.0)
    points[0] += out * sine
    points[1] += 0.13 * situation.mouth_open * jaw + lerp(person.nose_tip, 0.03, -0.06) * nose
    points[2] += out * cosine
    return points


def longitude(person: WorldPerson, x: Array, y: Array) -> Array:
    """The longitude of face coordinates (x, y); x beyond the head's edge gives the edge."""
    share = x / np.maximum(half_width(person, y), 1e-6)
    return np.arcsin(share.clip(-0.985, 0.985))


def rotation(yaw: float, pitch: float, roll: float) -> Array:
    """The 3×3 matrix of a turn by yaw, then pitch, then roll, all in degrees (see `Situation` for the signs)."""
    yaw, pitch, roll = radians(yaw), radians(pitch), radians(roll)
    turn = np.array([[cos(yaw), 0, sin(yaw)], [0, 1, 0], [-sin(yaw), 0, cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, cos(pitch), sin(pitch)], [0, -sin(pitch), cos(pitch)]])
    tilt = np.array([[cos(roll), -sin(roll), 0], [sin(roll), cos(roll), 0], [0, 0, 1]])
    return np.asarray(tilt @ nod @ turn, Real)


@dataclass(frozen=True)
class View:
    """A head's place in a picture: the turn, the picture position of the head's centre, pixels a head unit."""

    turn: Array
    centre: tuple[float, float]
    scale: float

    def rotate(self, points: Array) -> Array:
        """Head coordinates (3, N) after the turn, still in head units."""
        return np.asarray(self.turn @ (points - PIVOT) + PIVOT)

    def project(self, rotated: Array) -> Array:
        """Turned points (3, N) to pixels (2, N), nearer ones a little larger."""
        near = self.scale / (1 - PERSPECTIVE * rotated[2])
        return rotated[:2] * near + np.array(self.centre, Real)[:, None]
