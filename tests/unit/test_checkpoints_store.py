"""Where weights are looked for, which names are allowed, and what is said when one is missing."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lib_portrait.checkpoints import Folders, Registry, Store
from lib_portrait.checkpoints.kit import Manifest, StoredFile, TextEncoder, write_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.methods.declarations.uniportrait import FILES

BACKBONE = "glint360k_curricular_face_r101_backbone.bin"
VISION = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
PUBLISHED = ["uniportrait-faceid_sd15.bin", "uniportrait-router_sd15.bin", BACKBONE, VISION]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    shared = {"vision": [tmp_path / "clip_vision"], "detector": [tmp_path / "buffalo_l"]}
    return Store(Folders([tmp_path / "Portrait", tmp_path / "models"], shared), [FILES])


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"weights")


def test_registry_is_sound() -> None:
    registry = Registry(adapter_files())
    roles = {role for files in adapter_files() for role in (*(part.role for part in files.parts), *files.encoders)}
    assert {weight.role for weight in registry.known} <= roles | {"detector", "parser"}
    for weight in registry.known:
        assert weight.url.startswith("https://")
        assert weight.sha256 is None or len(bytes.fromhex(weight.sha256)) == 32
        assert weight in registry.select(weight.command.rpartition(" ")[2])
    assert [weight.role for weight in registry.select("uniportrait")] == ["faceid", "router", "backbone", "vision"]
    assert registry.select("nothing") == []


def test_no_two_methods_have_a_part_of_one_role_or_files_of_one_name() -> None:
    parts = [part for files in adapter_files() for part in files.parts]
    assert len({part.role for part in parts}) == len(parts)
    for part in parts:
        [name] = [other.role for other in parts if other.name_of(part.filenames("mine")[0]) == "mine"]
        assert name == part.role


def test_published_kit_is_found_over_several_folders(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", "uniportrait-faceid_sd15.bin", "uniportrait-router_sd15.bin")
    put(tmp_path / "models", BACKBONE)
    put(tmp_path / "clip_vision", "clip_h.pth")
    kit = store.kit("automatic")
    assert kit == store.kit("sd15")
    assert kit.name == "sd15"
    assert kit.files["router"] == tmp_path / "Portrait" / "uniportrait-router_sd15.bin"
    assert kit.files["backbone"] == tmp_path / "models" / BACKBONE
    assert kit.files["vision"] == tmp_path / "clip_vision" / "clip_h.pth"
    [status] = store.kits()
    assert status.usable and status.missing == () and status.files["vision"] == kit.files["vision"]


def test_safetensors_comes_before_bin_and_the_first_folder_before_the_next(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED)
    save_file({"a": torch.zeros(1)}, tmp_path / "Portrait" / "uniportrait-faceid_sd15.safetensors")
    put(tmp_path / "models", "uniportrait-router_sd15.safetensors")
    kit = store.kit("sd15")
    assert kit.files["faceid"].suffix == ".safetensors"
    assert kit.files["router"] == tmp_path / "Portrait" / "uniportrait-router_sd15.bin"


def test_converted_companions_are_found_under_their_new_suffix(store: Store, tmp_path: Path) -> None:
    stem = BACKBONE.removesuffix(".bin")
    put(tmp_path / "Portrait", *PUBLISHED[:2], f"{stem}.safetensors", VISION.replace(".safetensors", ".pth"))
    kit = store.kit()
    assert kit.files["backbone"].name == f"{stem}.safetensors"
    assert kit.files["vision"].suffix == ".pth"
    assert store.find("backbone", BACKBONE) == kit.files["backbone"] == store.find("backbone", stem)


def test_missing_files_are_named_with_folder_source_and_command(store: Store, tmp_path: Path) -> None:
    with pytest.raises(PortraitError) as caught:
        store.kit()
    error = caught.value
    assert (error.field, error.status_code) == ("checkpoint", 404)
    for name in ("uniportrait-faceid_sd15.bin", BACKBONE, VISION):
        assert name in error.problem and name in error.remedy
    assert "router" not in error.problem
    assert "portrait.py download uniportrait" in error.remedy
    assert str(tmp_path / "Portrait") in error.remedy
    assert str(tmp_path / "clip_vision") in error.problem
    assert "https://huggingface.co/Junjie96/UniPortrait/resolve/main/" + BACKBONE in error.remedy
    [status] = store.kits()
    assert status.name == "sd15" and not status.usable
    assert [gap.role for gap in status.missing if not gap.optional] == ["faceid", "backbone", "vision"]


def test_without_router_one_person_works_and_several_are_told_what_is_missing(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", "uniportrait-faceid_sd15.bin", BACKBONE, VISION, "uniportrait-faceid_own.bin")
    assert "router" not in store.kit("sd15").files
    assert all(status.usable for status in store.kits())
    with pytest.raises(PortraitError, match=r"uniportrait-router_sd15\.bin.*portrait\.py download") as caught:
        store.kit("sd15").check_people(2)
    assert caught.value.status_code == 404
    with pytest.raises(PortraitError, match=r"Put into .*Portrait: uniportrait-router_own\.bin\."):
        store.kit("own").check_people(2)


def test_unknown_checkpoint_lists_those_there_are(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "uniportrait-faceid_anime.bin")
    with pytest.raises(PortraitError, match=r"uniportrait-faceid_other.*There: anime, sd15") as caught:
        store.kit("other")
    assert caught.value.status_code == 404


def test_automatic_without_the_published_one_is_the_first_by_name(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", "uniportrait-faceid_b.bin", BACKBONE, VISION)
    put(tmp_path / "models", "uniportrait-faceid_a.bin")
    assert store.names() == ["a", "b"]
    assert store.kit().name == "a"


SMALL = TextEncoder(96, 4, 4, 77)


def manifest(name: str = "mine", **entries: Any) -> Manifest:
    return Manifest(**{"name": name, "method": "uniportrait", "adapter": {"faceid": f"{name}.bin"}, **entries})


def test_the_hosts_face_parser_is_found_beside_its_restoration_networks(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "GFPGAN"
    store = Store(Folders([tmp_path / "Portrait"], {"parser": [folder]}), [FILES])
    assert store.published("parser") is None and not store.list("parser")
    put(folder, "GFPGANv1.4.pth", "detection_Resnet50_Final.pth", "parsing_parsenet.pth")
    assert store.published("parser") == folder / "parsing_parsenet.pth"
    assert [entry.name for entry in store.list("parser")] == ["parsing_parsenet.pth"]


def stored(path: Path, content: bytes) -> StoredFile:
    """Writes a file, and what a manifest says of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return StoredFile(path.name, hashlib.sha256(content).hexdigest(), len(content))


