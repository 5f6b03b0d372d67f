"""A method is added by its own files and one line: everything else is made of what it declares."""

from __future__ import annotations

import argparse
import io
import json
import types
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from lib_portrait.checkpoints import Folders, Store
from lib_portrait.commands import generate
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces.service import FaceService
from lib_portrait.infotext import from_infotext, to_infotext
from lib_portrait.methods import declarations
from lib_portrait.methods.declarations import Declaration
from lib_portrait.request import Identity, Limits, Photo, PortraitRequest, json_schema, parse_request, to_json
from lib_portrait.webui import api, axes, option_controls, panel_values, paste
from tests.toy_method import SIDES, toy

__all__ = ["toy"]

HASH = "a" * 64
OPTIONS = {"scale": 2.5, "side": "both_sides", "mirrored": True, "show_places": True}
OWN = {"depth": 0.25, "style": "both_sides", "kept": False, "called": "old knight"}
FULL = {"method": "toy", **OPTIONS, "identities": [{"photos": [f"sha256:{HASH}"], **OWN, "start": 0.1}]}
DEFAULT = declarations.NAMES[0]


def request(**changes: Any) -> PortraitRequest:
    identity = Identity((Photo(HASH),), start=0.1, options=OWN)
    return PortraitRequest(**{"identities": (identity,), "method": "toy", "options": OPTIONS, **changes})


def test_json_has_its_options_beside_what_all_have(toy: Declaration) -> None:
    assert parse_request(FULL) == request() and to_json(request()) == FULL
    assert request().shows_maps and not request(options={}).shows_maps and request(options={}).with_maps().shows_maps
    plain = parse_request({"method": "toy", "identities": [{"photos": [f"sha256:{HASH}"]}]})
    assert plain.options == {"scale": 3.0, "side": "left", "mirrored": False, "show_places": False}
    assert plain.identities[0].options == {"depth": 0.5, "style": "left", "kept": True, "called": ""}


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"scale": 0.5}, "scale", "1 to 9"),
        ({"side": "up"}, "side", "left, both_sides"),
        ({"mirrored": 1}, "mirrored", "true or false"),
        ({"identities": [{"photos": [HASH], "called": "a;b"}]}, "identities[0].called", "as it stands in the prompt"),
        ({"lora_scale": 1.0}, "lora_scale", "Known with Toy: .*, scale, side, mirrored, show_places"),
        ({"identities": [{"photos": [HASH], "structure": 1}]}, "identities[0].structure", "Known with Toy: .*depth"),
        ({"identities": [{"photos": [HASH], "mix": []}]}, "identities[0].mix", "Known with Toy"),
        ({"method": DEFAULT}, "side", "not known"),
    ],
)
def test_what_it_does_not_know_is_refused_in_its_name(toy: Declaration, changes: Any, field: str, said: str) -> None:
    with pytest.raises(PortraitError, match=said) as caught:
        parse_request({**FULL, **changes})
    assert caught.value.field == field
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid({**FULL, **changes})


def test_requests_made_in_python_have_no_other_options_either(toy: Declaration) -> None:
    with pytest.raises(PortraitError, match="Toy has no such option"):
        request(options={"lora_scale": 1.0})
    with pytest.raises(PortraitError, match="Toy has no such option"):
        request(identities=(Identity((Photo(HASH),), options={"structure": 1.0}),))


def test_the_schema_has_an_object_for_each_method(toy: Declaration) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(FULL) and [one["title"] for one in schema["oneOf"]][-1] == "Toy"
    assert not validator.is_valid({key: value for key, value in FULL.items() if key != "method"})


def test_an_infotext_says_what_differs_and_is_read_back(toy: Declaration) -> None:
    text = to_infotext(request(), "mine")
    assert text == (
        "toy; adapter mine (automatic); scale 2.5; side both_sides; mirrored; show_places"
        f" | {HASH[:12]}; depth 0.25; style both_sides; kept off; called old knight; start 0.1"
    )
    read = from_infotext(text)
    assert (read.options, read.identities[0].options) == (OPTIONS, OWN)


