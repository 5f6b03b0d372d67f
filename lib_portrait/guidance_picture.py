"""Where reference guidance acted, as a picture: everybody's mask on the result and in single steps, and the energy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from lib_portrait.attention.regions import WHOLE, Box
from lib_portrait.guidance.reference import GuidedStep
from lib_portrait.routing_picture import GREY, GROUND, INK, OPACITY, Legend, colour_of, text_height

TITLE = "Where reference guidance acted"
# Steps whose masks are shown by themselves, at most; the first and the last are among them.
SHOWN = 6
# The plot's height by its width.
PLOT_SHARE = 0.25


def draw_guidance(picture: Image.Image, steps: Sequence[GuidedStep], legend: Legend, place: Box = WHOLE) -> Image.Image:
    """The picture in grey under the masks of its guided steps, the longer one was there the stronger its colour; below
    it the masks of single steps, and the energy over all of them.

    steps: of this picture, at least one. legend: as for routing maps. place: the part of the picture that the masks are
    of, which may reach beyond it.
    """
    height = text_height(picture.width)
    gap, width = height // 2, picture.width
    parts = [_text(TITLE, legend, width), _on_picture(picture, steps, legend, place)]
    parts += [_names(steps, legend, width), _strip(steps, legend, width), _plot(steps, legend, width)]
    paper = Image.new("RGB", (width, sum(part.height + gap for part in parts)), GROUND)
    top = 0
    for part in parts:
        paper.paste(part, (0, top))
        top += part.height + gap
    return paper


def shares(steps: Sequence[GuidedStep], size: tuple[int, int]) -> torch.Tensor:
    """In what part of the steps each person's mask covers a position: (N, height, width) in [0, 1] for masks of any
    sizes, resized."""
    resized = [F.interpolate(step.masks.float()[None], size=size, mode="nearest")[0] for step in steps]
    return torch.stack(resized).mean(dim=0)


def _on_picture(picture: Image.Image, steps: Sequence[GuidedStep], legend: Legend, place: Box) -> Image.Image:
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    left, right = (round(edge * picture.width) for edge in (place[0], place[2]))
    top, bottom = (round(edge * picture.height) for edge in (place[1], place[3]))
    x, y = max(left, 0), max(top, 0)
    covered = shares(steps, (max(1, bottom - top), max(1, right - left)))
    seen = covered[:, y - top : picture.height - top, x - left : picture.width - left].numpy()
    area = grey[y : y + seen.shape[1], x : x + seen.shape[2]]
    area[...] = _coloured(area, seen, legend)
    return Image.fromarray(grey.round().astype(np.uint8))


def _coloured(ground: np.ndarray, covered: np.ndarray, legend: Legend) -> np.ndarray:
    """A ground (h, w, 3) under everybody's colour, as strong as (N, h, w) in [0, 1]."""
    drawn = ground
    for number, own in zip(legend.numbers, covered):
        strength = OPACITY * own[..., None]
        drawn = (1 - strength) * drawn + strength * np.array(colour_of(number), dtype=np.float32)
    return drawn


def _text(text: str, legend: Legend, width: int) -> Image.Image:
    height = text_height(width)
    line = Image.new("RGB", (width, height + height // 2), GROUND)
    ImageDraw.Draw(line).text((height // 2, height // 4), text, INK, legend.font(height))
    return line


def _names(steps: Sequence[GuidedStep], legend: Legend, width: int) -> Image.Image:
    """Everybody's colour and name, a line each: how much of the picture their mask covered, and how alike it became."""
    height = text_height(width)
    row, font = height + height // 2, legend.font(height)
    paper = Image.new("RGB", (width, row * len(legend.names)), GROUND)
    draw = ImageDraw.Draw(paper)
    for index, (name, number) in enumerate(zip(legend.names, legend.numbers)):
        covered = np.mean([float(step.masks[index].float().mean()) for step in steps])
        alike = [step.similarity[index] for step in steps if step.similarity[index] is not None]
        text = f"{name}: not guided"
        if alike:
            text = f"{name}: mask on {covered:.0%}, mean similarity {alike[0]:.2f} to {alike[-1]:.2f}"
        draw.rectangle(
            (height // 2, index * row, height // 2 + height - 1, index * row + height - 1), colour_of(number)
        )
        draw.text((2 * height, index * row), text, INK, font)
    return paper


def _strip(steps: Sequence[GuidedStep], legend: Legend, width: int) -> Image.Image:
    """The masks of single steps, with their timesteps."""
    chosen = [steps[round(index)] for index in np.linspace(0, len(steps) - 1, min(SHOWN, len(steps)))]
    height, gap = text_height(width), max(text_height(width) // 4, 1)
    across = (width - gap) // SHOWN - gap
    cells = []
    for step in chosen:
        mask = step.masks.float()
        tall = max(1, round(across * mask.shape[1] / mask.shape[2]))
        resized = F.interpolate(mask[None], size=(tall, across), mode="nearest")[0].numpy()
        ground = np.full((tall, across, 3), 235.0, dtype=np.float32)
        cells.append(Image.fromarray(_coloured(ground, resized / OPACITY, legend).round().astype(np.uint8)))
    paper = Image.new("RGB", (width, max(cell.height for cell in cells) + height + gap), GROUND)
    draw = ImageDraw.Draw(paper)
    for index, (cell, step) in enumerate(zip(cells, chosen, strict=True)):
        x = gap + index * (across + gap)
        paper.paste(cell, (x, 0))
        draw.text((x, cell.height + gap), f"t {step.t:.0f}", INK, legend.font(round(height * 0.8)))
    return paper


def _plot(steps: Sequence[GuidedStep], legend: Legend, width: int) -> Image.Image:
    """The energy of each guided step, from left to right."""
    height, font = text_height(width), legend.font(text_height(width))
    paper = Image.new("RGB", (width, round(width * PLOT_SHARE) + 2 * height), GROUND)
    draw = ImageDraw.Draw(paper)
    energies = [step.energy for step in steps]
    low, high = min(energies), max(energies)
    box = (height // 2, height + height // 2, width - height // 2 - 1, paper.height - height // 2 - 1)
    draw.rectangle(box, (255, 255, 255), GREY)
    text = f"Energy {energies[0]:.3g} to {energies[-1]:.3g} in {len(steps)} guided steps"
    draw.text((height // 2, 0), text, INK, font)

    def point(index: int, energy: float) -> tuple[float, float]:
        across = index / max(len(steps) - 1, 1)
        up = (energy - low) / (high - low) if high > low else 0.5
        inner = (box[0] + height / 2, box[1] + height / 2, box[2] - height / 2, box[3] - height / 2)
        return inner[0] + across * (inner[2] - inner[0]), inner[3] - up * (inner[3] - inner[1])

    points = [point(index, energy) for index, energy in enumerate(energies)]
    radius = max(height // 6, 1)
    draw.line(points, INK, max(height // 8, 1))
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), INK)
    return paper
