"""The world: a portrait renderer that knows the truth about what it draws.

`identity(index)` is somebody, `sample_scene(seed)` a scene, `render(scene, size)` the picture with its caption, labels,
boxes, landmarks and masks. Everything is a pure function of its arguments.
"""

from .captions import Caption, caption
from .people import FACTORS, Identity, Mole, held_out, identity, sample_identity
from .render import FaceTruth, Picture, render
from .scenes import Placement, Scene, sample_scene
from .situations import Situation, sample_situation

__all__ = [
    "FACTORS",
    "Caption",
    "FaceTruth",
    "Identity",
    "Mole",
    "Picture",
    "Placement",
    "Scene",
    "Situation",
    "caption",
    "held_out",
    "identity",
    "render",
    "sample_identity",
    "sample_scene",
    "sample_situation",
]
