"""Reference guidance as it is asked for: JSON, schema, infotext, panel, axes, command line, kits; and by itself."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import types
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_portrait.attention import POSITIVE, Row
from lib_portrait.attention.injection import Call
from lib_portrait.checkpoints import Folders, Store
from lib_portrait.checkpoints.kit import Manifest, Sampling, StoredFile, dump, parse, write_manifest
from lib_portrait.commands import generate
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces.service import FaceService
from lib_portrait.guidance.options import OPTIONS
from lib_portrait.guidance.reference import GuidedPerson, ReferenceGuidance
from lib_portrait.infotext import from_infotext, to_infotext
from lib_portrait.methods.base import Placement, method
from lib_portrait.methods.declarations import ADAPTED, NAMES, adapter_files, declaration
from lib_portrait.options import Choice, Number, defaults
from lib_portrait.request import Guidance, Identity, Photo, PortraitRequest, Region, json_schema, parse_request, to_json
from lib_portrait.webui import api, axes, panel_values, paste
from trainer.companions import of_base

HASH = "sha256:" + 64 * "a"
ALONE = next(name for name in NAMES if name not in ADAPTED)
ADA = {"photos": [HASH]}
GIVEN = {"strength": 0.3, "reference_t": 400, "gradient": "share", "checkpointing": True, "show": False}


def values_of(option: Any) -> st.SearchStrategy[Any]:
    if isinstance(option, Number):
        if option.whole:
            return st.integers(int(option.low), int(option.high))
        return st.floats(option.low, option.high)
    return st.sampled_from(list(option.choices)) if isinstance(option, Choice) else st.booleans()


guidances = st.fixed_dictionaries({}, optional={option.name: values_of(option) for option in OPTIONS})


def ask(guidance: Any = None, *identities: Any, **more: Any) -> dict[str, Any]:
    made = {"identities": list(identities or [ADA]), **more}
    return made if guidance is None else {**made, "guidance": guidance}


# ------------------------------------------------------------------------------------------------------------- request


def test_it_is_off_unless_it_is_asked_for() -> None:
    assert parse_request(ask()).guidance == parse_request(ask({"enabled": False, "strength": 3})).guidance == Guidance()
    assert parse_request(ask({})).guidance == Guidance(True)
    made = parse_request(ask({"strength": 3}, ADA, {**ADA, "guided": False}))
    assert made.guidance == Guidance(True, {"strength": 3.0}) and [one.guided for one in made.identities] == [
        True,
        False,
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_given_is_kept_and_a_kit_says_the_rest_before_the_defaults(name: str) -> None:
    made = parse_request(ask(GIVEN, method=name))
    assert to_json(made)["guidance"] == {"enabled": True, **GIVEN} and parse_request(to_json(made)) == made
    values = made.guidance.values({"strength": 9.0, "block": 2.0})
    assert values == {**defaults(OPTIONS), **GIVEN, "block": 2.0}


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no object", ask(True), "guidance", "no object"),
    ("a list", ask([]), "guidance", "no object"),
    ("unknown option", ask({"p": 3}), "guidance.p", "Known here: enabled, strength"),
    ("enabled is a word", ask({"enabled": "yes"}), "guidance.enabled", "true or false"),
    ("too strong", ask({"strength": 1e4}), "guidance.strength", "0 to 1000"),
    ("NaN", ask({"strength": float("nan")}), "guidance.strength", "out of range"),
    ("a text", ask({"begin": "0.5"}), "guidance.begin", "no number"),
    ("no whole number", ask({"rounds": 2.5}), "guidance.rounds", "whole number"),
    ("beyond the schedule", ask({"reference_t": 1000}), "guidance.reference_t", "0 to 999"),
    ("no choice", ask({"where": "everywhere"}), "guidance.where", "automatic, region"),
    ("no switch", ask({"checkpointing": 1}), "guidance.checkpointing", "true or false"),
    ("bad, but off", ask({"enabled": False, "strength": -1}), "guidance.strength", "0 to 1000"),
    ("guided is no switch", ask({}, {**ADA, "guided": "yes"}), "identities[0].guided", "true or false"),
    ("nobody is guided", ask({}, {**ADA, "guided": False}), "guidance", "acts on nobody"),
    ("alone and off", ask(None, method=ALONE), "guidance", "Switch reference guidance on"),
    ("alone and switched off", ask({"enabled": False}, method=ALONE), "guidance", "Switch reference guidance on"),
    ("alone, and somebody not guided", ask({}, ADA, {**ADA, "guided": False}, method=ALONE), "identities[1].guided",
     "leave them out"),
    ("alone with an adapter", ask({}, method=ALONE, checkpoint="sd15"), "checkpoint", "has no adapters"),
    ("alone with a scale", ask({}, method=ALONE, scale=1), "scale", "Known with Reference guidance only"),
    ("alone with a mix", ask({}, {**ADA, "mix": [ADA]}, method=ALONE), "identities[0].mix", "not known"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "field", "word"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_be_honoured_is_refused_by_its_key(request_: dict[str, Any], field: str, word: str) -> None:
    with pytest.raises(PortraitError, match=word) as caught:
        parse_request(request_)
    assert caught.value.field == field and caught.value.status_code == 422
    parse_request({**ask(), "enabled": False})


def test_requests_made_in_python_have_no_other_options() -> None:
    with pytest.raises(PortraitError, match="no such option") as caught:
        Guidance(True, {"p": 1.0})
    assert caught.value.field == "guidance.p"


def test_the_schema_knows_it_with_every_method() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    for name in NAMES:
        assert validator.is_valid(ask(GIVEN, {**ADA, "guided": True}, method=name))
        assert not validator.is_valid(ask({"p": 1}, method=name))
        assert not validator.is_valid(ask({"rounds": 2.5}, method=name))
        assert validator.is_valid(ask(None, method=name)) is (name != ALONE)
    assert validator.is_valid(ask({}, method=ALONE, checkpoint="automatic"))
    assert not validator.is_valid(ask({}, method=ALONE, checkpoint="sd15"))


# ------------------------------------------------------------------------------------------------------------ infotext


def test_an_infotext_says_what_was_given_and_nothing_of_what_is_off() -> None:
    made = parse_request(ask({"strength": 8.5, "gradient": "share", "checkpointing": True, "show": False}, ADA, ADA))
    text = to_infotext(made, "mine")
    assert text == (
        f"{NAMES[0]}; adapter mine (automatic); guidance; guidance.strength 8.5; guidance.gradient share; "
        f"guidance.checkpointing; guidance.show off | {12 * 'a'} | {12 * 'a'}"
    )
    alone = parse_request(ask({}, ADA, method=ALONE))
    assert to_infotext(alone, "automatic") == f"{ALONE}; guidance | {12 * 'a'}"
    assert "guidance" not in to_infotext(parse_request(ask({"enabled": False, "strength": 3})))
    one = parse_request(ask({}, ADA, {**ADA, "guided": False}))
    assert to_infotext(one).endswith(f" | {12 * 'a'} | {12 * 'a'}; guided off")


@settings(deadline=None)
@given(guidances, st.lists(st.booleans(), min_size=1, max_size=3).filter(any))
def test_infotext_and_panel_bring_every_guidance_back(given_: dict[str, Any], guided: list[bool]) -> None:
    identities = tuple(Identity((Photo(64 * "a"),), guided=one) for one in guided)
    made = PortraitRequest(identities, guidance=Guidance(True, given_))
    read = from_infotext(to_infotext(made))
    assert read.guidance == made.guidance and [one.guided for one in read.identities] == guided

    values, lost = panel_values.values_from_request(made, 3)
    assert lost == [] and len(values) == len(panel_values.controls(3))
    _, form = panel_values.read_form(values, panel_values.Limits())
    again = parse_request(form)
    # The panel has no place for "not given": what stands there is what is meant.
    assert again.guidance == Guidance(True, made.guidance.values({})) and again.identities == made.identities
    assert paste.pasted_values(to_infotext(again), 3, lambda photo: photo)[1] == ""


@pytest.mark.parametrize(
    "clause",
    [
        "guidance on",
        "guidance.p 3",
        "guidance.strength much",
        "guidance; guidance",
        "guidance.block 1; guidance.block 2",
    ],
)
def test_what_an_infotext_cannot_say_of_it_is_not_understood(clause: str) -> None:
    with pytest.raises(PortraitError):
        from_infotext(f"{NAMES[0]}; {clause} | {12 * 'a'}")


# --------------------------------------------------------------------------------------------------------------- panel


def sent(**changes: Any) -> list[Any]:
    """The panel's values with one photo in Identity 2; changes: of controls by their name, guidance_... for its own."""
    blank, _ = panel_values.values_from_request(PortraitRequest((), enabled=False), 2)
    found = []
    for control, value in zip(panel_values.controls(2), blank, strict=True):
        key = f"guidance_{control.name}" if control.guidance else control.name
        if control.tab == 2 and control.name == "photos":
            value = f'["{HASH}"]'
        found.append(changes.get(key, value) if control.tab in (None, 2) else value)
    return found


