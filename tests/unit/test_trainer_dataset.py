"""`portrait.py dataset`: shards of the world, resumed where they were broken off; bad data is counted; features."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import portrait as command_line
from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import FaceEncoder
from lib_portrait.faces.vision import vision_from_state_dict
from lib_portrait.standalone.model import load_tokenizer
from tests.small_networks import tiny_backbone, tiny_vision
from trainer.architectures import world_vae
from trainer.dataset import (
    WorldSettings,
    check_shards,
    make_world,
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


def test_ray_makes_the_same_features(ray, tmp_path, networks, capsys):
    for place in ("one", "two"):
        make_world(tmp_path / place, WorldSettings(0, 3, size=64, shard=1))
    assert features(networks, tmp_path / "one", "vae", "backbone", "vision") == 0
    words = ["dataset", "features", str(tmp_path / "two"), "--engine", "ray", "--processes", "2", "--device", "cpu"]
    words += [
        word for name in ("vae", "backbone", "vision") for word in (f"--{name}", f"{networks / name}.safetensors")
    ]
    words += ["--batch", "2", *(["--ray-address", ray] if ray else [])]
    assert command_line.run(command_line.parse(words)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("3 shards: 3 pictures")
    for number in range(3):
        one, two = (load_file(tmp_path / p / f"world-0000{number}.features.safetensors") for p in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-3)
