"""Promises of `lib_portrait.request`: what is accepted, what is refused and how, JSON and infotext forms."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_portrait.errors import PortraitError
from lib_portrait.infotext import from_infotext, to_infotext
from lib_portrait.request import (
    HASH_DIGITS,
    Identity,
    Limits,
    Mix,
    Photo,
    PortraitRequest,
    Region,
    json_schema,
    parse_request,
    to_json,
    with_photos,
)

PHOTO = base64.b64encode(b"not really a picture").decode()
HASH = "sha256:" + "0f" * 32


def asked(**changes: Any) -> dict[str, Any]:
    return {"identities": [{"photos": [PHOTO]}], **changes}


def one(**changes: Any) -> dict[str, Any]:
    return asked(identities=[{"photos": [PHOTO], **changes}])


def test_defaults() -> None:
    request = parse_request(asked())
    assert request == PortraitRequest(identities=(Identity(photos=(Photo.of(b"not really a picture"),)),))
    assert request.options == {"scale": 0.7, "lora_scale": 1.0, "show_routing": False}
    assert request.identities[0].options == {"scale": 1.0, "structure": 0.1}
    assert parse_request({"enabled": False}).identities == ()


REFUSED = [
    ([], "Portrait", "no object"),
    (asked(colour="red"), "colour", "not known"),
    (one(strength=1), "identities[0].strength", "not known"),
    (asked(enabled=1), "enabled", "neither true nor false"),
    (asked(method="magic"), "method", "is not a method"),
    (asked(method=7), "method", "no name"),
    (asked(checkpoint="../secret"), "checkpoint", "bare file name"),
    (asked(checkpoint="C:\\weights"), "checkpoint", "bare file name"),
    (asked(checkpoint=".hidden"), "checkpoint", "bare file name"),
    (asked(checkpoint="a\0b"), "checkpoint", "bare file name"),
    (asked(checkpoint=""), "checkpoint", "no name"),
    (asked(scale=float("nan")), "scale", "out of range"),
    (asked(scale=float("inf")), "scale", "out of range"),
    (asked(scale=-0.1), "scale", "out of range"),
    (asked(scale=10**400), "scale", "out of range"),
    (asked(scale="0.7"), "scale", "no number"),
    (asked(scale=True), "scale", "no number"),
    (asked(lora_scale=2.1), "lora_scale", "out of range"),
    (asked(identities=[]), "identities", "empty"),
    (asked(identities={"photos": []}), "identities", "no list"),
    (asked(identities=[{"photos": [PHOTO]}] * 5), "identities", "5 were given"),
    (asked(identities=[3]), "identities[0]", "no object"),
    (asked(identities=[{}]), "identities[0].photos", "no photo"),
    (one(photos=[]), "identities[0].photos", "no photo"),
    (one(photos=PHOTO), "identities[0].photos", "no list"),
    (one(photos=[PHOTO] * 9), "identities[0].photos", "9 photos"),
    (one(photos=[5]), "identities[0].photos[0]", "no image"),
    (one(photos=["%%%"]), "identities[0].photos[0]", "not valid base64"),
    (one(photos=["data:image/png,abc"]), "identities[0].photos[0]", "not base64"),
    (one(photos=["data:image/png;base64,"]), "identities[0].photos[0]", "0 bytes"),
    (one(photos=["sha256:" + "0f" * 5 + "0"]), "identities[0].photos[0]", "malformed"),
    (one(photos=["sha256:" + "0f" * 32 + "0"]), "identities[0].photos[0]", "malformed"),
    (one(photos=["sha256:" + "0f" * 6 + "/../../x"]), "identities[0].photos[0]", "malformed"),
    (one(photos=["sha256:" + "../" * 22]), "identities[0].photos[0]", "malformed"),
    (one(photos=[{"image": PHOTO, "face": -1}]), "identities[0].photos[0].face", "no face"),
    (one(photos=[{"image": PHOTO, "face": "left"}]), "identities[0].photos[0].face", "no face"),
    (one(photos=[{"image": PHOTO, "path": "/etc/passwd"}]), "identities[0].photos[0].path", "not known"),
    (one(photos=[{"face": 1}]), "identities[0].photos[0].image", "no image"),
    (one(scale=3), "identities[0].scale", "out of range"),
    (one(structure=-1), "identities[0].structure", "out of range"),
    (one(start=0.5, end=0.5), "identities[0].start", "not before end"),
    (one(start=2), "identities[0].start", "out of range"),
    (one(region={}), "identities[0].region", "either a box or a mask"),
    (one(region={"box": [0, 0, 1, 1], "mask": PHOTO}), "identities[0].region", "either a box or a mask"),
    (one(region={"box": [0, 0, 1]}), "identities[0].region.box", "3 numbers"),
    (one(region={"box": [0.5, 0, 0.5, 1]}), "identities[0].region.box", "empty"),
    (one(region={"box": [0, 0, 2, 1]}), "identities[0].region.box[2]", "out of range"),
    (one(region="left"), "identities[0].region", "no object"),
    (one(mix=[{"photos": [PHOTO], "weight": 0.6}] * 2), "identities[0].mix", "add up to 1.2"),
    (one(mix=[{"weight": 0.6}]), "identities[0].mix[0].photos", "no photo"),
]


@pytest.mark.parametrize(("value", "field", "problem"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_honoured_names_field_and_remedy(value: Any, field: str, problem: str) -> None:
    with pytest.raises(PortraitError) as caught:
        parse_request(value)
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert len(caught.value.remedy) > 10
    assert caught.value.status_code == 422
    assert caught.value.detail == str(caught.value)


def test_sizes_are_checked_before_decoding() -> None:
    limits = Limits(photo_bytes=100)
    with pytest.raises(PortraitError, match="larger than"):
        parse_request(one(photos=["A" * 1000]), limits)
    parse_request(one(photos=[base64.b64encode(b"x" * 100).decode()]), limits)


def test_long_values_are_not_thrown_back_whole() -> None:
    with pytest.raises(PortraitError) as caught:
        parse_request(asked(scale="9" * 10_000))
    assert len(str(caught.value)) < 300


windows = {"start": st.floats(0, 0.49), "end": st.floats(0.5, 1)}
photos = st.lists(
    st.builds(
        Photo.of, st.binary(min_size=1, max_size=30), face=st.none() | st.integers(0, 999), aligned=st.booleans()
    ),
    min_size=1,
    max_size=8,
).map(tuple)
edges = st.tuples(*[st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.5, 1), st.floats(0.5, 1)])
regions = st.none() | st.builds(Region, box=edges) | st.builds(Region, mask=photos.map(lambda found: found[0]))
mixes = st.lists(st.builds(Mix, photos, st.floats(0, 0.5)), max_size=2).map(tuple)
own_options = st.fixed_dictionaries({"scale": st.floats(0, 2), "structure": st.floats(0, 2)})
identities = st.builds(Identity, photos=photos, region=regions, mix=mixes, options=own_options, **windows)
requests = st.builds(
    PortraitRequest,
    identities=st.lists(identities, min_size=1, max_size=4).map(tuple),
    checkpoint=st.sampled_from(["automatic", "sd15", "my own"])
    # What separates and escapes in infotext.
    | st.text(st.sampled_from("a%2C(automatic);|,\"'# \u3000é"), min_size=1, max_size=20),
    options=st.fixed_dictionaries(
        {"scale": st.floats(0, 2), "lora_scale": st.floats(0, 2), "show_routing": st.booleans()}
    ),
)


def shortened(photo: Photo) -> Photo:
    return dataclasses.replace(photo, sha256=photo.sha256[:HASH_DIGITS])


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


@settings(deadline=None)
@given(requests)
def test_infotext_and_json_bring_the_same_request_back_without_pictures(request: PortraitRequest) -> None:
    assert from_infotext(to_infotext(request)) == with_photos(request, shortened)
    assert parse_request(to_json(request)) == request
    assert VALIDATOR.is_valid(to_json(request))


@given(requests)
def test_infotext_is_one_line_that_the_host_neither_quotes_nor_escapes(request: PortraitRequest) -> None:
    """modules/infotext_utils.py: quote; and re_param, which ends a value at a comma."""
    text = to_infotext(request)
    assert not re.search(r"[,:\n\"{]", text)
    assert text == text.strip()


@given(requests)
def test_infotext_written_by_earlier_versions_is_read(request: PortraitRequest) -> None:
    assert from_infotext(json.dumps(to_json(request), sort_keys=True)) == request


def test_infotext_reads_well() -> None:
    """Whole pictures' requests, as they stand in the parameters."""
    ada, ben, cleo = (Photo(digit * 64) for digit in "abc")
    group = dataclasses.replace(ada, face=1)
    assert to_infotext(PortraitRequest((Identity((ada,)),)), "sd15") == (
        "uniportrait; adapter sd15 (automatic) | aaaaaaaaaaaa"
    )
    assert to_infotext(
        PortraitRequest(
            (
                Identity((ada, group), options={"structure": 0.3}, region=Region(box=(0.0, 0.0, 0.5, 1.0))),
                Identity((ben,), options={"scale": 0.9}, start=0.1, end=0.75, region=Region(mask=cleo)),
                Identity((cleo,), mix=(Mix((ada, ben), 0.25), Mix((dataclasses.replace(ben, aligned=True),), 0.5))),
            ),
            checkpoint="mine",
            options={"scale": 1.0, "lora_scale": 0.8, "show_routing": True},
        ),
        "mine",
    ) == (
        "uniportrait; adapter mine; scale 1; lora_scale 0.8; show_routing"
        " | aaaaaaaaaaaa aaaaaaaaaaaa#1; structure 0.3; box 0 0 0.5 1"
        " | bbbbbbbbbbbb; scale 0.9; start 0.1; end 0.75; mask cccccccccccc"
        " | cccccccccccc; mix 0.25 of aaaaaaaaaaaa bbbbbbbbbbbb; mix 0.5 of bbbbbbbbbbbb#aligned"
    )


