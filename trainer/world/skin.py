"""The skin: the head and the beard as meshes, and which of the head's triangles are face and nose."""

from __future__ import annotations

from bisect import bisect

import numpy as np
from numpy.typing import NDArray

from .head import Array, FaceLayout, Real, gaussian_sum, half_width, lerp, smoothstep
from .light import column, ramp
from .meshes import Lattice, Mesh
from .people import WorldPerson
from .situations import Colour

_HALF = [0.07, 0.15, 0.24, 0.34, 0.46, 0.62, 0.82, 1.02, 1.22, 1.45, 1.7, 2.1, 2.6]
LONGITUDES = np.array([-value for value in reversed(_HALF)] + [0.0, *_HALF], Real)
_HEIGHTS = [-0.999, -0.95, -0.84, -0.65, -0.45, -0.3, -0.18, -0.1, -0.02, 0.06, 0.14, 0.22, 0.3]
_HEIGHTS += [0.35, 0.4, 0.45, 0.5, 0.56, 0.63, 0.7, 0.77, 0.84, 0.9, 0.95, 0.98, 0.999]
HEIGHTS = np.array(_HEIGHTS, Real)
HEAD = Lattice(len(HEIGHTS), len(LONGITUDES), ring=True)
HEAD_LON, HEAD_Y = np.tile(LONGITUDES, HEAD.rows), np.repeat(HEIGHTS, HEAD.columns)
# What of the head counts as face: below this height, and within this longitude (just before the ears).
FACE_TOP, FACE_SIDE = -0.65, 1.45

BEARD = Lattice(11, 19, ring=False)
BEARD_LON = np.tile(np.linspace(-1.5, 1.5, BEARD.columns, dtype=Real), BEARD.rows)
BEARD_Y = np.repeat(np.linspace(0.30, 0.985, BEARD.rows, dtype=Real), BEARD.columns)
BEARD_LEAST = 0.3  # less of a beard is only a shadow

SKIN = ((1.0, 0.88, 0.80), (0.97, 0.78, 0.65), (0.84, 0.62, 0.46), (0.62, 0.42, 0.29), (0.42, 0.28, 0.20))
_BLUSH, _HOLLOW = column((0.02, -0.26, -0.28)), column((0.8, 1.0, 1.0))
_IN_FRONT = np.cos(HEAD_LON) > 0
_UNDER_CHIN = 1 - 0.25 * smoothstep((HEAD_Y - 0.86) / 0.14)


def skin_colour(person: WorldPerson) -> Colour:
    red, green, blue = ramp(SKIN, person.skin_tone)
    warm = person.skin_warmth - 0.5
    return min(red + 0.05 * warm, 1.0), green, blue - 0.09 * warm


def front_x(points: Array) -> Array:
    """The front view's x (N,) of the head's points (3, N): tints are placed by it. The back of the head is far away."""
    return np.where(_IN_FRONT, points[0], 9.0)


def face_triangles() -> NDArray[np.bool_]:
    """The triangles (T,) of the head's lattice that are face: the front, from the forehead down."""
    rows, columns = HEIGHTS[:-1] >= FACE_TOP, np.abs(LONGITUDES) <= FACE_SIDE
    columns &= np.roll(columns, -1)
    return np.repeat((rows[:, None] & columns).ravel(), 2)


def nose_triangles(layout: FaceLayout, x: Array, eye_size: float) -> NDArray[np.bool_]:
    """The triangles (T,) that the nose stands out in, but for the eyes' own places. x: `front_x`."""
    first, end = bisect(_HEIGHTS, layout.eye_y - 0.1), bisect(_HEIGHTS, layout.nose_y + 0.1)
    y = HEIGHTS[first:end]
    down = ((y - layout.eye_y) / (layout.nose_y - layout.eye_y)).clip(0.0, 1.0)
    free = np.where(y < layout.eye_y + 0.13, layout.eye_x - eye_size, 1.0)
    half = np.minimum(layout.nose_width * (0.7 + down), free)
    inner = np.abs(x.reshape(HEAD.rows, HEAD.columns)[first:end]) <= half[:, None]
    # The last column, behind the head, has no part in it.
    cells = np.zeros((HEAD.rows - 1, HEAD.columns), bool)
    cells[first : end - 1, :-1] = inner[:-1, :-1] & inner[1:, :-1] & inner[:-1, 1:] & inner[1:, 1:]
    return np.repeat(cells.ravel(), 2)


