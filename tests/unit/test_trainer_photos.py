"""`portrait.py dataset photos`: stages and filters, what they drop and why; any engine makes the same bytes."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import portrait as command_line
from lib_portrait.errors import NoSuchFace, PortraitError
from lib_portrait.faces.detection import Detector, Face
from tests.portraits import portrait
from trainer import photos
from trainer.dataset import world_sample
from trainer.engines import LocalEngine, RayEngine, Step, ordered_map
from trainer.keypoints import FROM_COCO, Person, keypoint_network, openpose, people_finder
from trainer.photos import PhotoSettings, label_of, make_photos, square_crop
from trainer.shards import Shards, poses_of

ROOT = Path(__file__).resolve().parents[2]
DETECTOR = ROOT / "models" / "world" / "world-detector.safetensors"

# ------------------------------------------------------------------------------------------------------------- photos


def face(x0, y0, x1, y1):
    """A face whose landmarks lie in the middle of its box."""
    box = np.array([x0, y0, x1, y1], np.float32)
    places = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.75], [0.65, 0.75]], np.float32)
    return Face(box, box[:2] + places * (box[2:] - box[:2]), 0.9)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for photos, and `photo(name, size, *boxes)` that puts one there in which these faces will be found.

    A photo's red channel is its number, by which the detector knows it.
    """
    boxes = []

    def find(image):
        number = int(image[image.shape[0] // 2, image.shape[1] // 2, 0])
        if boxes[number] is None:
            raise RuntimeError("the detector broke")
        return [face(*box) for box in boxes[number]]

    monkeypatch.setattr(photos, "_detector", lambda name, device: Detector("test", "1", find))
    place = tmp_path / "people"

    def photo(name, size, *found):
        boxes.append(None if found == (None,) else found)
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[..., 0] = len(boxes) - 1
        for x0, y0, x1, y1 in found if found != (None,) else ():
            pixels[int(y0) : int(y1), int(x0) : int(x1), 1] = 255
        Image.fromarray(pixels).save(file)
        return file

    photo.place = place
    return photo


def records(output):
    shards = Shards.under(output)
    return {shards.record(i).extra["photo"]: shards[i] for i in range(len(shards))}


SMALL = PhotoSettings(size=128, kind="png", smallest_face=20)


def test_photos_become_square_with_their_faces_where_they_are(folder, tmp_path):
    folder("a.png", (512, 256), (300, 60, 380, 180))
    made = make_photos(folder.place, tmp_path / "out", SMALL)
    sample = records(tmp_path / "out")["a.png"]
    assert (made.samples, made.skipped, made.notices) == (1, [], []) and sample.image.shape == (128, 128, 3)
    # Half the size: the face is at 150 to 190 of 256, which the middle cut (64 to 192) would leave no room for.
    box = sample.record.faces[0].box
    green = np.argwhere(sample.image[..., 1] > 128)
    np.testing.assert_allclose(box, [*green.min(0)[::-1], *(green.max(0)[::-1] + 1)], atol=1)
    assert box[2] - box[0] == pytest.approx(40) and box[3] - box[1] == pytest.approx(60)
    assert box[2] == pytest.approx(128 - 0.3 * 40, abs=1)
    middle = np.mean(sample.record.faces[0].landmarks, axis=0)
    assert box[0] < middle[0] < box[2] and box[1] < middle[1] < box[3]
    assert sample.record.caption == "a photo of a person"


def test_folders_label_the_face_that_must_be_meant(folder, tmp_path):
    """That is a photo's only one, or one beside which all others are small."""
    folder("alice/0.png", (256, 256), (10, 10, 80, 90), (120, 20, 240, 180))
    folder("alice/1.png", (256, 256), (10, 10, 70, 70), (120, 20, 240, 180))
    folder("alice/2019/2.png", (256, 256), (10, 10, 80, 80))
    folder("women/carol/3.png", (256, 256), (10, 10, 80, 80))
    folder("4.png", (256, 256), (10, 10, 80, 80))
    make_photos(folder.place, tmp_path / "out", SMALL)
    labels = {name: [(f.id, f.word) for f in sample.record.faces] for name, sample in records(tmp_path / "out").items()}
    assert labels == {
        "4.png": [(None, None)],
        "alice/0.png": [(None, None), (None, None)],
        "alice/1.png": [("alice", None), (None, None)],
        "alice/2019/2.png": [("alice", None)],
        "women/carol/3.png": [("carol", "woman")],
    }
    captions = {name: sample.record.caption for name, sample in records(tmp_path / "out").items()}
    assert captions["women/carol/3.png"] == "a photo of a woman"
    assert captions["alice/1.png"] == "a photo of a group of people"
    make_photos(folder.place, tmp_path / "unnamed", PhotoSettings(**{**vars(SMALL), "identities": False}))
    assert all(f.id is None for sample in records(tmp_path / "unnamed").values() for f in sample.record.faces)


def test_the_first_folder_that_is_no_word_names_the_person():
    assert label_of("a.jpg") == (None, None)
    assert label_of("man/a.jpg") == (None, "man")
    assert label_of("bob/Men/2020/a.jpg") == ("bob", "man")


def test_captions_come_from_the_text_beside_the_photo(folder, tmp_path):
    folder("a.png", (256, 256), (10, 10, 80, 80)).with_suffix(".txt").write_text(" ann\n at sea \n")
    folder("b.png", (256, 256), (10, 10, 80, 80))
    make_photos(folder.place, tmp_path / "out", PhotoSettings(**{**vars(SMALL), "caption": "{word}, {once}"}))
    captions = {name: sample.record.caption for name, sample in records(tmp_path / "out").items()}
    assert captions == {"a.png": "ann at sea", "b.png": "person, {once}"}


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_with_any_mark_that_editors_write_and_without_it(folder, tmp_path, coding):
    folder("a.png", (256, 256), (10, 10, 80, 80)).with_suffix(".txt").write_text("Zoë at sea\n", coding)
    make_photos(folder.place, tmp_path / "out", SMALL)
    assert records(tmp_path / "out")["a.png"].record.caption == "Zoë at sea"


def test_a_caption_that_is_no_unicode_is_told_with_its_remedy(folder, tmp_path):
    folder("a.png", (256, 256), (10, 10, 80, 80)).with_suffix(".txt").write_text("Zoë at sea", "latin-1")
    (skipped,) = make_photos(folder.place, tmp_path / "out", SMALL).skipped
    assert (skipped.reason, skipped.detail) == ("unreadable caption", "a.txt is no text in UTF-8; save it as that")


def test_bad_photos_are_skipped_counted_and_listed(folder, tmp_path, capsys):
    folder("good.png", (256, 256), (10, 10, 80, 80))
    folder("nobody.png", (256, 256))
    folder("small.png", (100, 256), (10, 10, 80, 80))
    folder("tiny face.png", (256, 256), (10, 10, 40, 40))
    folder("crowd.png", (256, 256), *[(i * 20, 10, i * 20 + 18, 40) for i in range(9)])
    folder("crash.png", (256, 256), None)
    folder("no words.png", (256, 256), (10, 10, 80, 80)).with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    (folder.place / "broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    (folder.place / "empty.webp").touch()
    (folder.place / "notes.md").write_text("no picture")
    words = ["dataset", "photos", str(folder.place), "--output", str(tmp_path / "out"), "--size", "128"]
    words += ["--smallest-face", "20", "--processes", "1"]
    assert command_line.run(command_line.parse(words)) == 0
    said = capsys.readouterr().out
    listed = (tmp_path / "out" / "photos-skipped.txt").read_text().splitlines()
    reasons = {
        "broken.jpg": "unreadable picture",
        "crash.png": "face detector failed",
        "crowd.png": "more than 8 faces",
        "empty.webp": "unreadable picture",
        "no words.png": "unreadable caption",
        "nobody.png": "no face",
        "small.png": "picture smaller than 128 pixels",
        "tiny face.png": "all faces smaller than 20 pixels or cut off",
    }
    assert len(listed) == 8
    for line, (name, reason) in zip(listed, reasons.items()):
        assert line.startswith(f"{reason}: {name!r}")
    assert "1 samples" in said and "8 photos were skipped" in said and "     2  unreadable picture" in said
    # Told again, though not done again, the second time.
    assert command_line.run(command_line.parse(words)) == 0
    assert "8 photos were skipped" in capsys.readouterr().out


def test_photos_that_were_broken_off_go_on_and_end_the_same(folder, tmp_path, monkeypatch):
    for number in range(7):
        folder(f"{number}.png", (256, 256), *([(10, 10, 80, 80)] if number != 1 else []))
    settings = PhotoSettings(**{**vars(SMALL), "shard": 2})
    make_photos(folder.place, tmp_path / "whole", settings)
    asked = []

    def breaks(photo, settings):
        asked.append(photo.number)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return decode(photo, settings)

    decode = photos.decode
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(photos, "decode", breaks)
        make_photos(folder.place, tmp_path / "out", settings)
    with (tmp_path / "out" / "photos.jsonl").open("a") as file:
        file.write('{"end": 6, "samp')
    with monkeypatch.context() as patch:
        patch.setattr(photos, "decode", lambda photo, settings: asked.append(photo.number) or decode(photo, settings))
        assert make_photos(folder.place, tmp_path / "out", settings).samples == 6
    assert asked == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_shard_is_written_of_photos_that_are_all_skipped(folder, tmp_path):
    for number in range(3):
        folder(f"{number}.png", (256, 256), *([(10, 10, 80, 80)] if number < 2 else []))
    settings = PhotoSettings(**{**vars(SMALL), "shard": 2})
    for _ in range(2):
        made = make_photos(folder.place, tmp_path / "out", settings)
        assert made.samples == 2 and [one.photo for one in made.skipped] == ["2.png"]
        assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["photos-00000.tar"]


def test_shards_of_other_photos_or_settings_are_not_taken_for_these(folder, tmp_path):
    photo = folder("a.png", (256, 256), (10, 10, 80, 80))
    make_photos(folder.place, tmp_path / "out", SMALL)
    with pytest.raises(PortraitError, match=r"other settings \(most_faces\)"):
        make_photos(folder.place, tmp_path / "out", PhotoSettings(**{**vars(SMALL), "most_faces": 2}))
    photo.with_suffix(".txt").write_text("ann at sea")
    with pytest.raises(PortraitError, match=r"other photos .*\(list\)"):
        make_photos(folder.place, tmp_path / "out", SMALL)
    photo.with_suffix(".txt").unlink()
    folder("b.png", (256, 256), (10, 10, 80, 80))
    with pytest.raises(PortraitError, match=r"other photos .*\(photos, list\)"):
        make_photos(folder.place, tmp_path / "out", SMALL)


def test_a_folder_without_photos_is_refused(tmp_path):
    with pytest.raises(PortraitError, match="holds no pictures"):
        make_photos(tmp_path, tmp_path / "out", SMALL)


def test_the_cut_keeps_all_faces_if_it_can_and_else_the_first():
    image = np.zeros((100, 400, 3), np.uint8)
    _, both = square_crop(image, [face(10, 20, 40, 60), face(60, 20, 90, 60)], 100)
    assert None not in both and both[0].box.tolist() == [9, 20, 39, 60]
    _, first = square_crop(image, [face(300, 20, 390, 90), face(10, 20, 40, 60)], 100)
    assert first[1] is None and first[0].box[2] <= 100
    _, cut = square_crop(image, [face(300, 20, 390, 90), face(270, 20, 320, 60)], 100)
    assert cut[1] is None


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_quality_decides_the_size_of_the_files(folder, tmp_path, kind):
    folder("a.png", (256, 256), (10, 10, 200, 200))
    sizes = []
    for quality in (20, 95):
        make_photos(folder.place, tmp_path / str(quality), PhotoSettings(size=128, kind=kind, quality=quality))
        with tarfile.open(tmp_path / str(quality) / "photos-00000.tar") as tar:
            sizes.append(tar.getmember(f"00000000.{kind}").size)
        assert len(records(tmp_path / str(quality))) == 1
    assert sizes[0] < sizes[1]


def test_a_real_face_is_found_and_labelled(tmp_path):
    file = portrait()
    (tmp_path / "people" / "ada").mkdir(parents=True)
    (tmp_path / "people" / "ada" / file.name).write_bytes(file.read_bytes())
    made = make_photos(tmp_path / "people", tmp_path / "out", PhotoSettings(size=256, detector="mtcnn"))
    assert (made.samples, made.skipped, made.notices) == (1, [], [])
    found = records(tmp_path / "out")[f"ada/{file.name}"].record.faces
    assert [one.id for one in found] == ["ada"]
    assert found[0].landmarks[0][0] < found[0].landmarks[1][0] and found[0].box[2] - found[0].box[0] > 80


@pytest.mark.parametrize("suffix", ["png", "heic"])
def test_a_lying_photo_of_whatever_format_is_turned_upright_and_listed(tmp_path, capsys, suffix):
    people = tmp_path / "people"
    people.mkdir()
    photo = Image.open(portrait()).convert("RGB").resize((512, 512))
    lying = photo.transpose(Image.Transpose.ROTATE_90)
    if suffix == "heic":
        package = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        package.from_pillow(lying).save(people / "lying.heic", quality=95)
    else:
        lying.save(people / "lying.png")
    words = ["dataset", "photos", str(people), "--output", str(tmp_path / "out"), "--size", "256"]
    words += ["--detector", "mtcnn", "--processes", "1", "--kind", "png"]
    assert command_line.run(command_line.parse(words)) == 0
    sample = records(tmp_path / "out")[f"lying.{suffix}"]
    upright = np.asarray(photo.resize((256, 256), Image.Resampling.BOX)).astype(int)
    assert np.abs(sample.image - upright).mean() < 4
    eyes, mouth = np.mean(sample.record.faces[0].landmarks[:2], 0), np.mean(sample.record.faces[0].landmarks[3:], 0)
    assert mouth[1] - eyes[1] > 40 > abs(mouth[0] - eyes[0])
    assert sample.record.extra["notices"] == ["it was turned by 90° to the right"]
    listed = (tmp_path / "out" / "photos-notices.txt").read_text(encoding="utf-8")
    assert listed == f"'lying.{suffix}': it was turned by 90° to the right\n"
    said = capsys.readouterr().out
    assert "photos-notices.txt" in said and "     1  it was turned by 90° to the right" in said


# ------------------------------------------------------------------------------------------------------------ filters


def small(**settings):
    return PhotoSettings(**{**vars(SMALL), **settings})


def dropped(folder, output, settings):
    """The names of the photos that were dropped, each with the stage and the reason."""
    return {one.photo: (one.stage, one.reason) for one in make_photos(folder.place, output, settings).skipped}


ONE, TWO = [(10, 10, 80, 80)], [(10, 10, 80, 80), (120, 10, 200, 90)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"least_side": 256}, {}),
        ({"least_side": 257}, {"one.png": ("decode", "picture smaller than 257 pixels")}),
        ({"least_faces": 2}, {"one.png": ("faces", "fewer than 2 faces")}),
        ({"most_faces": 1}, {"two.png": ("faces", "more than 1 faces")}),
        ({"least_faces": 2, "most_faces": 2}, {"one.png": ("faces", "fewer than 2 faces")}),
        # 70 x 70 of 256 x 256 pixels, and 80 x 80 of 300 x 300.
        ({"face_share": (0.0747, 1.0)}, {"two.png": ("faces", "largest face covers less than 0.0747 of the photo")}),
        ({"face_share": (0.0, 0.0720)}, {"one.png": ("faces", "largest face covers more than 0.072 of the photo")}),
        ({"face_share": (0.0710, 0.0748)}, {}),
    ],
)
def test_photos_that_do_not_pass_a_filter_are_dropped_for_it(folder, tmp_path, settings, expected):
    folder("one.png", (256, 256), *ONE)
    folder("two.png", (300, 300), *TWO)
    assert dropped(folder, tmp_path / "out", small(**settings)) == expected


