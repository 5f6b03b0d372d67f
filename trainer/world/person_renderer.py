"""The renderer of one person. Every length is in head units until `View` makes it pixels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from math import asin, cos, sin
from typing import NamedTuple

import numpy as np
import skia

from . import hair, skin
from .clothes import draw_body, joints
from .curves import feature_curves
from .head import Array, Real, View, face_layout, lerp, longitude, rotation, surface
from .light import Light, column, mix, multiply, ramp
from .meshes import ProjectedMeshes
from .people import WorldPerson
from .raster import Raster, polygon, shade
from .situations import Colour, Situation

IRIS = (
    (0.22, 0.13, 0.08),
    (0.42, 0.26, 0.12),
    (0.50, 0.42, 0.16),
    (0.28, 0.50, 0.28),
    (0.25, 0.52, 0.72),
    (0.5, 0.6, 0.66),
)
SIGNS = {-1: "-", 1: "+"}  # of the left and the right side, as seen in the picture
FACE_TRIANGLES = skin.face_triangles()
_BEFORE_EYE = np.array([[0], [0], [0.02]], Real)
POSE_POINTS = 18
# How far a side of the head may be turned from the viewer before its eye, or its ear, is no longer seen.
EYE_HIDDEN, EAR_HIDDEN = -0.05, -0.25
_EAR_SIDES = np.array([[-1, 1], [0, 0], [0, 0]], Real)
EYE_STEP = 0.05  # along an eye's own axes, to see where they point in the picture

_ROUND = np.linspace(0, 2 * np.pi, 18, endpoint=False, dtype=Real)
# Ears, outline and hollow: down, and outward where they get narrower at the lobe.
_EAR_DOWN = np.outer([1.0, 0.66], np.sin(_ROUND)).ravel().astype(Real)
_EAR_OUT = np.cos(_ROUND) * np.where(np.sin(_ROUND) > 0, 1 - 0.45 * np.sin(_ROUND), 1.0)
_EAR_OUT = np.outer([1.0, 0.66], _EAR_OUT).ravel().astype(Real)

# The rims of glasses: across and down.
_TURN = np.linspace(0, 2 * np.pi, 28, endpoint=False)
_RIM_ROUND = np.array([np.cos(_TURN), np.sin(_TURN)], Real)
_RIM_SQUARE = np.sign(_RIM_ROUND) * np.abs(_RIM_ROUND) ** 0.55
_NECK_TOP = np.array([[0.0], [0.55], [-0.2]], Real)

Line = tuple[list[float], list[float]]  # x, y in pixels

# Radii of freckles in head units, in turn. Spots that face the viewer less than this are not seen.
FRECKLES = (0.010, 0.016, 0.022)
FACING = 0.02

FOREHEAD = [f"forehead {index}" for index in range(3)]
FOLDS, BAGS, NOSTRILS, WINGS = ([f"{name} {sign}" for sign in "-+"] for name in ("fold", "bag", "nostril", "wing"))
CROWS_FEET = [f"crow {sign}{index}" for sign in "-+" for index in range(3)]


class Ear(NamedTuple):
    in_front: bool  # turned to the viewer: the head hides nothing of it
    outline: skia.Path
    hollow: skia.Path
    colour: Colour


class PersonRenderer:
    """One person in one situation at one place of a picture, measured and ready to be drawn."""

    def __init__(
        self, person: WorldPerson, situation: Situation, centre: tuple[float, float], scale: float, light: Light
    ):
        self.person, self.situation, self.light = person, situation, light
        self.view = View(rotation(situation.yaw, situation.pitch, situation.roll), centre, scale)
        self.layout = face_layout(person, situation)
        self.skin, self.hair = skin.skin_colour(person), hair.hair_colour(person)
        self.eye_size = lerp(person.eye_size, 0.135, 0.20)  # half its width
        # What is fixed to the skin is measured with it: the lattice of the head, the curves of the face, the beard.
        places, self._slices = feature_curves(person, situation, self.layout)
        bearded = person.beard >= skin.BEARD_LEAST
        lon = [skin.HEAD_LON, longitude(person, *places), skin.BEARD_LON][: 2 + bearded]
        y = [skin.HEAD_Y, places[1], skin.BEARD_Y][: 2 + bearded]
        points = surface(person, situation, self.layout, np.concatenate(lon), np.concatenate(y))
        end = skin.HEAD.size + places.shape[1]
        head, curves, beard = points[:, : skin.HEAD.size], points[:, skin.HEAD.size : end], points[:, end:]
        self.front_x = skin.front_x(head)
        self._place_outline(places, lon[1], curves)
        meshes = {
            "head": skin.head(head, self._skin_tints()),
            "beard": skin.beard(person, self.layout, self.hair, beard) if bearded else None,
            "hat": hair.hat(person, situation),
            "cap": hair.cap(person, situation, self.hair),
            "locks": hair.locks(person, self.layout, self.hair),
        }
        self.meshes = ProjectedMeshes({name: mesh for name, mesh in meshes.items() if mesh}, self.view, light)

    def _skin_tints(self) -> Array:
        return skin.skin_tints(self.person, self.layout, self.skin, self.hair, self.front_x)

    # ---- places on the face ----

    def _place_outline(self, places: Array, lon: Array, points: Array) -> None:
        """Find every curve and dot of the face in the picture: (3, N) x, y, and how much it faces the viewer (1 fully).

        `frames`: by side, the affine (2, 3) from an eye's own coordinates, head units around its centre, to pixels.
        """
        eyes = points[:, self._slices["eyes"]] + _BEFORE_EYE
        turn = 0.75 * asin(self.layout.eye_x / self.layout.width)
        along = np.array([[cos(turn), cos(turn)], [0, 0], [sin(turn), -sin(turn)]], Real) * EYE_STEP
        down = np.array([[0], [1], [-0.08]], Real) * EYE_STEP
        flat = self._pixels(np.concatenate([points, eyes, eyes + along, eyes + down], 1))
        outward = np.array([np.sin(lon), 0.55 * places[1], np.cos(lon)])
        facing = (self.view.turn[2] @ outward) / np.sqrt((outward * outward).sum(0))
        self.outline = np.concatenate([flat[:, : len(lon)], facing[None]])
        self._x, self._y, self._facing = self.outline.tolist()
        self._face_x, self._face_y = places.tolist()
        centre, *ends = flat[:, len(lon) :].reshape(2, 3, 2).transpose(1, 2, 0)
        axes = [(end - centre) / EYE_STEP for end in ends]
        self.frames = dict(zip(SIGNS, np.stack([*axes, centre], -1).tolist()))

    def _pixels(self, points: Array) -> Array:
        """Head coordinates (3, N) as pixels (2, N)."""
        return self.view.project(self.view.rotate(points))

    def outline_of(self, name: str) -> Array:
        return self.outline[:, self._slices[name]]

    def _line(self, name: str) -> Line:
        where = self._slices[name]
        return self._x[where], self._y[where]

    def _facing_of(self, name: str) -> float:
        """How much a curve faces the viewer, on the average."""
        facing = self._facing[self._slices[name]]
        return sum(facing) / len(facing)

    def _iris(self) -> tuple[float, float]:
        """The iris' centre in an eye's own coordinates: where the eyes look."""
        x, y = self.situation.gaze
        return x * self.eye_size * 0.30, (y * 0.12 - 0.02) * self.eye_size

    def landmarks(self) -> Array:
        """(5, 2) pixels: left eye, right eye, nose tip, mouth corners left and right, as seen in the picture."""
        x, y = self._iris()
        eyes = [[a * x + b * y + c for a, b, c in self.frames[side]] for side in SIGNS]
        return np.concatenate([eyes, self.outline_of("nose tip")[:2].T, self.outline_of("mouth corners")[:2].T])

    def pose(self) -> Array:
        """(18, 2) pixels: the points of a body in OpenPose's order, NaN for those that are not in sight.

        Right and left are the person's own. Of the body there are neck and shoulders: arms and hips are never drawn.
        """
        points = np.full((POSE_POINTS, 2), np.nan, Real)
        left_eye, right_eye, nose = self.landmarks()[:3]
        points[0], points[14], points[15] = nose, left_eye, right_eye
        points[[1, 2, 5]] = np.array(joints(self.person), Real) * self.view.scale + np.array(self.view.centre, Real)
        x, sight = self.layout.ear_x, self.view.turn[2] @ _EAR_SIDES
        points[16:] = self._pixels(np.array([[-x, x], [0.12, 0.12], [0, 0]], Real)).T
        # Of a head that turns away, the far ear and then the far eye are hidden.
        points[16:][sight < EAR_HIDDEN] = np.nan
        points[14:16][[self._facing_of(f"brow {SIGNS[side]}") < EYE_HIDDEN for side in SIGNS]] = np.nan
        return points

    def box(self) -> Array:
        """(4,) pixels x0, y0, x1, y1 around the face as far as it is turned to the viewer."""
        return self.meshes.bounds("head", self.meshes.front_of("head") & FACE_TRIANGLES)

    # ---- drawing, back to front ----

    def draw(self, raster: Raster, label: int) -> None:
        """Draw the person; `label` is what the visible face gets among the label pixels."""
        meshes, long_hair = self.meshes, "locks" in self.meshes.parts
        if long_hair:
            meshes.draw(raster, "locks", 0, ~meshes.front_of("locks"), factor=0.72)
        self._bun(raster)
        with raster.units(self.view.centre, self.view.scale):
            (x,), (y,), _ = self.view.rotate(_NECK_TOP).tolist()
            draw_body(raster, self.person, self.situation, self.light, self.skin, (x, y))
        ears = [] if long_hair else self._ears()  # which long hair covers
        for ear in ears:
            if not ear.in_front:
                self._ear(raster, ear)
        head = meshes.front_of("head")
        meshes.draw(raster, "head", 0, head & ~FACE_TRIANGLES)
        meshes.draw(raster, "head", label, head & FACE_TRIANGLES)
        for ear in ears:
            if ear.in_front:
                self._ear(raster, ear)
        self._wrinkles(raster)
        self._spots(raster, on_nose=False)
        for side in SIGNS:
            self._eye(raster, side)
        if "beard" in meshes.parts:
            meshes.draw(raster, "beard")
        self._mouth(raster)
        nose = skin.nose_triangles(self.layout, self.front_x, self.eye_size)
        meshes.draw(raster, "head", None, head & nose)
        self._nostrils(raster)
        self._spots(raster, on_nose=True)
        self._moustache(raster)
        self._brows(raster)
        if self.situation.glasses:
            self._glasses(raster)
        meshes.draw(raster, "cap", 0)
        if long_hair:
            meshes.draw(raster, "locks", 0)
        if self.situation.hat == "sun hat":  # the brim shows its underside too, behind its front
            meshes.draw(raster, "hat", 0, ~meshes.front_of("hat"), factor=0.62)
        if self.situation.hat:
            meshes.draw(raster, "hat", 0)

    def _fill(self, colour: Colour, factor: float = 1.0, alpha: float = 1.0) -> skia.Paint:
        return skia.Paint(AntiAlias=True, Color=self.light.tone(colour, factor, alpha))

    def spots(self, kind: str) -> Array:
        """The "moles" or "freckles" (M, 5): where they are in the picture, half their width and height there, all in
        pixels, and how much each faces the viewer, below FACING not at all.
        """
        radii = [mole.radius for mole in self.person.moles] if kind == "moles" else FRECKLES
        where = self._slices[kind]
        rows = []
        for px, py, facing, radius in zip(self._x[where], self._y[where], self._facing[where], cycle(radii or [0.0])):
            tall = radius * self.view.scale
            rows.append((px, py, tall * max(facing, 0.15), tall, facing))
        return np.array(rows, float).reshape(-1, 5)

    def _spots(self, raster: Raster, on_nose: bool) -> None:
        """Freckles and moles; those on the nose are drawn after it, the others may hide behind it."""
        freckles, moles = lerp(self.person.freckles, 0.25, 0.7), 0.95
        for name, tint, alpha in (("freckles", (0.70, 0.50, 0.40), freckles), ("moles", (0.36, 0.26, 0.24), moles)):
            where = self._slices[name]
            if where.start == where.stop:
                continue
            places = zip(self._face_x[where], self._face_y[where], self.spots(name).tolist())
            paint = self._fill(multiply(self.skin, tint), 1, alpha)
            for x, y, (px, py, thin, tall, facing) in places:
                near = abs(x) < self.layout.nose_width * 1.3 and y < self.layout.nose_y + 0.1
                if near == on_nose and facing > FACING:
                    raster.canvas.drawOval(skia.Rect(px - thin, py - tall, px + thin, py + tall), paint)

    def _lines(self, raster: Raster, names: Iterable[str], colour: Colour, width: float, alpha: float) -> None:
        """Soft lines of `width` head units along what of the curves faces the viewer. They do not touch one another."""
        if alpha < 0.04:
            return
        path = skia.Path()
        for name in names:
            where = self._slices[name]
            draw = path.moveTo
            for x, y, facing in zip(self._x[where], self._y[where], self._facing[where]):
                if facing > 0.08:
                    draw(x, y)
                    draw = path.lineTo
        paint = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=width * self.view.scale,
            StrokeCap=skia.Paint.kRound_Cap,
            StrokeJoin=skia.Paint.kRound_Join,
            Color=self.light.tone(colour, 1, min(alpha, 1.0)),
        )
        raster.path(path, paint)

    def _wrinkles(self, raster: Raster) -> None:
        old, situation = max(self.person.age - 0.25, 0) / 0.75, self.situation
        dark = multiply(self.skin, (0.66, 0.52, 0.48))
        self._lines(raster, FOREHEAD, dark, 0.022, 0.75 * old + 0.25 * max(situation.brow_raise, 0))
        self._lines(raster, FOLDS, dark, 0.026, 0.12 + 0.6 * old + 0.35 * max(situation.smile, 0))
        self._lines(raster, BAGS, dark, 0.022, 0.10 + 0.6 * old)
        self._lines(raster, CROWS_FEET, dark, 0.016, 0.85 * old - 0.1)

    def _eye(self, raster: Raster, side: int) -> None:
        """An eye in its own flat coordinates: x outward on both sides' own half, lids, iris at `_iris`, lashes."""
        person, situation, tone, canvas = self.person, self.situation, self.light.tone, raster.canvas
        if self._facing_of(f"brow {SIGNS[side]}") < EYE_HIDDEN:
            return
        size = self.eye_size
        opening = size * lerp(person.eye_opening, 0.34, 0.66) * max(situation.eyes_open, 0.15)
        opening *= 1 - 0.18 * max(situation.smile, 0)
        tilt = lerp(person.eye_tilt, 0.10, -0.28) * size
        inner, outer = -side * size, side * size
        line = skia.Path()
        line.moveTo(inner, opening * 0.25)
        line.cubicTo(inner * 0.45, -opening * 1.45, outer * 0.55, -opening * 1.40 + tilt * 0.8, outer, tilt)
        lower = (outer * 0.6, opening * 1.0 + tilt * 0.3, inner * 0.4, opening * 1.05, inner, opening * 0.25)
        lid = skia.Path(line)
        lid.cubicTo(*lower)
        lid.close()
        (a, b, x), (c, d, y) = self.frames[side]
        canvas.save()
        canvas.concat(skia.Matrix.MakeAll(a, b, x, c, d, y, 0, 0, 1))
        paint = skia.Paint(AntiAlias=True, Color=tone((0.97, 0.96, 0.95)))
        canvas.drawPath(lid, paint)
        canvas.save()
        canvas.clipPath(lid, skia.ClipOp.kIntersect, True)
        x, y = self._iris()
        radius = size * 0.50
        iris = ramp(IRIS, person.eye_hue)
        for dx, dy, share, colour in (
            (0.0, 0.0, 1.0, tone(iris, 0.45)),
            (0.0, 0.0, 0.84, tone(iris)),
            (0.0, 0.3, 0.45, tone(iris, 1.3, 0.6)),
            (0.0, 0.0, 0.46, 0xFF0C0A0C),
        ):
            paint.setColor(colour)
            canvas.drawCircle(x + dx * radius, y + dy * radius, radius * share, paint)
        stroke = skia.Paint(AntiAlias=True, Color=0x50281814, Style=skia.Paint.kStroke_Style, StrokeWidth=opening * 0.7)
        canvas.drawPath(line, stroke)  # the upper lid's shadow
        paint.setColor(0xF0FFFFFF)
        canvas.drawCircle(x - radius * 0.35, y - radius * 0.4, radius * 0.24, paint)
        canvas.restore()
        stroke.setStrokeCap(skia.Paint.kRound_Cap)
        stroke.setStrokeWidth(lerp(person.lashes, 0.022, 0.055))
        stroke.setColor(tone(multiply(self.skin, (0.2, 0.2, 0.2)), 0.6))
        if person.lashes > 0.6:
            line.moveTo(outer * 0.85, tilt - opening * 0.3)
            line.lineTo(outer * 1.25, tilt - size * 0.3 * person.lashes)
        canvas.drawPath(line, stroke)
        fold = skia.Path()
        lift = size * lerp(person.eye_depth, 0.12, 0.32)
        upper = -opening * 1.5 - lift, -opening * 1.45 + tilt - lift
        fold.moveTo(inner * 0.9, opening * 0.1 - lift)
        fold.cubicTo(inner * 0.4, upper[0], outer * 0.6, upper[1], outer * 1.1, tilt - lift * 0.6)
        stroke.setStrokeWidth(0.02)
        stroke.setColor(tone(self.skin, 0.5, 0.6))
        canvas.drawPath(fold, stroke)
        lash_line = skia.Path()
        lash_line.moveTo(outer, tilt)
        lash_line.cubicTo(*lower)
        stroke.setStrokeWidth(0.016)
        stroke.setColor(tone(self.skin, 0.42, 0.7))
        canvas.drawPath(lash_line, stroke)
        canvas.restore()

    def _brows(self, raster: Raster) -> None:
        red, green, blue = (0.62 * hair + 0.06 * skin for hair, skin in zip(self.hair, self.skin))
        for sign in "-+":
            if self._facing_of(f"brow {sign}") > -0.02:
                raster.path(polygon(*self._line(f"brow {sign}")), self._fill((red, green, blue), 1, 0.93))

    def _moustache(self, raster: Raster) -> None:
        if self.person.moustache >= 0.25:
            paint = self._fill(self.hair, 0.85, lerp(self.person.moustache, 0.6, 1.0))
            raster.path(polygon(*self._line("moustache")), paint)

    def _mouth(self, raster: Raster) -> None:
        tone, scale = self.light.tone, self.view.scale
        lip = multiply(self.skin, (0.86, 0.58, 0.56))
        lip = mix(lip, (0.72, 0.16, 0.20), lerp(self.person.lip_colour, 0.0, 0.75))
        top, upper, lower, bottom = (self._line(f"lip {name}") for name in ("top", "upper", "lower", "bottom"))
        paint = self._fill((0.30, 0.08, 0.09))
        gap = _between(upper, lower)
        raster.path(gap, paint)
        if self.situation.mouth_open > 0.2:
            raster.canvas.save()
            raster.canvas.clipPath(gap, skia.ClipOp.kIntersect, True)
            if self.situation.smile > 0.4:
                paint.setColor(tone((0.96, 0.95, 0.92)))
                raster.path(_between(upper, _lowered(upper, 0.07 * scale)), paint)
            paint.setColor(tone((0.78, 0.36, 0.38)))
            middle = lower[0][3:-3], lower[1][3:-3]
            raster.path(_between(_lowered(middle, -0.06 * scale), middle), paint)
            raster.canvas.restore()
        paint.setColor(tone(lip, 0.86))
        raster.path(_between(top, upper), paint)
        paint.setColor(tone(lip))
        raster.path(_between(lower, bottom), paint)
        shine = [[a * 0.45 + b * 0.55 for a, b in zip(*both)][4:8] for both in zip(lower, bottom)]
        paint.setColor(0x40FFFFFF)
        paint.setStyle(skia.Paint.kStroke_Style)
        paint.setStrokeWidth(0.03 * scale)
        paint.setStrokeCap(skia.Paint.kRound_Cap)
        raster.path(polygon(*shine, closed=False), paint)
        paint.setColor(tone(lip, 0.35, 0.85))
        paint.setStrokeWidth(0.02 * scale)
        raster.path(polygon(*upper, closed=False), paint)

    def _nostrils(self, raster: Raster) -> None:
        dark = multiply(self.skin, (0.42, 0.28, 0.26))
        self._lines(raster, NOSTRILS, dark, 0.032, 0.85)
        self._lines(raster, WINGS, dark, 0.018, 0.45)

    # ---- beside and above the face ----

    def _ears(self) -> list[Ear]:
        tall, angle = lerp(self.person.ear_size, 0.17, 0.30), lerp(self.person.ear_angle, 0.25, 0.95)
        reach = tall * 0.62 * (1 + _EAR_OUT)
        x, y, z = (
            self.layout.ear_x * 0.97 + 0.75 * sin(angle) * reach,
            0.12 + tall * _EAR_DOWN,
            0.02 - cos(angle) * reach,
        )
        flat = self._pixels(np.concatenate([[-x, y, z], [x, y, z]], 1))
        normals = self.view.turn @ np.array([[-cos(angle), cos(angle)], [0, 0], [sin(angle), sin(angle)]], Real)
        colours = self.light.illuminate(column(multiply(self.skin, (1.0, 0.93, 0.91))), normals)
        facing = self.view.turn[2] @ np.array([[-0.97, 0.97], [0, 0], [0.25, 0.25]], Real)
        parts = flat.reshape(2, 2, 2, -1).transpose(1, 2, 0, 3).tolist()
        return [
            Ear(toward > 0.1, polygon(*outline), polygon(*hollow), colour)
            for toward, (outline, hollow), colour in zip(facing.tolist(), parts, colours.T.tolist())
        ]

    def _ear(self, raster: Raster, ear: Ear) -> None:
        raster.path(ear.outline, skia.Paint(AntiAlias=True, Color=shade(ear.colour)), 0)
        raster.path(ear.hollow, skia.Paint(AntiAlias=True, Color=shade(ear.colour, 0.76)))

    def _bun(self, raster: Raster) -> None:
        if self.person.bun < 0.3 or self.situation.hat:
            return
        radius = lerp(self.person.bun, 0.15, 0.40)
        (x,), (y,) = self._pixels(np.array([[0.0], [-1.02 - radius * 0.6], [-0.25]], Real)).tolist()
        pixels = radius * self.view.scale
        lx, ly, _ = self.light.direction
        gradient = skia.GradientShader.MakeRadial(
            skia.Point(x + lx * pixels * 0.4, y + ly * pixels * 0.4),
            pixels * 1.3,
            [self.light.tone(self.hair, factor) for factor in (1.25, 0.95, 0.5)],
        )
        raster.path(skia.Path.Circle(x, y, pixels), skia.Paint(AntiAlias=True, Shader=gradient), 0)

    def _glasses(self, raster: Raster) -> None:
        layout = self.layout
        paint = skia.Paint(
            AntiAlias=True,
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=0.04 * self.view.scale,
            Color=self.light.tone((0.12, 0.10, 0.12)),
        )
        tint = skia.Paint(AntiAlias=True, Color=0x22D8E8F4)
        across, down = _RIM_ROUND if self.situation.round_glasses else _RIM_SQUARE
        ends = []
        for side in SIGNS:
            x = side * (layout.eye_x + 0.01) + across * 0.205
            points = np.array([x, layout.eye_y + 0.03 + down * 0.17, 0.894 - 0.28 * x * x])
            rim = polygon(*self._pixels(points).tolist())
            raster.path(rim, tint)
            raster.path(rim, paint)
            bridge, hinge = (0, 14) if side < 0 else (14, 0)
            ends.append(points[:, bridge])
            if float(self.view.turn[2] @ np.array([side, 0, 0.55], Real)) > 0:
                ear = np.array([side * (layout.temple_x + 0.03), layout.eye_y, 0], Real)
                arm = self._pixels(np.stack([points[:, hinge], ear], 1))
                raster.path(polygon(*arm.tolist(), closed=False), paint)
        raster.path(polygon(*self._pixels(np.stack(ends, 1)).tolist(), closed=False), paint)


def _between(one: Line, other: Line) -> skia.Path:
    """The area between two lines that run the same way."""
    return polygon(one[0] + other[0][::-1], one[1] + other[1][::-1])


def _lowered(line: Line, by: float) -> Line:
    return line[0], [y + by for y in line[1]]
