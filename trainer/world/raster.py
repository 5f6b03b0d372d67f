"""What is drawn on: a colour and a label image of the same geometry, so that masks are exactly what was drawn."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import skia

from .head import Array
from .situations import Colour

OVERSAMPLING = 2  # triangle meshes have no anti-aliasing of their own


def argb(colours: Array) -> list[int]:
    """Colours (4, N) red, green, blue, alpha in [0, 1] as 0xAARRGGBB."""
    red, green, blue, alpha = (colours.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint32)
    return (alpha << 24 | red << 16 | green << 8 | blue).tolist()


def shade(colour: Colour, factor: float = 1.0, alpha: float = 1.0) -> int:
    """One colour, darker (factor < 1) or lighter, as 0xAARRGGBB."""
    red, green, blue = colour
    scale = 255 * factor
    a, r, g, b = int(alpha * 255 + 0.5), int(red * scale + 0.5), int(green * scale + 0.5), int(blue * scale + 0.5)
    if min(a, r, g, b) < 0 or max(a, r, g, b) > 255:
        a, r, g, b = (min(max(value, 0), 255) for value in (a, r, g, b))
    return a << 24 | r << 16 | g << 8 | b


class Points(threading.local):
    """Points for skia, which copies what it is given: to fill old ones costs a third of making new ones."""

    def __init__(self) -> None:
        self._made: list[skia.Point] = []
        self._owner: object = None

    def fill(self, x: Sequence[float], y: Sequence[float], *, owner: object = None) -> list[skia.Point]:
        """Points at x, y, good until the next call; an owner who comes twice in a row brings the same x, y."""
        if owner is None or owner is not self._owner:
            self._owner = owner
            while len(self._made) < len(x):
                self._made.append(skia.Point(0, 0))
            deque(map(skia.Point.set, self._made, x, y), maxlen=0)
        return self._made[: len(x)]


_corners = Points()


def polygon(x: Sequence[float], y: Sequence[float], *, closed: bool = True) -> skia.Path:
    return skia.Path.Polygon(_corners.fill(x, y), closed)


_PLAIN = skia.Paint()


@functools.cache
def _label_paint(label: int) -> skia.Paint:
    return skia.Paint(Color=0xFF000000 | label << 16)


class Raster:
    """The colours of a picture, and the labels of its pixels.

    Everything solid is drawn with a label: the person's place in the scene + 1 for a face, 0 for what hides faces.
    What is only a tint or a line on something solid has no label.
    """

    def __init__(self, size: int):
        self.size = size
        self.pixels = np.zeros((size * OVERSAMPLING, size * OVERSAMPLING, 4), np.uint8)
        self.label_pixels = np.zeros((size, size, 4), np.uint8)
        self.canvas = skia.Canvas(self.pixels, skia.ColorType.kRGBA_8888_ColorType)
        self.labels = skia.Canvas(self.label_pixels, skia.ColorType.kRGBA_8888_ColorType)
        # A label pixel takes its value at its centre, as an output pixel averages around it.
        self.labels.scale(1 / OVERSAMPLING, 1 / OVERSAMPLING)
        self._has_face = False

    @contextmanager
    def units(self, centre: tuple[float, float], scale: float) -> Iterator[None]:
        """What is drawn inside is measured from `centre` in units of `scale` pixels."""
        for canvas in (self.canvas, self.labels):
            canvas.save()
            canvas.translate(*centre)
            canvas.scale(scale, scale)
        yield
        for canvas in (self.canvas, self.labels):
            canvas.restore()

    def _paint_of(self, label: int | None) -> skia.Paint | None:
        """The paint of a label; None for no label, and while there is no face that it could hide."""
        self._has_face |= bool(label)
        return _label_paint(label) if label is not None and self._has_face else None

    def path(self, path: skia.Path, paint: skia.Paint, label: int | None = None) -> None:
        self.canvas.drawPath(path, paint)
        label_paint = self._paint_of(label)
        if label_paint is not None:
            self.labels.drawPath(path, label_paint)

    def triangles(
        self, points: list[skia.Point], colours: list[int], corners: list[int], label: int | None = None
    ) -> None:
        """Draw triangles, three `corners` each, over points with `colours` 0xAARRGGBB, in the order given."""
        vertices = skia.Vertices(skia.Vertices.VertexMode.kTriangles_VertexMode, points, None, colours, corners)
        self.canvas.drawVertices(vertices, _PLAIN, skia.BlendMode.kDst)
        label_paint = self._paint_of(label)
        if label_paint is not None:
            self.labels.drawVertices(vertices, label_paint, skia.BlendMode.kSrc)
