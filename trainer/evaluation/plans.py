"""The papers' protocols: which pictures are made of whom, in which variants, and what they are compared with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import NOISE, REFERENCE_T
from lib_portrait.options import Value
from lib_portrait.request import Guidance
from trainer.evaluation.guided import value_said
from trainer.evaluation.populations import UNSEEN_PHOTO, Subject
from trainer.evaluation.prompts import MULTI, SINGLE, Prompt, assigned_prompts
from trainer.world.attributes import Attributes
from trainer.world.captions import NUMBERS

# Captions count no further.
MOST_TOGETHER = len(NUMBERS) - 1
BASE, REAL = "text only", "real pictures"
UNGUIDED = Guidance()
PROTOCOLS = ("single", "multi", "groups", "references", "beta", "guidance")


@dataclass(frozen=True)
class Sample:
    """A picture of a protocol. people: numbers in the population. text, attributes: the prompt's, for these people."""

    people: tuple[int, ...]
    prompt: Prompt
    text: str
    attributes: Attributes
    seed: int


@dataclass(frozen=True)
class Variant:
    """How the samples are made: a row of the table.

    adapter: label of the adapter, or None where nobody is injected; real: not generated at all, but the population's
    own pictures. photos: references of each person. structure: β. sides: whether each person has a region, side by
    side. laid_out: whether each face has its place, see `layouts`, and the ControlNet of the adapter's kit their poses.
    whole: whether adapters are given whole photos where aligned faces would do. guidance: by the references.
    """

    name: str
    adapter: str | None = None
    real: bool = False
    photos: int = 1
    structure: float = 0.1
    sides: bool = False
    laid_out: bool = False
    whole: bool = False
    guidance: Guidance = UNGUIDED


@dataclass(frozen=True)
class Adapter:
    """An adapter as plans know it, or what else draws people. label: its name in the tables.

    draws: whether it draws people without reference guidance. placed: whether its method cannot do without places of
    faces, which it has in every row. names_each: whether its method needs a word of the prompt for each person.
    """

    label: str
    placed: bool = False
    names_each: bool = False
    draws: bool = True


@dataclass(frozen=True)
class EvaluationPlan:
    """A protocol, planned, or a part of it.

    part: which, where the protocol has several, for file names. compared_photo: number of the photo that faces are
    compared with (`Population.photo`). names_each: whether prompts name several people one by one, see `Prompt.text`.
    """

    protocol: str
    title: str
    samples: Sequence[Sample]
    variants: Sequence[Variant]
    compared_photo: int = 0
    names_each: bool = False
    part: str = ""

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.protocol}-{self.part}" if self.part else self.protocol


@dataclass(frozen=True)
class Counts:
    """people: of whom pairs and groups are made too. prompts: for each person, pair or group, at most as many as there
    are. pictures: for each prompt."""

    people: int
    prompts: int
    pictures: int


# UniPortrait, sec. 4.2, after FastComposer: 15 people (105 pairs), 40 prompts (21 for pairs), 4 pictures of each.
PAPER = {name: Counts(15, 21 if name in ("multi", "groups") else 40, 4) for name in PROTOCOLS}
# As many people as identification needs, each with a few of the prompts: errors fall with people rather than with
# pictures, and two CPU cores are done with a protocol in some ten minutes. What two have in common is generated once.
BRIEF = {
    "single": Counts(100, 5, 1),
    "multi": Counts(15, 4, 1),
    "groups": Counts(60, 2, 1),
    "references": Counts(100, 5, 1),
    "beta": Counts(50, 5, 1),
    "guidance": Counts(50, 3, 1),
}


@dataclass(frozen=True)
class ProtocolSettings:
    """The size of protocols, and what they vary. number, prompts, pictures: see `Counts`; 0: the protocol's `defaults`.
    people_per_picture: of groups. structure: β where it is not what varies. sides: whether pairs and groups are also
    made with a region for each person, side by side. layouts: whether they are also made with a place for each face.
    names_each: whether prompts for several people name them one by one even where no adapter needs that.
    reference_guidance: its options as far as they are given, the kits say the others; None for no guided rows. sweeps:
    for guidance, which of its options have which values."""

    number: int = 0
    prompts: int = 0
    pictures: int = 0
    references: tuple[int, ...] = (1, 2, 4)
    people_per_picture: tuple[int, ...] = (2, 3, 4, 5, 6, 7)
    betas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0)
    structure: float = 0.1
    sides: bool = False
    layouts: bool = False
    names_each: bool = False
    reference_guidance: Mapping[str, Value] | None = None
    sweeps: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    defaults: Mapping[str, Counts] = field(default_factory=lambda: PAPER)

    def __post_init__(self) -> None:
        for name in ("number", "prompts", "pictures"):
            if getattr(self, name) < 0:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give a whole number of 1 or more.")
        if not self.references or min(self.references) < 1:
            raise PortraitError("references", f"{self.references} was given", "Give whole numbers of 1 or more.")
        sizes = self.people_per_picture
        if not sizes or min(sizes) < 2 or max(sizes) > MOST_TOGETHER or len(set(sizes)) < len(sizes):
            remedy = f"Give different whole numbers from 2 to {MOST_TOGETHER}."
            raise PortraitError("people_per_picture", f"{sizes} was given", remedy)

    def counts(self, protocol: str) -> Counts:
        """Raises PortraitError for a protocol that does not exist."""
        if protocol not in self.defaults:
            raise PortraitError("protocol", f"{protocol!r} is not a protocol", f"Use: {', '.join(PROTOCOLS)}.")
        defaults = self.defaults[protocol]
        return Counts(
            self.number or defaults.people, self.prompts or defaults.prompts, self.pictures or defaults.pictures
        )

    def photos(self, protocols: Sequence[str]) -> int:
        """The most references that one person gives in these protocols."""
        return max([1, *(self.references if "references" in protocols else ())])


