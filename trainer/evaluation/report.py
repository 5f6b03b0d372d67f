"""Tables of measurements, in Markdown and JSON, and a contact sheet of some of the pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from lib_portrait.standalone.sheet import Cell, Section, draw_sheet
from trainer.evaluation.details import freckles_told
from trainer.evaluation.measuring import Measurements
from trainer.evaluation.metrics import Estimate, Floats, cluster_mean, fid
from trainer.evaluation.plans import UNGUIDED, EvaluationPlan, Variant
from trainer.evaluation.populations import Population

# Rows of the sheet: one sample each, of different people as far as there are.
SHEET_ROWS = 8
# What groups are compared by at a glance.
ACROSS = ("MultiSim", "similarity", "lowest similarity", "top-1", "all shown", "boxes hit", "face found")


@dataclass(frozen=True)
class Column:
    """A number of the table. of: what one picture contributes, or None for nothing. percent: shown times 100. of_row:
    what each picture of a row contributes, where that hangs on the others."""

    name: str
    of: Callable[[Measurements], float | None]
    percent: bool = True
    of_row: Callable[[Sequence[Measurements]], list[float | None]] | None = None

    def values(self, pictures: Sequence[Measurements]) -> list[float | None]:
        """What each of a row's pictures contributes."""
        return [self.of(one) for one in pictures] if self.of_row is None else self.of_row(pictures)

    @property
    def heading(self) -> str:
        return f"{self.name} %" if self.percent else self.name

    def cell(self, estimate: Estimate | None, sign: str = "") -> str:
        """An estimate as the table has it. sign: "+" for differences."""
        scale, places = (100, 1) if self.percent else (1, 2 if self.name == "MultiSim" else 1)
        if estimate is None:
            return "–"
        error = "" if estimate.error is None else f" ± {estimate.error * scale:.{places}f}"
        return f"{estimate.value * scale:{sign}.{places}f}{error}"


def columns(plan: EvaluationPlan, k: int) -> list[Column]:
    """The columns that are means over pictures. k: of the second top-k identification."""
    common = [
        Column("top-1", lambda one: one.top_k(1)),
        Column(f"top-{k}", lambda one: one.top_k(k)),
        Column("face found", lambda one: one.detection_rate),
        Column("CLIP-T", lambda one: one.clip_t),
        Column("prompt accuracy", lambda one: one.accuracy),
    ]
    hit = Column("boxes hit", lambda one: one.boxes_hit)
    guided = Column("guided", lambda one: one.guided_share)
    if plan.protocol in ("multi", "groups"):
        everybody = "both" if plan.protocol == "multi" else "all"
        return [
            *([Column("similarity", lambda one: one.mean)] if plan.protocol == "groups" else []),
            Column("lowest similarity", lambda one: one.lowest),
            Column("MultiSim", lambda one: one.multisim, percent=False),
            Column(f"{everybody} shown", lambda one: one.shows_everybody),
            Column(f"{everybody} placed", lambda one: one.places_everybody),
            hit,
            *common,
            guided,
        ]
    details = [
        Column("moles kept", lambda one: one.moles_kept),
        Column("moles elsewhere", lambda one: one.moles_elsewhere),
        Column("freckles", lambda _: None, of_row=lambda row: freckles_told([one.details for one in row])),
    ]
    return [Column("similarity", lambda one: one.lowest), *common, *details, hit, guided]


@dataclass(frozen=True)
class TableRow:
    """A row of the table with its numbers: by column, and by attribute the share of pictures that show it."""

    variant: Variant
    numbers: dict[str, Estimate | None]
    attributes: dict[str, Estimate | None]


@dataclass(frozen=True)
class Difference:
    """By how much one variant's pictures differ from another's with the same people, prompts and seeds."""

    variant: str
    minus: str
    numbers: dict[str, Estimate | None]


@dataclass(frozen=True)
class Table:
    """A protocol's result. notes: what has to be known to read it."""

    plan: EvaluationPlan
    columns: list[Column]
    rows: list[TableRow]
    differences: list[Difference]
    notes: list[str]


