"""What a `store.Store` finds: files, kits and what they lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_portrait.checkpoints.files import KnownWeight
from lib_portrait.checkpoints.kit import Manifest
from lib_portrait.errors import PortraitError


@dataclass(frozen=True)
class Folders:
    """Where to look. Folders that do not exist are fine.

    own: this project's folders, the one that downloads go to first.
    shared: further folders for one role ("vision", "detector"), where other extensions keep the same files.
    """

    own: Sequence[Path]
    shared: Mapping[str, Sequence[Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A file found for a role; size in bytes."""

    role: str
    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Missing:
    """A file that is not there: its name, the folder it goes to, and, if it is published, where.

    people: from how many people in one picture on it is needed.
    """

    role: str
    filename: str
    folder: Path
    known: KnownWeight | None
    people: int = 1

    @property
    def optional(self) -> bool:
        """Whether the kit works without it for one person."""
        return self.people > 1

    def remedy(self) -> str:
        """What to do about it, as a sentence."""
        return _remedy([self])


@dataclass(frozen=True)
class Kit:
    """The files one request is made with, of an adapter of `method`.

    files: by role, those of the adapter and the networks of faces. missing: what there is not, and only several people
    need. manifest is None where there is none; published adapters have one in any case. home: the manifest's folder,
    None where it is not in a file.
    """

    name: str
    method: str
    files: Mapping[str, Path]
    missing: tuple[Missing, ...] = ()
    manifest: Manifest | None = None
    home: Path | None = None

    def check_people(self, count: int, at: str = "identities") -> None:
        """Raises MissingWeights (404) where so many people need a file that is not there."""
        gaps = [gap for gap in self.missing if gap.people <= count]
        if gaps:
            names = ", ".join(gap.filename for gap in gaps)
            raise MissingWeights(at, self.name, gaps, f"several people need {names}")


class MissingWeights(PortraitError):
    """Files that a request needs are not there (404): `gaps` says which, `adapter` whose they are."""

    def __init__(self, field: str, adapter: str, gaps: Sequence[Missing], problem: str, there: str = ""):
        self.adapter = adapter
        self.gaps = tuple(gaps)
        super().__init__(field, problem, _remedy(gaps) + there, 404)


@dataclass(frozen=True)
class KitStatus:
    """A kit as far as it is there, for the panel and the API.

    files: path by role, for what was found. problem: why the kit cannot be used although files are there, or None.
    """

    name: str
    method: str
    files: Mapping[str, Path]
    missing: tuple[Missing, ...]
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.problem is None and all(gap.optional for gap in self.missing)


def _remedy(gaps: Sequence[Missing]) -> str:
    """How to get files that are missing, as a sentence; the folder is the same for all of them."""
    commands = dict.fromkeys(gap.known.command for gap in gaps if gap.known)
    sources = []
    for gap in gaps:
        source = f" from {gap.known.url}" if gap.known else ""
        sources.append(gap.filename + (f" (inside the archive{source})" if gap.known and gap.known.member else source))
    by_hand = f"put into {gaps[0].folder}: {', '.join(sources)}."
    return f"Run: {', '.join(commands)}; or {by_hand}" if commands else by_hand[0].upper() + by_hand[1:]