def make_plans(
    protocol: str, people: Sequence[Subject], adapters: Sequence[Adapter], settings: ProtocolSettings
) -> list[EvaluationPlan]:
    """The protocol's parts: of groups one for each number of people in a picture, of guidance one for each option that
    is swept, else one. See `make_plan`."""
    if protocol == "groups":
        return [_groups(size, people, adapters, settings) for size in settings.people_per_picture]
    if protocol == "guidance":
        if not settings.sweeps:
            raise PortraitError("sweep", "nothing is swept", "Name options of reference guidance and their values.")
        return [_sweep(name, values, people, adapters, settings) for name, values in settings.sweeps]
    return [make_plan(protocol, people, adapters, settings)]


def make_plan(
    protocol: str,
    people: Sequence[Subject],
    adapters: Sequence[Adapter],
    settings: ProtocolSettings,
) -> EvaluationPlan:
    """The protocol for the first of the people, where it has but one part.

    The protocols that vary something else use the first of the adapters. With reference guidance each row of an adapter
    has one beside it that is guided, all of them with whole photos: guidance sees more than the face. Where one of them
    needs a word of the prompt for each person, all rows have prompts worded so: they are compared picture by picture.
    Raises PortraitError for a protocol that does not exist, and for pairs of fewer than two people.
    """
    counts = settings.counts(protocol)
    numbers = range(min(counts.people, len(people)))
    base, real = Variant(BASE), Variant(REAL, real=True)
    adapted = _adapted(adapters, settings)
    if protocol == "single":
        # UniPortrait, tables 1 and 3, after FastComposer: people x prompts x 4 pictures.
        samples = _samples([(number,) for number in numbers], SINGLE, people, counts)
        return EvaluationPlan(protocol, "One person", samples, [base, *_guided(adapted, settings), real])
    if protocol == "multi":
        # UniPortrait, tables 2 and 4, after FastComposer: all pairs of the people.
        pairs = list(itertools.combinations(numbers, 2))
        if not pairs:
            raise PortraitError("number", "one person makes no pair", "Give at least two people.")
        return _of_several(EvaluationPlan(protocol, "Two people", [], []), pairs, people, adapters, settings)
    drawing = [one for one in adapted if not one.guidance.enabled]
    if not drawing:
        raise PortraitError("adapter", "nobody is drawn without reference guidance", "Name one that draws people.")
    samples = _samples([(number,) for number in numbers], SINGLE, people, counts)
    if protocol == "references":
        # UniPortrait, table I: compared with another photo of the person than the ones given.
        variants = [
            dataclasses.replace(drawing[0], name=f"{n} reference{'s' if n > 1 else ''}", photos=n)
            for n in settings.references
        ]
        return EvaluationPlan(protocol, "Several references", samples, [base, *variants, real], UNSEEN_PHOTO)
    # UniPortrait, appendix A.
    variants = [dataclasses.replace(drawing[0], name=f"β = {beta:g}", structure=beta) for beta in settings.betas]
    return EvaluationPlan(protocol, "Face structure scale", samples, [base, *variants, real])


def _groups(
    size: int, people: Sequence[Subject], adapters: Sequence[Adapter], settings: ProtocolSettings
) -> EvaluationPlan:
    """InstantFamily, sec. 4.5 and table 2: each of the people is in one group, so that there are as many faces of every
    size of group."""
    number = min(settings.counts("groups").people, len(people))
    groups = [tuple(range(first, first + size)) for first in range(0, number - size + 1, size)]
    if not groups:
        raise PortraitError("number", f"{number} people make no group of {size}", f"Give at least {size} people.")
    plan = EvaluationPlan("groups", f"{size} people", [], [], part=str(size))
    return _of_several(plan, groups, people, adapters, settings)


