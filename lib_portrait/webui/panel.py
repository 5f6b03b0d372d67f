"""The Portrait panel: its controls, and what happens when they are used.

Everything a photo is here is its hash: an upload is stored at once, and the panel remembers the list of hashes in a
textbox that nobody sees (`photos`, `mask`), each with the face chosen on it. So pasting generation parameters, sending
to another tab, uploading and choosing a face all end in the same state, from which the crops are drawn.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import queue
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lib_portrait.checkpoints import KitStatus, KnownWeight, Missing
from lib_portrait.checkpoints.store import AUTOMATIC
from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods.declarations import declaration, declarations
from lib_portrait.options import Value, defaults
from lib_portrait.request import END, HASH_PREFIX, START, WEIGHT, Limits, Photo, parse_request
from lib_portrait.webui import adetailer, checkpoint, inputs, instances, option_controls, panel_values, paste, settings
from lib_portrait.webui.option_controls import Label, slider
from lib_portrait.webui.paste import message_html

REFRESH = "\U0001f504"
CANVAS_SIDE = 512
CROP_SIDE = 112
IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
DOWNLOAD_PERIOD = 0.5
# Of the squares that show what of a photo guides: their side, and how bright what does not is at least.
REFERENCE_SIDE, GREYED = 224, 144
FACE_SIDE = 40
# Which of the panel's controls the host keeps as defaults (Settings > Defaults), beside those of options: no photo is
# one, nor whether it is used.
DEFAULTS = ("checkpoint", START.name, END.name, *(f"{slot}_{WEIGHT.name}" for slot in panel_values.MIXES))


# ----------------------------------------------------------------------------------------------------------- building


def build(script: Any, is_img2img: bool) -> list[Any]:
    """Builds the panel inside the host's interface; its inputs in the order of `values.controls`.

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
        _build_layout(gr, tab, blocks)
        option_controls.build_guidance(gr, top, blocks, lambda part: f"{tab}_portrait_{part}")
    _connect_spread(blocks)
    _connect_guidance(top, blocks)
    script.portrait_settings_button = top["kit_settings"]
    _connect_settings(script)
    for block in blocks:
        for name in ("photos", *(f"{slot}_photos" for slot in panel_values.MIXES)):
            _connect_photos(top["enabled"], block, name)
        _connect_region(gr, block, tab)

    option_controls.connect_method(top, blocks)

    # Where a list of the API is longer than the panel, what comes next lands here, and is refused.
    top[panel_values.BEYOND.name] = gr.Textbox(value=panel_values.NOTHING_BEYOND, visible=False)
    placed = panel_values.controls(identities)
    controls = [(top if one.tab is None else blocks[one.tab - 1])[option_controls.key(one)] for one in placed]
    kept = {*DEFAULTS, *(option.name for one in declarations() for option in (*one.options, *one.identity_options))}
    kept |= {option.name for option in OPTIONS}
    for one, control in zip(placed, controls, strict=True):
        control.do_not_save_to_config = one.name not in kept
    readers = [paste.reader(position, identities, instances.named) for position in range(len(controls))]
    sent = zip(controls, readers, placed, strict=True)
    read = [(control, reader, one) for control, reader, one in sent if one is not panel_values.BEYOND]
    script.infotext_fields = [
        *((control, reader) for control, reader, _ in read),
        (pasted, lambda params: paste.message_update(params, identities, instances.named)),
    ]
    script.paste_field_names = [reader for _, reader, one in read if paste.sendable(one.name)]
    return controls


def watch_host(script: Any, is_img2img: bool) -> None:
    """Notes the host's own controls that a kit's settings go to, as the host makes them, before or after `build`.

    For the script's `show`, which comes before either.
    """
    tab = "img2img" if is_img2img else "txt2img"
    script.portrait_host_controls = {}

    def noting(name: str) -> Callable[[Any], None]:
        def note(made: Any) -> None:
            script.portrait_host_controls[name] = made.component
            _connect_settings(script)

        return note

    for name in checkpoint.CONTROLS:
        script.on_after_component(noting(name), elem_id=f"{tab}_{name}")


