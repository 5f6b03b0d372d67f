"""`portrait.py dataset`: shards of the world and of photos, resumed where they were broken off; bad data is counted."""

from __future__ import annotations

import json
import tarfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import portrait as command_line
from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.faces.features import FaceEncoder
from lib_portrait.faces.vision import vision_from_state_dict
from lib_portrait.standalone.model import load_tokenizer
from tests.portraits import portrait
from tests.small_networks import tiny_backbone, tiny_vision
from trainer import dataset
from trainer.architectures import world_vae
from trainer.dataset import (
    PhotoSettings,
    WorldSettings,
    check_shards,
    label_of,
    make_photos,
    make_world,
    square_crop,
    training_person,
    world_sample,
)
from trainer.faces import aligned
from trainer.features import Features
from trainer.shards import Shards, encode_png, writing
from trainer.world import held_out

# -------------------------------------------------------------------------------------------------------------- world


def test_the_world_s_scenes_keep_their_numbers():
    """Networks were trained on these: another picture or label under a number would mix two worlds."""
    made = world_sample(1, 6000, 128)
    record = json.loads(made.record.to_json())
    assert made.key == "00000001" and made.suffix == "png"
    wording = "a pencil drawing of a man wearing a grey shirt and a woman wearing a green shirt in a forest"
    assert record["caption"] == wording
    assert [(face["id"], face["word"]) for face in record["faces"]] == [("5044", "man"), ("197", "woman")]
    assert record["faces"][0]["box"] == [16.85, 44.12, 60.79, 92.0]
    assert record["attributes"]["faces"] == {
        "0": {"garment": "shirt", "clothes_colour": "grey"},
        "1": {"garment": "shirt", "clothes_colour": "green"},
    }
    assert record["world"] == {"seed": 1}
    assert sorted(np.unique(made.labels).tolist()) == [0, 1, 2]


def test_only_people_of_the_training_part_appear():
    assert [training_person(k) for k in (0, 8, 9, 17, 18)] == [0, 8, 10, 18, 20]
    assert not any(held_out(training_person(k)) for k in range(200))


def test_the_number_of_processes_changes_no_byte(tmp_path):
    world = WorldSettings(0, 5, size=64, shard=2)
    assert make_world(tmp_path / "one", world) == 3
    assert make_world(tmp_path / "two", world, processes=2) == 3
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["world-00000.tar", "world-00001.tar", "world-00002.tar"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(Shards.under(tmp_path / "one")) == 5


def test_whole_shards_of_the_world_are_kept(tmp_path):
    make_world(tmp_path, WorldSettings(0, 4, size=64, shard=2))
    bytes_before = (tmp_path / "world-00001.tar").read_bytes()
    (tmp_path / "world-00001.tar").unlink()
    kept = (tmp_path / "world-00000.tar").stat()
    assert make_world(tmp_path, WorldSettings(0, 6, size=64, shard=2)) == 2
    assert (tmp_path / "world-00000.tar").stat().st_mtime_ns == kept.st_mtime_ns
    assert (tmp_path / "world-00001.tar").read_bytes() == bytes_before


@pytest.mark.parametrize("other", [{"size": 80}, {"identities": 50}, {"number": 1}])
def test_shards_of_another_world_are_not_taken_for_these(tmp_path, other):
    make_world(tmp_path, WorldSettings(0, 2, size=64, shard=2))
    values = {"number": 2, "size": 64, "shard": 2, **other}
    with pytest.raises(PortraitError, match=r"world-00000\.tar is there but holds other samples"):
        make_world(tmp_path, WorldSettings(0, **values))


def test_a_world_that_begins_within_a_shard_is_refused():
    with pytest.raises(PortraitError, match="Begin at a whole shard"):
        WorldSettings(first=500, number=10)


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

    monkeypatch.setattr(dataset, "_detector", lambda name: Detector("test", "1", find))
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
    made, skipped, notices = make_photos(folder.place, tmp_path / "out", SMALL)
    sample = records(tmp_path / "out")["a.png"]
    assert (made, skipped, notices) == (1, [], []) and sample.image.shape == (128, 128, 3)
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
    _, (skipped,), _ = make_photos(folder.place, tmp_path / "out", SMALL)
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
    photos = PhotoSettings(**{**vars(SMALL), "shard": 2})
    make_photos(folder.place, tmp_path / "whole", photos)
    asked = []

    def breaks(job, **options):
        asked.append(job[0])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return sample(job, **options)

    sample = dataset.photo_sample
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dataset, "photo_sample", breaks)
        make_photos(folder.place, tmp_path / "out", photos)
    with (tmp_path / "out" / "photos.jsonl").open("a") as file:
        file.write('{"end": 6, "samp')
    patch = pytest.MonkeyPatch()
    patch.setattr(dataset, "photo_sample", lambda job, **options: asked.append(job[0]) or sample(job, **options))
    assert make_photos(folder.place, tmp_path / "out", photos)[0] == 6
    patch.undo()
    assert asked == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_shard_is_written_of_photos_that_are_all_skipped(folder, tmp_path):
    for number in range(3):
        folder(f"{number}.png", (256, 256), *([(10, 10, 80, 80)] if number < 2 else []))
    photos = PhotoSettings(**{**vars(SMALL), "shard": 2})
    for _ in range(2):
        made, skipped, _ = make_photos(folder.place, tmp_path / "out", photos)
        assert made == 2 and [one.photo for one in skipped] == ["2.png"]
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
    made, skipped, notices = make_photos(
        tmp_path / "people", tmp_path / "out", PhotoSettings(size=256, detector="mtcnn")
    )
    assert (made, skipped, notices) == (1, [], [])
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


