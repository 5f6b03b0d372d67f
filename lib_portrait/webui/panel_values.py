"""The panel's positional values and the request's JSON form, each from the other.

The order of the values is also that of ``alwayson_scripts.Portrait.args`` where it is given as a list: GLOBAL_FIELDS,
then IDENTITY_FIELDS once for each identity. So it was when there was one method, and its options stand among them. One
control more follows, that a list may not reach (`divided`), and behind it those of the options of all other methods and
of reference guidance (`further_controls`), which lists do not have: requests with these are sent as objects. It needs
neither gradio nor the host, so that both are tested without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_portrait.checkpoints.store import MissingWeights
from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods import declarations
from lib_portrait.methods.declarations import Declaration, declaration
from lib_portrait.options import by_name, defaults
from lib_portrait.request import (
    LARGEST,
    Identity,
    Limits,
    Mix,
    PortraitRequest,
    Region,
)
from lib_portrait.webui import inputs

DEFAULT = declaration(declarations.NAMES[0])
GLOBAL_FIELDS = ("enabled", "method", "checkpoint", *(option.name for option in DEFAULT.options))
# `uploads` are files that gradio took and the panel has not stored yet; `photos` is the JSON list of stored ones, each
# with the face chosen on it. `face` and `aligned` count for photos without one of their own: not in the panel, but in
# positional lists that are sent.
IDENTITY_FIELDS = (
    "uploads",
    "photos",
    "face",
    "aligned",
    *(option.name for option in DEFAULT.identity_options),
    "start",
    "end",
    "region",
    "box",
    "drawing",
    "mask",
    "mix1_uploads",
    "mix1_photos",
    "mix1_weight",
    "mix2_uploads",
    "mix2_photos",
    "mix2_weight",
)
MIXES = ("mix1", "mix2")
# The value of the control after the last: the host cuts off without a word what comes later still.
NOTHING_BEYOND = ""

INCOMPLETE = " (files missing)"
DOWNLOAD_NAME = "Download missing weights"
# What the panel calls the fields of a request, where that is not their own name; options have titles.
CONTROL_NAMES = {
    "enabled": "Enable",
    "method": "Method",
    "checkpoint": "Checkpoint",
    "identities": "Identities",
    "guidance": "Reference guidance",
    "layout": "Places from a picture",
}
IDENTITY_CONTROL_NAMES = {"mix": "mixed-in people", "weight": "share"}


@dataclass(frozen=True)
class Control:
    """One control of the panel by the field that it is for.

    tab: of its identity, from 1; None where it is for all. method: which one's option it is, None where it has a place
    among GLOBAL_FIELDS or IDENTITY_FIELDS. guidance: whether it is one of reference guidance.
    """

    name: str
    tab: int | None = None
    method: str | None = None
    guidance: bool = False

    def concerns(self, method: Declaration) -> bool:
        """Whether it says something in a request of this method."""
        if self.guidance:
            return True
        if self.method is not None:
            return self.method == method.name
        if self.tab is None and self.name == "checkpoint":
            return method.has_adapter
        own = DEFAULT.options if self.tab is None else DEFAULT.identity_options
        return method.name == DEFAULT.name or by_name(own, self.name) is None


BEYOND = Control("beyond")


def controls(identities: int) -> list[Control]:
    """Those whose values the panel sends, in order."""
    own = [Control(name) for name in GLOBAL_FIELDS]
    own += [Control(name, tab) for tab in range(1, identities + 1) for name in IDENTITY_FIELDS]
    return [*own, BEYOND, *further_controls(identities)]


def further_controls(identities: int) -> list[Control]:
    """Those of the options of all methods but the default one, for each method first the ones for all, and those of
    reference guidance."""
    found = []
    for one in declarations.declarations()[1:]:
        found += [Control(option.name, None, one.name) for option in one.options]
        for tab in range(1, identities + 1):
            found += [Control(option.name, tab, one.name) for option in one.identity_options]
    found += [Control(name, guidance=True) for name in ("enabled", *(option.name for option in OPTIONS))]
    return found + [Control(GUIDED.name, tab, guidance=True) for tab in range(1, identities + 1)]


# ------------------------------------------------------------------------------------------------- values to request


def request_from_values(
    values: Sequence[Any], limits: Limits | None = None, further: Mapping[Control, Any] | None = None
) -> dict[str, Any] | None:
    """The request's JSON form from the panel's values, or None where Portrait is disabled.

    values: up to the last identity's. values[0] may be the request itself, as an object: it is returned as it is, to be
    checked by `parse_request`. further: those of `further_controls`. None stands for a control's default. Only controls
    that concern the chosen method are read. An identity without any photo is not in use and is left out; one that only
    has people mixed in is kept, so that checking says what it lacks. Raises PortraitError where no identity is in use,
    and for uploads, boxes and masks that cannot be read; everything else is left to `parse_request`.
    """
    limits = limits or Limits()
    if not values:
        return None
    if isinstance(values[0], Mapping):
        return values[0]  # type: ignore[return-value]
    if values[0] is None or values[0] is False:
        return None
    method = method_of(values)
    options = _options_for_all(values, method, further or {})
    request: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(request.get("checkpoint"), str):
        request["checkpoint"] = request["checkpoint"].removesuffix(INCOMPLETE)
    guidance = {one.name: value for one, value in (further or {}).items() if one.guidance and one.tab is None}
    if any(value is not None for value in guidance.values()):
        # Also where it is switched off: an axis of a plot may switch it on.
        given = {name: value for name, value in guidance.items() if value is not None}
        request["guidance"] = {"enabled": False, **given}
    used = list(_blocks(values, method, further or {}))
    if not used:
        raise PortraitError("Identities", "there is no person", "Add a photo to Identity 1, or untick Enable.")
    request["identities"] = [
        _identity(block, method, f"identities[{index}]", limits) for index, (_, block) in enumerate(used)
    ]
    return request


def method_of(values: Sequence[Any]) -> Declaration:
    """The method that is chosen in the panel, or that a request object names; the default one where none is, or one
    that is not known."""
    asked: Any = None
    if values and isinstance(values[0], Mapping):
        asked = values[0].get("method")
    elif len(values) > 1:
        asked = _method_name(values[1])
    return next((one for one in declarations.declarations() if one.name == asked), DEFAULT)


def _method_name(chosen: Any) -> Any:
    """The name of the method that the panel calls like this, in any case; what is none's title as it is."""
    titles = {one.title.lower(): one.name for one in declarations.declarations()}
    return titles.get(chosen.lower(), chosen) if isinstance(chosen, str) else chosen