def test_of_the_panel_it_is_read_also_where_it_is_off_for_an_axis_may_switch_it_on() -> None:
    tabs, form = panel_values.read_form(sent(enabled=True, guidance_strength=3), panel_values.Limits())
    assert form is not None and form["guidance"] == {"enabled": False, **defaults(OPTIONS), "strength": 3}
    assert parse_request(form).guidance == Guidance()
    on = parse_request(axes.apply_overrides(form, {"guidance.enabled": True}, tabs))
    assert on.guidance.options["strength"] == 3.0 and on.identities[0].guided


def test_the_method_without_adapters_leaves_the_choice_of_adapters_alone() -> None:
    title = declaration(ALONE).title
    changes = {"enabled": True, "method": title, "checkpoint": "left over", "scale": 2.0, "guidance_enabled": True}
    _, form = panel_values.read_form(sent(**changes), panel_values.Limits())
    request = parse_request(form)
    assert (request.method, request.checkpoint, request.options) == (ALONE, "automatic", {})


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("guidance", "Reference guidance"),
        ("guidance.strength", "Reference guidance, strength (p)"),
        ("guidance.enabled", "Reference guidance"),
        ("identities[0].guided", "Identity 2, guided by the reference"),
    ],
)
def test_faults_are_told_by_the_panels_names(field: str, said: str) -> None:
    assert panel_values.said_of_tab(field, [2]) == said


