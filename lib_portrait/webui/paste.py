"""From the "Portrait" key of pasted generation parameters back to the panel.

The host calls one function per control with all parameters of the infotext, both for "send to" and paste buttons and
for the API's `infotext`. Infotext comes from anywhere: nothing here raises, and nothing of it is used unchecked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from lib_portrait.errors import PortraitError
from lib_portrait.infotext import from_infotext
from lib_portrait.request import Limits, Photo, with_photos
from lib_portrait.webui.messages import message_html
from lib_portrait.webui.panel_values import controls, said_in_panel, values_from_request

INFOTEXT_KEY = "Portrait"
# What earlier versions wrote of sixteen people with thirty-two photos each has some 50,000 characters.
LONGEST = 400_000
MANY = 1000

# What `gr.update()` makes.
UNCHANGED = {"__type__": "generic_update"}
# In place of the value of a control that does not concern the pasted request's method.
LEFT = object()

Reader = Callable[[Mapping[str, Any]], Any]
# From a photo named by the first digits of its hash to the same one by its whole hash.
Named = Callable[[Photo], Photo]


@functools.lru_cache(maxsize=4)
def pasted_values(text: str, identities: int, named: Named) -> tuple[tuple[Any, ...] | None, str]:
    """The panel's values for an infotext's "Portrait" value, or None where it is unusable; and a message, or "".

    They are LEFT where a control does not concern its method.

    The message says why nothing, or not everything, could be restored.
    """
    if len(text) > LONGEST:
        return None, "Portrait was not restored: its part of the generation parameters is too long."
    try:
        # Not the limits of this installation: what was made elsewhere with more people is shown as far as it fits.
        request = from_infotext(text, dataclasses.replace(Limits(), identities=MANY, photos=MANY))
    except PortraitError as error:
        said = said_in_panel(error, range(1, MANY + 1))
        return None, f"Portrait was not restored. {said.detail}"
    # The panel tells by whole hashes which photos it has already.
    values, lost = values_from_request(with_photos(request, named), identities)
    placed = zip(controls(identities), values, strict=True)
    one = request.declaration
    return tuple(value if control.concerns(one) else LEFT for control, value in placed), " ".join(lost)


def _read(params: Mapping[str, Any], identities: int, named: Named) -> tuple[tuple[Any, ...] | None, str] | None:
    text = params.get(INFOTEXT_KEY)
    return pasted_values(text, identities, named) if isinstance(text, str) and text else None


def field_update(params: Mapping[str, Any], position: int, identities: int, named: Named) -> dict[str, Any] | None:
    """The update of the control at a position of the panel's values; None leaves it as it is.

    A picture made without Portrait, or with a request that cannot be read, switches Portrait off and changes nothing
    else, so that the other settings of the panel are not lost.
    """
    read = _read(params, identities, named)
    if read is None or read[0] is None:
        return _update(False) if position == 0 else None
    return None if read[0][position] is LEFT else _update(read[0][position])


def message_update(params: Mapping[str, Any], identities: int, named: Named) -> dict[str, Any]:
    """The update of the panel's message after pasting."""
    read = _read(params, identities, named)
    return _update(message_html(read[1]) if read is not None and read[1] else "")


def _update(value: Any) -> dict[str, Any]:
    """What `gr.update(value=value)` makes. The API reads a value only from this generic form."""
    return {**UNCHANGED, "value": value}


@functools.cache
def reader(position: int, identities: int, named: Named) -> Reader:
    """The host's paste function for a control. The same object each time: "send to" buttons find fields by it."""
    return lambda params: field_update(params, position, identities, named)


def sendable(name: str) -> bool:
    """Whether a field can be copied from tab to tab: files and sketches are no values that gradio takes back."""
    return not (name.endswith("uploads") or name == "drawing")