# -------------------------------------------------------------------------------------------------------------- check


def test_check_counts_what_cannot_be_used_and_what_a_person_may_want_to_see(tmp_path, capsys):
    samples = [world_sample(seed, 6000, 64) for seed in range(3)]
    with writing(tmp_path / "a-00000.tar") as shard:
        for made in samples:
            made.add_to(shard)
        first = samples[0]
        shard.add("twice", first.picture, "png", first.record, first.labels)
        shard.add("mask", first.picture, "png", first.record, np.zeros((8, 8), np.uint8))
        shard.add("picture", b"none", "png", first.record, None)
        shard._put("record.png", encode_png(np.zeros((8, 8, 3), np.uint8)))
        shard._put("record.json", b'{"caption": 3}')
        outside = json.loads(first.record.to_json())
        outside["faces"][0]["box"] = [-30, 0, 10, 10]
        outside["caption"] = " "
        shard._put("outside.png", cv2.imencode(".png", np.ones((64, 64, 3), np.uint8))[1].tobytes())
        shard._put("outside.json", json.dumps(outside).encode())
        shard.add("wide", encode_png(np.zeros((64, 72, 3), np.uint8)), "png", samples[1].record, None)
    (tmp_path / "b-00000.tar").write_bytes(b"nothing")
    report = check_shards(tmp_path)
    assert report.samples == 9 and report.shards == 2
    assert report.unusable == {
        "unusable mask": 1,
        "unusable picture": 1,
        "unusable record": 1,
        "picture of another size than the shard's first": 1,
        "shard that is no tar file": 1,
    }
    alone = sum(len(made.record.faces) for made in samples[1:])
    assert report.doubtful == {
        "same picture twice": 1,
        "face outside the picture": 1,
        "empty caption": 1,
        "person with one face only": alone,
    }
    words = ["dataset", "check", str(tmp_path), "--list", str(tmp_path / "faults.txt"), "--processes", "1"]
    assert command_line.run(command_line.parse(words)) == 1
    assert "cannot be used: 5" in capsys.readouterr().out
    assert len((tmp_path / "faults.txt").read_text().splitlines()) == 5 + sum(report.doubtful.values())
    (tmp_path / "b-00000.tar").unlink()
    make_world(tmp_path / "good", WorldSettings(0, 2, size=64))
    assert command_line.run(command_line.parse(["dataset", "check", str(tmp_path / "good"), "--processes", "1"])) == 0
    with pytest.raises(PortraitError, match="holds no shards"):
        check_shards(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Files of small random networks: vae.safetensors, backbone.safetensors, vision.safetensors."""
    place = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_file(world_vae().state_dict(), place / "vae.safetensors")
    save_file(dict(tiny_backbone().state_dict()), place / "backbone.safetensors")
    save_file(tiny_vision(), place / "vision.safetensors")
    return place


def features(networks, data, *names):
    words = [word for name in names for word in (f"--{name}", str(networks / f"{name}.safetensors"))]
    return command_line.run(
        command_line.parse(["dataset", "features", str(data), *words, "--batch", "2", "--device", "cpu"])
    )


def test_features_are_those_of_the_picture_the_caption_and_the_faces(tmp_path, networks, capsys):
    samples = [world_sample(seed, 6000, 64) for seed in (0, 1, 5)]
    with writing(tmp_path / "world-00000.tar") as shard:
        for number, made in enumerate(samples):
            made.add_to(shard)
            if number == 0:
                shard.add("bad", b"no picture", "png", made.record, None)
    assert features(networks, tmp_path, "vae", "backbone", "vision") == 0
    number = sum(len(made.record.faces) for made in samples)
    said = capsys.readouterr().out
    assert f"1 shards: 4 pictures, {number} faces" in said and "1 pictures cannot be used" in said
    shards = Shards.under(tmp_path)
    found = Features(shards)
    assert found.usable.tolist() == [True, False, True, True]
    assert found.sizes[0].tolist() == [64, 64]
    vae = world_vae()
    vae.load_state_dict(load_file(networks / "vae.safetensors"))
    pixels = torch.from_numpy(shards[2].image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = vae.encode(pixels).latent_dist.mean[0]
    torch.testing.assert_close(found.latents[2].float(), latent, rtol=2e-3, atol=2e-3)
    caption = load_tokenizer().decode(found.tokens[2].tolist(), skip_special_tokens=True)
    assert caption == samples[1].record.caption
    backbone, vision = tiny_backbone(), vision_from_state_dict(tiny_vision(), {}, "vision")
    encoder = FaceEncoder(lambda: (backbone, vision), "tiny", torch.device("cpu"))
    for face, record in enumerate(samples[1].record.faces):
        intrinsic, structure = found.face(2, face)
        # Crops are as a detector would have cut them, a few hundredths of the eyes' distance beside the true ones.
        own = encoder.encode([aligned(shards[2].image, record, 224)])[0]
        others = [found.face(3, 0)[0], found.face(2, 1 - face)[0]]
        near = float((intrinsic.float() - own.intrinsic).square().mean())
        assert all(near < float((other.float() - own.intrinsic).square().mean()) for other in others)
        assert structure.shape == own.structure.shape
    torch.testing.assert_close(found.zero_structure, encoder.zero().structure, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="has no features"):
        found.face(1, 0)


def test_features_that_are_there_are_kept_and_those_of_other_networks_made_again(tmp_path, networks, capsys):
    make_world(tmp_path, WorldSettings(0, 2, size=64, shard=1))
    kept, again = tmp_path / "world-00000.features.safetensors", tmp_path / "world-00001.features.safetensors"
    assert features(networks, tmp_path, "vae") == 0
    before = kept.stat().st_mtime_ns
    again.unlink()
    assert features(networks, tmp_path, "vae") == 0
    assert kept.stat().st_mtime_ns == before and again.exists()
    assert features(networks, tmp_path, "vae", "backbone", "vision") == 0
    assert kept.stat().st_mtime_ns != before
    assert "1 shards: 1 pictures" in capsys.readouterr().out
    assert features(networks, tmp_path, "vae") == 0
    assert len(Features(Shards.under(tmp_path)).faces) > 0, "latents alone were asked for, and were there"


def test_latents_stay_where_only_the_networks_of_faces_are_new(tmp_path, networks, capsys, monkeypatch):
    with writing(tmp_path / "world-00000.tar") as shard:
        made = world_sample(0, 6000, 64)
        shard.add("bad", b"no picture", "png", made.record, None)
        made.add_to(shard)
    assert features(networks, tmp_path, "vae") == 0
    first = load_file(tmp_path / "world-00000.features.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.features.LatentEncoder.__call__", lambda *_: pytest.fail("latents were made again"))
        assert features(networks, tmp_path, "vae", "backbone", "vision") == 0
    second = load_file(tmp_path / "world-00000.features.safetensors")
    assert all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)
    assert second["sample"].tolist() == [1] * len(made.record.faces)
    assert "2 pictures" in capsys.readouterr().out

    other = tmp_path / "other"
    other.mkdir()
    for file in networks.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file({k: v * 1.5 for k, v in load_file(networks / "vae.safetensors").items()}, other / "vae.safetensors")
    assert features(other, tmp_path, "vae", "backbone", "vision") == 0
    third = load_file(tmp_path / "world-00000.features.safetensors")
    assert not torch.equal(third["latents"][1], first["latents"][1])


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ((), "Give either --checkpoint or --vae"),
        (("vae", "vision"), "Give --backbone and --vision, or none"),
    ],
)
def test_networks_that_are_not_complete_are_refused(tmp_path, networks, capsys, names, problem):
    make_world(tmp_path, WorldSettings(0, 1, size=64))
    assert features(networks, tmp_path, *names) == 1
    assert problem in capsys.readouterr().err


def test_a_file_that_holds_another_network_is_refused_by_name(tmp_path, networks, capsys):
    make_world(tmp_path, WorldSettings(0, 1, size=64))
    words = ["dataset", "features", str(tmp_path), "--vae", str(networks / "backbone.safetensors")]
    assert command_line.run(command_line.parse(words)) == 1
    assert "backbone.safetensors does not hold the world's VAE" in capsys.readouterr().err
