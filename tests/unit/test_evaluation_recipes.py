"""The two small networks that measure pictures of the world: what they are shown and asked, and how they are kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")
pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

import portrait as command_line
from lib_portrait.faces.heatmap_detector import faces_in, heatmap_detector
from trainer.attribute_network import HEADS, AttributeNetwork
from trainer.dataset import world_sample
from trainer.recipes.attributes import AttributeDataset, scene_of
from trainer.recipes.detector import DetectionDataset, targets
from trainer.shards import Shards
from trainer.world import render
from trainer.world.attributes import attributes_of

QUICK = "--steps 2 --batch 4 --warmup 0 --log-every 1 --save-every 2 --ema 0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shard of the world."""
    home = tmp_path_factory.mktemp("measuring")
    portrait(f"dataset world --output {home}/shards --number 12 --identities 8 --processes 1")
    return home


def portrait(line: str) -> None:
    """`portrait.py` with these arguments; no path in them may hold spaces."""
    assert command_line.run(command_line.parse(line.split())) == 0, line


@pytest.mark.parametrize("seed", range(8))
def test_a_record_leads_back_to_the_scene_it_was_drawn_from(seed: int) -> None:
    """Also of several people, whom the record names in drawing order."""
    record = world_sample(seed, 50, 64).record
    scene = scene_of(record)
    picture = render(scene, 64)
    assert [str(face.id) for face in picture.faces] == [face.id for face in record.faces]
    attributes = attributes_of(scene)
    assert attributes["people"] == str(len(record.faces))
    assert attributes["women"] == str(sum(face.word == "woman" for face in record.faces))
    assert all(value in HEADS[name] for name, value in attributes.items())


def test_records_that_do_not_lead_back_are_refused() -> None:
    record = world_sample(3, 50, 64).record
    for changed in (
        replace(record, extra={}),
        replace(record, caption="a photo of a horse"),
        replace(record, faces=(replace(record.faces[0], id=None), *record.faces[1:])),
    ):
        with pytest.raises(ValueError, match=r"scene"):
            scene_of(changed)


def test_the_attributes_of_a_picture_are_classes_where_they_are_known(home: Path) -> None:
    pictures = AttributeDataset(Shards.under(home / "shards"))
    for index in range(len(pictures)):
        sample = pictures[index, (0, 0, index)]
        alone = len(pictures.shards.record(index).faces) == 1
        assert sample["pixels"].shape == (3, 128, 128) and sample["pixels"].abs().max() <= 1
        assert bool(sample["face"].any()) == alone
        assert (sample["expression"] >= 0) == alone
        assert all(-1 <= int(sample[name]) < len(words) for name, words in HEADS.items())


def test_what_the_detector_is_taught_are_the_faces_of_the_picture(home: Path) -> None:
    """The cells that it should say, read as what it says, are the faces where they were moved to."""
    shards = Shards.under(home / "shards")
    for index in range(len(shards)):
        points = [[*face.box, *np.ravel(face.landmarks)] for face in shards.record(index).faces]
        wanted = torch.tensor(points).float().reshape(len(points), 7, 2)
        cells, role = targets(wanted)
        cells[0] = 20 * cells[0] - 10
        found = sorted(faces_in(cells), key=lambda face: face.box[0])
        expected = sorted(wanted.tolist(), key=lambda face: face[0][0])
        assert len(found) == len(expected) == int((role == 1).sum())
        for face, truth in zip(found, expected, strict=True):
            assert np.allclose(face.box, np.ravel(truth[:2]), atol=1e-3)
            assert np.allclose(face.landmarks, truth[2:], atol=1e-3)
    moved = DetectionDataset(shards)[0, (0, 0, 1)]
    again = DetectionDataset(shards)[0, (0, 0, 1)]
    assert all(torch.equal(moved[name], again[name]) for name in moved)
    assert moved["pixels"].shape == (3, 128, 128)


def test_both_are_trained_and_kept_as_the_evaluation_reads_them(home: Path) -> None:
    for recipe in ("attributes", "detector"):
        portrait(f"train {recipe} --data {home}/shards --output {home}/{recipe} {QUICK}")
    picture = Shards.under(home / "shards").picture(0)
    network = AttributeNetwork.load(home / "attributes" / "export" / "world-attributes.safetensors")
    (predicted,) = network.predict([picture])
    assert set(predicted) == set(HEADS) and all(value in HEADS[name] for name, value in predicted.items())
    detector = heatmap_detector(home / "detector" / "export" / "world-detector.safetensors")
    assert all(face.landmarks.shape == (5, 2) for face in detector.find(picture))
