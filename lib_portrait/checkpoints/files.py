"""What the weights of a method are called, what they consist of and where they are published: declared by it, once.

The rest of this package is told of methods by these declarations alone. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lib_portrait.checkpoints.formats import SAFETENSORS_SUFFIX
from lib_portrait.checkpoints.kit import Manifest

ADAPTER_SUFFIXES = (SAFETENSORS_SUFFIX, ".bin")


@dataclass(frozen=True)
class Member:
    """The one file wanted out of a downloaded zip archive."""

    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KnownWeight:
    """One published file.

    role: what it is for: a part of an adapter, an encoder, or "detector".
    filename: the name it gets here.
    url: where it is downloaded; size (bytes) and sha256 are those of the file at that address.
    licence, what: for people.
    group: the word that `portrait.py download` fetches it by, with those it is useless without.
    aliases: other names under which people already have the same content; a name stands here only if it belongs to
        no other model.
    generic: names that several models share (``model.safetensors``), trusted only in folders that hold nothing else.
    member: where `url` is a zip archive, the file to take out of it.

    Sizes and hashes stand in one only where several independent sources agree on them. A weight without a hash is
    checked against the one its publisher announces for that very file (see `download`).
    """

    role: str
    filename: str
    url: str
    size: int | None
    sha256: str | None
    licence: str
    what: str
    group: str
    aliases: tuple[str, ...] = ()
    generic: tuple[str, ...] = ()
    member: Member | None = None

    @property
    def command(self) -> str:
        """The command that fetches this file, with those it is useless without."""
        return f"portrait.py download {self.group}"


@dataclass(frozen=True)
class AdapterFile:
    """One of the files that an adapter of a method consists of.

    role: its key in manifests, which no other method uses. stem: the file's name without suffix, with ``{name}`` in
    the place of the adapter's. use: for people. people: from how many people in one picture on it is needed.
    """

    role: str
    stem: str
    use: str
    people: int = 1

    def filenames(self, name: str) -> list[str]:
        """The names that this file of adapter `name` may have."""
        return [self.stem.format(name=name) + suffix for suffix in ADAPTER_SUFFIXES]

    def name_of(self, filename: str) -> str | None:
        """The adapter that a file belongs to by its name, or None."""
        before, after = map(re.escape, self.stem.split("{name}"))
        suffixes = "|".join(map(re.escape, ADAPTER_SUFFIXES))
        match = re.fullmatch(rf"{before}(.+){after}(?:{suffixes})", filename, re.DOTALL)
        return match.group(1) if match else None


@dataclass(frozen=True)
class AdapterFiles:
    """The weights of a method.

    method, title: its name in manifests and requests, and for people. parts: the files of an adapter; where the first
    is, an adapter is; none for a method without weights, which is no matter of a store. encoders: roles of the networks
    of faces that it reads. published: files to be downloaded, parts and encoders. kit: the manifest of the published
    adapter, None where none is published.
    """

    method: str
    title: str
    parts: tuple[AdapterFile, ...] = ()
    encoders: tuple[str, ...] = ()
    published: tuple[KnownWeight, ...] = ()
    kit: Manifest | None = None

    def known(self, role: str) -> KnownWeight | None:
        """The published file of a role, or None."""
        return next((weight for weight in self.published if weight.role == role), None)

    def name_of(self, filename: str) -> str | None:
        """The adapter of which a file is the first part by its name, or None."""
        return self.parts[0].name_of(filename)


def part_of(methods: Sequence[AdapterFiles], role: str) -> AdapterFile | None:
    """The part of some method's adapters that has this role, or None."""
    return next((part for files in methods for part in files.parts if part.role == role), None)