def test_so_many_faces_must_count_as_are_asked_for(folder, tmp_path):
    """Both are found in the photo, but the written picture holds one of them."""
    folder("a.png", (600, 200), (10, 10, 80, 80), (500, 10, 590, 100))
    reason = ("cut", "fewer than 2 faces of 20 pixels, and whole")
    assert dropped(folder, tmp_path / "two", small(least_faces=2)) == {"a.png": reason}
    assert dropped(folder, tmp_path / "one", small()) == {}


def test_blurred_faces_are_dropped_by_the_largest_one(folder, tmp_path):
    noise = np.random.default_rng(0).normal(0, 1, (256, 256, 3))
    for name, sigma in (("blurred.png", 8), ("sharp.png", 1)):
        file = folder(name, (256, 256), (40, 40, 200, 200))
        number = np.asarray(Image.open(file))[0, 0, 0]
        blurred = cv2.GaussianBlur(noise, (0, 0), sigma)
        pixels = (128 + 40 * blurred / blurred.std()).clip(0, 255).astype(np.uint8)
        pixels[..., 0] = number
        Image.fromarray(pixels).save(file)
    found = dropped(folder, tmp_path / "out", small(sharpness=0.05))
    assert found == {"blurred.png": ("faces", "largest face less sharp than 0.05")}
    assert dropped(folder, tmp_path / "all", small()) == {}