# ----------------------------------------------------------------------------------------- axes, API, command line


def test_every_option_with_an_axis_has_one_and_a_switch_for_the_whole() -> None:
    class Axis:
        def __init__(self, label: str, kind: type, apply: Any, **options: Any):
            self.label, self.kind, self.apply, self.choices = label, kind, apply, options.get("choices")

    made = {one.label: one for one in axes._options(types.SimpleNamespace(AxisOption=Axis), 1)}
    wanted = [f"[Portrait] {option.axis}" for option in OPTIONS if option.axis]
    assert len(wanted) > 10 and list(made)[-len(wanted) - 1 :] == ["[Portrait] Reference guidance", *wanted]
    p = types.SimpleNamespace()
    for label, value in (("Guidance strength", 3.0), ("Guidance gradient", "share"), ("Reference guidance", "on")):
        made[f"[Portrait] {label}"].apply(p, value, [value])
    changed = parse_request(axes.apply_overrides(ask(), p.portrait_overrides))
    assert changed.guidance == Guidance(True, {"strength": 3.0, "gradient": "share"})


def test_a_plot_over_what_is_switched_off_is_refused() -> None:
    for off in (ask(), ask({"enabled": False})):
        with pytest.raises(PortraitError, match="switched off. Switch reference guidance on") as caught:
            axes.apply_overrides(off, {"guidance.strength": 3.0})
        assert caught.value.field == "guidance.strength"
    cell = {"guidance.strength": 3.0, "guidance.enabled": False}
    assert parse_request(axes.apply_overrides(ask({}), cell)).guidance == Guidance()
    with pytest.raises(PortraitError, match="no object"):
        parse_request(axes.apply_overrides(ask(7), {"guidance.strength": 3.0}))


