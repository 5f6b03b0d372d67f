"""The Portrait panel: its controls, and what happens when they are used.

Everything a photo is here is its hash: an upload is stored at once, and the panel remembers the list of hashes in a
textbox that nobody sees (`photos`, `mask`). So pasting generation parameters, sending to another tab and uploading all
end in the same state, from which the crops are drawn.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from lib_portrait.checkpoints import KnownWeight
from lib_portrait.checkpoints.store import PUBLISHED
from lib_portrait.errors import PortraitError
from lib_portrait.request import HASH_PREFIX, METHODS, Identity, Limits, Mix, Photo, PortraitRequest, parse_request
from lib_portrait.webui import paste, services, settings
from lib_portrait.webui import values as layout
from lib_portrait.webui.paste import message_html

REFRESH = "\U0001f504"
CANVAS_SIDE = 512
CROP_SIDE = 112
IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
DOWNLOAD_PERIOD = 0.5


def request_from_values(values: Sequence[Any]) -> dict[str, Any] | None:
    """The request's JSON form from the panel's values (see `values.request_from_values`), None where disabled."""
    return layout.request_from_values(values, settings.limits())


# ----------------------------------------------------------------------------------------------------------- building


def build(script: Any, is_img2img: bool) -> list[Any]:
    """Builds the panel inside the host's interface; its inputs in the order of `values`, those of N identities, and
    after them one that nobody sees.

    Sets the script's `infotext_fields` and `paste_field_names`. The host calls `ui` again on the same script to ask
    for the defaults of its API: it gets the controls that are there.
    """
    if script.controls:
        return script.controls
    import gradio as gr

    tab = "img2img" if is_img2img else "txt2img"
    identities = settings.limits().identities
    with gr.Accordion("Portrait", open=False, elem_id=f"{tab}_portrait", elem_classes=["portrait"]):
        pasted = gr.HTML(elem_id=f"{tab}_portrait_pasted")
        top = _build_top(gr, tab)
        blocks: list[dict[str, Any]] = []
        with gr.Tabs(elem_id=f"{tab}_portrait_people", elem_classes=["portrait-people"]):
            for index in range(identities):
                with gr.Tab(f"Identity {index + 1}", id=f"{tab}_portrait_{index}"):
                    blocks.append(_build_identity(gr, tab, index))
    _connect_spread(blocks)
    for block in blocks:
        for name in ("photos", *(f"{slot}_photos" for slot in layout.MIXES)):
            _connect_photos(top["enabled"], block, name)
        _connect_region(gr, block, tab)

    controls = [top[name] for name in layout.GLOBAL_FIELDS]
    controls += [block[name] for block in blocks for name in layout.IDENTITY_FIELDS]
    for control in controls[1:]:
        # The host saves defaults by label, and identities have the same labels; a photo is no default at all.
        control.do_not_save_to_config = True
    names = paste.positions(identities)
    readers = [paste.reader(position, identities, services.named) for position in range(len(controls))]
    script.infotext_fields = [
        *zip(controls, readers, strict=True),
        (pasted, lambda params: paste.message_update(params, identities, services.named)),
    ]
    script.paste_field_names = [read for name, read in zip(names, readers, strict=True) if paste.sendable(name)]
    # Where a list of the API is longer than the panel, what comes next lands here, and is refused.
    controls.append(gr.Textbox(value=layout.NOTHING_BEYOND, visible=False))
    controls[-1].do_not_save_to_config = True
    return controls


def _slider(gr: Any, form: type, name: str, label: str, tooltip: str, elem_id: str) -> Any:
    spec = next(item for item in fields(form) if item.name == name)
    return gr.Slider(
        minimum=spec.metadata["low"],
        maximum=spec.metadata["high"],
        step=0.01,
        value=spec.default,
        label=label,
        tooltip=tooltip,
        elem_id=elem_id,
    )


def _hidden_text(gr: Any, label: str, elem_id: str) -> Any:
    """A textbox that is in the page, so that scripts there reach it, but not seen (style.css)."""
    return gr.Textbox(value="", label=label, elem_id=elem_id, elem_classes=["portrait-kept"], container=False)


def _build_top(gr: Any, tab: str) -> dict[str, Any]:
    from modules.ui_components import ToolButton

    def name(part: str) -> str:
        return f"{tab}_portrait_{part}"

    top: dict[str, Any] = {}
    with gr.Row(elem_classes=["portrait-switches"]):
        top["enabled"] = gr.Checkbox(False, label="Enable", elem_id=name("enabled"), tooltip="Draw the people below.")
        top["show_routing"] = gr.Checkbox(
            False,
            label="Show routing map",
            elem_id=name("show_routing"),
            tooltip="Adds a picture to the results that shows which person went where.",
        )
    choices, status = checkpoint_choices()
    with gr.Row(elem_classes=["portrait-models"]):
        titles = [layout.METHOD_NAMES[method] for method in METHODS]
        top["method"] = gr.Dropdown(
            titles, value=titles[0], label="Method", elem_id=name("method"), tooltip="How identities reach the picture."
        )
        top["checkpoint"] = gr.Dropdown(
            choices,
            value=choices[0],
            # Pasted parameters may name one that is not here: it is shown, and refused with its name.
            allow_custom_value=True,
            label="Checkpoint",
            elem_id=name("checkpoint"),
            tooltip="The adapter's weights. Automatic: sd15 where it is there, else the first.",
        )
        refresh = ToolButton(REFRESH, elem_id=name("refresh"), tooltip="Look for weights again")
    with gr.Row(elem_classes=["portrait-weights"]):
        weights = gr.HTML(status, elem_id=name("weights"))
        download = gr.Button(
            "Download missing weights",
            size="sm",
            visible=bool(status),
            elem_id=name("download"),
            tooltip="Fetches the published files that are missing into the folder named here.",
        )
    with gr.Row():
        top["scale"] = _slider(
            gr, PortraitRequest, "scale", "ID scale", "Strength of all people together.", name("scale")
        )
        top["lora_scale"] = _slider(
            gr, PortraitRequest, "lora_scale", "LoRA scale", "Strength of the adapter's LoRA.", name("lora_scale")
        )

    def look_again(chosen: str) -> list[Any]:
        choices, status = checkpoint_choices()
        bare = str(chosen).removesuffix(layout.INCOMPLETE)
        value = next((choice for choice in choices if choice.removesuffix(layout.INCOMPLETE) == bare), choices[0])
        return [gr.update(choices=choices, value=value), status, gr.update(visible=bool(status))]

    # The badge in the panel's title follows the box, also where pasting has ticked it.
    top["enabled"].change(None, [], [], _js="portraitShowCounts")
    outputs = [top["checkpoint"], weights, download]
    refresh.click(look_again, [top["checkpoint"]], outputs, show_progress=False)

    def fetch(chosen: str) -> Iterator[list[Any]]:
        for message in download_missing(str(chosen).removesuffix(layout.INCOMPLETE)):
            yield [paste.UNCHANGED, message, gr.update(interactive=False)]
        choices, _, visible = look_again(chosen)
        yield [choices, message, {**visible, "interactive": True}]

    download.click(fetch, [top["checkpoint"]], outputs, show_progress=False)
    return top


def _build_identity(gr: Any, tab: str, index: int) -> dict[str, Any]:
    def name(part: str) -> str:
        return f"{tab}_portrait_{index}_{part}"

    block: dict[str, Any] = {}
    _build_photos(gr, block, "photos", "Photos", name)
    with gr.Row(elem_classes=["portrait-faces"]):
        block["face"] = gr.Dropdown(
            layout.face_choices(),
            value=layout.LARGEST_NAME,
            label="Face",
            elem_id=name("face"),
            tooltip="Which face to take from photos with several.",
        )
        block["aligned"] = gr.Checkbox(
            False,
            label="Already aligned",
            elem_id=name("aligned"),
            tooltip="The photos are square face crops in the ArcFace position: use them as they are.",
        )
        if index == 0:
            block["spread"] = gr.Button(
                "One identity per face",
                size="sm",
                elem_id=name("spread"),
                tooltip="Takes the people of the first photo, from the left, as identities 1, 2, 3...",
            )
    with gr.Row():
        block["scale"] = _slider(
            gr, Identity, "scale", "Scale", "Strength of this person, times the ID scale above.", name("scale")
        )
        block["structure"] = _slider(
            gr, Identity, "structure", "Face structure (β)", "More: more alike, less freedom.", name("structure")
        )
    with gr.Row():
        block["start"] = _slider(
            gr, Identity, "start", "Start", "Share of the steps after which this person comes in.", name("start")
        )
        block["end"] = _slider(
            gr, Identity, "end", "End", "Share of the steps after which this person is left out.", name("end")
        )
    block["region"] = gr.Radio(
        [(title, kind) for kind, title in layout.REGION_NAMES.items()],
        value=layout.ROUTED,
        label="Region",
        elem_id=name("region"),
        tooltip="Where this person goes. Automatic routing decides it from the picture itself.",
    )
    with gr.Row(visible=False, elem_classes=["portrait-box"]) as block["box_row"]:
        block["box"] = gr.Textbox(
            value="",
            label="Box: left, top, right, bottom in %",
            placeholder="0, 0, 50, 100",
            elem_id=name("box"),
            tooltip="In percent of the picture, from its top left corner.",
        )
        block["box_preview"] = gr.HTML(elem_id=name("box_preview"))
    with gr.Column(visible=False, elem_classes=["portrait-mask"]) as block["mask_column"]:
        block["drawing"] = gr.Image(
            label="Mask: paint where this person goes",
            source="upload",
            tool="sketch",
            type="pil",
            image_mode="RGB",
            brush_color="#ffffff",
            height=300,
            elem_id=name("drawing"),
        )
        with gr.Row():
            block["canvas"] = gr.Button("New canvas in the picture's size", size="sm", elem_id=name("canvas"))
            block["canvas_size"] = gr.Textbox(visible=False)
        block["mask"] = _hidden_text(gr, "Kept mask", name("mask"))
        block["mask_found"] = gr.HTML(elem_id=name("mask_found"))
    with gr.Accordion("Mix in other people", open=False, elem_id=name("mix"), elem_classes=["portrait-mix"]):
        for number, slot in enumerate(layout.MIXES, start=1):
            _build_photos(gr, block, f"{slot}_photos", f"Photos of mixed-in person {number}", name)
            block[f"{slot}_weight"] = _slider(
                gr, Mix, "weight", "Share", "Share of this person in the identity.", name(f"{slot}_weight")
            )
    return block


def _build_photos(gr: Any, block: dict[str, Any], photos: str, label: str, name: Callable[[str], str]) -> None:
    """A place to drop photos, and what was found in them."""
    uploads = photos.replace("photos", "uploads")
    block[uploads] = gr.File(
        label=label,
        file_count="multiple",
        file_types=IMAGE_TYPES,
        type="file",
        height=96,
        elem_id=name(uploads),
        elem_classes=["portrait-uploads"],
    )
    block[photos] = _hidden_text(gr, f"Kept {label.lower()}", name(photos))
    block[f"{photos}_notice"] = gr.HTML(elem_id=name(f"{photos}_notice"))
    block[f"{photos}_found"] = gr.HTML(elem_id=name(f"{photos}_found"), elem_classes=["portrait-found"])


# --------------------------------------------------------------------------------------------------------- behaviour


def _connect_photos(enabled: Any, block: dict[str, Any], photos: str) -> None:
    """An upload is stored; whatever changes the list of stored photos draws the crops anew."""
    upload = block[photos.replace("photos", "uploads")]

    upload.upload(
        lambda files, kept: take_uploads(files, kept),
        [upload, block[photos]],
        [upload, block[photos], block[f"{photos}_notice"], enabled],
        show_progress=False,
    )
    inputs = [block["photos"], block["face"], block["aligned"]] if photos == "photos" else [block[photos]]
    for control in inputs:
        _draw_on_change(control, found_html, inputs, block[f"{photos}_found"])


def _draw_on_change(control: Any, draw: Callable[..., str], inputs: list[Any], output: Any) -> None:
    """Draws when a control changes, and again after that: gradio 3 drops the events that come while one is served."""

    # gradio evaluates the annotations of every handler, which is half the cost of building: a lambda has none.
    handler = lambda *values: draw(*values)  # noqa: E731
    control.change(handler, inputs, [output], show_progress=False).then(handler, inputs, [output], show_progress=False)


def _connect_spread(blocks: list[dict[str, Any]]) -> None:
    first = blocks[0]
    outputs = [first["photos_notice"]]
    outputs += [block[name] for block in blocks for name in ("photos", "face", "aligned")]
    first["spread"].click(lambda kept: spread_faces(kept, len(blocks)), [first["photos"]], outputs, show_progress=False)


def _connect_region(gr: Any, block: dict[str, Any], tab: str) -> None:
    block["region"].change(
        lambda kind: [gr.update(visible=kind == layout.BOX), gr.update(visible=kind == layout.MASK)],
        [block["region"]],
        [block["box_row"], block["mask_column"]],
        show_progress=False,
    )
    _draw_on_change(block["box"], box_html, [block["box"]], block["box_preview"])
    _draw_on_change(block["mask"], mask_html, [block["mask"]], block["mask_found"])
    block["canvas"].click(
        lambda size: blank_canvas(size),
        [block["canvas_size"]],
        [block["drawing"]],
        _js=f"() => portraitPictureSize('{tab}')",
        show_progress=False,
    )


def take_uploads(files: Any, kept: str) -> list[Any]:
    """Stores uploads: empties their place, and gives the list of stored photos, a message, and Enable."""
    kept, notice, added = add_photos(files, kept)
    # Someone who adds a photo wants it used; the box can be unticked again.
    return [None, kept, notice, True if added else paste.UNCHANGED]


def add_photos(files: Any, kept: str) -> tuple[str, str, bool]:
    """Stores uploaded photos: the list of stored ones, a message on those refused (HTML), whether any was added."""
    from lib_portrait.faces.images import decode_image

    limits = settings.limits()
    listed = layout.stored_photos(kept, "photos")
    problems, added = [], False
    for upload in files if isinstance(files, list) else [files]:
        title = re.split(r"[/\\]", str(getattr(upload, "orig_name", "") or "photo"))[-1]
        try:
            data = layout.uploaded_bytes(upload, title, limits)
            decode_image(data, title, limits)
            if len(listed) >= limits.photos:
                raise PortraitError(
                    title, f"at most {limits.photos} photos per person", "Raise the limit in Settings > Portrait."
                )
            entry = HASH_PREFIX + services.remember(data)
        except Exception as error:
            problems.append(_said(error).detail)
            continue
        if entry not in listed:
            listed.append(entry)
        added = True
    return _kept_text(listed), message_html(" ".join(problems)) if problems else "", added


def _said(error: Exception) -> PortraitError:
    """What the panel says of an error: of one that no user was meant to see, that it is in the log."""
    if isinstance(error, PortraitError):
        return error
    from modules import errors

    errors.report("Portrait failed", exc_info=True)
    return PortraitError("Portrait", f"it failed with {type(error).__name__}: {error}", "The console says more.", 500)


def _kept_text(photos: Sequence[Any]) -> str:
    return json.dumps(photos, separators=(",", ":")) if photos else ""


def _kept_photo(entry: Any, face: Any, aligned: Any, limits: Limits) -> Photo:
    """A stored photo as a request has it, checked as there: the textbox is in the page, and anyone may write to it."""
    form = layout.request_from_values([True, *[None] * 5, None, _kept_text([entry]), face, aligned], limits)
    assert form is not None
    return parse_request(form, limits).identities[0].photos[0]


def found_html(kept: str, face: str | None = None, aligned: bool = False) -> str:
    """The aligned crop of each stored photo, or what is wrong with it, as cards with a button to remove it."""
    try:
        listed = layout.stored_photos(kept, "photos")
    except PortraitError as error:
        return message_html(error.detail)
    limits = settings.limits()
    cards = []
    for index, entry in enumerate(listed[: limits.photos]):
        title = f"Photo {index + 1}"
        try:
            photo = _kept_photo(entry, face, aligned, limits)
            crop = services.faces().crop(photo, title)
            count = len(services.faces().find(photo, title))
        except Exception as error:
            said = _said(error)
            cards.append(_card(index, title, error=f"{said.problem}. {said.remedy}"))
            continue
        chosen = "aligned crop" if photo.aligned else layout.face_name(photo.face)
        several = "" if photo.aligned or count == 1 else f" of {count} faces"
        cards.append(_card(index, title, crop, f"{chosen}{several}" if several or photo.aligned else "1 face"))
    return f'<div class="portrait-cards">{"".join(cards)}</div>' if cards else ""


def _card(index: int, title: str, crop: Any = None, caption: str = "", error: str = "") -> str:
    remove = (
        f'<button type="button" class="portrait-remove" data-index="{index}" aria-label="Remove {escape(title)}" '
        f'title="Remove {escape(title)}">✕</button>'
    )
    if error:
        return (
            f'<div class="portrait-card portrait-card-error" role="alert"><p><b>{escape(title)}:</b> '
            f"{escape(error)}</p>{remove}</div>"
        )
    picture = f'<img src="{_jpeg_url(crop)}" alt="Face found in {escape(title.lower())}">'
    return f'<figure class="portrait-card">{picture}<figcaption>{escape(caption)}</figcaption>{remove}</figure>'


def _jpeg_url(picture: Any, side: int = CROP_SIDE) -> str:
    """A picture (H, W, 3) or (H, W) uint8 as a data URL of at most `side` pixels."""
    from PIL import Image

    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def spread_faces(kept: str, identities: int) -> list[Any]:
    """The faces of the first stored photo as identities, from the left.

    The updates of a message and of (photos, face, aligned) of each identity; identities beyond the faces found stay as
    they are.
    """
    unchanged: list[Any] = [paste.UNCHANGED] * (3 * identities)
    try:
        listed = layout.stored_photos(kept, "photos")
        if not listed:
            raise PortraitError("Identity 1", "there is no photo", "Add the group photo here first.")
        entry = listed[0]["image"] if isinstance(listed[0], Mapping) else listed[0]
        photo = _kept_photo(entry, None, False, settings.limits())
        count = len(services.faces().find(photo, "Photo 1"))
    except Exception as error:
        return [message_html(_said(error).detail), *unchanged]
    used = min(count, identities, layout.FACE_CHOICES)
    values: list[Any] = []
    for index in range(used):
        values += [_kept_text([entry]), layout.face_name(index), False]
    message = ""
    if count == 1:
        message = message_html("There is one face in photo 1; it is identity 1.", "info")
    elif used < count:
        text = f"{count} faces were found, {used} are used. Raise the number of people in Settings > Portrait."
        message = message_html(text, "warning")
    return [message, *values, *unchanged[len(values) :]]


def box_html(text: str) -> str:
    """A small drawing of the box in the picture, or what is wrong with it."""
    if not str(text or "").strip():
        return ""
    try:
        left, top, right, bottom = (100 * edge for edge in layout.box_from_text(text, "Box"))
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
        listed = layout.stored_photos(kept, "Mask")
        mask = services.faces().mask(_kept_photo(listed[0], None, False, settings.limits()), "Mask")
    except Exception as error:
        return message_html(_said(error).detail)
    picture = (mask * 255).astype("uint8")
    return (
        f'<figure class="portrait-card"><img src="{_jpeg_url(picture)}" alt="Mask in use">'
        "<figcaption>in use unless you paint</figcaption></figure>"
    )


def blank_canvas(size: str) -> Any:
    """A black picture of the aspect ratio of "width x height", to paint a mask on."""
    from PIL import Image

    numbers = [min(max(int(number), 1), 16384) for number in re.findall(r"\d{1,6}", str(size or ""))[:2]]
    width, height = numbers if len(numbers) == 2 else (CANVAS_SIDE, CANVAS_SIDE)
    shrink = CANVAS_SIDE / max(width, height)
    return Image.new("RGB", (max(1, round(width * shrink)), max(1, round(height * shrink))))


# ------------------------------------------------------------------------------------------------------------ weights


def checkpoint_choices() -> tuple[list[str], str]:
    """The choices of the checkpoint control, and a message (HTML) on the files that are missing, or ""."""
    kits = services.store().kits()
    choices = ["automatic"] + [kit.name + ("" if kit.usable else layout.INCOMPLETE) for kit in kits]
    lines = []
    for kit in kits:
        if kit.problem is not None:
            lines.append(f"{kit.name}: {kit.problem}")
        for folder in dict.fromkeys(gap.folder for gap in kit.missing):
            files = ", ".join(gap.filename for gap in kit.missing if gap.folder == folder)
            lines.append(f"{kit.name}: {files} (into {folder})")
    if not lines:
        return choices, ""
    usable = any(kit.usable for kit in kits)
    title = "Some weights are missing" if usable else "Weights are missing: download them, or place them by hand"
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    kind, unfolded = ("info", "") if usable else ("warning", " open")
    summary = f"<summary>{title}</summary><ul>{items}</ul>"
    return choices, f'<details class="portrait-message portrait-{kind}"{unfolded}>{summary}</details>'


def download_missing(checkpoint: str) -> Iterator[str]:
    """Downloads the published files that a checkpoint lacks; messages (HTML) on how it goes, the last on how it ended.

    The first file that cannot be had ends it: what comes after usually has the same source.
    """
    kits = {kit.name: kit for kit in services.store().kits()}
    kit = kits.get(checkpoint) or kits[PUBLISHED]
    wanted = [gap for gap in kit.missing if gap.known is not None]
    unpublished = [gap for gap in kit.missing if gap.known is None]
    if not wanted and unpublished:
        yield message_html(" ".join(gap.remedy() for gap in unpublished))
        return
    for gap in wanted:
        assert gap.known is not None
        try:
            yield from _download(gap.known, gap.folder)
        except Exception as error:
            yield message_html(_said(error).detail)
            return
    yield message_html("All weights are there.", "info")


def _download(known: KnownWeight, folder: Path) -> Iterator[str]:
    """Downloads one file in a thread of its own; messages on how far it is. Raises what `download` raises."""
    from lib_portrait.checkpoints.download import download

    reports: queue.Queue[tuple[int, int]] = queue.Queue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(download, known, folder, lambda done, total: reports.put((done, total)))
        yield message_html(f"{known.filename}: connecting", "info")
        while not running.done():
            time.sleep(DOWNLOAD_PERIOD)
            latest = None
            while not reports.empty():
                latest = reports.get()
            if latest is not None:
                done, total = (part / 2**20 for part in latest)
                yield message_html(f"{known.filename}: {done:.0f} of {total:.0f} MiB", "info")
        running.result()
