"""`portrait.py evaluate all`: every protocol, one after the other, and a page that gathers what came of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import declaration
from lib_portrait.options import by_name
from trainer.evaluation.generators import SampleProvider
from trainer.evaluation.plans import EvaluationPlan, Variant
from trainer.evaluation.report import Table, cells, header
from trainer.evaluation.run import EvaluationSettings, drawing_methods, evaluate, prepare

PAGE = "evaluation.md"
# Pictures that the time of one is the median of, behind one that does not count.
TIMED = 3
# What the methods are compared by: the protocol, the column, the ending of the row's name, and what it is called there.
COMPARED = (
    ("single", "similarity", "", "similarity"),
    ("single", "top-1", "", "top-1"),
    ("single", "moles kept", "", "moles kept"),
    ("single", "moles elsewhere", "", "moles elsewhere"),
    ("single", "freckles", "", "freckles"),
    ("single", "prompt accuracy", "", "prompt accuracy"),
    ("multi", "both shown", "", "pairs"),
    ("multi", "both placed", "", "placed"),
    ("multi", "both shown", ", side by side", "pairs, side by side"),
    ("multi", "both placed", ", side by side", "placed, side by side"),
)
GUIDED = " + guidance"


def evaluate_all(settings: EvaluationSettings, say: Callable[[str], object] = print) -> list[Table]:
    """Every protocol into OUTPUT, and OUTPUT/evaluation.md with all tables, pictures and plots. settings: their
    protocols are not looked at.

    One person and pairs without and with reference guidance, pairs also side by side; groups side by side and laid out,
    without it; several references of the first adapter; beta of the first whose method has that; reference guidance
    swept for the first. Raises PortraitError as `evaluate` does.
    """
    if len(settings.protocols) > 1:
        raise PortraitError("PROTOCOL", "all, and others beside it, were named", "Name all by itself.")
    given, methods = settings.protocol_settings, drawing_methods(settings)
    drawing = tuple(methods)
    if not drawing:
        raise PortraitError("adapter", "nobody is drawn without reference guidance", "Name one that draws people.")
    guided = replace(given, reference_guidance=given.reference_guidance or {}, sides=True)
    apart = replace(given, reference_guidance=None, sides=True, layouts=True)
    runs = [
        replace(settings, protocols=("single", "multi"), protocol_settings=guided),
        replace(settings, protocols=("groups",), protocol_settings=apart, adapters=drawing),
        replace(settings, protocols=("references",), protocol_settings=guided, adapters=drawing[:1]),
    ]
    structured = [one for one, method in methods.items() if by_name(declaration(method).identity_options, "structure")]
    if structured:
        runs.append(replace(settings, protocols=("beta",), protocol_settings=guided, adapters=tuple(structured[:1])))
    runs.append(replace(settings, protocols=("guidance",), protocol_settings=guided, adapters=drawing[:1]))
    tables = [table for run in runs for table in evaluate(run, say)]
    prepared = prepare(runs[0])
    seconds = seconds_a_picture(prepared.provider, prepared.plans[0])
    text = page(tables, seconds, settings)
    (settings.output / PAGE).write_text(text, "utf-8")
    say(f"All of it: {settings.output / PAGE}")
    return tables


def seconds_a_picture(provider: SampleProvider, plan: EvaluationPlan) -> dict[str, tuple[float, float]]:
    """By the row's name: the seconds that a picture by itself takes on this machine, once its people's photos have been
    read, and how many times those of one of text only. Medians over pictures that were generated in turn with the
    base's."""
    base, *others = [variant for variant in plan.variants if not variant.real]
    samples = [sample for sample in plan.samples if sample.people == plan.samples[0].people]

    def seconds(variant: Variant, number: int) -> float:
        began = time.perf_counter()
        provider.draw(variant, [samples[number % len(samples)]])
        return time.perf_counter() - began

    found = {}
    for variant in (base, *others):
        # With the first picture the photos are read.
        pairs = [(seconds(base, number), seconds(variant, number)) for number in range(TIMED + 1)][1:]
        own = statistics.median(took for _, took in pairs)
        found[variant.name] = own, statistics.median(took / bare for bare, took in pairs)
    return found


def side_by_side(tables: Sequence[Table], seconds: Mapping[str, tuple[float, float]]) -> str:
    """All methods in one table: what `COMPARED` names, and the time of a picture."""
    by_protocol = {table.plan.name: table for table in tables}
    shown = [one for one in COMPARED if one[0] in by_protocol]
    columns = {(name, column.name): column for name, table in by_protocol.items() for column in table.columns}
    shown = [one for one in shown if one[:2] in columns]
    lines = [header(["", *(f"{title} %" for *_, title in shown), "seconds a picture", "× text only"])]
    for row in by_protocol["single"].rows:
        found = []
        for protocol, name, ending, _ in shown:
            wanted = _with_ending(row.variant.name, ending)
            numbers = {one.variant.name: one.numbers.get(name) for one in by_protocol[protocol].rows}
            found.append(columns[protocol, name].cell(numbers.get(wanted)))
        own = seconds.get(row.variant.name)
        times = ["–", "–"] if own is None else [f"{own[0]:.2f}", f"{own[1]:.2f}"]
        lines.append(cells([row.variant.name, *found, *times]))
    return "\n".join(lines) + "\n"


def _with_ending(row: str, ending: str) -> str:
    """The row of another protocol that has a place more: "a, side by side + guidance" of "a + guidance"."""
    return f"{row.removesuffix(GUIDED)}{ending}{GUIDED}" if row.endswith(GUIDED) else f"{row}{ending}"


def page(tables: Sequence[Table], seconds: Mapping[str, tuple[float, float]], settings: EvaluationSettings) -> str:
    """The page: methods side by side, then each protocol's tables with its pictures and plots, which lie beside it."""
    parts = [
        "# Evaluation",
        "",
        f"Of {settings.checkpoint.name}, {settings.steps} steps of {settings.sampler}, guidance of the prompt "
        f"{settings.guidance:g}. How it was made stands beside each table in its .json.",
        "",
        "## Side by side",
        "",
        side_by_side(tables, seconds),
        "From the tables below. Pairs: both shown; placed: and where the picture was routed to them. Seconds: of a "
        "picture by itself, on the machine that made this page.",
        "",
    ]
    for protocol in dict.fromkeys(table.plan.protocol for table in tables):
        parts.append((settings.output / f"{protocol}.md").read_text("utf-8"))
        for table in tables:
            if table.plan.protocol == protocol:
                names = [f"{table.plan.name}-plot.png", f"{table.plan.name}.png"]
                parts += [f"![{table.plan.title}]({name})" for name in names if (settings.output / name).is_file()]
        parts.append("")
    return "\n".join(parts)
