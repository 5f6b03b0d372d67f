"""What the panel does with the places of people: boxes, masks, and a picture whose faces become boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lib_portrait.errors import PortraitError
from lib_portrait.request import Photo
from lib_portrait.webui import inputs, instances, messages, panel_photos, panel_values, paste, settings
from lib_portrait.webui.messages import message_html

CANVAS_SIDE = 512


def places_from(file: Any, kept: Sequence[str]) -> list[Any]:
    """Empties the place of the upload, says what was found, and gives everybody in use a box, from the left.

    kept: the stored photos of each tab.
    """
    used = [tab for tab, text in enumerate(kept) if inputs.stored_photos(text, "photos")]
    boxes: dict[int, Any] = {}
    try:
        data = inputs.uploaded_bytes(file, panel_values.CONTROL_NAMES["layout"], settings.limits())
        faces, _ = instances.faces().places(Photo.of(data), panel_values.CONTROL_NAMES["layout"])
        if len(used) > len(faces):
            raise PortraitError(
                panel_values.CONTROL_NAMES["layout"],
                f"it shows {len(faces)} faces, and there are {len(used)} people",
                "Use a picture with as many faces, or leave people out.",
            )
        boxes = dict(zip(used, faces))
        text = f"{len(faces)} faces, given from the left to {len(boxes)} people: change it at each person's Region."
        said = message_html(text, "info")
    except Exception as error:
        said = message_html(messages.said(error).detail)
    found: list[Any] = [None, said]
    for tab in range(len(kept)):
        if tab in boxes:
            inner = [round(min(max(edge, 0.0), 1.0), 3) for edge in boxes[tab]]
            found += [inputs.BOX, inputs.box_to_text(inner)]
        else:
            found += [paste.UNCHANGED, paste.UNCHANGED]
    return found


def box_html(text: str) -> str:
    """A small drawing of the box in the picture, or what is wrong with it."""
    if not str(text or "").strip():
        return ""
    try:
        left, top, right, bottom = (100 * edge for edge in inputs.box_from_text(text, "Box"))
    except PortraitError as error:
        return message_html(error.detail)
    return (
        '<svg class="portrait-box-preview" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        'aria-label="Place of the box in the picture">'
        f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"/></svg>'
    )


def mask_html(kept: str) -> str:
    """The stored mask that is used as long as nothing is painted, or what is wrong with it."""
    if not str(kept or "").strip():
        return ""
    try:
        listed = inputs.stored_photos(kept, "Mask")
        mask = instances.faces().mask(panel_photos.kept_photo(listed[0], settings.limits()), "Mask")
    except Exception as error:
        return message_html(messages.said(error).detail)
    picture = (mask * 255).astype("uint8")
    return (
        f'<figure class="portrait-card"><img src="{panel_photos.jpeg_url(picture)}" alt="Mask in use">'
        "<figcaption>in use unless you paint</figcaption></figure>"
    )


def blank_canvas(size: str) -> Any:
    """A black picture of the aspect ratio of "width x height", to paint a mask on."""
    from PIL import Image

    numbers = [min(max(int(number), 1), 16384) for number in re.findall(r"\d{1,6}", str(size or ""))[:2]]
    width, height = numbers if len(numbers) == 2 else (CANVAS_SIDE, CANVAS_SIDE)
    shrink = CANVAS_SIDE / max(width, height)
    return Image.new("RGB", (max(1, round(width * shrink)), max(1, round(height * shrink))))
