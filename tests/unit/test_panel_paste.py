"""Pasted generation parameters: the panel gets back what it sent, and nothing in them raises into the host."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_portrait.infotext import to_infotext
from lib_portrait.request import Identity, Photo, PortraitRequest, Region, parse_request, to_json
from lib_portrait.webui import paste
from lib_portrait.webui.panel_values import GLOBAL_FIELDS, IDENTITY_FIELDS, controls, request_from_values

WIDTH = len(GLOBAL_FIELDS) + 2 * len(IDENTITY_FIELDS)
KEPT = [64 * digit for digit in "abcd"]
REQUEST = PortraitRequest(
    identities=(
        Identity(
            photos=(Photo(64 * "a"), Photo(64 * "b")),
            region=Region(box=(0.0, 0.1, 0.5, 1.0)),
            options={"structure": 0.3},
        ),
        Identity(photos=(Photo(64 * "c", face=1),), region=Region(mask=Photo(64 * "d")), options={"scale": 1.2}),
    ),
    options={"scale": 0.5, "show_routing": True},
)


def named(photo):
    """The photo by its whole hash, where it is one of those kept."""
    found = [whole for whole in KEPT if whole.startswith(photo.sha256)]
    return dataclasses.replace(photo, sha256=found[0]) if found else photo


def reader(position):
    return paste.reader(position, 2, named)


def message(params):
    return paste.message_update(params, 2, named)["value"]


def pasted(params):
    """The panel's values after pasting, as the host sets them: None where a control is left as it is."""
    updates = [reader(position)(params) for position in range(WIDTH)]
    return [update and update["value"] for update in updates]


def test_round_trip():
    values = pasted({"Portrait": to_infotext(REQUEST), "Steps": "20"})
    assert parse_request(request_from_values(values)) == REQUEST


def test_what_earlier_versions_wrote_is_read():
    values = pasted({"Portrait": json.dumps(to_json(REQUEST), sort_keys=True)})
    assert parse_request(request_from_values(values)) == REQUEST


def test_a_photo_that_is_not_kept_stays_named_as_it_was():
    request = PortraitRequest(identities=(Identity(photos=(Photo(64 * "e"),)),))
    (photo,) = parse_request(request_from_values(pasted({"Portrait": to_infotext(request)}))).identities[0].photos
    assert photo == Photo(12 * "e")


def test_updates_have_the_form_that_panel_and_api_read():
    update = reader(0)({"Portrait": to_infotext(REQUEST)})
    assert update == {"__type__": "generic_update", "value": True}


def test_a_picture_without_portrait_switches_it_off_and_keeps_the_rest():
    assert pasted({"Steps": "20"}) == [False, *[None] * (WIDTH - 1)]
    assert message({"Steps": "20"}) == ""


def test_an_old_upload_or_drawing_does_not_stay_behind():
    for position, name in enumerate(control.name for control in controls(2)[:WIDTH]):
        update = reader(position)({"Portrait": to_infotext(REQUEST)})
        assert update is not None
        if name.endswith("uploads") or name == "drawing":
            assert update["value"] is None


UNREADABLE = [
    "",
    "{",
    "[]",
    "null",
    "[" * 100_000,
    '{"enabled": true}',
    '{"identities": [{"photos": ["../../etc/passwd"]}]}',
    '{"identities": [{"photos": ["sha256:zz"]}]}',
    '{"identities": [{"photos": ["sha256:' + 64 * "a" + '"], "scale": NaN}]}',
    '{"identities": [{"photos": ["sha256:' + 64 * "a" + '"], "scale": 1e999}]}',
    '{"checkpoint": "../x", "identities": [{"photos": ["sha256:' + 64 * "a" + '"]}]}',
    '{"unknown": "<script>alert(1)</script>"}',
    "uniportrait; adapter <script>alert(1)</script> | ../x",
    "uniportrait | " + 200_000 * "a",
    "|" * 100_000,
    '{"identities": "' + 500_000 * "x" + '"}',
    3,
    None,
    ["x"],
    {"identities": []},
]


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: str(text)[:30])
def test_edited_or_hostile_infotext_is_said_and_changes_nothing(text):
    params = {"Portrait": text}
    assert pasted(params) == [False, *[None] * (WIDTH - 1)]
    assert "<script" not in message(params)
    if isinstance(text, str) and text:
        assert "not restored" in message(params)


def test_what_cannot_be_restored_is_said_by_the_panels_names():
    identities = [{"photos": ["sha256:" + 64 * "a"]}, {"photos": ["sha256:" + 64 * "b"], "structure": 9}]
    text = json.dumps({"identities": identities})
    message = paste.message_update({"Portrait": text}, 2, lambda photo: photo)["value"]
    assert "Portrait was not restored. Identity 2, face structure (β): 9 is out of range." in message


KEYS = ["identities", "photos", "mix", "region", "box", "mask", "scale", "image", "face", "x"]
LEAVES = st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(["sha256:" + 64 * "b"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_no_json_raises(value):
    params = {"Portrait": json.dumps(value)}
    assert len(pasted(params)) == WIDTH
    message(params)


def test_an_endless_infotext_is_not_even_parsed():
    assert "too long" in message({"Portrait": " " * (paste.LONGEST + 1)})


def test_more_people_than_tabs_is_said():
    request = PortraitRequest(identities=3 * REQUEST.identities[:1])
    assert "3 people" in message({"Portrait": to_infotext(request)})
    assert pasted({"Portrait": to_infotext(request)})[0] is True


def test_send_to_buttons_find_the_same_functions_in_both_tabs():
    assert reader(3) is reader(3)
    assert len({reader(position) for position in range(WIDTH)}) == WIDTH


def test_files_and_sketches_are_not_sent_from_tab_to_tab():
    # gradio 3 cannot show again what it hands out for them: the button would fail for every field.
    assert {control.name for control in controls(1) if not paste.sendable(control.name)} == {
        "uploads",
        "mix1_uploads",
        "mix2_uploads",
        "drawing",
    }
