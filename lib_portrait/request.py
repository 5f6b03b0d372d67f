"""What may be asked for: the one request behind panel, API, X/Y/Z, infotext and command line.

A request comes in as JSON (`parse_request`) and is checked whole before any model is touched: types, ranges, unknown
keys, sizes. Everything here is standard library, so that the WebUI starts without it costing anything.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib_portrait.errors import PortraitError

METHODS = ("uniportrait",)
AUTOMATIC = "automatic"
HASH_PREFIX = "sha256:"
LARGEST = "largest"


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. The WebUI's settings page sets these; the defaults stand elsewhere."""

    identities: int = 4
    photos: int = 8
    photo_bytes: int = 32 * 2**20
    photo_pixels: int = 100_000_000
    name_length: int = 200


def number(default: float, low: float, high: float, doc: str) -> Any:
    """A dataclass field holding a finite number in [low, high]; the limits are the ones parsing and schema use."""
    return field(default=default, metadata={"low": low, "high": high, "doc": doc})


@dataclass(frozen=True)
class Photo:
    """One photograph: its bytes, or only the hash of bytes kept in the photo cache.

    sha256: 64 hex digits of the file's bytes.
    data: the file's bytes, or None where the request referred to a cached photo by hash.
    face: index of the wanted face, counted from the left from 0, or None for the largest.
    aligned: the photo is already a face crop in the ArcFace template, and is used as it is.
    """

    sha256: str
    data: bytes | None = field(default=None, repr=False, compare=False)
    face: int | None = None
    aligned: bool = False

    @staticmethod
    def of(data: bytes, face: int | None = None, aligned: bool = False) -> Photo:
        return Photo(hashlib.sha256(data).hexdigest(), data, face, aligned)


@dataclass(frozen=True)
class Mix:
    """A person blended into an identity: F = (1 - sum w) F_identity + sum w_i F_i (UniPortrait, sec. 3.2)."""

    photos: tuple[Photo, ...]
    weight: float = number(0.5, 0.0, 1.0, "share of this person in the identity")


@dataclass(frozen=True)
class Region:
    """Where an identity belongs. Exactly one of the two is given.

    box: (left, top, right, bottom) as fractions of the picture, 0 to 1.
    mask: a picture whose white (or opaque) area is the identity's; scaled to the generated picture.
    """

    box: tuple[float, float, float, float] | None = None
    mask: Photo | None = None


@dataclass(frozen=True)
class Identity:
    """One person of the request."""

    photos: tuple[Photo, ...]
    scale: float = number(1.0, 0.0, 2.0, "strength of this person, multiplied with the request's scale")
    structure: float = number(0.1, 0.0, 2.0, "face structure scale beta: more likeness, less editability (appendix A)")
    start: float = number(0.0, 0.0, 1.0, "share of the sampling steps after which this person comes in")
    end: float = number(1.0, 0.0, 1.0, "share of the sampling steps after which this person is left out")
    region: Region | None = None
    mix: tuple[Mix, ...] = ()


@dataclass(frozen=True)
class PortraitRequest:
    """Everything a user can ask of one generation."""

    identities: tuple[Identity, ...] = ()
    enabled: bool = True
    method: str = "uniportrait"
    checkpoint: str = AUTOMATIC
    scale: float = number(0.7, 0.0, 2.0, "strength of all people together (lambda of the decoupled cross-attention)")
    lora_scale: float = number(1.0, 0.0, 2.0, "strength of the adapter's LoRA on the UNet's attention layers")
    show_routing: bool = False


# ---------------------------------------------------------------------------------------------------------- parsing


