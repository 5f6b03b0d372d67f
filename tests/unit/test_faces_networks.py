"""Both networks are built from the tensors of a file alone, in every layout people have; foreign files are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import IR_18, IR_34, IR_50, IR_101, Backbone, backbone_from_state_dict
from lib_portrait.faces.vision import VisionTower, vision_from_state_dict

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small_backbone(blocks=(1, 2, 1, 1), widths=(8, 8, 12, 16, 24)) -> Backbone:
    backbone = Backbone(blocks, widths, embedding=20).eval()
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return backbone


@pytest.mark.parametrize(
    ("blocks", "taps"),
    [(IR_18, (1, 3, 5, 7)), (IR_34, (2, 6, 12, 15)), (IR_50, (2, 6, 20, 23)), (IR_101, (2, 15, 45, 48))],
)
def test_the_depth_is_read_off_the_file(blocks, taps):
    with torch.device("meta"):
        tensors = Backbone(blocks).state_dict()
    backbone = backbone_from_state_dict({name: torch.zeros(()).expand(t.shape) for name, t in tensors.items()})
    assert backbone.taps == taps
    assert list(backbone.state_dict()) == list(tensors)


def test_the_taps_have_the_published_sizes():
    embedding, taps = Backbone(IR_18).eval()(torch.zeros(2, 3, 112, 112))
    assert embedding.shape == (2, 512)
    assert [tap.shape[1:] for tap in taps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


@pytest.mark.parametrize("widths", [(8, 8, 12, 16, 24), (4, 8, 16, 24, 32)])
def test_a_smaller_network_is_rebuilt_from_its_tensors(widths):
    original = small_backbone(widths=widths)
    rebuilt = backbone_from_state_dict(original.state_dict())
    face = torch.randn(2, 3, 112, 112)
    for one, other in zip(original(face)[1], rebuilt(face)[1], strict=True):
        torch.testing.assert_close(other, one)
    torch.testing.assert_close(rebuilt(face)[0], original(face)[0])
    assert not rebuilt.training
    assert not any(parameter.requires_grad for parameter in rebuilt.parameters())


@pytest.mark.parametrize("prefix", ["module.", "backbone.module."])
def test_prefixes_and_missing_step_counters_do_not_matter(prefix):
    original = small_backbone()
    tensors = {prefix + name: t for name, t in original.state_dict().items() if "num_batches" not in name}
    face = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(backbone_from_state_dict(tensors)(face)[0], original(face)[0])


def test_the_tensors_of_the_file_are_not_copied():
    tensors = small_backbone().half().state_dict()
    backbone = backbone_from_state_dict(tensors)
    assert backbone.input_layer[0].weight.data_ptr() == tensors["input_layer.0.weight"].data_ptr()
    assert backbone.input_layer[0].weight.dtype == torch.float16


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def replaced(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {}, "not an IR"),
        (lambda tensors: {"conv1.weight": torch.zeros(3)}, "not an IR"),
        (without("output_layer.3.weight"), "not an IR"),
        (without("body.2.res_layer.4.weight"), "body.2.res_layer.4.weight is missing"),
        (without("body.1.res_layer.1.weight"), "body.1.res_layer.1.weight is missing"),
        (without("body.3.shortcut_layer.0.weight"), "3 stages"),
        (replaced("body.0.res_layer.0.bias", torch.zeros(3)), r"shape \(3,\) instead of \(8,\)"),
        (replaced("body.0.res_layer.0.bias", torch.zeros(8, dtype=torch.int64)), "holds torch.int64"),
        (replaced("body.0.res_layer.0.bias", torch.full((8,), torch.nan)), "body.0.res_layer.0.bias holds infin"),
        (replaced("body.9999.res_layer.0.bias", torch.zeros(8)), "4"),
        (replaced("input_layer.0.weight", torch.zeros(0)), "input_layer.0.weight is missing or has another shape"),
        (replaced("output_layer.3.weight", torch.zeros(20, 0)), "output_layer.3.weight"),
        (replaced("output_layer.3.weight", torch.zeros(20)), "not an IR"),
        (replaced("body.0.res_layer.se_block.fc1.weight", torch.zeros(2, 8, 1, 1)), "SE or bottleneck"),
    ],
)
def test_files_of_other_networks_are_refused(change, message):
    with pytest.raises(PortraitError, match=f"^backbone.bin: .*{message}") as caught:
        backbone_from_state_dict(change(small_backbone().state_dict()), "backbone.bin")
    assert "README" in caught.value.remedy


def official(config: CLIPVisionConfig) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(config).eval()


def clip_config(**changes) -> CLIPVisionConfig:
    return CLIPVisionConfig(**{**SMALL, "image_size": 56, "patch_size": 14, "hidden_act": "gelu", **changes})


@torch.no_grad()
def hidden(model, pixels) -> torch.Tensor:
    """What the official pipeline reads: hidden_states[-2][:, 1:]."""
    return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


@pytest.mark.parametrize("prefix", ["", "image_encoder.", "clip_vision_model.", "cond_stage_model.model."])
def test_the_transformers_layout_gives_the_official_hidden_states(prefix):
    model = official(clip_config())
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert any(name.startswith(f"{prefix}vision_model.") for name in tensors)
    tower = vision_from_state_dict(tensors)
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(tower.penultimate(pixels), hidden(model, pixels), atol=1e-6, rtol=1e-5)
    assert (tower.width, tower.grid, tower.image_size) == (128, 4, 56)


@pytest.mark.parametrize("with_positions", [False, True])
def test_names_without_vision_model_and_position_numbers_are_read(with_positions):
    model = official(clip_config())
    tensors = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids")
    }
    if with_positions:
        tensors["embeddings.position_ids"] = torch.arange(17)[None]
    pixels = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(
        vision_from_state_dict(tensors).penultimate(pixels), hidden(model, pixels), atol=1e-6, rtol=1e-5
    )


def test_a_full_clip_file_gives_its_vision_tower():
    tensors = {**CLIPVisionModel(clip_config()).state_dict()}
    tensors = {name if name.startswith("vision_model.") else f"vision_model.{name}": t for name, t in tensors.items()}
    text = {
        "text_model.embeddings.position_embedding.weight": torch.zeros(77, 64),
        "text_model.encoder.layers.40.mlp.fc1.weight": torch.zeros(9, 9),
        "logit_scale": torch.zeros(()),
    }
    assert vision_from_state_dict({**text, **tensors}).width == 128


@pytest.mark.parametrize("quick", [False, True])
def test_the_open_clip_layout_gives_open_clips_own_hidden_states(quick):
    open_clip = pytest.importorskip("open_clip", reason="open-clip-torch is not installed")
    vision = {"image_size": 56, "layers": 4, "width": 128, "head_width": 64, "patch_size": 14}
    text = {"context_length": 7, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, quick_gelu=quick).eval()
    for name, parameter in model.visual.named_parameters():
        if parameter.ndim == 1:  # biases start at 0 and scales at 1, which would hide their being mixed up
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    tower = vision_from_state_dict(model.state_dict(), {"activation": "quick_gelu" if quick else "gelu"})
    seen = []
    last = model.visual.transformer.resblocks[-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        model.encode_image(pixels)
        found = tower.penultimate(pixels)
    # open_clip 2.20 has tokens before the batch, later releases have it the other way round.
    expected = seen[0] if seen[0].shape[0] == 2 else seen[0].transpose(0, 1)
    torch.testing.assert_close(found, expected[:, 1:], atol=2e-5, rtol=1e-4)
    bare = {name.removeprefix("visual."): t for name, t in model.state_dict().items() if name.startswith("visual.")}
    other = vision_from_state_dict(bare, {"activation": "quick_gelu" if quick else "gelu"})
    torch.testing.assert_close(other.penultimate(pixels), found)


@pytest.mark.parametrize(
    ("width", "heads", "activation"),
    [(1280, 16, "gelu"), (1664, 16, "gelu"), (1024, 16, "quick_gelu"), (768, 12, "quick_gelu"), (128, 2, "gelu")],
)
def test_heads_and_activation_follow_the_published_towers(width, heads, activation):
    config = clip_config(hidden_size=width, num_attention_heads=heads, intermediate_size=8, num_hidden_layers=2)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    tensors = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    chosen = vision_from_state_dict(tensors).model.config
    assert (chosen.num_attention_heads, chosen.hidden_act) == (heads, activation)


def test_a_files_metadata_decides_heads_and_activation():
    model = official(clip_config(num_attention_heads=8, hidden_act="quick_gelu"))
    pixels = torch.randn(1, 3, 56, 56)
    tower = vision_from_state_dict(model.state_dict(), {"heads": "8", "activation": "quick_gelu", "format": "pt"})
    torch.testing.assert_close(tower.penultimate(pixels), hidden(model, pixels), atol=1e-6, rtol=1e-5)
    plain = vision_from_state_dict(model.state_dict())
    assert not torch.allclose(plain.penultimate(pixels), hidden(model, pixels), atol=1e-3)


def test_pixels_of_another_size_are_resized():
    tower = vision_from_state_dict(official(clip_config()).state_dict())
    assert tower.penultimate(torch.randn(1, 3, 224, 224)).shape == (1, 16, 128)


def test_no_part_of_a_tower_stays_without_memory():
    tower = vision_from_state_dict(official(clip_config()).state_dict())
    assert isinstance(tower, VisionTower)
    assert not any(tensor.is_meta for tensor in [*tower.parameters(), *tower.buffers()])
    assert not tower.training
    tower.to(torch.float64)


def clip_tensors() -> dict[str, torch.Tensor]:
    state = CLIPVisionModel(clip_config()).state_dict()
    return {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda tensors: {}, {}, "not a CLIP vision tower"),
        (lambda tensors: {"unet.weight": torch.zeros(3)}, {}, "not a CLIP vision tower"),
        (without("pre_layrnorm.weight"), {}, "pre_layrnorm.weight is missing"),
        (without("encoder.layers.1.mlp.fc2.bias"), {}, "encoder.layers.1.mlp.fc2.bias is missing"),
        (replaced("embeddings.position_embedding.weight", torch.zeros(18, 128)), {}, "18 positions"),
        (replaced("embeddings.position_embedding.weight", torch.zeros(1, 128)), {}, "1 positions"),
        (replaced("embeddings.position_embedding.weight", torch.zeros(0, 128)), {}, "not a CLIP vision tower"),
        (replaced("embeddings.patch_embedding.weight", torch.zeros(128, 3, 14)), {}, "not a CLIP vision tower"),
        (replaced("embeddings.class_embedding", torch.zeros(64)), {}, r"shape \(64,\) instead of \(128,\)"),
        (replaced("embeddings.class_embedding", torch.full((128,), torch.inf)), {}, "class_embedding holds infin"),
        (replaced("encoder.layers.9999.mlp.fc1.weight", torch.zeros(1, 1)), {}, "10000 layers"),
        (dict, {"heads": "7"}, "7 heads"),
        (dict, {"heads": "many"}, "'many' heads"),
        (dict, {"heads": "0"}, "'0' heads"),
        (dict, {"activation": "exec"}, "activation exec"),
    ],
)
def test_files_that_hold_no_such_tower_are_refused(change, config, message):
    with pytest.raises(PortraitError, match=f"^clip.bin: .*{message}"):
        vision_from_state_dict(change(clip_tensors()), config, "clip.bin")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("visual.transformer.resblocks.0.ls_1.gamma", torch.zeros(8), "ls_1.gamma"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", torch.zeros(4, 2), r"shape \(4, 2\)"),
        ("visual.transformer.resblocks.0.attn.in_proj_bias", torch.zeros(()), r"shape \(\)"),
    ],
)
def test_open_clip_towers_of_other_kinds_are_refused(name, tensor, message):
    with pytest.raises(PortraitError, match=f"^vision: .*{message}"):
        vision_from_state_dict({"visual.class_embedding": torch.zeros(8), name: tensor})
