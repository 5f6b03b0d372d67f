"""What may be asked for: the one request behind panel, API, X/Y/Z, infotext and command line.

A request comes in as JSON (`parse_request`) and is checked whole before any model is touched: types, ranges, unknown
keys, sizes. What a method lets people choose beside what all have in common, it declares
(`lib_portrait.methods.declarations`); in JSON and infotext the two stand side by side. Everything here is standard
library, so that the WebUI starts without it costing anything.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_portrait import options as declared
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods import declarations
from lib_portrait.methods.declarations import Declaration, declaration
from lib_portrait.options import Number, Option, Value, boolean, finite, shown

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


# The numbers that requests of all methods have.
START = Number(
    name="start",
    title="Start",
    help="share of the sampling steps after which this person comes in",
    default=0.0,
    low=0.0,
    high=1.0,
)
END = Number(
    name="end",
    title="End",
    help="share of the sampling steps after which this person is left out",
    default=1.0,
    low=0.0,
    high=1.0,
)
WEIGHT = Number(
    name="weight", title="Share", help="share of this person in the identity", default=0.5, low=0.0, high=1.0
)


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
    """A person blended into an identity, for methods that can. weight: the share of this person in it, 0 to 1."""

    photos: tuple[Photo, ...]
    weight: float = WEIGHT.default


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
    """One person of the request.

    start, end: the window of the sampling in which it takes part, in shares of the steps, 0 to 1.
    guided: whether reference guidance, where the request has any, acts on it.
    options: what its method lets people choose for each identity, by name.
    """

    photos: tuple[Photo, ...]
    start: float = START.default
    end: float = END.default
    region: Region | None = None
    mix: tuple[Mix, ...] = ()
    guided: bool = GUIDED.default
    options: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Guidance:
    """Reference guidance, beside the method or alone. Raises PortraitError for options that it does not have.

    options: those of `guidance.options` that were given, by name; the kit, or they themselves, say what the others are.
    What is switched off has none.
    """

    enabled: bool = False
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [option.name for option in OPTIONS]
        for name in self.options:
            if name not in known:
                raise PortraitError(f"guidance.{name}", "there is no such option", f"There are: {', '.join(known)}.")
        if not self.enabled:
            object.__setattr__(self, "options", {})

    def values(self, kit: Mapping[str, Value]) -> dict[str, Value]:
        """Of all options, by name. kit: what the makers of a kit found to work, for those that were not given."""
        return {**declared.defaults(OPTIONS), **kit, **self.options}


@dataclass(frozen=True)
class PortraitRequest:
    """Everything a user can ask of one generation.

    layout: a picture, a photo or a skeleton of a pose, whose faces say from the left to the right where the identities
    belong that have no region.
    options: what the method lets people choose for all identities together, by name. Those that are left out, here and
    in the identities, get the method's defaults. Raises PortraitError for a method that there is none, and for options
    that it does not have.
    """

    identities: tuple[Identity, ...] = ()
    enabled: bool = True
    method: str = declarations.NAMES[0]
    checkpoint: str = AUTOMATIC
    guidance: Guidance = Guidance()
    layout: Photo | None = None
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one = self.declaration
        identities = (
            dataclasses.replace(identity, options=_complete(one, one.identity_options, identity.options))
            for identity in self.identities
        )
        object.__setattr__(self, "identities", tuple(identities))
        object.__setattr__(self, "options", _complete(one, one.options, self.options))

    @property
    def declaration(self) -> Declaration:
        """Of its method."""
        return declaration(self.method)

    @property
    def shows_maps(self) -> bool:
        """Whether maps of where people were put are to be shown."""
        return bool(self.options.get(self.declaration.maps, False))

    @property
    def shows_control(self) -> bool:
        """Whether the picture that the ControlNet saw is to be shown."""
        return bool(self.options.get(self.declaration.control, False))

    def with_maps(self) -> PortraitRequest:
        """The request with these maps shown, where its method makes any."""
        maps = self.declaration.maps
        return dataclasses.replace(self, options={**self.options, maps: True}) if maps else self


def _complete(one: Declaration, options: Sequence[Option], given: Mapping[str, Value]) -> dict[str, Value]:
    values = declared.defaults(options)
    for name in given:
        if name not in values:
            raise PortraitError(name, f"{one.title} has no such option", f"It has: {', '.join(values) or 'none'}.")
    return {**values, **given}


# ---------------------------------------------------------------------------------------------------------- parsing


def parse_request(value: Any, limits: Limits | None = None) -> PortraitRequest:
    """A checked request from its JSON form (a mapping, as `json.loads` gives it).

    Missing keys take their defaults; unknown keys, wrong types, non-finite or out-of-range numbers raise
    PortraitError naming the key. An enabled request needs at least one identity, an identity at least one photo, and
    reference guidance somebody to act on; it must be switched on where the method draws nobody by itself.
    """
    limits = limits or Limits()
    # Which keys there are is known once the method is.
    method = _string(_mapping(value, "Portrait").get("method", declarations.NAMES[0]), "method", limits)
    one = declaration(method)
    data = _object(value, "Portrait", request_keys(one), one)
    enabled = boolean(data.get("enabled", True), "enabled")
    listed = _list(data.get("identities", []), "identities")
    if len(listed) > limits.identities:
        raise PortraitError(
            "identities",
            f"{len(listed)} were given, at most {limits.identities} are allowed",
            limits.remedy("identities", "Remove some"),
        )
    if enabled and not listed:
        raise PortraitError("identities", "the list is empty", "Add at least one identity with a photo, or disable.")
    request = PortraitRequest(
        identities=tuple(_identity(item, f"identities[{i}]", one, limits) for i, item in enumerate(listed)),
        enabled=enabled,
        method=method,
        checkpoint=_name(data.get("checkpoint", AUTOMATIC), "checkpoint", limits),
        guidance=_guidance(data.get("guidance", {"enabled": False})),
        layout=_photo(data["layout"], "layout", limits) if data.get("layout") is not None else None,
        options=_options(one.options, data, ""),
    )
    if enabled:
        _check_somebody_is_drawn(request)
    return request


def _guidance(value: Any) -> Guidance:
    data = _object(value, "guidance", ["enabled", *(option.name for option in OPTIONS)])
    enabled = boolean(data.get("enabled", True), "guidance.enabled")
    given = [option for option in OPTIONS if option.name in data]
    return Guidance(enabled, {one.name: one.check(data[one.name], f"guidance.{one.name}") for one in given})


def _check_somebody_is_drawn(request: PortraitRequest) -> None:
    """Raises PortraitError for guidance of nobody, and where neither the method nor guidance draws somebody."""
    one, guided = request.declaration, [identity.guided for identity in request.identities]
    if not one.has_adapter:
        if request.checkpoint != AUTOMATIC:
            raise PortraitError("checkpoint", f"{one.title} has no adapters", f'Leave it out, or give "{AUTOMATIC}".')
        if not request.guidance.enabled:
            raise PortraitError(
                "guidance",
                f"it is switched off, and nothing else draws anybody with the method {one.title}",
                "Switch reference guidance on, or choose another method.",
            )
        if not all(guided):
            raise PortraitError(
                f"identities[{guided.index(False)}].{GUIDED.name}",
                f"nothing else draws this person with the method {one.title}",
                "Let reference guidance act on this person, leave them out, or choose another method.",
            )
    if request.guidance.enabled and not any(guided):
        raise PortraitError(
            "guidance", "it acts on nobody", "Let it act on somebody who is to be drawn, or switch it off."
        )


def request_keys(one: Declaration) -> list[str]:
    """The keys that a request of a method may have."""
    common = [item.name for item in dataclasses.fields(PortraitRequest) if item.name != "options"]
    return common + [option.name for option in one.options]


def identity_keys(one: Declaration) -> list[str]:
    """The keys that an identity of a request of a method may have."""
    common = [item.name for item in dataclasses.fields(Identity) if item.name != "options"]
    return [key for key in common if key != "mix" or one.mixes] + [option.name for option in one.identity_options]


def _options(options: Sequence[Option], data: Mapping[str, Any], path: str) -> dict[str, Value]:
    def at(name: str) -> str:
        return f"{path}.{name}" if path else name

    return {option.name: option.check(data.get(option.name, option.default), at(option.name)) for option in options}


def _identity(value: Any, path: str, one: Declaration, limits: Limits) -> Identity:
    data = _object(value, path, identity_keys(one), one)
    mixes = _list(data.get("mix", []), f"{path}.mix")
    start, end = (
        option.check(data.get(option.name, option.default), f"{path}.{option.name}") for option in (START, END)
    )
    identity = Identity(
        photos=_photos(data.get("photos"), f"{path}.photos", limits),
        start=start,
        end=end,
        region=_region(data.get("region"), f"{path}.region", limits),
        mix=tuple(_mix(item, f"{path}.mix[{i}]", limits) for i, item in enumerate(mixes)),
        guided=GUIDED.check(data.get(GUIDED.name, GUIDED.default), f"{path}.{GUIDED.name}"),
        options=_options(one.identity_options, data, path),
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
    data = _object(value, path, ["photos", "weight"])
    weight = WEIGHT.check(data.get("weight", WEIGHT.default), f"{path}.weight")
    return Mix(_photos(data.get("photos"), f"{path}.photos", limits), weight)


def _region(value: Any, path: str, limits: Limits) -> Region | None:
    if value is None:
        return None
    data = _object(value, path, ["box", "mask"])
    if (data.get("box") is None) == (data.get("mask") is None):
        raise PortraitError(
            path, "it needs either a box or a mask", "Give exactly one of the two, or null for routing."
        )
    if data.get("mask") is not None:
        return Region(mask=_photo(data["mask"], f"{path}.mask", limits))
    box = _list(data["box"], f"{path}.box")
    if len(box) != 4:
        raise PortraitError(f"{path}.box", f"it has {len(box)} numbers", "Give left, top, right, bottom.")
    left, top, right, bottom = (finite(edge, f"{path}.box[{i}]", 0.0, 1.0) for i, edge in enumerate(box))
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
                    f"{shown(wanted)} is no face",
                    f'Give "{LARGEST}" or an index counted from the left.',
                )
            face = wanted
        aligned = boolean(value.get("aligned", False), f"{path}.aligned")
        value, path = value.get("image"), f"{path}.image"
    if not isinstance(value, str):
        raise PortraitError(path, f"{shown(value)} is no image", "Give base64 of an image file, or sha256:<hash>.")
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


def _mapping(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PortraitError(path, f"{shown(value)} is no object", "Give a JSON object; see /portrait/schema.")
    return value


def _object(value: Any, path: str, known: Sequence[str], one: Declaration | None = None) -> Mapping[str, Any]:
    """A mapping without other keys than these; `one`, where it is its method that decides which they are."""
    for key in _mapping(value, path):
        if key not in known:
            name = key if path == "Portrait" else f"{path}.{key}"
            where = f"with {one.title}" if one is not None else "here"
            raise PortraitError(str(name)[:200], "the key is not known", f"Known {where}: {', '.join(known)}.")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise PortraitError(path, f"{shown(value)} is no list", "Give a JSON list.")
    return list(value)


def _string(value: Any, path: str, limits: Limits) -> str:
    if not isinstance(value, str) or not value or len(value) > limits.name_length:
        raise PortraitError(path, f"{shown(value)} is no name", "Give a non-empty string.")
    return value


def _name(value: Any, path: str, limits: Limits) -> str:
    """A file's bare name: what could leave the model folders is refused before any path is made of it."""
    name = _string(value, path, limits)
    if re.search(r"[/\\:\x00-\x1f]", name) or name.startswith("."):
        raise PortraitError(
            path, f"{shown(name)} is not a bare file name", "Give the name of an adapter, without a folder."
        )
    return name


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