def parse_request(value: Any, limits: Limits | None = None) -> PortraitRequest:
    """A checked request from its JSON form (a mapping, as `json.loads` gives it).

    Missing keys take their defaults; unknown keys, wrong types, non-finite or out-of-range numbers raise
    PortraitError naming the key. An enabled request needs at least one identity, an identity at least one photo.
    """
    limits = limits or Limits()
    data = _object(value, "Portrait", PortraitRequest)
    enabled = _boolean(data.get("enabled", True), "enabled")
    method = _string(data.get("method", METHODS[0]), "method", limits)
    if method not in METHODS:
        raise PortraitError("method", f"{method!r} is not a method", f"Use one of: {', '.join(METHODS)}.")
    listed = _list(data.get("identities", []), "identities")
    if len(listed) > limits.identities:
        raise PortraitError(
            "identities",
            f"{len(listed)} were given, at most {limits.identities} are allowed",
            "Remove some, or raise the limit in Settings > Portrait.",
        )
    if enabled and not listed:
        raise PortraitError("identities", "the list is empty", "Add at least one identity with a photo, or disable.")
    return PortraitRequest(
        identities=tuple(_identity(item, f"identities[{i}]", limits) for i, item in enumerate(listed)),
        enabled=enabled,
        method=method,
        checkpoint=_name(data.get("checkpoint", AUTOMATIC), "checkpoint", limits),
        scale=_ranged(data, "scale", "", PortraitRequest),
        lora_scale=_ranged(data, "lora_scale", "", PortraitRequest),
        show_routing=_boolean(data.get("show_routing", False), "show_routing"),
    )


def _identity(value: Any, path: str, limits: Limits) -> Identity:
    data = _object(value, path, Identity)
    mixes = _list(data.get("mix", []), f"{path}.mix")
    identity = Identity(
        photos=_photos(data.get("photos"), f"{path}.photos", limits),
        scale=_ranged(data, "scale", path, Identity),
        structure=_ranged(data, "structure", path, Identity),
        start=_ranged(data, "start", path, Identity),
        end=_ranged(data, "end", path, Identity),
        region=_region(data.get("region"), f"{path}.region", limits),
        mix=tuple(_mix(item, f"{path}.mix[{i}]", limits) for i, item in enumerate(mixes)),
    )
    if identity.start >= identity.end:
        raise PortraitError(
            f"{path}.start", f"{identity.start} is not before end {identity.end}", "Give a start below the end."
        )
    total = math.fsum(mix.weight for mix in identity.mix)
    if total > 1.0 + 1e-9:
        raise PortraitError(
            f"{path}.mix", f"the shares add up to {total:g}", "Keep the sum of their shares at 1 or below."
        )
    return identity


def _mix(value: Any, path: str, limits: Limits) -> Mix:
    data = _object(value, path, Mix)
    return Mix(_photos(data.get("photos"), f"{path}.photos", limits), _ranged(data, "weight", path, Mix))


def _region(value: Any, path: str, limits: Limits) -> Region | None:
    if value is None:
        return None
    data = _object(value, path, Region)
    if (data.get("box") is None) == (data.get("mask") is None):
        raise PortraitError(
            path, "it needs either a box or a mask", "Give exactly one of the two, or null for routing."
        )
    if data.get("mask") is not None:
        return Region(mask=_photo(data["mask"], f"{path}.mask", limits))
    box = _list(data["box"], f"{path}.box")
    if len(box) != 4:
        raise PortraitError(f"{path}.box", f"it has {len(box)} numbers", "Give left, top, right, bottom.")
    left, top, right, bottom = (_finite(edge, f"{path}.box[{i}]", 0.0, 1.0) for i, edge in enumerate(box))
    if left >= right or top >= bottom:
        raise PortraitError(f"{path}.box", "it is empty", "Keep left below right and top below bottom.")
    return Region(box=(left, top, right, bottom))


def _photos(value: Any, path: str, limits: Limits) -> tuple[Photo, ...]:
    listed = _list([] if value is None else value, path)
    if not listed:
        raise PortraitError(path, "there is no photo", "Add at least one photo of this person.")
    if len(listed) > limits.photos:
        raise PortraitError(
            path, f"{len(listed)} photos, at most {limits.photos} are allowed", "Remove some of this person's photos."
        )
    return tuple(_photo(item, f"{path}[{i}]", limits) for i, item in enumerate(listed))