def tabulate(
    plan: EvaluationPlan,
    measurements: Mapping[str, Sequence[Measurements]],
    real: Sequence[Floats],
    gallery: int,
    notes: Sequence[str],
) -> Table:
    """The table of a plan.

    measurements: by variant, in the order of the samples. real: FID features of real pictures. gallery: its people.
    """
    members = [sample.people for sample in plan.samples]
    shown = columns(plan, min(5, gallery))
    stated = list(dict.fromkeys(name for sample in plan.samples for name in sample.attributes))
    rows = []
    for variant in plan.variants:
        pictures = measurements[variant.name]
        numbers = {column.name: cluster_mean(column.values(pictures), members) for column in shown}
        own = [(one.features, group) for one, group in zip(pictures, members) if one.features is not None]
        if own and len(real):
            numbers["FID"] = fid(
                np.stack([features for features, _ in own]), np.stack(real), [group for _, group in own]
            )
        shares = {name: [float(one.shown[name]) if name in one.shown else None for one in pictures] for name in stated}
        rows.append(
            TableRow(variant, numbers, {name: cluster_mean(values, members) for name, values in shares.items()})
        )
    differences = []
    for minus, name in compared(plan.variants):
        numbers = {}
        for column in shown:
            pairs = zip(column.values(measurements[name]), column.values(measurements[minus]))
            numbers[column.name] = cluster_mean(
                [None if one is None or other is None else one - other for one, other in pairs], members
            )
        differences.append(Difference(name, minus, numbers))
    shown = [*shown, Column("FID", lambda _: None, percent=False)]
    # What was measured of no variant needs no column.
    shown = [column for column in shown if any(row.numbers.get(column.name) for row in rows)]
    return Table(plan, shown, rows, differences, list(notes))


