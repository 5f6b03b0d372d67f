"""What single controls of the panel hold, and what API users put in their place: faces, photos, boxes and masks.

It needs neither gradio nor the host.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lib_portrait.errors import PortraitError
from lib_portrait.request import HASH_PREFIX, LARGEST, Limits, Photo

ROUTED, BOX, MASK = "automatic", "box", "mask"
REGION_NAMES = {ROUTED: "Automatic routing", BOX: "Box", MASK: "Drawn mask"}
LARGEST_NAME = "Largest"
FACE_CHOICES = 12
# Painted masks that are at least this close to grey count as masks; coloured pictures are photos to paint on.
GREY_TOLERANCE = 24


# ----------------------------------------------------------------------------------------------------- faces and photos


def face_name(index: int | None) -> str:
    """What the panel calls a face: the largest, or the one at `index` counted from the left from 0."""
    if index is None:
        return LARGEST_NAME
    return f"{ordinal(index + 1)} from left"


def ordinal(count: int) -> str:
    """1st, 2nd, 3rd, 4th..."""
    suffix = "th" if 10 <= count % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{suffix}"


def face_choices() -> list[str]:
    return [face_name(None), *(face_name(index) for index in range(FACE_CHOICES))]


def chosen_face(value: Any) -> Any:
    """The request's `face` from the panel's words; what is neither is passed on for `parse_request` to refuse."""
    if value is None or value == "" or value == LARGEST_NAME:
        return LARGEST
    match = re.fullmatch(r"(\d{1,4})(?:st|nd|rd|th) from left", value) if isinstance(value, str) else None
    return int(match.group(1)) - 1 if match else value


def photo_list(stored: Any, uploads: Any, path: str, limits: Limits) -> list[Any]:
    """Photos in the request's JSON form: those stored first, then uploads that are not among them yet."""
    photos = [photo for photo in stored_photos(stored, path) if photo is not None]
    known = {photo["image"] if isinstance(photo, Mapping) else photo for photo in photos if _is_photo(photo)}
    for upload in listed(uploads):
        if isinstance(upload, str) or upload is None or not hasattr(upload, "name"):
            photos += [] if upload in (None, "") else [upload]
            continue
        data = uploaded_bytes(upload, f"{path}[{len(photos)}]", limits)
        if HASH_PREFIX + hashlib.sha256(data).hexdigest() not in known:
            photos.append(base64.b64encode(data).decode("ascii"))
    return photos


def _is_photo(photo: Any) -> bool:
    return isinstance(photo, str) or (isinstance(photo, Mapping) and isinstance(photo.get("image"), str))


def listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def stored_photos(stored: Any, path: str) -> list[Any]:
    """The photos of a panel's textbox (a JSON list), or of what an API user put in its place: strings, objects, lists.

    Raises PortraitError where a text begins like JSON and is none.
    """
    if isinstance(stored, str):
        text = stored.strip()
        if not text:
            return []
        if text[0] not in "[{":
            return [text]
        try:
            stored = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            raise PortraitError(
                path, "the list of photos cannot be read", "Remove this person's photos, then add them."
            ) from None
    return listed(stored)


def uploaded_bytes(upload: Any, path: str, limits: Limits) -> bytes:
    """The bytes of a file that gradio took from a browser.

    gradio 3 copies whatever path a client names into its own folder and remembers the name as `orig_name`, so both are
    held against that folder: no request may have this process read another file. Raises PortraitError.
    """
    root = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()
    names = [Path(str(upload.name))]
    original = str(getattr(upload, "orig_name", "") or "")
    if "/" in original or "\\" in original:
        names.append(Path(original))
    if not all(name.resolve().is_relative_to(root) for name in names):
        raise PortraitError(
            path, "the file was not uploaded here", "Upload the photo in the panel, or send it as base64."
        )
    try:
        size = names[0].stat().st_size
        if size <= limits.photo_bytes:
            return names[0].read_bytes()
    except OSError:
        raise PortraitError(path, "the uploaded file is gone", "Upload the photo again.") from None
    raise PortraitError(
        path,
        f"the file has {size / 2**20:.1f} MiB, at most {limits.photo_bytes // 2**20} are allowed",
        limits.remedy("photo_bytes", "Use a smaller file of this photo"),
    )


def stored_photo(photo: Photo) -> Any:
    """A photo as an entry of the textbox's list: its hash, or an object where it has a face or alignment of its own."""
    reference = HASH_PREFIX + photo.sha256
    own: dict[str, Any] = {} if photo.face is None else {"face": photo.face}
    if photo.aligned:
        own["aligned"] = True
    return {"image": reference, **own} if own else reference


