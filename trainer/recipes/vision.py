"""The vision tower of a world, in CLIP-ViT layout, trained contrastively with the base model's text encoder.

CLIP's loss on pictures and captions (arXiv 2103.00020). The text encoder is that of the base model and stays as it is
(locked, as in LiT, arXiv 2111.07991): it feeds the UNet. What is trained are the tower and both projections. Random
crops teach the tower faces, which is what adapters show it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.faces.features import clip_view, pixels_of
from lib_portrait.faces.weights import fitting
from trainer.architectures import CONTEXT, world_text_encoder, world_vision
from trainer.draws import Draws
from trainer.features import END, Features
from trainer.loop import Recipe, Settings
from trainer.losses import contrastive
from trainer.shards import Shards

# The smallest part of a picture's side that a crop may show, and the share of samples that are cropped at all.
SMALLEST_CROP, CROPPED = 0.45, 0.5


class CaptionedPictures:
    """ "pixels" (3, s, s) normalised as CLIP's, "caption_ids" (77)."""

    def __init__(self, shards: Shards, size: int):
        self.shards, self.features, self.size = shards, Features(shards), size

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        picture, rng = self.shards.picture(index), np.random.default_rng(seed)
        if rng.random() < CROPPED:
            side = round(min(picture.shape[:2]) * rng.uniform(SMALLEST_CROP, 1))
            top, left = (int(rng.integers(0, whole - side + 1)) for whole in picture.shape[:2])
            picture = picture[top : top + side, left : left + side]
        picture = cv2.resize(picture, (self.size, self.size), interpolation=cv2.INTER_LINEAR)
        return {"pixels": clip_view(pixels_of([picture]))[0], "caption_ids": self.features.tokens[index].long()}


class VisionRecipe(Recipe):
    """See the module. base: base.safetensors of the recipe `base`."""

    name = "vision"

    def __init__(self, data: Path, base: Path):
        super().__init__()
        self.tower = world_vision()
        config = self.tower.config
        self.visual_projection = nn.Linear(config.hidden_size, CONTEXT, bias=False)
        self.text_projection = nn.Linear(CONTEXT, CONTEXT, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.659))
        text = world_text_encoder().eval().requires_grad_(False)
        tensors = read_tensors(base).tensors
        own = {k.removeprefix("text_encoder."): v for k, v in tensors.items() if k.startswith("text_")}
        text.load_state_dict(fitting(text, own, base.name, "text_encoder."))
        self._text = [text]
        self.data = CaptionedPictures(Shards.under(data), config.image_size)

    def samples(self) -> CaptionedPictures:
        return self.data

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        self._text[0].to(device)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        seen = self.tower(pixel_values=batch["pixels"])
        pictures = self.visual_projection(seen.pooler_output)
        with torch.no_grad():
            states = self._text[0](batch["caption_ids"]).last_hidden_state
        last = (batch["caption_ids"] == END).int().argmax(dim=1)
        texts = self.text_projection(states[torch.arange(len(last)), last])
        loss, right = contrastive(pictures, texts, self.logit_scale.exp().clamp(max=100))
        return {"loss": loss, "right": right, "scale": self.logit_scale.exp()}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """world-vision.safetensors: the tower in transformers' CLIP names, both projections and logit_scale, fp16."""
        # transformers 5 has the layers in the model itself, earlier ones in `vision_model` within it.
        layered = getattr(self.tower, "vision_model", self.tower)
        tensors = {f"vision_model.{key}": value for key, value in layered.state_dict().items()}
        tensors |= {
            "visual_projection.weight": self.visual_projection.weight,
            "text_projection.weight": self.text_projection.weight,
            "logit_scale": self.logit_scale,
        }
        stored = {k: v.detach().half().contiguous().cpu() for k, v in tensors.items() if v.is_floating_point()}
        config = {"heads": str(self.tower.config.num_attention_heads), "activation": self.tower.config.hidden_act}
        write_tensors(folder / "world-vision.safetensors", stored, {**config, **facts})


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="base.safetensors, as exported by the recipe base")


def build(options: argparse.Namespace) -> Recipe:
    return VisionRecipe(options.data, options.base)
