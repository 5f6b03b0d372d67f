"""What is drawn on: a colour surface and a label surface of the same geometry, so that the truth is what was drawn."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import skia
from numpy.typing import NDArray

from .head import Array

OVERSAMPLING = 2  # triangle meshes have no anti-aliasing of their own


def argb(colours: Array) -> NDArray[np.uint32]:
    """Colours (N, 4) red, green, blue, alpha in [0, 1] as 0xAARRGGBB."""
    bytes_ = np.empty((len(colours), 4), np.uint8)
    bytes_[:, [2, 1, 0, 3]] = np.minimum(np.maximum(colours, 0), 1) * 255 + 0.5
    return np.asarray(bytes_.view("<u4")[:, 0], np.uint32)


def shade(colour: Iterable[float], factor: float = 1.0, alpha: float = 1.0) -> int:
    """One colour, darker (factor < 1) or lighter, as 0xAARRGGBB."""
    red, green, blue = colour
    scale = 255 * factor
    a, r, g, b = int(alpha * 255 + 0.5), int(red * scale + 0.5), int(green * scale + 0.5), int(blue * scale + 0.5)
    if min(a, r, g, b) < 0 or max(a, r, g, b) > 255:
        a, r, g, b = (min(max(value, 0), 255) for value in (a, r, g, b))
    return a << 24 | r << 16 | g << 8 | b


def polygon(points: Array, closed: bool = True) -> skia.Path:
    return skia.Path.Polygon(list(map(skia.Point, points[:, 0].tolist(), points[:, 1].tolist())), closed)


@functools.cache
def lattice(rows: int, columns: int, wrap: bool) -> NDArray[np.int64]:
    """The triangles (T, 3) of a rows × columns grid of points; `wrap` joins the last column to the first.

    Triangles 2k and 2k + 1 fill cell k, cells in row-major order.
    """
    index = np.arange(rows * columns).reshape(rows, columns)
    if wrap:
        index = np.concatenate([index, index[:, :1]], 1)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    return np.stack([np.stack([a, b, c], -1), np.stack([b, d, c], -1)], 2).reshape(-1, 3)


def normals(points: Array, wrap: bool) -> Array:
    """Unit normals (rows, columns, 3) of a grid of points whose columns run round and whose rows run down.

    They point out of the head: columns follow growing longitude, rows growing y.
    """
    if wrap:
        round_ = np.concatenate([points[:, 1:], points[:, :1]], 1) - np.concatenate([points[:, -1:], points[:, :-1]], 1)
    else:
        round_ = np.concatenate([points[:, 1:], points[:, -1:]], 1) - np.concatenate([points[:, :1], points[:, :-1]], 1)
    down = np.concatenate([points[1:], points[-1:]]) - np.concatenate([points[:1], points[:-1]])
    a1, a2, a3 = round_[..., 0], round_[..., 1], round_[..., 2]
    b1, b2, b3 = down[..., 0], down[..., 1], down[..., 2]
    normal = np.stack([a2 * b3 - a3 * b2, a3 * b1 - a1 * b3, a1 * b2 - a2 * b1], -1)
    return normal / np.maximum(np.sqrt((normal * normal).sum(-1, keepdims=True)), 1e-9)


class Easel:
    """The two surfaces of one picture.

    Everything solid is drawn with a label: the person's place in the scene + 1 for a face, 0 for what hides faces.
    What is only a tint or a line on a surface has no label.
    """

    def __init__(self, size: int):
        self.size = size
        self.pixels = np.zeros((size * OVERSAMPLING, size * OVERSAMPLING, 4), np.uint8)
        self.marks = np.zeros((size, size, 4), np.uint8)
        self.canvas = skia.Canvas(self.pixels, skia.ColorType.kRGBA_8888_ColorType)
        self.labels = skia.Canvas(self.marks, skia.ColorType.kRGBA_8888_ColorType)
        # A label pixel takes its value at its centre, as an output pixel averages around it.
        self.labels.scale(1 / OVERSAMPLING, 1 / OVERSAMPLING)

    def path(self, path: skia.Path, paint: skia.Paint, label: int | None = None) -> None:
        self.canvas.drawPath(path, paint)
        if label is not None:
            self.labels.drawPath(path, skia.Paint(Color=0xFF000000 | label << 16))

    def mesh(self, flat: Array, colours: Array, triangles: NDArray[np.int64], label: int | None = None) -> None:
        """Draw triangles (T, 3) over points (N, 2) with colours (N, 4), in the order given."""
        if not len(triangles):
            return
        used = np.zeros(len(flat), bool)
        used[triangles.ravel()] = True
        index = np.cumsum(used) - 1
        points = flat[used]
        vertices = skia.Vertices(
            skia.Vertices.VertexMode.kTriangles_VertexMode,
            list(map(skia.Point, points[:, 0].tolist(), points[:, 1].tolist())),
            None,
            argb(colours[used]).tolist(),
            index[triangles].ravel().tolist(),
        )
        self.canvas.drawVertices(vertices, skia.Paint(), skia.BlendMode.kDst)
        if label is not None:
            paint = skia.Paint(Color=0xFF000000 | label << 16)
            self.labels.drawVertices(vertices, paint, skia.BlendMode.kSrc)


def front_facing(flat: Array, triangles: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which triangles of an outward-wound lattice are seen from outside."""
    a, b, c = flat[triangles[:, 0]], flat[triangles[:, 1]], flat[triangles[:, 2]]
    one, two = b - a, c - a
    return np.asarray(one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0] > 0)
