"""What of a reference is face: facexlib's parser by its own code's numbers, masks in place, and the landmarks' oval."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from lib_portrait.errors import PortraitError
from lib_portrait.faces import FaceService
from lib_portrait.faces.alignment import portrait, portrait_matrix, similarity, template
from lib_portrait.faces.parsing import FFHQ_512, ParseNet, masked_portrait, parser_from_state_dict
from lib_portrait.request import Photo
from tests.portraits import portrait as drawn


def random_parser(seed: int = 0) -> ParseNet:
    """With random weights and statistics, as a file has them."""
    torch.manual_seed(seed)
    network = ParseNet().eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return network


def facexlib():
    """facexlib's own file of the network, of the WebUI's environment, or skip."""
    webui = Path(os.environ.get("WEBUI_DIR") or Path.home() / "stable-diffusion-webui")
    file = next(webui.glob("venv/lib/python3*/site-packages/facexlib/parsing/parsenet.py"), None)
    if file is None:
        pytest.skip("no WebUI with facexlib is here")
    spec = importlib.util.spec_from_file_location("facexlib_parsenet", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_network_is_facexlibs_parameter_by_parameter():
    theirs = facexlib().ParseNet(in_size=512, out_size=512, parsing_ch=19).eval()
    tensors = dict(theirs.state_dict())
    for name, tensor in tensors.items():
        if name.endswith(("running_mean", "norm.bias")):
            tensor.normal_(0, 0.1)
    ours = parser_from_state_dict(tensors)
    left = {name for name in tensors if not name.startswith("out_img_conv")}
    assert set(ours.state_dict()) == left
    x = torch.rand(1, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        expected, got = theirs(x)[0], ours(x)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_files_of_other_networks_and_damaged_ones_are_refused():
    tensors = dict(random_parser().state_dict())
    with pytest.raises(PortraitError, match=r"^parsing_bisenet.pth: it is no ParseNet"):
        parser_from_state_dict({"cp.weight": torch.zeros(3)}, "parsing_bisenet.pth")
    with pytest.raises(PortraitError, match=r"encoder.1.conv1.norm.norm.weight is missing"):
        parser_from_state_dict({name: value for name, value in tensors.items() if "conv1.norm" not in name})
    with pytest.raises(PortraitError, match=r"out_mask_conv.conv2d.weight has the shape \(11"):
        parser_from_state_dict({**tensors, "out_mask_conv.conv2d.weight": torch.zeros(11, 64, 3, 3)})
    with pytest.raises(PortraitError, match="body.3.conv2.conv2d.weight holds infinities or NaN"):
        parser_from_state_dict({**tensors, "body.3.conv2.conv2d.weight": torch.full((256, 256, 3, 3), torch.nan)})


def test_which_classes_are_face():
    """The mask is made of skin, nose, glasses, eyes, brows and mouth: every class is tried."""
    names = (
        "background skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck "
        "cloth"
    )
    face = {"skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip"}
    network = ParseNet().eval()
    for number, name in enumerate(names.split()):
        network.forward = lambda x, number=number: torch.eye(19)[number].view(1, 19, 1, 1).expand(-1, -1, *x.shape[2:])
        assert network.face(np.zeros((16, 16, 3), np.uint8)).all() == (name in face)


class Marked(ParseNet):
    """Calls face what is green."""

    def forward(self, x):
        green = (x[:, 1] > 0).float()
        logits = torch.zeros(len(x), 19, *x.shape[2:])
        logits[:, 1], logits[:, 0] = green, 1 - green
        return logits


def scene(angle: float = 25.0, scale: float = 1.1) -> tuple[np.ndarray, np.ndarray]:
    """A picture with a green ellipse where a tilted face is, and the face's landmarks."""
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) * scale
    landmarks = ((template(112) - 56) @ rotation.T + np.array([210, 150])).astype(np.float32)
    image = np.zeros((300, 420, 3), np.uint8)
    middle = (np.array([56.0, 60.0]) - 56) @ rotation.T + np.array([210, 150])
    axes = (round(34 * scale), round(50 * scale))
    cv2.ellipse(image, tuple(round(float(v)) for v in middle), axes, angle, 0, 360, (0, 255, 0), -1)
    return image, landmarks


@pytest.mark.parametrize("size", [64, 512])
def test_the_mask_lies_on_the_square_where_the_parser_saw_the_face(size):
    image, landmarks = scene()
    found = masked_portrait(image, landmarks, size, Marked().eval())
    np.testing.assert_array_equal(found.picture, portrait(image, landmarks, size))
    assert found.mask.shape == (size, size) and found.mask.dtype == bool and found.parsed
    green = found.picture[:, :, 1] > 127
    assert (found.mask != green).mean() < 0.012
    assert 0.08 < green.mean() < 0.4


