"""A trained adapter works at once where it was exported, for whoever may read it, and tells no folder of anybody's."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from accelerate.state import AcceleratorState, GradientState

import portrait as command_line
from lib_portrait.checkpoints.formats import read_header, write_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import Manifest, Sampling, StoredFile, TextEncoder, read_manifest, write_manifest
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.errors import PortraitError
from lib_portrait.faces import service
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.methods.declarations.uniportrait import FILES
from lib_portrait.standalone import generation
from lib_portrait.standalone.model import save_model
from tests.small_networks import small_model, tiny_backbone, tiny_vision
from trainer import companions
from trainer.companions import Companion, encoder_files, of_further_file, resolve, stored_file, warn_of_unnamed
from trainer.shards import FaceRecord, Record, encode_png, writing

POINTS = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.6], [0.38, 0.75], [0.62, 0.75]], np.float32)


def portrait_of(image: np.ndarray) -> list[Face]:
    """One face, as large as the picture."""
    size = np.array(image.shape[1::-1], np.float32)
    return [Face(np.array([0, 0, *size], np.float32), POINTS * size, 0.99)]


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, photos and shards of small random networks; the face networks lie in a folder of their own."""
    monkeypatch.setattr(service, "get_detector", lambda name, folders: Detector("portrait", "1", portrait_of))
    monkeypatch.setattr(generation, "CACHE", tmp_path / "cache")
    save_model(small_model(), tmp_path / "base.safetensors")
    (tmp_path / "own").mkdir()
    save_file(dict(tiny_backbone().state_dict()), tmp_path / "own" / "eyes.safetensors")
    save_file(tiny_vision(), tmp_path / "own" / "clip.safetensors")
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    with writing(tmp_path / "shards" / "photos-00000.tar") as shard:
        for number, people in enumerate((1, 2)):
            picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
            size = np.array([64 / people, 64])
            faces = tuple(
                FaceRecord(
                    f"{face}",
                    "woman",
                    (face * size[0], 0.0, (face + 1) * size[0], 64.0),
                    tuple((float(x), float(y)) for x, y in POINTS * size + [face * size[0], 0]),
                )
                for face in range(people)
            )
            shard.add(f"{number}", encode_png(picture), "png", Record("a woman", faces, {}), None)
    for name in ("eve", "ada"):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def portrait(*words: str | Path) -> int:
    return command_line.run(command_line.parse([str(word) for word in words]))


def test_both_stages_work_at_once_where_they_were_exported(somewhere: Path) -> None:
    """The whole way by the commands, with networks that lie in no model folder."""
    base, own, shards = somewhere / "base.safetensors", somewhere / "own", somewhere / "shards"
    networks = ["--backbone", own / "eyes.safetensors", "--vision", own / "clip.safetensors"]
    assert portrait("dataset", "features", shards, "--checkpoint", base, *networks, "--device", "cpu") == 0
    train = ["train", "uniportrait", "--data", shards, "--checkpoint", base, "--name", "mine", "--steps", "1"]
    train += ["--batch", "1", "--rank", "2", "--tokens", "4", "--width", "48", "--depth", "1", "--warmup", "0"]
    goes_with_it = {"detector": StoredFile("eyes.safetensors", "0" * 64), "measuring": StoredFile("third.safetensors")}
    goes_with_it |= {"sampling": Sampling("DDIM", 20, 5)}
    of_base = Manifest("first", "uniportrait", {"faceid": "x"}, base=stored_file(base), licence="CC0", **goes_with_it)
    write_manifest(somewhere / "first.kit.json", of_base)
    one, two = somewhere / "one", somewhere / "two"
    assert portrait(*train, "--output", one, *networks) == 0
    faceid = one / "export" / "uniportrait-faceid_mine.safetensors"
    assert portrait(*train, "--output", two, "--stage", "2", "--faceid", faceid, "--licence", "mine alone") == 0

    draw = ["generate", "--checkpoint", base, "--prompt", "a woman", "--adapter", "mine", "--size", "64x64"]
    draw += ["--steps", "1", "--device", "cpu", "--output", somewhere / "out", "--face", somewhere / "eve.png"]
    assert portrait(*draw, "--models", one / "export") == 0
    assert portrait(*draw, "--models", two / "export", "--face", somewhere / "ada.png") == 0

    # The recognition network has gone elsewhere under another name, and another has come in its place.
    later = somewhere / "later"
    later.mkdir()
    for name in ("mine.kit.json", "uniportrait-faceid_mine.safetensors", "uniportrait-router_mine.safetensors"):
        shutil.copyfile(two / "export" / name, later / name)
    shutil.copyfile(own / "eyes.safetensors", later / "a.safetensors")
    shutil.copyfile(own / "clip.safetensors", later / "b.safetensors")
    save_file(dict(tiny_backbone(24).state_dict()), later / "eyes.safetensors")
    kit = Store(Folders([later]), adapter_files()).kit("mine")
    assert [kit.files[role].name for role in ("backbone", "vision")] == ["a.safetensors", "b.safetensors"]
    assert portrait(*draw, "--models", later, "--face", somewhere / "ada.png") == 0

    for stage, export in ((1, one / "export"), (2, two / "export")):
        manifest = read_manifest(export / "mine.kit.json")
        assert manifest.adapter == {
            role: f"uniportrait-{role}_mine.safetensors" for role in ("faceid", "router")[:stage]
        }
        eyes, clip = own / "eyes.safetensors", own / "clip.safetensors"
        assert manifest.encoders == {"backbone": stored_file(eyes), "vision": stored_file(clip)}
        assert manifest.base == stored_file(base)
        assert {name: getattr(manifest, name) for name in goes_with_it} == goes_with_it
        assert manifest.licence == ("CC0" if stage == 1 else "mine alone")
        assert manifest.picture == (128, 128) and manifest.text_encoder is not None
        assert manifest.training["steps"] == "1" and manifest.training["recipe"] == f"uniportrait stage {stage}"
        assert str(somewhere) not in (export / "mine.kit.json").read_text("utf-8")
        for file in export.glob("*.safetensors"):
            assert file.stat().st_mode & 0o044 == 0o044, f"{file} is for its maker alone"
            metadata = json.dumps(read_header(file)[1])
            assert str(somewhere) not in metadata and "/" not in metadata
    metadata = read_header(faceid)[1]
    assert (metadata["backbone"], metadata["vision"]) == ("eyes.safetensors", "clip.safetensors")
    assert file_sha256(own / "eyes.safetensors") in metadata["features"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setattr(companions, "FOLDERS", (folder,))
    return folder


def file_of(folder: Path, name: str, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((2,), value)}, folder / name)
    return folder / name


