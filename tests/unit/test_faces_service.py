"""What a host asks about faces: found, chosen, cached, and refused with a reason."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_portrait.errors import PortraitError
from lib_portrait.faces import FaceService
from lib_portrait.faces import service as service_module
from lib_portrait.faces.alignment import portrait as square_about
from lib_portrait.faces.alignment import template
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.faces.features import FaceFeatures
from lib_portrait.request import Limits, Photo
from tests.portraits import portrait


def photo_of(width: int = 300, height: int = 200, shade: int = 100, **choice) -> Photo:
    """A picture that grows lighter from top to bottom, up to the given shade."""
    file = io.BytesIO()
    ramp = np.linspace(0, shade, height).astype(np.uint8)[:, None].repeat(width, 1)
    Image.fromarray(ramp).save(file, "PNG")
    return Photo.of(file.getvalue(), **choice)


def face_at(x: float, size: float) -> Face:
    return Face(np.array([x, 0, x + size, size], np.float32), template(112) * (size / 112) + np.float32([x, 0]), 0.9)


class Encoder:
    """Stands for the networks: counts what it is asked, and answers with features of the published size."""

    def __init__(self, key: str = "weights"):
        self.key = key
        self.asked = 0

    def encode(self, crops):
        self.asked += len(crops)
        return [FaceFeatures(torch.full((49, 512), float(crop.mean())), torch.randn(256, 1728)) for crop in crops]

    def zero(self):
        self.asked += 1
        return FaceFeatures(torch.zeros(49, 512), torch.randn(256, 1728))


@pytest.fixture
def faces():
    """What the detector will find; a test may change it."""
    return [face_at(10, 50), face_at(70, 80), face_at(200, 60)]


@pytest.fixture
def looked(faces, monkeypatch):
    """The pictures that the detector was shown."""
    seen: list[np.ndarray] = []

    def find(image):
        seen.append(image)
        return list(faces)

    monkeypatch.setattr(service_module, "get_detector", lambda name, folders: Detector(name or "stand-in", "1", find))
    return seen


@pytest.fixture
def service(tmp_path, looked):
    return FaceService([], tmp_path)


def test_importing_the_package_brings_in_nothing_heavy():
    code = (
        "import sys, lib_portrait.faces; "
        "print(sorted({'torch', 'cv2', 'numpy', 'PIL', 'transformers', 'facenet_pytorch'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_door_knows_only_its_own_names():
    import lib_portrait.faces

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lib_portrait.faces.nonsense  # noqa: B018


def test_all_faces_come_with_their_crops(service):
    found = service.find(photo_of(), "photo")
    assert [one.face.box[0] for one in found] == [10, 70, 200]
    assert all(one.crop.shape == (224, 224, 3) and one.crop.dtype == np.uint8 for one in found)


def test_the_largest_face_or_the_one_counted_from_the_left_is_chosen(service):
    crops = [one.crop for one in service.find(photo_of(), "photo")]
    assert len({crop.tobytes() for crop in crops}) == 3
    np.testing.assert_array_equal(service.crop(photo_of(), "photo"), crops[1])
    for index in range(3):
        np.testing.assert_array_equal(service.crop(photo_of(face=index), "photo"), crops[index])


def test_bystanders_are_counted_last_and_are_not_the_largest(service, faces, monkeypatch):
    """A large blurred face at the left, a small one, and two that the photo is of."""
    faces[:] = [face_at(5, 90), face_at(100, 20), face_at(130, 60), face_at(200, 80)]
    # All crops of this picture are alike, so which one is sharp is told by the order they are asked about.
    sharp = iter([0.01, 0.5, 0.5])
    monkeypatch.setattr(service_module.order, "sharpness", lambda crop: next(sharp))
    found = service.find(photo_of(), "photo")
    assert [one.face.box[0] for one in found] == [130, 200, 5, 100]
    assert [one.bystander for one in found] == [False, False, True, True]
    assert service.chosen(photo_of(), "photo") is found[1]
    assert service.chosen(photo_of(face=2), "photo") is found[2]
    assert [notice.text for notice in service.notices(photo_of(face=2), "photo")] == [service_module.order.BLURRED]
    said = [notice.text for notice in service.notices(photo_of(face=3), "photo")]
    assert said == [service_module.order.SMALL, "this face is only 20 pixels wide, likeness will be weak"]
    assert service.notices(photo_of(face=1), "photo") == []


def test_where_everybody_is_a_bystander_the_largest_of_them_is_chosen(service, monkeypatch):
    monkeypatch.setattr(
        service_module.order, "counted", lambda faces, crops, size: [(index, "why") for index in range(len(faces))]
    )
    assert service.chosen(photo_of(), "photo").face.box[0] == 70


def test_the_first_frame_of_an_animation_is_used_and_that_is_said(service):
    file = io.BytesIO()
    frames = [Image.new("RGB", (300, 200), (shade, 0, 0)) for shade in (10, 200)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for photo in (Photo.of(file.getvalue()), Photo.of(file.getvalue(), face=2)):
        (notice,) = service.notices(photo, "identities[0].photos[0]")
        assert str(notice) == "identities[0].photos[0]: only the first frame of the animation is used."


def test_a_lying_photo_gives_the_upright_crop_says_so_and_places_its_face_where_it_lies(tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    upright = Image.open(portrait()).convert("RGB").resize((400, 400))
    file, lying = io.BytesIO(), io.BytesIO()
    upright.save(file, "PNG")
    upright.transpose(Image.Transpose.ROTATE_90).save(lying, "PNG")
    service = FaceService([], tmp_path, detector="mtcnn")
    (expected,), (found,) = (service.find(Photo.of(one.getvalue()), "photo") for one in (file, lying))
    np.testing.assert_array_equal(found.crop, expected.crop)
    assert (found.turn, expected.turn) == (90, 0)
    assert found.notices == ("the photo was turned by 90° to the right",) and expected.notices == ()
    left, top, right, bottom = expected.face.box
    np.testing.assert_allclose(found.face.box, [top, 399 - right, bottom, 399 - left], atol=1e-3)
    x, y = expected.face.landmarks.T
    np.testing.assert_allclose(found.face.landmarks, np.stack([y, 399 - x], axis=1), atol=1e-3)


def test_crops_are_filtered_where_that_was_asked_for_and_kept_apart(tmp_path, looked, faces):
    faces[:] = [Face(np.array([0, 0, 900, 900], np.float32), template(900), 0.99)]
    file = io.BytesIO()
    Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (900, 450))).save(file, "PNG")
    photo, encoder = Photo.of(file.getvalue()), Encoder()
    plain, filtered = FaceService([], tmp_path), FaceService([], tmp_path, filter_crops=True)
    assert plain.crop(photo, "photo").std() > 2 * filtered.crop(photo, "photo").std()
    for service in (plain, filtered, plain, filtered):
        service.features(photo, "photo", encoder)
    assert encoder.asked == 2


def test_features_found_by_older_rules_are_not_used_again(service, monkeypatch):
    encoder = Encoder()
    service.features(photo_of(), "photo", encoder)
    monkeypatch.setattr(service_module, "RULES", "rules of another release")
    service.features(photo_of(), "photo", encoder)
    assert encoder.asked == 2


def test_one_photo_can_give_several_people(service):
    encoder = Encoder()
    several = [service.features(photo_of(face=index), "photo", encoder) for index in range(3)]
    assert encoder.asked == 3
    assert not torch.equal(several[0].structure, several[1].structure)


def test_an_index_beyond_the_faces_says_how_many_there_are(service, faces):
    with pytest.raises(
        PortraitError, match=r"^identities\[0\]\.photos\[1\]\.face: face 3 .*but 3 were found.*0 to 2"
    ) as e:
        service.crop(photo_of(face=3), "identities[0].photos[1]")
    assert e.value.field == "identities[0].photos[1].face"
    del faces[1:]
    with pytest.raises(PortraitError, match="but 1 was found"):
        service.crop(photo_of(face=1, shade=5), "photo")


def test_a_photo_without_a_face_is_refused_with_a_remedy(service, faces, looked):
    faces.clear()
    for _ in range(2):
        with pytest.raises(
            PortraitError, match="^photos: no face was found. It was turned all four ways. Use .*aligned"
        ):
            service.features(photo_of(), "photos", Encoder())
    # In four orientations, with and without a border.
    assert len(looked) == 2 * 8


def test_a_detector_that_fails_is_an_error_that_names_it(service, monkeypatch):
    def fails(image):
        raise RuntimeError("expected a non-empty list of tensors")

    monkeypatch.setattr(service_module, "get_detector", lambda *_: Detector("frail", "1", fails))
    with pytest.raises(PortraitError, match="^photo: the face detector frail failed.*non-empty list") as caught:
        service.find(photo_of(), "photo")
    assert caught.value.status_code == 500


def test_an_aligned_photo_is_used_as_it_is(service, looked):
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(service.crop(Photo.of(file.getvalue(), face=7, aligned=True), "photo"), pixels)
    assert service.crop(photo_of(64, 64, aligned=True), "photo").shape == (224, 224, 3)
    assert looked == []


def test_the_square_about_a_face_is_the_same_however_the_photo_lies(tmp_path, monkeypatch):
    """Found in the photo turned upright, cut out of that; an aligned photo is its own face."""
    rng = np.random.default_rng(0)
    upright = np.kron(rng.integers(0, 256, (10, 12, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    face = face_at(30, 60)
    squares = []
    for turn in range(4):
        file = io.BytesIO()
        Image.fromarray(np.rot90(upright, turn)).save(file, "PNG")
        found = lambda image, detector, turn=turn: (turn, [face])  # noqa: E731
        monkeypatch.setattr(service_module, "detect_in_photo", found)
        monkeypatch.setattr(service_module, "get_detector", lambda *_: Detector("stand-in", "1", lambda image: []))
        service = FaceService([], tmp_path / str(turn))
        squares.append(service.portrait(Photo.of(file.getvalue()), "photo", 48))
        whole, alone = (service.portrait(Photo.of(file.getvalue()), "photo", 48, only) for only in (False, True))
        np.testing.assert_array_equal(whole, squares[0])
        assert alone[0, 0].tolist() == [128, 128, 128]
    np.testing.assert_array_equal(squares[0], square_about(upright, face.landmarks, 48))
    aligned = service.portrait(photo_of(224, 224, aligned=True), "photo", 48)
    np.testing.assert_array_equal(
        aligned, square_about(service.crop(photo_of(224, 224, aligned=True), "photo"), template(), 48)
    )


def test_an_aligned_photo_needs_no_detector(service, monkeypatch):
    def none(*_):
        raise PortraitError("detector", "no face detector is installed", "Install one.")

    monkeypatch.setattr(service_module, "get_detector", none)
    assert service.features(photo_of(64, 64, aligned=True), "photo", Encoder()).intrinsic.shape == (49, 512)


def test_an_oblong_photo_is_not_an_aligned_one(service):
    with pytest.raises(PortraitError, match="^photo: it is 300x200 pixels, but an aligned crop is square"):
        service.crop(photo_of(aligned=True), "photo")


def test_damaged_photos_and_limits_are_reported_with_the_field(tmp_path, looked):
    service = FaceService([], tmp_path, Limits(photo_pixels=1000, photo_bytes=2000))
    with pytest.raises(PortraitError, match=r"^a\[0\]: .*not an image"):
        service.find(Photo.of(b"nonsense"), "a[0]")
    with pytest.raises(PortraitError, match=r"^a\[1\]: .*million pixels"):
        service.find(photo_of(), "a[1]")
    big = Photo.of(bytes(2001))
    with pytest.raises(PortraitError, match=r"^a\[2\]: the file is larger"):
        service.find(big, "a[2]")
    assert service.photos.get(big.sha256) is None


def test_a_photo_can_be_named_by_its_hash_once_it_was_sent(service, looked):
    photo = photo_of()
    reference = Photo(photo.sha256)
    with pytest.raises(PortraitError, match=f"^photo: the photo sha256:{photo.sha256[:12]}... is not kept"):
        service.find(reference, "photo")
    service.find(photo, "photo")
    assert len(service.find(reference, "photo")) == 3
    assert len(FaceService([], service.photos._folder._path.parent).find(reference, "photo")) == 3


def test_the_first_digits_of_a_hash_name_a_photo_where_they_name_one_alone(service, looked):
    photo = photo_of()
    reference = Photo(photo.sha256[:12])
    with pytest.raises(PortraitError, match=f"^photo: the photo sha256:{photo.sha256[:12]}... is not kept"):
        service.find(reference, "photo")
    assert service.named(reference, "photo") == reference
    service.find(photo, "photo")
    assert len(service.find(reference, "photo")) == 3
    assert service.named(reference, "photo") == Photo(photo.sha256)
    features = service.features(photo, "photo", Encoder())
    assert torch.equal(service.features(reference, "photo", Encoder()).intrinsic, features.intrinsic)
    service.photos._folder.write(photo.sha256[:12] + 52 * "0", b"another")
    with pytest.raises(PortraitError, match="^photo: sha256:.* begins the hashes of 2 photos kept here. Give more"):
        service.find(reference, "photo")
    assert len(service.find(Photo(photo.sha256), "photo")) == 3


def test_a_photo_whose_features_are_cached_is_still_kept(service):
    photo, encoder = photo_of(), Encoder()
    service.features(photo, "photo", encoder)
    service.photos.clear()
    service.features(photo, "photo", encoder)
    assert service.photos.get(photo.sha256) == photo.data


def test_the_detector_looks_once_at_each_photo(service, looked):
    for _ in range(2):
        service.find(photo_of(), "photo")
        service.crop(photo_of(face=2), "photo")
        service.features(photo_of(face=0), "photo", Encoder())
    assert len(looked) == 1


def test_features_are_told_apart_by_all_that_decides_them(service, tmp_path):
    encoder = Encoder()
    square = photo_of(120, 120)
    for photo in (square, photo_of(120, 120, face=0), photo_of(120, 120, aligned=True), photo_of(120, 120, shade=7)):
        service.features(photo, "photo", encoder)
    assert encoder.asked == 4
    other = Encoder("other weights")
    service.features(square, "photo", other)
    assert other.asked == 1
    FaceService([], tmp_path, detector="another").features(square, "photo", encoder)
    assert encoder.asked == 5


@pytest.mark.parametrize("memory", [True, False])
def test_the_second_request_spends_less_than_ten_milliseconds(tmp_path, looked, memory):
    """A photo of several megabytes, features of the published size, from memory and from disk alone."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    photo, encoder = Photo.of(file.getvalue()), Encoder()
    service = FaceService([], tmp_path)
    first = service.features(photo, "photo", encoder)
    zero = service.zero(encoder)
    asked = encoder.asked
    spent = []
    for _ in range(5):
        if not memory:
            service = FaceService([], tmp_path)
        start = time.perf_counter()
        again = service.features(photo, "photo", encoder)
        spent.append(time.perf_counter() - start)
        assert torch.equal(again.structure, first.structure)
        assert torch.equal(service.zero(encoder).structure, zero.structure)
    print(f"{'memory' if memory else 'disk'}: {1000 * min(spent):.2f} to {1000 * max(spent):.2f} ms")
    assert encoder.asked == asked
    assert sorted(spent)[2] < 0.010


