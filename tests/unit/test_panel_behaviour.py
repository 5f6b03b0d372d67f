"""What happens when the panel's controls are used, with stand-ins for the host and for the face detector."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import shutil
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lib_portrait.checkpoints import Folders, Store
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import Manifest, Sampling, StoredFile, TextEncoder, read_manifest, write_manifest
from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.request import Limits, Photo

WORLD = Path(__file__).resolve().parents[2] / "models" / "world"
PARTS = ("panel", "panel_photos", "panel_regions", "panel_weights")
MODULES = tuple(f"lib_portrait.webui.{name}" for name in ("adetailer", "checkpoint", "instances", "settings", *PARTS))


def face(shade, *notices, bystander=False):
    return types.SimpleNamespace(
        crop=np.full((224, 224, 3), shade, np.uint8), notices=notices, bystander=bystander, aligned=False
    )


class Faces:
    """A face service that finds the faces that a photo's hash is told to have; the second, if any, is the largest."""

    def __init__(self):
        self.photos = {}
        self.tries = 0

    @property
    def counts(self):
        return {sha: len(faces) for sha, faces in self.photos.items()}

    @counts.setter
    def counts(self, counts):
        self.photos = {sha: [face(20 * i) for i in range(count)] for sha, count in counts.items()}

    def find(self, photo, field):
        self.tries += 1
        faces = self.photos.get(photo.sha256)
        if faces is None:
            raise PortraitError(field, "the photo is not kept here (any more)", "Add the photo itself again.")
        if not faces:
            raise PortraitError(field, "no face was found", "Use another photo.")
        return faces

    def chosen(self, photo, field):
        found = self.find(photo, field)
        if photo.face is None:
            return found[min(1, len(found) - 1)]
        if photo.face >= len(found):
            raise NoSuchFace(f"{field}.face", photo.face, len(found))
        return found[photo.face]

    def reference(self, photo, field, size):
        mask = np.zeros((size, size), bool)
        mask[size // 4 : size // 2] = True
        picture = np.broadcast_to(self.chosen(photo, field).crop[:1, :1], (size, size, 3))
        return types.SimpleNamespace(picture=picture, mask=mask, parsed=False, how="there is no parser")

    def mask(self, photo, field):
        self.find(photo, field)
        return np.ones((16, 8), np.float32)


class Host:
    def __init__(self, tmp_path):
        self.faces = Faces()
        self.kept = []
        self.reported = []
        self.limits = Limits(photos=3)
        self.store = Store(Folders(own=[tmp_path / "models"]), adapter_files())
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
        self.faces.photos.setdefault(photo.sha256, [face(0)])
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
    modules.scripts = types.SimpleNamespace(scripts_data=[])
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
    instances = sys.modules["lib_portrait.webui.instances"]
    settings = sys.modules["lib_portrait.webui.settings"]
    monkeypatch.setattr(instances, "faces", lambda: host.faces)
    monkeypatch.setattr(instances, "store", lambda: host.store)
    monkeypatch.setattr(instances, "remember", host.remember)
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


def entry(sha, **own):
    return {"image": "sha256:" + sha, **own}


def listed(*entries):
    return json.dumps(entries, separators=(",", ":"))


A, B, C = (character * 64 for character in "abc")


def cards(html):
    return re.findall(r"<(?:figure|div) class=\"portrait-card[ \"]", html)


# ------------------------------------------------------------------------------------------------------------ uploads


def test_uploads_are_stored_once_and_listed_in_order(panel, host):
    first, second = picture(1), picture(2)
    kept, notice, added = panel.panel_photos.add_photos([host.upload("a.png", first), host.upload("b.png", second)], "")
    assert added and not notice
    assert kept == stored(Photo.of(first).sha256, Photo.of(second).sha256)
    again, notice, added = panel.panel_photos.add_photos([host.upload("c.png", first)], kept)
    assert (again, notice, added) == (kept, "", True)


def test_a_photo_whose_face_was_chosen_is_not_added_again(panel, host):
    data = picture(1)
    kept = listed(entry(Photo.of(data).sha256, face=1))
    assert panel.panel_photos.add_photos([host.upload("a.png", data)], kept) == (kept, "", True)


def test_a_notice_goes_with_the_list_it_was_about(panel, host):
    host.faces.counts = {A: 1}
    kept, notice, _ = panel.panel_photos.add_photos([host.upload("bad.png", b"no picture")], stored(A))
    assert "bad.png" in notice
    # The page asks for the cards once with both, and again whenever the list has changed.
    assert panel.panel_photos.draw_photos(kept, notice) == [panel.panel_photos.found_html(kept), panel.paste.UNCHANGED]
    for changed in ("", stored(A, A), listed(entry(A, face=0))):
        assert panel.panel_photos.draw_photos(changed, notice)[1] == ""
    assert panel.panel_photos.draw_photos(kept, "")[1] == panel.paste.UNCHANGED


def test_what_is_refused_is_named_and_the_rest_is_kept(panel, host):
    files = [host.upload("good.png", picture(1)), host.upload("<b>bad.png", b"no picture")]
    kept, notice, added = panel.panel_photos.add_photos(files, "")
    assert added and kept == stored(Photo.of(picture(1)).sha256)
    assert "&lt;b&gt;bad" in notice and "<b>" not in notice


def test_nothing_usable_changes_nothing(panel, host):
    assert panel.panel_photos.add_photos([host.upload("bad.png", b"")], stored(A))[::2] == (stored(A), False)


def test_too_many_photos_are_refused(panel, host):
    kept, notice, _ = panel.panel_photos.add_photos([host.upload(f"{i}.png", picture(i)) for i in range(5)], "")
    assert len(json.loads(kept)) == 3
    assert notice.count("at most 3 photos") == 2


# -------------------------------------------------------------------------------------------------------------- cards


def test_each_photo_has_its_crop(panel, host):
    host.faces.counts = {A: 1, B: 3}
    html = panel.panel_photos.found_html(stored(A, B))
    assert len(cards(html)) == html.count("<figcaption>") == html.count("portrait-remove") == 2
    assert "1 face" in html and "Largest of 3 faces" in html
    assert "2nd from left of 3 faces" in panel.panel_photos.found_html(listed(entry(B, face=1)))
    assert "aligned crop" in panel.panel_photos.found_html(listed(entry(A, aligned=True)))


def choice(html):
    """The faces to choose from, as (number, whether it is the one in use)."""
    return [
        (int(number), pressed == "true")
        for number, pressed in re.findall(r'data-face="(\d+)" aria-pressed="(\w+)"', html)
    ]


def test_the_faces_of_each_photo_stand_on_its_card(panel, host):
    host.faces.counts = {A: 1, B: 3}
    alone, group = panel.panel_photos.found_html(listed("sha256:" + A, entry(B, face=2))).split('data-index="1"')
    assert choice(alone) == []
    assert choice(group) == [(0, False), (1, False), (2, True)]
    # Without a choice the one in use is marked, and a face that is not there leaves those that are.
    assert choice(panel.panel_photos.found_html(stored(B))) == [(0, False), (1, True), (2, False)]
    assert choice(panel.panel_photos.found_html(listed(entry(B, face=7)))) == [(0, False), (1, False), (2, False)]
    assert choice(panel.panel_photos.found_html(listed(entry(B, aligned=True)))) == []


def test_what_is_to_be_known_of_a_face_stands_on_its_card(panel, host):
    host.faces.photos = {A: [face(1, "the photo was turned"), face(2, "it is <small>", bystander=True)]}
    html = panel.panel_photos.found_html(listed(entry(A, face=0)))
    assert '<p class="portrait-notice">the photo was turned</p>' in html and html.count("portrait-notice") == 1
    assert html.count("portrait-bystander") == 1 and "Bystander; it is &lt;small&gt;" in html
    assert "Bystander of 2 faces" in panel.panel_photos.found_html(listed(entry(A, face=1)))


def test_a_photo_without_a_face_says_so_in_its_place(panel, host):
    host.faces.counts = {A: 1, B: 0}
    html = panel.panel_photos.found_html(stored(A, B))
    assert "Photo 2:" in html and "no face was found" in html
    assert len(cards(html)) == 2
    # A detector is slow: once for each photo, and once more for the face of the one that has some.
    assert host.faces.tries == 3


def test_a_photo_no_longer_kept_says_so(panel):
    assert "not kept here" in panel.panel_photos.found_html(stored(C))


def test_a_face_that_is_not_there_says_so(panel, host):
    host.faces.counts = {A: 1}
    html = panel.panel_photos.found_html(listed(entry(A, face=2)))
    assert "the 3rd face from the left was chosen, but there is one face" in html and choice(html) == [(0, False)]


def test_messages_are_text_and_not_markup(panel, host):
    def find(photo, field):
        raise PortraitError(field, "<img src=x onerror=alert(1)>", "<script>")

    host.faces.find = find
    html = panel.panel_photos.found_html(stored(A))
    assert "<img" not in html and "<script" not in html and "&lt;img" in html


def test_a_fault_of_ours_is_said_and_logged(panel, host):
    host.faces.find = host.faces.mask = lambda photo, field: 1 / 0
    assert "ZeroDivisionError" in panel.panel_photos.found_html(stored(A))
    assert "ZeroDivisionError" in panel.panel_photos.spread_faces([stored(A), ""])[0]
    assert "ZeroDivisionError" in panel.panel_regions.mask_html(stored(A))
    assert len(host.reported) == 3


def test_no_photos_no_cards(panel):
    assert panel.panel_photos.found_html("") == panel.panel_photos.found_html("[]") == ""


@pytest.mark.parametrize(
    "kept", ["[", '["../../x"]', '[{"image": 3}]', "<script>", '[{"image": "x", "y": 1}]', "[[[1]]]"]
)
def test_whatever_stands_in_the_textbox_only_gives_a_message(panel, kept):
    html = panel.panel_photos.found_html(kept)
    assert "portrait-error" in html or "portrait-card-error" in html
    assert "<script>" not in html


# ------------------------------------------------------------------------------------------- one identity per face


def spread(panel, *lists):
    """The message of *One identity per face*, whether it can be undone, and the lists after it."""
    message, kept, undo, *updates = panel.panel_photos.spread_faces(lists)
    after = [old if new == panel.paste.UNCHANGED else new for new, old in zip(updates, lists, strict=True)]
    assert (undo == {**panel.paste.UNCHANGED, "visible": True}) is ("after" in kept)
    return message, kept, after


def test_the_faces_of_a_group_become_identities(panel, host):
    host.faces.counts = {A: 2}
    message, _, after = spread(panel, stored(A), "", "")
    assert message == "" and after == [listed(entry(A, face=0)), listed(entry(A, face=1)), ""]
    # Once more changes nothing, nor does it lose tabs to itself.
    assert spread(panel, *after)[2] == after


def test_the_group_is_found_where_it_stands_and_nothing_is_lost(panel, host):
    host.faces.counts = {A: 1, B: 3, C: 1}
    message, kept, after = spread(panel, stored(A, B), stored(C), "", "")
    # Identity 1's other photo shows the face that was in use with it, the largest; it is not mixed with another's.
    assert after == [
        listed("sha256:" + A, entry(B, face=1)),
        stored(C),
        listed(entry(B, face=0)),
        listed(entry(B, face=2)),
    ]
    assert "keeps its other photos, and of photo 2 the face shown there" in message
    assert "Left as they are: Identity 2." in message
    assert panel.panel_photos.undo_spread(kept, after)[3:] == [stored(A, B), stored(C), "", ""]


def test_the_face_chosen_on_the_group_stays_with_the_other_photos(panel, host):
    host.faces.counts = {A: 1, B: 2}
    _, _, after = spread(panel, listed("sha256:" + A, entry(B, face=0)), "")
    assert after == [listed("sha256:" + A, entry(B, face=0)), listed(entry(B, face=1))]


def test_bystanders_get_no_identity(panel, host):
    host.faces.photos = {A: [face(0, bystander=True), face(1), face(2), face(3, bystander=True)]}
    message, _, after = spread(panel, stored(A), "", "", "")
    assert after == [listed(entry(A, face=1)), listed(entry(A, face=2)), "", ""]
    assert "2 of the faces" in message


@pytest.mark.parametrize(
    ("kept", "text"),
    [("", "there is no photo"), (stored(B), "no photo here shows several people"), (stored(C), "not kept here")],
)
def test_what_cannot_be_spread_is_said(panel, host, kept, text):
    host.faces.counts = {B: 1}
    message, _, *unchanged = panel.panel_photos.spread_faces([kept, stored(A)])
    assert text in message and all(update == panel.paste.UNCHANGED for update in unchanged)


def test_people_without_a_tab_are_said(panel, host):
    host.faces.counts = {A: 3}
    message, _, after = spread(panel, stored(A), "")
    assert "3 people were found, 2 have a tab" in message and "portrait-warning" in message
    assert after == [listed(entry(A, face=0)), listed(entry(A, face=1))]


def test_undoing_leaves_what_was_changed_since(panel, host):
    host.faces.counts = {A: 3}
    _, kept, after = spread(panel, stored(A), "", "")
    message, kept, undo, *lists = panel.panel_photos.undo_spread(kept, [after[0], stored(B), after[2]])
    assert lists == [stored(A), stored(B), ""] and "Identity 2" in message
    assert kept == "" and undo == {**panel.paste.UNCHANGED, "visible": False}


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"before": [], "after": []}', '{"before": 3, "after": 4}'])
def test_undoing_nothing_changes_nothing(panel, kept):
    assert panel.panel_photos.undo_spread(kept, [stored(A), ""])[3:] == [stored(A), ""]