def test_only_what_the_model_folders_do_not_have_is_brought_along(tmp_path: Path, models: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    same, other, lone = (file_of(tmp_path / "own", f"{name}.safetensors", 1.0) for name in ("same", "other", "lone"))
    file_of(models, "same.safetensors", 1.0)
    file_of(models, "other.safetensors", 2.0)
    for path in (same, other, lone):
        resolve("backbone", str(path), {}, [models]).export_to(target, [models])
    assert sorted(path.name for path in target.iterdir()) == ["lone.safetensors", "other.safetensors"]
    assert (target / "other.safetensors").read_bytes() == other.read_bytes()
    resolve("backbone", "same.safetensors", {}, [models]).export_to(target, [models])
    assert not (target / "same.safetensors").exists()


def test_what_lies_in_the_folder_of_the_export_stays_as_it_is(tmp_path: Path) -> None:
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(b"weights")
    for _ in range(2):
        Companion("vision", "lone.safetensors", lone).export_to(tmp_path, [tmp_path / "none"])
        assert lone.read_bytes() == b"weights"


def test_where_the_file_system_has_no_second_names_it_is_a_copy(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(companions.os, "link", link)
    lone = file_of(tmp_path / "own", "lone.safetensors", 1.0)
    lone.chmod(0o644)
    Companion("vision", "lone.safetensors", lone).export_to(models, [tmp_path / "none"])
    assert (models / "lone.safetensors").read_bytes() == lone.read_bytes()


@pytest.mark.parametrize("rights", [0o600, 0o644])
def test_what_is_brought_along_may_be_read_like_the_rest(tmp_path: Path, models: Path, rights: int) -> None:
    lone = file_of(tmp_path / "own", "lone.safetensors", 1.0)
    lone.chmod(rights)
    Companion("vision", "lone.safetensors", lone).export_to(models, [tmp_path / "none"])
    brought = models / "lone.safetensors"
    assert brought.stat().st_mode & 0o044 == 0o044 and lone.stat().st_mode & 0o777 == rights
    assert brought.read_bytes() == lone.read_bytes() and brought.samefile(lone) == (rights == 0o644)


def test_a_path_that_leads_to_another_network_than_the_features_is_refused(tmp_path: Path, models: Path) -> None:
    lone = file_of(tmp_path / "own", "lone.safetensors", 1.0)
    hashes = {"backbone": file_sha256(lone), "vision": "0" * 64}
    assert resolve("backbone", str(lone), hashes, [models]) == Companion("backbone", "lone.safetensors", lone)
    with pytest.raises(PortraitError, match="vision: the features .* from another network than lone.safetensors"):
        resolve("vision", str(lone), hashes, [models])
    with pytest.raises(PortraitError, match="there is no file .*gone.safetensors"):
        resolve("vision", str(tmp_path / "gone.safetensors"), hashes, [models])


def test_a_bare_name_that_leads_nowhere_or_elsewhere_is_warned_of(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve("vision", "gone.safetensors", {}, [models]).path is None
    assert "gone.safetensors is in none of the model folders; --vision PATH" in capsys.readouterr().err
    file_of(models, "there.safetensors", 1.0)
    assert resolve("vision", "there.safetensors", {"vision": "0" * 64}, [models]).path is None
    assert "another file than the features'" in capsys.readouterr().err
    assert resolve("vision", "there.safetensors", {}, [models]).path == models / "there.safetensors"
    assert not capsys.readouterr().err


def test_features_of_an_unnamed_network_that_is_not_the_published_one_are_warned_of(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = FILES.known("vision")
    assert published is not None
    there = file_of(models, published.filename, 1.0)
    for hashes in ({}, {"vision": file_sha256(there)}, {"vision": published.sha256 or ""}):
        warn_of_unnamed("vision", hashes, [models])
    assert not capsys.readouterr().err
    warn_of_unnamed("vision", {"vision": "0" * 64}, [models])
    there.unlink()
    warn_of_unnamed("vision", {"vision": "0" * 64}, [models])
    assert capsys.readouterr().err.count("--vision FILE names theirs") == 2


def test_a_manifest_tells_of_each_network_what_is_known(tmp_path: Path, models: Path) -> None:
    lone = file_of(tmp_path / "own", "lone.safetensors", 1.0)
    known = FILES.known("vision")
    assert known is not None
    published = file_of(models, known.filename, 2.0)
    hashes = {"backbone": file_sha256(lone), "vision": file_sha256(published), "vae": "0" * 64}
    assert encoder_files(FILES, [resolve("backbone", str(lone), hashes, [models])], hashes, [models]) == {
        "backbone": stored_file(lone),
        "vision": stored_file(published),
    }
    lone.unlink()
    published.unlink()
    assert encoder_files(FILES, [Companion("backbone", "lone.safetensors", None)], hashes, [models]) == {
        "backbone": StoredFile("lone.safetensors", hashes["backbone"]),
        "vision": StoredFile(published.name, hashes["vision"]),
    }
    assert encoder_files(FILES, [], {}, [models]) == {}


def test_a_manifest_takes_from_the_base_s_kit_what_goes_with_its_pictures(tmp_path: Path, models: Path) -> None:
    base = file_of(tmp_path / "own", "base.safetensors", 1.0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 77}
    model: Any = SimpleNamespace(size=64, text_encoder=SimpleNamespace(config=SimpleNamespace(**sizes)))
    alone = {"base": stored_file(base), "text_encoder": TextEncoder(48, 2, 3, 77), "picture": (64, 64)}
    assert companions.of_base(base, model, None, [models]) == {**alone, "licence": None}
    shared = {name: StoredFile(f"{name}.bin") for name in ("detector", "measuring", "attributes")}
    kit = Manifest("first", "fusion", {"fusion": "x"}, base=stored_file(base), licence="CC0", **shared)
    kit = dataclasses.replace(kit, sampling=Sampling("DDIM", 20, 5), picture=(128, 96), guidance={"block": 2.0})
    write_manifest(models / "first.kit.json", kit)
    known = {**alone, **shared, "sampling": kit.sampling, "guidance": {"block": 2.0}}
    assert companions.of_base(base, model, None, [models]) == {**known, "licence": "CC0"}
    assert companions.of_base(base, model, "mine", [models]) == {**known, "licence": "mine"}


def test_a_router_goes_with_the_faceid_of_its_first_stage_under_its_own_name(tmp_path: Path, models: Path) -> None:
    own = tmp_path / "own"
    eyes = file_of(own, "eyes.safetensors", 1.0)
    faceid = own / "uniportrait-faceid_first.safetensors"
    write_tensors(faceid, {"a": torch.ones(1)}, {"backbone": "eyes.safetensors", "vision": "gone.safetensors"})
    target = tmp_path / "export"
    target.mkdir()
    for companion in of_further_file(faceid, FILES, "second"):
        companion.export_to(target, [models])
    assert sorted(path.name for path in target.iterdir()) == [
        "eyes.safetensors",
        "uniportrait-faceid_second.safetensors",
    ]
    assert (target / "eyes.safetensors").read_bytes() == eyes.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no rights of this kind")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(("mask", "rights"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weight_files_have_the_rights_of_any_new_file(tmp_path: Path, mask: int, rights: int, suffix: str) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / f"a{suffix}", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / f"a{suffix}").stat().st_mode & 0o777 == rights
