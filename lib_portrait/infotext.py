"""A request as one line of a picture's generation parameters, and back. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

from lib_portrait import options as declared
from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods.declarations import Declaration, declaration
from lib_portrait.options import Option, Value, number_as_text, shown
from lib_portrait.request import (
    AUTOMATIC,
    END,
    HASH_DIGITS,
    HASH_PREFIX,
    LARGEST,
    START,
    Identity,
    Limits,
    Photo,
    PortraitRequest,
    parse_request,
)

_CHOSEN = " (automatic)"
_GUIDANCE = "guidance"
_UNCHANGED = "Paste the generation parameters unchanged."


def to_infotext(request: PortraitRequest, adapter: str | None = None) -> str:
    """An enabled request as one line for a picture's generation parameters; `from_infotext` reads it back.

    adapter: the name of the one that was used, for a request that leaves the choice open. It is what is read back, for
    that one draws the picture again.

    Parts are divided by " | ": what concerns all people, then one part a person. Within a part "; " divides what
    differs from the defaults, under the request's names, boxes as fractions; photos are the first digits of their
    hashes, with "#1" for the second face from the left and "#aligned" as on the command line. Where reference guidance
    is switched on there are the clause "guidance" and one for each of its options that was given,
    "guidance.strength 9", also where that is the default, for a kit may say otherwise. There is no comma, colon or line
    break, so that the host adds no quotation marks and escapes (modules/infotext_utils.py: quote).
    """
    name = adapter if adapter is not None and request.checkpoint == AUTOMATIC else request.checkpoint
    clauses = [request.method]
    if name != AUTOMATIC:
        escaped = re.sub(r'[%;|,()"]|^\s|\s$', lambda found: quote(found[0], safe=""), name)
        clauses.append(f"adapter {escaped}{_CHOSEN if request.checkpoint == AUTOMATIC else ''}")
    one = request.declaration
    clauses += _options_as_text(one.options, request.options)
    if request.guidance.enabled:
        given = request.guidance.options
        said = [option.to_text(given[option.name]) for option in OPTIONS if option.name in given]
        clauses += [_GUIDANCE, *(f"{_GUIDANCE}.{clause}" for clause in said)]
    people = (_identity_as_text(identity, one) for identity in request.identities)
    return " | ".join(["; ".join(clauses), *people])


def _identity_as_text(identity: Identity, one: Declaration) -> str:
    clauses = [_photos_as_text(identity.photos), *_options_as_text(one.identity_options, identity.options)]
    window = {"start": identity.start, "end": identity.end}
    clauses += _options_as_text((START, END, GUIDED), {**window, "guided": identity.guided})
    if identity.region is not None and identity.region.box is not None:
        clauses.append(" ".join(["box", *map(number_as_text, identity.region.box)]))
    if identity.region is not None and identity.region.mask is not None:
        clauses.append(f"mask {_photos_as_text([identity.region.mask])}")
    clauses += [f"mix {number_as_text(mix.weight)} of {_photos_as_text(mix.photos)}" for mix in identity.mix]
    return "; ".join(clauses)


def _options_as_text(options: Sequence[Option], values: Mapping[str, Value]) -> list[str]:
    return [option.to_text(values[option.name]) for option in declared.changed(options, values)]


def _photos_as_text(photos: Sequence[Photo]) -> str:
    return " ".join(
        photo.sha256[:HASH_DIGITS]
        + ("" if photo.face is None else f"#{photo.face}")
        + ("#aligned" if photo.aligned else "")
        for photo in photos
    )


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


def _request_from_text(text: str) -> dict[str, Any]:
    """The request's JSON form from a line of `to_infotext`; what is said in it is left to `parse_request`."""
    common, *people = text.split("|")
    method, clauses = _clauses(common)
    one = declaration(method)
    identities = [_identity_from_text(person, one) for person in people]
    request: dict[str, Any] = {"method": method, "identities": identities}
    guidance: dict[str, Any] = {}
    for name, value in clauses:
        part, _, inner = name.partition(".")
        if name in request or (part == _GUIDANCE and (inner or "enabled") in guidance):
            raise _not_understood(f"{name} {value}")
        if name == _GUIDANCE and not value:
            guidance["enabled"] = True
        elif part == _GUIDANCE and inner:
            guidance[inner] = _option_from_text(OPTIONS, inner, value)
        elif name == "adapter" and "checkpoint" not in request:
            request["checkpoint"] = unquote(value.removesuffix(_CHOSEN))
        else:
            request[name] = _option_from_text(one.options, name, value)
    return {**request, _GUIDANCE: guidance} if guidance else request


def _identity_from_text(text: str, one: Declaration) -> dict[str, Any]:
    photos, clauses = _clauses(text)
    region: dict[str, Any] = {}
    mixes: list[dict[str, Any]] = []
    identity: dict[str, Any] = {"photos": _photos_from_text(photos)}
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
            identity[name] = _option_from_text((*one.identity_options, START, END, GUIDED), name, value)
    if mixes:
        identity["mix"] = mixes
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


def _option_from_text(options: Sequence[Option], name: str, text: str) -> Value:
    option = declared.by_name(options, name)
    try:
        if option is not None:
            return option.from_text(text)
    except ValueError:
        pass
    raise _not_understood(f"{name} {text}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _not_understood(text) from None


def _not_understood(text: str) -> PortraitError:
    return PortraitError("Portrait", f"{shown(text.strip())} in the infotext is not understood", _UNCHANGED)
