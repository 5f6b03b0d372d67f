"""A method that there is none of: registered by its declaration and its module, with options of every kind."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.methods import declarations
from lib_portrait.methods.base import Method, Options, Placement, Rule
from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Choice, Number, Switch, Word

NAME = "toy"
SIDES = {"left": "Left", "both_sides": "Both sides"}
DECLARATION = Declaration(
    files=AdapterFiles(NAME, "Toy", (AdapterFile("toy", "toy_{name}", "all of it"),)),
    options=(
        Number(name="scale", title="Toy scale", help="how much", default=3.0, low=1.0, high=9.0, axis="scale"),
        Choice(name="side", title="Side", help="where", default="left", choices=SIDES, axis="side"),
        Switch(name="mirrored", title="Mirrored", help="whether it is mirrored", axis="mirrored"),
        Switch(name="show_places", title="Show places", help="append a map"),
    ),
    identity_options=(
        Number(name="depth", title="Depth", help="how deep", default=0.5, low=0.0, high=1.0, axis="depth of {number}"),
        Choice(name="style", title="Style", help="of which style", default="left", choices=SIDES, axis="style"),
        Switch(name="kept", title="Kept", help="whether it is kept", default=True, axis="kept"),
        Word(name="called", title="Called", help="what they are called", axis="called"),
    ),
    maps="show_places",
)


@dataclasses.dataclass(frozen=True)
class Person:
    crops: tuple[Any, ...]
    options: Options
    placement: Placement

    region = property(lambda self: self.placement.region)
    start = property(lambda self: self.placement.start)
    end = property(lambda self: self.placement.end)
    strength = property(lambda self: float(self.options["depth"]))

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


class ToyRule(Rule[Person]):
    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        return {}


class Toy(Method):
    name = NAME

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> Any:
        return {role: (names[role], file.tensors) for role, file in files.items()}

    def check_fits(self, adapter: Any, sites: Sequence[Site]) -> None: ...

    def text_attentions(self, adapter: Any) -> dict[str, list[tuple[int, int]]]:
        return {}

    def encode(
        self, adapter: Any, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> Person:
        return Person(tuple(one.crop for one in faces.references), own, placement)

    def rule(self, adapter: Any, people: Sequence[Person], options: Options) -> ToyRule:
        return ToyRule(people)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Declaration:
    """What a new method's two files and its line of registration do."""
    for package, content in (
        ("lib_portrait.methods.declarations", {"DECLARATION": DECLARATION}),
        ("lib_portrait.methods", {"METHOD": Toy()}),
    ):
        module = types.ModuleType(f"{package}.{NAME}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"{package}.{NAME}", module)
    monkeypatch.setattr(declarations, "NAMES", (*declarations.NAMES, NAME))
    return DECLARATION
