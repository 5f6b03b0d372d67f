"""Fine detail of faces: which of a person's moles a picture shows, and how much of their freckles.

The world knows where a person's moles are. In its own pictures they are where they were drawn; in generated ones the
head is turned as the landmarks say that were found, and they are looked for there. A mole is a place that is darker
than the skin around it. That something dark is not taken for one is measured too: where the person has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.world import Scene, Situation, WorldPerson, render
from trainer.world.light import Light
from trainer.world.person_renderer import FACING, PersonRenderer
from trainer.world.raster import OVERSAMPLING
from trainer.world.render import Image, person_renderers

# Moles below this diameter in pixels are not asked for.
SMALLEST = 2.5
# The skin around a spot: between these multiples of its radius, and at least so many pixels wide.
AROUND, WIDE = (1.7, 2.8), 1.5
# The share of the ring that may be as dark as what it is held against.
DARK_RING = 0.25
# Luminance (Rec. 601).
GREY = np.array([0.299, 0.587, 0.114])
# A mole is this much darker than the skin around it, as a share of that; most drawn ones are by 0.3 and more. Where it
# is not known to the pixel where one should be, more is asked, for other dark places are near.
DARKER, FOUND = 0.15, 0.2
# A picture keeps a mole that has at least this share of the contrast it had.
KEPT = 0.5
# Where a picture's mole is looked for, beside its place: a share of the distance between the eyes.
REACH = 0.06
# With so many freckles a person is freckled; with fewer, but some, they are neither that nor the opposite.
FRECKLED = 8
# Spots that face the viewer less are at the face's edge, where hair, ears and background are.
CLEARLY = 0.35


@dataclass(frozen=True)
class Spot:
    """A mole or freckle in a picture: its middle and half its width and height, in pixels (pixel i covers [i, i+1])."""

    x: float
    y: float
    across: float
    down: float

    @property
    def diameter(self) -> float:
        return self.across + self.down

    def moved(self, x: float, y: float) -> Spot:
        return replace(self, x=self.x + x, y=self.y + y)


def spots_of(renderer: PersonRenderer, kind: str = "moles", scale: float = 1.0) -> list[Spot]:
    """The "moles" or "freckles" that face the viewer clearly, wherever hair, hat or glasses are.

    scale: pixels of the picture for one of the renderer.
    """
    rows = renderer.spots(kind)
    return [Spot(*(row[:4] * scale)) for row in rows[rows[:, 4] > max(CLEARLY, FACING)]]


def contrast(image: Image, spot: Spot, reach: float = 0.0) -> float:
    """How much darker a spot is than what is around it: 1 - its mean luminance over the lower quartile of a ring's.

    The lower quartile, for at the end of a brow three quarters of a ring may be skin.

    image: (H, W, 3) uint8. reach: the darkest place within so many pixels of the spot counts. Below 0 where it is
    lighter; 0 where the spot and its ring do not lie in the picture.
    """
    steps = np.arange(-np.floor(reach), np.floor(reach) + 1)
    moves = [(x, y) for x in steps for y in steps if x * x + y * y <= reach * reach] or [(0.0, 0.0)]
    return max(_contrast(image, spot.moved(x, y)) for x, y in moves)


def _contrast(image: Image, spot: Spot) -> float:
    across, down = max(spot.across, 0.75), max(spot.down, 0.75)
    far = max(AROUND[1] * max(across, down), max(across, down) + 2 * WIDE)
    left, top = int(np.floor(spot.x - far)), int(np.floor(spot.y - far))
    side = int(np.ceil(2 * far)) + 1
    if left < 0 or top < 0 or left + side > image.shape[1] or top + side > image.shape[0]:
        return 0.0
    grey = image[top : top + side, left : left + side] @ GREY
    x, y = np.arange(side) + 0.5 + left - spot.x, np.arange(side)[:, None] + 0.5 + top - spot.y
    # In radii of the spot, and in pixels beyond its edge.
    radius = np.sqrt((x / across) ** 2 + (y / down) ** 2)
    inside = radius <= 1
    if not inside.any():
        inside = radius == radius.min()
    begin = 1 + max((AROUND[0] - 1), WIDE / 2 / max(across, down))
    ring = (radius >= begin) & (radius <= max(AROUND[1], begin + WIDE / max(across, down)))
    around = float(np.quantile(grey[ring], DARK_RING))
    return 1 - float(grey[inside].mean()) / max(around, 1.0)


# -------------------------------------------------------------------------------------------------- pictures of scenes


def visible_moles(scene: Scene, size: int, smallest: float = SMALLEST) -> tuple[Image, Image, list[Spot]]:
    """The picture of a scene, the same without anybody's moles, and the moles that are seen in it.

    Seen is what is darker than the skin around it by DARKER, and would have less than half of that contrast without
    the mole: neither what is under hair or glasses, nor what is lost beside a brow. smallest: in pixels across.
    """
    bare = replace(scene, people=tuple(replace(one, person=replace(one.person, moles=())) for one in scene.people))
    picture, without = render(scene, size).image, render(bare, size).image
    seen = []
    for renderer in person_renderers(scene, size):
        for spot in spots_of(renderer, scale=1 / OVERSAMPLING):
            if spot.diameter < smallest or contrast(picture, spot) < DARKER:
                continue
            if contrast(without, spot, 1.0) < KEPT * contrast(picture, spot):
                seen.append(spot)
    return picture, without, seen


def share_kept(before: Image, after: Image, spots: Sequence[Spot]) -> list[bool]:
    """Whether each spot of a picture is still there after something was done to it, an autoencoder's work for one."""
    return [contrast(after, spot, 1.0) >= KEPT * contrast(before, spot) for spot in spots]


