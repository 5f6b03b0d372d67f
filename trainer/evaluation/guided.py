"""Reference guidance as the command line asks for it: its options, and what is swept."""

from __future__ import annotations

import json

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.options import Option, Value, by_name, number_as_text

FIELD, SWEEP = "--reference-guidance", "--sweep"


def guidance_options(text: str) -> dict[str, Value]:
    """The options of reference guidance in "NAME=VALUE,NAME=VALUE" or a JSON object, "" for none.

    Raises PortraitError for ones that there are not, and for values that they do not have.
    """
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise PortraitError(
                FIELD, f"it is no JSON ({error})", 'Write {"strength": 0.3}, or strength=0.3.'
            ) from None
        return {name: _option(name, FIELD).check(value, f"{FIELD} {name}") for name, value in given.items()}
    chosen = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        chosen[name.strip()] = _value(_option(name.strip(), FIELD), value.strip(), FIELD)
    return chosen


def swept(text: str) -> tuple[str, tuple[Value, ...]]:
    """The option of reference guidance and its values, in "NAME=VALUE,VALUE". Raises PortraitError as above, and where
    a value is missing or stands there twice."""
    name, _, listed = text.partition("=")
    option = _option(name.strip(), SWEEP)
    values = tuple(_value(option, value.strip(), SWEEP) for value in listed.split(",") if value.strip())
    if not values or len(set(values)) < len(values):
        problem = f"{text!r} has a value twice" if values else f"{text!r} has no values"
        raise PortraitError(SWEEP, problem, "Write NAME=VALUE,VALUE: strength=0.1,0.2,0.4.")
    return option.name, values


def value_said(value: Value) -> str:
    """A value as it stands in tables and plots."""
    return number_as_text(value) if isinstance(value, float) else str(value)


def _option(name: str, field: str) -> Option:
    option = by_name(OPTIONS, name)
    if option is None:
        known = ", ".join(one.name for one in OPTIONS)
        raise PortraitError(field, f"{name!r} is no option of reference guidance", f"There are: {known}.")
    return option


def _value(option: Option, text: str, field: str) -> Value:
    try:
        value = option.from_text(text)
    except ValueError:
        raise PortraitError(f"{field} {option.name}", f"{text!r} is no value of it", f"{option.help}.") from None
    return option.check(value, f"{field} {option.name}")