# -------------------------------------------------------------------------------------------------------------- panel


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "scale": st.floats(1, 9),
            "side": st.sampled_from(list(SIDES)),
            "mirrored": st.booleans(),
            "show_places": st.booleans(),
        }
    ),
    st.lists(
        st.fixed_dictionaries(
            {
                "depth": st.floats(0, 1),
                "style": st.sampled_from(list(SIDES)),
                "kept": st.booleans(),
                "called": st.sampled_from(["", "knight", "l'enfant terrible"]),
            }
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_a_request_survives_panel_and_paste(toy: Declaration, options: Any, own: Any) -> None:
    people = tuple(Identity((Photo(HASH),), options=one) for one in own)
    asked = request(identities=people, options=options)
    values, lost = panel_values.values_from_request(asked, 3)
    tabs, form = panel_values.read_form(values, Limits())
    assert (list(tabs), lost) == ([1, 2, 3][: len(own)], []) and parse_request(form) == asked
    pasted, said = paste.pasted_values(to_infotext(asked), 3, lambda photo: Photo(HASH))
    assert pasted is not None and said == ""
    left = [one for one, value in zip(panel_values.controls(3), pasted, strict=True) if value is paste.LEFT]
    assert {one.name for one in left if one.method is None} == {"scale", "lora_scale", "show_routing", "structure"}
    assert all(one.method != "toy" for one in left)
    kept = [value if value is not paste.LEFT else "left as it was" for value in pasted]
    assert parse_request(panel_values.read_form(kept, Limits())[1]) == asked


def test_controls_of_other_methods_are_not_read(toy: Declaration) -> None:
    """Those of the panel stay where they were when another method is chosen."""
    values, _ = panel_values.values_from_request(request(), 2)
    values[1] = declarations.declaration(DEFAULT).title
    _, form = panel_values.read_form(values, Limits())
    common = {"enabled", "method", "checkpoint", "identities", "guidance"}
    assert form is not None and set(form) == {*common, *panel_values.GLOBAL_FIELDS}
    assert parse_request(form).method == DEFAULT
    mixing = panel_values.IDENTITY_FIELDS.index("mix1_photos") + len(panel_values.GLOBAL_FIELDS)
    values[1], values[mixing] = "Toy", json.dumps([f"sha256:{HASH}"])
    _, form = panel_values.read_form(values, Limits())
    assert parse_request(form) == request(), "it mixes nobody, so this is not shown"


def test_further_controls_come_behind_all_that_lists_reach(toy: Declaration) -> None:
    placed = panel_values.controls(2)
    own = len(panel_values.GLOBAL_FIELDS) + 2 * len(panel_values.IDENTITY_FIELDS)
    assert placed[own] is panel_values.BEYOND and all(one.method is None for one in placed[: own + 1])
    assert [(one.name, one.tab) for one in placed if one.method == "toy"] == [
        *((name, None) for name in OPTIONS),
        *((name, tab) for tab in (1, 2) for name in OWN),
    ]


def test_errors_are_said_by_its_titles(toy: Declaration) -> None:
    deep = {"identities": [{"photos": [f"sha256:{HASH}"], "depth": 2}]}
    for changes, said in (({"scale": 99}, "Toy scale: 99 is"), (deep, "Identity 2, depth: 2 is")):
        with pytest.raises(PortraitError) as caught:
            parse_request({**FULL, **changes})
        assert panel_values.said_in_panel(caught.value, [2], toy).detail.startswith(said)


class Gradio:
    """As much of gradio as options need: components remember how they were made."""

    def __getattr__(self, kind: str) -> Any:
        return lambda *args, **how: Component(kind, args, how)


class Component:
    def __init__(self, kind: str, args: Any, how: dict[str, Any]):
        self.kind, self.args, self.how = kind, args, how

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *fault: object) -> None: ...

    def change(self, function: Any, inputs: Any, outputs: Any, **how: Any) -> None:
        self.changed = lambda value: dict(zip(map(id, outputs), function(value), strict=True))


def test_the_panel_shows_the_options_of_the_chosen_method_alone(toy: Declaration) -> None:
    gr, mixed = Gradio(), option_controls.MIXED
    top, block = {"method": Component("Dropdown", (), {})}, {mixed: Component("Accordion", (), {})}
    option_controls.build_maps(gr, top, str)
    for method in declarations.declarations():
        rest = [option for option in method.options if option.name != method.maps]
        option_controls.build_options(gr, top, method, rest, "", str)
        option_controls.build_options(gr, block, method, method.identity_options, "identity 1", str)
    option_controls.connect_method(top, [block])

    for_all = ("scale", "toy_scale", "toy_side", "toy_mirrored", "toy_show_places")
    assert [top[name].kind for name in for_all] == ["Slider", "Slider", "Radio", "Checkbox", "Checkbox"]
    assert [block[f"toy_{name}"].kind for name in OWN] == ["Slider", "Radio", "Checkbox", "Textbox"]
    labels = [f"{one.how['label']}" for one in {*top.values(), *block.values()} if "label" in one.how]
    assert len(labels) == len(set(labels)), "the host saves defaults by them"

    every = {**{f"all {name}": one for name, one in top.items()}, **{f"own {name}": one for name, one in block.items()}}
    parts = {name.split()[1]: [] for name in every if name.endswith((" options", " maps"))}
    for name, one in every.items():
        if name.endswith((" options", " maps")):
            parts[name.split()[1]].append(one)
    assert len(parts[DEFAULT]) == len(parts["toy"]) == 3
    for chosen in (declarations.declaration(DEFAULT), toy):
        visible = top["method"].changed(chosen.title)
        for name, found in parts.items():
            assert all(visible[id(one)]["visible"] is (name == chosen.name) for one in found)
        assert visible[id(block[mixed])]["visible"] is chosen.mixes
    # As the panel is built, nobody has chosen yet.
    assert all(bool(one.how["visible"]) is (name == DEFAULT) for name, found in parts.items() for one in found)


# --------------------------------------------------------------------------------------------- axes, API, command line


def test_axes_are_made_of_its_options(toy: Declaration, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {one.label: one for one in axes._options(types.SimpleNamespace(AxisOption=Axis), 2)}
    own = [label for label in made if "Toy" in label]
    names = ("scale", "side", "mirrored", "depth of 1", "depth of 2", "style", "kept", "called")
    assert own == [f"[Portrait] Toy: {name}" for name in names]
    p = types.SimpleNamespace()
    cell = {"scale": 4.0, "side": "both_sides", "mirrored": "on", "depth of 1": 1.0, "kept": "off", "called": "ada"}
    for label, value in cell.items():
        made[f"[Portrait] Toy: {label}"].apply(p, value, [value])
    changed = parse_request(axes.apply_overrides(FULL, p.portrait_overrides))
    assert changed.options == {**OPTIONS, "scale": 4.0, "side": "both_sides", "mirrored": True}
    assert changed.identities[0].options == {**OWN, "depth": 1.0, "kept": False, "called": "ada"}
    assert made["[Portrait] Toy: side"].choices() == list(SIDES)


class Axis:
    def __init__(self, label: str, kind: type, apply: Any, **options: Any):
        self.label, self.kind, self.apply, self.choices = label, kind, apply, options.get("choices")


def test_the_api_lists_its_options(toy: Declaration) -> None:
    listed = api.list_methods()["methods"][-1]
    assert (listed["name"], listed["title"], listed["mixes"]) == ("toy", "Toy", False)
    assert listed["options"]["scale"] == {"title": "Toy scale", **toy.options[0].schema()}
    assert list(listed["options"]) == list(OPTIONS) and list(listed["identity_options"]) == list(OWN)


def test_the_command_line_has_its_options(toy: Declaration, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    photo = tmp_path / "ada.png"
    photo.write_bytes(b"photo")
    words = "--method toy --scale 2.5 --side both_sides --mirrored --show-places"
    person = f"--face {photo} --depth 0.25 --style both_sides --no-kept --called knight --start 0.1"
    made = generate.request_of(parser.parse_args(f"{words} {person} --face {photo}".split()))
    assert made is not None and (made.method, made.options) == ("toy", OPTIONS)
    assert [one.options for one in made.identities] == [
        {**OWN, "called": "knight"},
        {"depth": 0.5, "style": "left", "kept": True, "called": ""},
    ]
    help = " ".join(parser.format_help().split())
    assert "Toy: how much; 1 to 9, default: 3" in help and "UniPortrait: strength of all people" in help


# ------------------------------------------------------------------------------------------------------- conditioning


def test_a_request_for_it_becomes_its_people_and_its_rule(toy: Declaration, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "toy_small.safetensors")
    conditioner = Conditioner(
        FaceService([], tmp_path / "cache"), Store(Folders(own=[tmp_path]), declarations.adapter_files())
    )
    stream = io.BytesIO()
    Image.fromarray(np.full((224, 224, 3), 7, np.uint8)).save(stream, "PNG")
    person = Identity((Photo.of(stream.getvalue(), aligned=True),), start=0.1, options=OWN)
    made = conditioner.prepare(request(identities=(person,), checkpoint="small"), (64, 64))
    (one,) = made.people
    assert made.adapter["toy"][0] == "toy_small.safetensors" and one.crops[0].shape == (224, 224, 3)
    assert (one.strength, one.start) == (0.25, 0.1)
    rule = made.rule()
    assert [rule.active(progress) for progress in (0.0, 0.1)] == [False, True] and rule.people == [one]
    with pytest.raises(PortraitError, match="small"):
        conditioner.check(PortraitRequest(checkpoint="small"))