def _photo(value: Any, path: str, limits: Limits) -> Photo:
    """A photo from a string (base64, data URL, ``sha256:<hex>``) or ``{"image": ..., "face": ..., "aligned": ...}``."""
    face: int | None = None
    aligned = False
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - {"image", "face", "aligned"})
        if unknown:
            raise PortraitError(f"{path}.{unknown[0]}", "the key is not known", "Use image, face, aligned.")
        wanted = value.get("face", LARGEST)
        if wanted != LARGEST:
            if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted < 1000:
                raise PortraitError(
                    f"{path}.face",
                    f"{_shown(wanted)} is no face",
                    f'Give "{LARGEST}" or an index counted from the left.',
                )
            face = wanted
        aligned = _boolean(value.get("aligned", False), f"{path}.aligned")
        value, path = value.get("image"), f"{path}.image"
    if not isinstance(value, str):
        raise PortraitError(path, f"{_shown(value)} is no image", "Give base64 of an image file, or sha256:<hash>.")
    if value.startswith(HASH_PREFIX):
        digest = value[len(HASH_PREFIX) :].lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise PortraitError(path, "the hash is malformed", "sha256: is followed by 64 hexadecimal digits.")
        return Photo(digest, None, face, aligned)
    return Photo.of(_base64(value, path, limits), face, aligned)


def _base64(text: str, path: str, limits: Limits) -> bytes:
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise PortraitError(path, "the data URL is not base64", "Write data:image/png;base64,...")
    if len(text) > limits.photo_bytes * 4 / 3 + 64:
        raise PortraitError(
            path, f"the file is larger than {limits.photo_bytes // 2**20} MiB", "Send a smaller file of this photo."
        )
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise PortraitError(path, "it is not valid base64", "Send the image file's bytes as standard base64.") from None
    if not data:
        raise PortraitError(path, "the file is empty (0 bytes)", "Send the image file's bytes as standard base64.")
    return data


def _object(value: Any, path: str, form: type) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PortraitError(path, f"{_shown(value)} is no object", "Give a JSON object; see /portrait/schema.")
    known = [item.name for item in dataclasses.fields(form)]
    for key in value:
        if key not in known:
            name = key if path == "Portrait" else f"{path}.{key}"
            raise PortraitError(str(name)[:200], "the key is not known", f"Known here: {', '.join(known)}.")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise PortraitError(path, f"{_shown(value)} is no list", "Give a JSON list.")
    return list(value)


def _boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise PortraitError(path, f"{_shown(value)} is neither true nor false", "Give true or false.")
    return value


def _string(value: Any, path: str, limits: Limits) -> str:
    if not isinstance(value, str) or not value or len(value) > limits.name_length:
        raise PortraitError(path, f"{_shown(value)} is no name", "Give a non-empty string.")
    return value


def _name(value: Any, path: str, limits: Limits) -> str:
    """A file's bare name: what could leave the model folders is refused before any path is made of it."""
    name = _string(value, path, limits)
    if re.search(r"[/\\:\x00-\x1f]", name) or name.startswith("."):
        raise PortraitError(
            path, f"{_shown(name)} is not a bare file name", "Give the name of an adapter, without a folder."
        )
    return name


def _ranged(data: Mapping[str, Any], name: str, path: str, form: type) -> float:
    spec = next(item for item in dataclasses.fields(form) if item.name == name)
    key = f"{path}.{name}" if path else name
    return _finite(data.get(name, spec.default), key, spec.metadata["low"], spec.metadata["high"])


