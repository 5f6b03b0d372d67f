"""What an adapter needs beside its own file: named in its kit's manifest, and brought along where no folder has it.

The manifest names the networks by their content, which is looked for in the folder of the adapter and in the model
folders; for readers of the weight file alone their bare names stand in its metadata. So an export holds what those
folders would not give: the adapter works where it was exported.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_portrait.checkpoints.files import AdapterFiles
from lib_portrait.checkpoints.formats import SAFETENSORS_SUFFIX, read_header
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import StoredFile, bare_name
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.standalone.model import Model, text_encoder_of

MODELS = Path(__file__).resolve().parents[1] / "models"
# Where the commands look without being told; kits in folders of their own are found in it.
FOLDERS = (MODELS,)


@dataclass(frozen=True)
class Companion:
    """A file that an adapter goes with. name: as it is looked for. path: where it lies, None where that is unknown."""

    role: str
    name: str
    path: Path | None

    def export_to(self, folder: Path, folders: Sequence[Path] = FOLDERS) -> None:
        """Puts the file into the folder of an export under its name, unless the model folders have the same one."""
        if self.path is None:
            return
        there = _found(self.role, self.name, folders)
        if there is None or _content(there) != _content(self.path):
            _put(self.path.resolve(), folder / (Path(self.name).stem + self.path.suffix))


def resolve(role: str, text: str, hashes: Mapping[str, str], folders: Sequence[Path] = FOLDERS) -> Companion:
    """What `--backbone` or `--vision` names: the path of a file, or the bare name of one in the model folders.

    hashes: SHA-256 by role of the networks that the features were made with. Raises PortraitError for a path that leads
    nowhere, or to another network than theirs. Of a bare name there is only a warning: the file may lie elsewhere.
    """
    given = Path(text)
    name = bare_name(given.name, role)
    if given.is_file():
        if hashes.get(role, "") not in ("", file_sha256(given)):
            raise PortraitError(
                role,
                f"the features of faces come from another network than {given.name}",
                f"Give the file that was dataset features' --{role}.",
            )
        return Companion(role, name, given)
    if text != name:
        raise PortraitError(role, f"there is no file {text}", f"Give the file that was dataset features' --{role}.")
    there = _found(role, name, folders)
    if there is None or hashes.get(role, "") not in ("", file_sha256(there)):
        problem = "is in none of the model folders" if there is None else "there is another file than the features'"
        _warn(f"{role}: {name} {problem}; --{role} PATH puts the right one into the export, else put it into {MODELS}")
        return Companion(role, name, None)
    return Companion(role, name, there)


def warn_of_unnamed(role: str, hashes: Mapping[str, str], folders: Sequence[Path] = FOLDERS) -> None:
    """Warns when an adapter that names no network, and so gets the published one, is trained on features of another."""
    wanted, store = hashes.get(role), _store(folders)
    known = store.registry.by_role(role)
    if not wanted or (known is not None and wanted == known.sha256):
        return
    published = store.published(role)
    if published is None or file_sha256(published) != wanted:
        _warn(
            f"{role}: the features come from another file than the published network, which an adapter gets that names "
            f"none; --{role} FILE names theirs"
        )


def of_further_file(first: Path, files: AdapterFiles, adapter: str) -> list[Companion]:
    """What a further file of an adapter goes with: the first one, under the adapter's name, and what that one names."""
    metadata = read_header(first)[1] if first.suffix == SAFETENSORS_SUFFIX else {}
    part = files.parts[0]
    name = next(name for name in part.filenames(adapter) if Path(name).suffix == first.suffix)
    names = {role: metadata[role] for role in files.encoders if role in metadata}
    named = [Companion(role, name, _found(role, name, [first.parent])) for role, name in names.items()]
    return [Companion(part.role, name, first), *named]


def stored_file(path: Path) -> StoredFile:
    """What a manifest says of a file."""
    return StoredFile(path.name, file_sha256(path), path.stat().st_size)


def of_base(checkpoint: Path, model: Model, licence: str | None, folders: Sequence[Path] = FOLDERS) -> dict[str, Any]:
    """Entries of a manifest that the checkpoint decides which is trained on: what it is, and of a kit that was made on
    it what goes with its pictures whatever the adapter, the networks that look at them and the sampler settings.

    licence: of the adapter, None for that kit's.
    """
    entries: dict[str, Any] = {
        "base": stored_file(checkpoint),
        "text_encoder": text_encoder_of(model.text_encoder),
        "picture": (model.size, model.size),
        "licence": licence,
    }
    kit = _store([checkpoint.parent, *folders]).trained_on(checkpoint)
    if kit is not None:
        entries |= {
            name: getattr(kit, name) for name in ("detector", "measuring", "attributes", "sampling", "guidance")
        }
        entries["licence"] = licence or kit.licence
    return entries


def encoder_files(
    files: AdapterFiles,
    companions: Sequence[Companion],
    hashes: Mapping[str, str],
    folders: Sequence[Path] = FOLDERS,
) -> dict[str, StoredFile]:
    """What a manifest says of the networks that the features were made with, by role.

    companions: those of them that have been named. hashes: their SHA-256 by role. A network that has not been named
    has the published one's name; of a file that is not there, only its content's hash is known.
    """
    given = {one.role: one for one in companions}
    found = {}
    store = _store(folders)
    for role in files.encoders:
        sha256 = hashes.get(role)
        if sha256 is None:
            continue
        one = given.get(role)
        path = one.path if one is not None else store.published(role)
        if path is not None and file_sha256(path) == sha256:
            # As it is called where `Companion.export_to` puts it.
            name = Path(one.name).stem + path.suffix if one is not None else path.name
            found[role] = StoredFile(name, sha256, path.stat().st_size)
        else:
            known = files.known(role)
            # Where nothing is published, nobody knows what the network is called: its content is found.
            published = known.filename if known is not None else f"{role}{SAFETENSORS_SUFFIX}"
            found[role] = StoredFile(one.name if one is not None else published, sha256)
    return found


def _store(folders: Sequence[Path]) -> Store:
    return Store(Folders(folders), adapter_files())


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _found(role: str, name: str, folders: Sequence[Path]) -> Path | None:
    try:
        return _store(folders).find(role, name)
    except PortraitError:
        return None


def _put(source: Path, target: Path) -> None:
    """A second name of the same file where that is possible, for image encoders have gigabytes; otherwise a copy.

    Not of a file that fewer people may read than a new one: exports are for others, too.
    """
    if target.exists() and source.samefile(target):
        # An export into the folder where it lies, under its own name: it is there already.
        return
    target.touch()
    rights = target.stat().st_mode
    if source.stat().st_mode & rights == rights:
        target.unlink()
        try:
            os.link(source, target)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def _content(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_sha256(path)