def _of_several(
    plan: EvaluationPlan,
    groups: Sequence[tuple[int, ...]],
    people: Sequence[Subject],
    adapters: Sequence[Adapter],
    settings: ProtocolSettings,
) -> EvaluationPlan:
    """A plan with the pictures of these groups in all ways that are asked for."""
    adapted = _adapted(adapters, settings)
    free = [one for one in adapted if not one.laid_out]
    if settings.sides:
        adapted += [dataclasses.replace(one, name=f"{one.name}, side by side", sides=True) for one in free]
    if settings.layouts:
        adapted += [dataclasses.replace(one, name=f"{one.name}, laid out", laid_out=True) for one in free]
    each = settings.names_each or any(one.names_each for one in adapters)
    samples = _samples(groups, MULTI, people, settings.counts(plan.protocol), each)
    variants = [Variant(BASE), *_guided(adapted, settings), Variant(REAL, real=True)]
    return dataclasses.replace(plan, samples=samples, variants=variants, names_each=each)


def _sweep(
    name: str,
    values: Sequence[Value],
    people: Sequence[Subject],
    adapters: Sequence[Adapter],
    settings: ProtocolSettings,
) -> EvaluationPlan:
    """OmniPortrait, fig. 7 and 14: an option of reference guidance with each of the values, the others as they are; but
    t0, which has a say only where the reference is noised to it, whatever a kit says.

    Raises PortraitError for a sweep of t0 where the reference is to be noised as each step.
    """
    given = settings.reference_guidance or {}
    if name == REFERENCE_T.name:
        if given.get(NOISE.name, NOISE.default) != NOISE.default:
            raise PortraitError(
                "sweep", f"{name} has no say where the reference is noised as each step", "Leave noise=step out."
            )
        given = {**given, NOISE.name: NOISE.default}
    settings = dataclasses.replace(settings, reference_guidance=given)
    counts = settings.counts("guidance")
    variants = [Variant(BASE)]
    for one in _adapted(adapters, settings):
        if not one.guidance.enabled:
            variants.append(one)
        for value in values:
            guidance = Guidance(True, {**given, name: value})
            variants.append(dataclasses.replace(one, name=swept_name(one.name, name, value), guidance=guidance))
    groups = [(number,) for number in range(min(counts.people, len(people)))]
    samples = _samples(groups, SINGLE, people, counts)
    title = f"Reference guidance: {name}"
    return EvaluationPlan("guidance", title, samples, [*variants, Variant(REAL, real=True)], part=name)


def swept_name(row: str, name: str, value: Value) -> str:
    """The name of a row in which an option of reference guidance has a value."""
    return f"{row}, {name} = {value_said(value)}"


def _adapted(adapters: Sequence[Adapter], settings: ProtocolSettings) -> list[Variant]:
    """A row for each of the adapters, guided only where it draws nobody otherwise. Raises PortraitError where such a
    one is not guided."""
    given = settings.reference_guidance
    rows = []
    for one in adapters:
        row = Variant(one.label, one.label, structure=settings.structure, laid_out=one.placed, whole=given is not None)
        if not one.draws:
            if given is None:
                raise PortraitError(
                    "adapter", f"{one.label} draws nobody by itself", "Switch on --reference-guidance, or leave it out."
                )
            row = dataclasses.replace(row, guidance=Guidance(True, given))
        rows.append(row)
    return rows


def _guided(rows: Sequence[Variant], settings: ProtocolSettings) -> list[Variant]:
    """The rows, each with a guided one behind it where there is to be one and it is none."""
    given = settings.reference_guidance
    if given is None:
        return list(rows)
    found = []
    for row in rows:
        found.append(row)
        if not row.guidance.enabled:
            found.append(dataclasses.replace(row, name=f"{row.name} + guidance", guidance=Guidance(True, given)))
    return found


def _samples(
    groups: Sequence[tuple[int, ...]],
    prompts: Sequence[Prompt],
    people: Sequence[Subject],
    counts: Counts,
    each: bool = False,
) -> list[Sample]:
    """The pictures of a protocol, one person or pair after the other; the same seeds in every variant. each: see
    `Prompt.text`."""
    samples = []
    for place, group in enumerate(groups):
        words = [people[person].word for person in group]
        for number in assigned_prompts(prompts, place, counts.prompts):
            prompt = prompts[number]
            for picture in range(counts.pictures):
                seed = sample_seed([people[person].name for person in group], number, picture)
                samples.append(Sample(group, prompt, prompt.text(words, each), prompt.attributes(words), seed))
    return samples


def sample_seed(names: Sequence[str], prompt: int, picture: int) -> int:
    """The seed of a picture: it depends on who is in it and what is asked for, not on what else is evaluated."""
    letters = [letter for name in names for letter in (*name.encode(), 0)]
    state = np.random.SeedSequence([*letters, prompt, picture]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(2))
