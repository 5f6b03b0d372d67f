"""Plots of tables: what changes along an option that is swept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from lib_portrait.routing_picture import colour_of
from lib_portrait.standalone.sheet import FAINT, GAP, GROUND, INK, MARGIN, RULE
from trainer.evaluation.guided import value_said
from trainer.evaluation.metrics import Estimate
from trainer.evaluation.report import Column, Table

# The columns that are plotted, a panel each, where the table has them.
PLOTTED = ("similarity", "top-1", "moles kept", "prompt accuracy", "CLIP-T")
PANEL, EDGE = (420, 300), 64
ACROSS = 2
TEXT, TITLE = 13, 17
TICKS = 5


@dataclass(frozen=True)
class Line:
    """What one adapter reaches with each value. without: what it does without guidance, None where it draws nobody."""

    label: str
    points: Sequence[Estimate | None]
    without: Estimate | None


def sweep_plot(table: Table) -> PILImage.Image:
    """The plot of a part of the protocol `guidance`: a panel for each column, a line for each adapter, with standard
    errors; dashed what the adapter does without guidance."""
    name = table.plan.part
    guided = [row for row in table.rows if row.variant.guidance.enabled]
    values = list(dict.fromkeys(row.variant.guidance.options[name] for row in guided))
    columns = [
        column
        for column in table.columns
        if column.name in PLOTTED and any(row.numbers.get(column.name) for row in guided)
    ]
    columns.sort(key=lambda column: PLOTTED.index(column.name))
    panels = []
    for column in columns:
        lines = []
        for label in dict.fromkeys(row.variant.adapter for row in guided):
            rows = [row for row in guided if row.variant.adapter == label]
            own = {row.variant.guidance.options[name]: row.numbers[column.name] for row in rows}
            without = next((row.numbers[column.name] for row in table.rows if row.variant.name == label), None)
            lines.append(Line(str(label), [own.get(value) for value in values], without))
        panels.append(draw_panel(column, list(map(value_said, values)), lines))
    return _arranged(table.plan.title, panels, [line.label for line in lines] if panels else [])


def draw_panel(column: Column, values: Sequence[str], lines: Sequence[Line]) -> PILImage.Image:
    """One panel. values: what stands below the points, which are equally far from each other."""
    width, height = PANEL
    paper = PILImage.new("RGB", PANEL, GROUND)
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(TEXT)
    scale = 100 if column.percent else 1
    every = [point for line in lines for point in (*line.points, line.without) if point is not None]
    lows = [scale * (point.value - (point.error or 0)) for point in every]
    highs = [scale * (point.value + (point.error or 0)) for point in every]
    # At least a hundredth is shown, so that what is the same everywhere has an axis too.
    step = _step(max(max(highs) - min(lows), scale / 100))
    low, high = math.floor(min(lows) / step) * step, math.ceil(max(highs) / step) * step
    high = max(high, low + step)
    left, right, top, bottom = EDGE, width - GAP, 2 * GAP + TEXT, height - 2 * GAP - TEXT

    def x_of(place: int) -> float:
        return left + (right - left) * (place + 0.5) / len(values)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (scale * value - low) / (high - low)

    draw.text((left, GAP // 2), column.heading, INK, font)
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        y = bottom - (bottom - top) * (value - low) / (high - low)
        draw.line((left, y, right, y), RULE)
        draw.text((left - GAP // 2, y), f"{value:g}", FAINT, font, anchor="rm")
    for place, text in enumerate(values):
        draw.text((x_of(place), bottom + GAP // 2), text, FAINT, font, anchor="mt")
    for number, line in enumerate(lines):
        colour = colour_of(number + 1)
        if line.without is not None:
            y = y_of(line.without.value)
            for begin in range(left, right, 12):
                draw.line((begin, y, min(begin + 6, right), y), colour)
        there = [(x_of(place), point) for place, point in enumerate(line.points) if point is not None]
        draw.line([(x, y_of(point.value)) for x, point in there], colour, 2)
        for x, point in there:
            y, error = y_of(point.value), point.error or 0.0
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
            draw.line((x, y_of(point.value - error), x, y_of(point.value + error)), colour)
    return paper


def _step(extent: float) -> float:
    """A round number, of which about TICKS make the extent."""
    rough = max(extent, 1e-6) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def _arranged(title: str, panels: Sequence[PILImage.Image], labels: Sequence[str]) -> PILImage.Image:
    """The panels under a title, and below them whose line has which colour."""
    across = min(ACROSS, max(len(panels), 1))
    rows = -(-len(panels) // across)
    head, foot = MARGIN + TITLE + GAP, GAP + (TEXT + GAP) * (len(labels) + 1)
    paper = PILImage.new("RGB", (2 * MARGIN + across * PANEL[0], head + rows * PANEL[1] + foot + MARGIN), GROUND)
    draw = ImageDraw.Draw(paper)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(TITLE))
    for number, panel in enumerate(panels):
        paper.paste(panel, (MARGIN + number % across * PANEL[0], head + number // across * PANEL[1]))
    font, y = ImageFont.load_default(TEXT), head + rows * PANEL[1] + GAP
    for number, label in enumerate(labels):
        draw.line((MARGIN, y + TEXT / 2, MARGIN + 24, y + TEXT / 2), colour_of(number + 1), 3)
        draw.text((MARGIN + 32, y), label, INK, font)
        y += TEXT + GAP
    draw.text(
        (MARGIN, y), "dashed: the same without reference guidance; bars: standard errors over people", FAINT, font
    )
    return paper
