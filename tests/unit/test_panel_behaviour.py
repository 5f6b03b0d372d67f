"""What happens when the panel's controls are used, with stand-ins for the host and for the face detector."""

from __future__ import annotations

import importlib
import io
import json
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from lib_portrait.checkpoints import Folders, Store
from lib_portrait.errors import PortraitError
from lib_portrait.request import Limits, Photo

MODULES = ("lib_portrait.webui.panel", "lib_portrait.webui.services", "lib_portrait.webui.settings")


class Faces:
    """A face service that finds as many faces as a photo's hash is told to have."""

    def __init__(self):
        self.counts = {}

    def find(self, photo, field):
        count = self.counts.get(photo.sha256)
        if count is None:
            raise PortraitError(field, "the photo is not kept here (any more)", "Add the photo itself again.")
        if count == 0:
            raise PortraitError(field, "no face was found", "Use another photo.")
        return list(range(count))

    def crop(self, photo, field):
        if (photo.face or 0) >= len(self.find(photo, field)):
            raise PortraitError(f"{field}.face", "there are fewer faces", "Give a lower index.")
        return np.zeros((224, 224, 3), np.uint8)

    def mask(self, photo, field):
        self.find(photo, field)
        return np.ones((16, 8), np.float32)


class Host:
    def __init__(self, tmp_path):
        self.faces = Faces()
        self.kept = []
        self.reported = []
        self.limits = Limits(photos=3)
        self.store = Store(Folders(own=[tmp_path / "models"]))
        self.uploads = tmp_path / "gradio"
        self.uploads.mkdir()

    def upload(self, name, data):
        folder = self.uploads / str(len(list(self.uploads.iterdir())))
        folder.mkdir()
        path = folder / name
        path.write_bytes(data)
        return types.SimpleNamespace(name=str(path), orig_name=name)

    def remember(self, data):
        self.kept.append(data)
        photo = Photo.of(data)
        self.faces.counts.setdefault(photo.sha256, 1)
        return photo.sha256


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return Host(tmp_path)


@pytest.fixture
def panel(host, monkeypatch):
    """The panel's module, imported beside stand-ins for the host's."""
    modules = types.ModuleType("modules")
    modules.errors = types.SimpleNamespace(report=lambda message, exc_info: host.reported.append(message))
    modules.shared = types.SimpleNamespace(opts=types.SimpleNamespace(data={}), cmd_opts=types.SimpleNamespace())
    paths = types.ModuleType("modules.paths_internal")
    paths.data_path = paths.extensions_dir = paths.models_path = str(host.uploads)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "modules.paths_internal", paths)
    package = importlib.import_module("lib_portrait.webui")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        # Also remembered as the package's attribute, for `from lib_portrait.webui import ...`.
        monkeypatch.delattr(package, name.rpartition(".")[2], raising=False)
    loaded = importlib.import_module("lib_portrait.webui.panel")
    services = sys.modules["lib_portrait.webui.services"]
    settings = sys.modules["lib_portrait.webui.settings"]
    monkeypatch.setattr(services, "faces", lambda: host.faces)
    monkeypatch.setattr(services, "store", lambda: host.store)
    monkeypatch.setattr(services, "remember", host.remember)
    monkeypatch.setattr(settings, "limits", lambda: host.limits)
    yield loaded
    for name in MODULES:
        sys.modules.pop(name, None)
        if hasattr(package, name.rpartition(".")[2]):
            delattr(package, name.rpartition(".")[2])


def picture(level):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (level, 90, 200)).save(out, "PNG")
    return out.getvalue()


def stored(*hashes):
    return json.dumps(["sha256:" + sha for sha in hashes], separators=(",", ":"))


A, B, C = (character * 64 for character in "abc")


def cards(html):
    return re.findall(r"<(?:figure|div) class=\"portrait-card[ \"]", html)


# ------------------------------------------------------------------------------------------------------------ uploads


def test_uploads_are_stored_once_and_listed_in_order(panel, host):
    first, second = picture(1), picture(2)
    kept, notice, added = panel.add_photos([host.upload("a.png", first), host.upload("b.png", second)], "")
    assert added and not notice
    assert kept == stored(Photo.of(first).sha256, Photo.of(second).sha256)
    again, notice, added = panel.add_photos([host.upload("c.png", first)], kept)
    assert (again, notice, added) == (kept, "", True)


def test_what_is_refused_is_named_and_the_rest_is_kept(panel, host):
    files = [host.upload("good.png", picture(1)), host.upload("<b>bad.png", b"no picture")]
    kept, notice, added = panel.add_photos(files, "")
    assert added and kept == stored(Photo.of(picture(1)).sha256)
    assert "&lt;b&gt;bad" in notice and "<b>" not in notice


def test_nothing_usable_changes_nothing(panel, host):
    assert panel.add_photos([host.upload("bad.png", b"")], stored(A))[::2] == (stored(A), False)


def test_too_many_photos_are_refused(panel, host):
    kept, notice, _ = panel.add_photos([host.upload(f"{i}.png", picture(i)) for i in range(5)], "")
    assert len(json.loads(kept)) == 3
    assert notice.count("at most 3 photos") == 2


# -------------------------------------------------------------------------------------------------------------- cards


