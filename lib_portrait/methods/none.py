"""No method: nothing is put into the UNet's attention. Reference guidance alone draws the people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.regions import Region
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.methods.base import Method, Options, Placement, Rule


@dataclass(frozen=True)
class Unadapted:
    """One person of whom the attention knows nothing. region, start, end: for who guides. strength: always 0."""

    region: Region | None = None
    start: float = 0.0
    end: float = 1.0
    strength: float = 0.0

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


class NoRule(Rule[Unadapted]):
    """Leaves every attention as it is."""

    def must_visit(self, site: Site) -> bool:
        return False

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        return {}


class NoMethod(Method):
    name = "none"

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> None:
        return None

    def check_fits(self, adapter: None, sites: Sequence[Site]) -> None:
        """Every UNet will do."""

    def text_attentions(self, adapter: None) -> Mapping[str, Sequence[tuple[int, int]]]:
        return {}

    def encode(
        self, adapter: None, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> Unadapted:
        return Unadapted(placement.region, placement.start, placement.end)

    def rule(self, adapter: None, people: Sequence[Unadapted], options: Options) -> NoRule:
        return NoRule(people)


METHOD = NoMethod()
