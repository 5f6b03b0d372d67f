"""Light, and what it makes of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np

from .head import Array, Real, gaussian, smoothstep
from .raster import shade
from .situations import Colour

SHADOW = np.array([[0.46], [0.56], [0.58]], Real)  # what full contrast takes from red, green and blue in the shade


def ramp(table: Sequence[Colour], value: float) -> Colour:
    """A colour between those of the table, at value in [0, 1]."""
    low = min(int(value * (len(table) - 1)), len(table) - 2)
    return mix(table[low], table[low + 1], value * (len(table) - 1) - low)


def mix(one: Colour, other: Colour, part: float) -> Colour:
    """`one` and `part` of the way to `other`."""
    (a, b, c), (d, e, f) = one, other
    return a + (d - a) * part, b + (e - b) * part, c + (f - c) * part


def multiply(colour: Colour, by: Colour) -> Colour:
    (a, b, c), (d, e, f) = colour, by
    return a * d, b * e, c * f


def column(colour: Colour) -> Array:
    """A colour as (3, 1), to be multiplied with (N,)."""
    return np.array(colour, Real)[:, None]


@dataclass(frozen=True)
class Light:
    """Where light comes from (a unit vector in head coordinates of the picture), how hard it is, and its colour."""

    direction: tuple[float, float, float]
    contrast: float
    colour: Colour

    def illuminate(self, tint: Array, normals: Array, gloss: Array | float = 0.0) -> Array:
        """Colours `tint` (3, N) on surfaces of `normals` (3, N) with `gloss` (N,) or one for all, under the light."""
        x, y, z = self.direction
        half = hypot(x, y, z + 1)
        toward, mirrored = np.array([self.direction, (x / half, y / half, (z + 1) / half)], Real) @ normals
        amount = smoothstep((toward + 0.75) / 1.55)
        shadow, bright = 1 - self.contrast * SHADOW, 1.06 * column(self.colour)
        mirrored = np.maximum(mirrored, 0.0)
        squared = mirrored * mirrored
        spark = gloss * (squared * squared * squared) ** 2 * squared  # to the 14th
        return np.asarray(tint * (shadow + (bright - shadow) * amount) + column(self.colour) * spark)

    def hair_highlight(self, sheen: Array, normals: Array) -> Array:
        """The band of light on hair of `sheen` (3, N) at surfaces of `normals` (3, N)."""
        return sheen * (column(self.colour) * gaussian(np.array(self.direction, Real) @ normals - 0.78, 0.10))

    def tone(self, colour: Colour, factor: float = 1.0, alpha: float = 1.0) -> int:
        """A colour for lines and fills that have no normal of their own."""
        return shade(multiply(colour, self.colour), factor, alpha)
