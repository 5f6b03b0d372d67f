"""Promises of `lib_portrait.conditioning`: requests become people, with the networks and files standing in small."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_portrait.attention import NEGATIVE, POSITIVE
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import Manifest, StoredFile, write_manifest
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import Backbone
from lib_portrait.faces.service import FaceService
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.request import Identity, Mix, Photo, PortraitRequest, Region
from tests.small_networks import small_kit, tiny_backbone

SIZE = (64, 48)


def picture(seed: int, size: tuple[int, int] = (224, 224)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def face(seed: int) -> Photo:
    return Photo.of(picture(seed), aligned=True)


def stored(path: Path) -> StoredFile:
    return StoredFile(path.name, file_sha256(path), path.stat().st_size)


def mask(size: tuple[int, int], fill: int = 255) -> Photo:
    stream = io.BytesIO()
    Image.new("L", size, fill).save(stream, "PNG")
    return Photo.of(stream.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit of small random files: the parity adapter with an ID embedding that fits small networks."""
    place = tmp_path_factory.mktemp("kit")
    small_kit(place, "alone", router=False)
    small_kit(place, "small")
    return place


@pytest.fixture
def conditioner(folder: Path, tmp_path: Path) -> Conditioner:
    return Conditioner(FaceService([], tmp_path), Store(Folders(own=[folder]), adapter_files(), tmp_path))


def ask(*identities: Identity, checkpoint: str = "small", **options: float) -> PortraitRequest:
    return PortraitRequest(identities=identities, checkpoint=checkpoint, options=options)


def tokens(conditioner: Conditioner, *identities: Identity, kind: int = POSITIVE) -> list[torch.Tensor]:
    return [person.tokens[kind] for person in conditioner.prepare(ask(*identities), SIZE).people]


def test_people_carry_what_was_asked_for(conditioner: Conditioner) -> None:
    weak = Identity((face(1),), start=0.1, end=0.8, options={"scale": 0.5})
    request = ask(weak, Identity((face(2),), options={"structure": 1.0}), scale=0.6)
    one, two = conditioner.prepare(request, SIZE).people
    assert (one.scale, one.start, one.end, one.region) == (0.3, 0.1, 0.8, None)
    assert two.scale == 0.6
    assert one.tokens[POSITIVE].shape == one.tokens[NEGATIVE].shape == (4, 48)
    assert not torch.equal(one.tokens[POSITIVE], two.tokens[POSITIVE])
    assert not torch.equal(one.tokens[NEGATIVE], two.tokens[NEGATIVE]), "another beta, other unconditional tokens"


