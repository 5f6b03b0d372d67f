"""The panel's controls for what methods let people choose: made of the declarations, and seen while their method is."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from lib_portrait.guidance.options import BEGIN, GUIDED, OPTIONS, SHOW, STRENGTH
from lib_portrait.methods.declarations import Declaration, declarations
from lib_portrait.options import Choice, Number, Option, Word, by_name
from lib_portrait.webui import panel_values
from lib_portrait.webui.paste import UNCHANGED

# The control of a block that is seen where people can be mixed in.
MIXED = "mixed"
# And the one that is seen where the method has adapters to choose among.
ADAPTERS = "checkpoint"
# What the controls of reference guidance are called by, before their own names.
GUIDANCE = "guidance"

GUIDANCE_HELP = "Brings more of the photos into the faces while the picture is drawn (RB-Guidance). Takes longer."
GUIDANCE_FRONT = (STRENGTH, BEGIN)
OPTIONS_A_ROW = 2


def key(control: panel_values.Control) -> str:
    """What a control is called among those of its tab, and its element in the page."""
    owner = GUIDANCE if control.guidance else control.method
    return control.name if owner is None else f"{owner}_{control.name}"


class Label(str):
    """A control's label, to which `whose` is added where it is formatted: "Scale" and "Scale of identity 2".

    The host saves defaults by formatted labels (modules/ui_loadsave.py: add_block), and identities have the same ones.
    """

    def __new__(cls, text: str, whose: str) -> Label:
        made = super().__new__(cls, text)
        made.whose = whose
        return made

    whose: str

    def __format__(self, spec: str) -> str:
        return format(f"{self!s} of {self.whose}", spec)


def slider(gr: Any, number: Number, label: str, elem_id: str) -> Any:
    return gr.Slider(
        minimum=number.low,
        maximum=number.high,
        step=1 if number.whole else 0.01,
        value=number.default,
        label=label,
        tooltip=_tooltip(number),
        elem_id=elem_id,
    )


def _tooltip(option: Option) -> str:
    return f"{option.help[0].upper()}{option.help[1:]}."


def _build_option(gr: Any, option: Option, whose: str, elem_id: str, visible: bool = True) -> Any:
    """The control of an option. whose: tells it from others of the same title, "" where there are none."""
    label = Label(option.title, whose) if whose else option.title
    if isinstance(option, Number):
        return slider(gr, option, label, elem_id)
    if isinstance(option, Choice):
        choices = [(title, value) for value, title in option.choices.items()]
        return gr.Radio(choices, value=option.default, label=label, elem_id=elem_id, tooltip=_tooltip(option))
    if isinstance(option, Word):
        return gr.Textbox(option.default, label=label, max_lines=1, elem_id=elem_id, tooltip=_tooltip(option))
    return gr.Checkbox(option.default, label=label, elem_id=elem_id, tooltip=_tooltip(option), visible=visible)


def build_options(
    gr: Any,
    block: dict[str, Any],
    method: Declaration,
    options: Sequence[Option],
    whose: str,
    name: Callable[[str], str],
) -> None:
    """A row of a method's options, seen while that method is chosen. whose: see `_build_option`."""
    if not options:
        return
    default = method.name == panel_values.DEFAULT.name
    # The host saves defaults by labels, and methods may give options the same title.
    owner = whose if default else f"{whose or 'all identities'} with {method.title}"
    with gr.Row(visible=default) as block[f"{method.name} options"]:
        for option in options:
            made = key(panel_values.Control(option.name, method=None if default else method.name))
            block[made] = _build_option(gr, option, owner, name(made))


def build_maps(gr: Any, block: dict[str, Any], name: Callable[[str], str]) -> None:
    """The switch of each method that asks for its maps."""
    for method in declarations():
        maps = by_name(method.options, method.maps)
        if maps is not None:
            default = method.name == panel_values.DEFAULT.name
            made = key(panel_values.Control(maps.name, method=None if default else method.name))
            block[made] = block[f"{method.name} maps"] = _build_option(
                gr, maps, "" if default else method.title, name(made), default
            )


def build_guidance(gr: Any, top: dict[str, Any], blocks: Sequence[dict[str, Any]], name: Callable[[str], str]) -> None:
    """The section of reference guidance: the settings that matter in front, the others folded away."""
    from modules.ui_components import InputAccordion

    def build(options: Sequence[Option]) -> None:
        with gr.Row():
            for option in options:
                made = key(panel_values.Control(option.name, guidance=True))
                top[made] = _build_option(gr, option, "reference guidance", name(made))

    # Open is on, as with the host's own hires fix.
    with InputAccordion(False, label="Reference guidance", elem_id=name(GUIDANCE)) as top[f"{GUIDANCE}_enabled"]:
        gr.HTML(f'<p class="portrait-help">{GUIDANCE_HELP}</p>')
        build(GUIDANCE_FRONT)
        with gr.Row(elem_classes=["portrait-guided"]):
            for number, block in enumerate(blocks, 1):
                made = key(panel_values.Control(GUIDED.name, number, guidance=True))
                block[made] = gr.Checkbox(
                    GUIDED.default,
                    label=Label(f"Identity {number}", "those that are guided"),
                    tooltip=_tooltip(GUIDED),
                    elem_id=name(f"{number - 1}_{made}"),
                )
        top["guidance_references"] = gr.HTML(elem_id=name("guidance_references"))
        build([SHOW])
        with gr.Row(elem_classes=["portrait-weights"]):
            top["guidance_kit"] = gr.HTML(elem_id=name("guidance_kit"))
            top["guidance_settings"] = gr.Button(
                "Use the kit's values",
                size="sm",
                visible=False,
                elem_id=name("guidance_settings"),
                tooltip="Sets what the makers of the kit found to work, here and below.",
            )
        with gr.Accordion("Details of reference guidance", open=False, elem_id=name("guidance_details")):
            rest = [option for option in OPTIONS if option not in (*GUIDANCE_FRONT, SHOW)]
            for first in range(0, len(rest), OPTIONS_A_ROW):
                build(rest[first : first + OPTIONS_A_ROW])


def connect_method(top: dict[str, Any], blocks: Sequence[dict[str, Any]]) -> None:
    """Shows what concerns the chosen method, and nothing of the others."""
    shown: list[tuple[Any, Callable[[Declaration], bool]]] = []
    for block in (top, *blocks):
        for method in declarations():
            parts = (block.get(f"{method.name} {part}") for part in ("options", "maps"))
            shown += [(part, functools.partial(operator.is_, method)) for part in parts if part is not None]
        for part, tells in ((MIXED, "mixes"), (ADAPTERS, "has_adapter")):
            if part in block:
                shown.append((block[part], operator.attrgetter(tells)))

    def show(title: str) -> list[Any]:
        chosen = panel_values.method_of([True, title])
        return [{**UNCHANGED, "visible": concerns(chosen)} for _, concerns in shown]

    # gradio evaluates the annotations of every handler.
    top["method"].change(lambda title: show(title), [top["method"]], [one for one, _ in shown], show_progress=False)
