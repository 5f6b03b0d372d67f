"""The encoder gives what the official pipeline computes, and loads its networks only when a face needs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import CLIP_MEAN, CLIP_STD, FaceEncoder
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.faces.vision import vision_from_state_dict

WIDTHS = (8, 8, 12, 16, 24)


@pytest.fixture(scope="module")
def official():
    """Small networks in the form the official pipeline holds them."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )
    return Backbone((1, 1, 1, 1), WIDTHS).eval(), CLIPVisionModelWithProjection(config).eval()


@pytest.fixture
def encoder(official):
    backbone, clip = official
    return FaceEncoder(
        lambda: (backbone_from_state_dict(backbone.state_dict()), vision_from_state_dict(clip.state_dict())), "hash"
    )


@pytest.fixture
def crops():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(2)]


@torch.no_grad()
def official_features(official, crops):
    """uniportrait_pipeline.py, get_single_faceid_embeds, line by line."""
    backbone, clip = official
    mean, std = torch.tensor(CLIP_MEAN).reshape(-1, 1, 1), torch.tensor(CLIP_STD).reshape(-1, 1, 1)
    clip_image = torch.stack([(torch.from_numpy(c).permute(2, 0, 1) / 255 - mean) / std for c in crops])
    clip_embeds = clip(clip_image, output_hidden_states=True).hidden_states[-2][:, 1:]
    image = clip_image * std + mean
    image = torch.clamp((image - 0.5) / 0.5, -1, 1)
    image = functional.interpolate(image, size=(112, 112), mode="bilinear", align_corners=False)
    taps = backbone(image)[1]
    intrinsic = taps[-1].flatten(2).permute(0, 2, 1)
    resized = [functional.interpolate(tap, size=(16, 16), mode="bilinear", align_corners=False) for tap in taps[:-1]]
    structure = torch.cat(resized, dim=1).flatten(2).permute(0, 2, 1)
    structure = torch.cat([structure, clip_embeds], dim=-1)
    zero_clip = clip(torch.zeros_like(clip_image[:1]), output_hidden_states=True).hidden_states[-2][:, 1:]
    zero = torch.cat([torch.zeros(1, 256, sum(WIDTHS[1:-1])), zero_clip], dim=-1)
    return intrinsic, structure, zero


def test_features_are_those_of_the_official_pipeline(official, encoder, crops):
    intrinsic, structure, _ = official_features(official, crops)
    found = encoder.encode(crops)
    assert [one.intrinsic.shape for one in found] == [(49, 24)] * 2
    assert [one.structure.shape for one in found] == [(256, 8 + 12 + 16 + 64)] * 2
    for one, own, its in zip(found, intrinsic, structure, strict=True):
        torch.testing.assert_close(one.intrinsic, own, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.structure, its, atol=1e-5, rtol=1e-4)


def test_the_features_of_no_face_are_zero_but_for_clips_answer_to_nothing(official, encoder, crops):
    _, _, expected = official_features(official, crops)
    zero = encoder.zero()
    (face,) = encoder.encode(crops[:1])
    assert (zero.intrinsic.shape, zero.structure.shape) == (face.intrinsic.shape, face.structure.shape)
    assert not zero.intrinsic.any()
    torch.testing.assert_close(zero.structure, expected[0], atol=1e-5, rtol=1e-4)


def test_the_structure_follows_the_grid_of_the_tower(official, crops):
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=96, patch_size=32
    )
    tower = CLIPVisionModelWithProjection(config).state_dict()
    encoder = FaceEncoder(lambda: (official[0], vision_from_state_dict(tower)), "hash")
    assert encoder.encode(crops)[0].structure.shape == (9, 8 + 12 + 16 + 64)
    assert encoder.zero().structure.shape == (9, 8 + 12 + 16 + 64)


def test_networks_are_loaded_once_and_only_when_needed(official):
    loads = []

    def networks():
        loads.append(1)
        return official[0], vision_from_state_dict(official[1].state_dict())

    encoder = FaceEncoder(networks, "hash")
    assert encoder.key == "hash-float32"
    assert encoder.encode([]) == []
    assert loads == []
    encoder.zero()
    encoder.encode([np.zeros((224, 224, 3), np.uint8)])
    assert loads == [1]


def test_half_precision_has_features_and_a_key_of_its_own(official, crops):
    backbone, clip = (network.state_dict() for network in official)
    encoder = FaceEncoder(
        lambda: (backbone_from_state_dict(backbone), vision_from_state_dict(clip)), "hash", dtype=torch.bfloat16
    )
    (face,) = encoder.encode(crops[:1])
    assert face.intrinsic.dtype == face.structure.dtype == torch.bfloat16
    assert encoder.key == "hash-bfloat16"


def test_features_made_in_inference_mode_can_be_trained_on(encoder, crops):
    with torch.inference_mode():
        (face,) = encoder.encode(crops[:1])
        zero = encoder.zero()
    assert not face.intrinsic.is_inference() and not zero.structure.is_inference()
    weight = torch.ones(24, requires_grad=True)
    (face.intrinsic * weight).sum().backward()


def test_features_that_are_no_numbers_are_noticed(official, crops):
    """Finite weights may be too large for what they are multiplied with."""
    tensors = {name: tensor.clone() for name, tensor in official[0].state_dict().items()}
    tensors["body.3.res_layer.1.weight"][0] = 3e38
    encoder = FaceEncoder(
        lambda: (backbone_from_state_dict(tensors), vision_from_state_dict(official[1].state_dict())), "hash"
    )
    with pytest.raises(PortraitError, match="infinite or undefined") as caught:
        encoder.encode(crops)
    assert caught.value.status_code == 500
