"""The papers' protocols: which pictures are made of whom, in which variants, and what they are held against."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lib_portrait.errors import PortraitError
from trainer.evaluation.people import TARGET, Person
from trainer.evaluation.prompts import MULTI, SINGLE, Prompt, dealt
from trainer.world.attributes import Attributes

BASE, REAL = "text only", "real pictures"
PROTOCOLS = ("single", "multi", "references", "beta")


@dataclass(frozen=True)
class Shot:
    """One picture to be made. people: numbers in the population. text, attributes: the prompt's, for these people."""

    people: tuple[int, ...]
    prompt: Prompt
    text: str
    attributes: Attributes
    seed: int


@dataclass(frozen=True)
class Row:
    """One line of a table: how the shots are made.

    adapter: label of the adapter, or None where nobody is injected; real: not made at all, but the population's own
    pictures. photos: references of each person. structure: β. sides: whether each person has a region, side by side.
    """

    name: str
    adapter: str | None = None
    real: bool = False
    photos: int = 1
    structure: float = 0.1
    sides: bool = False


@dataclass(frozen=True)
class Plan:
    """A protocol. against: number of the photo that results are compared with (`Population.photo`)."""

    protocol: str
    title: str
    shots: Sequence[Shot]
    rows: Sequence[Row]
    against: int = 0


@dataclass(frozen=True)
class Counts:
    """people: of whom pairs are made too. prompts: for each person or pair, at most as many as there are. pictures: for
    each prompt."""

    people: int
    prompts: int
    pictures: int


# UniPortrait, sec. 4.2, after FastComposer: 15 people (105 pairs), 40 prompts (21 for pairs), 4 pictures of each.
PAPER = {name: Counts(15, 21 if name == "multi" else 40, 4) for name in PROTOCOLS}
# As many people as identification needs, each asked with a few of the prompts: errors fall with people rather than with
# pictures, and two CPU cores are done with a protocol in some ten minutes. What two have in common is drawn once.
BRIEF = {
    "single": Counts(100, 5, 1),
    "multi": Counts(15, 4, 1),
    "references": Counts(100, 5, 1),
    "beta": Counts(50, 5, 1),
}


@dataclass(frozen=True)
class Extent:
    """How much of a protocol is done. number, prompts, pictures: see `Counts`; 0: what `usual` says of the protocol.
    structure: β where it is not what varies. sides: whether pairs are also made with a region for each person."""

    number: int = 0
    prompts: int = 0
    pictures: int = 0
    references: tuple[int, ...] = (1, 2, 4)
    betas: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 1.0)
    structure: float = 0.1
    sides: bool = False
    usual: Mapping[str, Counts] = field(default_factory=lambda: PAPER)

    def __post_init__(self) -> None:
        for name in ("number", "prompts", "pictures"):
            if getattr(self, name) < 0:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give a whole number of 1 or more.")
        if not self.references or min(self.references) < 1:
            raise PortraitError("references", f"{self.references} was given", "Give whole numbers of 1 or more.")

    def counts(self, protocol: str) -> Counts:
        """Raises PortraitError for a protocol that does not exist."""
        if protocol not in self.usual:
            raise PortraitError("protocol", f"{protocol!r} is not a protocol", f"Use: {', '.join(PROTOCOLS)}.")
        usual = self.usual[protocol]
        return Counts(self.number or usual.people, self.prompts or usual.prompts, self.pictures or usual.pictures)

    def photos(self, protocols: Sequence[str]) -> int:
        """The most references that one person gives in these protocols."""
        return max([1, *(self.references if "references" in protocols else ())])


def plan(protocol: str, people: Sequence[Person], adapters: Sequence[str], extent: Extent) -> Plan:
    """The protocol for the first of the people.

    adapters: their labels; the protocols that vary something else use the first one. Raises PortraitError for a
    protocol that does not exist, and for pairs of fewer than two people.
    """
    counts = extent.counts(protocol)
    numbers = range(min(counts.people, len(people)))
    base, real = Row(BASE), Row(REAL, real=True)
    made = [Row(label, label, structure=extent.structure) for label in adapters]
    if protocol == "single":
        # UniPortrait, tables 1 and 3, after FastComposer: people x prompts x 4 pictures.
        shots = _shots([(number,) for number in numbers], SINGLE, people, counts)
        return Plan(protocol, "One person", shots, [base, *made, real])
    if protocol == "multi":
        # UniPortrait, tables 2 and 4, after FastComposer: all pairs of the people.
        pairs = list(itertools.combinations(numbers, 2))
        if not pairs:
            raise PortraitError("number", "one person makes no pair", "Give at least two people.")
        placed = [
            dataclasses.replace(row, name=f"{row.name}, side by side", sides=True) for row in made if extent.sides
        ]
        return Plan(protocol, "Two people", _shots(pairs, MULTI, people, counts), [base, *made, *placed, real])
    shots = _shots([(number,) for number in numbers], SINGLE, people, counts)
    if protocol == "references":
        # UniPortrait, table I: compared with another photo of the person than the ones given.
        rows = [
            Row(f"{count} reference{'s' if count > 1 else ''}", adapters[0], photos=count, structure=extent.structure)
            for count in extent.references
        ]
        return Plan(protocol, "Several references", shots, [base, *rows, real], against=TARGET)
    # UniPortrait, appendix A.
    rows = [Row(f"β = {beta:g}", adapters[0], structure=beta) for beta in extent.betas]
    return Plan(protocol, "Face structure scale", shots, [base, *rows, real])


def _shots(
    groups: Sequence[tuple[int, ...]], prompts: Sequence[Prompt], people: Sequence[Person], counts: Counts
) -> list[Shot]:
    """The pictures of a protocol, one person or pair after the other; the same seeds in every row of the table."""
    shots = []
    for place, group in enumerate(groups):
        words = [people[person].word for person in group]
        for number in dealt(prompts, place, counts.prompts):
            prompt = prompts[number]
            for picture in range(counts.pictures):
                seed = shot_seed([people[person].name for person in group], number, picture)
                shots.append(Shot(group, prompt, prompt.text(words), prompt.attributes(words), seed))
    return shots


def shot_seed(names: Sequence[str], prompt: int, picture: int) -> int:
    """The seed of a picture: it depends on who is in it and what is asked for, not on what else is evaluated."""
    letters = [letter for name in names for letter in (*name.encode(), 0)]
    state = np.random.SeedSequence([*letters, prompt, picture]).generate_state(1, np.uint64)[0]
    return int(state >> np.uint64(2))
