"""Shards: what was written is read again, by the webdataset package too; what is wrong with a sample stays there."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest

from lib_portrait.errors import PortraitError
from trainer.shards import FaceRecord, Record, Shards, encode_png, writing

BOX, LANDMARKS = [10.0, 12.0, 30.5, 40.0], [[15.0, 20.0], [25.0, 20.0], [20.0, 27.0], [16.0, 33.0], [24.0, 33.0]]
FACE = {"id": "alice", "word": "woman", "box": BOX, "landmarks": LANDMARKS}
RECORD = Record(
    "a photo of a woman", (FaceRecord("alice", "woman", tuple(BOX), tuple(map(tuple, LANDMARKS))),), {"photo": "a.jpg"}
)


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def labels():
    made = np.zeros((48, 64), np.uint8)
    made[12:40, 10:30] = 1
    return made


def write(path, number=3):
    with writing(path) as shard:
        for index in range(number):
            shard.add(f"{index:04d}", encode_png(picture(index)), "png", RECORD, labels() if index else None)
    return path


def put(path, members):
    """A tar of the given members: name and bytes."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_was_written_is_read_again(tmp_path):
    shards = Shards.under(write(tmp_path / "a-00000.tar").parent)
    assert len(shards) == 3
    for index in (2, 0, 1):
        sample = shards[index]
        assert sample.key == f"{index:04d}" and sample.record == RECORD
        np.testing.assert_array_equal(sample.image, picture(index))
        if index:
            np.testing.assert_array_equal(sample.labels, labels())
        else:
            assert sample.labels is None


def test_several_shards_are_one_list_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.tar", 2), write(tmp_path / "a.tar", 3)
    shards = Shards.under(tmp_path)
    assert [path.name for path in shards.paths] == ["a.tar", "b.tar"]
    assert shards.starts == [0, 3] and len(shards) == 5
    assert len(Shards.under(tmp_path / "b.tar")) == 2


def test_the_webdataset_package_reads_the_same(tmp_path):
    import webdataset

    path = write(tmp_path / "a-00000.tar")
    seen = list(webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in seen] == ["0000", "0001", "0002"]
    for index, sample in enumerate(seen):
        np.testing.assert_array_equal(sample["png"], picture(index))
        assert Record.from_json(json.dumps(sample["json"])) == RECORD
        assert ("mask.png" in sample) == (index > 0)


def test_shards_that_webdataset_writes_are_read(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "set/0", "PNG": encode_png(picture()), "json": json.loads(RECORD.to_json())})
    shards = Shards.under(tmp_path)
    assert shards.key(0) == "set/0" and shards[0].record == RECORD
    np.testing.assert_array_equal(shards[0].image, picture())


def test_equal_samples_make_equal_files(tmp_path):
    assert write(tmp_path / "a.tar").read_bytes() == write(tmp_path / "b.tar").read_bytes()


def test_a_shard_that_was_broken_off_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), writing(tmp_path / "a.tar") as shard:
        shard.add("0", encode_png(picture()), "png", RECORD, None)
        raise KeyboardInterrupt
    assert not (tmp_path / "a.tar").exists()
    with pytest.raises(PortraitError, match="there are no shards"):
        Shards.under(tmp_path)


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"\x1f\x8b" + bytes(600)])
def test_a_file_that_is_no_shard_is_refused_by_name(tmp_path, data):
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(PortraitError, match=r"bad\.tar is no shard"):
        Shards.under(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '"text"',
        "{}",
        "[" * 100_000,
        b"\xff\xfe\x00",
        json.dumps({"caption": "a"}),
        json.dumps({"caption": 1, "faces": []}),
        json.dumps({"caption": "a", "faces": 3}),
        json.dumps({"caption": "a", "faces": {"a": 1}}),
        json.dumps({"caption": "a", "faces": [FACE, FACE]}),
        *(
            json.dumps({"caption": "a", "faces": [{**FACE, **change}]})
            for change in (
                {"box": [0, 0, 1]},
                {"box": [0, 0, 0, 1]},
                {"box": [5, 5, 1, 9]},
                {"box": "1234"},
                {"box": ["1", "2", "3", "4"]},
                {"box": [0, 0, float("nan"), 1]},
                {"box": [0, 0, float("inf"), 1]},
                {"box": [0, 0, 10**400, 1]},
                {"box": [False, False, True, True]},
                {"box": None},
                {"landmarks": LANDMARKS[:4]},
                {"landmarks": [[1, 1]] * 5},
                {"landmarks": [[1, 2, 3]] * 5},
                {"landmarks": "12345"},
                {"id": 7},
                {"id": ["a"]},
                {"word": "king"},
                {"word": {}},
            )
        ),
    ],
)
def test_hostile_records_are_refused_and_cost_one_sample(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(ValueError):
        Record.from_json(data)
    good = {"1.png": encode_png(picture()), "1.json": RECORD.to_json().encode()}
    shards = Shards([put(tmp_path / "a.tar", {"0.png": encode_png(picture()), "0.json": data, **good})])
    with pytest.raises(ValueError):
        shards[0]
    assert shards[1].record == RECORD


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"0.json": b"{}"}, "has no picture"),
        ({"0.png": b"", "0.json": b"{}"}, "cannot be decoded"),
        ({"0.png": b"no picture", "0.json": b"{}"}, "cannot be decoded"),
        ({"0.png": encode_png(picture())[:-400], "0.json": b"{}"}, "cannot be decoded"),
        ({"0.png": encode_png(picture())}, "has no json"),
        (
            {"0.png": encode_png(picture()), "0.json": RECORD.to_json().encode(), "0.mask.png": b"x"},
            "cannot be decoded",
        ),
        (
            {"0.png": encode_png(picture()[:20]), "0.json": RECORD.to_json().encode(), "0.mask.png": "mask"},
            "mask is 64x48 pixels",
        ),
        (
            {"0.png": encode_png(picture()), "0.json": b'{"caption": "", "faces": []}', "0.mask.png": "mask"},
            "shows face 1 of 0",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_says_why(tmp_path, members, reason):
    import cv2

    mask = cv2.imencode(".png", labels())[1].tobytes()
    path = put(tmp_path / "a.tar", {name: mask if data == "mask" else data for name, data in members.items()})
    with pytest.raises(ValueError, match=reason):
        Shards([path])[0]


def test_a_shard_that_vanished_costs_its_samples_only(tmp_path):
    shards = Shards([write(tmp_path / "a.tar", 1), write(tmp_path / "b.tar", 1)])
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        shards[0]
    assert shards[1].record == RECORD
