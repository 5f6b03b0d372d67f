"""What is true of a scene, in the words that captions say it with."""

from __future__ import annotations

from .scenes import Scene

Attributes = dict[str, str]
COLOURLESS = ("pencil drawing",)


def attributes_of(scene: Scene) -> Attributes:
    """The truth about a scene. Of several people only how many there are; in pencil drawings no colours."""
    people = scene.people
    told = {
        "people": str(len(people)),
        "women": str(sum(person.identity.woman for person in people)),
        "style": scene.style,
        "background": scene.background,
    }
    if len(people) > 1:
        return told
    situation = people[0].situation
    told |= {
        "expression": situation.expression,
        "garment": situation.garment,
        "hat": situation.hat or "none",
        "glasses": "yes" if situation.glasses else "no",
        "scarf": "yes" if situation.scarf else "no",
    }
    if scene.style not in COLOURLESS:
        told["clothes_colour"] = situation.clothes_colour
    return told
