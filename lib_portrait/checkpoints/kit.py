"""The manifest of a kit: which files belong together, and what they were made with and for.

It lies beside the weights as ``NAME.kit.json``, or as ``kit.json`` in a folder that holds one kit only. It names the
adapter's files, and by content hash the encoders that it was trained with, so that these are found under any name.
Manifests are hostile until checked: `parse` accepts nothing that it does not know.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.options import Value, by_name

FORMAT = 1
ALONE = "kit.json"
SUFFIX = ".kit.json"
BYTES = 64 * 2**10
NAME_LENGTH = 200
TEXT_LENGTH = 1000
FACTS = 64
ROLES = 16
FILE_BYTES = 2**40
HIGHEST = 2**16

T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """A weight file that a kit needs. name: bare. sha256 of its bytes, and size in bytes; None where nobody knows."""

    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class TextEncoder:
    """The sizes of a CLIP text encoder, under the names of its configuration file."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int


CLIP_L = TextEncoder(768, 12, 12, 77)
"""CLIP ViT-L/14's, the text encoder of Stable Diffusion 1."""


@dataclass(frozen=True)
class Sampling:
    """How a kit's pictures are made when nothing else is said. sampler: the WebUI's name. cfg: classifier-free guidance
    scale."""

    sampler: str
    steps: int
    cfg: float


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    adapter: bare file names by role. encoders: by role, those that the adapter was trained with. detector: finds faces
    in pictures of this kind. measuring: a recognition network that took no part in the training. attributes: a network
    that tells what such pictures show. control: the ControlNet that was trained with the adapter. base: the checkpoint
    that was trained on. picture: width and height in pixels. guidance: options of reference guidance by name, as they
    were found to work on the base. training: facts of the training, for people.
    """

    name: str
    method: str
    adapter: Mapping[str, str]
    encoders: Mapping[str, StoredFile] = field(default_factory=dict)
    detector: StoredFile | None = None
    measuring: StoredFile | None = None
    attributes: StoredFile | None = None
    control: StoredFile | None = None
    base: StoredFile | None = None
    text_encoder: TextEncoder | None = None
    picture: tuple[int, int] | None = None
    sampling: Sampling | None = None
    guidance: Mapping[str, Value] = field(default_factory=dict)
    licence: str | None = None
    training: Mapping[str, str] = field(default_factory=dict)


def bare_name(name: str, at: str) -> str:
    """`name`, if it is a plain file name. Raises PortraitError (422) for anything that could lead out of a folder."""
    if not name or len(name) > NAME_LENGTH or name.startswith(".") or re.search(r"[/\\:\x00-\x1f]", name):
        shown = repr(name[:60])
        raise PortraitError(at, f"{shown} is not a bare file name", "Give the name of a file in the model folders.")
    return name


def is_manifest(path: Path) -> bool:
    """Whether a file is a manifest by its name."""
    return path.name == ALONE or (path.name.endswith(SUFFIX) and path.name != SUFFIX)


def label(path: Path) -> str:
    """The kit's name as the place of its manifest tells it: NAME of ``NAME.kit.json``, else the folder's."""
    return path.parent.name if path.name == ALONE else path.name.removesuffix(SUFFIX)


# ----------------------------------------------------------------------------------------------------- reading, writing


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises PortraitError naming the file: it cannot be read (404 where it is not there), is too large, no manifest, or
    lies there under another kit's name.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(BYTES + 1)
    except OSError as error:
        status = 404 if isinstance(error, FileNotFoundError) else 422
        reason = error.strerror or type(error).__name__
        raise PortraitError(path.name, f"it cannot be read ({reason})", f"Check {path}.", status) from None
    manifest = parse(data, path.name)
    if path.name != ALONE and manifest.name != label(path):
        raise PortraitError(
            path.name, f"it is the manifest of {manifest.name!r}", f"Name the file {manifest.name}{SUFFIX}."
        )
    return manifest


def parse(data: bytes, at: str = ALONE) -> Manifest:
    """The manifest in the bytes of a JSON text.

    at: the file's name, for errors. Raises PortraitError for a text longer than BYTES, which is not JSON, has keys that
    are not known or stand there twice, or values that are not of the right kind and size.
    """
    if len(data) > BYTES:
        raise _bad(at, f"it is longer than {BYTES} bytes")
    try:
        stored = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:80] if isinstance(error, _Refused) else "it is not JSON"
        raise _bad(at, reason) from None
    entries = _Entries(stored, at, "")
    version = entries.take("format", _whole)
    if version != FORMAT:
        raise PortraitError(
            f"{at}: format", f"{version} is not known here, only {FORMAT}", "Update this extension, or use another kit."
        )
    manifest = Manifest(
        name=entries.take("name", _bare),
        method=entries.take("method", _role),
        adapter=entries.take("adapter", _by_role(_bare)),
        encoders=entries.take("encoders", _by_role(_file), {}),
        detector=entries.take("detector", _file, None),
        measuring=entries.take("measuring", _file, None),
        attributes=entries.take("attributes", _file, None),
        control=entries.take("control", _file, None),
        base=entries.take("base", _file, None),
        text_encoder=entries.take("text_encoder", _text_encoder, None),
        picture=entries.take("picture", _picture, None),
        sampling=entries.take("sampling", _sampling, None),
        guidance=entries.take("guidance", _guidance, {}),
        licence=entries.take("licence", _text, None),
        training=entries.take("training", _facts, {}),
    )
    entries.end()
    if not manifest.adapter:
        raise _bad(f"{at}: adapter", "it names no file")
    return manifest


def dump(manifest: Manifest) -> bytes:
    """The JSON text of a manifest: the same bytes for the same manifest, and what is not known left out.

    Raises PortraitError for values that `parse` would refuse.
    """
    stored: dict[str, Any] = {"format": FORMAT, "name": manifest.name, "method": manifest.method}
    stored["adapter"] = dict(sorted(manifest.adapter.items()))
    stored["encoders"] = {role: _known(vars(file)) for role, file in sorted(manifest.encoders.items())}
    for name in ("detector", "measuring", "attributes", "control", "base", "text_encoder", "sampling"):
        part = getattr(manifest, name)
        stored[name] = _known(vars(part)) if part is not None else None
    if manifest.picture is not None:
        stored["picture"] = dict(zip(("width", "height"), manifest.picture))
    stored["guidance"] = dict(sorted(manifest.guidance.items()))
    stored["licence"] = manifest.licence
    stored["training"] = dict(sorted(manifest.training.items()))
    # Whoever reads it should be able to: text that has no UTF-8 is refused by what follows.
    text = json.dumps(_known(stored), indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    parse(text, f"{manifest.name}{SUFFIX}")
    return text


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest; a file there is replaced whole.

    Raises PortraitError for values that `parse` would refuse, and where it cannot be written (507).
    """
    text = dump(manifest)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(text)
        part.replace(path)
    except OSError as error:
        raise PortraitError(
            path.name, f"it cannot be written ({error.strerror})", f"Check space and rights in {path.parent}.", 507
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


# ------------------------------------------------------------------------------------------------------------- checking

_REQUIRED: Any = object()


class _Refused(ValueError):
    """What a JSON text must not hold."""


class _Entries:
    """The entries of one JSON object, taken out one after the other; what is left at the end is not known."""

    def __init__(self, stored: object, file: str, place: str):
        if not isinstance(stored, dict):
            raise _bad(f"{file}: {place}" if place else file, f"{_shown(stored)} is no JSON object")
        self._stored, self._start = dict(stored), f"{file}: {place}." if place else f"{file}: "

    def take(self, name: str, read: Callable[[Any, str], T], default: Any = _REQUIRED) -> T:
        at = f"{self._start}{name}"
        if name not in self._stored:
            if default is _REQUIRED:
                raise _bad(at, "it is missing")
            return default
        return read(self._stored.pop(name), at)

    def end(self) -> None:
        if self._stored:
            raise PortraitError(
                f"{self._start}{_shown(next(iter(self._stored)))}",
                "no manifest has an entry of this name",
                "Take the entry out, or update this extension.",
            )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _Refused("an entry stands there twice")
    return entries


def _not_a_number(text: str) -> Any:
    raise _Refused(f"{text} is no number")


def _nested(value: Any, at: str) -> _Entries:
    file, _, place = at.partition(": ")
    return _Entries(value, file, place)


def _by_role(read: Callable[[Any, str], T]) -> Callable[[Any, str], dict[str, T]]:
    def roles(value: Any, at: str) -> dict[str, T]:
        entries = _nested(value, at)
        if len(value) > ROLES:
            raise _bad(at, f"it has more than {ROLES} entries")
        return {_role(role, at): entries.take(role, read) for role in value}

    return roles


def _bare(value: Any, at: str) -> str:
    return bare_name(_text(value, at), at)


def _role(value: Any, at: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", value):
        raise _bad(at, f"{_shown(value)} is no name of small letters")
    return value


def _file(value: Any, at: str) -> StoredFile:
    entries = _nested(value, at)
    name, sha256 = entries.take("name", _bare), entries.take("sha256", _sha256, None)
    file = StoredFile(name, sha256, entries.take("size", _size, None))
    entries.end()
    return file


def _text_encoder(value: Any, at: str) -> TextEncoder:
    entries = _nested(value, at)
    sizes = TextEncoder(
        entries.take("hidden_size", _whole),
        entries.take("num_hidden_layers", _whole),
        entries.take("num_attention_heads", _whole),
        entries.take("max_position_embeddings", _whole),
    )
    entries.end()
    return sizes


def _picture(value: Any, at: str) -> tuple[int, int]:
    entries = _nested(value, at)
    size = entries.take("width", _whole), entries.take("height", _whole)
    entries.end()
    return size


def _sampling(value: Any, at: str) -> Sampling:
    entries = _nested(value, at)
    sampling = Sampling(entries.take("sampler", _text), entries.take("steps", _whole), entries.take("cfg", _scale))
    entries.end()
    return sampling


def _guidance(value: Any, at: str) -> dict[str, Value]:
    _nested(value, at)
    found: dict[str, Value] = {}
    for name, given in value.items():
        option = by_name(OPTIONS, name)
        if option is None:
            raise _bad(at, f"{_shown(name)} is no option of reference guidance")
        try:
            found[name] = option.check(given, f"{at}.{name}")
        except PortraitError as error:
            raise _bad(error.field, error.problem) from None
    return found


def _facts(value: Any, at: str) -> dict[str, str]:
    entries = _nested(value, at)
    if len(value) > FACTS:
        raise _bad(at, f"it has more than {FACTS} entries")
    return {_text(name, at): entries.take(name, _text) for name in value}


def _text(value: Any, at: str) -> str:
    # Not printable are also halves of UTF-16 pairs, which have no UTF-8.
    if not isinstance(value, str) or not 0 < len(value) <= TEXT_LENGTH or not value.isprintable():
        raise _bad(at, f"{_shown(value)} is no text of one line, of 1 to {TEXT_LENGTH} characters")
    return value


def _sha256(value: Any, at: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise _bad(at, f"{_shown(value)} is no SHA-256 of 64 small hexadecimal digits")
    return value


def _size(value: Any, at: str) -> int:
    return _whole(value, at, FILE_BYTES)


def _whole(value: Any, at: str, highest: int = HIGHEST) -> int:
    if type(value) is not int or not 1 <= value <= highest:
        raise _bad(at, f"{_shown(value)} is no whole number of 1 to {highest}")
    return value


def _scale(value: Any, at: str) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise _bad(at, f"{_shown(value)} is no number of 0 to 100")
    return value


def _known(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None and value != {}}


def _bad(at: str, problem: str) -> PortraitError:
    return PortraitError(at, problem, "Get the kit's manifest anew from where the kit came from.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
