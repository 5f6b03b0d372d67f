"""CLIP vision towers, from the files people already have, in transformers' or open_clip's layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import beside, fill, unfilled, unfit

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Attention heads where they are not width / 64: ViT-H, ViT-g, ViT-bigG of open_clip.
_HEADS = {1280: 16, 1408: 16, 1664: 16}
# OpenAI trained ViT-B (768) and ViT-L (1024) with x * sigmoid(1.702 x); open_clip's larger ones have the exact GELU.
_QUICK_GELU_WIDTHS = (768, 1024)
_ACTIVATIONS = ("gelu", "quick_gelu")
# Of open_clip's towers of LAION-2B, ViT-L/14 alone was trained on pixels normalised to [-1, 1] (open_clip,
# pretrained.py: laion2b_s32b_b82k); the others, and OpenAI's, with CLIP's mean and deviation.
_HALF = (0.5, 0.5, 0.5)
_HALF_WIDTH = 1024

_LAYER = re.compile(r"encoder\.layers\.(\d{1,4})\..+")
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.(.+)")
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class _Tower(nn.Module):
    """A CLIP vision transformer of so many layers.

    width: of its tokens. grid: patches along a side. image_size: side of the picture it takes.
    """

    def __init__(self, width: int, grid: int, patch: int, layers: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.width = width
        self.grid = grid
        self.image_size = grid * patch
        self.model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=mlp_width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                image_size=grid * patch,
                patch_size=patch,
                hidden_act=activation,
            )
        )

    def _resized(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] == self.image_size:
            return pixels
        size = (self.image_size, self.image_size)
        return functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)


class VisionTower(_Tower):
    """A CLIP vision transformer up to and without its last layer, which is where UniPortrait reads it."""

    def penultimate(self, pixels: Tensor) -> Tensor:
        """Patch tokens (B, grid^2, width) of the last layer but one (hidden_states[-2] less its class token).

        pixels: (B, 3, H, W), normalised with CLIP's mean and deviation; resized when H, W are not the tower's.
        """
        return self.model(pixel_values=self._resized(pixels)).last_hidden_state[:, 1:]


class ImageTower(_Tower):
    """A whole CLIP vision transformer with its projection into the space that it shares with texts.

    projected: how wide that is. mean, std: what the pixels are normalised with.
    """

    def __init__(self, projected: int, *sizes: Any):
        super().__init__(*sizes)
        self.projected = projected
        self.projection = nn.Linear(self.width, projected, bias=False)
        half = self.width == _HALF_WIDTH
        self.mean, self.std = (_HALF, _HALF) if half else (CLIP_MEAN, CLIP_STD)

    def embedding(self, pixels: Tensor) -> Tensor:
        """The embeddings (B, projected) of pictures (B, 3, H, W) in [0, 1], as CLIP compares them with texts, of any
        length."""
        pixels = self._resized(pixels)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        seen = self.model(pixel_values=(pixels - mean) / std)
        return self.projection(seen.pooler_output)


def vision_from_state_dict(
    tensors: Mapping[str, Tensor], config: Mapping[str, str] | None = None, field: str = "vision"
) -> VisionTower:
    """The vision tower that a file's tensors hold, in evaluation mode; a text tower or projection beside it is ignored.

    Width, layers, patch and picture size are read off the tensors; `config` (a checkpoint's metadata) may set what
    they do not tell: `heads` and `activation` (gelu or quick_gelu). Raises PortraitError naming `field`.
    """
    named, layers, sizes = _read(tensors, config or {}, field, _QUICK_GELU_WIDTHS)
    width, grid, patch, heads, mlp, activation = sizes
    with unfilled():
        tower = VisionTower(width, grid, patch, layers - 1, heads, mlp, activation)
    _fill(tower, named, field)
    return tower.eval()


def image_tower_from_state_dict(
    tensors: Mapping[str, Tensor], config: Mapping[str, str] | None = None, field: str = "vision"
) -> ImageTower:
    """The whole tower and its projection, as for `vision_from_state_dict`, but that where `config` is silent the
    activation is GELU as it stands: so have it open_clip's of LAION-2B, of every size."""
    named, layers, sizes = _read(tensors, config or {}, field)
    width, grid, patch, heads, mlp, activation = sizes
    projection = next((value for name, value in tensors.items() if name.endswith("visual_projection.weight")), None)
    if projection is None:
        own = beside(tensors, "class_embedding").get("proj")
        projection = None if own is None or own.ndim != 2 else own.T
    if projection is None or projection.ndim != 2:
        raise unfit(field, "it has no projection of pictures (visual_projection.weight, or visual.proj)")
    with unfilled():
        tower = ImageTower(projection.shape[0], width, grid, patch, layers, heads, mlp, activation)
    fill(tower.projection, {"weight": projection.contiguous()}, field, "visual_projection.")
    _fill(tower, named, field)
    return tower.eval()


def _read(
    tensors: Mapping[str, Tensor], settings: Mapping[str, str], field: str, quick: Sequence[int] = ()
) -> tuple[dict[str, Tensor], int, tuple[int, int, int, int, int, str]]:
    """A tower's tensors by transformers' names, how many layers it has, and its width, grid, patch, heads, MLP's width
    and activation. quick: widths with quick GELU where nothing else is said."""
    named = beside(tensors, "embeddings.class_embedding") or _from_open_clip(beside(tensors, "class_embedding"), field)
    positions, patches, mlp = (
        _matrix(named, name, dims, field)
        for name, dims in (
            ("embeddings.position_embedding.weight", 2),
            ("embeddings.patch_embedding.weight", 4),
            ("encoder.layers.0.mlp.fc1.weight", 2),
        )
    )
    width, patch = patches.shape[0], patches.shape[-1]
    grid = math.isqrt(positions.shape[0] - 1)
    layers = 1 + max(int(match[1]) for match in map(_LAYER.fullmatch, named) if match)
    heads = _whole(settings.get("heads"), field) or _HEADS.get(width, max(1, width // 64))
    activation = settings.get("activation") or ("quick_gelu" if width in quick else "gelu")
    square = grid > 0 and grid**2 + 1 == positions.shape[0]
    if not square or not 2 <= layers <= len(named) or width % heads or activation not in _ACTIVATIONS:
        raise unfit(
            field,
            f"no CLIP vision tower has {layers} layers, width {width}, {heads} heads, {positions.shape[0]} positions "
            f"and the activation {activation}",
        )
    return named, layers, (width, grid, patch, heads, mlp.shape[0], activation)


def _fill(tower: _Tower, named: Mapping[str, Tensor], field: str) -> None:
    # transformers 5 has the layers in the model itself, earlier ones in `vision_model` within it.
    layered = getattr(tower.model, "vision_model", tower.model)
    layered.embeddings.position_ids = torch.arange(tower.grid**2 + 1).expand(1, -1)
    fill(layered, named, field)


def _matrix(named: Mapping[str, Tensor], name: str, dims: int, field: str) -> Tensor:
    tensor = named.get(name)
    if tensor is None or tensor.ndim != dims or not all(tensor.shape):
        raise unfit(field, f"it is not a CLIP vision tower: {name} is missing or has another shape")
    return tensor


def _whole(text: str | None, field: str) -> int:
    if text is None:
        return 0
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise PortraitError(field, f"the metadata says {text[:20]!r} heads", "Write a whole number from 1 to 9999.")
    return int(text)


def _from_open_clip(visual: Mapping[str, Tensor], field: str) -> dict[str, Tensor]:
    """The tensors of open_clip's (and OpenAI's) `visual` module under the names that transformers gives them.

    The joint projection of queries, keys and values (3 width, width) is cut into its three parts.
    """
    named = {}
    outer = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    }
    for name, tensor in visual.items():
        match = _RESBLOCK.fullmatch(name)
        if match is None:
            if name in outer:
                named[outer[name]] = tensor
            continue
        layer, (part, _, kind) = f"encoder.layers.{int(match[1])}", match[2].rpartition(".")
        if match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            if tensor.ndim == 0 or not tensor.shape[0] or tensor.shape[0] % 3:
                raise unfit(field, f"{name} has the shape {tuple(tensor.shape)}")
            for target, third in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{layer}.self_attn.{target}_proj.{match[2].rpartition('_')[2]}"] = third
        elif part in _OPEN_CLIP_BLOCK:
            named[f"{layer}.{_OPEN_CLIP_BLOCK[part]}.{kind}"] = tensor
        else:
            raise unfit(field, f"its layers have {match[2]}, which no published adapter was trained on")
    return named
