"""Where weights lie on this machine, and which belong together.

A manifest (see `kit`) names an adapter's files, and by content hash its recognition backbone and image encoder.
Without one, an adapter named ``NAME`` is ``uniportrait-faceid_NAME.{safetensors,bin}`` with, for several people,
``uniportrait-router_NAME.{safetensors,bin}``. Its backbone and image encoder are then the published ones, unless the
faceid file is a .safetensors whose metadata names others ("backbone", "vision").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lib_portrait.checkpoints import registry
from lib_portrait.checkpoints.formats import SAFETENSORS_SUFFIX, TENSOR_SUFFIXES, read_header
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import (
    ALONE,
    CLIP_L,
    Manifest,
    StoredFile,
    TextEncoder,
    bare_name,
    is_manifest,
    label,
    read_manifest,
)
from lib_portrait.errors import PortraitError

AUTOMATIC = "automatic"
PUBLISHED = "sd15"
ADAPTER_SUFFIXES = (SAFETENSORS_SUFFIX, ".bin")
ADAPTER = re.compile(r"uniportrait-(faceid|router)_(.+)\.(safetensors|bin)", re.DOTALL)
IMAGE_ENCODER = "image_encoder"


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
    """The files one request is made with.

    router is None where there is none: then only one person can be asked for. manifest is None where there is none;
    published adapters have one in any case. home: the manifest's folder, None where it is not in a file.
    """

    name: str
    faceid: Path
    router: Path | None
    backbone: Path
    vision: Path
    manifest: Manifest | None = None
    home: Path | None = None

    @property
    def method(self) -> str:
        return self.manifest.method if self.manifest is not None else "uniportrait"

    @property
    def files(self) -> dict[str, Path]:
        """By role, the adapter's first."""
        files = {"faceid": self.faceid, "router": self.router, "backbone": self.backbone, "vision": self.vision}
        return {role: path for role, path in files.items() if path is not None}

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
            known = _published_as(role, name)
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
        return sorted({*(match.group(2) for match in found if match), *self._manifests()})

    def manifest(self, name: str) -> Manifest | None:
        """What is known of an adapter: the manifest beside its files, or of a published one the registry's; else None.

        Raises PortraitError for a manifest that cannot be read.
        """
        path = self._manifests().get(name)
        return read_manifest(path) if path is not None else registry.PUBLISHED_KITS.get(name)

    def automatic(self, base: Path | None = None, text_encoder: TextEncoder | None = None) -> str:
        """The adapter that "automatic" means for a checkpoint, whole or not.

        Of those that were made for such a text encoder: the one whose manifest names this very checkpoint, else the
        published one, else the first by name. The published one also when there is none.

        base: the checkpoint's file. text_encoder: its sizes. Where they are not known, Stable Diffusion 1 is meant.
        """
        wanted = text_encoder or CLIP_L
        fitting: dict[str, Manifest | None] = {}
        for name in self.names():
            try:
                manifest = self.manifest(name)
            except PortraitError:
                continue  # `kits` and `kit` say what is wrong with it.
            if ((manifest and manifest.text_encoder) or CLIP_L) == wanted:
                fitting[name] = manifest
        if base is not None:
            for name, manifest in fitting.items():
                if manifest is not None and manifest.base is not None and self._is(base, manifest.base):
                    return name
        return PUBLISHED if PUBLISHED in fitting or not fitting else next(iter(fitting))

    def kit(self, name: str = AUTOMATIC, at: str = "checkpoint") -> Kit:
        """The files for adapter `name`, or for the one that "automatic" means.

        Raises PortraitError: 422 for a bad name, a manifest or faceid file that cannot be read, and an encoder that is
        there under its name with another content than the adapter was trained with. Raises MissingWeights when a file
        other than the router is missing, saying for each which it is, where it goes and how to get it.
        """
        if name == AUTOMATIC:
            name = self.automatic()
        bare_name(name, at)
        files, missing = self._collect(name, at)
        needed = [gap for gap in missing if not gap.optional]
        if needed:
            what = ", ".join(gap.filename for gap in needed)
            others = [other for other in self.names() if other != name]
            there = f" There: {', '.join(others)}." if others and "faceid" not in files else ""
            problem = f"{name!r} is not complete, missing: {what}; {self._searched(*(gap.role for gap in needed))}"
            raise MissingWeights(at, name, needed, problem, there)
        home = self._manifests().get(name)
        return Kit(
            name=name,
            faceid=files["faceid"],
            router=files.get("router"),
            backbone=files["backbone"],
            vision=files["vision"],
            manifest=self.manifest(name),
            home=home.parent if home is not None else None,
        )

    def kits(self) -> Sequence[KitStatus]:
        """All adapters that are there, and the published one in any case, with what each lacks.

        No file is read for its hash here, which of gigabytes takes long: a file of the right size counts.
        """
        status = []
        for name in sorted({PUBLISHED, *self.names()}):
            try:
                files, missing = self._collect(name, "checkpoint", by_size=True)
                status.append(KitStatus(name, files, tuple(missing)))
            except PortraitError as error:
                status.append(KitStatus(name, {}, (), error.detail))
        return status

    def sha256(self, path: Path) -> str:
        """The hash of a weight file, remembered in this store's cache."""
        return file_sha256(path, self.hash_cache)

    def _is(self, path: Path, file: StoredFile, by_size: bool = False) -> bool:
        """Whether the file at `path` has the size of `file`, where that is known, and its content.

        by_size: where the size is known it is not read for the latter. False where nothing is known of the content.
        """
        try:
            if file.size is not None and path.stat().st_size != file.size:
                return False
            if by_size and file.size is not None:
                return True
            return file.sha256 is not None and self.sha256(path) == file.sha256
        except OSError:
            return False

    def _collect(self, name: str, at: str, by_size: bool = False) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        """The files of an adapter by role, and what is missing. by_size: see `_is`."""
        home = self._manifests().get(name)
        if home is not None:
            return self._by_manifest(read_manifest(home), home.parent, at, by_size)
        files, missing = self._adapter(name)
        companions: dict[str, str] = {}
        if "faceid" in files and files["faceid"].suffix == SAFETENSORS_SUFFIX:
            companions = read_header(files["faceid"])[1]
        for role in ("backbone", "vision"):
            wanted = companions.get(role)
            if wanted is not None:
                bare_name(wanted, f"{files['faceid'].name}: {role}")
                path = self._search(role, _spellings(role, wanted))
                known = _published_as(role, wanted)
            else:
                path = self.published(role)
                known = registry.by_role(role)
            if path is not None:
                files[role] = path
            else:
                missing.append(Missing(role, known.filename if known else str(wanted), self.home, known))
        return files, missing

    def _by_manifest(
        self, manifest: Manifest, home: Path, at: str, by_size: bool
    ) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        if "faceid" not in manifest.adapter:
            raise PortraitError(at, f"{manifest.name!r} is a kit of {manifest.method}", "Choose another checkpoint.")
        files, missing = self._adapter(manifest.name, manifest.adapter, home)
        for role in ("backbone", "vision"):
            encoder = manifest.encoders.get(role)
            if encoder is None or encoder.sha256 is None:
                path = self._search(role, _spellings(role, encoder.name)) if encoder else self.published(role)
            else:
                path = self._with_content(role, encoder, manifest.name, at, by_size)
            if path is not None:
                files[role] = path
                continue
            known = _published_as(role, encoder.name) if encoder else registry.by_role(role)
            filename = encoder.name if encoder else registry.by_role(role).filename
            missing.append(Missing(role, known.filename if known else filename, self.home, known))
        return files, missing

    def _adapter(
        self, name: str, named: Mapping[str, str] | None = None, home: Path | None = None
    ) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        """The files of the adapter itself, and what is missing of them.

        named: what a manifest in the folder `home` calls them, by role.
        """
        files: dict[str, Path] = {}
        missing: list[Missing] = []
        for role in ("faceid", "router"):
            names = [f"uniportrait-{role}_{name}{suffix}" for suffix in ADAPTER_SUFFIXES]
            if named and role in named:
                names = _spellings(role, named[role])
            path = _first([home] if home is not None else [], names) or self._search(role, names)
            if path is not None:
                files[role] = path
                continue
            known = registry.by_role(role) if name == PUBLISHED else None
            missing.append(Missing(role, known.filename if known else names[0], self.home, known, role == "router"))
        return files, missing

    def _with_content(self, role: str, file: StoredFile, adapter: str, at: str, by_size: bool) -> Path | None:
        """The file of that content among the folders of a role, whatever its name, or None where none is near it.

        by_size: see `_is`. Raises PortraitError where there are files of its name, but none of its content.
        """
        names = set(_spellings(role, file.name))
        there = [path for folder in self.folders(role) for path in _files(folder) if path.suffix in TENSOR_SUFFIXES]
        named = [path for path in there if path.name in names]
        # Without a size to go by every file would be read whole: then only those that by name are for this role.
        others = there if file.size is not None else [entry.path for entry in self.list(role)]
        for path in dict.fromkeys([*named, *others]):
            if self._is(path, file, by_size):
                return path
        if not named:
            return None
        size = f" of {file.size} bytes" if file.size is not None else ""
        raise PortraitError(
            at,
            f"{adapter!r} was trained with another {file.name} than {named[0]}: with one{size} whose SHA-256 begins "
            f"with {str(file.sha256)[:12]}",
            f"Put that one into {self.home}, under any name.",
        )

    def _manifests(self) -> dict[str, Path]:
        """The files of manifests by the kit's name; a damaged one by its place.

        What lies in an earlier folder counts, also an adapter there that has no manifest.
        """
        found: dict[str, Path | None] = {}
        for folder in self._own("faceid"):
            files = _files(folder)
            for path in filter(is_manifest, files):
                try:
                    name = read_manifest(path).name
                except PortraitError:
                    name = label(path)
                found.setdefault(name, path)
            for path in files:
                match = ADAPTER.fullmatch(path.name)
                if match and match.group(1) == "faceid":
                    found.setdefault(match.group(2), None)
        return {name: path for name, path in found.items() if path is not None}

    def _own(self, role: str) -> Sequence[Path]:
        """Our own folders, behind each those in it that hold a kit; for "vision" also their ``image_encoder``."""
        own: dict[Path, None] = {}
        for folder in map(Path, self._folders.own):
            own |= dict.fromkeys([folder, *sorted(path.parent for path in folder.glob(f"*/{ALONE}"))])
        return [*own, *(folder / IMAGE_ENCODER for folder in own)] if role == "vision" else [*own]

    def _shared(self, role: str) -> Sequence[Path]:
        return [Path(folder) for folder in self._folders.shared.get(role, ())]

    def _search(self, role: str, names: Iterable[str]) -> Path | None:
        return _first(self.folders(role), names)

    def _searched(self, *roles: str) -> str:
        searched = dict.fromkeys(str(folder) for role in roles for folder in self.folders(role))
        return "looked in " + ", ".join(searched)


def _remedy(gaps: Sequence[Missing]) -> str:
    """How to get files that are missing, as a sentence; the folder is the same for all of them."""
    commands = dict.fromkeys(registry.download_command(gap.known) for gap in gaps if gap.known)
    sources = []
    for gap in gaps:
        source = f" from {gap.known.url}" if gap.known else ""
        sources.append(gap.filename + (f" (inside the archive{source})" if gap.known and gap.known.member else source))
    by_hand = f"put into {gaps[0].folder}: {', '.join(sources)}."
    return f"Run: {', '.join(commands)}; or {by_hand}" if commands else by_hand[0].upper() + by_hand[1:]


def _published_as(role: str, name: str) -> registry.KnownWeight | None:
    """The published file of a role that is called `name`, or None."""
    return next((weight for weight in registry.select(name) if weight.role == role), None)


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
