"""Promises of `lib_portrait.routing_picture`: hard areas in the people's colours, in their place, with a legend."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont

from lib_portrait.routing_picture import COLOURS, GROUND, OPACITY, Legend, colour_of, draw_routing

WHITE = (255, 255, 255)


def halves(left: float, right: float) -> torch.Tensor:
    """The first person has `left` of the left half, the second `right` of the right half, and little of the other."""
    maps = torch.full((2, 8, 8), 0.1)
    maps[0, :, :4], maps[1, :, 4:] = left, right
    return maps


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def tinted(number: int, grey: int) -> np.ndarray:
    return ((1 - OPACITY) * grey + OPACITY * np.array(colour_of(number))).round().astype(int)


def legend(*numbers: int) -> Legend:
    return Legend([f"Identity {number}" for number in numbers], numbers, ImageFont.load_default)


def test_areas_are_hard_and_in_the_people_s_colours() -> None:
    drawn = draw_routing([Image.new("RGB", (64, 64), (100, 100, 100))], [halves(0.6, 0.9)])[0]
    assert drawn.size == (64, 64)
    found = {tuple(colour) for colour in pixels(drawn).reshape(-1, 3)}
    assert found == {tuple(tinted(1, 100)), tuple(tinted(2, 100)), WHITE}, "two areas and their outline, no blend"
    assert (pixels(drawn)[:, 5] == tinted(1, 100)).all()
    assert (pixels(drawn)[:, -5] == tinted(2, 100)).all()


def test_what_nobody_has_most_of_is_grey() -> None:
    drawn = draw_routing([Image.new("RGB", (64, 64), (200, 40, 40))], [halves(0.6, 0.2)])[0]
    assert (pixels(drawn)[:, -5] == pixels(Image.new("RGB", (1, 1), (200, 40, 40)).convert("L"))[0, 0]).all()


def test_a_map_of_a_part_is_drawn_on_that_part_and_the_rest_stays_as_it_is() -> None:
    picture = Image.new("RGB", (128, 64), (200, 40, 40))
    grey = int(pixels(picture.convert("L"))[0, 0, 0])
    drawn = pixels(draw_routing([picture], [halves(0.9, 0.9)], place=(0.0, 0.0, 0.5, 1.0))[0])
    assert (drawn[:, 65:] == (200, 40, 40)).all()
    assert (drawn[:, 5] == tinted(1, grey)).all()
    assert (drawn[:, 60] == tinted(2, grey)).all()
    # A place that reaches beyond the picture: its lower and upper quarter are not seen.
    rows = torch.zeros(4, 4, 4)
    for row in range(4):
        rows[row, row] = 1
    drawn = pixels(draw_routing([picture], [rows], place=(0.0, -0.5, 1.0, 1.5))[0])
    assert (drawn[2] == tinted(2, grey)).all()
    assert (drawn[-2] == tinted(3, grey)).all()


def test_the_legend_names_everybody_in_their_colour_and_fits_at_every_width() -> None:
    for width, count in ((64, 2), (128, 4), (512, 8), (1536, 3)):
        picture = Image.new("RGB", (width, width), (100, 100, 100))
        numbers = range(2, 2 + count)
        maps = torch.rand(count, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = draw_routing([picture], [maps], legend=legend(*numbers))[0]
        assert drawn.width >= width
        below = pixels(drawn)[width:]
        assert (below[0] == GROUND).all() and (below[:, -1] == GROUND).all(), "no text runs out of the picture"
        assert {colour_of(number) for number in numbers} <= {tuple(colour) for colour in below.reshape(-1, 3)}


def test_the_legend_s_numbers_are_the_areas_of_what_was_sampled() -> None:
    written: list[str] = []

    class Font:
        """Writes down what is measured with it."""

        def __init__(self, size: int):
            self.font = ImageFont.load_default(size)

        def getlength(self, text: str) -> float:
            written.append(text)
            return self.font.getlength(text)

        def __getattr__(self, name: str) -> object:
            return getattr(self.font, name)

    maps = torch.zeros(2, 8, 8)
    maps[0, :, :4] = 1
    named = Legend(["Ada", "Ben"], (1, 2), Font)
    draw_routing([Image.new("RGB", (256, 64))], [maps], place=(0.0, 0.0, 0.25, 1.0), legend=named)
    assert written == ["Ada: 50%", "Ben: 0%", "nobody: 50%", "Who was put where"]
    written.clear()
    # The numbers are of the areas that one sees: where somebody has the most, not how much of it.
    maps[1, :, 4:] = 0.4
    draw_routing([Image.new("RGB", (64, 64))], [maps], legend=named)
    assert written == ["Ada: 52%", "Ben: 0%", "nobody: 48%", "Who was put where"]


def test_every_picture_has_its_own_map() -> None:
    pictures = [Image.new("RGB", (32, 32), (100, 100, 100))] * 4
    first, second = halves(0.9, 0.9), halves(0.9, 0.9).flip(2)
    drawn = draw_routing(pictures, [first, second, second, first])
    assert [tuple(pixels(one)[5, 5]) for one in drawn] == [tuple(tinted(n, 100)) for n in (1, 2, 2, 1)]


def test_the_panel_s_tabs_have_the_map_s_colours() -> None:
    style = (Path(__file__).resolve().parents[2] / "style.css").read_text()
    found = re.findall(r"nth-child\(8n(?: \+ (\d))?\) \{\s*--portrait-colour: #([0-9a-f]{6});", style)
    assert {int(number or 8): tuple(bytes.fromhex(colour)) for number, colour in found} == {
        number: colour_of(number) for number in range(1, len(COLOURS) + 1)
    }
