"""Hair and hats, as meshes over the skull."""

from __future__ import annotations

from math import acos

import numpy as np

from .head import Array, FaceLayout, Real, gaussian, lerp, skull, smoothstep
from .light import column, mix, ramp
from .meshes import Lattice, Mesh
from .people import WorldPerson
from .situations import CLOTHES_COLOURS, Colour, Situation

HAIR = ((0.90, 0.74, 0.46), (0.60, 0.40, 0.22), (0.32, 0.20, 0.13), (0.11, 0.09, 0.09))
RED, GREY = (0.68, 0.26, 0.10), (0.80, 0.80, 0.82)

CAP = Lattice(10, 34, ring=True)
LOCKS = Lattice(9, 22, ring=False)
HAT = Lattice(8, 28, ring=True)


def _grid(lattice: Lattice) -> tuple[Array, Array]:
    """Longitude once round, and 0 to 1 down the rows, of a ring's points, (N,) each."""
    lon = np.linspace(-np.pi, np.pi, lattice.columns, endpoint=False, dtype=Real)
    return np.tile(lon, lattice.rows), np.repeat(np.linspace(0, 1, lattice.rows, dtype=Real), lattice.columns)


_CAP_LON, _CAP_ALONG = _grid(CAP)
_CAP_DOWN = _CAP_ALONG.reshape(CAP.rows, CAP.columns)
_CAP_THIN, _CAP_RISE = 1 - _CAP_ALONG**3, smoothstep(_CAP_ALONG * 5)
_LINE_LON = _CAP_LON[: CAP.columns]
_LINE_SWEEP = 0.34 * np.sin(_LINE_LON) * gaussian(_LINE_LON, 0.7)
_LOCKS_ALONG = np.repeat(np.linspace(0, 1, LOCKS.rows, dtype=Real), LOCKS.columns)
_LOCKS_SWELL, _LOCKS_WAVE = smoothstep(_LOCKS_ALONG * 2.2), smoothstep(_LOCKS_ALONG * 3)
_HAT_LON, _HAT_ALONG = _grid(HAT)
_HAT_Y = np.maximum(-1.0 + 0.50 * _HAT_ALONG - 0.10 * _HAT_ALONG * np.cos(_HAT_LON), -0.999)


def hair_colour(person: WorldPerson) -> Colour:
    red = float(smoothstep(np.array((person.hair_red - 0.45) * 2.2)))
    colour = mix(ramp(HAIR, person.hair_dark), RED, 0.75 * red)
    return mix(colour, GREY, person.hair_grey)


def _strands(hair: Colour, streak: Array) -> tuple[Array, Array]:
    """Tint and sheen of hair, uneven by `streak` (N,) in [-1, 1]."""
    tint = column(hair)
    return tint * (1 + 0.17 * streak), (0.225 * tint + 0.099) * (0.75 + 0.5 * streak)


def _scalp_line(person: WorldPerson) -> Array:
    """Height of the hair's lower edge all round: forehead, temples, before and behind the ear, nape."""
    front = lerp(person.hair_line, -0.42, -0.70) if person.hair_line < 0.8 else -0.9
    if person.hair_length > 0.25 and person.hair_sweep > 0.55 and person.hair_line < 0.5:
        front = -0.30  # a fringe
    temple = lerp(person.hair_temples, -0.40, -0.66)
    sideburn = 0.12 if not person.woman else -0.02
    nape = lerp(min(person.hair_length * 2, 1), 0.35, 0.75)
    height = np.interp(
        np.abs(_LINE_LON),
        [0, 0.45, 0.9, 1.15, 1.32, 1.5, 1.75, 2.3, np.pi],
        [front, front * 0.8 + temple * 0.2, temple, -0.30, sideburn, sideburn - 0.05, 0.0, nape, nape],
    )
    return height.astype(Real) + (person.hair_sweep - 0.5) * _LINE_SWEEP


