"""The small UNet of the parity cases in diffusers' layout and, with the same weights, as ldm's own `UNetModel`."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

DATA = Path(__file__).parent.parent / "data" / "parity"


def unet_config() -> dict[str, Any]:
    return json.loads((DATA / "meta.json").read_text())["unet_config"]


def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**unet_config())
    unet.load_state_dict(load_file(DATA / "unet.safetensors"))
    return unet.eval()


def ldm_config() -> dict[str, Any]:
    """`UNetModel` arguments of the architecture `unet_config` describes."""
    config = unet_config()
    base = config["block_out_channels"][0]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": base,
        "attention_resolutions": [2**i for i, kind in enumerate(config["down_block_types"]) if "Attn" in kind],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": [width // base for width in config["block_out_channels"]],
        "num_heads": config["attention_head_dim"],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": config["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }


def ldm_weights(unet: nn.Module, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """diffusers weights under ldm's names: diffusers' own ldm -> diffusers conversion, followed backwards."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = unet.state_dict()
    tags = {f"model.diffusion_model.{key}": torch.tensor(number) for number, key in enumerate(state)}
    names = dict(enumerate(state))
    converted = convert_ldm_unet_checkpoint(tags, config)
    return {names[int(tag)]: key for key, tag in converted.items()}  # type: ignore[misc]


def ldm_unet(unet_class: type[nn.Module] | None = None) -> nn.Module:
    """The parity UNet as ldm's `UNetModel` (from stable-diffusion-sdkit unless another copy of the class is given)."""
    if unet_class is None:
        from ldm.modules.diffusionmodules.openaimodel import UNetModel as unet_class

    unet = unet_class(**ldm_config()).eval()
    names = ldm_weights(unet, unet_config())
    source = load_file(DATA / "unet.safetensors")
    unet.load_state_dict({ldm: source[diffusers] for ldm, diffusers in names.items()})
    return unet


def sgm_unet() -> nn.Module:
    """A UNet laid out as sgm's (SDXL): two transformer blocks in a row, and a vector (B, 8) beside the text."""
    from ldm.modules.attention import SpatialTransformer
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    class AllOfOneText(SpatialTransformer):
        """ldm's wants a text for each block, sgm's gives all the same."""

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return super().forward(x, [context] * len(self.transformer_blocks))

    torch.manual_seed(7)
    width = ldm_config()["context_dim"]
    unet = UNetModel(**{**ldm_config(), "transformer_depth": 2, "context_dim": [width, width]}).eval()
    for module in unet.modules():
        if type(module) is SpatialTransformer:
            module.__class__ = AllOfOneText
    width = unet.time_embed[-1].out_features
    unet.num_classes, unet.label_emb = "sequential", nn.Sequential(nn.Linear(8, width), nn.SiLU())
    for parameter in unet.parameters():
        # Layers that begin as zero would hide what is in front of them.
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return unet


def load_bin(name: str) -> dict[str, Any]:
    """The file's tensors, the caller's own."""
    return copy.deepcopy(_unpickled(name))


@cache
def _unpickled(name: str) -> dict[str, Any]:
    # Of hundreds of small tensors: a copy of them in memory takes a tenth of the time.
    return torch.load(DATA / name, map_location="cpu", weights_only=True)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


__all__ = ["DATA", "diffusers_unet", "flatten", "ldm_unet", "load_bin", "sgm_unet", "unet_config"]