def test_each_photo_has_its_crop(panel, host):
    host.faces.counts = {A: 1, B: 3}
    html = panel.found_html(stored(A, B))
    assert len(cards(html)) == html.count("<img") == html.count("portrait-remove") == 2
    assert "1 face" in html and "Largest of 3 faces" in html
    assert "2nd from left of 3 faces" in panel.found_html(stored(B), "2nd from left", False)
    assert "aligned crop" in panel.found_html(stored(A), "Largest", True)


def test_a_photo_without_a_face_says_so_in_its_place(panel, host):
    host.faces.counts = {A: 1, B: 0}
    html = panel.found_html(stored(A, B))
    assert "Photo 2:" in html and "no face was found" in html
    assert len(cards(html)) == 2


def test_a_photo_no_longer_kept_says_so(panel):
    assert "not kept here" in panel.found_html(stored(C))


def test_a_face_that_is_not_there_says_so(panel, host):
    host.faces.counts = {A: 1}
    assert "fewer faces" in panel.found_html(stored(A), "3rd from left", False)


def test_messages_are_text_and_not_markup(panel, host):
    def crop(photo, field):
        raise PortraitError(field, "<img src=x onerror=alert(1)>", "<script>")

    host.faces.crop = crop
    html = panel.found_html(stored(A))
    assert "<img" not in html and "<script" not in html and "&lt;img" in html


def test_a_fault_of_ours_is_said_and_logged(panel, host):
    host.faces.crop = lambda photo, field: 1 / 0
    assert "ZeroDivisionError" in panel.found_html(stored(A))
    host.faces.find = host.faces.mask = host.faces.crop
    assert "ZeroDivisionError" in panel.spread_faces(stored(A), 2)[0]
    assert "ZeroDivisionError" in panel.mask_html(stored(A))
    assert len(host.reported) == 3


def test_no_photos_no_cards(panel):
    assert panel.found_html("") == panel.found_html("[]") == ""


@pytest.mark.parametrize(
    "kept", ["[", '["../../x"]', '[{"image": 3}]', "<script>", '[{"image": "x", "y": 1}]', "[[[1]]]"]
)
def test_whatever_stands_in_the_textbox_only_gives_a_message(panel, kept):
    html = panel.found_html(kept)
    assert "portrait-error" in html or "portrait-card-error" in html
    assert "<script>" not in html


# ------------------------------------------------------------------------------------------- one identity per face


def test_the_faces_of_a_group_become_identities(panel, host):
    host.faces.counts = {A: 2}
    message, *values = panel.spread_faces(stored(A, B), 3)
    assert message == ""
    assert values[:6] == [stored(A), "1st from left", False, stored(A), "2nd from left", False]
    assert all("value" not in value for value in values[6:])


@pytest.mark.parametrize(
    ("kept", "text"), [("", "no photo"), (stored(A), "3 faces were found, 2 are used"), (stored(B), "one face")]
)
def test_what_cannot_be_spread_is_said(panel, host, kept, text):
    host.faces.counts = {A: 3, B: 1}
    message, *values = panel.spread_faces(kept, 2)
    assert text in message
    assert len(values) == 6


# ------------------------------------------------------------------------------------------------------------ regions


def test_the_box_is_drawn_or_explained(panel):
    assert '<rect x="0" y="10" width="50" height="90"/>' in panel.box_html("0, 10, 50, 100")
    assert panel.box_html("") == panel.box_html(None) == ""
    assert "instead of 4" in panel.box_html("<b>")


def test_a_kept_mask_is_shown(panel, host):
    host.faces.counts = {A: 1}
    assert "<img" in panel.mask_html(stored(A))
    assert "not kept here" in panel.mask_html(stored(B))
    assert panel.mask_html("") == ""
    assert "portrait-error" in panel.mask_html("[3]")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512 x 768", (341, 512)), ("1024 x 512", (512, 256)), ("", (512, 512)), (None, (512, 512)), ("0 x 9", (57, 512))],
)
def test_the_canvas_has_the_pictures_aspect(panel, text, size):
    assert panel.blank_canvas(text).size == size


# ------------------------------------------------------------------------------------------------------------ weights


def test_missing_weights_are_listed_with_their_folder(panel, tmp_path):
    choices, message = panel.checkpoint_choices()
    assert choices == ["automatic", "sd15 (files missing)"]
    assert "uniportrait-faceid_sd15.bin" in message and str(tmp_path / "models") in message


def test_a_download_that_fails_ends_with_its_message(panel, monkeypatch):
    calls = []

    def download(known, folder, progress):
        calls.append(known.filename)
        progress(1, 2)
        if len(calls) == 2:
            raise PortraitError(known.filename, "its source cannot be reached", "Put it there by hand.", 503)

    monkeypatch.setattr(panel, "DOWNLOAD_PERIOD", 0.01)
    monkeypatch.setattr("lib_portrait.checkpoints.download.download", download)
    messages = list(panel.download_missing("sd15"))
    assert len(calls) == 2
    assert "cannot be reached" in messages[-1] and "portrait-error" in messages[-1]
    calls[:] = ["", ""]
    assert "All weights are there" in list(panel.download_missing("automatic"))[-1]
