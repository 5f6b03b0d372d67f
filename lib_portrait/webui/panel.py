"""The Portrait panel: its controls, and what each leads to when it is used (`panel_photos`, `panel_regions`,
`panel_weights`).

Everything a photo is here is its hash: an upload is stored at once, and the panel remembers the list of hashes in a
textbox that nobody sees (`photos`, `mask`), each with the face chosen on it. So pasting generation parameters, sending
to another tab, uploading and choosing a face all end in the same state, from which the crops are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lib_portrait.guidance.options import GUIDED, OPTIONS
from lib_portrait.methods.declarations import declarations
from lib_portrait.options import defaults
from lib_portrait.request import END, START, WEIGHT
from lib_portrait.webui import (
    checkpoint,
    inputs,
    instances,
    option_controls,
    panel_photos,
    panel_regions,
    panel_values,
    panel_weights,
    paste,
    settings,
)
from lib_portrait.webui.option_controls import Label, slider

REFRESH = "\U0001f504"
IMAGE_TYPES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
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
        button.click(panel_weights.kit_settings, [], outputs, show_progress=False)


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
    choices = panel_weights.checkpoint_choices()
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
        message, loadable = panel_weights.weights_html(chosen, loaded, panel_values.method_of([True, title]).name)
        offered = loaded.manifest() is not None
        return [message + panel_weights.neighbours_html(), gr.update(visible=loadable), gr.update(visible=offered)]

    def look_again(chosen: str, title: str) -> list[Any]:
        method = panel_values.method_of([True, title]).name
        choices = panel_weights.checkpoint_choices(method)
        value = panel_weights.kept_choice(chosen, choices, method)
        return [gr.update(choices=choices, value=value), *judge(value, title)]

    # The badge in the panel's title follows the box, also where pasting has ticked it.
    top["enabled"].change(None, [], [], _js="portraitShowCounts")
    chosen, judged = [top["checkpoint"], top["method"]], [weights, download, top["kit_settings"]]
    refresh.click(look_again, chosen, [top["checkpoint"], *judged], show_progress=False)
    top["method"].change(look_again, chosen, [top["checkpoint"], *judged], show_progress=False)
    top["checkpoint"].change(judge, chosen, judged, show_progress=False)

    def fetch(chosen: str, title: str) -> Iterator[list[Any]]:
        for message in panel_weights.download_missing(
            chosen, checkpoint.loaded(), panel_values.method_of([True, title]).name
        ):
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
        lambda files, kept: panel_photos.take_uploads(files, kept),
        [upload, block[photos]],
        [upload, block[photos], block[f"{photos}_notice"], enabled],
        show_progress=False,
    )
    notice = block[f"{photos}_notice"]
    _draw_on_change(
        block[photos], panel_photos.draw_photos, [block[photos], notice], [block[f"{photos}_found"], notice]
    )


def _draw_on_change(control: Any, draw: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Draws when a control changes, and again after that: gradio 3 drops the events that come while one is served."""

    # gradio evaluates the annotations of every handler, which is half the cost of building: a lambda has none.
    handler = lambda *values: draw(*values)  # noqa: E731
    control.change(handler, inputs, outputs, show_progress=False).then(handler, inputs, outputs, show_progress=False)


def _connect_spread(blocks: list[dict[str, Any]]) -> None:
    first, lists = blocks[0], [block["photos"] for block in blocks]
    outputs = [first["photos_notice"], first["spread_kept"], first["undo"], *lists]
    first["spread"].click(lambda *kept: panel_photos.spread_faces(kept), lists, outputs, show_progress=False)
    undo = [first["spread_kept"], *lists]
    first["undo"].click(
        lambda spread, *kept: panel_photos.undo_spread(spread, kept), undo, outputs, show_progress=False
    )


def _connect_guidance(top: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> None:
    """Shows which part of the photos guides, and what a kit's makers found to work."""
    part = option_controls.GUIDANCE
    enabled, references = top[f"{part}_enabled"], top[f"{part}_references"]
    guided = [block[f"{part}_{GUIDED.name}"] for block in blocks]
    lists = [block["photos"] for block in blocks]
    for control in (enabled, *guided, *lists):
        _draw_on_change(control, panel_photos.references_html, [enabled, *guided, *lists], [references])

    options = [top[f"{part}_{option.name}"] for option in OPTIONS]
    chosen = [top["checkpoint"], top["method"]]
    told = [top[f"{part}_kit"], top[f"{part}_settings"]]

    def tell(adapter: str, title: str) -> list[Any]:
        values = panel_weights.kit_guidance(adapter, title)
        return [panel_weights.guidance_html(values), {**paste.UNCHANGED, "visible": bool(values)}]

    def use(adapter: str, title: str) -> list[Any]:
        values = {**defaults(OPTIONS), **panel_weights.kit_guidance(adapter, title)}
        return [values[option.name] for option in OPTIONS]

    for event in (top["refresh"].click, top["method"].change, top["checkpoint"].change):
        event(tell, chosen, told, show_progress=False)
    top[f"{part}_settings"].click(use, chosen, options, show_progress=False)

    # Who chooses to have nothing else wants it on.
    def switch(title: str, on: bool) -> Any:
        return on or not panel_values.method_of([True, title]).has_adapter

    top["method"].input(switch, [top["method"], enabled], [enabled], show_progress=False)


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
        lambda file, *kept: panel_regions.places_from(file, kept),
        [upload, *(block["photos"] for block in blocks)],
        outputs,
        show_progress=False,
    )


def _connect_region(gr: Any, block: dict[str, Any], tab: str) -> None:
    block["region"].change(
        lambda kind: [gr.update(visible=kind == inputs.BOX), gr.update(visible=kind == inputs.MASK)],
        [block["region"]],
        [block["box_row"], block["mask_column"]],
        show_progress=False,
    )
    _draw_on_change(block["box"], panel_regions.box_html, [block["box"]], [block["box_preview"]])
    _draw_on_change(block["mask"], panel_regions.mask_html, [block["mask"]], [block["mask_found"]])
    block["canvas"].click(
        lambda size: panel_regions.blank_canvas(size),
        [block["canvas_size"]],
        [block["drawing"]],
        _js=f"() => portraitPictureSize('{tab}')",
        show_progress=False,
    )


# ------------------------------------------------------------------------------------------------------------ weights
