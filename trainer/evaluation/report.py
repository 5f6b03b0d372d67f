"""Tables of what was seen, in Markdown and JSON, and a sheet of some of the pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from lib_portrait.standalone.sheet import Cell, Section, draw_sheet
from trainer.evaluation.measuring import Seen
from trainer.evaluation.metrics import Estimate, Floats, clustered, fid
from trainer.evaluation.people import Population
from trainer.evaluation.plans import Plan, Row

# Lines of the sheet: one shot each, of different people as far as there are.
SHEET_LINES = 8


@dataclass(frozen=True)
class Column:
    """A number of the table. of: what one picture contributes, or None for nothing. percent: shown times 100."""

    name: str
    of: Callable[[Seen], float | None]
    percent: bool = True


def columns(plan: Plan, first: int) -> list[Column]:
    """The columns that are means over pictures. first: how many places of the gallery count as among the first."""
    told = [
        Column("top-1", lambda seen: seen.within(1)),
        Column(f"top-{first}", lambda seen: seen.within(first)),
        Column("face found", lambda seen: seen.found),
        Column("CLIP-T", lambda seen: seen.clip_t),
        Column("prompt accuracy", lambda seen: seen.accuracy),
    ]
    if plan.protocol == "multi":
        pair = Column("MultiSim", lambda seen: seen.multisim, percent=False)
        both = Column("both shown", lambda seen: seen.shows_everybody)
        placed = Column("both placed", lambda seen: seen.places_everybody)
        return [Column("lowest similarity", lambda seen: seen.lowest), pair, both, placed, *told]
    return [Column("similarity", lambda seen: seen.lowest), *told]


@dataclass(frozen=True)
class Line:
    """A row of the table with its numbers: by column, and by attribute the share of pictures that show it."""

    row: Row
    numbers: dict[str, Estimate | None]
    attributes: dict[str, Estimate | None]


@dataclass(frozen=True)
class Difference:
    """By how much one row's pictures differ from another's with the same people, prompts and seeds."""

    row: str
    minus: str
    numbers: dict[str, Estimate | None]


@dataclass(frozen=True)
class Table:
    """A protocol's result. notes: what has to be known to read it."""

    plan: Plan
    columns: list[Column]
    lines: list[Line]
    differences: list[Difference]
    notes: list[str]


def tabulate(
    plan: Plan,
    seen: Mapping[str, Sequence[Seen]],
    real: Sequence[Floats],
    gallery: int,
    notes: Sequence[str],
) -> Table:
    """The table of a plan. seen: by row, in the order of its shots. real: features of real pictures, for FID.
    gallery: how many people there were to be told apart."""
    members = [shot.people for shot in plan.shots]
    first = min(5, gallery)
    shown = columns(plan, first)
    stated = list(dict.fromkeys(name for shot in plan.shots for name in shot.attributes))
    lines = []
    for row in plan.rows:
        pictures = seen[row.name]
        numbers = {column.name: clustered([column.of(one) for one in pictures], members) for column in shown}
        own = [(one.features, group) for one, group in zip(pictures, members) if one.features is not None]
        if own and len(real):
            numbers["FID"] = fid(
                np.stack([features for features, _ in own]), np.stack(real), [group for _, group in own]
            )
        shares = {name: [float(one.shown[name]) if name in one.shown else None for one in pictures] for name in stated}
        lines.append(Line(row, numbers, {name: clustered(values, members) for name, values in shares.items()}))
    made = [row.name for row in plan.rows if not row.real]
    differences = []
    for minus, name in itertools.pairwise(made):
        numbers = {}
        for column in shown:
            pairs = [(column.of(one), column.of(other)) for one, other in zip(seen[name], seen[minus])]
            numbers[column.name] = clustered(
                [None if one is None or other is None else one - other for one, other in pairs], members
            )
        differences.append(Difference(name, minus, numbers))
    shown = [*shown, Column("FID", lambda _: None, percent=False)]
    # What nothing could measure needs no column.
    shown = [column for column in shown if any(line.numbers.get(column.name) for line in lines)]
    return Table(plan, shown, lines, differences, list(notes))


# ------------------------------------------------------------------------------------------------------------- writing