@given(requests, st.sampled_from(["sd15", "world", "an (automatic)", "a, b"]))
def test_pasting_brings_the_adapter_that_automatic_chose(request: PortraitRequest, chosen: str) -> None:
    read = from_infotext(to_infotext(request, chosen))
    assert read.checkpoint == (chosen if request.checkpoint == "automatic" else request.checkpoint)


A = "a" * 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a method"),
        ("uniportrait", "the list is empty"),
        ("uniportrait |", "no photo"),
        (f"magic | {A}", "is not a method"),
        (f"uniportrait; scale | {A}", "not understood"),
        (f"uniportrait; scale 1; scale 2 | {A}", "not understood"),
        (f"uniportrait; adapter a; adapter b | {A}", "not understood"),
        (f"uniportrait; adapter ../x | {A}", "bare file name"),
        (f"uniportrait; adapter ..%2Fx | {A}", "bare file name"),
        (f"uniportrait; adapter %00 | {A}", "bare file name"),
        (f"uniportrait; identities 3 | {A}", "not understood"),
        (f"uniportrait; show_routing 0 | {A}", "not understood"),
        (f"uniportrait; scale nan | {A}", "out of range"),
        (f"uniportrait | {A}; scale 3", "out of range"),
        (f"uniportrait | {A}; scale 1; scale 1", "not understood"),
        (f"uniportrait | {A}; photos {A}", "not understood"),
        (f"uniportrait | {A}; region {A}", "not understood"),
        (f"uniportrait | {A}; box 0 0 1", "3 numbers"),
        (f"uniportrait | {A}; box 0 0 1 x", "not understood"),
        (f"uniportrait | {A}; box 0 0 1 1; box 0 0 1 1", "not understood"),
        (f"uniportrait | {A}; box 0 0 1 1; mask {A}", "either a box or a mask"),
        (f"uniportrait | {A}; mask {A} {A}", "not understood"),
        (f"uniportrait | {A}; mix {A}", "not understood"),
        (f"uniportrait | {A}; mix 0.5 of", "not understood"),
        (f"uniportrait | {A[1:]}", "not understood"),
        (f"uniportrait | {A.upper()}", "not understood"),
        (f"uniportrait | {A}#1000", "is no face"),
        (f"uniportrait | {A}#aligned#1", "not understood"),
        ("uniportrait | ../../etc/passwd", "not understood"),
        ('{"identities": ', "not JSON"),
    ],
)
def test_edited_infotext_is_refused_with_words(text: str, said: str) -> None:
    with pytest.raises(PortraitError, match=said):
        from_infotext(text)


