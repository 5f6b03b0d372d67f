"""A contact sheet: references, results and what was measured, on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

GROUND, INK, FAINT, RULE = (250, 249, 246), (32, 32, 36), (110, 110, 116), (214, 212, 206)
MARGIN, GAP = 24, 12
TITLE, HEADING, TEXT = 22, 17, 13
SHORTEST, LONGEST = 160, 320


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet, with a few short lines below it."""

    picture: Image.Image
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """Rows of pictures under one heading; columns: what stands above each column, or nothing."""

    heading: str
    rows: Sequence[Sequence[Cell]]
    columns: Sequence[str] = ()


def draw_sheet(title: str, notes: Sequence[str], sections: Sequence[Section]) -> Image.Image:
    """The sheet as RGB. Pictures are scaled to one width; text is wrapped to it and never cut off."""
    widths = [cell.picture.width for section in sections for row in section.rows for cell in row]
    cell = min(max(max(widths, default=SHORTEST), SHORTEST), LONGEST)
    across = max((len(row) for section in sections for row in section.rows), default=1)
    width = 2 * MARGIN + across * cell + (across - 1) * GAP
    paper = _Paper(width)
    paper.write(title, TITLE)
    for note in notes:
        paper.write(note, TEXT, FAINT)
    for section in sections:
        paper.rule()
        paper.write(section.heading, HEADING)
        if section.columns:
            paper.columns(section.columns, cell)
        for row in section.rows:
            paper.row(row, cell)
    return paper.finished()


class _Paper:
    """Grows downwards: everything is placed at `y`, which moves on."""

    def __init__(self, width: int):
        self.image = Image.new("RGB", (width, 64), GROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def room(self, height: int) -> None:
        """Makes sure there are `height` pixels below `y`."""
        needed = self.y + height + MARGIN
        if needed > self.image.height:
            grown = Image.new("RGB", (self.image.width, 2 * needed), GROUND)
            grown.paste(self.image)
            self.image, self.draw = grown, ImageDraw.Draw(grown)

    def write(self, text: str, size: int, colour: tuple[int, int, int] = INK) -> None:
        self.y += self.text(text, size, MARGIN, self.image.width - 2 * MARGIN, colour)

    def rule(self) -> None:
        self.room(2 * GAP)
        self.y += GAP
        self.draw.line((MARGIN, self.y, self.image.width - MARGIN, self.y), RULE)
        self.y += GAP

    def columns(self, texts: Sequence[str], cell: int) -> None:
        places = [MARGIN + i * (cell + GAP) for i in range(len(texts))]
        self.y += max(self.text(text, TEXT, x, cell, FAINT) for text, x in zip(texts, places))

    def row(self, cells: Sequence[Cell], cell: int) -> None:
        bottom = self.y
        for i, one in enumerate(cells):
            x, top = MARGIN + i * (cell + GAP), self.y
            size = (cell, max(1, round(one.picture.height * cell / one.picture.width)))
            self.room(size[1])
            self.image.paste(one.picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), (x, top))
            self.y += size[1] + 4
            for line in one.lines:
                self.y += self.text(line, TEXT, x, cell)
            bottom, self.y = max(bottom, self.y), top
        self.y = bottom + GAP

    def text(self, text: str, size: int, x: int, width: int, colour: tuple[int, int, int] = INK) -> int:
        """Writes the text at `y`, wrapped to `width`; the height it took."""
        font = ImageFont.load_default(size)
        lines = _wrapped(text, font, width)
        height = round(size * 1.4)
        self.room(height * len(lines))
        for number, line in enumerate(lines):
            self.draw.text((x, self.y + number * height), line, colour, font)
        return height * len(lines)

    def finished(self) -> Image.Image:
        return self.image.crop((0, 0, self.image.width, self.y + MARGIN - GAP))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines no wider than `width`; a longer word is broken."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width and lines[-1]:
                lines.append("")
            lines[-1] += letter
    return lines