def skin_tints(person: WorldPerson, layout: FaceLayout, skin: Colour, hair: Colour, x: Array) -> Array:
    """Colours (3, N) of the head's points before the light. x: `front_x`."""
    side, y = np.abs(x), HEAD_Y
    pink = gaussian_sum(
        side,
        y,
        [
            (lerp(person.blush, 0.1, 0.75), 0.4, 0.15, 0.3, 0.13),
            (lerp(person.blush, 0.1, 0.4), 0.0, 0.1, layout.nose_y, 0.08),
        ],
    )
    hollow = gaussian_sum(
        side,
        y,
        [
            (lerp(person.eye_depth, 0.06, 0.30), layout.eye_x, 0.15, layout.eye_y, 0.10),
            (0.16, 0.0, 0.12, layout.nose_y + 0.12, 0.05),
            (0.14, 0.0, 0.16, layout.mouth_y + 0.14, 0.035),
            (lerp(1 - person.cheeks, 0.0, 0.14), 0.45, 0.1, 0.5, 0.13),
        ],
    )
    tint = column(skin) * (1 + _BLUSH * pink) * (1 - _HOLLOW * hollow)
    if not person.woman:
        stubble = lerp(person.beard, 0.03, 0.30) * _beard_area(person, layout, x, y, 0.12)
        tint += (column(hair) * 0.7 - tint) * stubble
    return tint


def head(points: Array, tint: Array) -> Mesh:
    return Mesh(HEAD, points, tint * _UNDER_CHIN, gloss=0.12 * _UNDER_CHIN)


def beard(person: WorldPerson, layout: FaceLayout, hair: Colour, points: Array) -> Mesh:
    """The beard that stands out. points: (3, N) the skin at `BEARD_LON`, `BEARD_Y`."""
    lon, y = BEARD_LON, BEARD_Y
    grow = (person.beard - BEARD_LEAST) / (1 - BEARD_LEAST)
    amount = _beard_area(person, layout, half_width(person, y) * np.sin(lon), y, 0.09)
    out = amount * (0.02 + 0.10 * grow * smoothstep((y - 0.5) / 0.4))
    points = points + out * np.array([np.sin(lon), 0.2 + 1.6 * grow * y**3, np.cos(lon)])
    tint = column(hair) * (0.88 + 0.088 * np.sin(lon * 31 + y * 9) * np.sin(y * 37 + lon * 5))
    thick = float(smoothstep(np.array(grow * 2)))
    return Mesh(BEARD, points, tint, gloss=0.04, opacity=amount * (0.55 + 0.45 * thick))


def _beard_area(person: WorldPerson, layout: FaceLayout, x: Array, y: Array, soft: float) -> Array:
    """How much of the beard's area a face point lies in, 0 to 1: cheeks' line by `beard_shape`, lips left free."""
    side = np.abs(x)
    line = layout.mouth_y - 0.02 - lerp(person.beard_shape, -0.16, 0.26) * smoothstep((side - 0.2) / 0.35)
    line = line - 0.55 * smoothstep((side - 0.42) / 0.3)
    area = smoothstep((y - line) / soft + 0.5)
    across, down = x / (layout.mouth_half * 1.15), (y - (layout.mouth_y + 0.01)) / 0.085
    lips = across * across + down * down
    return area * (1 - np.exp(-lips * lips))