def test_a_caption_s_noun_is_asked_for_and_is_the_only_face_s_word(folder, tmp_path):
    captions = {
        "girl.png": ("A girl at sea", ONE, None),
        "man.png": ("Portrait of a Man, smiling", ONE, "man"),
        "several.png": ("a man and a woman", ONE, None),
        "two.png": ("a woman in a crowd", TWO, None),
        "women.png": ("women", ONE, None),
        "woman/x/own.png": ("a man", ONE, "woman"),
    }
    for name, (text, boxes, _) in captions.items():
        folder(name, (256, 256), *boxes).with_suffix(".txt").write_text(text)
    folder("none.png", (256, 256), *ONE).with_suffix(".txt").write_text("humans, manly")
    folder("made.png", (256, 256), *ONE)
    assert dropped(folder, tmp_path / "out", small(nouns=True)) == {
        "none.png": ("nouns", "caption without a word for a person")
    }
    words = {name: sample.record.faces[0].word for name, sample in records(tmp_path / "out").items()}
    assert words == {"made.png": None, **{name: word for name, (_, _, word) in captions.items()}}
    make_photos(folder.place, tmp_path / "before", small())
    assert records(tmp_path / "before")["man.png"].record.faces[0].word is None


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"least_side": -1}, "least_side"),
        ({"least_faces": 0}, "least_faces"),
        ({"least_faces": 3, "most_faces": 2}, "least_faces"),
        ({"face_share": (0.5, 0.2)}, "face_share"),
        ({"face_share": (0.5, 0.5)}, "face_share"),
        ({"face_share": (-0.1, 1.0)}, "face_share"),
        ({"face_share": (0.0, 1.1)}, "face_share"),
        ({"face_share": (float("nan"), 1.0)}, "face_share"),
        ({"sharpness": -1.0}, "sharpness"),
        ({"sharpness": float("nan")}, "sharpness"),
        ({"sharpness": float("inf")}, "sharpness"),
    ],
)
def test_filters_that_make_no_sense_are_refused(settings, field):
    with pytest.raises(PortraitError) as caught:
        PhotoSettings(**settings)
    assert caught.value.field == field