def test_what_the_parser_is_shown_is_aligned_as_it_was_trained():
    image, landmarks = scene()
    shown = []

    class Watching(Marked):
        def face(self, crop):
            shown.append(crop)
            return super().face(crop)

    masked_portrait(image, landmarks, 64, Watching().eval())
    (crop,) = shown
    matrix = similarity(landmarks, FFHQ_512)
    np.testing.assert_allclose(landmarks @ matrix[:, :2].T + matrix[:, 2], FFHQ_512, atol=12)
    expected = cv2.warpAffine(image, matrix, (512, 512), borderMode=cv2.BORDER_REPLICATE)
    np.testing.assert_array_equal(crop, expected)


def test_without_a_parser_the_mask_is_the_faces_oval_and_that_is_said():
    image, landmarks = scene(angle=0)
    found = masked_portrait(image, landmarks, 128, None)
    assert not found.parsed and "download facexlib" in found.how
    matrix = portrait_matrix(landmarks, 128)
    eyes_to_mouth = np.rint(landmarks @ matrix[:, :2].T + matrix[:, 2]).astype(int)
    assert all(found.mask[y, x] for x, y in eyes_to_mouth)
    assert not found.mask[:4].any() and not found.mask[:, :20].any()
    # Its axes are 46 and 58 of a template of 112, in a square of 1.75 templates.
    assert found.mask.mean() == pytest.approx(np.pi * 46 * 58 / (1.75 * 112) ** 2, rel=0.02)


def test_a_parser_that_sees_no_face_leaves_the_oval_and_that_is_said():
    image, landmarks = scene()
    found = masked_portrait(np.zeros_like(image), landmarks, 96, Marked().eval())
    np.testing.assert_array_equal(found.mask, masked_portrait(image, landmarks, 96, None).mask)
    assert not found.parsed and "saw no face" in found.how


def test_faces_beside_this_one_are_not_in_its_mask():
    """Of what the parser is shown the outermost parts are further from the face than a face reaches."""
    image, landmarks = scene(angle=0)
    image[:, 280:] = (0, 255, 0)
    found = masked_portrait(image, landmarks, 256, Marked().eval())
    matrix = portrait_matrix(landmarks, 256)
    x, y = np.rint(matrix[:, :2] @ (284, 152) + matrix[:, 2]).astype(int)
    assert found.parsed and found.picture[y, x, 1] == 255 and not found.mask[y, x:].any()


def test_the_service_says_how_it_masked_and_finds_weights_that_come_later(tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    file = tmp_path / "parsing_parsenet.pth"
    service = FaceService([], tmp_path / "cache", detector="mtcnn", parser=lambda: file if file.is_file() else None)
    photo = Photo.of(drawn().read_bytes())
    plain = service.reference(photo, "photo", 64)
    assert not plain.parsed and plain.mask.any() and plain.picture.shape == (64, 64, 3)
    assert service.reference(photo, "photo", 64) is plain
    assert service.reference(photo, "photo", 32) is not plain
    np.testing.assert_array_equal(plain.picture, service.portrait(photo, "photo", 64))
    network = random_parser()
    # Everything is skin.
    network.out_mask_conv.conv2d.bias.data[1] = 1e3
    torch.save(network.state_dict(), file)
    parsed = service.reference(photo, "photo", 64)
    assert parsed.parsed and parsed.mask.sum() > plain.mask.sum()
    file.write_bytes(b"no weights")
    with pytest.raises(PortraitError, match=r"^parsing_parsenet.pth"):
        service.reference(photo, "photo", 64)


def test_a_lying_photo_gives_the_upright_reference(tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    upright = Image.open(drawn()).convert("RGB").resize((400, 400))
    files = io.BytesIO(), io.BytesIO()
    upright.save(files[0], "PNG")
    upright.transpose(Image.Transpose.ROTATE_90).save(files[1], "PNG")
    service = FaceService([], tmp_path, detector="mtcnn")
    expected, found = (service.reference(Photo.of(one.getvalue()), "photo", 64) for one in files)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert np.abs(found.picture.astype(int) - expected.picture).max() <= 2


def test_the_oval_ends_where_a_portrait_is_greyed():
    """`face_only` leaves exactly the pixels inside of the oval as they are."""
    image, landmarks = scene()
    image[:] = np.random.default_rng(0).integers(0, 255, image.shape)
    mask = masked_portrait(image, landmarks, 96, None).mask
    whole, only = portrait(image, landmarks, 96), portrait(image, landmarks, 96, face_only=True)
    assert (only[mask] == whole[mask]).all()
