"""The single-file layout of Stable Diffusion 1: how its .yaml describes the networks, and the names of their weights.

Each description is turned into diffusers' networks and back, each name of a weight in diffusers (or transformers) into
the one that a single file has. Names follow CompVis/stable-diffusion: ``model.diffusion_model.*`` is the UNet,
``first_stage_model.*`` the VAE, ``cond_stage_model.transformer.*`` the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lib_portrait.checkpoints.text_encoder import SD1_TEXT, TARGET
from lib_portrait.errors import PortraitError

Parameters = dict[str, Any]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

DIFFUSION_TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
VAE_TARGET = "ldm.models.autoencoder.AutoencoderKL"
CLIP_TARGET = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"

SD1: Parameters = {
    "model": {
        "target": DIFFUSION_TARGET,
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "num_timesteps_cond": 1,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": 4,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "scale_factor": 0.18215,
            "use_ema": False,
            "unet_config": {
                "target": UNET_TARGET,
                "params": {
                    "image_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 320,
                    "attention_resolutions": [4, 2, 1],
                    "num_res_blocks": 2,
                    "channel_mult": [1, 2, 4, 4],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 768,
                    "use_checkpoint": False,
                    "legacy": False,
                },
            },
            "first_stage_config": {
                "target": VAE_TARGET,
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4, 4],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                    "lossconfig": {"target": "torch.nn.Identity"},
                },
            },
            "cond_stage_config": {"target": CLIP_TARGET},
        },
    }
}
"""The description of Stable Diffusion 1.5, which its files do not carry."""

# Entries of a UNet's description that say nothing about what it computes when pictures are made.
_UNET_PASSIVE = {"image_size", "use_checkpoint", "use_fp16", "use_bf16", "legacy", "dropout"}


# ---------------------------------------------------------------------------------------------- networks from the .yaml


def unet_config(params: Mapping[str, Any], field: str) -> Parameters:
    """Arguments of diffusers' UNet2DConditionModel from those of ldm's UNetModel.

    Raises PortraitError naming `field` for a UNet that is not of SD1's kind.
    """
    known = {*SD1["model"]["params"]["unet_config"]["params"], *_UNET_PASSIVE}
    odd = sorted(key for key, value in params.items() if key not in known and value not in (None, False))
    if odd or params.get("use_spatial_transformer") is not True or params.get("transformer_depth", 1) != 1:
        raise _foreign(field, f"its UNet has {', '.join(odd) or 'no spatial transformers of depth 1'}")
    width, multiples = _number(params, "model_channels", field), _numbers(params, "channel_mult", field)
    attended = _numbers(params, "attention_resolutions", field)
    at = [2**level in attended for level in range(len(multiples))]
    return {
        "in_channels": _number(params, "in_channels", field),
        "out_channels": _number(params, "out_channels", field),
        "block_out_channels": tuple(width * multiple for multiple in multiples),
        "layers_per_block": _number(params, "num_res_blocks", field),
        "cross_attention_dim": _number(params, "context_dim", field),
        # diffusers' name for the number of heads.
        "attention_head_dim": _number(params, "num_heads", field),
        "down_block_types": tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in at),
        "up_block_types": tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(at)),
    }


def vae_config(params: Mapping[str, Any], scale_factor: float, field: str) -> Parameters:
    """Arguments of diffusers' AutoencoderKL from those of ldm's. Raises PortraitError naming `field`."""
    sizes = _section(params, "ddconfig", field)
    if sizes.get("attn_resolutions") or not sizes.get("double_z") or sizes.get("z_channels") != params.get("embed_dim"):
        raise _foreign(field, "its VAE is not of the kind with Gaussian latents and attention in the middle only")
    width, multiples = _number(sizes, "ch", field), _numbers(sizes, "ch_mult", field)
    return {
        "in_channels": _number(sizes, "in_channels", field),
        "out_channels": _number(sizes, "out_ch", field),
        "latent_channels": _number(sizes, "z_channels", field),
        "block_out_channels": tuple(width * multiple for multiple in multiples),
        # An autoencoder may have none before its bottleneck; the decoder has one more at each level.
        "layers_per_block": _number(sizes, "num_res_blocks", field, least=0),
        "down_block_types": ("DownEncoderBlock2D",) * len(multiples),
        "up_block_types": ("UpDecoderBlock2D",) * len(multiples),
        "scaling_factor": scale_factor,
    }


# ---------------------------------------------------------------------------------------------- the .yaml from networks


def describe(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> Parameters:
    """The .yaml of a model, from the configurations of diffusers' UNet2DConditionModel and AutoencoderKL.

    text: the text encoder's sizes, named as in `SD1_TEXT`. The picture's size is written as the UNet's `sample_size`
    has it. Raises PortraitError when ldm has no such network.
    """
    width, multiples = _multiples(unet["block_out_channels"], "unet")
    attended = [2**level for level, kind in enumerate(unet["down_block_types"]) if kind.startswith("CrossAttn")]
    latent = unet["sample_size"]
    described = {
        "image_size": latent,
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": width,
        "attention_resolutions": attended,
        "num_res_blocks": unet["layers_per_block"],
        "channel_mult": multiples,
        "num_heads": unet["attention_head_dim"],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }
    wanted = unet_config(described, "unet")
    different = sorted(key for key, value in wanted.items() if _plain(unet[key]) != _plain(value))
    if different or unet.get("use_linear_projection"):
        raise _foreign("unet", f"ldm has no UNet with this {', '.join(different) or 'use_linear_projection'}")
    vae_width, vae_multiples = _multiples(vae["block_out_channels"], "vae")
    first_stage = {
        "embed_dim": vae["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": vae["latent_channels"],
            "resolution": latent * 2 ** (len(vae_multiples) - 1),
            "in_channels": vae["in_channels"],
            "out_ch": vae["out_channels"],
            "ch": vae_width,
            "ch_mult": vae_multiples,
            "num_res_blocks": vae["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    params = {
        **SD1["model"]["params"],
        "image_size": latent,
        "channels": unet["in_channels"],
        "scale_factor": float(vae["scaling_factor"]),
        "unet_config": {"target": UNET_TARGET, "params": described},
        "first_stage_config": {"target": VAE_TARGET, "params": first_stage},
        "cond_stage_config": (
            {"target": CLIP_TARGET} if dict(text) == SD1_TEXT else {"target": TARGET, "params": dict(text)}
        ),
    }
    return {"model": {"target": DIFFUSION_TARGET, "params": params}}


def _multiples(widths: tuple[int, ...] | list[int], field: str) -> tuple[int, list[int]]:
    if any(width % widths[0] for width in widths):
        raise _foreign(field, f"ldm writes widths as multiples of the first, which {tuple(widths)} are not")
    return widths[0], [width // widths[0] for width in widths]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------- names of the weights

_UNET_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet_key(name: str, layers: int, attended: tuple[bool, ...]) -> str:
    """The name in a single file of a weight of diffusers' UNet.

    layers: residual blocks of a level on the way down. attended: for each level on the way up, from the deepest, has it
    attention.
    """
    outer, _, kind = name.rpartition(".")
    if outer in _UNET_OUTER:
        return f"{UNET}{_UNET_OUTER[outer]}.{kind}"
    if match := _MID.fullmatch(name):
        part, rest = match[1], match[3]
        # Residual block, transformer, residual block.
        place = 1 if part == "attentions" else 2 * int(match[2])
        return f"{UNET}middle_block.{place}.{_inner(part, rest)}"
    match = _BLOCK.fullmatch(name)
    assert match is not None, name
    level, part, number, rest = int(match[2]), match[3], int(match[4]), match[5]
    if part == "downsamplers":
        return f"{UNET}input_blocks.{(level + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if part == "upsamplers":
        # It stands behind the level's last residual block and, where there is one, its transformer.
        return f"{UNET}output_blocks.{level * (layers + 1) + layers}.{1 + attended[level]}.{rest}"
    place = level * (layers + 1) + number
    side = f"input_blocks.{1 + place}" if match[1] == "down" else f"output_blocks.{place}"
    return f"{UNET}{side}.{int(part == 'attentions')}.{_inner(part, rest)}"


def _inner(part: str, rest: str) -> str:
    if part == "attentions":
        return rest
    module, _, kind = rest.rpartition(".")
    return f"{_UNET_RESNET[module]}.{kind}"


def vae_key(name: str, levels: int) -> str:
    """The name in a single file of a weight of diffusers' AutoencoderKL with this number of levels.

    ldm counts the decoder's levels from the finest, diffusers from the deepest.
    """
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return f"{VAE}{name}"
    rest = rest.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    if match := _MID.fullmatch(rest):
        part, number, rest = match[1], int(match[2]), match[3]
        if part == "resnets":
            return f"{VAE}{half}.mid.block_{number + 1}.{rest}"
        module, _, kind = rest.rpartition(".")
        return f"{VAE}{half}.mid.attn_1.{_VAE_ATTENTION[module]}.{kind}"
    if match := _BLOCK.fullmatch(rest):
        way, level, part, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if way == "up":
            level = levels - 1 - level
        place = f"block.{number}" if part == "resnets" else f"{way}sample"
        rest = f"{way}.{level}.{place}.{rest}"
    return f"{VAE}{half}.{rest}"


def text_key(name: str) -> str:
    """The name in a single file of a weight of transformers' CLIPTextModel (5, or 4 with its ``text_model.``)."""
    return TEXT + name.removeprefix("text_model.")


# --------------------------------------------------------------------------------------------------------------- values


def _section(params: Mapping[str, Any], name: str, field: str) -> Mapping[str, Any]:
    value = params.get(name)
    if not isinstance(value, Mapping):
        raise _foreign(field, f"{name} is missing")
    return value


def _number(params: Mapping[str, Any], name: str, field: str, least: int = 1) -> int:
    value = params.get(name)
    if type(value) is not int or not least <= value <= 100_000:
        raise _foreign(field, f"{name} is {value!r}")
    return value


def _numbers(params: Mapping[str, Any], name: str, field: str) -> list[int]:
    value = params.get(name)
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= 16:
        raise _foreign(field, f"{name} is {value!r}")
    return [_number({name: item}, name, field) for item in value]


def _foreign(field: str, problem: str) -> PortraitError:
    return PortraitError(field, problem, "Use a Stable Diffusion 1.x model.")