def test_automatic_is_never_an_adapter_of_another_text_encoder(store: Store, tmp_path: Path) -> None:
    world = tmp_path / "models" / "world"
    put(tmp_path / "models", BACKBONE, VISION, "world/world.bin")
    base = stored(tmp_path / "world.safetensors", b"a world")
    write_manifest(world / "kit.json", manifest("world", text_encoder=SMALL, base=base))
    with pytest.raises(PortraitError, match="uniportrait-faceid_sd15"):
        store.kit()
    assert store.kit("world").files["faceid"] == world / "world.bin"
    assert store.kit("world").home == world
    put(tmp_path / "models", "uniportrait-faceid_zoe.bin")
    assert store.kit().name == "zoe"
    assert store.automatic(text_encoder=SMALL) == store.automatic(tmp_path / "world.safetensors", SMALL) == "world"
    assert store.automatic(tmp_path / "world.safetensors") == "zoe"


def test_automatic_for_a_strange_text_encoder_is_an_adapter_that_tells_none(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED)
    assert store.automatic(text_encoder=SMALL) == "sd15"
    put(tmp_path / "Portrait", "uniportrait-faceid_tiny.bin")
    assert (store.automatic(text_encoder=SMALL), store.automatic()) == ("tiny", "sd15")


def test_automatic_is_the_adapter_of_the_very_checkpoint_where_several_fit(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "mine.bin", "other.bin")
    base = stored(tmp_path / "base.safetensors", b"one base")
    stored(tmp_path / "same-size.safetensors", b"two base")
    write_manifest(tmp_path / "Portrait" / "mine.kit.json", manifest(base=base))
    write_manifest(tmp_path / "Portrait" / "other.kit.json", manifest("other", base=StoredFile("base.safetensors")))
    (tmp_path / "base.safetensors").rename(tmp_path / "renamed.safetensors")
    assert store.automatic(tmp_path / "renamed.safetensors") == "mine"
    for other in ("same-size.safetensors", "gone.safetensors"):
        assert store.automatic(tmp_path / other) == "sd15"
    assert store.automatic() == "sd15"


