"""One person, drawn: head, features, hair, clothes. Every length is in head units until `View` makes it pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import skia
from numpy.typing import NDArray

from .easel import Easel, front_facing, lattice, normals, polygon, shade
from .head import (
    Array,
    Plan,
    View,
    bell,
    half_width,
    longitude,
    plan,
    rotation,
    skull,
    smoothstep,
    spread,
    surface,
    together,
)
from .people import Identity
from .situations import CLOTHES_COLOURS, Situation

_HALF = [0.07, 0.15, 0.24, 0.34, 0.46, 0.62, 0.82, 1.02, 1.22, 1.45, 1.7, 2.1, 2.6]
LONGITUDES = np.array([-value for value in reversed(_HALF)] + [0.0, *_HALF])
_HEAD = [-0.999, -0.95, -0.84, -0.65, -0.45, -0.3, -0.18, -0.1, -0.02, 0.06, 0.14, 0.22, 0.3]
_CHIN = [0.35, 0.4, 0.45, 0.5, 0.56, 0.63, 0.7, 0.77, 0.84, 0.9, 0.95, 0.98, 0.999]
HEIGHTS = np.array([*_HEAD, *_CHIN])
SKIN = np.array([[1.0, 0.88, 0.80], [0.97, 0.78, 0.65], [0.84, 0.62, 0.46], [0.62, 0.42, 0.29], [0.42, 0.28, 0.20]])
IRIS = np.array(
    [
        [0.22, 0.13, 0.08],
        [0.42, 0.26, 0.12],
        [0.50, 0.42, 0.16],
        [0.28, 0.50, 0.28],
        [0.25, 0.52, 0.72],
        [0.5, 0.6, 0.66],
    ]
)
_UNIT = {count: np.linspace(0, 1, count) for count in (4, 6, 7, 9)}
_SPAN = {count: np.linspace(-1, 1, count) for count in (7, 9, 13, 15)}
# What of the head counts as face: below this height, and within this longitude (just before the ears).
FACE_TOP, FACE_SIDE = -0.65, 1.45


@dataclass(frozen=True)
class Light:
    """Where light comes from (a unit vector in head coordinates of the picture), how hard it is, and its colour."""

    direction: tuple[float, float, float]
    contrast: float
    colour: tuple[float, float, float]


def ramp(table: Array, value: float) -> Array:
    """A colour between those of the table (N, 3), at value in [0, 1]."""
    low = min(int(value * (len(table) - 1)), len(table) - 2)
    part = value * (len(table) - 1) - low
    return np.asarray(table[low] * (1 - part) + table[low + 1] * part)


def skin_colour(person: Identity) -> Array:
    warm = (person.skin_warmth - 0.5) * np.array([0.05, 0.0, -0.09])
    return np.clip(ramp(SKIN, person.skin_tone) + warm, 0, 1)


def hair_colour(person: Identity) -> Array:
    dark = ramp(
        np.array([[0.90, 0.74, 0.46], [0.60, 0.40, 0.22], [0.32, 0.20, 0.13], [0.11, 0.09, 0.09]]), person.hair_dark
    )
    red = np.array([0.68, 0.26, 0.10])
    colour = dark + (red - dark) * 0.75 * smoothstep(np.array((person.hair_red - 0.45) * 2.2))
    return colour + (np.array([0.80, 0.80, 0.82]) - colour) * person.hair_grey


class Figure:
    """One person in one situation at one place of a picture, measured and ready to be drawn."""

    def __init__(self, person: Identity, situation: Situation, centre: tuple[float, float], scale: float, light: Light):
        self.person, self.situation, self.light = person, situation, light
        self.view = View(rotation(situation.yaw, situation.pitch, situation.roll), centre, scale)
        self.plan = plan(person, situation)
        self.skin, self.hair = skin_colour(person), hair_colour(person)
        lon, y = np.meshgrid(LONGITUDES, HEIGHTS)
        self._rows, self._columns = lon.shape
        self.grid_lon, self.grid_y = lon.ravel(), y.ravel()
        points = surface(person, situation, self.plan, self.grid_lon, self.grid_y)
        # Tints are placed by the front view's x; the back of the head has none.
        self.grid_x = np.where(np.cos(self.grid_lon) > 0, points[:, 0], np.sign(points[:, 0]) * 9.0)
        rotated = self.view.rotate(points)
        self.grid_flat = self.view.flatten(rotated)
        cells = lattice(self._rows, self._columns, True)
        self.grid_seen = front_facing(self.grid_flat, cells)
        self.grid_normals = normals(rotated.reshape(self._rows, self._columns, 3), wrap=True).reshape(-1, 3)
        self.curves = feature_curves(person, situation, self.plan)
        self.outline = self._features()
        self.frames = {side: self._eye_frame(side) for side in (-1, 1)}

    # ---- places on the face ----

    def _features(self) -> dict[str, Array]:
        """Every curve and dot of the face in pixels, by name: (N, 3) x, y, and how much it faces us (1 fully)."""
        curves = self.curves
        names, arrays = list(curves), list(curves.values())
        every = np.concatenate(arrays)
        lon = longitude(self.person, self.plan, every[:, 0], every[:, 1])
        points = surface(self.person, self.situation, self.plan, lon, every[:, 1])
        outward = together([np.sin(lon), 0.55 * every[:, 1], np.cos(lon)])
        facing = (outward / np.sqrt((outward**2).sum(-1, keepdims=True))) @ self.view.turn[2]
        self._eyes = points[:2] + np.array([0, 0, 0.02])
        flat = self.view.flatten(self.view.rotate(points))
        places = np.concatenate([flat, facing[:, None]], 1)
        return dict(zip(names, np.split(places, np.cumsum([len(array) for array in arrays])[:-1])))

    def facing(self, name: str) -> float:
        return float(self.outline[name][:, 2].mean())

    def _eye_frame(self, side: int) -> Array:
        """The affine (2, 3) from an eye's own coordinates (head units around its centre) to pixels."""
        turn = 0.75 * float(np.arcsin(side * self.plan.eye_x / self.plan.width))
        away = np.array([[0, 0, 0], [np.cos(turn), 0, -np.sin(turn)], [0, 1, -0.08]]) * 0.05
        flat = self.view.flatten(self.view.rotate(self._eyes[(side + 1) // 2] + away))
        return np.stack([(flat[1] - flat[0]) / 0.05, (flat[2] - flat[0]) / 0.05, flat[0]], 1)

    def iris(self, side: int) -> Array:
        """The iris' centre in an eye's own coordinates: where the eyes look."""
        size = eye_size(self.person)
        gaze = self.situation.gaze
        return np.array([gaze[0] * size * 0.30, gaze[1] * size * 0.12 - 0.02 * size])

    def landmarks(self) -> Array:
        """(5, 2) pixels: left eye, right eye, nose tip, mouth corners left and right, as seen in the picture."""
        eyes = []
        for side in (-1, 1):
            frame = self.frames[side]
            eyes.append(frame[:, :2] @ self.iris(side) + frame[:, 2])
        return np.stack([*eyes, self.outline["nose tip"][0, :2], *self.outline["mouth corners"][:, :2]])

    # ---- light ----

    def lit(self, colour: Array, normal: Array, gloss: float = 0.12) -> Array:
        """`colour` (3,) or (N, 3) under the light at surfaces of `normal` (N, 3)."""
        direction = np.array(self.light.direction)
        toward = normal @ direction
        amount = smoothstep((toward + 0.75) / 1.55)[:, None]
        shadow = colour * (1 - self.light.contrast * np.array([0.46, 0.56, 0.58]))
        bright = colour * 1.06 * np.array(self.light.colour)
        half = direction + np.array([0, 0, 1])
        half = half / np.sqrt((half**2).sum())
        spark = gloss * (np.maximum(normal @ half, 0) ** 14)[:, None]
        return np.asarray(shadow + (bright - shadow) * amount + spark * np.array(self.light.colour))

    def tone(self, colour: Array, factor: float = 1.0, alpha: float = 1.0) -> int:
        """A colour for lines and fills that have no normal of their own."""
        red, green, blue = colour.tolist()
        warm, mid, cold = self.light.colour
        return shade((red * warm, green * mid, blue * cold), factor, alpha)

    # ---- drawing, back to front ----

    def draw(self, easel: Easel, label: int) -> None:
        """Draw the person; `label` is what the visible face gets on the label surface."""
        locks = self._locks()
        hat = self.situation.hat
        if locks is not None:
            easel.mesh(locks[0], locks[1] * np.array([0.72, 0.72, 0.72, 1]), locks[2], 0)
        self._bun(easel)
        self._body(easel)
        ears = (-1, 1) if locks is None else ()  # long hair covers them
        for side in ears:
            if self.ear_facing(side) <= 0.1:
                self._ear(easel, side)
        cells = lattice(self._rows, self._columns, True)
        colours = np.concatenate([self._skin_tints(), np.ones((len(self.grid_lon), 1))], 1)
        face = np.repeat(self._face_cells(), 2)
        for part, mark in ((~face, 0), (face, label)):
            easel.mesh(self.grid_flat, colours, cells[part & self.grid_seen], mark)
        for side in ears:
            if self.ear_facing(side) > 0.1:
                self._ear(easel, side)
        self._wrinkles(easel)
        self._spots(easel, on_nose=False)
        for side in (-1, 1):
            self._eye(easel, side)
        self._beard(easel)
        self._mouth(easel)
        easel.mesh(self.grid_flat, colours, cells[np.repeat(self._nose_cells(), 2) & self.grid_seen])
        self._nostrils(easel)
        self._spots(easel, on_nose=True)
        self._moustache(easel)
        self._brows(easel)
        if self.situation.glasses:
            self._glasses(easel)
        self._cap(easel)
        if locks is not None:
            easel.mesh(locks[0], locks[1], locks[2][front_facing(locks[0], locks[2])], 0)
        if hat is not None:
            self._hat(easel)

    def _face_cells(self) -> NDArray[np.bool_]:
        """The cells of the head's lattice that are face: the front, from the forehead down."""
        rows, columns = HEIGHTS[:-1] >= FACE_TOP, np.abs(LONGITUDES) <= FACE_SIDE
        columns &= np.roll(columns, -1)
        return np.asarray(rows[:, None] & columns[None]).ravel()

    def box(self) -> Array:
        """(4,) pixels x0, y0, x1, y1 around the face as far as it is turned to us."""
        face = lattice(self._rows, self._columns, True)[np.repeat(self._face_cells(), 2) & self.grid_seen]
        seen = self.grid_flat[face.ravel()]
        return np.concatenate([seen.min(0), seen.max(0)])

    def _nose_cells(self) -> NDArray[np.bool_]:
        """The cells that the nose stands out in; they are drawn again over the eyes, but for the eyes' own places."""
        lengths = self.plan
        down = np.clip((HEIGHTS - lengths.eye_y) / (lengths.nose_y - lengths.eye_y), 0, 1)
        free = np.where(lengths.eye_y + 0.13 > HEIGHTS, lengths.eye_x - eye_size(self.person), 1.0)
        half = np.minimum(lengths.nose_width * (0.7 + 1.0 * down), free)
        inner = np.abs(self.grid_x).reshape(self._rows, self._columns) <= half[:, None]
        inner &= ((lengths.eye_y - 0.1 < HEIGHTS) & (lengths.nose_y + 0.1 > HEIGHTS))[:, None]
        inner &= np.roll(inner, -1, 1)
        return np.asarray(inner[:-1] & inner[1:]).ravel()

    def _skin_tints(self) -> Array:
        person, lengths = self.person, self.plan
        x, y = self.grid_x, self.grid_y
        side = np.abs(x)
        tint = self.skin[None] * np.ones((len(x), 1))
        rosy = self.skin * np.array([1.02, 0.74, 0.72])
        pink = spread(person.blush, 0.1, 0.75) * bell(side - 0.4, 0.15) * bell(y - 0.3, 0.13)
        pink = pink + spread(person.blush, 0.1, 0.4) * bell(x, 0.1) * bell(y - lengths.nose_y, 0.08)
        tint = tint + (rosy - tint) * pink[:, None]
        hollow = spread(person.eye_depth, 0.06, 0.30) * bell(side - lengths.eye_x, 0.15) * bell(y - lengths.eye_y, 0.10)
        hollow = hollow + 0.16 * bell(x, 0.12) * bell(y - lengths.nose_y - 0.12, 0.05)
        hollow = hollow + 0.14 * bell(x, 0.16) * bell(y - lengths.mouth_y - 0.14, 0.035)
        hollow = hollow + spread(1 - person.cheeks, 0.0, 0.14) * bell(side - 0.45, 0.1) * bell(y - 0.5, 0.13)
        tint = tint * (1 - hollow[:, None] * np.array([0.8, 1.0, 1.0]))
        if not person.woman:
            stubble = spread(person.beard, 0.03, 0.30) * self._beard_area(x, y, 0.12)
            tint = tint + (self.hair * 0.7 - tint) * stubble[:, None]
        shown = self.lit(tint, self.grid_normals)
        return np.clip(shown * (1 - 0.25 * smoothstep((y - 0.86) / 0.14))[:, None], 0, 1)

    def _beard_area(self, x: Array, y: Array, soft: float) -> Array:
        """How much of the beard's area a face point lies in, 0 to 1: cheeks' line by `beard_shape`, lips left free."""
        lengths = self.plan
        side = np.abs(x)
        line = lengths.mouth_y - 0.02 - spread(self.person.beard_shape, -0.16, 0.26) * smoothstep((side - 0.2) / 0.35)
        line = line - 0.55 * smoothstep((side - 0.42) / 0.3)
        area = smoothstep((y - line) / soft + 0.5)
        lips = np.exp(-(((x / (lengths.mouth_half * 1.15)) ** 2 + ((y - lengths.mouth_y - 0.01) / 0.085) ** 2) ** 2))
        return area * (1 - lips)

    def _beard(self, easel: Easel) -> None:
        if self.person.beard < 0.3:
            return
        grow = (self.person.beard - 0.3) / 0.7
        rows, columns = np.linspace(0.30, 0.985, 11), np.linspace(-1.5, 1.5, 19)
        lon, y = (grid.ravel() for grid in np.meshgrid(columns, rows))
        points = surface(self.person, self.situation, self.plan, lon, y)
        x = half_width(self.person, self.plan, y) * np.sin(lon)
        amount = self._beard_area(x, y, 0.09)
        out = amount * (0.02 + 0.10 * grow * smoothstep((y - 0.5) / 0.4))
        points = points + out[:, None] * together([np.sin(lon), 0.2 + 1.6 * grow * y**3, np.cos(lon)])
        rotated = self.view.rotate(points)
        bumps = 1 + 0.10 * np.sin(lon * 31 + y * 9) * np.sin(y * 37 + lon * 5)
        colour = self.lit(
            self.hair[None] * bumps[:, None] * 0.88, normals(rotated.reshape(11, 19, 3), False).reshape(-1, 3), 0.04
        )
        alpha = amount * (0.55 + 0.45 * smoothstep(np.array(grow * 2)))
        cells = lattice(11, 19, False)
        flat = self.view.flatten(rotated)
        easel.mesh(flat, np.concatenate([colour, alpha[:, None]], 1), cells[front_facing(flat, cells)])

    def _moustache(self, easel: Easel) -> None:
        if self.person.moustache < 0.25:
            return
        paint = skia.Paint(AntiAlias=True, Color=self.tone(self.hair, 0.85, spread(self.person.moustache, 0.6, 1.0)))
        easel.path(polygon(self.outline["moustache"][:, :2]), paint)

    def _spots(self, easel: Easel, on_nose: bool) -> None:
        """Freckles and moles; those on the nose are drawn after it, the others may hide behind it."""
        person, scale = self.person, self.view.scale
        for name, colour, radii in (
            ("freckles", self.skin * np.array([0.70, 0.50, 0.40]), None),
            ("moles", self.skin * np.array([0.36, 0.26, 0.24]), [mole.radius for mole in person.moles]),
        ):
            if name not in self.outline:
                continue
            places = self.outline[name]
            where = self.curves[name]
            near = (np.abs(where[:, 0]) < self.plan.nose_width * 1.3) & (where[:, 1] < self.plan.nose_y + 0.1)
            for index in np.flatnonzero((near == on_nose) & (places[:, 2] > 0.02)):
                px, py, facing = places[index].tolist()
                radius = (radii[index] if radii else 0.010 + 0.006 * (index % 3)) * scale
                alpha = 0.95 if radii else spread(person.freckles, 0.25, 0.7)
                paint = skia.Paint(AntiAlias=True, Color=self.tone(colour, 1, alpha))
                thin = radius * max(facing, 0.15)
                easel.canvas.drawOval(skia.Rect.MakeLTRB(px - thin, py - radius, px + thin, py + radius), paint)

    def _line(self, easel: Easel, name: str, colour: Array, width: float, alpha: float) -> None:
        """A soft line of `width` head units along the part of a curve that faces us."""
        if alpha < 0.04:
            return
        places = self.outline[name]
        shown = places[places[:, 2] > 0.08]
        if len(shown) < 2:
            return
        paint = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=width * self.view.scale,
            StrokeCap=skia.Paint.kRound_Cap,
            StrokeJoin=skia.Paint.kRound_Join,
            Color=self.tone(colour, 1, min(alpha, 1.0)),
        )
        easel.path(polygon(shown[:, :2], False), paint)

    def _wrinkles(self, easel: Easel) -> None:
        old = max(self.person.age - 0.25, 0) / 0.75
        dark = self.skin * np.array([0.66, 0.52, 0.48])
        for index in range(3):
            self._line(easel, f"forehead {index}", dark, 0.022, 0.75 * old + 0.25 * max(self.situation.brow_raise, 0))
        for side in "-+":
            self._line(easel, f"fold {side}", dark, 0.026, 0.12 + 0.6 * old + 0.35 * max(self.situation.smile, 0))
            self._line(easel, f"bag {side}", dark, 0.022, 0.10 + 0.6 * old)
            for index in range(3):
                self._line(easel, f"crow {side}{index}", dark, 0.016, 0.85 * old - 0.1)

    def _eye(self, easel: Easel, side: int) -> None:
        """An eye in its own flat coordinates: x outward on both sides' own half, lids, iris at `iris`, lashes."""
        person, situation = self.person, self.situation
        if self.facing(f"brow {'+' if side > 0 else '-'}") < -0.05:
            return
        frame, canvas = self.frames[side], easel.canvas
        size = eye_size(person)
        opening = size * spread(person.eye_opening, 0.34, 0.66) * max(situation.eyes_open, 0.15)
        opening *= 1 - 0.18 * max(situation.smile, 0)
        tilt = spread(person.eye_tilt, 0.10, -0.28) * size
        inner, outer = -side * size, side * size
        canvas.save()
        canvas.concat(skia.Matrix.MakeAll(*frame[0].tolist(), *frame[1].tolist(), 0, 0, 1))
        lid = skia.Path()
        lid.moveTo(inner, opening * 0.25)
        upper = (inner * 0.45, -opening * 1.45, outer * 0.55, -opening * 1.40 + tilt * 0.8, outer, tilt)
        lid.cubicTo(*upper)
        lid.cubicTo(outer * 0.6, opening * 1.0 + tilt * 0.3, inner * 0.4, opening * 1.05, inner, opening * 0.25)
        lid.close()
        canvas.drawPath(lid, skia.Paint(AntiAlias=True, Color=self.tone(np.array([0.97, 0.96, 0.95]))))
        canvas.save()
        canvas.clipPath(lid, skia.ClipOp.kIntersect, True)
        x, y = self.iris(side).tolist()
        radius = size * 0.50
        iris = ramp(IRIS, person.eye_hue)
        canvas.drawCircle(x, y, radius, skia.Paint(AntiAlias=True, Color=self.tone(iris, 0.45)))
        canvas.drawCircle(x, y, radius * 0.84, skia.Paint(AntiAlias=True, Color=self.tone(iris)))
        canvas.drawCircle(
            x, y + radius * 0.3, radius * 0.45, skia.Paint(AntiAlias=True, Color=self.tone(iris, 1.3, 0.6))
        )
        canvas.drawCircle(x, y, radius * 0.46, skia.Paint(AntiAlias=True, Color=0xFF0C0A0C))
        shadow = skia.Paint(AntiAlias=True, Color=0x50281814, Style=skia.Paint.kStroke_Style, StrokeWidth=opening * 0.7)
        line = skia.Path()
        line.moveTo(inner, opening * 0.25)
        line.cubicTo(*upper)
        canvas.drawPath(line, shadow)
        canvas.drawCircle(
            x - radius * 0.35, y - radius * 0.4, radius * 0.24, skia.Paint(AntiAlias=True, Color=0xF0FFFFFF)
        )
        canvas.restore()
        stroke = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=spread(person.lashes, 0.022, 0.055),
            StrokeCap=skia.Paint.kRound_Cap,
            Color=self.tone(self.skin * 0.2, 0.6),
        )
        canvas.drawPath(line, stroke)
        if person.lashes > 0.6:
            flick = skia.Path()
            flick.moveTo(outer * 0.85, tilt - opening * 0.3)
            flick.lineTo(outer * 1.25, tilt - size * 0.3 * person.lashes)
            canvas.drawPath(flick, stroke)
        fold = skia.Path()
        lift = size * spread(person.eye_depth, 0.12, 0.32)
        fold.moveTo(inner * 0.9, opening * 0.1 - lift)
        fold.cubicTo(
            inner * 0.4,
            -opening * 1.5 - lift,
            outer * 0.6,
            -opening * 1.45 + tilt - lift,
            outer * 1.1,
            tilt - lift * 0.6,
        )
        stroke.setStrokeWidth(0.02)
        stroke.setColor(self.tone(self.skin, 0.5, 0.6))
        canvas.drawPath(fold, stroke)
        lower = skia.Path()
        lower.moveTo(outer, tilt)
        lower.cubicTo(outer * 0.6, opening * 1.0 + tilt * 0.3, inner * 0.4, opening * 1.05, inner, opening * 0.25)
        stroke.setStrokeWidth(0.016)
        stroke.setColor(self.tone(self.skin, 0.42, 0.7))
        canvas.drawPath(lower, stroke)
        canvas.restore()

    def _brows(self, easel: Easel) -> None:
        colour = self.hair * 0.62 + 0.06 * self.skin
        paint = skia.Paint(AntiAlias=True, Color=self.tone(colour, 1, 0.93))
        for sign in "-+":
            if self.facing(f"brow {sign}") > -0.02:
                easel.path(polygon(self.outline[f"brow {sign}"][:, :2]), paint)

    def _mouth(self, easel: Easel) -> None:
        person, out = self.person, self.outline
        lip = self.skin * np.array([0.86, 0.58, 0.56])
        lip = lip + (np.array([0.72, 0.16, 0.20]) - lip) * spread(person.lip_colour, 0.0, 0.75)
        top, upper = out["lip top"][:, :2], out["lip upper"][:, :2]
        lower, bottom = out["lip lower"][:, :2], out["lip bottom"][:, :2]
        paint = skia.Paint(AntiAlias=True, Color=self.tone(np.array([0.30, 0.08, 0.09])))
        easel.path(polygon(np.concatenate([upper, lower[::-1]])), paint)
        if self.situation.mouth_open > 0.2:
            easel.canvas.save()
            easel.canvas.clipPath(polygon(np.concatenate([upper, lower[::-1]])), skia.ClipOp.kIntersect, True)
            paint.setColor(self.tone(np.array([0.96, 0.95, 0.92])))
            teeth = upper + np.array([0, 0.07 * self.view.scale])
            if self.situation.smile > 0.4:
                easel.path(polygon(np.concatenate([upper, teeth[::-1]])), paint)
            paint.setColor(self.tone(np.array([0.78, 0.36, 0.38])))
            tongue = lower - np.array([0, 0.06 * self.view.scale])
            easel.path(polygon(np.concatenate([tongue[3:-3], lower[3:-3][::-1]])), paint)
            easel.canvas.restore()
        paint.setColor(self.tone(lip, 0.86))
        easel.path(polygon(np.concatenate([top, upper[::-1]])), paint)
        paint.setColor(self.tone(lip))
        easel.path(polygon(np.concatenate([lower, bottom[::-1]])), paint)
        shine = lower * 0.45 + bottom * 0.55
        paint.setColor(0x40FFFFFF)
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(0.03 * self.view.scale)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        easel.path(polygon(shine[4:8], False), paint)
        paint.setColor(self.tone(lip, 0.35, 0.85))
        paint.setStrokeWidth(0.02 * self.view.scale)
        easel.path(polygon(upper, False), paint)

    def _nostrils(self, easel: Easel) -> None:
        dark = self.skin * np.array([0.42, 0.28, 0.26])
        for sign in "-+":
            self._line(easel, f"nostril {sign}", dark, 0.032, 0.85)
            self._line(easel, f"wing {sign}", dark, 0.018, 0.45)

    # ---- ears, hair, hat ----

    def ear_facing(self, side: int) -> float:
        """How much the outside of an ear is turned to us."""
        return float(self.view.turn[2] @ np.array([side * 0.97, 0.0, 0.25]))

    def _ear(self, easel: Easel, side: int) -> None:
        person, lengths = self.person, self.plan
        tall = spread(person.ear_size, 0.17, 0.30)
        angle = spread(person.ear_angle, 0.25, 0.95)
        root = float(half_width(person, lengths, np.array([0.14]))[0]) * 0.97
        turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
        along = np.sin(turn)
        across = np.cos(turn) * np.where(along > 0, 1 - 0.45 * along, 1.0)  # narrower at the lobe
        sizes = np.repeat([1.0, 0.66], len(turn))
        along = np.tile(along, 2) * sizes
        reach = tall * 0.62 * (1 + np.tile(across, 2) * sizes)
        points = together(
            [side * (root + reach * np.sin(angle) * 0.75), 0.12 + tall * along, 0.02 - reach * np.cos(angle)]
        )
        flat = self.view.flatten(self.view.rotate(points))
        normal = self.view.turn @ np.array([side * np.cos(angle), 0, np.sin(angle)])
        colour = self.lit(self.skin * np.array([1.0, 0.93, 0.91]), normal[None], 0.0)[0].tolist()
        easel.path(polygon(flat[: len(turn)]), skia.Paint(AntiAlias=True, Color=shade(colour)), 0)
        easel.path(polygon(flat[len(turn) :]), skia.Paint(AntiAlias=True, Color=shade(colour, 0.76)))

    def _scalp_line(self, lon: Array) -> Array:
        """Height of the hair's lower edge at a longitude: forehead, temples, before and behind the ear, nape."""
        person = self.person
        turn = np.abs((lon + np.pi) % (2 * np.pi) - np.pi)
        front = spread(person.hair_line, -0.42, -0.70) if person.hair_line < 0.8 else -0.9
        if person.hair_length > 0.25 and person.hair_sweep > 0.55 and person.hair_line < 0.5:
            front = -0.30  # a fringe
        temple = spread(person.hair_temples, -0.40, -0.66)
        sideburn = 0.12 if not person.woman else -0.02
        nape = spread(min(person.hair_length * 2, 1), 0.35, 0.75)
        height = np.interp(
            turn,
            [0, 0.45, 0.9, 1.15, 1.32, 1.5, 1.75, 2.3, np.pi],
            [front, front * 0.8 + temple * 0.2, temple, -0.30, sideburn, sideburn - 0.05, 0.0, nape, nape],
        )
        return np.asarray(height + (person.hair_sweep - 0.5) * 0.34 * np.sin(lon) * bell(turn, 0.7))

    def _hair_shade(self, rotated: Array, wrap: bool, streak: Array) -> Array:
        rows, columns = rotated.shape[:2]
        normal = normals(rotated, wrap).reshape(-1, 3)
        colour = self.hair[None] * (1 + 0.17 * streak.ravel())[:, None]
        shown = self.lit(colour, normal, 0.0)
        band = bell(normal @ np.array(self.light.direction) - 0.78, 0.10) * (0.75 + 0.5 * streak.ravel())
        glow = (self.hair * 0.5 + 0.22) * np.array(self.light.colour)
        return np.asarray(np.clip(shown + 0.45 * glow * band[:, None], 0, 1)).reshape(rows, columns, 3)

    def _cap(self, easel: Easel) -> None:
        """The hair on the scalp, as a second surface over the skull, up to the hair line."""
        person = self.person
        rows, columns = 10, 34
        lon = np.linspace(-np.pi, np.pi, columns, endpoint=False)
        line = self._scalp_line(lon)
        bald = person.hair_line >= 0.8 and not person.woman
        top = -0.15 + 0 * lon if bald else -0.999 + 0 * lon
        along = np.linspace(0, 1, rows)[:, None]
        start, end = np.arccos(-top), np.arccos(-np.maximum(line, top + 0.02))
        y = -np.cos(start + (end - start) * along)
        turn = np.broadcast_to(lon, y.shape)
        base = skull(person, self.plan, turn.ravel(), y.ravel()).reshape(rows, columns, 3)
        if bald:
            body = 0.05 * np.sin(np.pi * np.clip(along, 0, 1)) + 0.01
        else:
            thick = spread(person.hair_volume, 0.05, 0.30) * (0.5 + 0.5 * min(person.hair_length * 2.5, 1))
            body = 0.015 + thick * (1 - along**3) * np.ones_like(y)
            part = spread(person.hair_part, -0.42, 0.42)
            body = body * (1 - 0.55 * np.exp(-(((base[..., 0] - part) / 0.06) ** 2)) * (base[..., 2] > -0.3))
        wave = person.hair_wave**1.5
        body = body + wave * 0.045 * np.sin(turn * 9 + 2 * y) * np.sin(y * 11 + turn * 2) * smoothstep(along * 5)
        if self.situation.hat:
            body = np.minimum(body, 0.06)
        outward = together([np.sin(turn), y * 1.1, np.cos(turn)])
        outward = outward / np.sqrt((outward**2).sum(-1, keepdims=True))
        rotated = self.view.rotate(base + outward * body[..., None])
        streak = np.sin(turn * 23 + 3 * wave * np.sin(y * 7)) * 0.6 + np.sin(turn * 41 + 5 * y) * 0.4
        colour = self._hair_shade(rotated, True, streak)
        alpha = np.where(along > 0.99, 0.55 if person.hair_line < 0.8 else 0.2, 1.0) * np.ones_like(y)
        if bald:
            alpha = np.where((along < 0.01) | (np.abs(turn) < 1.3), 0.0, alpha)
        flat = self.view.flatten(rotated).reshape(-1, 2)
        cells = lattice(rows, columns, True)
        cells = cells[front_facing(flat, cells)]
        easel.mesh(flat, np.concatenate([colour, alpha[..., None]], -1).reshape(-1, 4), cells, 0)

    def _locks(self) -> tuple[Array, Array, NDArray[np.int64]] | None:
        """Hair that hangs from the sides and the back: points (N, 2), colours (N, 4), triangles; None when short."""
        person = self.person
        if person.hair_length < 0.3:
            return None
        reach = (person.hair_length - 0.3) / 0.7
        rows, columns = 9, 22
        open_ = spread(1 - person.hair_volume, 1.02, 1.28)
        lon = np.linspace(open_, 2 * np.pi - open_, columns)
        along = np.linspace(0, 1, rows)[:, None]
        end = spread(reach, 0.55, 2.3)
        y = -0.32 + (end + 0.32) * along * np.ones((1, columns))
        width = float(half_width(person, self.plan, np.array([-0.1]))[0])
        thick = spread(person.hair_volume, 0.06, 0.26)
        wave = person.hair_wave**1.3
        swell = thick * smoothstep(along * 2.2) * (1 - 0.35 * smoothstep((y - 0.9) / 0.8))
        swell = swell + wave * 0.05 * np.sin(y * 11 + 2 * np.sin(lon * 3)) * smoothstep(along * 3)
        turn = np.broadcast_to(lon, y.shape)
        ring = np.where(y < 0, np.sqrt(np.clip(1 - y * y * 0.9, 0, 1)), 1.0)
        ring = ring * (1 - 0.22 * smoothstep((y - 0.5) / 0.9))
        x = (width * ring + swell) * np.sin(turn)
        z = (0.9 * ring + swell * 0.7) * np.cos(turn)
        points = together([x, np.minimum(y, 0.35), z])
        rotated = self.view.rotate(points) + together([0 * y, np.maximum(y - 0.35, 0), 0 * y])
        streak = np.sin(turn * 23 + 4 * wave * np.sin(y * 6)) * 0.6 + np.sin(turn * 37 + 3 * y) * 0.4
        colour = self._hair_shade(rotated, False, streak) * (1 - 0.18 * along)[..., None]
        flat = self.view.flatten(rotated).reshape(-1, 2)
        colours = np.concatenate([colour, np.ones((rows, columns, 1))], -1).reshape(-1, 4)
        return flat, colours, lattice(rows, columns, False)

    def _bun(self, easel: Easel) -> None:
        if self.person.bun < 0.3 or self.situation.hat:
            return
        radius = spread(self.person.bun, 0.15, 0.40)
        place = self.view.flatten(self.view.rotate(np.array([[0.0, -1.02 - radius * 0.6, -0.25]])))[0].tolist()
        pixels = radius * self.view.scale
        lx, ly, _ = self.light.direction
        gradient = skia.GradientShader.MakeRadial(
            skia.Point(place[0] + lx * pixels * 0.4, place[1] + ly * pixels * 0.4),
            pixels * 1.3,
            [self.tone(self.hair, 1.25), self.tone(self.hair, 0.95), self.tone(self.hair, 0.5)],
        )
        path = skia.Path.Circle(*place, pixels)
        easel.path(path, skia.Paint(AntiAlias=True, Shader=gradient), 0)

    def _hat(self, easel: Easel) -> None:
        colour = np.array(CLOTHES_COLOURS[self.situation.hat_colour])
        rows, columns = 8, 28
        lon = np.linspace(-np.pi, np.pi, columns, endpoint=False)
        along = np.linspace(0, 1, rows)[:, None]
        wide = self.situation.hat == "sun hat"
        y = -1.0 + 0.50 * along + 0 * lon + 0.10 * along * np.cos(lon + np.pi)
        y = np.maximum(y, -0.999)
        turn = np.broadcast_to(lon, y.shape)
        base = skull(self.person, self.plan, turn.ravel(), y.ravel()).reshape(rows, columns, 3)
        body = 0.13 + 0.10 * (1 - along)
        if wide:
            body = np.where(along > 0.8, 0.13 + 2.2 * (along - 0.8), 0.13 + 0.05 * (1 - along))
        else:
            body = body + 0.035 * (along > 0.62)
        outward = together([np.sin(turn), np.where(along > 0.8, 0.12 * wide, y), np.cos(turn)])
        rotated = self.view.rotate(base + outward * (body * np.ones_like(y))[..., None])
        knit = 1 + 0.06 * np.sin(turn * 22)[..., None] * (not wide)
        tint = colour * knit * np.where((along > 0.6) & (along < 0.82), 0.78, 1.0)[..., None]
        shown = self.lit(tint.reshape(-1, 3), normals(rotated, True).reshape(-1, 3), 0.03)
        flat = self.view.flatten(rotated).reshape(-1, 2)
        cells = lattice(rows, columns, True)
        colours = np.concatenate([shown, np.ones((len(shown), 1))], 1)
        if wide:  # the brim shows its underside too, behind its front
            easel.mesh(flat, colours * np.array([0.62, 0.62, 0.62, 1]), cells[~front_facing(flat, cells)], 0)
        easel.mesh(flat, colours, cells[front_facing(flat, cells)], 0)

    # ---- below the head ----

    def _glasses(self, easel: Easel) -> None:
        scale = self.view.scale
        paint = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=0.04 * scale,
            Color=self.tone(np.array([0.12, 0.10, 0.12])),
        )
        tint = skia.Paint(AntiAlias=True, Color=0x22D8E8F4)
        turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        power = 1.0 if self.situation.round_glasses else 0.55
        across = np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** power
        along = np.sign(np.sin(turn)) * np.abs(np.sin(turn)) ** power
        front = 0.86 * 0.9 + 0.12
        ends = []
        for side in (-1, 1):
            x = side * (self.plan.eye_x + 0.01) + across * 0.205
            points = together([x, self.plan.eye_y + 0.03 + along * 0.17, front - 0.28 * x * x])
            flat = self.view.flatten(self.view.rotate(points))
            easel.path(polygon(flat), tint)
            easel.path(polygon(flat), paint)
            ends.append(points[0 if side < 0 else 14])
            hinge = points[14 if side < 0 else 0]
            width = float(half_width(self.person, self.plan, np.array([0.0]))[0])
            if float(self.view.turn[2] @ np.array([side, 0, 0.55])) > 0:
                arm = np.stack([hinge, np.array([side * (width + 0.03), self.plan.eye_y, 0.0])])
                easel.path(polygon(self.view.flatten(self.view.rotate(arm)), False), paint)
        easel.path(polygon(self.view.flatten(self.view.rotate(np.stack(ends))), False), paint)

    def _body(self, easel: Easel) -> None:
        """Neck, shoulders, clothes: they stand upright whatever the head does, the neck joining the two."""
        person, situation = self.person, self.situation
        cx, cy = self.view.centre
        scale = self.view.scale
        lx = self.light.direction[0]

        def place(points: list[tuple[float, float]]) -> Array:
            return np.array(points) * scale + np.array([cx, cy])

        def sidelight(colour: Array, half: float) -> skia.Shader:
            left, right = self.tone(colour, 1 - 0.35 * lx), self.tone(colour, 1 + 0.35 * lx)
            ends = place([(-half, 0), (half, 0)])
            middle = self.tone(colour, 1.02)
            return skia.GradientShader.MakeLinear(list(map(skia.Point, *ends.T.tolist())), [left, middle, right])

        chin = self.view.rotate(np.array([[0.0, 0.55, -0.2]]))[0]
        neck = spread(person.jaw, 0.34, 0.46) + (0.0 if person.woman else 0.06)
        shoulder = 1.28 if person.woman else 1.58
        skin = self.skin * np.array([0.86, 0.80, 0.79])
        column = place(
            [
                (chin[0] - neck, chin[1]),
                (-neck * 0.98, 1.25),
                (-neck * 1.5, 1.55),
                (neck * 1.5, 1.55),
                (neck * 0.98, 1.25),
                (chin[0] + neck, chin[1]),
            ]
        )
        easel.path(polygon(column), skia.Paint(AntiAlias=True, Shader=sidelight(skin, neck)), 0)
        # The head's shadow on the neck.
        shadow = skia.GradientShader.MakeLinear(
            [skia.Point(cx, cy + 0.85 * scale), skia.Point(cx, cy + 1.4 * scale)],
            [self.tone(skin, 0.45, 0.75), self.tone(skin, 0.45, 0)],
        )
        easel.path(polygon(column), skia.Paint(AntiAlias=True, Shader=shadow))
        colour = np.array(CLOTHES_COLOURS[situation.clothes_colour])
        down = 12.0  # below the picture even for the smallest head at its top
        body = skia.Path()
        start, *_ = place([(-neck * 1.02, 1.26)]).tolist()
        body.moveTo(*start)
        deep = {"shirt": 1.52, "sweater": 1.46, "jacket": 1.95, "dress": 1.80}[situation.garment]

        def curve(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> None:
            body.cubicTo(*place([a, b, c]).ravel().tolist())

        if situation.garment == "jacket":
            body.lineTo(*place([(0, deep)])[0].tolist())
            body.lineTo(*place([(neck * 1.02, 1.26)])[0].tolist())
        else:
            curve((-neck * 0.8, deep), (neck * 0.8, deep), (neck * 1.02, 1.26))
        curve((neck * 1.4, 1.45), (shoulder * 0.95, 1.45), (shoulder, 2.1))
        curve((shoulder * 1.12, 2.9), (shoulder * 1.1, 4), (shoulder * 1.1, down))
        body.lineTo(*place([(-shoulder * 1.1, down)])[0].tolist())
        curve((-shoulder * 1.1, 4), (-shoulder * 1.12, 2.9), (-shoulder, 2.1))
        curve((-shoulder * 0.95, 1.45), (-neck * 1.4, 1.45), (-neck * 1.02, 1.26))
        if situation.garment == "jacket":
            easel.path(
                polygon(place([(-neck, 1.45), (0, 1.6), (neck, 1.45), (0.5, 3), (-0.5, 3)])),
                skia.Paint(AntiAlias=True, Color=self.tone(np.array([0.92, 0.92, 0.90]))),
                0,
            )
        easel.path(body, skia.Paint(AntiAlias=True, Shader=sidelight(colour, shoulder)), 0)
        if situation.pattern != "plain":
            light = colour.mean() < 0.6
            paint = skia.Paint(AntiAlias=True, Color=self.tone(colour + (0.28 if light else -0.28), 1, 0.8))
            easel.canvas.save()
            easel.canvas.clipPath(body, skia.ClipOp.kIntersect, True)
            if situation.pattern == "striped":
                for index in range(9):
                    a, b = place([(-2, 1.5 + index * 0.34), (2, 1.62 + index * 0.34)]).tolist()
                    easel.canvas.drawRect(skia.Rect.MakeLTRB(*a, *b), paint)
            else:
                for index in range(60):
                    x, y = place([((index % 10) * 0.36 - 1.62 + 0.18 * (index // 10 % 2), 1.55 + index // 10 * 0.34)])[
                        0
                    ]
                    easel.canvas.drawCircle(float(x), float(y), 0.065 * scale, paint)
            easel.canvas.restore()
        line = skia.Paint(
            AntiAlias=True, Style=skia.Paint.kStroke_Style, StrokeWidth=0.07 * scale, Color=self.tone(colour, 0.72)
        )
        if situation.garment == "jacket":
            for side in (-1, 1):
                lapel = place([(side * neck * 1.05, 1.26), (side * 0.52, 1.75), (0, deep)])
                easel.path(polygon(lapel), skia.Paint(AntiAlias=True, Color=self.tone(colour, 0.80)))
            a, b = place([(0, deep), (0, down)]).tolist()
            easel.canvas.drawLine(*a, *b, line)
        else:
            collar = skia.Path()
            collar.moveTo(*start)
            collar.cubicTo(*place([(-neck * 0.8, deep), (neck * 0.8, deep), (neck * 1.02, 1.26)]).ravel().tolist())
            if situation.garment == "sweater":
                line.setStrokeWidth(0.14 * scale)
            easel.canvas.drawPath(collar, line)
        if situation.scarf:
            tint = np.array(CLOTHES_COLOURS[situation.scarf_colour])
            wrap = place(
                [
                    (-neck * 1.5, 1.18),
                    (neck * 1.5, 1.18),
                    (neck * 1.75, 1.5),
                    (neck * 0.9, 1.66),
                    (-neck * 0.9, 1.66),
                    (-neck * 1.75, 1.5),
                ]
            )
            tail = place([(0.1, 1.5), (0.5, 1.5), (0.62, 2.6), (0.16, 2.6)])
            easel.path(polygon(tail), skia.Paint(AntiAlias=True, Shader=sidelight(tint * 0.86, 1.0)), 0)
            easel.path(polygon(wrap), skia.Paint(AntiAlias=True, Shader=sidelight(tint, 1.0)), 0)


def eye_size(person: Identity) -> float:
    """Half an eye's width, in head units."""
    return spread(person.eye_size, 0.135, 0.20)


def feature_curves(person: Identity, situation: Situation, lengths: Plan) -> dict[str, Array]:
    """Curves and dots of the face by name, in face coordinates (N, 2)."""
    smile, wide = situation.smile, situation.mouth_open
    curves: dict[str, Array] = {}
    curves["eyes"] = np.array([[-lengths.eye_x, lengths.eye_y], [lengths.eye_x, lengths.eye_y]])  # first: see `Figure`
    curves.update({"nose tip": np.array([[0.0, lengths.nose_y - 0.01]])})
    t = _SPAN[13]
    x = t * lengths.mouth_half
    corner = -0.075 * smile * t**2
    line = lengths.mouth_y + corner
    bow = 1 - t**2
    upper = spread(person.lip_upper, 0.035, 0.095) * (1 - 0.3 * max(smile, 0))
    lower = spread(person.lip_lower, 0.045, 0.120) * (1 - 0.25 * max(smile, 0))
    dip = 1 - 0.28 * np.exp(-((t / 0.16) ** 2))
    round_ = np.sqrt(np.clip(bow, 0, 1))
    curves["mouth corners"] = together([x, line])[[0, -1]]
    curves["lip top"] = together([x, line - upper * bow**0.8 * dip])
    curves["lip upper"] = together([x, line + 0.012 * bow * np.cos(t * 6)])
    # The jaw's own drop (see `surface`) is added to what is given here.
    curves["lip lower"] = together([x, line + 0.012 * bow * np.cos(t * 6) + wide * 0.11 * round_])
    curves["lip bottom"] = together([x, line + wide * 0.11 * round_ + lower * bow**0.7])
    brow_y = lengths.eye_y - spread(person.brow_height, 0.19, 0.30) - 0.07 * situation.brow_raise
    thick = spread(person.brow_thickness, 0.022, 0.085)
    u = _UNIT[9]
    arch = spread(person.brow_arch, 0.02, 0.10) * np.sin(np.pi * np.clip(u * 1.1 - 0.05, 0, 1))
    slope = spread(person.brow_tilt, 0.07, -0.09) - 0.16 * situation.brow_frown
    height = brow_y + slope * (u - 0.2) - arch + 0.06 * situation.brow_frown * (u < 2)
    reach = lengths.eye_x - 0.165 + 0.34 * u - 0.03 * max(situation.brow_frown, 0)
    half = thick * np.interp(u, [0, 0.15, 0.6, 1], [0.55, 1.0, 0.85, 0.1])
    for side, sign in ((-1, "-"), (1, "+")):
        top, bottom = together([side * reach, height - half]), together([side * reach, height + half])
        curves[f"brow {sign}"] = np.concatenate([top, bottom[::-1]])
        v = _UNIT[7]
        curves[f"fold {sign}"] = together(
            [
                side * (lengths.nose_width * 1.25 + 0.19 * v**0.8 + 0.03 * max(smile, 0)),
                lengths.nose_y - 0.02 + (lengths.mouth_y - lengths.nose_y + 0.06) * v,
            ]
        )
        curves[f"bag {sign}"] = together(
            [side * (lengths.eye_x - 0.13 + 0.24 * v), lengths.eye_y + 0.15 + 0.04 * np.sin(np.pi * v)]
        )
        for index in range(3):
            w = _UNIT[4]
            curves[f"crow {sign}{index}"] = together(
                [side * (lengths.eye_x + 0.22 + 0.10 * w), lengths.eye_y + (index - 1) * (0.03 + 0.06 * w) + 0.01]
            )
        turn = np.pi * _UNIT[6]
        centre = side * lengths.nose_width * 0.52
        curves[f"nostril {sign}"] = together(
            [centre + 0.035 * np.cos(turn), lengths.nose_y + 0.062 - 0.016 * np.sin(turn)]
        )
        curve = 1.1 * _SPAN[7]
        curves[f"wing {sign}"] = together(
            [
                side * (lengths.nose_width * (0.80 + 0.28 * np.cos(curve))),
                lengths.nose_y + 0.015 + 0.055 * np.sin(curve),
            ]
        )
    for index in range(3):
        h = _SPAN[9]
        curves[f"forehead {index}"] = together(
            [h * (0.36 - 0.05 * index), brow_y - 0.14 - 0.085 * index + 0.02 * np.cos(h * 3 + index)]
        )
    m = _SPAN[15]
    tall = spread(person.moustache, 0.03, 0.075)
    middle = (lengths.nose_y + 0.09 + lengths.mouth_y - 0.02) / 2 + 0.02
    sag = 0.10 * np.abs(m) ** 2 - 0.075 * smile * m**2
    edge = together([m * lengths.mouth_half * 1.12, middle - tall * (1 - m**2) ** 0.6 + sag])
    below = together([m * lengths.mouth_half * 1.12, middle + tall * (1 - m**2) ** 0.6 + sag])
    curves["moustache"] = np.concatenate([edge, below[::-1]])
    if person.moles:
        curves["moles"] = np.array([[mole.x, mole.y] for mole in person.moles])
    count = round(person.freckles * len(person.freckle_places))
    if count:
        curves["freckles"] = np.array(person.freckle_places[:count])
    return curves
