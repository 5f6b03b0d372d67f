"""Small random face networks, in the layouts of the published files."""

from __future__ import annotations

import torch

from lib_portrait.faces.recognition import Backbone


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
