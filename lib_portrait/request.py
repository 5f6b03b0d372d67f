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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from lib_portrait.errors import PortraitError

METHODS = ("uniportrait",)
AUTOMATIC = "automatic"
HASH_PREFIX = "sha256:"
# How much of a photo's hash names it: 48 bits tell the photos of one cache apart, and nobody guesses them.
HASH_DIGITS = 12
LARGEST = "largest"


def limit(default: int, setting: str) -> Any:
    """A dataclass field holding a limit; `setting` is what the WebUI's settings page calls it."""
    return field(default=default, metadata={"setting": setting})


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for. The WebUI's settings page sets these; the defaults stand elsewhere.

    photo_pixels: phones make 200 million. page: the name of the page where users raise limits, empty where they cannot.
    """

    identities: int = limit(4, "People per picture, at most")
    photos: int = limit(8, "Photos per person, at most")
    photo_bytes: int = limit(32 * 2**20, "Size of a photo, at most, in MiB")
    photo_pixels: int = limit(250_000_000, "Size of a photo, at most, in megapixels")
    name_length: int = 200
    page: str = ""

    @classmethod
    def setting(cls, name: str) -> str:
        """What the settings page calls a limit."""
        return str(cls.__dataclass_fields__[name].metadata["setting"])

    def remedy(self, name: str, instead: str) -> str:
        """What to do where the limit `name` is exceeded: `instead`, or raising it where there is a page for that."""
        return f'{instead}, or raise "{self.setting(name)}" in {self.page}.' if self.page else f"{instead}."


def number(default: float, low: float, high: float, doc: str) -> Any:
    """A dataclass field holding a finite number in [low, high]; the limits are the ones parsing and schema use."""
    return field(default=default, metadata={"low": low, "high": high, "doc": doc})


@dataclass(frozen=True)
class Photo:
    """One photograph: its bytes, or only the hash of bytes kept in the photo cache.

    sha256: of the file's bytes, 64 hex digits; without data the first HASH_DIGITS of them or more.
    data: the file's bytes, or None where the request referred to a cached photo by hash.
    face: index of the wanted face, counted from the left from 0, bystanders last, or None for the largest.
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
            limits.remedy("identities", "Remove some"),
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
            path,
            f"{len(listed)} photos, at most {limits.photos} are allowed",
            limits.remedy("photos", "Remove some of this person's photos"),
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
        if not re.fullmatch(rf"[0-9a-f]{{{HASH_DIGITS},64}}", digest):
            raise PortraitError(
                path, "the hash is malformed", f"sha256: is followed by {HASH_DIGITS} to 64 hexadecimal digits."
            )
        return Photo(digest, None, face, aligned)
    return Photo.of(_base64(value, path, limits), face, aligned)


