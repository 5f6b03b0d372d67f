"""Faces agree with the official code: recognition network, detection, alignment, what both networks see."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_portrait.faces.alignment import align_face
from lib_portrait.faces.detection import detect_faces, get_detector
from lib_portrait.faces.features import clip_view, pixels_of, recognition_view
from lib_portrait.faces.recognition import IR_18, IR_101, Backbone, backbone_from_state_dict
from tests.portraits import NAMES, portrait

pytestmark = pytest.mark.parity

DATA = Path(__file__).resolve().parents[1] / "data" / "parity"


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(DATA / "face_backbone.safetensors")


@pytest.fixture(scope="module")
def faces() -> dict[str, torch.Tensor]:
    return load_file(DATA / "alignment.safetensors")


def ruled(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weights that the official numbers were made with, a rule of the entry's name."""
    if not tensor.is_floating_point():
        return tensor
    r = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape), np.float32)
    if name.endswith("running_var"):
        r = 1 + 0.1 * np.abs(r)
    elif r.ndim >= 2:
        r = r / np.sqrt(r[0].size)
    elif name.endswith("weight"):
        r = 1 + 0.1 * r
    else:
        r = 0.1 * r
    return torch.from_numpy(r.astype(np.float32))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value where that is above 1."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize(("depth", "blocks"), [("IR_18", IR_18), ("IR_101", IR_101)])
def test_the_recognition_network_gives_the_official_embedding_and_taps(numbers, depth, blocks):
    """<= 1e-5 of the largest value: the ruled weights let the activations of IR-101 grow to 1e6."""
    state = Backbone(blocks).state_dict()
    backbone = backbone_from_state_dict({name: ruled(name, tensor) for name, tensor in state.items()})
    with torch.no_grad():
        embedding, taps = backbone(numbers["face"])
    differences = {"embedding": off(embedding, numbers[f"{depth}.embedding"])}
    for index, tap in enumerate(taps):
        differences[f"mid{index}.mean"] = off(tap.mean((2, 3)), numbers[f"{depth}.mid{index}.mean"])
        differences[f"mid{index}.corner"] = off(tap[:, :, :4, :4], numbers[f"{depth}.mid{index}.corner"])
    print(depth, {name: f"{value:.1e}" for name, value in differences.items()})
    assert max(differences.values()) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_detection_and_alignment_give_the_official_crop(faces, name):
    """Boxes and landmarks within a hundredth of a pixel; crops within 2 grey levels on 99 % of pixels."""
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    image = np.asarray(Image.open(portrait(name)).convert("RGB"))
    expected = {part: faces[f"{Path(name).stem}.{part}"].numpy() for part in ("box", "landmarks", "crop224")}
    (face,) = detect_faces(image, get_detector("mtcnn", []))
    assert np.abs(face.box - expected["box"]).max() <= 0.01
    assert np.abs(face.landmarks - expected["landmarks"]).max() <= 0.01
    levels = np.abs(align_face(image, face.landmarks).astype(int) - expected["crop224"]).max(-1)
    print(name, f"{100 * (levels <= 2).mean():.2f} % of pixels within 2 grey levels, at most {levels.max()}")
    assert (levels <= 2).mean() >= 0.99


@pytest.mark.parametrize("name", NAMES)
def test_both_networks_see_what_the_official_ones_see(faces, name):
    stem = Path(name).stem
    pixels = pixels_of([faces[f"{stem}.crop224"].numpy()])
    assert (recognition_view(pixels) - faces[f"{stem}.recognition112"]).abs().max() <= 1e-6
    assert (clip_view(pixels).mean((2, 3)) - faces[f"{stem}.clip_mean"]).abs().max() <= 1e-5
