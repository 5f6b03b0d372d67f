"""Where faces are to be in pictures, and everybody's pose: as in a scene of the world, whoever the people are."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lib_portrait.attention.regions import Box
from lib_portrait.control_picture import skeletons
from trainer.world import sample_scene
from trainer.world.raster import OVERSAMPLING
from trainer.world.render import Image, person_renderers
from trainer.world.scenes import MOST_PEOPLE

# Any side of a picture that people can be measured for.
SIDE = 64


@dataclass(frozen=True)
class Layout:
    """boxes: of the faces, in shares of the picture, from the left. poses: their points (18, 2), in shares too."""

    boxes: tuple[Box, ...]
    poses: tuple[NDArray[np.float32], ...]

    def picture(self, size: int) -> Image:
        """The skeletons, (size, size, 3) uint8."""
        return skeletons([pose * size for pose in self.poses], (size, size))


@functools.lru_cache(maxsize=4096)
def layout_of(seed: int, people: int) -> Layout:
    """The layout of scene `seed` of the world with so many people; more than a scene can have stand in a row."""
    if people <= MOST_PEOPLE:
        scene = sample_scene(seed, count=people)
    else:
        alone = [sample_scene(seed + i, count=1) for i in range(people)]
        row = tuple(
            dataclasses.replace(one.people[0], x=(i + 0.5) / people, y=0.45, size=0.34 / people)
            for i, one in enumerate(alone)
        )
        scene = dataclasses.replace(alone[0], people=row)
    side = SIDE * OVERSAMPLING
    found = []
    for renderer in person_renderers(scene, SIDE):
        left, top, right, bottom = (float(edge) for edge in np.clip(renderer.box() / side, 0, 1).round(3))
        found.append(((left, top, right, bottom), (renderer.pose() / side).astype(np.float32)))
    found.sort(key=lambda one: one[0])
    return Layout(tuple(box for box, _ in found), tuple(pose for _, pose in found))