# ------------------------------------------------------------------------------------------------------------ regions


def test_the_box_is_drawn_or_explained(panel):
    assert '<rect x="0" y="10" width="50" height="90"/>' in panel.panel_regions.box_html("0, 10, 50, 100")
    assert panel.panel_regions.box_html("") == panel.panel_regions.box_html(None) == ""
    assert "instead of 4" in panel.panel_regions.box_html("<b>")


def test_a_kept_mask_is_shown(panel, host):
    host.faces.counts = {A: 1}
    assert "<img" in panel.panel_regions.mask_html(stored(A))
    assert "not kept here" in panel.panel_regions.mask_html(stored(B))
    assert panel.panel_regions.mask_html("") == ""
    assert "portrait-error" in panel.panel_regions.mask_html("[3]")


@pytest.mark.parametrize(
    ("text", "size"),
    [("512 x 768", (341, 512)), ("1024 x 512", (512, 256)), ("", (512, 512)), (None, (512, 512)), ("0 x 9", (57, 512))],
)
def test_the_canvas_has_the_pictures_aspect(panel, text, size):
    assert panel.panel_regions.blank_canvas(text).size == size


# ------------------------------------------------------------------------------------------------------------ weights


def complete(store, name="mine", router=True):
    """Puts the files of an adapter into a store's folder, with the networks that are the published ones'."""
    folder = store.home
    folder.mkdir(exist_ok=True)
    names = ["glint360k_curricular_face_r101_backbone.bin", "CLIP-ViT-H-14-laion2B-s32B-b79K.bin"]
    for file in (*names, f"uniportrait-faceid_{name}.bin", *([f"uniportrait-router_{name}.bin"] if router else ())):
        (folder / file).touch()


