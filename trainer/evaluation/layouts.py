"""Where faces are to be in pictures, and everybody's pose: as in a scene of the world, whoever the people are; and the
world's scenes of more people than it is trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lib_portrait.attention.regions import Box
from lib_portrait.control_picture import skeletons
from trainer.world import Scene, WorldPerson, sample_scene
from trainer.world.raster import OVERSAMPLING
from trainer.world.render import Image, person_renderers
from trainer.world.scenes import MOST_PEOPLE

# Any side of a picture that people can be measured for.
SIDE = 64
# Of people in two rows: half a head's height over the picture's side is at most LARGEST, and so many people of a row
# share ROW; the heads of the row behind are at the height BACK, those of the nearer one DOWN of these sizes lower.
LARGEST, ROW = 0.12, 0.43
BACK, DOWN = 0.24, 2.9


@dataclass(frozen=True)
class Layout:
    """boxes: of the faces, in shares of the picture, from the left. poses: their points (18, 2), in shares too."""

    boxes: tuple[Box, ...]
    poses: tuple[NDArray[np.float32], ...]

    def picture(self, size: int) -> Image:
        """The skeletons, (size, size, 3) uint8."""
        return skeletons([pose * size for pose in self.poses], (size, size))


def scene_of(seed: int, count: int, people: Sequence[WorldPerson] | None = None) -> Scene:
    """Scene `seed` of the world with so many people, these or anybody; more than its scenes have stand in two rows.

    The nearer row has as many people as the other or one more. Heads are about as large and as far apart as those of
    the world's scenes with the most people.
    """
    if count <= MOST_PEOPLE:
        return sample_scene(seed, people, count)
    alone = [sample_scene(seed + i, None if people is None else [people[i]], 1) for i in range(count)]
    rng = np.random.default_rng([seed, 0x60])
    front = -(-count // 2)
    size = min(ROW / front, LARGEST)
    places = []
    for row, y in ((count - front, BACK), (front, BACK + DOWN * size)):
        for i in range(row):
            sideways, down, own = rng.uniform(-1, 1, 3).tolist()
            x = (i + 0.5 + 0.03 * sideways) / row
            places.append((x, y + 0.1 * size * down, size * (0.95 + 0.05 * own)))
    order = rng.permutation(count).tolist()
    placed = tuple(
        dataclasses.replace(alone[who].people[0], x=x, y=y, size=own) for who, (x, y, own) in zip(order, places)
    )
    return dataclasses.replace(alone[0], people=placed)


@functools.lru_cache(maxsize=4096)
def layout_of(seed: int, people: int) -> Layout:
    """The layout of scene `seed` of the world with so many people, see `scene_of`."""
    side = SIDE * OVERSAMPLING
    found = []
    for renderer in person_renderers(scene_of(seed, people), SIDE):
        left, top, right, bottom = (float(edge) for edge in np.clip(renderer.box() / side, 0, 1).round(3))
        found.append(((left, top, right, bottom), (renderer.pose() / side).astype(np.float32)))
    found.sort(key=lambda one: one[0])
    return Layout(tuple(box for box, _ in found), tuple(pose for _, pose in found))