pieces = st.sampled_from(
    [
        *("uniportrait", "adapter", "sd15", "scale", "box", "mask", "mix", "of", "show_routing", "region", "photos"),
        *("0.5", "1", "nan", "1e999", A, A + "#2", A + "#aligned", "(automatic)"),
        *(";", " ", " | ", "{", "[", "%", "\n", '"'),
    ]
)


@given(st.text(max_size=200) | st.lists(pieces, max_size=30).map(" ".join))
def test_any_text_as_infotext_gives_a_request_or_a_portrait_error(text: str) -> None:
    with contextlib.suppress(PortraitError):
        from_infotext(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["identities", "photos", "region", "box", "mask", "mix", "scale", "image", "face", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_gives_a_request_or_a_portrait_error(value: Any) -> None:
    with contextlib.suppress(PortraitError):
        parse_request(value)


def test_the_schema_is_one_and_says_the_same_as_parsing() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema)
    assert VALIDATOR.is_valid(asked())
    said = [value for value, _, problem in REFUSED if not VALIDATOR.is_valid(value)]
    # What a schema cannot say: contents of strings, sums, an order between two fields, an empty enabled request.
    unsaid = {"bare file name", "base64", "malformed", "bytes", "add up", "not before", "empty"}
    for value, _, problem in REFUSED:
        # NaN is no JSON: a schema says nothing of it.
        assert "nan" in repr(value) or value in said or any(part in problem for part in unsaid), (value, problem)