def test_the_api_lists_the_options() -> None:
    listed = api.list_methods()
    assert list(listed["guidance"]) == [option.name for option in OPTIONS]
    assert [one["adapter"] for one in listed["methods"]] == [name in ADAPTED for name in NAMES]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("--guidance", {"enabled": True}),
        ("--guidance-strength 0.3 --guidance-gradient share --guidance-show", {"strength": 0.3, "gradient": "share",
                                                                                "show": True}),
        ("--guidance --guidance-reference-t 400 --guidance-checkpointing", {"enabled": True, "reference_t": 400.0,
                                                                            "checkpointing": True}),
    ],
)  # fmt: skip
def test_the_command_line_has_them(tmp_path: Path, words: str, expected: Any) -> None:
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    photo = tmp_path / "ada.png"
    photo.write_bytes(b"photo")
    made = generate.request_of(parser.parse_args(f"{words} --face {photo} --no-guided --face {photo}".split()))
    assert made is not None and [one.guided for one in made.identities] == [False, True]
    options = {name: value for name, value in (expected or {}).items() if name != "enabled"}
    assert made.guidance == Guidance(expected is not None, options)
    file = tmp_path / "request.json"
    file.write_text(json.dumps(ask({"block": 2, "strength": 5})))
    merged = generate.request_of(parser.parse_args(f"{words} --request {file}".split()))
    assert merged is not None and merged.guidance == Guidance(True, {"block": 2.0, "strength": 5.0, **options})


def test_the_help_tells_ranges_and_choices() -> None:
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    help = " ".join(parser.format_help().split())
    for option in OPTIONS:
        assert f"--guidance-{option.name.replace('_', '-')}" in help
    assert "0 to 1000, default: 8.5" in help


# ---------------------------------------------------------------------------------------------------------------- kits

FOUND = {"strength": 0.3, "gradient": "share", "block": 2.0}


def test_a_manifest_keeps_what_was_found_to_work() -> None:
    manifest = Manifest("small", ADAPTED[0], {"faceid": "x.bin"}, guidance=FOUND)
    assert parse(dump(manifest)) == manifest and b'"guidance"' not in dump(Manifest("small", ADAPTED[0], {"a": "x"}))


@pytest.mark.parametrize(
    ("guidance", "word"),
    [('{"p": 1}', "no option of reference guidance"), ('{"strength": -1}', "out of range"), ("[]", "no JSON object"),
     ('{"block": 1.5}', "whole number"), ('{"gradient": 1}', "no choice"), ('{"enabled": true}', "no option")],
)  # fmt: skip
def test_a_manifest_that_says_something_else_of_it_is_refused(guidance: str, word: str) -> None:
    start = json.dumps({"format": 1, "name": "a", "method": ADAPTED[0], "adapter": {"a": "x"}})
    text = f'{start[:-1]}, "guidance": {guidance}}}'
    with pytest.raises(PortraitError, match=word) as caught:
        parse(text.encode(), "a.kit.json")
    assert caught.value.field.startswith("a.kit.json: guidance")


def test_the_adapters_kit_comes_before_the_one_of_the_checkpoint(tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"a checkpoint")
    store = Store(Folders(own=[tmp_path]), adapter_files())
    assert store.guidance(None, base) == {}
    stored = StoredFile(base.name, hashlib.sha256(b"a checkpoint").hexdigest(), len(b"a checkpoint"))
    kit = Manifest(
        "small", ADAPTED[0], {"faceid": "x.bin"}, base=stored, sampling=Sampling("DDIM", 2, 3), guidance=FOUND
    )
    write_manifest(tmp_path / "small.kit.json", kit)
    own = Manifest("own", ADAPTED[0], {"faceid": "x.bin"}, guidance={"strength": 1.0})
    assert store.guidance(None, base) == store.guidance(Manifest("other", ADAPTED[0], {"a": "x"}), base) == FOUND
    assert store.guidance(own, base) == {"strength": 1.0} and store.guidance(None, None) == {}
    # An adapter that is trained on it carries the same.
    model: Any = types.SimpleNamespace(text_encoder=types.SimpleNamespace(config=TEXT), size=64)
    assert of_base(base, model, "CC0", [tmp_path])["guidance"] == FOUND


TEXT = types.SimpleNamespace(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=77)


# ------------------------------------------------------------------------------------------------------- conditioning


def photo(seed: int) -> Photo:
    pixels = np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Photo.of(stream.getvalue(), aligned=True)


