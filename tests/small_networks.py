"""Small random networks, in the layouts of the published files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lib_portrait.checkpoints.text_encoder import SD1_TEXT
from lib_portrait.faces.recognition import Backbone
from lib_portrait.methods.uniportrait import IDEmbedding
from tests.parity.unets import diffusers_unet, flatten, load_bin

if TYPE_CHECKING:
    from lib_portrait.standalone.model import Model


TEXT_SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}


def tiny_backbone(width: int = 16) -> Backbone:
    """An IR network of four blocks whose last tap has `width` channels."""
    torch.manual_seed(1)
    return Backbone((1, 1, 1, 1), (8, 8, 10, 12, width), embedding=16).eval()


def tiny_vision(width: int = 64) -> dict[str, torch.Tensor]:
    """The tensors of a two-layer CLIP vision tower, patch 56, in transformers' layout."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=1, patch_size=56
    )
    tensors = CLIPVisionModel(config).state_dict()
    return {key if key.startswith("vision_model.") else f"vision_model.{key}": value for key, value in tensors.items()}


def small_kit(folder: Path, name: str, router: bool = True, width: int = 16) -> None:
    """The files of an adapter `name` for the parity UNet: the parity adapter, an ID embedding for small networks, and
    these networks, `small_backbone` and `small_vision`. width: see `tiny_backbone`."""
    backbone, vision = tiny_backbone(width), tiny_vision()
    *_, last = backbone.widths
    structure = sum(backbone.widths[1:-1]) + vision["vision_model.embeddings.class_embedding"].shape[0]
    torch.manual_seed(0)
    embedding = IDEmbedding(last, structure, 4, 48, 48, depth=2)
    faceid = flatten(load_bin("uniportrait-faceid_small.bin"))
    faceid = {key: value for key, value in faceid.items() if not key.startswith("faceid_proj.")}
    faceid |= {f"faceid_proj.{key}": value for key, value in embedding.state_dict().items()}
    names = {"backbone": "small_backbone.safetensors", "vision": "small_vision.safetensors"}
    save_file(faceid, folder / f"uniportrait-faceid_{name}.safetensors", names)
    if router:
        save_file(flatten(load_bin("uniportrait-router_small.bin")), folder / f"uniportrait-router_{name}.safetensors")
    save_file(dict(backbone.state_dict()), folder / names["backbone"])
    save_file(vision, folder / names["vision"])


def small_manifest(folder: Path, name: str) -> None:
    """The manifest of the kit in `folder`, with all that a manifest can have."""
    from lib_portrait.checkpoints.hashes import file_sha256
    from lib_portrait.checkpoints.kit import Manifest, Sampling, StoredFile, TextEncoder, write_manifest

    def stored(name: str) -> StoredFile:
        return StoredFile(name, file_sha256(folder / name), (folder / name).stat().st_size)

    manifest = Manifest(
        name=name,
        method="uniportrait",
        adapter={role: f"uniportrait-{role}_{name}.safetensors" for role in ("faceid", "router")},
        encoders={role: stored(f"small_{role}.safetensors") for role in ("backbone", "vision")},
        detector=StoredFile("world-detector.safetensors"),
        attributes=StoredFile("world-attributes.safetensors"),
        measuring=stored("world-measuring.safetensors"),
        base=stored("world.safetensors"),
        text_encoder=TextEncoder(48, 2, 3, 77),
        picture=(64, 64),
        sampling=Sampling("DDIM", 20, 5),
    )
    write_manifest(folder / "kit.json", manifest)


def small_model() -> Model:
    """The parity UNet with a small VAE and a text encoder of that one's context width."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    from lib_portrait.standalone.model import make_model

    torch.manual_seed(3)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.5,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**{**SD1_TEXT, **TEXT_SIZES}))
    for parameter in (*vae.parameters(), *text_encoder.parameters()):
        # What a new network starts with (ones, zeros, little noise) would hide weights that are in the wrong place.
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return make_model(diffusers_unet(), vae.eval(), text_encoder.eval())
