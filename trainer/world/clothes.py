"""What is below the head: neck, shoulders, clothes.

They stand upright whatever the head does; the neck joins both. Lengths are in head units, from the head's centre.
"""

from __future__ import annotations

import skia

from .head import lerp
from .light import Light, multiply
from .people import WorldPerson
from .raster import Raster, polygon
from .situations import CLOTHES_COLOURS, Colour, Situation

DOWN = 12.0  # below the picture even for the smallest head at its top
LOWEST_COLLAR = {"shirt": 1.52, "sweater": 1.46, "jacket": 1.95, "dress": 1.80}
# Patterns over the whole of a garment, which cuts them out: rectangles, and circles as x, y, radius.
STRIPES = [skia.Rect(-2, 1.5 + index * 0.34, 2, 1.62 + index * 0.34) for index in range(9)]
DOTS = [(column * 0.36 - 1.62 + 0.18 * (row % 2), 1.55 + row * 0.34, 0.065) for row in range(6) for column in range(10)]


def _outline(*points: tuple[float, float]) -> skia.Path:
    return polygon(*map(list, zip(*points)))


def _fill(colour: int) -> skia.Paint:
    return skia.Paint(AntiAlias=True, Color=colour)


def _sidelit(light: Light, colour: Colour, half: float) -> skia.Paint:
    """A paint that grows lighter towards the light, over `half` a width to both sides."""
    turn = 0.35 * light.direction[0]
    colours = [light.tone(colour, 1 - turn), light.tone(colour, 1.02), light.tone(colour, 1 + turn)]
    shader = skia.GradientShader.MakeLinear([skia.Point(-half, 0), skia.Point(half, 0)], colours)
    return skia.Paint(AntiAlias=True, Shader=shader)


def _neckline(path: skia.Path, neck: float, lowest: float, pointed: bool) -> None:
    path.moveTo(-neck * 1.02, 1.26)
    if pointed:
        path.lineTo(0, lowest)
        path.lineTo(neck * 1.02, 1.26)
    else:
        path.cubicTo(-neck * 0.8, lowest, neck * 0.8, lowest, neck * 1.02, 1.26)


def half_shoulders(person: WorldPerson) -> float:
    """Half the width of the shoulders."""
    return 1.28 if person.woman else 1.58


def joints(person: WorldPerson) -> list[tuple[float, float]]:
    """Where the neck meets the body, and the left and the right shoulder as seen in the picture."""
    across = 0.82 * half_shoulders(person)
    return [(0.0, 1.55), (-across, 1.9), (across, 1.9)]


def draw_body(
    raster: Raster, person: WorldPerson, situation: Situation, light: Light, skin: Colour, chin: tuple[float, float]
) -> None:
    """Draw in head units around the head's centre; `chin` is where the neck begins."""
    neck = lerp(person.jaw, 0.34, 0.46) + (0.0 if person.woman else 0.06)
    shoulder = half_shoulders(person)
    _draw_neck(raster, light, multiply(skin, (0.86, 0.80, 0.79)), neck, chin)
    colour = CLOTHES_COLOURS[situation.clothes_colour]
    jacket, lowest = situation.garment == "jacket", LOWEST_COLLAR[situation.garment]
    if jacket:
        shirt = _outline((-neck, 1.45), (0, 1.6), (neck, 1.45), (0.5, 3), (-0.5, 3))
        raster.path(shirt, _fill(light.tone((0.92, 0.92, 0.90))), 0)
    body = skia.Path()
    _neckline(body, neck, lowest, jacket)
    body.cubicTo(neck * 1.4, 1.45, shoulder * 0.95, 1.45, shoulder, 2.1)
    body.cubicTo(shoulder * 1.12, 2.9, shoulder * 1.1, 4, shoulder * 1.1, DOWN)
    body.lineTo(-shoulder * 1.1, DOWN)
    body.cubicTo(-shoulder * 1.1, 4, -shoulder * 1.12, 2.9, -shoulder, 2.1)
    body.cubicTo(-shoulder * 0.95, 1.45, -neck * 1.4, 1.45, -neck * 1.02, 1.26)
    raster.path(body, _sidelit(light, colour, shoulder), 0)
    if situation.pattern != "plain":
        step = 0.28 if sum(colour) < 1.8 else -0.28
        red, green, blue = colour
        paint = _fill(light.tone((red + step, green + step, blue + step), 1, 0.8))
        raster.canvas.save()
        raster.canvas.clipPath(body, skia.ClipOp.kIntersect, True)
        if situation.pattern == "striped":
            for stripe in STRIPES:
                raster.canvas.drawRect(stripe, paint)
        else:
            for dot in DOTS:
                raster.canvas.drawCircle(*dot, paint)
        raster.canvas.restore()
    line = skia.Paint(AntiAlias=True, Style=skia.Paint.kStroke_Style, StrokeWidth=0.07, Color=light.tone(colour, 0.72))
    if jacket:
        for side in (-1, 1):
            lapel = _outline((side * neck * 1.05, 1.26), (side * 0.52, 1.75), (0, lowest))
            raster.path(lapel, _fill(light.tone(colour, 0.80)))
        raster.canvas.drawLine(0, lowest, 0, DOWN, line)
    else:
        collar = skia.Path()
        _neckline(collar, neck, lowest, pointed=False)
        if situation.garment == "sweater":
            line.setStrokeWidth(0.14)
        raster.path(collar, line)
    if situation.scarf:
        _draw_scarf(raster, light, CLOTHES_COLOURS[situation.scarf_colour], neck)


def _draw_neck(raster: Raster, light: Light, skin: Colour, neck: float, chin: tuple[float, float]) -> None:
    x, y = chin
    column = _outline(
        (x - neck, y), (-neck * 0.98, 1.25), (-neck * 1.5, 1.55), (neck * 1.5, 1.55), (neck * 0.98, 1.25), (x + neck, y)
    )
    raster.path(column, _sidelit(light, skin, neck), 0)
    # The head's shadow.
    colours = [light.tone(skin, 0.45, 0.75), light.tone(skin, 0.45, 0)]
    shadow = skia.GradientShader.MakeLinear([skia.Point(0, 0.85), skia.Point(0, 1.4)], colours)
    raster.path(column, skia.Paint(AntiAlias=True, Shader=shadow))


def _draw_scarf(raster: Raster, light: Light, colour: Colour, neck: float) -> None:
    wrap = _outline(
        (-neck * 1.5, 1.18),
        (neck * 1.5, 1.18),
        (neck * 1.75, 1.5),
        (neck * 0.9, 1.66),
        (-neck * 0.9, 1.66),
        (-neck * 1.75, 1.5),
    )
    tail = _outline((0.1, 1.5), (0.5, 1.5), (0.62, 2.6), (0.16, 2.6))
    raster.path(tail, _sidelit(light, multiply(colour, (0.86, 0.86, 0.86)), 1.0), 0)
    raster.path(wrap, _sidelit(light, colour, 1.0), 0)