def markdown(table: Table) -> str:
    """The table, the differences from row to row, and the attributes one by one."""
    scales = {column.name: 100.0 if column.percent else 1.0 for column in table.columns}
    digits = {column.name: 2 if column.name == "MultiSim" else 1 for column in table.columns}

    def number(name: str, estimate: Estimate | None, sign: str = "") -> str:
        scale, places = scales.get(name, 100.0), digits.get(name, 1)
        if estimate is None:
            return "–"
        error = "" if estimate.error is None else f" ± {estimate.error * scale:.{places}f}"
        return f"{estimate.value * scale:{sign}.{places}f}{error}"

    names = [column.name for column in table.columns]
    parts = [f"## {table.plan.title}", "", _grid(["", *(_heading(column) for column in table.columns)])]
    parts += [_line([line.row.name, *(number(name, line.numbers.get(name)) for name in names)]) for line in table.lines]
    parts += ["", *table.notes]
    if table.differences:
        means = [name for name in names if name != "FID"]
        parts += ["", "Differences, paired by person, prompt and seed:", "", _grid(["", *means])]
        parts += [
            _line([f"{one.row} − {one.minus}", *(number(name, one.numbers.get(name), "+") for name in means)])
            for one in table.differences
        ]
    told = [name for name in table.lines[0].attributes if any(line.attributes[name] for line in table.lines)]
    if told:
        parts += ["", "Attributes of the prompt that were found, in %:", ""]
        parts += [_grid(["", *(name.replace("_", " ") for name in told)])]
        parts += [
            _line([line.row.name, *(number(name, line.attributes[name]) for name in told)]) for line in table.lines
        ]
    return "\n".join(parts) + "\n"


def _heading(column: Column) -> str:
    return f"{column.name} %" if column.percent else column.name


def _grid(cells: Sequence[str]) -> str:
    return _line(cells) + "\n" + _line(["---"] * len(cells))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def as_json(table: Table, facts: Mapping[str, Any]) -> str:
    """The table unrounded, with `facts` (settings, weights). Similarities and shares are not in percent there."""
    plain = {
        "protocol": table.plan.protocol,
        **facts,
        "notes": table.notes,
        "rows": [
            {**dataclasses.asdict(line.row), "numbers": _plain(line.numbers), "attributes": _plain(line.attributes)}
            for line in table.lines
        ],
        "differences": [
            {"row": one.row, "minus": one.minus, "numbers": _plain(one.numbers)} for one in table.differences
        ],
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def _plain(numbers: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: None if one is None else dataclasses.asdict(one) for name, one in numbers.items()}


def as_lines(plan: Plan, seen: Mapping[str, Sequence[Seen]], paths: Mapping[str, Sequence[Path]], folder: Path) -> str:
    """One JSON object a picture: where it lies below `folder`, what it should show, what was seen."""
    return "".join(
        json.dumps(
            {
                "row": row.name,
                "picture": path.relative_to(folder).as_posix(),
                "people": shot.people,
                "prompt": shot.text,
                "seed": shot.seed,
                "attributes": shot.attributes,
                **one.to_json(),
            },
            ensure_ascii=False,
        )
        + "\n"
        for row in plan.rows
        for path, shot, one in zip(paths[row.name], plan.shots, seen[row.name])
    )


def verdict(seen: Seen) -> list[str]:
    """Whether a picture of a pair shows both, and where they were routed, in a line; none for one person."""
    if len(seen.similarity) < 2:
        return []
    if not seen.shows_everybody:
        return ["not both shown"]
    return ["both shown" if seen.places_everybody is None else "both placed" if seen.places_everybody else "misplaced"]


def sheet(
    plan: Plan, population: Population, seen: Mapping[str, Sequence[Seen]], paths: Mapping[str, Sequence[Path]]
) -> PILImage.Image:
    """A few shots, a line each: the photos that were given, then what each row of the table made of them."""
    groups = list(dict.fromkeys(shot.people for shot in plan.shots))
    step = max(1, len(groups) // SHEET_LINES)
    chosen: list[int] = []
    for turn, group in enumerate(groups[::step][:SHEET_LINES]):
        own = [number for number, shot in enumerate(plan.shots) if shot.people == group]
        chosen.append(own[turn % len(own)])
    lines = []
    for number in chosen:
        shot = plan.shots[number]
        cells = [
            Cell(PILImage.fromarray(population.photo(person, 0).image), [population.people[person].name])
            for person in shot.people
        ]
        for row in plan.rows:
            with PILImage.open(paths[row.name][number]) as picture:
                similar = ", ".join(
                    "no face" if value is None else f"{100 * value:.0f} %"
                    for value in seen[row.name][number].similarity
                )
                cells.append(Cell(picture.convert("RGB"), [similar, *verdict(seen[row.name][number])]))
        lines.append(Section(shot.text, [cells], ["photo"] * len(shot.people) + [row.name for row in plan.rows]))
    notes = ["Below each picture: similarity of the person's face to the photo they are held against."]
    return draw_sheet(plan.title, notes, lines)