def _finite(value: Any, path: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PortraitError(path, f"{_shown(value)} is no number", f"Give a number from {low:g} to {high:g}.")
    # The comparison is false for NaN, so NaN and both infinities are refused here; huge integers never become floats.
    if not low <= value <= high:
        raise PortraitError(path, f"{_shown(value)} is out of range", f"Give a number from {low:g} to {high:g}.")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------- JSON and infotext


def to_json(request: PortraitRequest) -> dict[str, Any]:
    """The request's JSON form with photos as ``sha256:`` references: small, free of pictures, without defaults."""

    def plain(value: Any) -> Any:
        if isinstance(value, Photo):
            reference = HASH_PREFIX + value.sha256
            if value.face is None and not value.aligned:
                return reference
            photo: dict[str, Any] = {"image": reference}
            if value.face is not None:
                photo["face"] = value.face
            if value.aligned:
                photo["aligned"] = True
            return photo
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if dataclasses.is_dataclass(value):
            kept = {}
            for item in dataclasses.fields(value):
                current = getattr(value, item.name)
                if item.default is dataclasses.MISSING or current != item.default:
                    kept[item.name] = plain(current)
            return kept
        return value

    return plain(request)


def to_infotext(request: PortraitRequest) -> str:
    """The request as one line for a picture's generation parameters; `from_infotext` reads it back."""
    return json.dumps(to_json(request), sort_keys=True)


def from_infotext(text: str, limits: Limits | None = None) -> PortraitRequest:
    """The request an infotext value holds. Raises PortraitError on anything `to_infotext` would not have written."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise PortraitError(
            "Portrait", "the infotext is not JSON", "Paste the generation parameters unchanged."
        ) from None
    return parse_request(value, limits)


def json_schema(limits: Limits | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the request, from the same fields and limits that parsing uses."""
    limits = limits or Limits()

    def numbers(form: type) -> dict[str, Any]:
        return {
            item.name: {
                "type": "number",
                "minimum": item.metadata["low"],
                "maximum": item.metadata["high"],
                "default": item.default,
                "description": item.metadata["doc"],
            }
            for item in dataclasses.fields(form)
            if "low" in item.metadata
        }

    def strict(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**schema, "required": required} if required else schema

    photos = {"type": "array", "items": {"$ref": "#/$defs/photo"}, "minItems": 1, "maxItems": limits.photos}
    image = {
        "type": "string",
        "description": f"base64 of an image file (up to {limits.photo_bytes // 2**20} MiB), a data URL, or "
        "sha256:<hex> of a photo that was sent before",
    }
    face = {
        "oneOf": [{"const": LARGEST}, {"type": "integer", "minimum": 0, "maximum": 999}],
        "default": LARGEST,
        "description": "which face of the photo, counted from the left from 0",
    }
    aligned = {"type": "boolean", "default": False, "description": "the photo already is an aligned face crop"}
    box = {
        "type": "array",
        "items": {"type": "number", "minimum": 0, "maximum": 1},
        "minItems": 4,
        "maxItems": 4,
        "description": "left, top, right, bottom as fractions of the picture",
    }
    region = {
        "oneOf": [
            {"type": "null"},
            strict({"box": box}, ["box"]),
            strict({"mask": {"$ref": "#/$defs/photo"}}, ["mask"]),
        ],
        "default": None,
        "description": "null lets the router decide where this person appears",
    }
    mix = {"type": "array", "items": strict({"photos": photos, **numbers(Mix)}, ["photos"]), "default": []}
    identity = strict({"photos": photos, **numbers(Identity), "region": region, "mix": mix}, ["photos"])
    properties = {
        "enabled": {"type": "boolean", "default": True},
        "method": {"enum": list(METHODS), "default": METHODS[0]},
        "checkpoint": {
            "type": "string",
            "minLength": 1,
            "maxLength": limits.name_length,
            "default": AUTOMATIC,
            "description": "a name that /portrait/models lists",
        },
        "identities": {"type": "array", "items": identity, "maxItems": limits.identities, "default": []},
        **numbers(PortraitRequest),
        "show_routing": {
            "type": "boolean",
            "default": False,
            "description": "append the routing map to the resulting pictures",
        },
    }
    schema = strict(properties)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Portrait request",
        **schema,
        "$defs": {"photo": {"oneOf": [image, strict({"image": image, "face": face, "aligned": aligned}, ["image"])]}},
    }
