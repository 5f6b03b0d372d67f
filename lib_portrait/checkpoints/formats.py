"""Weight files: the official pickles (``.bin .pt .pth .ckpt``) and ``.safetensors``, read, written, converted.

In memory a checkpoint is flat: the official ``{"faceid_proj": {...}, "faceid_adapter": {...}}`` becomes keys such as
``faceid_proj.latents`` and ``faceid_adapter.1.to_k_faceid.weight``. Which dots were dictionaries is kept in the
metadata entry `LAYOUT`, so that a pickle can be rebuilt as it was.

Files are hostile until checked. Pickles go through torch's weights-only unpickler, or for models, which carry more than
tensors, through `placeholders`; torch is kept from the two file kinds for which old releases leave the former
(TorchScript archives, legacy tar files).
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SAFETENSORS_SUFFIX = ".safetensors"
TENSOR_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)

SAFETENSORS = "safetensors"
TORCH_ZIP = "torch zip"
TORCH_LEGACY = "torch legacy pickle"
ONNX = "onnx"

# Whose layout `role_of` knows.
ROLES = ("faceid", "router", "backbone", "vision")

LAYOUT = "portrait.layout"
OFFICIAL_GROUPS = (("faceid_proj",), ("faceid_adapter",))

HEADER_BYTES = 32 * 2**20
TENSORS = 100_000
NESTING = 8
KEY_LENGTH = 1000
# Tied weights make the tensors add up to more than the file; anything past this is a file made to fill the memory.
INFLATION = 4

# Where a damaged or missing file is to come from; who knows where it is published says so in its place (`Store.read`).
SOURCE = "get it anew from where it came from"
MORE_THAN_TENSORS = "Use a .safetensors file of it: of a model, the WebUI's Checkpoint Merger makes one."

# torch/serialization.py: MAGIC_NUMBER 0x1950a86a20f9469cfc6c, pickled as a LONG1 of ten bytes, little-endian.
LEGACY_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")

SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

Layout = list[tuple[str, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """A weight file that was read.

    tensors: flat, dotted keys, on the CPU; where the format allows, the bytes stay in the file until used (mmap).
    metadata: the file's text entries; for a pickle only `LAYOUT`.
    hash_cache: folder in which the file's hash is remembered, or None.
    """

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    hash_cache: Path | None = None

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, computed when first asked for."""
        return file_sha256(self.path, self.hash_cache)

    @property
    def role(self) -> str | None:
        return role_of(self.tensors)

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name.``, their keys without it: what the official file holds in that dictionary."""
        prefix = name + "."
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Description:
    """What a weight file is, for lists. role is None when the tensors are of no kind known here."""

    path: Path
    role: str | None
    format: str
    tensors: int
    dtypes: tuple[str, ...]
    size: int
    metadata: dict[str, str]


# ---------------------------------------------------------------------------------------------------------- reading


def read_tensors(
    path: Path, role: str | None = None, hash_cache: Path | None = None, inside: str | None = None
) -> Checkpoint:
    """The checkpoint in `path`, whose content must be what the file's suffix says.

    role: when given, tensors of another role are refused. hash_cache: see `Checkpoint`. inside: for the checkpoint of a
    model, the dictionary of a pickle that is read, where it has one of that name; then whatever is no tensor is left
    out, be it numbers, objects of Lightning or of NumPy (in torch's older format, only what stands beside it).
    Raises PortraitError naming the file: missing (404), empty, truncated, foreign, not only tensors, of another role.
    """
    path = Path(path)
    kind = sniff(path)
    _check_suffix(path, kind)
    if kind == SAFETENSORS:
        tensors, metadata = _read_safetensors(path)
    else:
        tensors, metadata = _read_pickle(path, kind, inside)
    checkpoint = Checkpoint(path, tensors, metadata, hash_cache)
    # Of a role without a layout known here, only files of another's are refused.
    if role is not None and checkpoint.role != role and (checkpoint.role or role in ROLES):
        what = f"the tensors of a {checkpoint.role} file" if checkpoint.role else "tensors of no known kind"
        raise _bad(path, f"it holds {what}, not those of a {role} file", f"Put a {role} file at {path}.")
    return checkpoint


def describe(path: Path) -> Description:
    """Role, format, number and types of tensors, metadata. A .safetensors file is not read beyond its header.

    Raises PortraitError as `read_tensors` does.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        with _reading(path):
            size = path.stat().st_size
        return Description(path, "detector" if path.name.startswith("det_") else None, ONNX, 0, (), size, {})
    kind = sniff(path)
    _check_suffix(path, kind)
    if kind == SAFETENSORS:
        entries, metadata = read_header(path)
        keys: Collection[str] = entries
        dtypes = {dtype for dtype, _ in entries.values()}
    else:
        tensors, metadata = _read_pickle(path, kind)
        keys = tensors
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return Description(path, role_of(keys), kind, len(keys), tuple(sorted(dtypes)), path.stat().st_size, metadata)


def role_of(keys: Collection[str]) -> str | None:
    """The role of a checkpoint with these flat keys, or None where they are of no kind known here."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in keys)

    if has(r"faceid_proj\.") and has(r"faceid_adapter\.\d+\.to_k_faceid\.weight$"):
        return "faceid"
    if has(r"faceid_adapter\.\d+\.to_[qk]_router\."):
        return "router"
    if "input_layer.0.weight" in keys and has(r"body\.0\.") and has(r"output_layer\."):
        return "backbone"
    if has(r"(vision_model\.)?embeddings\.patch_embedding\.weight$|visual\.conv1\.weight$"):
        return "vision"
    return None


def sniff(path: Path) -> str:
    """SAFETENSORS, TORCH_ZIP or TORCH_LEGACY, by the file's first bytes and not by its name.

    Raises PortraitError for anything else: missing, a folder, empty, HTML, a Git LFS pointer, plain pickle, tar, ...
    """
    with _reading(path), path.open("rb") as stream:
        start = stream.read(64)
        size = os.fstat(stream.fileno()).st_size
    if not start:
        raise _bad(path, "the file is empty (0 bytes)")
    # First of all: the length that safetensors begin with can look like the beginning of anything else.
    if len(start) > 8 and start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if header > HEADER_BYTES:
            raise _bad(path, f"its safetensors header claims {header} bytes")
        if 8 + header > size:
            raise _bad(path, f"it is cut off: {size} bytes, and its header alone needs {8 + header}")
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return TORCH_ZIP
    if start[:1] == b"\x80" and LEGACY_MAGIC in start[:32]:
        # A tar archive may begin with any bytes at all, and torch looks for one before it looks for its magic number.
        if tarfile.is_tarfile(path):
            raise _bad(path, "it is a tar archive")
        return TORCH_LEGACY
    if start.startswith(b"version https://git-lfs"):
        raise _bad(path, "it is a Git LFS pointer, not the file it stands for")
    if start.lstrip()[:1] == b"<":
        raise _bad(path, "it is a web page, not a weight file")
    if start[:1] == b"\x80":
        raise _bad(path, "it is a plain Python pickle, which may run code when opened")
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        raise _bad(path, "it does not begin with a safetensors header")
    raise _bad(path, "it is neither a torch file nor safetensors")


def read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Of a .safetensors file: {key: (dtype name, shape)} and the metadata, read without torch.

    The layout is the format's own: 8 bytes little-endian header length, JSON header, data; offsets count from its end.
    Raises PortraitError unless every tensor lies inside the file and has as many bytes as its shape and type need.
    """
    if sniff(path) != SAFETENSORS:
        raise _bad(path, "it is no safetensors file")
    with _reading(path), path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
        room = os.fstat(stream.fileno()).st_size - 8 - length
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its header is malformed")
    entries = {}
    for key, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = SAFETENSORS_BITS[dtype]
            sizes = [begin, end, *shape]
            plain = all(type(number) is int and 0 <= number < 2**62 for number in sizes) and len(shape) <= 64
        except (KeyError, TypeError, ValueError):
            raise _bad(path, f"its header is malformed at {_shown(key)}") from None
        if not plain or begin > end:
            raise _bad(path, f"its header is malformed at {_shown(key)}")
        if end > room:
            raise _bad(path, f"it is cut off: {_shown(key)} ends at byte {end} of {room}")
        count = 1
        for dimension in shape:
            count *= dimension
        if count * bits != (end - begin) * 8:
            raise _bad(path, f"the size of {_shown(key)} does not fit its shape")
        entries[key] = (str(dtype), tuple(shape))
    if not entries:
        raise _bad(path, "it holds no tensors")
    return entries, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    _, metadata = read_header(path)
    with _parsing(path), safe_open(str(path), framework="pt", device="cpu") as stream:
        return {key: stream.get_tensor(key) for key in stream.keys()}, metadata  # noqa: SIM118


def _read_pickle(path: Path, kind: str, inside: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    # Not `torch.load`: the WebUI puts its own function there, which refuses files that newer torch releases wrote,
    # and answers None instead of raising.
    from torch.serialization import load

    if kind == TORCH_ZIP:
        _check_zip(path)
    with _parsing(path):
        if inside is not None and kind == TORCH_ZIP:
            from lib_portrait.checkpoints import placeholders

            nested = load(str(path), map_location="cpu", pickle_module=placeholders, weights_only=False, mmap=True)
        else:
            nested = load(str(path), map_location="cpu", weights_only=True, mmap=kind == TORCH_ZIP)
    if inside is not None and isinstance(nested, dict) and isinstance(nested.get(inside), dict):
        nested = nested[inside]
    tensors, layout = _flatten(path, nested, tensors_only=inside is not None)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > INFLATION * path.stat().st_size:
        raise _bad(path, f"its tensors claim {total} bytes, far more than the file has")
    return tensors, {LAYOUT: json.dumps(layout)}


def _check_zip(path: Path) -> None:
    """Refuse archives that torch would not treat as plain weights, or that unpack to more than the file.

    torch up to 2.5 hands an archive with ``constants.pkl`` to `torch.jit.load` even with weights_only=True, and that
    runs what is in it (CVE-2025-32434). The record names are asked of torch's own reader as well, since two zip
    readers can be made to disagree.
    """
    import torch

    with _parsing(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        names = [member.filename for member in members] + torch._C.PyTorchFileReader(str(path)).get_all_records()
    bases = {name.replace("\\", "/").rpartition("/")[2].lower() for name in names}
    if "constants.pkl" in bases:
        raise _bad(path, "it is a TorchScript program, which may run code when opened")
    if "data.pkl" not in bases:
        raise _bad(path, "it is a zip archive without tensors")
    unpacked = sum(member.file_size for member in members)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or unpacked > path.stat().st_size:
        raise _bad(path, f"it is a packed archive of {unpacked} bytes; torch never packs its files")


def _flatten(path: Path, nested: Any, tensors_only: bool = False) -> tuple[dict[str, Tensor], Layout]:
    """Flat tensors and the paths of the dictionaries they stood in.

    Anything but tensors in dictionaries is refused, or with `tensors_only` left out.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    layout: Layout = []

    def walk(node: Any, names: tuple[str, ...]) -> None:
        where = ".".join(names)
        if isinstance(node, dict):
            if names:
                layout.append(names)
            if len(names) > NESTING or len(layout) > TENSORS:
                raise _bad(path, "its dictionaries are nested without end")
            for name, value in node.items():
                if tensors_only and not (isinstance(name, str) and isinstance(value, (dict, torch.Tensor))):
                    continue
                if not isinstance(name, str) or not name or len(where) + len(name) >= KEY_LENGTH:
                    raise _bad(path, f"the key {_shown(name)} is no tensor name")
                if any(isinstance(node.get(outer), dict) for outer in _outer(name)):
                    # Flat, this could not be told from an entry of the other dictionary.
                    raise _bad(path, f"the key {_shown(name)} stands beside a dictionary of the same name")
                walk(value, (*names, name))
        elif isinstance(node, torch.Tensor):
            if where in tensors or len(tensors) >= TENSORS:
                raise _bad(path, f"the name {_shown(where)} stands there twice, or there are too many tensors")
            if node.layout != torch.strided or node.is_quantized or node.device.type != "cpu":
                raise _bad(path, f"{_shown(where)} is no plain tensor")
            tensors[where] = node.detach()
        else:
            raise _bad(path, f"{_shown(where)} is of type {type(node).__name__}; only tensors are accepted")

    if not isinstance(nested, dict):
        raise _bad(path, f"it holds one object of type {type(nested).__name__}, not named tensors")
    walk(nested, ())
    if not tensors:
        raise _bad(path, "it holds no tensors")
    return tensors, layout


# ---------------------------------------------------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write flat tensors as .safetensors or as a torch file, by the suffix of `path`; a file there is replaced whole.

    A torch file gets the dictionaries that `LAYOUT` in the metadata names, or without that entry those of the official
    files. It has no place for text: other entries than LAYOUT and safetensors' own "format" are refused.
    Raises PortraitError: unknown suffix, such metadata, full disk (507).
    """
    path = Path(path)
    suffix = path.suffix.lower()
    metadata = dict(metadata or {})
    plain = _storable(tensors)
    # In the same folder, so that the last step is a rename within one file system.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    if suffix == SAFETENSORS_SUFFIX:
        from safetensors.torch import save_file

        def save() -> None:
            save_file(plain, str(part), {"format": "pt", **metadata})

    elif suffix in PICKLE_SUFFIXES:
        import torch

        lost = sorted(set(metadata) - {LAYOUT, "format"})
        if lost:
            raise PortraitError(
                path.name,
                f"a {suffix} file has no place for the metadata {', '.join(lost)}",
                f"Write a {SAFETENSORS_SUFFIX} file, or leave the metadata out",
            )
        nested = _nest(plain, _layout(path, metadata, plain))

        def save() -> None:
            torch.save(nested, part)

    else:
        raise PortraitError(
            path.name, f"{suffix or 'no suffix'} is no weight file format", f"Use one of: {', '.join(TENSOR_SUFFIXES)}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors makes files that nobody but their owner can read: this one gets the rights of any new file.
        part.touch()
        rights = part.stat().st_mode
        save()
        part.chmod(rights)
        part.replace(path)
    except Exception as error:  # safetensors and torch each have their own exception for a full disk
        raise PortraitError(
            path.name, f"it cannot be written ({_first_line(error)})", f"Check space and rights in {path.parent}.", 507
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def convert(src: Path, dst: Path, metadata: Mapping[str, str] | None = None) -> Description:
    """Turn a weight file into the format that the suffix of `dst` names, and describe the result.

    metadata: text entries for a .safetensors result ("backbone", "vision": file names this adapter was trained with);
    None carries over those of `src`, an empty mapping drops them.
    Raises PortraitError as `read_tensors` and `write_tensors` do, and when `dst` exists already (nothing is replaced).
    """
    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise PortraitError(dst.name, "the file exists already", "Move it away, or choose another name.", 409)
    checkpoint = read_tensors(src)
    entries = checkpoint.metadata
    if metadata is not None:
        entries = {**{key: text for key, text in entries.items() if key == LAYOUT}, **metadata}
    write_tensors(dst, checkpoint.tensors, entries)
    return describe(dst)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors owning exactly their bytes: safetensors refuses shared memory, torch would save all of it."""
    seen = set()
    plain = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[key] = tensor
    return plain


def _layout(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Layout:
    if LAYOUT not in metadata:
        return [group for group in OFFICIAL_GROUPS if any(key.startswith(group[0] + ".") for key in tensors)]
    try:
        listed = json.loads(metadata[LAYOUT])
        groups = [tuple(str(name) for name in names) for names in listed if isinstance(names, list)]
        if len(groups) == len(listed):
            return groups
    except (ValueError, TypeError, RecursionError):
        pass
    raise PortraitError(path.name, f"the metadata entry {LAYOUT} is malformed", "Convert the original file anew.")


def _nest(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Any]:
    """Undo `_flatten`: each tensor goes into the deepest dictionary whose name its key begins with."""
    root: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for names in sorted(layout, key=len):
        parent, name = _home(groups, root, ".".join(names))
        groups[".".join(names)] = parent[name] = {}
    for key, tensor in tensors.items():
        parent, name = _home(groups, root, key)
        parent[name] = tensor
    return root


def _home(groups: Mapping[str, dict[str, Any]], root: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    for outer in _outer(key):
        if outer in groups:
            return groups[outer], key[len(outer) + 1 :]
    return root, key


def _outer(key: str) -> Iterator[str]:
    """The beginnings of a dotted key that end before a dot, longest first: ``a.b.c`` gives ``a.b``, ``a``."""
    end = key.rfind(".")
    while end > 0:
        yield key[:end]
        end = key.rfind(".", 0, end)


# ----------------------------------------------------------------------------------------------------------- errors


def _check_suffix(path: Path, kind: str) -> None:
    suffix = path.suffix.lower()
    wanted = (SAFETENSORS_SUFFIX,) if kind == SAFETENSORS else PICKLE_SUFFIXES
    if suffix not in wanted:
        raise PortraitError(
            path.name,
            f"its content is {kind}, but its name ends in {suffix or 'nothing'}",
            f"Rename it so that it ends in {wanted[0]}.",
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        problem = f"there is no such file in {path.parent}"
        raise PortraitError(path.name, problem, f"To have it there, {SOURCE}.", 404) from None
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise PortraitError(path.name, f"it cannot be read ({reason})", f"Check the file in {path.parent}.") from error


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turn whatever a parser raises on hostile bytes into one error. What that is cannot be listed: any exception."""
    try:
        yield
    except PortraitError:
        raise
    except Exception as error:
        reason = _first_line(error)
        if isinstance(error, UnpicklingError) and reason.startswith("Unsupported"):
            raise _bad(path, f"it holds more than tensors ({reason})", MORE_THAN_TENSORS) from error
        raise _bad(path, f"it is damaged, or holds more than tensors ({reason})") from error


def _bad(path: Path, problem: str, remedy: str | None = None) -> PortraitError:
    return PortraitError(path.name, problem, remedy or f"Move {path} away, then {SOURCE}; or use another file.")


def _first_line(error: Exception) -> str:
    # torch puts a paragraph of advice first that tells the user to switch the protection off.
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