def test_the_report_counts_what_each_stage_was_given_dropped_and_handed_on(folder, tmp_path):
    folder("a.png", (256, 256), *ONE)
    folder("b.png", (256, 256), *TWO)
    folder("c.png", (256, 256), *TWO)
    folder("nobody.png", (256, 256))
    folder("nobody else.png", (256, 256))
    folder("crowd.png", (256, 256), *TWO, (100, 150, 150, 200))
    folder("small.png", (100, 256), *ONE)
    folder("tiny.png", (256, 256), (10, 10, 40, 40))
    made = make_photos(folder.place, tmp_path / "out", small(most_faces=2, shard=2), "mine")
    lines = (tmp_path / "out" / "mine-report.md").read_text().splitlines()
    assert lines[0] == "# mine: 3 samples of 8 photos"
    assert lines[2:9] == [
        "| stage | in | dropped | out |",
        "| --- | ---: | ---: | ---: |",
        "| decode | 8 | 1 | 7 |",
        "| faces | 7 | 3 | 4 |",
        "| captions | 4 | 0 | 4 |",
        "| cut | 4 | 1 | 3 |",
        "| shards | 3 | 0 | 3 |",
    ]
    assert lines[10:16] == [
        "| dropped at | photos | why |",
        "| --- | ---: | --- |",
        "| decode | 1 | picture smaller than 128 pixels |",
        "| faces | 2 | no face |",
        "| faces | 1 | more than 2 faces |",
        "| cut | 1 | all faces smaller than 20 pixels or cut off |",
    ]
    assert lines[17:21] == ["| faces in a sample | samples |", "| ---: | ---: |", "| 1 | 1 |", "| 2 | 2 |"]
    assert "| most_faces | 2 |" in lines and '| detector | "test-1 rules 2" |' in lines
    assert made.samples == len(Shards.under(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------------- networks


def test_poses_of_people_are_written_and_faces_of_nobody_dropped(folder, tmp_path, monkeypatch):
    pose = np.full((18, 2), np.nan, np.float32)
    pose[0] = 20.25, 30.5
    people = [Person((0, 0, 60, 128), pose)]
    monkeypatch.setattr(photos, "_people", lambda file, device: lambda image: people)
    file = tmp_path / "keypoints.pth"
    file.write_bytes(b"its content is told in the journal")
    folder("a.png", (256, 256), (10, 10, 80, 80))
    folder("cat.png", (256, 256), (150, 10, 220, 80))
    folder("half.png", (256, 256), (85, 10, 155, 80))
    found = dropped(folder, tmp_path / "out", small(keypoints=file))
    assert found == dict.fromkeys(("cat.png", "half.png"), ("keypoints", "face that is no person's"))
    sample = records(tmp_path / "out")["a.png"]
    np.testing.assert_array_equal(poses_of(sample.record), [pose])
    file.write_bytes(b"another network")
    with pytest.raises(PortraitError, match=r"other settings \(keypoints\)"):
        make_photos(folder.place, tmp_path / "out", small(keypoints=file))


def test_coco_s_points_become_openpose_s():
    """By the names of both: COCO's annotations, and the order of `lib_portrait.control_picture`."""
    sides = [f"{side} {part}" for part in ("eye", "ear") for side in ("left", "right")]
    body = [
        f"{side} {part}"
        for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ]
    coco = ["nose", *sides, *body]
    arms = [f"{side} {part}" for side in ("right", "left") for part in ("shoulder", "elbow", "wrist")]
    legs = [f"{side} {part}" for side in ("right", "left") for part in ("hip", "knee", "ankle")]
    wanted = ["nose", "neck", *arms, *legs, "right eye", "left eye", "right ear", "left ear"]
    assert [coco[place] for number, place in enumerate(FROM_COCO) if number != 1] == wanted[:1] + wanted[2:]
    points = np.arange(34, dtype=np.float64).reshape(17, 2)
    pose = openpose(points, np.full(17, 5.0))
    for name, point in zip(wanted, pose):
        if name != "neck":
            assert point.tolist() == points[coco.index(name)].tolist()
    assert pose[1].tolist() == ((points[5] + points[6]) / 2).tolist()
    scores = np.full(17, 5.0)
    scores[coco.index("left shoulder")] = 1.9
    unseen = openpose(points, scores)
    assert [wanted[i] for i in np.flatnonzero(np.isnan(unseen).any(axis=1))] == ["neck", "left shoulder"]


def test_a_file_of_torchvision_s_network_finds_people_as_torchvision_does(tmp_path):
    """Weights by chance, but for those that make the whole picture one person."""
    torch.manual_seed(0)
    network = keypoint_network().eval()
    head = network.roi_heads.box_predictor
    with torch.no_grad():
        head.cls_score.weight.zero_()
        head.cls_score.bias.copy_(torch.tensor([0.0, 5.0]))
        head.bbox_pred.weight.zero_()
        head.bbox_pred.bias.copy_(torch.tensor([0.0, 0.0, 90.0, 90.0]).repeat(2))
        network.rpn.head.bbox_pred.weight.zero_()
        network.rpn.head.bbox_pred.bias.copy_(torch.tensor([0.0, 0.0, 90.0, 90.0]).repeat(3))
        network.roi_heads.keypoint_predictor.kps_score_lowres.weight.mul_(1000)
    file = tmp_path / "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"
    torch.save(network.state_dict(), file)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (person,) = people_finder(file)(image)
    assert person.box == (0, 0, 64, 64)
    with torch.no_grad():
        own = network([torch.from_numpy(image).permute(2, 0, 1) / 255])[0]
    expected = openpose(own["keypoints"][0, :, :2].numpy(), own["keypoints_scores"][0].numpy())
    np.testing.assert_array_equal(person.pose, expected)
    with torch.no_grad():
        head.cls_score.bias.copy_(torch.tensor([0.0, 2.0]))  # a score of 0.88
    torch.save(network.state_dict(), file)
    assert people_finder(file)(image) == []
    torch.save({"conv.weight": torch.zeros(3)}, file)
    with pytest.raises(PortraitError, match="does not hold torchvision's Keypoint R-CNN"):
        people_finder(file)


def test_the_parser_s_masks_are_those_of_the_faces_the_larger_in_front(folder, tmp_path, monkeypatch):
    """Without a network that answers, masks are the ovals of the landmarks, see `lib_portrait.faces.parsing`."""
    monkeypatch.setattr(photos, "_parser", lambda file: None)
    file = tmp_path / "parser.pth"
    file.touch()
    folder("a.png", (256, 256), (20, 20, 140, 180), (100, 30, 190, 150))
    make_photos(folder.place, tmp_path / "out", small(parser=file))
    sample = records(tmp_path / "out")["a.png"]
    from lib_portrait.faces.parsing import face_mask

    first, second = (face_mask(sample.image, np.array(one.landmarks, np.float32), None) for one in sample.record.faces)
    assert (first & second).any()
    np.testing.assert_array_equal(sample.labels == 1, first)
    np.testing.assert_array_equal(sample.labels == 2, second & ~first)


# ------------------------------------------------------------------------------------------------------------ engines


@pytest.mark.parametrize("error", [PortraitError("size", "it is odd.", "Give another.", 500), NoSuchFace("face", 3, 1)])
def test_what_a_user_is_meant_to_read_passes_from_one_process_to_another(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and vars(again) == vars(error) and str(again) == str(error)


def test_a_fault_in_another_process_is_told_as_in_this_one():
    for processes in (1, 2):
        with pytest.raises(PortraitError, match=r"^size: 3 was given\. Give 64 or more"):
            list(ordered_map(PhotoSettings, [512, 3], processes))


def test_a_process_that_is_killed_is_told_with_the_way_on():
    with pytest.raises(PortraitError, match="a process was killed.*Start the same command again"):
        list(LocalEngine(2).map([Step(os._exit)], [9, 9]))


def test_steps_follow_one_another_and_results_keep_their_order():
    steps = [Step(functools.partial(pow, 2)), Step(str, network=True), Step(len)]
    expected = [len(str(2**n)) for n in range(40)]
    assert list(LocalEngine(1).map(steps, range(40))) == expected
    assert list(LocalEngine(2).map(steps, range(40))) == expected


def words(folder, output, *others):
    return ["dataset", "photos", str(folder), "--output", str(output), *others]


def test_ray_is_installed_where_it_is_asked_for_only(tmp_path):
    assert command_line.parse(words(tmp_path, tmp_path)).requirements == "train"
    assert command_line.parse(words(tmp_path, tmp_path, "--engine", "local")).requirements == "train"
    assert command_line.parse(words(tmp_path, tmp_path, "--engine", "ray")).requirements == "ray"
    features = command_line.parse(["dataset", "features", "x", "--engine", "ray"])
    assert features.requirements == "ray" and "ray" in command_line.REQUIREMENTS["ray"]


@pytest.mark.parametrize("address", ["ray://head:10001", "head", ":6379", "head:x", "head:0", "head:99999"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(PortraitError, match=r"^ray_address: .*HOST:PORT"):
        next(RayEngine(address).map([Step(str)], [1]))


def test_an_address_at_which_nobody_answers_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(PortraitError, match=f"nobody answers at {address}.*ray start --head"):
            next(RayEngine(address).map([Step(str)], [1]))
        assert time.monotonic() - start < 10


def test_ray_that_is_not_there_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PortraitError, match="Ray is not installed.*requirements/ray.txt"):
        next(RayEngine().map([Step(str)], [1]))


@pytest.mark.parametrize(
    ("others", "problem"),
    [
        (["--ray-address", "auto"], "ray_address: the engine is not Ray"),
        (["--processes", "0"], "processes: 0 was given"),
        (["--device", "cuda"], "device: there is no CUDA GPU here"),
        (["--detector", "nobody"], "detector: there is no file nobody"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder, tmp_path, capsys, monkeypatch, others, problem):
    folder("a.png", (256, 256), *ONE)
    monkeypatch.undo()  # the true detectors
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.run(command_line.parse(words(folder.place, tmp_path / "out", *others))) == 1
    assert problem in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of the world's pictures, one of them broken, one of nobody."""
    place = tmp_path_factory.mktemp("pictures")
    for seed in range(60):
        (place / f"{seed:03}.png").write_bytes(world_sample(seed, 6000, 128).picture)
    (place / "020.png").write_bytes(b"no picture")
    Image.new("RGB", (128, 128)).save(place / "033.png")
    return place


DRAWN = PhotoSettings(size=128, kind="png", smallest_face=12, detector=str(DETECTOR), shard=10)


def contents(place):
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """What one process makes of them."""
    output = tmp_path_factory.mktemp("whole")
    made = make_photos(pictures, output, DRAWN)
    assert made.samples > 40 and {"unreadable picture", "no face"} <= {one.reason for one in made.skipped}
    return contents(output)


def test_the_number_of_processes_changes_no_byte(pictures, whole, tmp_path):
    make_photos(pictures, tmp_path / "out", DRAWN, engine=LocalEngine(2))
    assert contents(tmp_path / "out") == whole


def test_ray_makes_the_same_bytes(ray, pictures, whole, tmp_path):
    options = words(pictures, tmp_path / "out", "--engine", "ray", "--processes", "2", "--size", "128", "--kind", "png")
    options += ["--smallest-face", "12", "--detector", str(DETECTOR), "--shard", "10"]
    options += ["--ray-address", ray] if ray else []
    assert command_line.run(command_line.parse(options)) == 0
    assert contents(tmp_path / "out") == whole


def workers():
    """The processes of Ray's that hold networks."""
    import psutil

    running = psutil.process_iter(["cmdline"])
    return [one for one in running if "ray::MapWorker" in " ".join(one.info["cmdline"] or ())]


def test_nothing_is_lost_when_ray_s_workers_are_killed(ray, pictures, whole, tmp_path):
    killed = []

    def kill():
        while len(killed) < 2 and not stop.is_set():
            if list((tmp_path / "out").glob(f"*-0000{len(killed)}.tar")):
                for one in workers()[:1]:
                    one.kill()
                    killed.append(one.pid)
            time.sleep(0.02)

    stop = threading.Event()
    thread = threading.Thread(target=kill)
    thread.start()
    try:
        make_photos(pictures, tmp_path / "out", DRAWN, engine=RayEngine(ray, 2))
    finally:
        stop.set()
        thread.join()
    assert killed
    assert contents(tmp_path / "out") == whole


def test_a_killed_command_goes_on_with_the_other_engine(ray, pictures, whole, tmp_path):
    output = tmp_path / "out"
    code = (
        "from pathlib import Path; from trainer.engines import RayEngine; from trainer.photos import *\n"
        f"settings = PhotoSettings(size=128, kind='png', smallest_face=12, detector={str(DETECTOR)!r}, shard=10)\n"
        f"make_photos(Path({str(pictures)!r}), Path({str(output)!r}), settings, engine=RayEngine({ray!r}, 1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "photos-00001.tar").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = sorted(path.name for path in output.glob("*.tar"))
    assert "photos-00001.tar" in there and len(there) < 6
    kept = (output / "photos-00000.tar").stat().st_mtime_ns
    make_photos(pictures, output, DRAWN)
    assert contents(output) == whole
    assert (output / "photos-00000.tar").stat().st_mtime_ns == kept


def test_what_is_wrong_in_a_worker_of_ray_s_is_told_as_in_this_process(ray):
    with pytest.raises(PortraitError, match=r"^size: 3 was given\. Give 64 or more"):
        list(RayEngine(ray, 1).map([Step(PhotoSettings, network=True), Step(str)], [512, 3]))


def noted(folder):
    """Of a file in the folder for each call."""
    return tempfile.mkdtemp(dir=folder)


def slowly(place):
    time.sleep(0.1)
    return place


def test_all_steps_of_ray_s_run_beside_one_another_on_a_single_processor(ray, tmp_path):
    results = RayEngine(ray, 1).map([Step(noted), Step(slowly, network=True), Step(str)], [str(tmp_path)] * 300)
    with contextlib.closing(results):
        next(results)
        assert len(list(tmp_path.iterdir())) < 200


@pytest.mark.parametrize("network", [False, True])
def test_what_kills_every_worker_of_ray_s_ends_the_command(ray, network):
    with pytest.raises(PortraitError, match=r"a process was killed.*Start the same command again"):
        list(RayEngine(ray, 1).map([Step(abs), Step(os._exit, network)], [9]))