def test_dropping_forgets_everything(service, tmp_path, looked):
    encoder = Encoder()
    service.features(photo_of(), "photo", encoder)
    assert [file for file in tmp_path.rglob("*") if file.is_file()]
    service.drop()
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    with pytest.raises(PortraitError, match="not kept"):
        service.find(Photo(photo_of().sha256), "photo")
    service.features(photo_of(), "photo", encoder)
    assert encoder.asked == 2
    assert len(looked) == 2


def test_masks_are_read_from_photos_and_from_hashes(service):
    photo = photo_of(40, 20, shade=255)
    assert service.mask(photo, "mask").shape == (20, 40)
    assert service.mask(Photo(photo.sha256), "mask").shape == (20, 40)
    with pytest.raises(PortraitError, match="^mask: the mask is empty"):
        service.mask(photo_of(shade=0), "mask")


def test_a_real_portrait_goes_all_the_way_with_nothing_downloaded(tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    service = FaceService([], tmp_path, detector="mtcnn")
    photo = Photo.of(portrait().read_bytes())
    encoder = Encoder()
    service.features(photo, "photo", encoder)
    start = time.perf_counter()
    service.features(photo, "photo", encoder)
    assert time.perf_counter() - start < 0.010
    assert service.detector.name == "mtcnn"


def test_a_photo_turned_by_exif_gives_the_same_crop(tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    upright = Image.open(portrait()).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif.tobytes())
    service = FaceService([], tmp_path, detector="mtcnn")
    turned = service.crop(Photo.of(file.getvalue()), "photo")
    np.testing.assert_array_equal(turned, service.crop(Photo.of(portrait().read_bytes()), "photo"))