def contrast_kept(before: Image, after: Image, spots: Sequence[Spot]) -> float | None:
    """The contrast that spots have on the average after something was done to a picture, over what they had.

    For freckles, which are too faint to be found one by one. None where they had none.
    """
    had = sum(contrast(before, spot) for spot in spots)
    return sum(contrast(after, spot) for spot in spots) / had if had > 0 else None


# ------------------------------------------------------------------------------------------------- generated pictures


@dataclass(frozen=True)
class MolesFound:
    """Of the places in a picture where a person's moles should be, how many have one; and of as many where none is."""

    moles: int
    found: int
    bare: int
    false: int


@dataclass(frozen=True)
class FaceDetails:
    """The fine detail of one person's face in a picture.

    freckled: whether the person has freckles, None for only a few. speckle: how much darker than the skin around them
    the places are on the average that this person has freckles at, or would have; None where none faces the viewer.
    """

    moles: MolesFound
    freckled: bool | None
    speckle: float | None


def find_details(image: Image, landmarks: NDArray[np.floating], person: WorldPerson) -> FaceDetails:
    """Looks for a person's moles and freckles on a face of a picture (H, W, 3) uint8 with these landmarks (5, 2)."""
    renderer = posed(person, landmarks)
    count = round(person.freckles * len(person.freckle_places))
    speckled = _as_posed(renderer, replace(person, freckles=1.0))
    contrasts = [contrast(image, spot, 1.0) for spot in spots_of(speckled, "freckles")]
    return FaceDetails(
        _moles_on(image, landmarks, renderer, SMALLEST),
        None if 0 < count < FRECKLED else count > 0,
        float(np.mean(contrasts)) if contrasts else None,
    )


def freckles_told(found: Sequence[FaceDetails | None]) -> list[float | None]:
    """Whether freckles are where people have them, and not where not: for each picture of a freckled person the share
    of the pictures of unfreckled ones in which the places for freckles are less dark (ties half): by chance 0.5.

    A freckle is too small to be found by itself, and pictures of one kind have the same noise.
    """
    bare = np.array(
        [one.speckle for one in found if one is not None and one.freckled is False and one.speckle is not None]
    )

    def told(one: FaceDetails | None) -> float | None:
        if one is None or not one.freckled or one.speckle is None or not len(bare):
            return None
        return float((bare < one.speckle).mean() + 0.5 * (bare == one.speckle).mean())

    return [told(one) for one in found]


