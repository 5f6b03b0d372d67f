"""The world: a portrait renderer that knows the ground truth of what it draws.

`world_person(index)` is an identity, `sample_scene(seed)` a scene, `render(scene, size)` the picture with its caption,
labels, boxes, landmarks and masks. Everything is a pure function of its arguments.
"""

from .captions import Caption, caption
from .people import FACTORS, Mole, WorldPerson, held_out, sample_person, world_person
from .render import FaceTruth, Picture, render
from .scenes import Placement, Scene, sample_scene
from .situations import Situation, sample_situation

__all__ = [
    "FACTORS",
    "Caption",
    "FaceTruth",
    "Mole",
    "Picture",
    "Placement",
    "Scene",
    "Situation",
    "WorldPerson",
    "caption",
    "held_out",
    "render",
    "sample_person",
    "sample_scene",
    "sample_situation",
    "world_person",
]
