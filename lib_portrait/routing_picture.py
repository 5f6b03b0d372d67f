"""Routing maps as pictures: which part of a result belongs to whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from lib_portrait.attention.regions import WHOLE, Box

# Of identities 1, 2, ...: told apart by hue and lightness, also with colour-deficient sight (after Okabe and Ito).
# style.css gives the panel's tabs the same.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (136, 84, 208),
)
OPACITY = 0.55
TITLE = "Who was put where"
NOBODY = "nobody"
GROUND, GREY, INK = (250, 249, 246), (150, 150, 150), (32, 32, 36)
# Of a pixel that was not sampled. Other numbers are the people's, from 0, and then nobody's.
OUTSIDE = -1
# The text's height by the picture's width, in pixels.
TEXT_SHARE, SMALLEST_TEXT, LARGEST_TEXT = 1 / 36, 11, 28


@dataclass(frozen=True)
class Legend:
    """What tells the people of a map apart. names: of all in order. numbers: from 1, which colour each has.

    font: gives one for a height in pixels; hosts have different ones.
    """

    names: Sequence[str]
    numbers: Sequence[int]
    font: Callable[[int], Any]


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of identity 1, 2, ...; beyond the eighth they come again, with other numbers in the areas."""
    return COLOURS[(number - 1) % len(COLOURS)]


def draw_routing(
    pictures: Sequence[Image.Image],
    maps: Sequence[torch.Tensor],
    place: Box = WHOLE,
    legend: Legend | None = None,
) -> list[Image.Image]:
    """Each picture in grey under the colours of the people to whom most of its positions were given.

    maps: one (N, h, w) in [0, 1] for each picture; what a position's shares lack of 1 is nobody's. place: the part of
    the picture that the maps are of; what lies outside stays as it is. legend: is written below and numbers the areas;
    without one the size stays.
    """
    drawn: list[Image.Image] = []
    for picture, own in zip(pictures, maps, strict=True):
        owners, parts = _owners(own, (picture.height, picture.width), place)
        numbers = legend.numbers if legend is not None else range(1, len(own) + 1)
        painted = _paint(picture, owners, numbers)
        if legend is not None:
            _number_areas(painted, owners, legend)
            painted = _with_legend(painted, parts, legend)
        drawn.append(painted)
    return drawn


def _owners(shares: torch.Tensor, size: tuple[int, int], place: Box) -> tuple[np.ndarray, list[float]]:
    """Who has most of each pixel, and which part of all that was sampled each area is, nobody's last.

    shares (N, h, w) of `place` -> (height, width) whole numbers, and N + 1 numbers that sum to 1.
    """
    height, width = size
    left, right = (round(edge * width) for edge in (place[0], place[2]))
    top, bottom = (round(edge * height) for edge in (place[1], place[3]))
    everybody = torch.cat([shares, 1 - shares.sum(dim=0, keepdim=True)])
    inner = (max(1, bottom - top), max(1, right - left))
    smooth = F.interpolate(everybody[None], size=inner, mode="bilinear", align_corners=False)[0]
    owners = np.full(size, OUTSIDE)
    # The place may reach beyond the picture.
    x, y = max(left, 0), max(top, 0)
    visible = smooth[:, y - top : height - top, x - left : width - left]
    seen = visible.argmax(dim=0).numpy()
    owners[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return owners, (np.bincount(seen.ravel(), minlength=len(everybody)) / seen.size).tolist()


def _paint(picture: Image.Image, owners: np.ndarray, numbers: Sequence[int]) -> Image.Image:
    """The picture with the areas of its owners in colour, and their outlines."""
    colour = np.asarray(picture.convert("RGB"), dtype=np.float32)
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    pixels = np.where((owners == OUTSIDE)[..., None], colour, grey)
    for i, number in enumerate(numbers):
        area = owners == i
        pixels[area] = (1 - OPACITY) * grey[area] + OPACITY * np.array(colour_of(number))
    pixels[_outlines(owners, max(1, round(max(owners.shape) / 256)))] = 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def _outlines(owners: np.ndarray, thickness: int) -> np.ndarray:
    """(height, width) bool: the pixels where two areas meet, `thickness` pixels wide."""
    edge = np.zeros(owners.shape, dtype=bool)
    for step in range(1, thickness + 1):
        edge[step:] |= owners[step:] != owners[:-step]
        edge[:, step:] |= owners[:, step:] != owners[:, :-step]
    return edge


def _number_areas(picture: Image.Image, owners: np.ndarray, legend: Legend) -> None:
    """Writes each person's number where their area is widest."""
    height = text_height(picture.width)
    font, draw = legend.font(height), ImageDraw.Draw(picture)
    for i, number in enumerate(legend.numbers):
        area = owners == i
        if not area.any():
            continue
        # Nobody's beyond the edge, so that a number stands away from it.
        padded = ImageOps.expand(Image.fromarray((area * 255).astype(np.uint8)), border=height)
        depth = np.asarray(padded.filter(ImageFilter.GaussianBlur(max(owners.shape) / 12)))
        inner = depth[height:-height, height:-height]
        y, x = divmod(int(np.argmax(np.where(area, inner, 0))), area.shape[1])
        draw.ellipse((x - height, y - height, x + height, y + height), GROUND, colour_of(number), 2)
        draw.text((x, y), str(number), INK, font, anchor="mm")


def _with_legend(picture: Image.Image, parts: Sequence[float], legend: Legend) -> Image.Image:
    """The picture with everybody's colour, name and part of what was sampled below it."""
    height = text_height(picture.width)
    font, gap = legend.font(height), height // 2
    colours = [*(colour_of(number) for number in legend.numbers), GREY]
    entries = [
        (colour, f"{name}: {share:.0%}")
        for name, colour, share in zip([*legend.names, NOBODY], colours, parts)
        if name != NOBODY or share >= 0.005
    ]
    widths = [round(font.getlength(text)) + height + 3 * gap for _, text in entries]
    width = max(picture.width, *widths, round(font.getlength(TITLE)) + 2 * gap)
    places, x, line = [], gap, 1
    for entry in widths:
        if x > gap and x + entry > width:
            x, line = gap, line + 1
        places.append((x, line))
        x += entry
    row = height + gap
    paper = Image.new("RGB", (width, picture.height + gap + (line + 1) * row), GROUND)
    paper.paste(picture, ((width - picture.width) // 2, 0))
    draw, top = ImageDraw.Draw(paper), picture.height + gap
    draw.text((gap, top), TITLE, INK, font)
    for (colour, text), (x, line) in zip(entries, places):
        y = top + line * row
        draw.rectangle((x, y, x + height - 1, y + height - 1), colour, INK)
        draw.text((x + height + gap, y), text, INK, font)
    return paper


def text_height(width: int) -> int:
    """Of the text below pictures of this width, in pixels."""
    return min(max(round(width * TEXT_SHARE), SMALLEST_TEXT), LARGEST_TEXT)