def complete_world(store):
    """Puts the embedded world's kit there, as it is but for the adapter itself."""
    store.home.mkdir(exist_ok=True)
    for file in ("kit.json", "world.safetensors", "world-recognition.safetensors", "world-vision.safetensors"):
        shutil.copyfile(WORLD / file, store.home / file)
    save_file({"x": np.zeros(1)}, store.home / "uniportrait-faceid_world.safetensors")
    (store.home / "uniportrait-router_world.safetensors").touch()


def loaded(panel, family="SD1.5", **known):
    return panel.checkpoint.Loaded(family, **known)


def loaded_world(panel, host):
    """The checkpoint of `complete_world`, as the host knows it."""
    manifest = read_manifest(WORLD / "kit.json")
    return loaded(panel, file=host.store.home / "world.safetensors", text_encoder=manifest.text_encoder)


def test_another_method_takes_its_own_checkpoint(panel, host):
    complete_world(host.store)
    first, other = (one.name for one in panel.declarations()[:2])
    world, its = panel.panel_weights.checkpoint_choices(first)[-1], panel.panel_weights.checkpoint_choices(other)
    assert world == "world" and world not in its
    assert panel.panel_weights.kept_choice(world, its, other) == "automatic"
    # What a picture's parameters name stays, also where it is not here, and so does what is still incomplete.
    assert panel.panel_weights.kept_choice("of-somebody", its, other) == "of-somebody"
    assert (
        panel.panel_weights.kept_choice("sd15", panel.panel_weights.checkpoint_choices(first), first)
        == "sd15 (files missing)"
    )