# ---------------------------------------------------------------------------------------------------------------- JSON


def to_json(request: PortraitRequest) -> dict[str, Any]:
    """The request's JSON form with photos as ``sha256:`` references: small, free of pictures, without defaults."""
    one = request.declaration

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
        if isinstance(value, Guidance):
            return {"enabled": value.enabled, **value.options}
        if dataclasses.is_dataclass(value):
            kept: dict[str, Any] = {}
            for item in dataclasses.fields(value):
                current = getattr(value, item.name)
                if item.name == "options":
                    options = one.options if value is request else one.identity_options
                    kept |= {option.name: current[option.name] for option in declared.changed(options, current)}
                elif item.default is dataclasses.MISSING or current != item.default:
                    kept[item.name] = plain(current)
            return kept
        return value

    return plain(request)


def json_schema(limits: Limits | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a request, from the same declarations and limits that parsing uses: one object for
    each method, of which the default one need not be named."""
    limits = limits or Limits()
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
            _strict({"box": box}, ["box"]),
            _strict({"mask": {"$ref": "#/$defs/photo"}}, ["mask"]),
        ],
        "default": None,
        "description": "null lets the method decide where this person appears",
    }
    mix = {"type": "array", "items": {"$ref": "#/$defs/mix"}, "default": []}
    common = {
        "enabled": {"type": "boolean", "default": True},
        "checkpoint": {
            "type": "string",
            "minLength": 1,
            "maxLength": limits.name_length,
            "default": AUTOMATIC,
            "description": "a name that /portrait/models lists",
        },
        "layout": {
            "oneOf": [{"type": "null"}, {"$ref": "#/$defs/photo"}],
            "default": None,
            "description": "a picture whose faces, from the left, say where identities without a region belong",
        },
    }
    guidance = {
        **_strict({"enabled": {"type": "boolean", "default": True}, **_schemas(OPTIONS)}, []),
        "default": {"enabled": False},
        "description": "reference guidance (RB-Guidance); what is left out is as the kit says, else as "
        "the defaults here",
    }
    own = {"photos": photos, **_schemas((START, END, GUIDED)), "region": region}

    def of(one: Declaration) -> dict[str, Any]:
        person = {**own, **({"mix": mix} if one.mixes else {}), **_schemas(one.identity_options)}
        people = {"type": "array", "items": _strict(person, ["photos"]), "maxItems": limits.identities, "default": []}
        method = {"const": one.name, "description": one.title}
        default = one.name == declarations.NAMES[0]
        properties = {"method": {**method, "default": one.name} if default else method, **common}
        required = [] if default else ["method"]
        if not one.has_adapter:
            properties["checkpoint"] = {"const": AUTOMATIC, "default": AUTOMATIC}
            required.append("guidance")
        properties |= {"identities": people, "guidance": guidance}
        schema = _strict({**properties, **_schemas(one.options)}, required)
        return {"title": one.title, **schema}

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Portrait request",
        "type": "object",
        "oneOf": [of(one) for one in declarations.declarations()],
        "$defs": {
            "photo": {"oneOf": [image, _strict({"image": image, "face": face, "aligned": aligned}, ["image"])]},
            "mix": _strict({"photos": photos, **_schemas((WEIGHT,))}, ["photos"]),
        },
    }


def _strict(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _schemas(options: Sequence[Option]) -> dict[str, Any]:
    return {option.name: option.schema() for option in options}
