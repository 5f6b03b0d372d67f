"""Kits of several methods beside each other: a store knows of a method what the method declares, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_portrait.checkpoints import AdapterFile, AdapterFiles, Folders, KnownWeight, Store
from lib_portrait.checkpoints.kit import Manifest, Sampling, StoredFile, write_manifest
from lib_portrait.errors import PortraitError

EYES = KnownWeight("eyes", "eyes.bin", "https://example.org/eyes.bin", None, None, "free", "eyes", "two")
# Two files, the second for three people and more, and one network of faces.
TWO = AdapterFiles(
    "two",
    "Two",
    (AdapterFile("near", "two-near_{name}", "near"), AdapterFile("far", "{name}.far", "far", people=3)),
    ("eyes",),
    (EYES,),
    Manifest("published", "two", {"near": "two-near_published.bin", "far": "published.far.bin"}),
)
# One file, no network, nothing published.
ONE = AdapterFiles("one", "One", (AdapterFile("one", "one_{name}", "all of it"),))
# One file and a network that nobody publishes.
BLIND = AdapterFiles("blind", "Blind", (AdapterFile("blind", "blind_{name}", "all of it"),), ("eyes",))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Folders([tmp_path / "own", tmp_path / "later"]), [TWO, ONE, BLIND])


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"weights")


def stored(path: Path, content: bytes) -> StoredFile:
    path.write_bytes(content)
    return StoredFile(path.name, hashlib.sha256(content).hexdigest(), len(content))


def test_files_are_found_by_the_names_that_their_method_declares(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "two-near_a.bin", "eyes.bin", "one_b.safetensors", "blind_c.bin")
    put(tmp_path / "later", "a.far.bin", "one_b.bin")
    kit = store.kit("a")
    assert (kit.method, kit.name, kit.manifest, kit.home) == ("two", "a", None, None)
    assert kit.files == {
        "near": tmp_path / "own" / "two-near_a.bin",
        "far": tmp_path / "later" / "a.far.bin",
        "eyes": tmp_path / "own" / "eyes.bin",
    }
    assert store.kit("b").files == {"one": tmp_path / "own" / "one_b.safetensors"} and store.kit("b").method == "one"
    assert [entry.name for entry in store.list("far")] == ["a.far.bin"]
    assert store.names() == ["a", "b", "c"] and store.names("one") == ["b"]


def test_what_only_several_people_need_is_asked_for_from_as_many_on(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "two-near_a.safetensors", "eyes.bin")
    save_file({"x": torch.zeros(1)}, tmp_path / "own" / "two-near_a.safetensors")
    kit = store.kit("a", "two")
    kit.check_people(2)
    with pytest.raises(PortraitError, match=r"identities: several people need a\.far\.safetensors\.") as caught:
        kit.check_people(3)
    assert caught.value.status_code == 404
    status = next(status for status in store.kits("two") if status.name == "a")
    assert status.usable and [gap.role for gap in status.missing] == ["far"]


def test_automatic_is_an_adapter_of_the_asked_method(store: Store, tmp_path: Path) -> None:
    assert store.automatic() == store.automatic(method="two") == "published"
    with pytest.raises(PortraitError, match=r"no adapter of One for this checkpoint.*Put one into .*own: one_NAME\."):
        store.kit(method="one")
    put(tmp_path / "later", "two-near_a.bin", "one_b.bin")
    assert store.automatic() == "a" and store.automatic(method="one") == "b"
    with pytest.raises(PortraitError, match="'three' is not known.*two, one, blind"):
        store.automatic(method="three")


def test_two_methods_may_have_adapters_of_one_name(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "two-near_a.bin", "eyes.bin", "one_a.bin", "one_b.bin")
    assert store.kit("a").method == store.kit("a", "two").method == "two"
    assert store.kit("a", "one").files == {"one": tmp_path / "own" / "one_a.bin"}
    with pytest.raises(PortraitError, match="'b' is a kit of one.*or its method"):
        store.kit("b", "two")


def test_a_manifest_counts_for_its_method_alone(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "two-near_a.bin", "eyes.bin", "weights.bin")
    write_manifest(tmp_path / "own" / "a.kit.json", Manifest("a", "one", {"one": "weights.bin"}))
    assert store.kit("a", "one").files == {"one": tmp_path / "own" / "weights.bin"}
    assert store.kit("a", "one").home == tmp_path / "own"
    assert store.kit("a", "two").manifest is None


def test_a_network_that_nobody_publishes_must_be_named(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "blind_a.bin", "mine.bin")
    with pytest.raises(PortraitError, match=r"'a' does not tell its eyes\. Put its manifest beside it, a\.kit\.json\."):
        store.kit("a")
    manifest = Manifest("a", "blind", {"blind": "blind_a.bin"})
    write_manifest(tmp_path / "own" / "a.kit.json", manifest)
    with pytest.raises(PortraitError, match="the manifest of 'a' names no eyes"):
        store.kit("a")
    eyes = stored(tmp_path / "own" / "mine.bin", b"my eyes")
    write_manifest(tmp_path / "own" / "a.kit.json", Manifest("a", "blind", manifest.adapter, {"eyes": eyes}))
    (tmp_path / "own" / "mine.bin").rename(tmp_path / "own" / "renamed.bin")
    assert store.kit("a").files["eyes"] == tmp_path / "own" / "renamed.bin"
    with pytest.raises(PortraitError, match=r"'b' is not complete, missing: blind_b\.safetensors;"):
        store.kit("b", "blind")


def test_a_kit_of_a_method_that_is_not_known_is_told_and_used_by_nobody(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "x.bin")
    write_manifest(tmp_path / "own" / "x.kit.json", Manifest("x", "three", {"x": "x.bin"}))
    [status] = [status for status in store.kits() if status.name == "x"]
    assert not status.usable and "a kit of three, which is not known here" in str(status.problem)
    assert "x" not in store.names()
    for method in (None, "one"):
        with pytest.raises(PortraitError, match="'x' is a kit of three"):
            store.kit("x", method)


def test_a_damaged_manifest_is_told_once(store: Store, tmp_path: Path) -> None:
    put(tmp_path / "own", "a.kit.json", "one_a.bin")
    assert [status.name for status in store.kits() if status.problem] == ["a"]
    for method in ("one", "two"):
        with pytest.raises(PortraitError, match=r"a\.kit\.json: it is not JSON"):
            store.kit("a", method)


def test_kits_that_bring_their_checkpoint_come_in_the_order_of_the_folders(store: Store, tmp_path: Path) -> None:
    for folder in ("later/b", "own/z"):
        put(tmp_path / folder, "one_x.bin", "base.bin")
        name = Path(folder).name
        kit = Manifest(name, "one", {"one": "one_x.bin"}, base=StoredFile("base.bin"))
        write_manifest(tmp_path / folder / "kit.json", kit)
    write_manifest(tmp_path / "own" / "a.kit.json", Manifest("a", "one", {"one": "x"}, base=StoredFile("gone.bin")))
    assert [(kit.name, base.parent.name) for kit, base in store.bundled()] == [("z", "z"), ("b", "b")]


def test_the_kit_of_a_checkpoint_is_known_by_content_and_rather_one_with_settings(store: Store, tmp_path: Path) -> None:
    own = tmp_path / "own"
    put(own, "one_a.bin")
    base = stored(tmp_path / "base.safetensors", b"a base")
    other = stored(tmp_path / "other.safetensors", b"b base")
    write_manifest(own / "a.kit.json", Manifest("a", "one", {"one": "one_a.bin"}, base=base))
    found = store.trained_on(tmp_path / "base.safetensors")
    assert found is not None and found.name == "a"
    z = Manifest("z", "two", {"near": "x"}, base=base, sampling=Sampling("DDIM", 20, 5))
    write_manifest(own / "z.kit.json", z)
    assert store.trained_on(tmp_path / "base.safetensors") == z
    assert store.trained_on(tmp_path / other.name) is None is store.trained_on(tmp_path / "gone")


def test_a_file_of_a_kit_is_beside_it_or_found_by_content(store: Store, tmp_path: Path) -> None:
    own, later = tmp_path / "own", tmp_path / "later"
    put(own)
    put(later, "measuring.bin")
    file = stored(own / "measuring.bin", b"measures")
    assert store.locate(file, own) == own / "measuring.bin"
    (own / "measuring.bin").rename(own / "renamed.safetensors")
    assert store.locate(file, tmp_path / "elsewhere") == own / "renamed.safetensors"
    (own / "renamed.safetensors").unlink()
    assert store.locate(file, own) is None


def test_a_store_needs_a_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one method"):
        Store(Folders([tmp_path]), [])