@pytest.mark.parametrize("family", ["SD1.5", None])
def test_a_new_user_is_told_loudly_which_button_to_press(panel, host, tmp_path, family):
    # The embedded world's adapter is always there, and is no use for an SD1.5 checkpoint.
    complete_world(host.store)
    assert panel.panel_weights.checkpoint_choices() == ["automatic", "sd15 (files missing)", "world"]
    message, loadable = panel.panel_weights.weights_html("automatic", loaded(panel, family))
    assert loadable and "portrait-warning" in message
    first, details = message.split("<details>")
    assert (
        first.count("Weights are missing") == first.count("press <b>Download missing weights</b>") == 1
        and str(tmp_path) not in first
    )
    assert "uniportrait-faceid_sd15.bin" in details and str(tmp_path / "models") in details


def test_what_is_missing_is_judged_for_what_is_loaded(panel, host):
    complete_world(host.store)
    world = loaded_world(panel, host)
    message, loadable = panel.panel_weights.weights_html("automatic", world)
    assert "128 × 128 px" in message and "DDIM" in message and "missing" not in message and not loadable
    assert "missing" in panel.panel_weights.weights_html("sd15 (files missing)", world)[0]
    complete(host.store, "sd15")
    assert panel.panel_weights.weights_html("automatic", loaded(panel)) == ("", False)