@pytest.mark.parametrize("size_known", [True, False])
def test_an_adapter_finds_its_own_encoders_by_content(store: Store, tmp_path: Path, size_known: bool) -> None:
    """Several recognition networks lie around, one under the name that the manifest says, two of one size."""
    own, models = tmp_path / "Portrait", tmp_path / "models"
    put(own, *PUBLISHED, "mine.bin", "eyes_backbone.bin", "another_backbone.safetensors")
    wanted = stored(models / "renamed_backbone.safetensors", b"my eyes")
    vision = stored(tmp_path / "clip_vision" / "whatever.pth", b"my clip!")
    if not size_known:
        wanted, vision = (dataclasses.replace(file, size=None) for file in (wanted, vision))
    encoders = {"backbone": dataclasses.replace(wanted, name="eyes_backbone.bin"), "vision": vision}
    write_manifest(own / "mine.kit.json", manifest(encoders=encoders))
    kit = store.kit("mine")
    assert kit.files["faceid"] == own / "mine.bin" and "router" not in kit.files
    assert kit.files["backbone"] == models / "renamed_backbone.safetensors"
    assert kit.files["vision"] == tmp_path / "clip_vision" / "whatever.pth"
    assert kit.manifest == manifest(encoders=encoders)
    assert store.kit("sd15").files["backbone"].name == BACKBONE
    assert [status.usable for status in store.kits()] == [True, True]
    put(models, "uniportrait-router_mine.bin")
    assert store.kit("mine").files["router"] == models / "uniportrait-router_mine.bin"


def test_a_file_of_the_right_name_with_another_content_is_refused_in_words(store: Store, tmp_path: Path) -> None:
    own = tmp_path / "Portrait"
    put(own, *PUBLISHED, "mine.bin")
    wanted = stored(own / "eyes.safetensors", b"my own eyes")
    write_manifest(own / "mine.kit.json", manifest(encoders={"backbone": wanted}))
    assert store.kit("mine").files["backbone"] == own / "eyes.safetensors"
    for other in (b"no own eyes", b"others, and longer"):
        (own / "eyes.safetensors").write_bytes(other)
        with pytest.raises(PortraitError) as caught:
            store.kit("mine")
        assert caught.value.field == "checkpoint" and caught.value.status_code == 422
        assert "'mine' was trained with another eyes.safetensors than " in caught.value.problem
        assert f"of 11 bytes whose SHA-256 begins with {str(wanted.sha256)[:12]}" in caught.value.problem
        assert f"into {store.home}, under any name" in caught.value.remedy
    mine, _ = store.kits()
    assert not mine.usable and "another eyes.safetensors" in str(mine.problem)
    (own / "eyes.safetensors").unlink()
    with pytest.raises(PortraitError, match=r"Put into .*Portrait: eyes\.safetensors\."):
        store.kit("mine")


def test_an_adapter_of_an_earlier_folder_is_not_given_a_later_one_s_manifest(store: Store, tmp_path: Path) -> None:
    own, models = tmp_path / "Portrait", tmp_path / "models"
    put(own, BACKBONE, VISION, "uniportrait-faceid_mine.bin")
    put(models, "mine.bin")
    write_manifest(
        models / "mine.kit.json", manifest(encoders={"backbone": stored(models / "eyes.bin", b"my own eyes")})
    )
    kit = store.kit("mine")
    assert (kit.files["faceid"], kit.files["backbone"], kit.manifest) == (
        own / "uniportrait-faceid_mine.bin",
        own / BACKBONE,
        None,
    )
    (own / "uniportrait-faceid_mine.bin").unlink()
    assert store.kit("mine").files["backbone"] == models / "eyes.bin"


