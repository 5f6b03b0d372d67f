"""Where weights lie on this machine, and which belong together.

A manifest (see `kit`) names an adapter's files, and by content hash the networks of faces that it was trained with.
Without one, an adapter is told by the names of its files (`files.AdapterFile`). Its networks are then the published
ones, unless its first file is a .safetensors whose metadata names others, by role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from pathlib import Path

from lib_portrait.checkpoints.files import AdapterFiles, KnownWeight, part_of
from lib_portrait.checkpoints.formats import (
    SAFETENSORS_SUFFIX,
    SOURCE,
    TENSOR_SUFFIXES,
    Checkpoint,
    read_header,
    read_tensors,
)
from lib_portrait.checkpoints.found import Entry, Folders, Kit, KitStatus, Missing, MissingWeights
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
from lib_portrait.checkpoints.registry import PARSER, Registry
from lib_portrait.errors import PortraitError
from lib_portrait.options import Value

AUTOMATIC = "automatic"
IMAGE_ENCODER = "image_encoder"


class Store:
    """The weights in a set of folders. Nothing is remembered between calls: files come and go while the host runs."""

    def __init__(self, folders: Folders, methods: Sequence[AdapterFiles], hash_cache: Path | None = None):
        """methods: what their weights are called, the first one's where none is named. hash_cache: folder for
        remembered file hashes, or None. Raises ValueError without a folder of our own, and without a method."""
        if not folders.own:
            raise ValueError("a store needs at least one folder of its own")
        if not methods:
            raise ValueError("a store needs at least one method")
        self.methods = tuple(methods)
        self.registry = Registry(methods)
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
                if path.name not in found and self._is_for(role, path, dedicated):
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
            known = self._published_as(role, name)
            gap = Missing(role, known.filename if known else name, self.home, known)
            raise PortraitError(at or name, f"{name} is not there; {self._searched(role)}", gap.remedy(), 404)
        return found

    def published(self, role: str, known: KnownWeight | None = None) -> Path | None:
        """The published file of a role, under any name that people have it under, or None.

        known: which, where several methods have one. Names that several models share count only in folders of our own
        and in ``image_encoder``.
        """
        known = known or self.registry.by_role(role)
        if known is None:
            return None
        names: list[str] = []
        for name in (known.filename, *known.aliases):
            names += [spelling for spelling in _spellings(role, name) if spelling not in names]
        found = self._search(role, names)
        return found or _first(self._own(role), known.generic)

    def locate(self, file: StoredFile, home: Path | None = None) -> Path | None:
        """The file that a manifest in the folder `home` tells of: there under its name, else by content in any folder
        of our own. None where it is in neither."""
        beside = _first([home] if home is not None else [], [file.name])
        if beside is not None:
            return beside
        there = [path for folder in self._own() for path in _files(folder)]
        known = [path for path in there if file.size is not None and path.suffix in TENSOR_SUFFIXES]
        named = [path for path in there if path.name == file.name]
        return next((path for path in dict.fromkeys([*named, *known]) if self.matches(path, file)), None)

    def names(self, method: str | None = None) -> Sequence[str]:
        """The adapters there are, sorted, of one method or of all: those a request's `checkpoint` may name."""
        known = [files.method for files in self.methods] if method is None else [method]
        return sorted({name for of, name in self._adapters() if of in known})

    def manifest(self, name: str, method: str | None = None) -> Manifest | None:
        """What is known of an adapter: the manifest beside its files, or of a published one its method's; else None.

        Raises PortraitError for a manifest that cannot be read.
        """
        files = self._method_of(name, method)
        path = self._adapters().get((files.method, name))
        if path is not None:
            return read_manifest(path)
        return files.kit if files.kit is not None and files.kit.name == name else None

    def bundled(self) -> Iterator[tuple[Manifest, Path]]:
        """The kits that bring the checkpoint they were made for: their manifest, and that file beside it."""
        for manifest, path in self._manifests().values():
            base = path.parent / manifest.base.name if manifest.base is not None else None
            if base is not None and base.is_file():
                yield manifest, base

    def trained_on(self, checkpoint: Path) -> Manifest | None:
        """The manifest of a kit whose `base` is this very checkpoint, or None; one that tells sampler settings before
        others."""
        found = [
            manifest
            for manifest, _ in self._manifests().values()
            if manifest.base is not None and self.matches(checkpoint, manifest.base)
        ]
        return min(found, key=lambda manifest: manifest.sampling is None, default=None)

    def guidance(self, manifest: Manifest | None, checkpoint: Path | None) -> Mapping[str, Value]:
        """What of reference guidance was found to work: as an adapter's manifest says, else the one of the kit that was
        made on the checkpoint's file; nothing where neither does."""
        if manifest is None or not manifest.guidance:
            manifest = self.trained_on(checkpoint) if checkpoint is not None else None
        return manifest.guidance if manifest is not None else {}

    def automatic(
        self, base: Path | None = None, text_encoder: TextEncoder | None = None, method: str | None = None
    ) -> str:
        """The adapter of a method that "automatic" means for a checkpoint, whole or not.

        Of those that were made for such a text encoder: the one whose manifest names this very checkpoint, else the
        published one, else the first by name. Where there is none, one of which nobody knows what it was made for, else
        the published one.

        base: the checkpoint's file. text_encoder: its sizes. Where they are not known, Stable Diffusion 1 is meant.
        method: None for the first. Raises PortraitError (404) where there is none, and none is published.
        """
        files = self._files(method)
        wanted = text_encoder or CLIP_L
        fitting: dict[str, Manifest | None] = {}
        unsaid: dict[str, Manifest | None] = {}
        for name in self.names(files.method):
            try:
                manifest = self.manifest(name, files.method)
            except PortraitError:
                continue  # `kits` and `kit` say what is wrong with it.
            sizes = manifest.text_encoder if manifest is not None else None
            if (sizes or CLIP_L) == wanted:
                fitting[name] = manifest
            elif sizes is None:
                unsaid[name] = manifest
        fitting = fitting or unsaid
        if base is not None:
            for name, manifest in fitting.items():
                if manifest is not None and manifest.base is not None and self.matches(base, manifest.base):
                    return name
        if files.kit is not None and (files.kit.name in fitting or not fitting):
            return files.kit.name
        if not fitting:
            what = ", ".join(part.filenames("NAME")[0] for part in files.parts)
            raise PortraitError(
                "checkpoint",
                f"there is no adapter of {files.title} for this checkpoint; {self._searched(files.parts[0].role)}",
                f"Put one into {self.home}: {what}.",
                404,
            )
        return next(iter(fitting))

    def kit(self, name: str = AUTOMATIC, method: str | None = None, at: str = "checkpoint") -> Kit:
        """The files for adapter `name` of a method, or for the one that "automatic" means.

        method: None for whichever has an adapter of that name, and for the first. Raises PortraitError: 422 for a bad
        name, an adapter of another method, a manifest or weight file that cannot be read, and an encoder that is there
        under its name with another content than the adapter was trained with. Raises MissingWeights when a file is
        missing that one person needs, saying for each which it is, where it goes and how to get it.
        """
        if name == AUTOMATIC:
            name = self.automatic(method=method)
        bare_name(name, at)
        files = self._method_of(name, method)
        adapters = self._adapters()
        of_others = [of for of, other in adapters if other == name]
        if of_others and files.method not in of_others:
            raise PortraitError(at, f"{name!r} is a kit of {of_others[0]}", "Choose another checkpoint, or its method.")
        found, missing = self._collect(files, name, at)
        needed = [gap for gap in missing if not gap.optional]
        if needed:
            what = ", ".join(gap.filename for gap in needed)
            others = [other for other in self.names(files.method) if other != name]
            there = f" There: {', '.join(others)}." if others and files.parts[0].role not in found else ""
            problem = f"{name!r} is not complete, missing: {what}; {self._searched(*(gap.role for gap in needed))}"
            raise MissingWeights(at, name, needed, problem, there)
        path = adapters.get((files.method, name))
        manifest = self.manifest(name, files.method)
        return Kit(name, files.method, found, tuple(missing), manifest, path.parent if path is not None else None)

    def kits(self, method: str | None = None) -> Sequence[KitStatus]:
        """All adapters that are there, and the published ones in any case, with what each lacks; of one method or all.

        No file is read for its hash here, which of gigabytes takes long: a file of the right size counts.
        """
        wanted = [files for files in self.methods if method in (None, files.method)]
        published = [(files.method, files.kit.name) for files in wanted if files.kit is not None]
        methods = {files.method: files for files in wanted}
        status, damaged = [], set()
        adapters = self._adapters()
        for of, name in sorted(
            {*published, *(key for key in adapters if method in (None, key[0]))}, key=lambda one: (one[1], one[0])
        ):
            path = adapters.get((of, name))
            try:
                if of not in methods:
                    raise PortraitError(name, f"it is a kit of {of}, which is not known here", "Update this extension.")
                found, missing = self._collect(methods[of], name, "checkpoint", by_size=True)
                status.append(KitStatus(name, of, found, tuple(missing)))
            except PortraitError as error:
                # A manifest that cannot be read is of any method, and told once.
                if path is None or path not in damaged:
                    status.append(KitStatus(name, of, {}, (), error.detail))
                damaged.add(path)
        return status

    def read(self, path: Path, role: str) -> Checkpoint:
        """A weight file of a role. Raises PortraitError as `read_tensors` does, with the source of a published file."""
        try:
            return read_tensors(path, role)
        except PortraitError as error:
            known = self._published_as(role, path.name)
            if known is None:
                raise
            source = f"run: {known.command}, or take it from {known.url}"
            remedy = error.remedy.replace(SOURCE, source)
            raise PortraitError(error.field, error.problem, remedy, error.status_code) from error

    def sha256(self, path: Path) -> str:
        """The hash of a weight file, remembered in this store's cache."""
        return file_sha256(path, self.hash_cache)

    def matches(self, path: Path, file: StoredFile, by_size: bool = False) -> bool:
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

    def _files(self, method: str | None) -> AdapterFiles:
        """The weights of a method, None for the first. Raises PortraitError for one that is not known."""
        for files in self.methods:
            if method in (None, files.method):
                return files
        known = ", ".join(files.method for files in self.methods)
        raise PortraitError("method", f"{str(method)[:60]!r} is not known", f"Use one of: {known}.")

    def _method_of(self, name: str, method: str | None) -> AdapterFiles:
        """The method that is asked for; where none is, the one that has an adapter `name`, else the first."""
        if method is None:
            there = self._adapters()
            method = next((files.method for files in self.methods if (files.method, name) in there), None)
        return self._files(method)

    def _collect(
        self, method: AdapterFiles, name: str, at: str, by_size: bool = False
    ) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        """The files of an adapter by role, and what is missing. by_size: see `matches`."""
        home = self._adapters().get((method.method, name))
        if home is not None:
            return self._by_manifest(method, read_manifest(home), home.parent, at, by_size)
        files, missing = self._parts(method, name)
        first = files.get(method.parts[0].role)
        readable = first is not None and first.suffix == SAFETENSORS_SUFFIX and bool(method.encoders)
        named = read_header(first)[1] if first is not None and readable else {}
        for role in method.encoders:
            known = method.known(role)
            wanted = named.get(role)
            if first is not None and wanted is not None:
                bare_name(wanted, f"{first.name}: {role}")
                path = self._search(role, _spellings(role, wanted))
                known = self._published_as(role, wanted)
            elif known is not None:
                path = self.published(role, known)
            elif first is None:
                continue  # Nobody knows which it is of an adapter that is not there.
            else:
                raise PortraitError(
                    at, f"{name!r} does not tell its {role}", f"Put its manifest beside it, {name}.kit.json."
                )
            self._take(files, missing, Missing(role, known.filename if known else str(wanted), self.home, known), path)
        return files, missing

    def _by_manifest(
        self, method: AdapterFiles, manifest: Manifest, home: Path, at: str, by_size: bool
    ) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        first = method.parts[0].role
        if first not in manifest.adapter:
            raise PortraitError(at, f"the manifest of {manifest.name!r} names no {first}", "Get the kit anew.")
        files, missing = self._parts(method, manifest.name, manifest.adapter, home)
        for role in method.encoders:
            encoder, known = manifest.encoders.get(role), method.known(role)
            if encoder is not None:
                known = self._published_as(role, encoder.name)
                if encoder.sha256 is None:
                    path = self._search(role, _spellings(role, encoder.name))
                else:
                    path = self._with_content(role, encoder, manifest.name, at, by_size)
            elif known is not None:
                path = self.published(role, known)
            else:
                raise PortraitError(
                    at, f"the manifest of {manifest.name!r} names no {role}", "Get the kit's manifest anew."
                )
            filename = known.filename if known else str(encoder and encoder.name)
            self._take(files, missing, Missing(role, filename, self.home, known), path)
        return files, missing

    def _parts(
        self, method: AdapterFiles, name: str, named: Mapping[str, str] | None = None, home: Path | None = None
    ) -> tuple[dict[str, Path], MutableSequence[Missing]]:
        """The files of the adapter itself, and what is missing of them.

        named: what a manifest in the folder `home` calls them, by role.
        """
        files: dict[str, Path] = {}
        missing: list[Missing] = []
        first = method.parts[0].role
        for part in method.parts:
            names = part.filenames(name)
            if named and part.role in named:
                names = _spellings(part.role, named[part.role])
            path = _first([home] if home is not None else [], names) or self._search(part.role, names)
            known = method.known(part.role) if method.kit is not None and name == method.kit.name else None
            filename = names[0]
            if first in files:
                # As the file beside which it belongs.
                filename = next((one for one in names if Path(one).suffix == files[first].suffix), filename)
            gap = Missing(part.role, known.filename if known else filename, self.home, known, part.people)
            self._take(files, missing, gap, path)
        return files, missing

    @staticmethod
    def _take(files: dict[str, Path], missing: MutableSequence[Missing], gap: Missing, path: Path | None) -> None:
        if path is not None:
            files[gap.role] = path
        else:
            missing.append(gap)

    def _with_content(self, role: str, file: StoredFile, adapter: str, at: str, by_size: bool) -> Path | None:
        """The file of that content among the folders of a role, whatever its name, or None where none is near it.

        by_size: see `matches`. Raises PortraitError where there are files of its name, but none of its content.
        """
        names = set(_spellings(role, file.name))
        there = [path for folder in self.folders(role) for path in _files(folder) if path.suffix in TENSOR_SUFFIXES]
        named = [path for path in there if path.name in names]
        # Without a size to go by every file would be read whole: then only those that by name are for this role.
        others = there if file.size is not None else [entry.path for entry in self.list(role)]
        for path in dict.fromkeys([*named, *others]):
            if self.matches(path, file, by_size):
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

    def _adapters(self) -> dict[tuple[str, str], Path | None]:
        """The adapters there are by method and name: the file of the manifest, None for one without.

        What lies in an earlier folder counts, also an adapter there that has no manifest. A manifest that cannot be
        read hides the adapters of every method that its place names.
        """
        found: dict[tuple[str, str], Path | None] = {}
        for folder in self._own():
            files = _files(folder)
            for path in filter(is_manifest, files):
                try:
                    manifest = read_manifest(path)
                    keys = [(manifest.method, manifest.name)]
                except PortraitError:
                    keys = [(method.method, label(path)) for method in self.methods]
                for key in keys:
                    found.setdefault(key, path)
            for path in files:
                for method in self.methods:
                    name = method.name_of(path.name)
                    if name is not None:
                        found.setdefault((method.method, name), None)
        return found

    def _manifests(self) -> dict[tuple[str, str], tuple[Manifest, Path]]:
        """The manifests that can be read and count, with their files, by method and name."""
        found = {}
        for key, path in self._adapters().items():
            try:
                if path is not None:
                    found[key] = read_manifest(path), path
            except PortraitError:
                continue  # `kits` says what is wrong with it.
        return found

    def _own(self, role: str = "") -> Sequence[Path]:
        """Our own folders, behind each those in it that hold a kit; for "vision" also their ``image_encoder``."""
        own: dict[Path, None] = {}
        for folder in map(Path, self._folders.own):
            own |= dict.fromkeys([folder, *sorted(path.parent for path in folder.glob(f"*/{ALONE}"))])
        return [*own, *(folder / IMAGE_ENCODER for folder in own)] if role == "vision" else [*own]

    def _shared(self, role: str) -> Sequence[Path]:
        return [Path(folder) for folder in self._folders.shared.get(role, ())]

    def _published_as(self, role: str, name: str) -> KnownWeight | None:
        """The published file of a role that is called `name`, or None."""
        return next((weight for weight in self.registry.select(name) if weight.role == role), None)

    def _is_for(self, role: str, path: Path, dedicated: bool) -> bool:
        if role == "detector":
            return path.suffix == ".onnx" and path.name.startswith("det_")
        if path.suffix.lower() not in TENSOR_SUFFIXES:
            return False
        part = part_of(self.methods, role)
        if part is not None:
            return part.name_of(path.name) is not None
        if role == "backbone":
            return "backbone" in path.name.lower()
        known = [weight for weight in self.registry.known if weight.role == role]
        aliases = [alias for weight in known for alias in (weight.filename, *weight.aliases)]
        spellings = {name for alias in aliases for name in _spellings(role, alias)}
        # Where the host keeps its face parser lie its restoration networks too.
        return (dedicated and role != PARSER.role) or path.name in spellings.union(
            *(weight.generic for weight in known)
        )

    def _search(self, role: str, names: Iterable[str]) -> Path | None:
        return _first(self.folders(role), names)

    def _searched(self, *roles: str) -> str:
        searched = dict.fromkeys(str(folder) for role in roles for folder in self.folders(role))
        return "looked in " + ", ".join(searched)


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