def test_everybody_is_ready_to_guide_with_their_own_photos_where_and_when_they_belong(tmp_path: Path) -> None:
    """Without any weights; references about as large as what is sampled."""
    conditioner = Conditioner(FaceService([], tmp_path / "cache"), Store(Folders(own=[tmp_path]), adapter_files()))
    left = Region(box=(0.0, 0.0, 0.5, 1.0))
    people = (
        Identity((photo(1), photo(2)), start=0.25, end=0.75, region=left),
        Identity((photo(3),), guided=False),
    )
    request = PortraitRequest(people, method=ADAPTED[0], guidance=Guidance(True, {"strength": 3.0}))
    guided, notices = conditioner._guided(request, [left.box, None], 130)
    ada, ben = guided
    assert [one.shape for one in ada.references] == [(128, 128, 3)] * 2 and ada.region == left.box
    assert all(one.shape == (128, 128) and 0.1 < one.mean() < 0.9 for one in ada.masks)
    assert not np.array_equal(*ada.references) and (ada.start, ada.end, ada.guided) == (0.25, 0.75, True)
    assert (ben.references, ben.guided) == ((), False)
    assert [one.field for one in notices] == ["guidance"] and "no face parser" in notices[0].text

    alone = PortraitRequest(people[:1], method=ALONE, guidance=Guidance(True, {"strength": 0.0}))
    made = conditioner.prepare(alone, (512, 256), sampled=(64, 192))
    assert made.kit.name == "automatic" and made.adapter is None and made.people[0].strength == 0
    assert made.guided[0].references[0].shape == (64, 64, 3)
    assert "guidance.strength: a strength of 0 leaves reference guidance out." in map(str, made.notices)
    guidance = made.guidance(made.rule())
    assert guidance is not None and guidance.options == {**defaults(OPTIONS), "strength": 0.0}
    off = conditioner.prepare(PortraitRequest(method=ALONE), (64, 64))
    assert off.guidance(off.rule()) is None and off.guided == ()


def test_a_kit_says_what_the_request_leaves_open_and_all_of_it_is_told(tmp_path: Path) -> None:
    conditioner = Conditioner(FaceService([], tmp_path / "cache"), Store(Folders(own=[tmp_path]), adapter_files()))
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"a checkpoint")
    stored = StoredFile(base.name, hashlib.sha256(b"a checkpoint").hexdigest(), len(b"a checkpoint"))
    found = {"strength": 8.5, "gradient": "share", "block": 2.0}
    write_manifest(tmp_path / "a.kit.json", Manifest("a", ADAPTED[0], {"a": "x.bin"}, base=stored, guidance=found))
    request = PortraitRequest(method=ALONE, guidance=Guidance(True, {"block": 3.0, "every": 1.0}))
    # A default that was given says nothing, one of the kit's says that it is meant.
    told = {"strength": 8.5, "gradient": "share", "block": 3.0}
    assert conditioner.resolved(request, base).guidance == Guidance(True, told)
    assert conditioner.resolved(request, None).guidance == Guidance(True, {"block": 3.0})
    again = conditioner.resolved(request, base)
    assert conditioner.resolved(again, base) == again
    assert conditioner.resolved(PortraitRequest(), base) == PortraitRequest()


def test_a_person_guides_within_their_window_only() -> None:
    """As in the attention: what a face has to say outside of it is not heard."""
    person = GuidedPerson(
        (np.zeros((8, 8, 3), np.uint8),), (np.ones((8, 8), bool),), (0.0, 0.0, 1.0, 1.0), True, 0.5, 1.0
    )
    guidance = ReferenceGuidance([person], {**defaults(OPTIONS), "where": "region"})
    guidance._references = {0: [torch.ones(4, 2, 2)]}
    current: Any = types.SimpleNamespace(z=torch.zeros(1, 4, 4, 4), marks=[Row(POSITIVE)])
    energies = []
    for progress in (0.25, 0.5):
        guidance.active(progress)
        energies.append(float(guidance.energy(torch.ones(1, 4, 2, 2), current)))
    assert energies[0] == 0 and energies[1] > 0


# -------------------------------------------------------------------------------------------------------- by itself


def test_the_method_of_nothing_puts_nothing_into_the_attention() -> None:
    alone: Any = method(ALONE)
    region = (0.0, 0.0, 0.5, 1.0)
    person = alone.encode(alone.load({}, {}), None, {}, {}, Placement(region, 0.25, 0.75))
    rule = alone.rule(None, [person], {})
    assert (person.region, person.strength) == (region, 0.0)
    assert [rule.active(progress) for progress in (0.0, 0.5, 0.75)] == [False, True, False]
    site: Any = types.SimpleNamespace(cross=True)
    assert rule.overrides(site, Call()) == {} and not rule.must_visit(site)
    alone.check_fits(None, [])
    assert alone.text_attentions(None) == {} and adapter_files()[-1].method in ADAPTED
