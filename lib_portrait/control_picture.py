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

# COCO's points, in OpenPose's order; the names of what a head has.
POINTS = 18
NOSE, NECK, RIGHT_EYE, LEFT_EYE, RIGHT_EAR, LEFT_EAR = 0, 1, 14, 15, 16, 17
RIGHT_SHOULDER, LEFT_SHOULDER = 2, 5
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


def skeletons(people: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """The poses of people on black, (height, width, 3) uint8 RGB, the first below.

    people: of each the points (18, 2) in pixels, NaN for those that are not seen. size: (width, height).
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
