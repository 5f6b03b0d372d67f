"""Axes of the host's "X/Y/Z plot" script, and how their values get into a request."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.methods.declarations import Declaration, declarations
from lib_portrait.options import Choice, Option, Switch, Word

# Where the axes leave their values on the host's processing object, for the session to merge into the request.
ATTRIBUTE = "portrait_overrides"
PREFIX = "[Portrait]"
# The values of an axis of a switch.
SWITCHED = {"on": True, "off": False}

_KEY = re.compile(r"(?:identities\[(\d+|\*)\]\.|(guidance)\.)?(\w+)")
_SWITCH = "guidance.enabled"


def apply_overrides(
    request: Mapping[str, Any], overrides: Mapping[str, Any], tabs: Sequence[int] = ()
) -> dict[str, Any]:
    """A request's JSON form with values put in its place; the request given is not changed.

    overrides: value by key: ``name``, ``identities[0].name``, ``identities[*].name`` (all of them) or
    ``guidance.name``. Values are checked by `parse_request` afterwards. tabs: where the request comes from the panel,
    the tab (from 1) of each identity; identities are then counted as the panel does, empty tabs included. Raises
    PortraitError for an identity that the request does not have, and for options of reference guidance where that is
    switched off: all cells would be the same.
    """
    changed = dict(request)
    for key, value in overrides.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PortraitError(str(key)[:200], "this is no key of a request", "Use a name, or identities[0].name.")
        which, part, name = match.groups()
        if part is not None:
            inner = changed.get(part, {"enabled": False})
            if isinstance(inner, Mapping):
                if inner.get("enabled", True) is False and _SWITCH not in overrides:
                    remedy = "Switch reference guidance on; an axis of its own may switch it off in some cells."
                    raise PortraitError(key, "reference guidance is switched off", remedy)
                changed[part] = {**inner, name: value}
            continue
        if which is None:
            changed[name] = value
            continue
        # Faults in the shape of the request are left for parse_request, which names them.
        identities = changed.get("identities", [])
        if not isinstance(identities, (list, tuple)) or not all(isinstance(item, Mapping) for item in identities):
            continue
        chosen = list(range(len(identities)))
        if which != "*":
            chosen = [index for index in chosen if (tabs[index] - 1 if tabs else index) == int(which)]
        if which != "*" and not chosen:
            count = f"the request has {len(identities)} {'identity' if len(identities) == 1 else 'identities'}"
            field, problem = (f"Identity {int(which) + 1}", "it has no photos") if tabs else (key, count)
            raise PortraitError(field, problem, "Add a person in the panel, or use another axis.")
        changed["identities"] = [
            {**item, name: value} if index in chosen else item for index, item in enumerate(identities)
        ]
    return changed


def register() -> None:
    """Adds the axes to the host's X/Y/Z plot script, once; for the host's `on_before_ui`.

    Called again after the settings changed, it adds what is missing.
    """
    from modules import scripts

    from lib_portrait.webui import settings

    for data in scripts.scripts_data:
        if Path(data.path).name == "xyz_grid.py" and hasattr(data.module, "axis_options"):
            present = {option.label for option in data.module.axis_options}
            wanted = _options(data.module, settings.limits().identities)
            data.module.axis_options.extend(option for option in wanted if option.label not in present)


def _options(xyz: Any, identities: int) -> list[Any]:
    """The axes for a number of identities; `xyz` is the host's xyz_grid module."""

    def axis(name: str, kind: type, key: str, **options: Any) -> Any:
        return xyz.AxisOption(f"{PREFIX} {name}", kind, _setter(key), confirm=_checker(key), **options)

    def of(one: Declaration, option: Option, key: str, label: str) -> Any:
        # Those of the default method have had their labels since it was the only one.
        return plain(option, key, label if one is default else f"{one.title}: {label}")

    def plain(option: Option, key: str, label: str) -> Any:
        if isinstance(option, Switch):
            return axis(label, str, key, choices=lambda: list(SWITCHED))
        if isinstance(option, Choice):
            return axis(label, str, key, choices=lambda: list(option.choices))
        return axis(label, str if isinstance(option, Word) else float, key)

    def checkpoints() -> list[str]:
        from lib_portrait.webui import instances

        return list(instances.store().names())

    def of_guidance() -> list[Any]:
        switch = axis("Reference guidance", str, _SWITCH, choices=lambda: list(SWITCHED))
        return [switch, *(plain(option, f"guidance.{option.name}", option.axis) for option in OPTIONS if option.axis)]

    default, *_ = methods = declarations()
    # The cost makes the host vary it in the outermost loop: weights are read from disk when it changes.
    found = [axis("Checkpoint", str, "checkpoint", cost=0.5, choices=checkpoints)]
    for one in methods:
        found += [of(one, option, option.name, option.axis) for option in one.options if option.axis]
        for option in one.identity_options:
            numbers = range(identities) if "{number}" in option.axis else ("*",) if option.axis else ()
            for number in numbers:
                label = option.axis if number == "*" else option.axis.format(number=int(number) + 1)
                found.append(of(one, option, f"identities[{number}].{option.name}", label))
    return found + of_guidance()


def _setter(key: str) -> Callable[[Any, Any, Sequence[Any]], None]:
    def apply(p: Any, value: Any, values: Sequence[Any]) -> None:
        # Each cell of the plot has a shallow copy of one processing object: the mapping must not be shared.
        setattr(p, ATTRIBUTE, {**getattr(p, ATTRIBUTE, {}), key: SWITCHED.get(value, value)})

    return apply


def _checker(key: str) -> Callable[[Any, Sequence[Any]], None]:
    """What the host calls with an axis's values before the plot starts: in a cell it would print faults and go on."""

    def confirm(p: Any, values: Sequence[Any]) -> None:
        from lib_portrait.webui import session

        session.check_axis(p, [{key: SWITCHED.get(value, value)} for value in values])

    return confirm
