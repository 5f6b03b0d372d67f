"""In which order the faces of a photo are counted, and what a user should know of each."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from lib_portrait.faces.detection import Face

# Below this share of the width of the widest face, or of the sharpness of the sharpest one among those that are wide
# enough, a face is a bystander's. Faces of people photographed together differ up to fourfold in sharpness, by beards,
# hair and glasses; blurred by a thirtieth of its width, a face has a tenth of what it had.
WIDTH_SHARE = 1 / 3
SHARPNESS_SHARE = 1 / 8
# What the networks need to see of a face: narrower ones look alike.
WEAK_WIDTH = 60
_SHARPNESS_SIDE, _SHARPNESS_MARGIN = 64, 8

LAST = ", so it is counted last"
SMALL = f"this face is far smaller than the photo's main ones{LAST}"
BLURRED = f"this face is far less sharp than the photo's main ones{LAST}"
OUTSIDE = "eyes or mouth of this face lie outside the photo"
CUT = OUTSIDE + LAST
TURNS = ("", "by 90° to the right", "by 180°", "by 90° to the left")


def sharpness(crop: np.ndarray) -> float:
    """How much fine detail an aligned crop (S, S, 3) uint8 has, whatever its contrast and size.

    The variance of its Laplacian over that of its grey, in its inner 48 of 64 pixels: there, faces of 60 pixels and
    more are told by their focus, not by how much they were enlarged.
    """
    side, margin = _SHARPNESS_SIDE, _SHARPNESS_MARGIN
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)[margin:-margin, margin:-margin]
    values = small.astype(np.float32)
    # One grey level of variance keeps an even patch from counting as detail.
    return float(cv2.Laplacian(values, cv2.CV_32F).var() / (values.var() + 1))


def counted(faces: Sequence[Face], crops: Sequence[np.ndarray], size: tuple[int, int]) -> list[tuple[int, str]]:
    """The order in which faces are counted: their indices, each with why it is counted last; empty for the main ones.

    faces: left to right, in pixels of the upright photo of `size` (width, height). crops: their aligned crops. Main
    faces come first, then bystanders and faces that the photo's edge cuts through, each from the left. Where that is so
    of every face that is large enough, none of these is last for it.
    """
    widest = max(width(face) for face in faces)
    wide = [index for index, face in enumerate(faces) if width(face) >= WIDTH_SHARE * widest]
    whole = [index for index in wide if not cut_off(faces[index], size)] or wide
    sharp = {index: sharpness(crops[index]) for index in whole}
    sharpest = max(sharp.values())

    def why(index: int) -> str:
        if index not in wide:
            return SMALL
        if index not in whole:
            return CUT
        return BLURRED if sharp[index] < SHARPNESS_SHARE * sharpest else ""

    reasons = [(index, why(index)) for index in range(len(faces))]
    return sorted(reasons, key=lambda one: bool(one[1]))


def notices(face: Face, why: str, turn: int, size: tuple[int, int]) -> tuple[str, ...]:
    """What a user should know of a face, each a clause without a full stop.

    why: as `counted` gives it. turn: quarters by which the photo was turned to the right. size: of the upright photo.
    """
    said = [why]
    if cut_off(face, size) and why != CUT:
        said.append(OUTSIDE)
    if width(face) < WEAK_WIDTH:
        said.append(f"this face is only {width(face):.0f} pixels wide, likeness will be weak")
    if turn:
        said.append(f"the photo was turned {TURNS[turn]}")
    return tuple(clause for clause in said if clause)


def width(face: Face) -> float:
    """Of the box, in pixels."""
    return float(face.box[2] - face.box[0])


def cut_off(face: Face, size: tuple[int, int]) -> bool:
    """Whether an eye or a corner of the mouth lies outside the photo of `size` (width, height)."""
    points = face.landmarks[[0, 1, 3, 4]]
    return bool((points < -0.5).any() or (points > np.array(size) - 0.5).any())