def _options_for_all(values: Sequence[Any], method: Declaration, further: Mapping[Control, Any]) -> dict[str, Any]:
    found = dict(zip(GLOBAL_FIELDS, values, strict=False))
    found["method"] = _method_name(found.get("method"))
    found = {name: value for name, value in found.items() if Control(name).concerns(method)}
    return found | _further(method, None, further)


def _further(method: Declaration, tab: int | None, further: Mapping[Control, Any]) -> dict[str, Any]:
    # Reference guidance has a part of the request of its own; only who is guided stands among what identities have.
    return {
        one.name: value
        for one, value in further.items()
        if one.tab == tab and one.concerns(method) and not (one.guidance and tab is None)
    }


def divided(values: Sequence[Any]) -> tuple[Sequence[Any], dict[Control, Any]]:
    """All that the panel sends, without what must be NOTHING_BEYOND: the values up to the last identity's, and those of
    further controls. Raises PortraitError where something else is there, or something beside a request object: none of
    it would be looked at."""
    several = 'Put all people into the list "identities" of one object: {"identities": [{...}, {...}]}.'
    if values and isinstance(values[0], Mapping):
        for index, value in enumerate(values):
            if index and isinstance(value, (Mapping, list)):
                raise PortraitError(f"args[{index}]", "one request object is all that args may hold", several)
        return values, {}
    alone, each = len(controls(0)), len(controls(1)) - len(controls(0))
    people = (len(values) - alone) // each
    end = len(GLOBAL_FIELDS) + people * len(IDENTITY_FIELDS)
    if values[end] != NOTHING_BEYOND:
        raise PortraitError(
            f"args[{end}]",
            f"the list is longer than the panel, which has {people} people",
            f"Leave people out, raise the number in Settings > Portrait, or give one object. {several}",
        )
    return values[:end], dict(zip(further_controls(people), values[end + 1 :]))


def read_form(values: Sequence[Any], limits: Limits) -> tuple[Sequence[int], dict[str, Any] | None]:
    """The panel's tabs in use and the request's JSON form, None where it is switched off: nothing of it is read then.

    values: all that the panel sends. Raises PortraitError in the panel's words.
    """
    own, further = divided(values)
    try:
        form = request_from_values(own, limits, further)
    except PortraitError as error:
        raise said_in_panel(error, tabs_in_use(own), method_of(own)) from None
    if form is None or form.get("enabled") is False:
        return (), None
    return tabs_in_use(own), form


