"""What a method lets people choose, declared once: the panel, the API's schema, the command line, the axes of the X/Y/Z
plot and the infotext are all made of these.

In JSON an option is a key of the request, or of an identity, under its own name. In an infotext it is a clause: its
name, a space, and its value. Everything here is standard library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_portrait.errors import PortraitError

Value = float | str | bool

NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class _Declared:
    """name: in requests, infotexts and, with dashes, on the command line. title: in the panel. help: a clause on it.

    axis: what the X/Y/Z plot calls it, "" for no axis. One of identities is an axis for all of them, or, with
    ``{number}`` in it, one for each.
    """

    name: str
    title: str
    help: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} cannot be an option's name")


@dataclass(frozen=True)
class Number(_Declared):
    """A finite number in [low, high]. unit: that it is counted in, "" for none. whole: without a fraction."""

    default: float
    low: float
    high: float
    unit: str = ""
    axis: str = ""
    whole: bool = False

    def check(self, value: Any, path: str) -> float:
        """The value, once it is known to be one. Raises PortraitError naming `path`."""
        number = finite(value, path, self.low, self.high)
        if self.whole and not number.is_integer():
            remedy = f"Give a whole number from {self.low:g} to {self.high:g}."
            raise PortraitError(path, f"{shown(value)} is no whole number", remedy)
        return number

    def schema(self) -> dict[str, Any]:
        """Its JSON Schema."""
        kind = "integer" if self.whole else "number"
        limits = {"type": kind, "minimum": self.low, "maximum": self.high, "default": self.default}
        return {**limits, "description": f"{self.help}, in {self.unit}" if self.unit else self.help}

    def said(self, value: Value) -> str:
        """The value in words for people, "" for nothing to say."""
        return f"{self.title} {value:g}"

    def to_text(self, value: Value) -> str:
        """The clause that says the value in an infotext."""
        return f"{self.name} {number_as_text(float(value))}"

    def from_text(self, text: str) -> float:
        """The value from what stands behind the name in a clause. Raises ValueError; limits are left to `check`."""
        return float(text)


@dataclass(frozen=True)
class Choice(_Declared):
    """One of several. choices: what the panel calls each, by its value; values are words as names are."""

    default: str
    choices: Mapping[str, str]
    axis: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.default not in self.choices or not all(map(NAME.fullmatch, self.choices)):
            raise ValueError(f"{self.name!r} cannot choose among {', '.join(self.choices)}")

    def check(self, value: Any, path: str) -> str:
        """As for `Number`."""
        if not isinstance(value, str) or value not in self.choices:
            raise PortraitError(path, f"{shown(value)} is no choice", f"Use one of: {', '.join(self.choices)}.")
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices), "default": self.default, "description": self.help}

    def said(self, value: Value) -> str:
        return f"{self.title} {self.choices[str(value)]}"

    def to_text(self, value: Value) -> str:
        return f"{self.name} {value}"

    def from_text(self, text: str) -> str:
        return text


@dataclass(frozen=True)
class Switch(_Declared):
    """On or off."""

    default: bool = False
    axis: str = ""

    def check(self, value: Any, path: str) -> bool:
        """As for `Number`."""
        return boolean(value, path)

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean", "default": self.default, "description": self.help}

    def said(self, value: Value) -> str:
        return self.title if value else ""

    def to_text(self, value: Value) -> str:
        """Its name alone where it is on."""
        return self.name if value else f"{self.name} off"

    def from_text(self, text: str) -> bool:
        if text not in ("", "on", "off"):
            raise ValueError(f"{text!r} is neither on nor off")
        return text != "off"


@dataclass(frozen=True)
class Word(_Declared):
    """A word, or a few, as they stand in a prompt; "" for none."""

    default: str = ""
    axis: str = ""

    # Neither what divides an infotext nor what a prompt's syntax consists of.
    LENGTH = 40
    PATTERN = r'[^;|,:()\[\]{}<>"\\\x00-\x1f\x7f]*'

    def check(self, value: Any, path: str) -> str:
        """As for `Number`; spaces around it are taken off."""
        if not isinstance(value, str) or len(value) > self.LENGTH or not re.fullmatch(self.PATTERN, value):
            remedy = (
                f"Give a word as it stands in the prompt, of up to {self.LENGTH} letters, without brackets or marks."
            )
            raise PortraitError(path, f"{shown(value)} is no word", remedy)
        return value.strip()

    def schema(self) -> dict[str, Any]:
        limits = {"type": "string", "maxLength": self.LENGTH, "pattern": f"^{self.PATTERN}$"}
        return {**limits, "default": self.default, "description": self.help}

    def said(self, value: Value) -> str:
        return f"{self.title} {value}" if value else ""

    def to_text(self, value: Value) -> str:
        return f"{self.name} {value}"

    def from_text(self, text: str) -> str:
        return text


Option = Number | Choice | Switch | Word


def defaults(options: Sequence[Option]) -> dict[str, Value]:
    """The value of each option that is not given, by name."""
    return {option.name: option.default for option in options}


def changed(options: Sequence[Option], values: Mapping[str, Value]) -> list[Option]:
    """The options whose values are not the default ones."""
    return [option for option in options if values[option.name] != option.default]


def by_name(options: Sequence[Option], name: str) -> Option | None:
    """The option of that name, None where there is none."""
    return next((option for option in options if option.name == name), None)


# --------------------------------------------------------------------------------------------------------------- values


def finite(value: Any, path: str, low: float, high: float) -> float:
    """The value, once it is known to be a number in [low, high]. Raises PortraitError naming `path`."""
    remedy = f"Give a number from {low:g} to {high:g}."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PortraitError(path, f"{shown(value)} is no number", remedy)
    # The comparison is false for NaN, so NaN and both infinities are refused here; huge integers never become floats.
    if not low <= value <= high:
        raise PortraitError(path, f"{shown(value)} is out of range", remedy)
    return float(value)


def boolean(value: Any, path: str) -> bool:
    """The value, once it is known to be true or false. Raises PortraitError naming `path`."""
    if not isinstance(value, bool):
        raise PortraitError(path, f"{shown(value)} is neither true nor false", "Give true or false.")
    return value


def number_as_text(value: float) -> str:
    """The shortest text that is read back as exactly this number."""
    return repr(value).removesuffix(".0")


def shown(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