def test_a_kit_whose_manifest_cannot_be_read_is_told_by_the_panel(panel, host):
    complete_world(host.store)
    (host.store.home / "kit.json").rename(host.store.home / "world.kit.json")
    (host.store.home / "world.kit.json").write_text("{}")
    assert "world.kit.json: format: it is missing" in panel.panel_weights.weights_html("world", loaded(panel))[0]


def test_the_settings_of_a_kit_go_to_the_hosts_controls(panel, host, monkeypatch):
    complete_world(host.store)
    values = {"sampling": "DDIM", "scheduler": "Automatic", "steps": 20, "width": 128, "height": 128, "cfg_scale": 5}
    world = loaded_world(panel, host)
    assert panel.checkpoint.controls(world.manifest()) == values and tuple(values) == panel.checkpoint.CONTROLS
    monkeypatch.setattr(panel.checkpoint, "loaded", lambda: world)
    assert panel.panel_weights.kit_settings() == list(values.values())
    monkeypatch.setattr(panel.checkpoint, "loaded", lambda: loaded(panel))
    with pytest.raises(PortraitError, match="no kit tells settings for the loaded checkpoint"):
        panel.panel_weights.kit_settings()


FOUND = {"strength": 0.3, "gradient": "share"}


def test_what_was_found_to_work_is_told_of_the_adapters_kit_or_the_checkpoints(panel, host, tmp_path, monkeypatch):
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"a base")
    made_on = StoredFile(base.name, file_sha256(base), 6)
    complete(host.store, "own")
    adapter = {"faceid": "uniportrait-faceid_own.bin"}
    write_manifest(
        host.store.home / "on.kit.json", Manifest("on", "fusion", {"fusion": "x"}, base=made_on, guidance=FOUND)
    )
    write_manifest(host.store.home / "own.kit.json", Manifest("own", "uniportrait", adapter, guidance={"block": 2.0}))
    monkeypatch.setattr(panel.checkpoint, "loaded", lambda: loaded(panel, file=base))
    assert panel.panel_weights.kit_guidance("own", "UniPortrait") == {"block": 2.0}
    assert panel.panel_weights.kit_guidance("not there", "UniPortrait") == FOUND
    assert panel.panel_weights.kit_guidance("left over", "Reference guidance only") == FOUND
    assert "Strength (p) 0.3, Gradient Share of the noise" in panel.panel_weights.guidance_html(FOUND)
    monkeypatch.setattr(panel.checkpoint, "loaded", lambda: loaded(panel))
    assert (
        panel.panel_weights.kit_guidance("automatic", "Reference guidance only") == {}
        and panel.panel_weights.guidance_html({}) == ""
    )


def test_without_adapters_every_family_will_do_and_nothing_is_missing(panel, host):
    for family in ("SD1.5", "SD2", "SDXL"):
        assert panel.panel_weights.weights_html("automatic", loaded(panel, family), "none") == ("", False)
    assert panel.panel_weights.checkpoint_choices("none") == ["automatic"]
    complete_world(host.store)
    assert "128 × 128 px" in panel.panel_weights.weights_html("automatic", loaded_world(panel, host), "none")[0]