def compared(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """Which variants are compared, the one with the one that is subtracted in front: a guided one with the same without
    guidance, one in which people have places with the same without, the others each with the one before; where there is
    no such one, with the first of all."""
    generated = [variant for variant in variants if not variant.real]
    found, before = [], generated[0]
    for variant in generated[1:]:
        simpler = []
        if variant.guidance.enabled:
            simpler.append(replace(variant, guidance=UNGUIDED))
        if variant.sides or variant.laid_out:
            simpler.append(replace(variant, sides=False, laid_out=False))
        same = (one for wanted in simpler for one in generated if one == replace(wanted, name=one.name))
        minus = next(same, generated[0] if variant.guidance.enabled else None)
        if minus is None:
            minus, before = before, variant
        found.append((minus.name, variant.name))
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def markdown(table: Table) -> str:
    """The table, the differences from variant to variant, and the attributes one by one."""
    known = {column.name: column for column in table.columns}

    def number(name: str, estimate: Estimate | None, sign: str = "") -> str:
        return known.get(name, Column(name, lambda _: None)).cell(estimate, sign)

    names = [column.name for column in table.columns]
    parts = [f"## {table.plan.title}", "", header(["", *(column.heading for column in table.columns)])]
    parts += [cells([row.variant.name, *(number(name, row.numbers.get(name)) for name in names)]) for row in table.rows]
    parts += ["", *table.notes]
    if table.differences:
        means = [name for name in names if any(one.numbers.get(name) for one in table.differences)]
        parts += ["", "Differences, paired by person, prompt and seed:", "", header(["", *means])]
        parts += [
            cells([f"{one.variant} − {one.minus}", *(number(name, one.numbers.get(name), "+") for name in means)])
            for one in table.differences
        ]
    stated = [name for name in table.rows[0].attributes if any(row.attributes[name] for row in table.rows)]
    if stated:
        parts += ["", "Attributes of the prompt that were found, in %:", ""]
        parts += [header(["", *(name.replace("_", " ") for name in stated)])]
        parts += [
            cells([row.variant.name, *(number(name, row.attributes[name]) for name in stated)]) for row in table.rows
        ]
    return "\n".join(parts) + "\n"


def across(tables: Sequence[Table]) -> str:
    """A protocol of several parts at a glance: for each of the columns that one wants to see side by side, the variants
    below each other and the parts beside each other."""
    columns = {column.name: column for table in tables for column in table.columns}
    names = list(dict.fromkeys(row.variant.name for table in tables for row in table.rows))
    parts = [f"# {tables[0].plan.protocol.capitalize()}", ""]
    for name in ACROSS:
        if name not in columns:
            continue
        parts += [f"## {columns[name].heading}", "", header(["", *(table.plan.title for table in tables)])]
        for variant in names:
            found = [{row.variant.name: row.numbers.get(name) for row in table.rows} for table in tables]
            if any(row.get(variant) for row in found):
                parts.append(cells([variant, *(columns[name].cell(row.get(variant)) for row in found)]))
        parts.append("")
    return "\n".join([*parts, *dict.fromkeys(note for table in tables for note in table.notes)]) + "\n"


def header(names: Sequence[str]) -> str:
    """A table's first two lines."""
    return cells(names) + "\n" + cells(["---"] * len(names))


def cells(texts: Sequence[str]) -> str:
    """A table's line."""
    return f"| {' | '.join(texts)} |"


def as_json(table: Table, facts: Mapping[str, Any]) -> str:
    """The table unrounded, with `facts` (settings, weights). Similarities and shares are not in percent there."""
    plain = {
        "protocol": table.plan.protocol,
        **({"part": table.plan.part} if table.plan.part else {}),
        **facts,
        "notes": table.notes,
        "rows": [
            {**dataclasses.asdict(row.variant), "numbers": _plain(row.numbers), "attributes": _plain(row.attributes)}
            for row in table.rows
        ],
        "differences": [
            {"row": one.variant, "minus": one.minus, "numbers": _plain(one.numbers)} for one in table.differences
        ],
    }
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def _plain(numbers: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {name: None if one is None else dataclasses.asdict(one) for name, one in numbers.items()}


def as_json_lines(
    plan: EvaluationPlan,
    measurements: Mapping[str, Sequence[Measurements]],
    paths: Mapping[str, Sequence[Path]],
    folder: Path,
) -> str:
    """One JSON object a picture: where it lies below `folder`, what it should show, its measurements."""
    return "".join(
        json.dumps(
            {
                "row": variant.name,
                "picture": path.relative_to(folder).as_posix(),
                "people": sample.people,
                "prompt": sample.text,
                "seed": sample.seed,
                "attributes": sample.attributes,
                **one.to_json(),
            },
            ensure_ascii=False,
        )
        + "\n"
        for variant in plan.variants
        for path, sample, one in zip(paths[variant.name], plan.samples, measurements[variant.name])
    )


def verdict(measurements: Measurements) -> list[str]:
    """Whether a picture of several shows everybody, and where they were routed, in a line; none for one person."""
    if len(measurements.similarity) < 2:
        return []
    everybody = "both" if len(measurements.similarity) == 2 else "all"
    if not measurements.shows_everybody:
        return [f"not {everybody} shown"]
    placed = measurements.places_everybody
    return [f"{everybody} shown" if placed is None else f"{everybody} placed" if placed else "misplaced"]


def sample_sheet(
    plan: EvaluationPlan,
    population: Population,
    measurements: Mapping[str, Sequence[Measurements]],
    paths: Mapping[str, Sequence[Path]],
) -> PILImage.Image:
    """A few samples, a row each: the photos that were given, then the picture of each variant."""
    groups = list(dict.fromkeys(sample.people for sample in plan.samples))
    step = max(1, len(groups) // SHEET_ROWS)
    chosen: list[int] = []
    for place, group in enumerate(groups[::step][:SHEET_ROWS]):
        own = [number for number, sample in enumerate(plan.samples) if sample.people == group]
        chosen.append(own[place % len(own)])
    sections = []
    for number in chosen:
        sample = plan.samples[number]
        cells = [
            Cell(PILImage.fromarray(population.photo(person, 0).image), [population.people[person].name])
            for person in sample.people
        ]
        for variant in plan.variants:
            with PILImage.open(paths[variant.name][number]) as picture:
                one = measurements[variant.name][number]
                values = ["no face" if value is None else f"{100 * value:.0f} %" for value in one.similarity]
                cells.append(Cell(picture.convert("RGB"), [", ".join(values), *verdict(one)]))
        headings = ["photo"] * len(sample.people) + [variant.name for variant in plan.variants]
        sections.append(Section(sample.text, [cells], headings))
    notes = ["Below each picture: similarity of the person's face to the photo it is compared with."]
    return draw_sheet(plan.title, notes, sections)