def stored_text(entries: Sequence[Any]) -> str:
    """The textbox's JSON list, which `stored_photos` reads; "" for none."""
    return json.dumps(entries, separators=(",", ":")) if entries else ""


# -------------------------------------------------------------------------------------------------------------- regions


def region(block: Mapping[str, Any], path: str, limits: Limits) -> dict[str, Any] | None:
    kind = block["region"]
    if kind is None or kind in (ROUTED, REGION_NAMES[ROUTED]):
        return None
    if kind in (BOX, REGION_NAMES[BOX]):
        return {"box": box_from_text(block["box"], f"{path}.box")}
    if kind in (MASK, REGION_NAMES[MASK]):
        drawn = _drawn_mask(block["drawing"], f"{path}.mask")
        stored = stored_photos(block["mask"], f"{path}.mask")
        if drawn is None and not stored:
            raise PortraitError(
                f"{path}.mask", "nothing is painted", "Paint where this person goes, or use another region."
            )
        return {"mask": drawn if drawn is not None else stored[0]}
    raise PortraitError(path, f"{str(kind)[:60]!r} is no kind of region", f"Use one of: {', '.join(REGION_NAMES)}.")


def box_from_text(text: Any, path: str) -> list[Any]:
    """[left, top, right, bottom] as fractions from "left, top, right, bottom" in percent; lists are passed on.

    Raises PortraitError unless there are four finite numbers from 0 to 100 with left < right and top < bottom.
    """
    if isinstance(text, (list, tuple)):
        return list(text)
    remedy = 'Give left, top, right, bottom in percent of the picture, such as "0, 0, 50, 100".'
    parts = [part for part in re.split(r"[\s,;%]+", str(text if text is not None else "")) if part]
    if len(parts) != 4:
        raise PortraitError(path, f"{len(parts)} numbers are given instead of 4", remedy)
    try:
        numbers = [Decimal(part) for part in parts]
    except InvalidOperation:
        raise PortraitError(path, f"{', '.join(parts)[:60]!r} are not numbers", remedy) from None
    if not all(number.is_finite() and 0 <= number <= 100 for number in numbers):
        raise PortraitError(path, f"{', '.join(parts)[:60]} leaves the picture", remedy)
    left, top, right, bottom = (float(number / 100) for number in numbers)
    if left >= right or top >= bottom:
        raise PortraitError(path, "it is empty", "Keep left below right and top below bottom.")
    return [left, top, right, bottom]


def box_to_text(box: Sequence[float]) -> str:
    """The text that `box_from_text` reads as exactly these fractions."""
    return ", ".join(f"{(Decimal(repr(float(edge))) * 100).normalize():f}" for edge in box)


def _drawn_mask(value: Any, path: str) -> Any | None:
    """The mask of a sketch control: what was painted, else the uploaded picture where it is black and white.

    value: None, {"image": picture, "mask": painted} with PIL pictures or base64, or one of these alone.
    """
    if value is None:
        return None
    if isinstance(value, Mapping) and "mask" in value:
        image, painted = value.get("image"), value.get("mask")
    elif isinstance(value, Mapping):
        return value
    else:
        image, painted = value, None
    if isinstance(painted, str) or (painted is None and isinstance(image, str)):
        return painted or image or None
    if painted is not None and _any_white(painted):
        return _png(painted.convert("L"))
    if image is None or isinstance(image, str):
        return image or None
    grey = image.convert("L")
    if _colourfulness(image) > GREY_TOLERANCE:
        raise PortraitError(
            path, "nothing is painted on the picture", "Paint where this person goes, or upload a black and white mask."
        )
    if not _any_white(grey):
        raise PortraitError(path, "nothing is painted", "Paint where this person goes, or use another region.")
    return _png(grey)


def _any_white(picture: Any) -> bool:
    return bool(picture.convert("L").getextrema()[1])


def _colourfulness(picture: Any) -> int:
    """The largest difference, in grey levels of 256, between a pixel's channels and its grey."""
    from PIL import ImageChops

    rgb = picture.convert("RGB")
    grey = rgb.convert("L")
    differences = (ImageChops.difference(band, grey).histogram() for band in rgb.split())
    return max(level for histogram in differences for level, pixels in enumerate(histogram) if pixels)


def _png(picture: Any) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")