def test_what_of_the_photos_guides_is_shown_while_it_is_on_and_for_whom(panel, host):
    ada, ben = "a" * 64, "b" * 64
    host.faces.counts = {ada: 1, ben: 0}
    lists = [json.dumps([f"sha256:{ada}"] * 2), "", json.dumps([f"sha256:{ben}"]), "[ nothing"]
    assert panel.panel_photos.references_html(False, True, True, True, True, *lists) == ""
    html = panel.panel_photos.references_html(True, True, True, False, True, *lists)
    assert html.count("<img") == 2 and html.count("Identity 1") >= 2 and "There is no parser" in html
    assert html.count("There is no parser") == 1, "once for all"
    told = panel.panel_photos.references_html(True, False, False, True, False, *lists)
    assert "<img" not in told and "Identity 3, photo 1: no face was found" in told


def test_settings_are_offered_of_any_kit_that_was_made_on_the_loaded_checkpoint(panel, host, tmp_path):
    complete(host.store, "mine")
    base = tmp_path / "renamed.safetensors"
    base.write_bytes(b"a base")
    mine = Manifest(
        "mine",
        "uniportrait",
        {"faceid": "uniportrait-faceid_mine.bin"},
        base=StoredFile("base.safetensors", file_sha256(base), 6),
        picture=(512, 768),
        sampling=Sampling("Euler a", 30, 7.5),
    )
    write_manifest(host.store.home / "mine.kit.json", mine)
    manifest = loaded(panel, file=base).manifest()
    assert list(panel.checkpoint.controls(manifest).values()) == ["Euler a", "Automatic", 30, 512, 768, 7.5]
    complete(host.store, "sd15")
    assert (loaded(panel, file=base).automatic(), loaded(panel).automatic()) == ("mine", "sd15")
    assert "kit mine is loaded" in panel.panel_weights.weights_html("automatic", loaded(panel, file=base))[0]
    base.write_bytes(b"b base")
    assert loaded(panel, file=base).manifest() is None is loaded(panel).manifest()
    base.write_bytes(b"a base")
    write_manifest(host.store.home / "mine.kit.json", dataclasses.replace(mine, sampling=None))
    assert loaded(panel, file=base).manifest() is None


def test_another_complete_adapter_is_enough(panel, host):
    complete(host.store, "mine")
    assert panel.panel_weights.weights_html("automatic", loaded(panel)) == ("", False)
    complete(host.store, "ours", router=False)
    message, loadable = panel.panel_weights.weights_html("ours", loaded(panel))
    assert "portrait-info" in message and "several people" in message and not loadable
    assert "no adapter theirs." in panel.panel_weights.weights_html("theirs (files missing)", loaded(panel))[0]


def test_a_checkpoint_of_another_family_is_named(panel, host):
    message, loadable = panel.panel_weights.weights_html("automatic", loaded(panel, "SDXL"))
    assert "SD1.5" in message and "SDXL" in message and "missing" not in message and not loadable


def test_a_download_that_fails_ends_with_its_message(panel, monkeypatch):
    calls = []

    def download(known, folder, progress):
        calls.append(known.filename)
        progress(1, 2)
        if len(calls) == 2:
            raise PortraitError(known.filename, "its source cannot be reached", "Put it there by hand.", 503)

    monkeypatch.setattr(panel.panel_weights, "DOWNLOAD_PERIOD", 0.01)
    monkeypatch.setattr("lib_portrait.checkpoints.download.download", download)
    messages = list(panel.panel_weights.download_missing("sd15", loaded(panel)))
    assert len(calls) == 2
    assert "cannot be reached" in messages[-1] and "portrait-error" in messages[-1]
    calls[:] = ["", ""]
    assert "All weights are there" in list(panel.panel_weights.download_missing("automatic", loaded(panel)))[-1]


def test_what_no_download_brings_is_not_called_there(panel, host):
    complete(host.store, "mine")
    (host.store.home / "uniportrait-router_mine.bin").unlink()
    last = list(panel.panel_weights.download_missing("mine", loaded(panel)))[-1]
    assert "uniportrait-router_mine" in last and "All weights" not in last


# ---------------------------------------------------------------------------------------------------- the host's page