def _connect_settings(script: Any) -> None:
    """Has the button set the host's controls, once the button and all of them are there."""
    button = getattr(script, "portrait_settings_button", None)
    controls = getattr(script, "portrait_host_controls", {})
    if button is not None and len(controls) == len(checkpoint.CONTROLS):
        outputs = [controls[name] for name in checkpoint.CONTROLS]
        button.click(kit_settings, [], outputs, show_progress=False)


def kit_settings() -> list[Any]:
    """What the host's controls (`checkpoint.CONTROLS`) become: as the kit says that was made on the loaded checkpoint.

    Raises PortraitError where none was: another checkpoint has been loaded since the button was offered."""
    manifest = checkpoint.loaded().manifest()
    if manifest is None:
        raise PortraitError("checkpoint", "no kit tells settings for the loaded checkpoint", "Choose them yourself.")
    return [*checkpoint.controls(manifest).values()]


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
        option_controls.build_maps(gr, top, name)
    choices = checkpoint_choices()
    with gr.Row(elem_classes=["portrait-models"]):
        titles = [method.title for method in declarations()]
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
        top["refresh"] = refresh = ToolButton(REFRESH, elem_id=name("refresh"), tooltip="Look for weights again")
    with gr.Row(elem_classes=["portrait-weights"]):
        # What is missing depends on the loaded checkpoint, so the page asks when it is there (portrait.js).
        weights = gr.HTML(elem_id=name("weights"))
        download = gr.Button(
            panel_values.DOWNLOAD_NAME,
            size="sm",
            visible=False,
            elem_id=name("download"),
            tooltip="Fetches the published files that are missing into the folder named here.",
        )
        top["kit_settings"] = gr.Button(
            "Use its settings",
            size="sm",
            visible=False,
            elem_id=name("kit_settings"),
            tooltip="Sets size, sampler, steps and CFG scale above.",
        )
    for method in declarations():
        options = [option for option in method.options if option.name != method.maps]
        option_controls.build_options(gr, top, method, options, "", name)

    def judge(chosen: str, title: str) -> list[Any]:
        loaded = checkpoint.loaded()
        message, loadable = weights_html(chosen, loaded, panel_values.method_of([True, title]).name)
        offered = loaded.manifest() is not None
        return [message + neighbours_html(), gr.update(visible=loadable), gr.update(visible=offered)]

    def look_again(chosen: str, title: str) -> list[Any]:
        method = panel_values.method_of([True, title]).name
        choices = checkpoint_choices(method)
        value = kept_choice(chosen, choices, method)
        return [gr.update(choices=choices, value=value), *judge(value, title)]

    # The badge in the panel's title follows the box, also where pasting has ticked it.
    top["enabled"].change(None, [], [], _js="portraitShowCounts")
    chosen, judged = [top["checkpoint"], top["method"]], [weights, download, top["kit_settings"]]
    refresh.click(look_again, chosen, [top["checkpoint"], *judged], show_progress=False)
    top["method"].change(look_again, chosen, [top["checkpoint"], *judged], show_progress=False)
    top["checkpoint"].change(judge, chosen, judged, show_progress=False)

    def fetch(chosen: str, title: str) -> Iterator[list[Any]]:
        for message in download_missing(chosen, checkpoint.loaded(), panel_values.method_of([True, title]).name):
            yield [paste.UNCHANGED, message, gr.update(interactive=False)]
        choices, _, visible, _ = look_again(chosen, title)
        yield [choices, message, {**visible, "interactive": True}]

    download.click(fetch, chosen, [top["checkpoint"], weights, download], show_progress=False)
    return top


