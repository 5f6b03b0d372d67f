"""Where a picture is: a few places, each drawn from a seed, a little out of focus by their simplicity."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import skia
from numpy.typing import NDArray

from .light import multiply
from .raster import polygon, shade
from .situations import Colour

DrawBackground = Callable[[skia.Canvas, np.random.Generator], None]


def _scatter(rng: np.random.Generator, count: int, *limits: tuple[float, float]) -> list[list[float]]:
    """`count` rows of numbers, each drawn between limits of its own."""
    low, high = zip(*limits)
    return rng.uniform(low, high, (count, len(limits))).tolist()


def _fill(canvas: skia.Canvas, top: Colour, bottom: Colour, start: float = 0.0, end: float = 1.0) -> None:
    shader = skia.GradientShader.MakeLinear([skia.Point(0, start), skia.Point(0, end)], [shade(top), shade(bottom)])
    canvas.drawRect(skia.Rect(0, start, 1, end), skia.Paint(Shader=shader))


def _paint(colour: Colour, factor: float = 1.0, alpha: float = 1.0) -> skia.Paint:
    return skia.Paint(AntiAlias=True, Color=shade(colour, factor, alpha))


def _ridge(rng: np.random.Generator, base: float, height: float, rough: float) -> skia.Path:
    """A wavy horizon filled down to the bottom."""
    x = np.linspace(0, 1, 25)
    waves = sum(np.sin(x * rng.uniform(3, 9) * (k + 1) + rng.uniform(0, 6)) * rough**k for k in range(3))
    y = np.asarray(base - height * (0.5 + 0.25 * waves))
    return polygon([*x.tolist(), 1.0, 0.0], [*y.tolist(), 1.0, 1.0])


def _jitter(rng: np.random.Generator, *colour: float) -> Colour:
    red, green, blue = (min(max(a + b, 0.0), 1.0) for a, b in zip(colour, rng.normal(0, 0.035, 3).tolist()))
    return red, green, blue


def _lighter(colour: Colour, factor: float) -> Colour:
    return multiply(colour, (factor, factor, factor))


def _tinted(rng: np.random.Generator, light: tuple[float, float], spread: float) -> Colour:
    """A grey with a tint."""
    grey = rng.uniform(*light)
    red, green, blue = (rng.uniform(-spread, spread, 3) + grey).tolist()
    return red, green, blue


def studio(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    hue = _tinted(rng, (0.35, 0.85), 0.16)
    colours = [shade(hue, factor) for factor in (1.15, 0.95, 0.68)]
    shader = skia.GradientShader.MakeRadial(skia.Point(rng.uniform(0.3, 0.7), rng.uniform(0.2, 0.5)), 0.95, colours)
    canvas.drawRect(skia.Rect(0, 0, 1, 1), skia.Paint(Shader=shader))


def _sky(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _fill(canvas, _jitter(rng, 0.42, 0.66, 0.92), _jitter(rng, 0.84, 0.92, 0.98))
    cloud = _paint((1, 1, 1), 1, 0.6)
    for x, y, size in _scatter(rng, int(rng.integers(1, 4)), (0, 1), (0.04, 0.3), (0.05, 0.1)):
        for k in range(4):
            canvas.drawCircle(x + (k - 1.5) * size * 0.8, y + (k % 2) * 0.02, size * (1 - 0.15 * (k % 3)), cloud)


def _tree(canvas: skia.Canvas, x: float, foot: float, size: float, green: Colour) -> None:
    canvas.drawRect(skia.Rect(x - size * 0.09, foot - size, x + size * 0.09, foot), _paint((0.38, 0.27, 0.19)))
    for dx, dy, radius, factor in ((-0.3, -1.1, 0.42, 0.85), (0.3, -1.15, 0.42, 0.92), (0.0, -1.45, 0.5, 1.08)):
        canvas.drawCircle(x + dx * size, foot + dy * size, radius * size, _paint(green, factor))


def park(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _sky(canvas, rng)
    green = _jitter(rng, 0.36, 0.60, 0.30)
    canvas.drawPath(_ridge(rng, 0.62, 0.16, 0.5), _paint(green, 0.85))
    for x, foot, size, factor in _scatter(rng, 4, (0, 1), (0.58, 0.68), (0.16, 0.26), (0.75, 1.0)):
        _tree(canvas, x, foot, size, _lighter(green, factor))
    _fill(canvas, _lighter(green, 1.25), _lighter(green, 0.85), 0.66, 1.0)


def beach(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _sky(canvas, rng)
    sea = _jitter(rng, 0.16, 0.52, 0.68)
    line = rng.uniform(0.42, 0.56)
    _fill(canvas, _lighter(sea, 0.9), _lighter(sea, 1.35), line, 0.80)
    foam = _paint((0.9, 0.97, 0.98), 1, 0.6)
    for x, y, long in _scatter(rng, 6, (-0.1, 0.9), (line + 0.03, 0.74), (0.1, 0.3)):
        canvas.drawRect(skia.Rect(x, y, x + long, y + 0.007), foam)
    _fill(canvas, _jitter(rng, 0.93, 0.83, 0.62), _jitter(rng, 0.82, 0.69, 0.48), 0.74, 1.0)


def street(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _fill(canvas, _jitter(rng, 0.66, 0.76, 0.86), _jitter(rng, 0.90, 0.90, 0.88))
    walls = ((0.68, 0.50, 0.42), (0.60, 0.60, 0.64), (0.80, 0.72, 0.58))
    x = -0.05
    while x < 1:
        wide, top = rng.uniform(0.16, 0.28), rng.uniform(0.02, 0.4)
        wall = _jitter(rng, *walls[rng.integers(3)])
        canvas.drawRect(skia.Rect(x, top, x + wide, 0.9), _paint(wall))
        lit = _paint((0.96, 0.90, 0.66)) if rng.random() < 0.4 else _paint(wall, 0.55)
        for row in range(6):
            for column in range(3):
                left, above = x + wide * (0.13 + 0.28 * column), top + 0.05 + row * 0.12
                canvas.drawRect(skia.Rect(left, above, left + wide * 0.17, above + 0.065), lit)
        x += wide + 0.01
    _fill(canvas, (0.46, 0.46, 0.49), (0.34, 0.34, 0.37), 0.86, 1.0)


def room(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    wall = _tinted(rng, (0.55, 0.9), 0.13)
    _fill(canvas, _lighter(wall, 1.05), _lighter(wall, 0.85))
    x = rng.uniform(0.04, 0.6)
    frame, pane = _paint((0.95, 0.94, 0.91)), _paint(_jitter(rng, 0.62, 0.80, 0.92))
    canvas.drawRect(skia.Rect.MakeXYWH(x - 0.02, 0.08, 0.38, 0.44), frame)
    canvas.drawRect(skia.Rect.MakeXYWH(x, 0.10, 0.34, 0.40), pane)
    canvas.drawRect(skia.Rect.MakeXYWH(x + 0.16, 0.10, 0.02, 0.40), frame)
    canvas.drawRect(skia.Rect.MakeXYWH(x, 0.29, 0.34, 0.018), frame)
    y = rng.uniform(0.6, 0.72)
    canvas.drawRect(skia.Rect.MakeXYWH(0, y, 1, 0.025), _paint((0.45, 0.32, 0.22)))
    at = rng.uniform(0, 0.2)
    while at < 1:
        wide, tall, red, green, blue, gap = rng.random(6).tolist()
        wide, tall = 0.025 + 0.035 * wide, 0.09 + 0.07 * tall
        book = _paint((0.2 + 0.65 * red, 0.2 + 0.65 * green, 0.2 + 0.65 * blue))
        canvas.drawRect(skia.Rect.MakeXYWH(at, y - tall, wide, tall), book)
        at += wide * (1.05 if gap < 0.8 else 3)


def mountains(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _sky(canvas, rng)
    for base, factor in ((0.55, 1.25), (0.72, 1.0), (0.9, 0.72)):
        x = np.linspace(-0.1, 1.1, 9)
        y = base - np.where(np.arange(9) % 2, rng.uniform(0.16, 0.34, 9), rng.uniform(0, 0.08, 9))
        ridge = polygon([*x.tolist(), 1.1, -0.1], [*y.tolist(), 1.0, 1.0])
        canvas.drawPath(ridge, _paint(_jitter(rng, 0.44, 0.52, 0.62), factor))


def forest(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    green = _jitter(rng, 0.26, 0.44, 0.28)
    _fill(canvas, _lighter(green, 1.6), _lighter(green, 0.7))
    for factor in (1.15, 0.8):
        trunk = _paint((0.34, 0.26, 0.20), factor)
        for x, wide in _scatter(rng, 6, (0, 1), (0.02, 0.05)):
            canvas.drawRect(skia.Rect(x, 0, x + wide, 0.95), trunk)
    for x, y, radius, factor in _scatter(rng, 22, (0, 1), (0, 0.35), (0.04, 0.11), (0.7, 1.5)):
        canvas.drawCircle(x, y, radius, _paint(green, factor, 0.8))
    _fill(canvas, _lighter(green, 0.9), _lighter(green, 0.5), 0.88, 1.0)


def sunset(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _fill(canvas, _jitter(rng, 0.36, 0.28, 0.56), _jitter(rng, 0.99, 0.66, 0.36), 0.0, 0.75)
    canvas.drawCircle(rng.uniform(0.1, 0.9), rng.uniform(0.3, 0.55), rng.uniform(0.07, 0.12), _paint((1.0, 0.90, 0.62)))
    canvas.drawPath(_ridge(rng, 0.75, 0.12, 0.6), _paint(_jitter(rng, 0.34, 0.22, 0.36)))


def night(canvas: skia.Canvas, rng: np.random.Generator) -> None:
    _fill(canvas, _jitter(rng, 0.06, 0.08, 0.20), _jitter(rng, 0.20, 0.22, 0.42))
    star = _paint((1, 1, 0.92), 1, 0.9)
    for x, y, radius in _scatter(rng, 36, (0, 1), (0, 0.7), (0.002, 0.006)):
        canvas.drawCircle(x, y, radius, star)
    canvas.drawCircle(rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2), 0.055, _paint((0.98, 0.96, 0.84)))
    canvas.drawPath(_ridge(rng, 0.85, 0.14, 0.6), _paint((0.07, 0.09, 0.16)))


BACKGROUNDS: dict[str, DrawBackground] = {
    "studio": studio,
    "park": park,
    "beach": beach,
    "street": street,
    "room": room,
    "mountains": mountains,
    "forest": forest,
    "sunset": sunset,
    "night": night,
}


def draw_background(name: str, seed: int, size: int) -> NDArray[np.uint8]:
    """The place `name` drawn from `seed`: (size, size, 4) uint8 RGBA."""
    pixels = np.zeros((size, size, 4), np.uint8)
    canvas = skia.Canvas(pixels, skia.ColorType.kRGBA_8888_ColorType)
    canvas.scale(size, size)
    BACKGROUNDS[name](canvas, np.random.default_rng([seed, 0xBAC]))
    return pixels