def find_moles(
    image: Image, landmarks: NDArray[np.floating], person: WorldPerson, smallest: float = SMALLEST
) -> MolesFound:
    """Looks for a person's moles on a face of a picture (H, W, 3) uint8 with these landmarks (5, 2).

    Where they have none is looked at the mirrored places, those that are near no mole.
    """
    return _moles_on(image, landmarks, posed(person, landmarks), smallest)


def _moles_on(image: Image, landmarks: NDArray[np.floating], renderer: PersonRenderer, smallest: float) -> MolesFound:
    person = renderer.person
    reach = REACH * float(np.linalg.norm(landmarks[0] - landmarks[1]))
    there = [spot for spot in spots_of(renderer) if spot.diameter >= smallest]
    mirrored = replace(person, moles=tuple(replace(mole, x=-mole.x) for mole in person.moles))
    others = _as_posed(renderer, mirrored)
    moles = spots_of(renderer)
    bare = [
        spot
        for spot in spots_of(others)
        if spot.diameter >= smallest and all(_apart(spot, mole) > 3 * (reach + mole.diameter) for mole in moles)
    ]
    found, false = (sum(contrast(image, spot, reach) >= FOUND for spot in spots) for spots in (there, bare))
    return MolesFound(len(there), found, len(bare), false)


def _as_posed(renderer: PersonRenderer, person: WorldPerson) -> PersonRenderer:
    return PersonRenderer(person, renderer.situation, renderer.view.centre, renderer.view.scale, renderer.light)


def _apart(one: Spot, other: Spot) -> float:
    return float(np.hypot(one.x - other.x, one.y - other.y))


def posed(person: WorldPerson, landmarks: NDArray[np.floating], rounds: int = 6) -> PersonRenderer:
    """The person with the head placed and turned so that the landmarks are as near to these (5, 2) as they can be.

    Six numbers (yaw, pitch, roll, place, size) by Gauss and Newton's method, the turns held a little to the front:
    five points tell a pitch from a long nose only roughly.
    """
    wanted = np.asarray(landmarks, float)
    eyes = wanted[1] - wanted[0]
    scale = max(float(np.linalg.norm(eyes)), 1.0) / 0.6
    middle = wanted.mean(axis=0)
    pose = np.array([0.0, 0.0, np.degrees(np.arctan2(eyes[1], eyes[0])), middle[0], middle[1] - 0.3 * scale, scale])
    # What each number may move by to see what it does, and how unlikely it is to be far from where it began.
    step = np.array([1.0, 1.0, 1.0, 0.01 * scale, 0.01 * scale, 0.01 * scale])
    stiff = np.diag([1 / 40, 1 / 15, 0, 0, 0, 0]) * 0.02 * scale
    for _ in range(rounds):
        now = _landmarks(person, pose)
        residual = (wanted - now).ravel()
        slopes = np.stack([(_landmarks(person, pose + d) - now).ravel() for d in np.diag(step)], 1) / step
        pose = pose + np.linalg.lstsq(
            np.concatenate([slopes, stiff]), np.concatenate([residual, -stiff @ pose]), rcond=None
        )[0].clip(-20 * step, 20 * step)
        pose[:2] = pose[:2].clip((-60, -30), (60, 30))
        pose[5] = max(pose[5], 0.2 * scale)
    return _posed(person, pose)


def _posed(person: WorldPerson, pose: NDArray[np.floating]) -> PersonRenderer:
    yaw, pitch, roll, x, y, scale = pose.tolist()
    situation = Situation(yaw=yaw, pitch=pitch, roll=roll)
    return PersonRenderer(person, situation, (x, y), scale, Light((0.0, 0.0, 1.0), 0.5, (1.0, 1.0, 1.0)))


def _landmarks(person: WorldPerson, pose: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(_posed(person, pose).landmarks(), float)
