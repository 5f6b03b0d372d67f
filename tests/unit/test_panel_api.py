"""The routes' answers, without a server; `tests/webui` asks a real one."""

from __future__ import annotations

import asyncio
import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lib_portrait.checkpoints import Folders, Store
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import NAMES, adapter_files
from lib_portrait.request import Limits, Photo
from lib_portrait.webui import api

LIMITS = Limits()


def picture(size=(48, 40)):
    out = io.BytesIO()
    Image.new("RGB", size, (9, 90, 200)).save(out, "PNG")
    return out.getvalue()


def encoded(data):
    return base64.b64encode(data).decode()


class Faces:
    """Finds two faces in everything."""

    def named(self, photo, field):
        assert field == "image"
        return Photo(64 * "a") if photo.sha256 == 12 * "a" else photo

    def find(self, photo, field):
        assert field == "image"
        self.photo = photo
        return [
            SimpleNamespace(
                face=SimpleNamespace(
                    box=np.array([x, 1, x + side, 1 + side], np.float32),
                    landmarks=np.full((5, 2), x, np.float32),
                    score=0.9,
                    area=side * side,
                ),
                crop=np.full((224, 224, 3), x, np.uint8),
                notices=("small",) if side == 5 else (),
                turn=90,
                bystander=side == 9,
            )
            for x, side in ((2, 5), (20, 9))
        ]


class Request:
    def __init__(self, *chunks, **headers):
        self.chunks = chunks
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    async def stream(self):
        for chunk in self.chunks:
            yield chunk


def test_faces_are_counted_from_the_left():
    faces = Faces()
    answer = api.detect_faces({"image": encoded(picture())}, faces, LIMITS)
    assert answer["sha256"] == Photo.of(picture()).sha256
    assert [face["index"] for face in answer["faces"]] == [0, 1]
    # The larger one is a bystander.
    assert [face["largest"] for face in answer["faces"]] == [True, False]
    assert [face["bystander"] for face in answer["faces"]] == [False, True]
    assert [face["turn"] for face in answer["faces"]] == [90, 90]
    assert [face["notices"] for face in answer["faces"]] == [["small"], []]
    assert answer["faces"][0]["box"] == [2, 1, 7, 6]
    assert len(answer["faces"][0]["landmarks"]) == 5
    assert "crop" not in answer["faces"][0]
    assert not faces.photo.aligned


def test_crops_are_sent_when_asked_for():
    answer = api.detect_faces({"image": encoded(picture()), "aligned": True, "crops": True}, Faces(), LIMITS)
    crop = Image.open(io.BytesIO(base64.b64decode(answer["faces"][1]["crop"])))
    assert crop.size == (224, 224) and crop.getpixel((0, 0)) == (20, 20, 20)


def test_a_photo_named_by_its_first_digits_is_answered_with_the_whole_hash():
    faces = Faces()
    assert api.detect_faces({"image": f"sha256:{12 * 'a'}"}, faces, LIMITS)["sha256"] == 64 * "a"
    assert faces.photo == Photo(64 * "a")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], "body"),
        (None, "body"),
        ({}, "image"),
        ({"image": 3}, "image"),
        ({"image": "not base64!"}, "image"),
        ({"image": ""}, "image"),
        ({"image": "/etc/passwd"}, "image"),
        ({"image": "sha256:xyz"}, "image"),
        ({"image": "QUJD", "aligned": 1}, "aligned"),
        ({"image": "QUJD", "crops": "yes"}, "crops"),
        ({"image": "QUJD", "x": 1}, "x"),
    ],
)
def test_bad_bodies_name_the_field(body, field):
    with pytest.raises(PortraitError) as caught:
        api.detect_faces(body, Faces(), LIMITS)
    assert caught.value.field == field
    assert caught.value.status_code == 422


def test_a_photo_is_kept_only_when_it_is_one():
    kept = []

    def remember(data):
        kept.append(data)
        return Photo.of(data).sha256

    assert api.keep_photo({"image": encoded(picture())}, remember, LIMITS) == {
        "image": f"sha256:{Photo.of(picture()).sha256}"
    }
    for image in (encoded(b"no picture"), "sha256:" + 64 * "a", encoded(picture((4000, 4000)))):
        with pytest.raises(PortraitError):
            api.keep_photo({"image": image}, remember, Limits(photo_pixels=1_000_000))
    assert kept == [picture()]


def test_a_body_too_large_is_read_to_its_end_and_refused():
    request = Request()
    request.chunks = iter([b"x" * 1000] * 20)
    with pytest.raises(PortraitError) as caught:
        asyncio.run(api.read_json(request, 5000))
    assert caught.value.status_code == 413
    assert not list(request.chunks)


def test_an_endless_body_is_cut_off():
    class Endless:
        async def stream(self):
            while True:
                yield b"x" * 1000

    with pytest.raises(PortraitError, match="larger than"):
        asyncio.run(api.read_json(Endless(), 5000))


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\xff", b"[" * 200_000])
def test_a_body_that_is_no_json_is_refused(body):
    with pytest.raises(PortraitError, match="not JSON"):
        asyncio.run(api.read_json(Request(body), 10**6))


def test_a_body_in_pieces():
    assert asyncio.run(api.read_json(Request(b'{"image"', b": 3}"), 100)) == {"image": 3}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content_type": ""},
        {"content_type": "text/plain"},
        {"content_type": "text/plain; application/json"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_type": "multipart/form-data; boundary=application/json"},
        {"content_type": "application/jsonx"},
    ],
)
def test_what_a_page_of_another_site_may_send_unasked_is_refused(headers):
    with pytest.raises(PortraitError, match="Content-Type: application/json") as caught:
        api.require_json(Request(b"{}", **headers))
    assert caught.value.status_code == 415


@pytest.mark.parametrize("given", ["application/json", "Application/JSON", "application/json; charset=utf-8"])
def test_a_request_that_says_it_is_json_is_taken(given):
    api.require_json(Request(b"{}", content_type=given))


def test_credentials_are_the_hosts():
    accepted = api.credentials("ann:secret,bob:pass:word")
    assert api.matches(accepted, "ann", "secret")
    assert api.matches(accepted, "bob", "pass:word")
    for user, password in (("ann", ""), ("ann", "secret "), ("bob", "secret"), ("eve", "secret"), ("ann", "sécret")):
        assert not api.matches(accepted, user, password)
    assert api.credentials(None) == api.credentials("") == {}


def test_errors_have_the_hosts_form_and_the_field():
    error = PortraitError("identities[0].photos[1]", "no face was found", "Use another photo.")
    assert api.error_json(error) == {
        "error": "PortraitError",
        "field": "identities[0].photos[1]",
        "detail": "identities[0].photos[1]: no face was found. Use another photo.",
    }


def test_methods():
    assert [method["name"] for method in api.list_methods()["methods"]] == list(NAMES)


def test_models_say_what_is_missing_and_where_it_goes(tmp_path):
    answer = api.list_models(Store(Folders(own=[tmp_path]), adapter_files()))
    kit = next(kit for kit in answer["checkpoints"] if kit["name"] == "sd15")
    assert not kit["usable"]
    assert {gap["role"] for gap in kit["missing"]} == {"faceid", "router", "backbone", "vision"}
    assert all(gap["folder"] == str(tmp_path) and gap["source"].startswith("https://") for gap in kit["missing"])
    parts = {part.role for files in adapter_files() for part in files.parts}
    assert set(answer["roles"]) == parts | {"backbone", "vision", "detector", "parser"}
    assert answer["roles"]["router"]["use"] == "ID router and LoRA for several people"
