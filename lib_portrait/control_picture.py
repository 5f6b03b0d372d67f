"""Pictures for a ControlNet that is told of people: where faces are, by filled circles, and poses, by skeletons.

One drawing for training and for both hosts, so that a network sees what it was trained with. The skeleton is that of
OpenPose with COCO's 18 points, in its colours (CMU-Perceptual-Computing-Lab/openpose, `poseParametersRender.hpp`), as
sd-webui-controlnet's preprocessor draws it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib_portrait.attention.regions import WHOLE, Box

# COCO's points, in OpenPose's order.
POINTS, NOSE = 18, 0
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
# Of points and of limbs, by their numbers: around the circle of hues.
COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)),
    *((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)),
    *((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
# Of a limb's colour: points stay visible on it.
LIMB_SHADE = 0.6
EYES, EARS = (14, 15), (16, 17)
# What is black in a skeleton's picture, how much of it is, and how far a point's colour may be off.
DARK, MOSTLY, NEAR = 16, 0.6, 40
# Half the width of a limb, and the radius of a point, in 512ths of the picture's shorter side.
STICK = 4


@dataclass(frozen=True)
class Circle:
    """A filled circle. x, y: its middle, in shares of the picture's width and height; radius: of its width.

    colour: red, green, blue, 0 to 255.
    """

    x: float
    y: float
    radius: float
    colour: tuple[int, int, int]


def with_circles(picture: Tensor, circles: Sequence[Circle], place: Box = WHOLE) -> Tensor:
    """A picture (..., 3, H, W) in [0, 1], with circles on it, which lie on the whole of which it is the part `place`.

    Later circles lie on earlier ones. What is given is not written to.
    """
    height, width = picture.shape[-2:]
    left, top, right, bottom = place
    # A circle of the whole picture is one of the part, where host and network keep the proportions.
    across = left + (torch.arange(width, device=picture.device) + 0.5) / width * (right - left)
    down = top + (torch.arange(height, device=picture.device) + 0.5) / height * (bottom - top)
    taller = (height / (bottom - top)) / (width / (right - left))
    for circle in circles:
        distance = (across - circle.x) ** 2 + ((down[:, None] - circle.y) * taller) ** 2
        colour = picture.new_tensor(circle.colour).div(255)[:, None, None]
        picture = torch.where(distance <= circle.radius**2, colour, picture)
    return picture


def to_image(picture: Tensor) -> np.ndarray:
    """A picture (3, H, W) in [0, 1] as (H, W, 3) uint8."""
    pixels: np.ndarray = (picture.float().cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels


def heads(picture: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Boxes x0, y0, x1, y1 in pixels about the faces of a picture (H, W, 3) uint8 of skeletons, from the left.

    Of a picture that is none, which is not mostly black, there are none. A face is as wide as its ears are apart; where
    one of them is not seen, and where there are no ears, that is estimated from the eyes and the nose.
    """
    if (picture.max(axis=2) < DARK).mean() < MOSTLY:
        return []
    noses, others = _dots(picture, NOSE), [_dots(picture, part) for part in (*EYES, *EARS)]
    found = []
    for nose in noses:
        # Everybody's points are nearer to their own nose than to others'.
        own = [
            next(
                (
                    point
                    for point in sorted(dots, key=lambda point: float(np.hypot(*(point - nose))))
                    if min(noses, key=lambda other: float(np.hypot(*(point - other)))) is nose
                ),
                None,
            )
            for dots in others
        ]
        eyes, ears = [one for one in own[:2] if one is not None], [one for one in own[2:] if one is not None]
        if len(ears) == 2:
            width = abs(ears[0][0] - ears[1][0])
        elif ears:
            width = 1.4 * abs(ears[0][0] - nose[0])
        elif len(eyes) == 2:
            width = 2.4 * abs(eyes[0][0] - eyes[1][0])
        else:
            continue
        middle = np.mean([one[0] for one in (ears or eyes)] + [nose[0]])
        half, tall = width / 2, 0.65 * width
        found.append((float(middle - half), float(nose[1] - tall), float(middle + half), float(nose[1] + tall)))
    return sorted(found)


def _dots(picture: np.ndarray, point: int) -> list[np.ndarray]:
    """The middles (2) of all that has a point's colour in a picture of skeletons, in pixels."""
    import cv2

    near = np.abs(picture.astype(np.int16) - np.array(COLOURS[point])).max(axis=2) < NEAR
    count, _, _, middles = cv2.connectedComponentsWithStats(near.astype(np.uint8), connectivity=8)
    return list(middles[1:count])


def skeletons(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The poses of people on black, (height, width, 3) uint8 RGB, the first below.

    people: of each the POINTS (18, 2) in pixels, NaN for those that are not seen. size: (width, height).
    """
    import cv2

    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    stick = STICK * min(size) / 512
    for points in people:
        for (start, end), colour in zip(LIMBS, COLOURS):
            ends = points[[start, end]]
            if np.isfinite(ends).all():
                thick = max(1, round(2 * stick))
                shaded = tuple(round(value * LIMB_SHADE) for value in colour)
                first, last = (tuple(round(float(value)) for value in one) for one in ends)
                cv2.line(picture, first, last, shaded, thick, cv2.LINE_AA)
        for point, colour in zip(points, COLOURS):
            if np.isfinite(point).all():
                middle = tuple(round(float(value)) for value in point)
                cv2.circle(picture, middle, max(1, round(stick)), colour, cv2.FILLED, cv2.LINE_AA)
    return picture
