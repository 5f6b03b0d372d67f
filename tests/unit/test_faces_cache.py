"""Caches keep what they were given, within bounds, and survive damage."""

from __future__ import annotations

import hashlib
import os
import time
import zlib

import pytest
import torch

from lib_portrait.faces.cache import FeatureCache, Folder, PhotoCache, Recent
from lib_portrait.faces.features import FaceFeatures

NAMES = [hashlib.sha256(bytes([i])).hexdigest() for i in range(10)]


def features(seed: int = 0, dtype=torch.float32) -> FaceFeatures:
    generator = torch.Generator().manual_seed(seed)
    return FaceFeatures(
        torch.randn(49, 32, generator=generator).to(dtype), torch.randn(256, 56, generator=generator).to(dtype)
    )


def same(one: FaceFeatures | None, other: FaceFeatures) -> bool:
    return (
        one is not None
        and one.intrinsic.dtype == other.intrinsic.dtype
        and torch.equal(one.intrinsic, other.intrinsic)
        and torch.equal(one.structure, other.structure)
    )


def used(path, seconds_ago: float) -> None:
    moment = time.time() - seconds_ago
    os.utime(path, (moment, moment))


def test_photos_come_back_by_their_hash(tmp_path):
    cache = PhotoCache(tmp_path / "made" / "when needed")
    name = cache.put(b"a photo")
    assert name == hashlib.sha256(b"a photo").hexdigest()
    assert cache.get(name) == b"a photo"
    assert PhotoCache(tmp_path / "made" / "when needed").get(name) == b"a photo"
    assert cache.get(NAMES[0]) is None


@pytest.mark.parametrize("name", ["", "..", "../secret", "/etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_names_that_are_no_hash_reach_no_file(tmp_path, name):
    (tmp_path / "secret").write_bytes(b"secret")
    cache = PhotoCache(tmp_path / "photos")
    cache.put(b"a photo")
    assert cache.get(name) is None
    assert not cache.touch(name)
    folder = Folder(tmp_path / "photos", "", max_bytes=100)
    assert folder.read(name) is None
    folder.discard(name)
    with pytest.raises(ValueError, match="is no hash"):
        folder.write(name, b"x")
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_photo_changed_on_disk_is_thrown_away(tmp_path):
    cache = PhotoCache(tmp_path)
    name = cache.put(b"a photo")
    (tmp_path / name).write_bytes(b"another photo")
    assert cache.get(name) is None
    assert not (tmp_path / name).exists()


def test_the_longest_unused_go_first(tmp_path):
    folder = Folder(tmp_path, ".x", max_bytes=300)
    for age, name in zip((30, 20, 10), NAMES, strict=False):
        folder.write(name, bytes(100))
        used(tmp_path / f"{name}.x", age)
    assert folder.read(NAMES[0])  # counts as a use
    folder.write(NAMES[3], bytes(100))
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted([NAMES[0], NAMES[2], NAMES[3]])


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path):
    folder = Folder(tmp_path, "", max_bytes=100)
    folder.write(NAMES[0], bytes(60))
    folder.write(NAMES[1], bytes(101))
    assert folder.read(NAMES[0])
    assert folder.read(NAMES[1]) is None


def test_files_of_others_are_never_touched(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(bytes(1000))
    (tmp_path / NAMES[9]).mkdir()
    folder = Folder(tmp_path, ".x", max_bytes=100)
    folder.write(NAMES[0], bytes(60))
    folder.write(NAMES[1], bytes(60))
    folder.clear()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["holiday.jpg", NAMES[9]])


def test_what_a_crash_left_behind_is_cleared_up(tmp_path):
    fresh, stale = tmp_path / "fresh.part", tmp_path / "stale.part"
    fresh.write_bytes(b"being written")
    stale.write_bytes(b"left behind")
    used(stale, 7200)
    Folder(tmp_path, "", max_bytes=100).write(NAMES[0], b"x")
    assert fresh.exists()
    assert not stale.exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, caplog):
    folder = Folder(tmp_path, "", max_bytes=100)
    folder.write(NAMES[0], b"old")

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    folder.write(NAMES[0], b"new")
    assert folder.read(NAMES[0]) == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [NAMES[0]]
    assert "disk full" in caplog.text


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    cache = FeatureCache(tmp_path / "file" / "cache")
    cache.put(NAMES[0], features())
    assert same(cache.get(NAMES[0]), features())
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_come_back_from_memory_and_from_disk(tmp_path, dtype):
    cache = FeatureCache(tmp_path)
    cache.put(NAMES[0], features(dtype=dtype))
    assert same(cache.get(NAMES[0]), features(dtype=dtype))
    assert same(FeatureCache(tmp_path).get(NAMES[0]), features(dtype=dtype))
    assert FeatureCache(tmp_path).get(NAMES[1]) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "other tensors"])
def test_damaged_features_are_computed_anew(tmp_path, damage):
    import safetensors.torch

    cache = FeatureCache(tmp_path)
    cache.put(NAMES[0], features())
    file = tmp_path / f"{NAMES[0]}.features"
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-5] ^= 1
    elif damage == "empty":
        data = bytearray()
    elif damage == "foreign":
        body = b"not safetensors"
        data = bytearray(zlib.crc32(body).to_bytes(4, "big") + body)
    else:
        body = safetensors.torch.save({"x": torch.zeros(3)})
        data = bytearray(zlib.crc32(body).to_bytes(4, "big") + body)
    file.write_bytes(bytes(data))
    again = FeatureCache(tmp_path)
    assert again.get(NAMES[0]) is None
    assert not file.exists()
    again.put(NAMES[0], features())
    assert same(FeatureCache(tmp_path).get(NAMES[0]), features())


def test_memory_holds_only_the_latest():
    recent: Recent[int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == (1, None, 3)


def test_clearing_forgets_memory_and_disk(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put(NAMES[0], features())
    cache.clear()
    assert cache.get(NAMES[0]) is None
    assert not list(tmp_path.iterdir())


def test_keys_tell_everything_apart_that_goes_into_them():
    keys = {
        FeatureCache.key(*parts) for parts in [("a", None), ("a", 0), ("a", 1), ("b", None), ("a",), ("a\nNone", "")]
    }
    assert len(keys) == 6
