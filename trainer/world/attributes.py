"""What is true of a scene, in the words that captions say it with."""

from __future__ import annotations

from .scenes import Scene

Attributes = dict[str, str]
COLOURLESS = ("pencil drawing",)


def attributes_of(scene: Scene) -> Attributes:
    """The truth about a scene. Of several people only how many there are; in pencil drawings no colours."""
    placements = scene.people
    attributes = {
        "people": str(len(placements)),
        "women": str(sum(placement.person.woman for placement in placements)),
        "style": scene.style,
        "background": scene.background,
    }
    if len(placements) > 1:
        return attributes
    situation = placements[0].situation
    attributes |= {
        "expression": situation.expression,
        "garment": situation.garment,
        "hat": situation.hat or "none",
        "glasses": "yes" if situation.glasses else "no",
        "scarf": "yes" if situation.scarf else "no",
    }
    if scene.style not in COLOURLESS:
        attributes["clothes_colour"] = situation.clothes_colour
    return attributes
