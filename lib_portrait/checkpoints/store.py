"""Where weights lie on this machine, and which belong together.

An adapter named ``NAME`` is ``uniportrait-faceid_NAME.{safetensors,bin}`` with, for several people,
``uniportrait-router_NAME.{safetensors,bin}``. Its recognition backbone and image encoder are the published ones, unless
the faceid file is a .safetensors whose metadata names others ("backbone", "vision").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_portrait.checkpoints import registry
from lib_portrait.checkpoints.formats import SAFETENSORS_SUFFIX, TENSOR_SUFFIXES, read_header
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError

AUTOMATIC = "automatic"
PUBLISHED = "sd15"
# The adapter that travels with this project. It fits the checkpoint beside it alone: nobody gets it without asking.
EMBEDDED = "world"
ADAPTER_SUFFIXES = (SAFETENSORS_SUFFIX, ".bin")
ADAPTER = re.compile(r"uniportrait-(faceid|router)_(.+)\.(safetensors|bin)", re.DOTALL)
IMAGE_ENCODER = "image_encoder"
NAME_LENGTH = 200


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
class Kit:
    """The files one request is made with. router is None where there is none: then only one person can be asked for."""

    name: str
    faceid: Path
    router: Path | None
    backbone: Path
    vision: Path

    def routed(self) -> Path:
        """The router file, for a request with several people. Raises MissingWeights when there is none."""
        if self.router is None:
            gap = Missing("router", f"uniportrait-router_{self.name}{self.faceid.suffix}", self.faceid.parent, None)
            if self.name == PUBLISHED:
                gap = Missing("router", gap.filename, gap.folder, registry.by_role("router"))
            raise MissingWeights("identities", self.name, [gap], f"several people need {gap.filename}")
        return self.router


@dataclass(frozen=True)
class Missing:
    """A file that is not there: its name, the folder it goes to, and, if it is published, where.

    optional: a kit works without it for one person.
    """

    role: str
    filename: str
    folder: Path
    known: registry.KnownWeight | None
    optional: bool = False

    def remedy(self) -> str:
        """What to do about it, as a sentence."""
        return _remedy([self])


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
    files: dict[str, Path]
    missing: tuple[Missing, ...]
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.problem is None and all(gap.optional for gap in self.missing)


class Store:
    """The weights in a set of folders. Nothing is remembered between calls: files come and go while the host runs."""

    def __init__(self, folders: Folders, hash_cache: Path | None = None):
        """hash_cache: folder for remembered file hashes, or None. Raises ValueError without a folder of our own."""
        if not folders.own:
            raise ValueError("a store needs at least one folder of its own")
        self._folders = folders
        self.hash_cache = hash_cache

    @property
    def home(self) -> Path:
        """The folder that downloads go to."""
        return Path(self._folders.own[0])

    def folders(self, role: str) -> Sequence[Path]:
        """Every folder searched for a role, in order. For "vision" an ``image_encoder`` folder as published counts."""
        return [*self._own(role), *self._shared(role)]

    def list(self, role: str) -> Sequence[Entry]:
        """The files that by name and place are for this role, by name; of files with one name the one first found."""
        shared = self._shared(role)
        found: dict[str, Entry] = {}
        for folder in self.folders(role):
            dedicated = folder in shared or folder.name == IMAGE_ENCODER
            for path in _files(folder):
                if path.name not in found and _is_for(role, path, dedicated):
                    found[path.name] = Entry(role, path.name, path, path.stat().st_size)
        return [found[name] for name in sorted(found)]

    def find(self, role: str, name: str, at: str | None = None) -> Path:
        """The file called `name` among the folders of a role; the same name with another weight suffix will do.

        name: bare, never a path. at: what the error is about, where that is not the name itself.
        Raises PortraitError: 422 for a name that is no bare file name, 404 when there is no such file.
        """
        bare_name(name, at or role)
        found = self._search(role, _spellings(role, name))
        if found is None:
            known = next((weight for weight in registry.select(name) if weight.role == role), None)
            gap = Missing(role, known.filename if known else name, self.home, known)
            raise PortraitError(at or name, f"{name} is not there; {self._searched(role)}", gap.remedy(), 404)
        return found

    def published(self, role: str) -> Path | None:
        """The published file of a role, under any name that people have it under, or None.

        Names that several models share count only in folders of our own and in ``image_encoder``.
        """
        known = registry.by_role(role)
        names: list[str] = []
        for name in (known.filename, *known.aliases):
            names += [spelling for spelling in _spellings(role, name) if spelling not in names]
        found = self._search(role, names)
        return found or _first(self._own(role), known.generic)

    def names(self) -> Sequence[str]:
        """The adapters there are, sorted; those a request's `checkpoint` may name."""
        found = (ADAPTER.fullmatch(entry.name) for entry in self.list("faceid"))
        return sorted({match.group(2) for match in found if match})

    def automatic(self) -> str:
        """The adapter that "automatic" means, whole or not: the published one when it is there or nothing is, else the
        first by name that is not the embedded world's."""
        names = [name for name in self.names() if name != EMBEDDED]
        return PUBLISHED if PUBLISHED in names or not names else names[0]

    def kit(self, name: str = AUTOMATIC, at: str = "checkpoint") -> Kit:
        """The files for adapter `name`, or for the one that "automatic" means.

        Raises PortraitError: 422 for a bad name or a faceid file that cannot be read. Raises MissingWeights when a file
        other than the router is missing, saying for each which it is, where it goes and how to get it.
        """
        if name == AUTOMATIC:
            name = self.automatic()
        bare_name(name, at)
        files, missing = self._collect(name)
        needed = [gap for gap in missing if not gap.optional]
        if needed:
            what = ", ".join(gap.filename for gap in needed)
            others = [other for other in self.names() if other != name]
            there = f" There: {', '.join(others)}." if others and "faceid" not in files else ""
            problem = f"{name!r} is not complete, missing: {what}; {self._searched(*(gap.role for gap in needed))}"
            raise MissingWeights(at, name, needed, problem, there)
        return Kit(name, files["faceid"], files.get("router"), files["backbone"], files["vision"])

    def kits(self) -> Sequence[KitStatus]:
        """All adapters that are there, and the published one in any case, with what each lacks."""
        status = []
        for name in sorted({PUBLISHED, *self.names()}):
            try:
                files, missing = self._collect(name)
                status.append(KitStatus(name, files, tuple(missing)))
            except PortraitError as error:
                status.append(KitStatus(name, {}, (), error.detail))
        return status

    def sha256(self, path: Path) -> str:
        """The hash of a weight file, remembered in this store's cache."""
        return file_sha256(path, self.hash_cache)

    def _collect(self, name: str) -> tuple[dict[str, Path], Sequence[Missing]]:
        files: dict[str, Path] = {}
        missing: list[Missing] = []
        companions: dict[str, str] = {}
        for role in ("faceid", "router"):
            path = self._search(role, [f"uniportrait-{role}_{name}{suffix}" for suffix in ADAPTER_SUFFIXES])
            if path is not None:
                files[role] = path
                continue
            known = registry.by_role(role) if name == PUBLISHED else None
            filename = known.filename if known else f"uniportrait-{role}_{name}{SAFETENSORS_SUFFIX}"
            missing.append(Missing(role, filename, self.home, known, optional=role == "router"))
        if "faceid" in files and files["faceid"].suffix == SAFETENSORS_SUFFIX:
            companions = read_header(files["faceid"])[1]
        for role in ("backbone", "vision"):
            wanted = companions.get(role)
            if wanted is not None:
                bare_name(wanted, f"{files['faceid'].name}: {role}")
                path = self._search(role, _spellings(role, wanted))
                known = next((weight for weight in registry.select(wanted) if weight.role == role), None)
            else:
                path = self.published(role)
                known = registry.by_role(role)
            if path is not None:
                files[role] = path
            else:
                missing.append(Missing(role, known.filename if known else str(wanted), self.home, known))
        return files, missing

    def _own(self, role: str) -> Sequence[Path]:
        own = [Path(folder) for folder in self._folders.own]
        return own + [folder / IMAGE_ENCODER for folder in own] if role == "vision" else own

    def _shared(self, role: str) -> Sequence[Path]:
        return [Path(folder) for folder in self._folders.shared.get(role, ())]

    def _search(self, role: str, names: Iterable[str]) -> Path | None:
        return _first(self.folders(role), names)

    def _searched(self, *roles: str) -> str:
        searched = dict.fromkeys(str(folder) for role in roles for folder in self.folders(role))
        return "looked in " + ", ".join(searched)