def test_a_list_of_adapters_reads_no_file_for_its_hash(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "Portrait"
    put(own, *PUBLISHED, "mine.bin")
    write_manifest(own / "mine.kit.json", manifest(encoders={"backbone": stored(own / "eyes.bin", b"my eyes")}))
    monkeypatch.setattr(store, "sha256", None)
    assert [status.usable for status in store.kits()] == [True, True]


def test_a_damaged_manifest_is_told_and_hides_no_other_adapter(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "uniportrait-faceid_mine.bin", "mine.kit.json", "world/kit.json")
    for name in ("mine", "world"):
        with pytest.raises(PortraitError, match=r"kit\.json: it is not JSON"):
            store.kit(name)
    assert [(status.name, status.usable) for status in store.kits()] == [
        ("mine", False),
        ("sd15", True),
        ("world", False),
    ]
    assert store.kit().name == "sd15"


def test_a_kit_of_another_method_is_no_checkpoint(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "fusion.bin")
    write_manifest(
        tmp_path / "Portrait" / "fused.kit.json", manifest("fused", method="fusion", adapter={"fusion": "fusion.bin"})
    )
    with pytest.raises(PortraitError, match=r"'fused' is a kit of fusion"):
        store.kit("fused")


def test_own_adapter_names_its_backbone_and_vision(store: Store, tmp_path: Path) -> None:
    own = tmp_path / "Portrait"
    put(own, *PUBLISHED, "tiny_backbone.safetensors")
    put(tmp_path / "clip_vision", "tiny.safetensors")
    metadata = {"backbone": "tiny_backbone.bin", "vision": "tiny.safetensors"}
    save_file({"a": torch.zeros(1)}, own / "uniportrait-faceid_tiny.safetensors", metadata)
    kit = store.kit("tiny")
    assert kit.files["backbone"].name == "tiny_backbone.safetensors"
    assert kit.files["vision"] == tmp_path / "clip_vision" / "tiny.safetensors"
    assert store.kit("sd15").files["backbone"].name == BACKBONE
    (own / "tiny_backbone.safetensors").unlink()
    with pytest.raises(PortraitError, match=r"Put into .*Portrait: tiny_backbone\.bin\."):
        store.kit("tiny")


def test_metadata_cannot_lead_out_of_the_folders(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED)
    put(tmp_path, "secret.safetensors")
    path = tmp_path / "Portrait" / "uniportrait-faceid_evil.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"backbone": "../secret.safetensors"})
    with pytest.raises(PortraitError, match="not a bare file name") as caught:
        store.kit("evil")
    assert caught.value.field == "uniportrait-faceid_evil.safetensors: backbone"
    evil, good = store.kits()
    assert evil.problem and not evil.usable and good.usable


def test_one_damaged_adapter_does_not_hide_the_others(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "uniportrait-faceid_broken.safetensors")
    broken, good = store.kits()
    assert "safetensors header" in str(broken.problem) and good.usable
    with pytest.raises(PortraitError, match="safetensors header"):
        store.kit("broken")


BAD_NAMES = ["../a", "a/b", "a\\b", "/etc/passwd", "C:a", "..", ".", ".hidden", "", "a\0b", "a\nb", "x" * 300]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_no_bare_names_are_refused(name: str, store: Store, tmp_path: Path) -> None:
    put(tmp_path, "a.bin", "uniportrait-faceid_a.bin")
    for ask in (store.kit, lambda n: store.find("backbone", n)):
        with pytest.raises(PortraitError, match="not a bare file name") as caught:
            ask(name)
        assert caught.value.status_code == 422


def test_links_inside_the_folders_are_followed_and_folders_are_no_files(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "big.bin")
    (tmp_path / "Portrait").mkdir()
    (tmp_path / "Portrait" / BACKBONE).symlink_to(tmp_path / "elsewhere" / "big.bin")
    (tmp_path / "Portrait" / "other.bin").mkdir()
    assert store.find("backbone", BACKBONE) == tmp_path / "Portrait" / BACKBONE
    with pytest.raises(PortraitError, match=r"other\.bin is not there") as caught:
        store.find("backbone", "other.bin")
    assert caught.value.status_code == 404 and str(tmp_path / "models") in caught.value.problem


def test_names_shared_by_several_models_count_only_in_our_own_folders(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "clip_vision", "model.safetensors", "open_clip_pytorch_model.bin")
    assert store.published("vision") is None
    put(tmp_path / "models" / "image_encoder", "model.safetensors")
    assert store.published("vision") == tmp_path / "models" / "image_encoder" / "model.safetensors"


def test_listing_by_role(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "Portrait", *PUBLISHED, "README.md", "uniportrait-faceid_x.txt", "uniportrait-faceid_.bin")
    put(tmp_path / "models", BACKBONE)
    put(tmp_path / "clip_vision", "clip_g.pth", "readme.txt")
    put(tmp_path / "buffalo_l", "det_10g.onnx", "w600k_r50.onnx")
    names = {
        role: [entry.name for entry in store.list(role)]
        for role in ("faceid", "router", "backbone", "vision", "detector")
    }
    assert names == {
        "faceid": ["uniportrait-faceid_sd15.bin"],
        "router": ["uniportrait-router_sd15.bin"],
        "backbone": [BACKBONE],
        "vision": [VISION, "clip_g.pth"],
        "detector": ["det_10g.onnx"],
    }
    assert store.list("backbone")[0].path == tmp_path / "Portrait" / BACKBONE
    assert store.published("detector") == tmp_path / "buffalo_l" / "det_10g.onnx"


def test_a_store_needs_a_folder_of_its_own() -> None:
    with pytest.raises(ValueError, match="folder of its own"):
        Store(Folders([]), [FILES])