def _base64(text: str, path: str, limits: Limits) -> bytes:
    if text.startswith("data:"):
        header, comma, text = text.partition(",")
        if not comma or not header.endswith(";base64"):
            raise PortraitError(path, "the data URL is not base64", "Write data:image/png;base64,...")
    if len(text) > limits.photo_bytes * 4 / 3 + 64:
        raise PortraitError(
            path,
            f"the file is larger than {limits.photo_bytes // 2**20} MiB",
            limits.remedy("photo_bytes", "Send a smaller file of this photo"),
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


def with_photos(request: PortraitRequest, change: Callable[[Photo], Photo]) -> PortraitRequest:
    """The request with each photo and mask replaced by what `change` makes of it."""

    def changed(value: Any) -> Any:
        if isinstance(value, Photo):
            return change(value)
        if isinstance(value, tuple):
            return tuple(changed(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{item.name: changed(getattr(value, item.name)) for item in dataclasses.fields(value)}
            )
        return value

    return changed(request)


# ---------------------------------------------------------------------------------------------------------- windows


def takes_part(start: float, end: float, progress: float) -> bool:
    """Whether who has this window takes part where the share `progress` of the sampling is done; an end of 1 has no
    end."""
    return start <= progress and (progress < end or end >= 1.0)


def check_window(path: str, start: float, end: float, steps: Iterable[float]) -> None:
    """Raises PortraitError, naming the nearest window that would do, unless one of the steps lies in the window.

    path: of the identity. steps: for each step of the sampling the share of it that is done before, 0 to 1.
    """
    reached = sorted(set(steps))
    if not reached or any(takes_part(start, end, step) for step in reached):
        return
    nearest = min(reached, key=lambda step: max(start - step, step - end))
    shown = [f"{round(step, 2):g}" for step in reached]
    listed = ", ".join(shown if len(shown) <= 8 else [*shown[:3], "...", shown[-1]])
    # Two digits, on the side on which the step is.
    below = math.floor(nearest * 100 + 1e-9) / 100
    remedy = f"Let it start at {below:g} or before" if nearest < start else f"Let it end at {below + 0.01:g} or after"
    raise PortraitError(
        f"{path}.{'start' if nearest < start else 'end'}",
        f"no step of the sampling lies between {start:g} and {end:g}, so this person would not be drawn: the steps are "
        f"at {listed}",
        f"{remedy}, or take more steps.",
    )


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


def to_infotext(request: PortraitRequest, adapter: str | None = None) -> str:
    """An enabled request as one line for a picture's generation parameters; `from_infotext` reads it back.

    adapter: the name of the one that was used, for a request that leaves the choice open. It is what is read back, for
    that one draws the picture again.

    Parts are divided by " | ": what concerns all people, then one part a person. Within a part "; " divides what
    differs from the defaults, under the request's names, boxes as fractions; photos are the first digits of their
    hashes, with "#1" for the second face from the left and "#aligned" as on the command line. There is no comma, colon
    or line break, so that the host adds no quotation marks and escapes (modules/infotext_utils.py: quote).
    """
    name = adapter if adapter is not None and request.checkpoint == AUTOMATIC else request.checkpoint
    clauses = [request.method]
    if name != AUTOMATIC:
        escaped = re.sub(r'[%;|,()"]|^\s|\s$', lambda found: quote(found[0], safe=""), name)
        clauses.append(f"adapter {escaped}{_CHOSEN if request.checkpoint == AUTOMATIC else ''}")
    clauses += _numbers_as_text(request)
    if request.show_routing:
        clauses.append("show_routing")
    return " | ".join(["; ".join(clauses), *(_identity_as_text(identity) for identity in request.identities)])


_CHOSEN = " (automatic)"


def _identity_as_text(identity: Identity) -> str:
    clauses = [_photos_as_text(identity.photos), *_numbers_as_text(identity)]
    if identity.region is not None and identity.region.box is not None:
        clauses.append(" ".join(["box", *map(_number_as_text, identity.region.box)]))
    if identity.region is not None and identity.region.mask is not None:
        clauses.append(f"mask {_photos_as_text([identity.region.mask])}")
    clauses += [f"mix {_number_as_text(mix.weight)} of {_photos_as_text(mix.photos)}" for mix in identity.mix]
    return "; ".join(clauses)


def _photos_as_text(photos: Sequence[Photo]) -> str:
    return " ".join(
        photo.sha256[:HASH_DIGITS]
        + ("" if photo.face is None else f"#{photo.face}")
        + ("#aligned" if photo.aligned else "")
        for photo in photos
    )


def _numbers_as_text(value: PortraitRequest | Identity) -> list[str]:
    return [
        f"{item.name} {_number_as_text(getattr(value, item.name))}"
        for item in dataclasses.fields(value)
        if "low" in item.metadata and getattr(value, item.name) != item.default
    ]


def _number_as_text(value: float) -> str:
    return repr(value).removesuffix(".0")


def from_infotext(text: str, limits: Limits | None = None) -> PortraitRequest:
    """The request an infotext value holds: a line of `to_infotext`, or the JSON that earlier versions wrote.

    Photos come without their bytes, by as much of their hashes as there is. Raises PortraitError on anything else.
    """
    if not text.lstrip().startswith("{"):
        return parse_request(_request_from_text(text), limits)
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise PortraitError("Portrait", "the infotext is not JSON", _UNCHANGED) from None
    return parse_request(value, limits)


_UNCHANGED = "Paste the generation parameters unchanged."


def _request_from_text(text: str) -> dict[str, Any]:
    """The request's JSON form from a line of `to_infotext`; what is said in it is left to `parse_request`."""
    common, *people = text.split("|")
    method, clauses = _clauses(common)
    request: dict[str, Any] = {"method": method, "identities": [_identity_from_text(person) for person in people]}
    for name, value in clauses:
        if name in request:
            raise _not_understood(f"{name} {value}")
        if name == "adapter" and "checkpoint" not in request:
            request["checkpoint"] = unquote(value.removesuffix(_CHOSEN))
        elif name == "show_routing" and not value:
            request[name] = True
        else:
            request[name] = _number_from_text(PortraitRequest, name, value)
    return request


def _identity_from_text(text: str) -> dict[str, Any]:
    photos, clauses = _clauses(text)
    region: dict[str, Any] = {}
    mixes: list[dict[str, Any]] = []
    identity: dict[str, Any] = {"photos": _photos_from_text(photos), "mix": mixes}
    for name, value in clauses:
        if name == "mix":
            weight, _, mixed = value.partition(" of ")
            mixes.append({"photos": _photos_from_text(mixed), "weight": _number(weight)})
        elif name in identity or name in region:
            raise _not_understood(f"{name} {value}")
        elif name == "box":
            region["box"] = [_number(part) for part in value.split()]
        elif name == "mask" and len(masks := _photos_from_text(value)) == 1:
            region["mask"] = masks[0]
        else:
            identity[name] = _number_from_text(Identity, name, value)
    return {**identity, "region": region or None}


def _clauses(part: str) -> tuple[str, list[tuple[str, str]]]:
    """What a part begins with, and its other clauses, each a name and what is said of it."""
    first, *others = (clause.strip() for clause in part.split(";"))
    divided = (clause.partition(" ") for clause in others)
    return first, [(name, value) for name, _, value in divided]


def _photos_from_text(text: str) -> list[dict[str, Any]]:
    photos = []
    for token in text.split():
        found = re.fullmatch(rf"([0-9a-f]{{{HASH_DIGITS},64}})(?:#([0-9]{{1,4}}))?(#aligned)?", token)
        if found is None:
            raise _not_understood(token)
        digits, face, aligned = found.groups()
        photos.append(
            {
                "image": HASH_PREFIX + digits,
                "face": LARGEST if face is None else int(face),
                "aligned": aligned is not None,
            }
        )
    return photos


def _number_from_text(form: type, name: str, text: str) -> float:
    if not any(item.name == name and "low" in item.metadata for item in dataclasses.fields(form)):
        raise _not_understood(f"{name} {text}")
    return _number(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _not_understood(text) from None


def _not_understood(text: str) -> PortraitError:
    return PortraitError("Portrait", f"{_shown(text.strip())} in the infotext is not understood", _UNCHANGED)


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
        f"sha256:<{HASH_DIGITS} to 64 hex digits> of a photo that was sent before",
    }
    face = {
        "oneOf": [{"const": LARGEST}, {"type": "integer", "minimum": 0, "maximum": 999}],
        "default": LARGEST,
        "description": "which face of the photo, counted from the left from 0, bystanders after the others",
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