def tabs_in_use(values: Sequence[Any]) -> list[int]:
    """Which tabs of the panel, from 1, the identities of `request_from_values` come from; [] for a request object."""
    if not values or isinstance(values[0], Mapping):
        return []
    return [tab for tab, _ in _blocks(values, method_of(values), {})]


def _blocks(
    values: Sequence[Any], method: Declaration, further: Mapping[Control, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The controls, by name, of each tab (counted from 1) that is in use: that has a photo, of its own or mixed in."""
    width = len(IDENTITY_FIELDS)
    slots = ("", *(f"{slot}_" for slot in MIXES if method.mixes))
    for tab, first in enumerate(range(len(GLOBAL_FIELDS), len(values), width), 1):
        block: dict[str, Any] = dict.fromkeys(IDENTITY_FIELDS)
        block.update(zip(IDENTITY_FIELDS, values[first : first + width], strict=False))
        if any(_any_photo(block[f"{slot}photos"], block[f"{slot}uploads"]) for slot in slots):
            yield tab, block | _further(method, tab, further)


def _any_photo(stored: Any, uploads: Any) -> bool:
    """Whether there is a photo, or what has to be refused as one."""
    try:
        kept = inputs.stored_photos(stored, "")
    except PortraitError:
        return True
    return any(photo is not None for photo in kept) or any(
        upload not in (None, "") for upload in inputs.listed(uploads)
    )


_COUNTED = {"photos": "photo", "mix": "mixed-in person"}


def said_of_tab(field: str, tabs: Sequence[int], method: Declaration = DEFAULT) -> str:
    """A request's field as the panel names it: ``identities[0].photos[1]`` of tab 2 is "Identity 2, photo 2".

    tabs: as `tabs_in_use` gives them. Without any the field is returned as it is: a request object has keys of its own.
    method: whose options have their titles.
    """
    if not tabs:
        return field
    match = re.fullmatch(r"identities\[(\d+)\](.*)", field)
    if match is None:
        part, _, inner = field.partition(".")
        if part == "guidance":
            option = by_name(OPTIONS, inner)
            return CONTROL_NAMES[part] + (f", {option.title[:1].lower()}{option.title[1:]}" if option else "")
        option = by_name(method.options, field)
        return CONTROL_NAMES.get(field, field) if option is None else option.title
    if int(match.group(1)) >= len(tabs):
        return field
    said = [f"Identity {tabs[int(match.group(1))]}"]
    for name, index in re.findall(r"\.(\w+)(?:\[(\d+)\])?", match.group(2)):
        if index:
            said.append(f"{_COUNTED.get(name, name)} {int(index) + 1}")
        elif name != "image":
            option = by_name((*method.identity_options, GUIDED), name)
            title = IDENTITY_CONTROL_NAMES.get(name, name) if option is None else option.title
            said.append(title[:1].lower() + title[1:])
    return ", ".join(said)


def said_in_panel(error: PortraitError, tabs: Sequence[int], method: Declaration = DEFAULT) -> PortraitError:
    """An error as the panel says it: by the names of its controls, and with what there is to press as the remedy.

    tabs, method: as for `said_of_tab`.
    """
    if not tabs:
        return error
    field, problem, remedy = said_of_tab(error.field, tabs, method), error.problem, error.remedy
    if isinstance(error, NoSuchFace):
        field = field.removesuffix(", face")
        there = "there is one face" if error.found == 1 else f"there are {error.found} faces"
        problem = f"the {inputs.ordinal(error.face + 1)} face from the left was chosen, but {there}"
        remedy = "Click the face that is meant below the photo."
    elif isinstance(error, MissingWeights):
        files = ", ".join(gap.filename for gap in error.gaps)
        several = f"several people need its {error.gaps[0].role}, " if error.gaps[0].people > 1 else ""
        problem = f"{several}weights of {error.adapter!r} are missing: {files}"
        commands = dict.fromkeys(gap.known.command for gap in error.gaps if gap.known)
        if commands:
            # The folders stand beside the button.
            remedy = f"Press {DOWNLOAD_NAME} in the Portrait panel, or run: {', '.join(commands)}."
    return PortraitError(field, problem, remedy, error.status_code)


def _identity(block: Mapping[str, Any], method: Declaration, path: str, limits: Limits) -> dict[str, Any]:
    photos = inputs.photo_list(block["photos"], block["uploads"], f"{path}.photos", limits)
    controls: dict[str, Any] = {}
    if (face := inputs.chosen_face(block["face"])) != LARGEST:
        controls["face"] = face
    if block["aligned"] not in (None, False):
        controls["aligned"] = block["aligned"]
    if controls:
        photos = [{"image": photo, **controls} if isinstance(photo, str) else photo for photo in photos]
    mixes: list[dict[str, Any]] = []
    for slot in MIXES if method.mixes else ():
        at = f"{path}.mix[{len(mixes)}].photos"
        found = inputs.photo_list(block[f"{slot}_photos"], block[f"{slot}_uploads"], at, limits)
        if found:
            mix: dict[str, Any] = {"photos": found}
            if block[f"{slot}_weight"] is not None:
                mix["weight"] = block[f"{slot}_weight"]
            mixes.append(mix)
    identity: dict[str, Any] = {"photos": photos}
    for name in (*(option.name for option in method.identity_options), "start", "end", GUIDED.name):
        if block.get(name) is not None:
            identity[name] = block[name]
    region = inputs.region(block, f"{path}.region", limits)
    if region is not None:
        identity["region"] = region
    if mixes:
        identity["mix"] = mixes
    return identity


# ------------------------------------------------------------------------------------------------- request to values


def values_from_request(request: PortraitRequest, identities: int) -> tuple[list[Any], list[str]]:
    """The panel's values for a request, in the order of `controls`, and what of it the panel has no place for.

    identities: how many the panel has. `read_form` of the result gives the request again, except for what the second
    value says. Photos are named by hash; uploads and drawings are None. Controls that do not concern the request's
    method have their defaults.
    """
    lost: list[str] = []
    if len(request.identities) > identities:
        lost.append(
            f"It has {len(request.identities)} people, this panel {identities}; the others are left out. "
            "Raise the number in Settings > Portrait."
        )
    if request.layout is not None:
        lost.append(f"It takes places from a picture; put that into {CONTROL_NAMES['layout']} again.")
    for index, identity in enumerate(request.identities[:identities]):
        if len(identity.mix) > len(MIXES):
            text = f"Identity {index + 1} mixes {len(identity.mix)} people, this panel {len(MIXES)}; "
            lost.append(text + "the others are left out.")
    one = request.declaration
    for_all: dict[str, Any] = {
        "enabled": request.enabled,
        "method": one.title,
        "checkpoint": request.checkpoint,
        BEYOND.name: NOTHING_BEYOND,
    }
    people = [*request.identities[:identities], *[None] * (identities - len(request.identities))]
    blocks = [identity_values(identity) for identity in people]
    values = []
    for control in controls(identities):
        owner = declaration(control.method) if control.method is not None else DEFAULT
        person = people[control.tab - 1] if control.tab is not None else None
        if control.guidance:
            for_all_guided = {"enabled": request.guidance.enabled, **request.guidance.values({})}
            of_person = {GUIDED.name: person.guided if person is not None else GUIDED.default}
            values.append((for_all_guided if control.tab is None else of_person)[control.name])
            continue
        if control.tab is None:
            given = {**for_all, **defaults(owner.options)}
            chosen = request.options
        else:
            given = {**blocks[control.tab - 1], **defaults(owner.identity_options)}
            chosen = person.options if person is not None else {}
        values.append({**given, **(chosen if control.concerns(one) else {})}[control.name])
    return values, lost


def identity_values(identity: Identity | None) -> dict[str, Any]:
    """The values of one identity's controls by name (IDENTITY_FIELDS); the defaults for None, and for what its options
    do not say."""
    identity = identity or Identity(photos=())
    region = identity.region or Region()
    block: dict[str, Any] = {
        "uploads": None,
        "photos": inputs.stored_text([inputs.stored_photo(photo) for photo in identity.photos]),
        "face": inputs.LARGEST_NAME,
        "aligned": False,
        **defaults(DEFAULT.identity_options),
        **identity.options,
        "start": identity.start,
        "end": identity.end,
        "region": inputs.BOX if region.box else inputs.MASK if region.mask else inputs.ROUTED,
        "box": inputs.box_to_text(region.box) if region.box else "",
        "drawing": None,
        "mask": inputs.stored_text([inputs.stored_photo(region.mask)]) if region.mask else "",
    }
    for slot, name in enumerate(MIXES):
        mix = identity.mix[slot] if slot < len(identity.mix) else Mix(photos=())
        block[f"{name}_uploads"] = None
        block[f"{name}_photos"] = inputs.stored_text([inputs.stored_photo(photo) for photo in mix.photos])
        block[f"{name}_weight"] = mix.weight
    return block