def cap(person: WorldPerson, situation: Situation, hair: Colour) -> Mesh:
    """The hair on the scalp, as a second surface over the skull, up to the hair line."""
    bald = person.hair_line >= 0.8 and not person.woman
    top = -0.15 if bald else -0.999
    lon, along, start = _CAP_LON, _CAP_ALONG, acos(-top)
    end = np.arccos(-np.maximum(_scalp_line(person), top + 0.02))
    y = -np.cos(start + (_CAP_DOWN * (end - start)).ravel())
    points = skull(person, lon, y)
    if bald:
        body = 0.05 * np.sin(np.pi * along) + 0.01
    else:
        thick = lerp(person.hair_volume, 0.05, 0.30) * (0.5 + 0.5 * min(person.hair_length * 2.5, 1))
        apart = (points[0] - lerp(person.hair_part, -0.42, 0.42)) / 0.06
        body = (0.015 + thick * _CAP_THIN) * (1 - 0.55 * np.exp(-apart * apart) * (points[2] > -0.3))
    wave = person.hair_wave**1.5
    body = body + wave * 0.045 * np.sin(lon * 9 + 2 * y) * np.sin(y * 11 + lon * 2) * _CAP_RISE
    if situation.hat:
        body = np.minimum(body, 0.06)
    outward = np.array([np.sin(lon), y * 1.1, np.cos(lon)])
    points += outward * (body / np.sqrt(1 + 1.21 * y * y))
    streak = np.sin(lon * 23 + 3 * wave * np.sin(y * 7)) * 0.6 + np.sin(lon * 41 + 5 * y) * 0.4
    opacity = np.where(along > 0.99, 0.55 if person.hair_line < 0.8 else 0.2, 1.0)
    if bald:
        opacity[(along < 0.01) | (np.abs(lon) < 1.3)] = 0
    tint, sheen = _strands(hair, streak)
    return Mesh(CAP, points, tint, sheen=sheen, opacity=opacity)


def locks(person: WorldPerson, layout: FaceLayout, hair: Colour) -> Mesh | None:
    """Hair that hangs from the sides and the back; None when short."""
    if person.hair_length < 0.3:
        return None
    along = _LOCKS_ALONG
    open_ = lerp(1 - person.hair_volume, 1.02, 1.28)
    lon = np.tile(np.linspace(open_, 2 * np.pi - open_, LOCKS.columns, dtype=Real), LOCKS.rows)
    end = lerp((person.hair_length - 0.3) / 0.7, 0.55, 2.3)
    y = -0.32 + (end + 0.32) * along
    wave = person.hair_wave**1.3
    swell = lerp(person.hair_volume, 0.06, 0.26) * _LOCKS_SWELL * (1 - 0.35 * smoothstep((y - 0.9) / 0.8))
    swell = swell + wave * 0.05 * np.sin(y * 11 + 2 * np.sin(lon * 3)) * _LOCKS_WAVE
    ring = np.where(y < 0, np.sqrt(np.maximum(1 - y * y * 0.9, 0)), 1.0) * (1 - 0.22 * smoothstep((y - 0.5) / 0.9))
    points = np.array(
        [(layout.hair_x * ring + swell) * np.sin(lon), np.minimum(y, 0.35), (0.9 * ring + swell * 0.7) * np.cos(lon)]
    )
    streak = np.sin(lon * 23 + 4 * wave * np.sin(y * 6)) * 0.6 + np.sin(lon * 37 + 3 * y) * 0.4
    hang = np.maximum(y - 0.35, 0)
    tint, sheen = _strands(hair, streak)
    return Mesh(LOCKS, points, tint, sheen=sheen, fade=1 - 0.18 * along, hang=hang, two_sided=True)


def hat(person: WorldPerson, situation: Situation) -> Mesh | None:
    if situation.hat is None:
        return None
    lon, along, y = _HAT_LON, _HAT_ALONG, _HAT_Y
    wide = situation.hat == "sun hat"
    if wide:
        body = np.where(along > 0.8, 0.13 + 2.2 * (along - 0.8), 0.13 + 0.05 * (1 - along))
    else:
        body = 0.13 + 0.10 * (1 - along) + 0.035 * (along > 0.62)
    outward = np.array([np.sin(lon), np.where(along > 0.8, 0.12 * wide, y), np.cos(lon)])
    knit = 1 + 0.06 * np.sin(lon * 22) * (not wide)
    tint = column(CLOTHES_COLOURS[situation.hat_colour]) * (knit * np.where((along > 0.6) & (along < 0.82), 0.78, 1.0))
    return Mesh(HAT, skull(person, lon, y) + outward * body, tint, 0.03, two_sided=wide)
