"""Promises of `guidance_picture` and `guidance.outcome`: what reference guidance did is shown, or that it did not."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.outcome import check_acted
from lib_portrait.guidance.reference import GuidedPerson, GuidedStep
from lib_portrait.guidance_picture import TITLE, draw_guidance, shares
from lib_portrait.routing_picture import OPACITY, Legend, colour_of, text_height

LEFT, RIGHT = ((slice(None), slice(0, 4)), (slice(None), slice(4, 8)))


def step(picture: int = 0, energy: float = 1.0, size: int = 8, **more: Any) -> GuidedStep:
    """Ada in the left half, Ben nowhere."""
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    masks[0, :, : size // 2] = True
    given = {"t": 500.0, "progress": 0.5, "similarity": (0.5, None), "gradient": 1.0, "masks": masks}
    return GuidedStep(picture=picture, energy=energy, **{**given, **more})


def legend() -> Legend:
    return Legend(["Ada", "Ben"], [1, 2], ImageFont.load_default)


def drawn(steps: list[GuidedStep], **place: Any) -> np.ndarray:
    grey = Image.new("RGB", (256, 256), (100, 100, 100))
    return np.asarray(draw_guidance(grey, steps, legend(), **place)).astype(int)


def on_picture(found: np.ndarray) -> np.ndarray:
    """The part of the drawing that is the picture, below the title."""
    height = text_height(256)
    top = height + height // 2 + height // 2
    return found[top : top + 256]


def tinted(number: int, strength: float) -> np.ndarray:
    return (1 - strength * OPACITY) * 100 + strength * OPACITY * np.array(colour_of(number))


def test_the_longer_a_mask_was_there_the_stronger_its_colour() -> None:
    whole = step(masks=torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]).bool())
    found = on_picture(drawn([step(), whole]))
    assert np.abs(found[:, 20] - tinted(1, 1.0)).max() <= 1 and np.abs(found[:, -20] - tinted(1, 0.5)).max() <= 1
    # A second pass in another size counts as much.
    assert shares([step(), step(size=16)], (4, 4))[0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 4


def test_masks_of_a_part_are_drawn_on_that_part() -> None:
    found = on_picture(drawn([step()], place=(0.5, 0.0, 1.0, 1.0)))
    assert (found[:, 120] == 100).all() and np.abs(found[:, 140] - tinted(1, 1.0)).max() <= 1
    assert (found[:, -20] == 100).all()
    beyond = on_picture(drawn([step()], place=(-1.0, 0.0, 1.0, 1.0)))
    assert (beyond == 100).all(), "the masked half lies outside of the picture"


def test_the_plot_rises_and_falls_as_the_energy_does() -> None:
    def line(energies: list[float]) -> list[int]:
        """The dark pixels of the plot, the topmost of each of four columns."""
        found = drawn([step(energy=one) for one in energies]).sum(axis=2) < 200
        height = text_height(256)
        plot = found[-(256 // 4 + height // 2) :]
        return [int(plot[:, column].argmax()) for column in (20, 90, 160, 235)]

    falling, rising = line([4.0, 3.0, 2.0, 1.0]), line([1.0, 2.0, 3.0, 4.0])
    assert falling == sorted(falling) and falling[0] < falling[-1]
    assert rising == sorted(rising, reverse=True) and rising[0] > rising[-1]
    drawn([step()])
    assert TITLE


# ------------------------------------------------------------------------------------------------------------- outcome


def guidance(*record: GuidedStep, reached: bool = True, guided: tuple[bool, ...] = (True, True), **options: Any) -> Any:
    values = {"strength": 8.5, "begin": 0.6, **options}
    people = [GuidedPerson(guided=one) for one in guided]
    return types.SimpleNamespace(people=people, record=list(record), reached=reached, options=values, notices=[])


def both(picture: int = 0) -> GuidedStep:
    return step(picture, similarity=(0.5, 0.4))


def test_where_somebody_is_in_some_pictures_only_the_others_are_told() -> None:
    assert check_acted(guidance(both(0), both(1)), 2) == []
    (notice,) = check_acted(guidance(both(0), step(1)), 2)
    assert notice.field == "identities[1]" and "picture 2 of the batch" in notice.text
    assert check_acted(guidance(step(), guided=(True, False)), 1) == []


def test_what_is_said_of_the_host_is_told_once_before_the_others() -> None:
    found, of_host = guidance(both(0), step(1)), Notice("guidance", "no backward pass")
    found.notices.append(of_host)
    first, other = check_acted(found, 2)
    assert first == of_host and other.field == "identities[1]"
    assert check_acted(found, 2) == [other]


@pytest.mark.parametrize(
    ("found", "field", "word"),
    [
        (guidance(reached=False), "guidance.begin", "last 60% of the timesteps.*Raise it"),
        (guidance(), "identities[0]", "at no step.*region"),
        (guidance(step(0), step(1)), "identities[1]", "at no step.*region"),
        (guidance(both(2)), "identities[0]", "at no step"),
    ],
)
def test_what_did_nothing_is_refused_with_a_remedy(found: Any, field: str, word: str) -> None:
    with pytest.raises(PortraitError, match=word) as caught:
        check_acted(found, 2)
    assert caught.value.field == field


def test_a_strength_of_0_does_nothing_by_intention() -> None:
    assert check_acted(guidance(reached=False, strength=0.0), 1) == []
