"""What the panel shows of photos, and what is done with them there: kept, shown as cards, given to identities."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.request import HASH_PREFIX, Limits, Photo, parse_request
from lib_portrait.webui import inputs, instances, messages, panel_values, paste, settings
from lib_portrait.webui.messages import message_html

# Of the pictures in cards, and of the faces beside one to choose from: the longer side, in pixels.
CROP_SIDE, FACE_SIDE = 112, 40
# Of the squares that show what of a photo guides: their side, and how bright what does not is at least.
REFERENCE_SIDE, GREYED = 224, 144


def take_uploads(files: Any, kept: str) -> list[Any]:
    """Stores uploads: empties their place, and gives the list of stored photos, a message, and Enable."""
    kept, notice, added = add_photos(files, kept)
    # Someone who adds a photo wants it used; the box can be unticked again.
    return [None, kept, notice, True if added else paste.UNCHANGED]


def add_photos(files: Any, kept: str) -> tuple[str, str, bool]:
    """Stores uploaded photos: the list of stored ones, a message on those refused (HTML), whether any was added."""
    from lib_portrait.faces.images import decode_image

    limits = settings.limits()
    listed = inputs.stored_photos(kept, "photos")
    known = [_image_of(entry) for entry in listed]
    problems, added = [], False
    for upload in files if isinstance(files, list) else [files]:
        title = re.split(r"[/\\]", str(getattr(upload, "orig_name", "") or "photo"))[-1]
        try:
            data = inputs.uploaded_bytes(upload, title, limits)
            decode_image(data, title, limits)
            if len(listed) >= limits.photos:
                raise PortraitError(
                    title, f"at most {limits.photos} photos per person", "Raise the limit in Settings > Portrait."
                )
            entry = HASH_PREFIX + instances.remember(data)
        except Exception as error:
            problems.append(messages.said(error).detail)
            continue
        if entry not in known:
            listed.append(entry)
            known.append(entry)
        added = True
    kept = inputs.stored_text(listed)
    return kept, _notice_html(kept, " ".join(problems)) if problems else "", added


def draw_photos(kept: str, notice: str = "") -> list[Any]:
    """The cards of the stored photos, and the message beside them: gone when the list is not the one it was about."""
    stands = not notice or f'data-photos="{_digest(kept)}"' in notice
    return [found_html(kept), paste.UNCHANGED if stands else ""]


def found_html(kept: str) -> str:
    """The aligned crop of each stored photo, or what is wrong with it, as cards.

    On a card the photo can be removed, taken as an aligned crop, and, where it shows several faces, one of them be
    chosen (portrait.js).
    """
    try:
        listed = inputs.stored_photos(kept, "photos")
    except PortraitError as error:
        return message_html(error.detail)
    limits = settings.limits()
    cards = []
    for index, entry in enumerate(listed[: limits.photos]):
        title = f"Photo {index + 1}"
        aligned = isinstance(entry, Mapping) and entry.get("aligned") is True
        try:
            photo = kept_photo(entry, limits)
            found = instances.faces().find(photo, title)
            chosen = instances.faces().chosen(photo, title)
        except Exception as error:
            said = panel_values.said_in_panel(messages.said(error), [1])
            # Another of its faces can be chosen where it is only that one which is not there.
            faces = (
                instances.faces().find(kept_photo(_image_of(entry), limits), title)
                if isinstance(error, NoSuchFace)
                else []
            )
            cards.append(_error_card(index, title, aligned, f"{said.problem}. {said.remedy}", faces))
            continue
        several = "" if aligned or len(found) == 1 else f" of {len(found)} faces"
        # Bystanders are counted after the main faces, wherever they stand.
        which = "Bystander" if chosen.bystander and photo.face is not None else inputs.face_name(photo.face)
        caption = "aligned crop" if aligned else f"{which}{several}" if several else "1 face"
        cards.append(_card(index, title, aligned, found, chosen, caption))
    return f'<div class="portrait-cards">{"".join(cards)}</div>' if cards else ""


def _card(index: int, title: str, aligned: bool, found: Sequence[Any], chosen: Any, caption: str) -> str:
    picture = f'<img src="{jpeg_url(chosen.crop)}" alt="Face found in {escape(title.lower())}">'
    notices = "".join(f'<p class="portrait-notice">{escape(text)}</p>' for text in chosen.notices)
    faces = "" if aligned or len(found) == 1 else _faces_html(title, found, chosen)
    return (
        f'<figure class="portrait-card" data-index="{index}">{picture}<figcaption>{escape(caption)}</figcaption>'
        f"{faces}{notices}{_card_buttons(title, aligned)}</figure>"
    )


def _error_card(index: int, title: str, aligned: bool, error: str, found: Sequence[Any]) -> str:
    faces = _faces_html(title, found, None) if found else ""
    return (
        f'<div class="portrait-card portrait-card-error" data-index="{index}" role="alert"><p><b>{escape(title)}:</b> '
        f"{escape(error)}</p>{faces}{_card_buttons(title, aligned)}</div>"
    )


def _card_buttons(title: str, aligned: bool) -> str:
    remove, as_it_is = (
        f"Remove {title}",
        "Already aligned: use the photo as it is, a square face crop (ArcFace position)",
    )
    return (
        f'<button type="button" class="portrait-remove" aria-label="{escape(remove)}" title="{escape(remove)}">'
        f'✕</button><button type="button" class="portrait-aligned" aria-pressed="{str(aligned).lower()}" '
        f'aria-label="{escape(as_it_is)}" title="{escape(as_it_is)}">▣</button>'
    )


def _faces_html(title: str, found: Sequence[Any], chosen: Any) -> str:
    """A button for each face of a photo, from the left."""
    buttons = []
    for number, one in enumerate(found):
        says = "; ".join(("Bystander" if one.bystander else inputs.face_name(number), *one.notices))
        kind = "portrait-face portrait-bystander" if one.bystander else "portrait-face"
        buttons.append(
            f'<button type="button" class="{kind}" data-face="{number}" aria-pressed="{str(one is chosen).lower()}" '
            f'aria-label="{escape(says)}" title="{escape(says)}"><img src="{jpeg_url(one.crop, FACE_SIDE)}" alt="">'
            "</button>"
        )
    label = escape(f"Faces in {title.lower()}")
    return f'<div class="portrait-choice" role="group" aria-label="{label}">{"".join(buttons)}</div>'


def spread_faces(lists: Sequence[str]) -> list[Any]:
    """Gives each person of the group photo among identity 1's photos a tab, from the left.

    lists: the stored photos of each tab. Identity 1 keeps its other photos, and with them the face that its card shows;
    tabs with photos of their own stay as they are. Gives the updates of a message, of what `undo_spread` needs, of the
    button for it, and of the lists.
    """
    try:
        listed = [inputs.stored_photos(kept, f"Identity {tab}") for tab, kept in enumerate(lists, 1)]
        place, photo, people, bystanders = _group_photo(listed[0])
        if len(listed[0]) > 1:
            found, shown = instances.faces().find(photo, "photo"), instances.faces().chosen(photo, "photo")
            own = next(number for number, one in enumerate(found) if one is shown)
            people = [own, *(number for number in people if number != own)]
    except Exception as error:
        message = _notice_html(lists[0], messages.said(error).detail)
        return [message, *[paste.UNCHANGED] * (2 + len(lists))]
    image = _image_of(listed[0][place])
    free = [tab for tab in range(1, len(lists)) if all(_image_of(entry) == image for entry in listed[tab])]
    taken = [f"Identity {tab + 1}" for tab in range(1, len(lists)) if tab not in free]
    used = 1 + min(len(people) - 1, len(free))
    texts = list(lists)
    listed[0][place] = {"image": image, "face": people[0]}
    texts[0] = inputs.stored_text(listed[0])
    for tab, number in zip(free, people[1:], strict=False):
        texts[tab] = inputs.stored_text([{"image": image, "face": number}])
    said = []
    if used < len(people):
        said.append(
            f"{len(people)} people were found, {used} have a tab: empty another, or raise the number of people in "
            "Settings > Portrait."
        )
    if len(listed[0]) > 1:
        said.append(f"Identity 1 keeps its other photos, and of photo {place + 1} the face shown there.")
    if taken and len(people) > 1:
        said.append(f"Left as they are: {', '.join(taken)}.")
    if bystanders:
        said.append(f"Left out as far smaller or less sharp: {bystanders} of the faces.")
    message = _notice_html(texts[0], " ".join(said), "warning" if used < len(people) else "info") if said else ""
    undo = json.dumps({"before": list(lists), "after": texts})
    changed = [text if text != kept else paste.UNCHANGED for text, kept in zip(texts, lists, strict=True)]
    return [message, undo, {**paste.UNCHANGED, "visible": True}, *changed]


def _group_photo(listed: Sequence[Any]) -> tuple[int, Photo, list[int], int]:
    """The first stored photo with several people: its place, itself, their faces by number, and how many others it has.

    Raises PortraitError where there is none, with what is wrong with a photo if something is.
    """
    fault: PortraitError | None = None
    for place, entry in enumerate(listed):
        try:
            photo = kept_photo(entry, settings.limits())
            found = instances.faces().find(photo, f"Photo {place + 1}")
        except PortraitError as error:
            fault = fault or error
            continue
        people = [number for number, one in enumerate(found) if not one.bystander]
        if len(people) > 1:
            return place, photo, people, len(found) - len(people)
    if not listed:
        raise PortraitError("Identity 1", "there is no photo", "Add the group photo here first.")
    raise fault or PortraitError("Identity 1", "no photo here shows several people", "Add the group photo here first.")


def undo_spread(spread: str, lists: Sequence[str]) -> list[Any]:
    """Puts the photos back where `spread_faces` found them; a tab that was changed since is left as it is.

    The updates are those of `spread_faces`.
    """
    try:
        kept = json.loads(spread)
        pairs = list(zip(kept["before"], kept["after"], lists, strict=True))
    except (ValueError, TypeError, KeyError):
        pairs = []
    texts = [before if current == after else current for before, after, current in pairs] or list(lists)
    changed = [
        f"Identity {tab}"
        for tab, (before, after, current) in enumerate(pairs, 1)
        if current not in (before, after) and before != after
    ]
    message = f"Changed since, and left as they are: {', '.join(changed)}." if changed else ""
    hidden = {**paste.UNCHANGED, "visible": False}
    return [_notice_html(texts[0], message, "info") if message else "", "", hidden, *texts]


def references_html(enabled: bool, *values: Any) -> str:
    """The photos that guide, as squares about the face with all greyed out that does not guide (HTML); "" where
    reference guidance is switched off.

    values: for each identity whether it is guided, then the stored photos of each.
    """
    if not enabled:
        return ""
    guided, lists = values[: len(values) // 2], values[len(values) // 2 :]
    limits, cards, notes = settings.limits(), [], []
    for tab, (on, kept) in enumerate(zip(guided, lists, strict=True), 1):
        try:
            listed = inputs.stored_photos(kept, "photos")[: limits.photos] if on else []
        except PortraitError:
            continue  # `found_html` says what is wrong with it.
        for number, entry in enumerate(listed, 1):
            title = f"Identity {tab}, photo {number}"
            try:
                found = instances.faces().reference(kept_photo(entry, limits), title, REFERENCE_SIDE)
            except Exception as error:
                said = panel_values.said_in_panel(messages.said(error), [1])
                notes.append(f"{title}: {said.problem}")
                continue
            shown = np.where(found.mask[..., None], found.picture, found.picture // 4 + GREYED).astype("uint8")
            notes += [] if found.parsed else [found.how]
            cards.append(
                f'<figure class="portrait-card"><img src="{jpeg_url(shown)}" alt="What guides of {escape(title)}">'
                f"<figcaption>Identity {tab}</figcaption></figure>"
            )
    told = "".join(message_html(f"{text[0].upper()}{text[1:]}.", "info") for text in dict.fromkeys(notes))
    return (f'<div class="portrait-cards">{"".join(cards)}</div>' if cards else "") + told


def kept_photo(entry: Any, limits: Limits) -> Photo:
    """A stored photo as a request has it, checked as there: the textbox is in the page, and anyone may write to it."""
    values = [True, *[None] * len(panel_values.GLOBAL_FIELDS), inputs.stored_text([entry])]
    form = panel_values.request_from_values(values, limits)
    assert form is not None
    return parse_request(form, limits).identities[0].photos[0]


def _image_of(entry: Any) -> Any:
    """The hash in an entry of the stored list."""
    return entry.get("image") if isinstance(entry, Mapping) else entry


def _notice_html(kept: str, text: str, kind: str = "error") -> str:
    """A message that stands as long as the list of stored photos is this one (`draw_photos`)."""
    return f'<div data-photos="{_digest(kept)}">{message_html(text, kind)}</div>'


def _digest(kept: str) -> str:
    return hashlib.sha256(str(kept or "").encode()).hexdigest()[:16]


def jpeg_url(picture: Any, side: int = CROP_SIDE) -> str:
    """A picture (H, W, 3) or (H, W) uint8 as a data URL of at most `side` pixels."""
    from PIL import Image

    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