def test_the_host_s_random_numbers_are_where_they_were(
    conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network made with random weights before its own are read draws some: the same request would give another
    picture the first time."""

    def reading(*arguments, **options):  # type: ignore[no-untyped-def]
        torch.rand(1)
        return read_tensors(*arguments, **options)

    monkeypatch.setattr("lib_portrait.checkpoints.store.read_tensors", reading)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    conditioner.prepare(ask(Identity((face(1),))), SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_face_networks_come_back_from_the_accelerator_also_after_an_error(
    conditioner: Conditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[str, list[str]] = {"Backbone": [], "VisionTower": []}
    move = torch.nn.Module.to

    def to(network, *where, **options):  # type: ignore[no-untyped-def]
        moved.get(type(network).__name__, []).append(str(where[0]))
        return move(network, *where, **options)

    def fail(self, crops):  # type: ignore[no-untyped-def]
        self._networks  # noqa: B018  they are where they are to run
        raise PortraitError("weights", "they broke in mid-request", "Fetch them again.", 500)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr("lib_portrait.faces.features.FaceEncoder.encode", fail)
    with pytest.raises(PortraitError, match="mid-request"):
        conditioner.prepare(ask(Identity((face(1),))), SIZE, device="cpu:0")
    assert moved == {"Backbone": ["cpu:0", "cpu"], "VisionTower": ["cpu:0", "cpu"]}


def test_unconditional_tokens_depend_on_beta_alone(conditioner: Conditioner) -> None:
    one, two = tokens(conditioner, Identity((face(1),)), Identity((face(2),)), kind=NEGATIVE)
    assert torch.equal(one, two)


def test_several_photos_are_one_identity_and_their_order_does_not_matter(conditioner: Conditioner) -> None:
    single, both, swapped = (
        tokens(conditioner, Identity(photos))[0] for photos in ((face(1),), (face(1), face(2)), (face(2), face(1)))
    )
    assert not torch.allclose(single, both, atol=1e-3)
    assert torch.allclose(both, swapped, atol=1e-4)


def test_mixing_interpolates_tokens(conditioner: Conditioner) -> None:
    (one,), (two,) = tokens(conditioner, Identity((face(1),))), tokens(conditioner, Identity((face(2),)))
    (mixed,) = tokens(conditioner, Identity((face(1),), mix=(Mix((face(2),), 0.25),)))
    assert torch.allclose(mixed, 0.75 * one + 0.25 * two, atol=1e-5)


def test_boxes_are_kept_exactly(conditioner: Conditioner) -> None:
    request = ask(Identity((face(1),), region=Region(box=(0.25, 0.0, 0.75, 0.1))))
    assert conditioner.prepare(request, SIZE).people[0].region == (0.25, 0.0, 0.75, 0.1)


@pytest.mark.parametrize("size", [SIZE, (640, 480), (32, 24), (65, 48)])
def test_masks_of_the_picture_s_shape_are_taken_at_any_size(conditioner: Conditioner, size: tuple[int, int]) -> None:
    region = conditioner.prepare(ask(Identity((face(1),), region=Region(mask=mask(size)))), SIZE).people[0].region
    assert isinstance(region, torch.Tensor)
    assert region.shape == (size[1], size[0])
    assert region.min() == 1


def test_overlapping_regions_are_told(conditioner: Conditioner) -> None:
    people = [
        Identity((face(seed),), region=Region(box=box)) for seed, box in ((1, (0, 0, 0.7, 1)), (2, (0.4, 0, 1, 1)))
    ]
    (notice,) = conditioner.prepare(ask(*people), SIZE).notices
    assert notice.field == "identities[1].region"
    assert notice.text.startswith("it overlaps that of identities[0] on 30% of the picture")


@pytest.mark.parametrize(
    ("photo", "problem"),
    [
        (mask((64, 64)), "shapes differ"),
        (mask(SIZE, 0), "is empty"),
        (mask(SIZE, 3), "too dark"),
        (Photo.of(b"no image"), "image"),
    ],
)
def test_unusable_masks_are_refused(conditioner: Conditioner, photo: Photo, problem: str) -> None:
    with pytest.raises(PortraitError, match=problem) as caught:
        conditioner.prepare(ask(Identity((face(1),), region=Region(mask=photo))), SIZE)
    assert caught.value.field == "identities[0].region.mask"


def test_the_photo_at_fault_is_named(conditioner: Conditioner) -> None:
    bad = Photo("ab" * 32)
    for request, field in [
        (ask(Identity((face(1), bad))), "identities[0].photos[1]"),
        (ask(Identity((face(1),)), Identity((face(2),), mix=(Mix((bad,)),))), "identities[1].mix[0].photos[0]"),
    ]:
        with pytest.raises(PortraitError, match="not kept") as caught:
            conditioner.prepare(request, SIZE)
        assert caught.value.field == field


def test_several_people_without_a_router_file_are_refused(conditioner: Conditioner) -> None:
    conditioner.prepare(ask(Identity((face(1),)), checkpoint="alone"), SIZE)
    with pytest.raises(PortraitError, match="uniportrait-router_alone"):
        conditioner.prepare(ask(Identity((face(1),)), Identity((face(2),)), checkpoint="alone"), SIZE)


def test_networks_that_do_not_belong_to_the_adapter_are_refused(
    conditioner: Conditioner, folder: Path, tmp_path: Path
) -> None:
    other: Backbone = tiny_backbone(width=24)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(dict(other.state_dict()), tmp_path / "small_backbone.safetensors")
    with pytest.raises(PortraitError, match="wants intrinsic features of width"):
        Conditioner(conditioner.faces, Store(Folders(own=[tmp_path]), adapter_files())).prepare(
            ask(Identity((face(1),))), SIZE
        )


def test_a_second_request_with_the_same_faces_loads_no_network(conditioner: Conditioner) -> None:
    request = ask(Identity((face(1), face(2))))
    first = conditioner.prepare(request, SIZE).people[0]
    conditioner._networks = None
    second = conditioner.prepare(request, SIZE).people[0]
    assert conditioner._networks is None
    assert torch.equal(first.tokens[POSITIVE], second.tokens[POSITIVE])


def test_a_scale_of_0_is_noticed(conditioner: Conditioner) -> None:
    def noticed(*identities: Identity, **changes) -> list[str]:
        return [str(notice) for notice in conditioner.prepare(ask(*identities, **changes), SIZE).notices]

    one, none = Identity((face(1),)), Identity((face(2),), options={"scale": 0.0})
    assert noticed(one, none) == ["identities[1].scale: it is 0: this person is not drawn."]
    assert noticed(one, none, scale=0.0) == ["scale: it is 0: nobody is drawn."]
    assert noticed(one, lora_scale=0.0) == ["lora_scale: it is 0: the adapter's LoRA is left out."]
    assert noticed(one) == []


def test_what_takes_long_is_told_before(conditioner: Conditioner) -> None:
    told: list[str] = []
    conditioner.prepare(ask(Identity((face(11),))), SIZE, report=told.append)
    assert told == ["finding faces", "loading the adapter", "loading the face networks"]
    conditioner.prepare(ask(Identity((face(12),))), SIZE, report=told.append)
    assert told[3:] == ["finding faces"], "the weights are kept"


def test_checking_finds_faults_and_loads_nothing(conditioner: Conditioner) -> None:
    assert conditioner.check(ask(Identity((face(1),)))).name == "small"
    assert conditioner._adapter is None
    with pytest.raises(PortraitError, match="no adapter|nosuch"):
        conditioner.check(ask(Identity((face(1),)), checkpoint="nosuch"))
    with pytest.raises(PortraitError, match="not kept"):
        conditioner.check(ask(Identity((Photo("ab" * 32),))))


def test_an_adapter_trained_with_another_recognition_network_finds_its_own(tmp_path: Path) -> None:
    """It lies in another folder and has another name; under the name that it had lies the one of another adapter."""
    own, models = tmp_path / "own", tmp_path / "models"
    own.mkdir()
    models.mkdir()
    small_kit(models, "small")
    small_kit(own, "mine", width=24)
    encoders = {role: stored(own / f"small_{role}.safetensors") for role in ("backbone", "vision")}
    adapter = {role: f"uniportrait-{role}_mine.safetensors" for role in ("faceid", "router")}
    write_manifest(own / "mine.kit.json", Manifest("mine", "uniportrait", adapter, encoders))
    (own / "small_backbone.safetensors").rename(models / "renamed.safetensors")
    conditioner = Conditioner(
        FaceService([], tmp_path / "cache"), Store(Folders([own, models]), adapter_files(), tmp_path / "cache")
    )
    for name, network, width in (("mine", "renamed", 24), ("small", "small_backbone", 16), ("mine", "renamed", 24)):
        made = conditioner.prepare(ask(Identity((face(1),)), Identity((face(2),)), checkpoint=name), SIZE)
        assert made.kit.files["backbone"] == models / f"{network}.safetensors"
        assert made.adapter.embedding.intrinsic_width == width