def test_labels_are_told_apart_where_the_host_saves_defaults_by_them(panel):
    first, second = (panel.Label("Scale", f"identity {number}") for number in (1, 2))
    assert first == second == "Scale" and json.dumps(first) == '"Scale"'
    assert (f"txt2img/{first}", f"txt2img/{second}") == ("txt2img/Scale of identity 1", "txt2img/Scale of identity 2")


@pytest.mark.parametrize(
    ("model", "family"),
    [
        (types.SimpleNamespace(is_sd1=True), "SD1.5"),
        (types.SimpleNamespace(is_sd1=False, is_sdxl=True), "SDXL"),
        (None, None),
    ],
)
def test_the_family_of_the_loaded_checkpoint(panel, model, family):
    data = types.SimpleNamespace(sd_model=model, lock=threading.Lock())
    sys.modules["modules"].sd_models = types.SimpleNamespace(model_data=data)
    assert panel.checkpoint.loaded().family == family


def test_sizes_of_the_text_encoder_are_read_off_the_loaded_one(panel):
    config = types.SimpleNamespace(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77
    )
    encoder = types.SimpleNamespace(transformer=types.SimpleNamespace(config=config))
    for model in (encoder, types.SimpleNamespace(wrapped=encoder)):
        of = panel.checkpoint.Loaded.of(types.SimpleNamespace(is_sd1=True, cond_stage_model=model))
        assert of.text_encoder == TextEncoder(96, 4, 4, 77)
    assert panel.checkpoint.Loaded.of(types.SimpleNamespace(is_sd1=True)).text_encoder is None


def test_the_family_is_known_once_the_checkpoint_is_loaded(panel):
    data = types.SimpleNamespace(sd_model=None, lock=threading.Lock())
    sys.modules["modules"].sd_models = types.SimpleNamespace(model_data=data)
    found = []
    asking = threading.Thread(target=lambda: found.append(panel.checkpoint.loaded().family))
    # As the host does when it starts: the checkpoint is loaded in the background, and the page is there before it.
    with data.lock:
        asking.start()
        data.sd_model = types.SimpleNamespace(is_sd1=True)
    asking.join(10)
    assert found == ["SD1.5"]


# --------------------------------------------------------------------------------------------------------- neighbours


@pytest.mark.parametrize(
    ("there", "options", "told"),
    [
        (False, {}, False),
        (True, {}, True),
        (True, {"ad_script_names": "negpip, wildcards"}, True),
        (True, {"ad_script_names": "negpip, portrait"}, False),
        (True, {"ad_only_selected_scripts": False}, False),
    ],
)
def test_the_panel_says_how_adetailer_is_told_of_it(panel, there, options, told):
    modules = sys.modules["modules"]
    modules.scripts.scripts_data = [types.SimpleNamespace(path="/x/scripts/!adetailer.py")] if there else []
    vars(modules.shared.opts).update(options)
    html = panel.panel_weights.neighbours_html()
    assert bool(html) == told
    assert not told or "add &quot;portrait&quot; to the script names in Settings &gt; ADetailer" in html


def test_a_picture_gives_everybody_in_use_a_box_from_the_left(host, panel, monkeypatch):
    seen = []

    def places(photo, field):
        seen.append((photo.data, field))
        return [(0.1, 0.2, 0.3, 0.4), (0.5, -0.1, 1.1, 0.6)], (512, 512)

    host.faces.places = places
    upload = host.upload("group.png", b"group")
    ada, ben = (panel.inputs.stored_text([f"sha256:{digit * 64}"]) for digit in "ab")
    emptied, said, *controls = panel.panel_regions.places_from(upload, [ada, "", ben])
    assert emptied is None and "2 faces" in said and "2 people" in said
    unchanged = panel.paste.UNCHANGED
    assert controls == [panel.inputs.BOX, "10, 20, 30, 40", unchanged, unchanged, panel.inputs.BOX, "50, 0, 100, 60"]
    assert seen == [(b"group", "Places from a picture")]
    for kept, told in (([ada, ben, ada], "2 faces, and there are 3 people"),):
        _, said, *controls = panel.panel_regions.places_from(upload, kept)
        assert told in said and controls == [unchanged] * 6
    host.faces.places = lambda photo, field: host.faces.find(photo, field)
    _, said, *controls = panel.panel_regions.places_from(upload, [ada])
    assert "not kept here" in said and controls == [unchanged] * 2