def bare_name(name: str, at: str) -> str:
    """`name`, if it is a plain file name. Raises PortraitError (422) for anything that could lead out of a folder."""
    if not name or len(name) > NAME_LENGTH or name.startswith(".") or re.search(r"[/\\:\x00-\x1f]", name):
        shown = repr(name[:60])
        raise PortraitError(at, f"{shown} is not a bare file name", "Give the name of a file in the model folders.")
    return name


def _remedy(gaps: Sequence[Missing]) -> str:
    """How to get files that are missing, as a sentence; the folder is the same for all of them."""
    commands = dict.fromkeys(registry.download_command(gap.known) for gap in gaps if gap.known)
    sources = []
    for gap in gaps:
        source = f" from {gap.known.url}" if gap.known else ""
        sources.append(gap.filename + (f" (inside the archive{source})" if gap.known and gap.known.member else source))
    by_hand = f"put into {gaps[0].folder}: {', '.join(sources)}."
    return f"Run: {', '.join(commands)}; or {by_hand}" if commands else by_hand[0].upper() + by_hand[1:]


def _spellings(role: str, name: str) -> list[str]:
    """The file names that may hold what `name` names: as given, then with the other suffixes of weight files."""
    if role == "detector":
        return [name]
    path = Path(name)
    stem = path.stem if path.suffix.lower() in TENSOR_SUFFIXES else name
    given = [name] if stem != name else []
    return given + [stem + suffix for suffix in TENSOR_SUFFIXES if stem + suffix != name]


def _first(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    names = list(names)
    candidates = (folder / name for folder in folders for name in names)
    # is_file follows links: people link one copy of a large file into several folders.
    return next((path for path in candidates if path.is_file()), None)


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _is_for(role: str, path: Path, dedicated: bool) -> bool:
    if role == "detector":
        return path.suffix == ".onnx" and path.name.startswith("det_")
    if path.suffix.lower() not in TENSOR_SUFFIXES:
        return False
    if role in ("faceid", "router"):
        match = ADAPTER.fullmatch(path.name)
        return match is not None and match.group(1) == role
    if role == "backbone":
        return "backbone" in path.name.lower()
    known = registry.by_role(role)
    spellings = {name for alias in (known.filename, *known.aliases) for name in _spellings(role, alias)}
    return dedicated or path.name in spellings or path.name in known.generic