def _build_identity(gr: Any, tab: str, index: int) -> dict[str, Any]:
    def name(part: str) -> str:
        return f"{tab}_portrait_{index}_{part}"

    block: dict[str, Any] = {}
    _build_photos(gr, block, "photos", "Photos", name)
    # Chosen on the photos themselves; positional lists of API users have them for all photos of an identity.
    block["face"] = gr.Dropdown(inputs.face_choices(), value=inputs.LARGEST_NAME, label="Face", visible=False)
    block["aligned"] = gr.Checkbox(False, label="Already aligned", visible=False)
    if index == 0:
        with gr.Row(elem_classes=["portrait-faces"]):
            block["spread"] = gr.Button(
                "One identity per face",
                size="sm",
                elem_id=name("spread"),
                tooltip="Gives each person of the group photo here a tab that is free, from the left.",
            )
            block["undo"] = gr.Button(
                "Undo", size="sm", visible=False, elem_id=name("undo"), tooltip="Takes the photos back where they were."
            )
            block["spread_kept"] = _hidden_text(gr, "Photos before and after", name("spread_kept"))
            block["spread_kept"].do_not_save_to_config = True
    whose = f"identity {index + 1}"
    for method in declarations():
        option_controls.build_options(gr, block, method, method.identity_options, whose, name)
    with gr.Row():
        for end in (START, END):
            block[end.name] = slider(gr, end, Label(end.title, whose), name(end.name))
    block["region"] = gr.Radio(
        [(title, kind) for kind, title in inputs.REGION_NAMES.items()],
        value=inputs.ROUTED,
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
    with gr.Accordion(
        "Mix in other people",
        open=False,
        visible=panel_values.DEFAULT.mixes,
        elem_id=name("mix"),
        elem_classes=["portrait-mix"],
    ) as block[option_controls.MIXED]:
        for number, slot in enumerate(panel_values.MIXES, start=1):
            _build_photos(gr, block, f"{slot}_photos", f"Photos of mixed-in person {number}", name)
            label = Label(WEIGHT.title, f"mixed-in person {number} of {whose}")
            block[f"{slot}_weight"] = slider(gr, WEIGHT, label, name(f"{slot}_weight"))
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
    notice = block[f"{photos}_notice"]
    _draw_on_change(block[photos], draw_photos, [block[photos], notice], [block[f"{photos}_found"], notice])


def _draw_on_change(control: Any, draw: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Draws when a control changes, and again after that: gradio 3 drops the events that come while one is served."""

    # gradio evaluates the annotations of every handler, which is half the cost of building: a lambda has none.
    handler = lambda *values: draw(*values)  # noqa: E731
    control.change(handler, inputs, outputs, show_progress=False).then(handler, inputs, outputs, show_progress=False)


def _connect_spread(blocks: list[dict[str, Any]]) -> None:
    first, lists = blocks[0], [block["photos"] for block in blocks]
    outputs = [first["photos_notice"], first["spread_kept"], first["undo"], *lists]
    first["spread"].click(lambda *kept: spread_faces(kept), lists, outputs, show_progress=False)
    undo = [first["spread_kept"], *lists]
    first["undo"].click(lambda spread, *kept: undo_spread(spread, kept), undo, outputs, show_progress=False)


def _connect_guidance(top: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> None:
    """Shows which part of the photos guides, and what a kit's makers found to work."""
    part = option_controls.GUIDANCE
    enabled, references = top[f"{part}_enabled"], top[f"{part}_references"]
    guided = [block[f"{part}_{GUIDED.name}"] for block in blocks]
    lists = [block["photos"] for block in blocks]
    for control in (enabled, *guided, *lists):
        _draw_on_change(control, references_html, [enabled, *guided, *lists], [references])

    options = [top[f"{part}_{option.name}"] for option in OPTIONS]
    chosen = [top["checkpoint"], top["method"]]
    told = [top[f"{part}_kit"], top[f"{part}_settings"]]

    def tell(adapter: str, title: str) -> list[Any]:
        values = kit_guidance(adapter, title)
        return [guidance_html(values), {**paste.UNCHANGED, "visible": bool(values)}]

    def use(adapter: str, title: str) -> list[Any]:
        values = {**defaults(OPTIONS), **kit_guidance(adapter, title)}
        return [values[option.name] for option in OPTIONS]

    for event in (top["refresh"].click, top["method"].change, top["checkpoint"].change):
        event(tell, chosen, told, show_progress=False)
    top[f"{part}_settings"].click(use, chosen, options, show_progress=False)

    # Who chooses to have nothing else wants it on.
    def switch(title: str, on: bool) -> Any:
        return on or not panel_values.method_of([True, title]).has_adapter

    top["method"].input(switch, [top["method"], enabled], [enabled], show_progress=False)


def kit_guidance(chosen: str, title: str) -> Mapping[str, Value]:
    """What of reference guidance was found to work with a choice of the checkpoint control, or on what is loaded.

    title: of the method.
    """
    method, loaded = panel_values.method_of([True, title]), checkpoint.loaded()
    manifest = None
    if method.has_adapter:
        try:
            name, _ = _wanted(chosen, loaded, method.name)
            manifest = instances.store().manifest(name, method.name)
        except PortraitError:
            pass  # `weights_html` says what is wrong with it.
    return instances.store().guidance(manifest, loaded.file)


def guidance_html(values: Mapping[str, Value]) -> str:
    """What a kit's makers found to work (HTML), or ""."""
    said = [option.said(values[option.name]) for option in OPTIONS if option.name in values]
    return message_html(f"For this checkpoint these were found to work: {', '.join(said)}.", "info") if said else ""


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
                found = instances.faces().reference(_kept_photo(entry, limits), title, REFERENCE_SIDE)
            except Exception as error:
                said = panel_values.said_in_panel(_said(error), [1])
                notes.append(f"{title}: {said.problem}")
                continue
            shown = np.where(found.mask[..., None], found.picture, found.picture // 4 + GREYED).astype("uint8")
            notes += [] if found.parsed else [found.how]
            cards.append(
                f'<figure class="portrait-card"><img src="{_jpeg_url(shown)}" alt="What guides of {escape(title)}">'
                f"<figcaption>Identity {tab}</figcaption></figure>"
            )
    told = "".join(message_html(f"{text[0].upper()}{text[1:]}.", "info") for text in dict.fromkeys(notes))
    return (f'<div class="portrait-cards">{"".join(cards)}</div>' if cards else "") + told


def _build_layout(gr: Any, tab: str, blocks: list[dict[str, Any]]) -> None:
    """A picture whose faces become the boxes of the people, who keep their order: they can be changed there."""
    upload = gr.File(
        label=panel_values.CONTROL_NAMES["layout"],
        file_types=IMAGE_TYPES,
        type="file",
        height=64,
        elem_id=f"{tab}_portrait_layout",
        elem_classes=["portrait-uploads"],
    )
    upload.do_not_save_to_config = True
    said = gr.HTML(elem_id=f"{tab}_portrait_layout_found")
    outputs = [upload, said, *(block[name] for block in blocks for name in ("region", "box"))]
    upload.upload(
        lambda file, *kept: places_from(file, kept),
        [upload, *(block["photos"] for block in blocks)],
        outputs,
        show_progress=False,
    )


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
        said = message_html(_said(error).detail)
    found: list[Any] = [None, said]
    for tab in range(len(kept)):
        if tab in boxes:
            inner = [round(min(max(edge, 0.0), 1.0), 3) for edge in boxes[tab]]
            found += [inputs.BOX, inputs.box_to_text(inner)]
        else:
            found += [paste.UNCHANGED, paste.UNCHANGED]
    return found


def _connect_region(gr: Any, block: dict[str, Any], tab: str) -> None:
    block["region"].change(
        lambda kind: [gr.update(visible=kind == inputs.BOX), gr.update(visible=kind == inputs.MASK)],
        [block["region"]],
        [block["box_row"], block["mask_column"]],
        show_progress=False,
    )
    _draw_on_change(block["box"], box_html, [block["box"]], [block["box_preview"]])
    _draw_on_change(block["mask"], mask_html, [block["mask"]], [block["mask_found"]])
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
            problems.append(_said(error).detail)
            continue
        if entry not in known:
            listed.append(entry)
            known.append(entry)
        added = True
    kept = inputs.stored_text(listed)
    return kept, _notice_html(kept, " ".join(problems)) if problems else "", added


def _image_of(entry: Any) -> Any:
    """The hash in an entry of the stored list."""
    return entry.get("image") if isinstance(entry, Mapping) else entry


def _notice_html(kept: str, text: str, kind: str = "error") -> str:
    """A message that stands as long as the list of stored photos is this one (`draw_photos`)."""
    return f'<div data-photos="{_digest(kept)}">{message_html(text, kind)}</div>'


def _digest(kept: str) -> str:
    return hashlib.sha256(str(kept or "").encode()).hexdigest()[:16]


def _said(error: Exception) -> PortraitError:
    """What the panel says of an error: of one that no user was meant to see, that it is in the log."""
    if isinstance(error, PortraitError):
        return error
    from modules import errors

    errors.report("Portrait failed", exc_info=True)
    return PortraitError("Portrait", f"it failed with {type(error).__name__}: {error}", "The console says more.", 500)


def _kept_photo(entry: Any, limits: Limits) -> Photo:
    """A stored photo as a request has it, checked as there: the textbox is in the page, and anyone may write to it."""
    values = [True, *[None] * len(panel_values.GLOBAL_FIELDS), inputs.stored_text([entry])]
    form = panel_values.request_from_values(values, limits)
    assert form is not None
    return parse_request(form, limits).identities[0].photos[0]


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
            photo = _kept_photo(entry, limits)
            found = instances.faces().find(photo, title)
            chosen = instances.faces().chosen(photo, title)
        except Exception as error:
            said = panel_values.said_in_panel(_said(error), [1])
            # Another of its faces can be chosen where it is only that one which is not there.
            faces = (
                instances.faces().find(_kept_photo(_image_of(entry), limits), title)
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
    picture = f'<img src="{_jpeg_url(chosen.crop)}" alt="Face found in {escape(title.lower())}">'
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
            f'aria-label="{escape(says)}" title="{escape(says)}"><img src="{_jpeg_url(one.crop, FACE_SIDE)}" alt="">'
            "</button>"
        )
    label = escape(f"Faces in {title.lower()}")
    return f'<div class="portrait-choice" role="group" aria-label="{label}">{"".join(buttons)}</div>'


def _jpeg_url(picture: Any, side: int = CROP_SIDE) -> str:
    """A picture (H, W, 3) or (H, W) uint8 as a data URL of at most `side` pixels."""
    from PIL import Image

    small = Image.fromarray(picture)
    small.thumbnail((side, side))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


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
        message = _notice_html(lists[0], _said(error).detail)
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
            photo = _kept_photo(entry, settings.limits())
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
        mask = instances.faces().mask(_kept_photo(listed[0], settings.limits()), "Mask")
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


def checkpoint_choices(method: str = panel_values.DEFAULT.name) -> list[str]:
    """The choices of the checkpoint control."""
    kits = instances.store().kits(method)
    return [AUTOMATIC] + [kit.name + ("" if kit.usable else panel_values.INCOMPLETE) for kit in kits]


def kept_choice(chosen: str, choices: Sequence[str], method: str) -> str:
    """What the checkpoint control shows of `chosen` when these are the choices, those of a method.

    One that was pasted and is not here stays, to be said and refused; one of another method was chosen for that.
    """
    bare = str(chosen).removesuffix(panel_values.INCOMPLETE)
    for choice in choices:
        if choice.removesuffix(panel_values.INCOMPLETE) == bare:
            return choice
    others = (kit.name for one in declarations() if one.name != method for kit in instances.store().kits(one.name))
    return AUTOMATIC if bare in others else bare


def _wanted(chosen: str, loaded: checkpoint.Loaded, method: str) -> tuple[str, KitStatus | None]:
    """The adapter of a method that a choice of the checkpoint control means with the loaded checkpoint: its name, and
    what is there of it. Raises PortraitError where there is none, and none is published."""
    name = str(chosen).removesuffix(panel_values.INCOMPLETE)
    if name == AUTOMATIC:
        name = loaded.automatic(method)
    return name, next((kit for kit in instances.store().kits(method) if kit.name == name), None)


def weights_html(chosen: str, loaded: checkpoint.Loaded, method: str = panel_values.DEFAULT.name) -> tuple[str, bool]:
    """What the loaded checkpoint lacks to draw people, or what is to be known of it (HTML, or ""); and whether a
    download would help.

    chosen: of the checkpoint control.
    """
    if not declaration(method).has_adapter:
        return _kit_html(loaded), False
    if loaded.family not in (checkpoint.SD15, None):
        text = (
            f"{declaration(method).title} needs a checkpoint of the SD1.5 family, and the loaded one is "
            f"{loaded.family}. Load another."
        )
        return message_html(text, "warning"), False
    try:
        name, kit = _wanted(chosen, loaded, method)
    except PortraitError as error:
        return message_html(error.detail), False
    if kit is None:
        return message_html(f"There is no adapter {name}. Choose another Checkpoint here.", "warning"), False
    if kit.problem is not None:
        return message_html(f"{kit.name}: {kit.problem}"), False
    loadable = any(gap.known for gap in kit.missing)
    how = (
        f"press <b>{panel_values.DOWNLOAD_NAME}</b>, or put them there by hand"
        if loadable
        else "put them there by hand"
    )
    if not kit.usable:
        return _missing_html(
            f"Weights are missing (adapter {escape(kit.name)}): {how}.", kit.missing, "warning"
        ), loadable
    if kit.missing:
        text = f"For several people in one picture a file is missing (adapter {escape(kit.name)}): {how}."
        return _missing_html(text, kit.missing, "info"), loadable
    return _kit_html(loaded), False


def _kit_html(loaded: checkpoint.Loaded) -> str:
    """What the kit of the loaded checkpoint was made for (HTML, or "")."""
    manifest = loaded.manifest()
    if manifest is None:
        return ""
    values = checkpoint.controls(manifest)
    text = (
        f"The checkpoint of the kit {escape(manifest.name)} is loaded. It was made for {values['width']} × "
        f"{values['height']} px with {escape(values['sampling'])}, {values['steps']} steps and CFG "
        f"{values['cfg_scale']}; larger pictures may show a person several times."
    )
    return message_html(text, "info")


def neighbours_html() -> str:
    """What is to be known of other extensions, before anything is drawn (HTML, or "")."""
    advice = adetailer.advice()
    return message_html(advice, "info") if advice else ""


def _missing_html(text: str, gaps: Sequence[Missing], kind: str) -> str:
    """A message (HTML) on missing files, with their names and folders folded away."""
    items = []
    for folder in dict.fromkeys(gap.folder for gap in gaps):
        files = ", ".join(gap.filename for gap in gaps if gap.folder == folder)
        items.append(f"<li>{escape(files)} (into {escape(str(folder))})</li>")
    which = f"<details><summary>Which files, and where they go</summary><ul>{''.join(items)}</ul></details>"
    return f'<div class="portrait-message portrait-{kind}" role="alert">{text}{which}</div>'


def download_missing(chosen: str, loaded: checkpoint.Loaded, method: str = panel_values.DEFAULT.name) -> Iterator[str]:
    """Downloads the published files that a choice of the checkpoint control lacks; messages (HTML) on how it goes, the
    last on how it ended.

    The first file that cannot be had ends it: what comes after usually has the same source.
    """
    try:
        _, kit = _wanted(chosen, loaded, method)
    except PortraitError as error:
        yield message_html(error.detail)
        return
    gaps = kit.missing if kit is not None else ()
    for gap in gaps:
        if gap.known is None:
            continue
        try:
            yield from _download(gap.known, gap.folder)
        except Exception as error:
            yield message_html(_said(error).detail)
            return
    unpublished = [gap.remedy() for gap in gaps if gap.known is None]
    yield message_html(" ".join(unpublished)) if unpublished else message_html("All weights are there.", "info")


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
