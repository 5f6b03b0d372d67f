"""The identity loss: is the face that a noise prediction leads to known again as the one it was given?

As in PortraitBooth (arXiv 2312.06354) and PuLID (arXiv 2404.16022): the picture is what one step makes of the
prediction, x_0 = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), which at much noise is a blur of many faces. Therefore it
is asked for below `LATEST` only. UniPortrait itself trains without.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lib_portrait.faces.recognition import Backbone
from trainer.features import global_feature

LATEST = 700
# The share of a batch that is decoded: all of it would double the time of a step of the world.
SHARE = 0.25


class IdentityLoss:
    """1 - the cosine of a recognition network's embeddings, of the face as predicted and of the one given.

    Only the part of the picture that the aligned face takes is decoded; gradients flow back through recognition,
    alignment and decoder, which stay as they are. scale: the VAE's scaling factor.
    """

    def __init__(self, vae: AutoencoderKL, backbone: Backbone, scale: float):
        self.vae = vae.requires_grad_(False).eval()
        self.backbone = backbone.requires_grad_(False).eval()
        self.scale = scale

    def to(self, device: torch.device) -> None:
        self.vae.to(device)
        self.backbone.to(device)

    def __call__(self, predicted: Tensor, t: Tensor, asked: Tensor, crops: Tensor, intrinsic: Tensor) -> Tensor:
        """The mean over the rows that are asked for and early enough, of a `SHARE` of the batch at most; 0 if none are.

        predicted: x_0 (B, 4, h, w), scaled. t (B). asked (B) bool. crops (B, 2, 3): see `crop_of` in `trainer.faces`.
        intrinsic (B, m, d): the recognition network's local features of the face given. Of several processes each takes
        its own share: the rows are others than those of one process with the whole batch.
        """
        rows = (asked & (t < LATEST)).nonzero().flatten()[: math.ceil(SHARE * len(t))]
        if not len(rows):
            return predicted.new_zeros(())
        # In full precision: SD1's decoder overflows in half of it.
        with torch.autocast(predicted.device.type, enabled=False):
            made, _ = self.backbone(self.faces(predicted[rows].float(), crops[rows]))
            return (1 - F.cosine_similarity(made, global_feature(self.backbone, intrinsic[rows]))).mean()

    def faces(self, latent: Tensor, crops: Tensor) -> Tensor:
        """Aligned faces (B, 3, s, s) in [-1, 1], as the recognition network sees them, of latents (B, 4, h, w)."""
        size = self.backbone.image_size
        sides = torch.tensor(latent.shape[:1:-1], device=latent.device)
        corners = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]], device=latent.device)
        # In latent positions, x before y.
        reach = (corners @ crops.transpose(1, 2)) * sides
        low, high = reach.amin(dim=1), reach.amax(dim=1)
        window = torch.minimum((high - low).amax(dim=0).ceil().long() + 1, sides)
        start = ((low + high - window) / 2).round().long().clamp(min=torch.zeros_like(sides), max=sides - window)
        (width, height), places = window.tolist(), start.tolist()
        parts = torch.stack([one[:, y : y + height, x : x + width] for one, (x, y) in zip(latent, places, strict=True)])
        pixels = self.vae.decode(parts / self.scale).sample.clamp(-1, 1)
        # From places in the whole picture to those in the window, and from [0, 1] to grid_sample's [-1, 1].
        crops = crops * (sides / window)[:, None]
        crops = torch.cat([crops[..., :2], crops[..., 2:] - (start / window)[..., None]], dim=2)
        steps = (torch.arange(size, device=latent.device) + 0.5) / size
        grid = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones(size, size, device=latent.device)])
        places_of = torch.einsum("bij,jyx->byxi", crops, grid) * 2 - 1
        # Beyond the edge an aligned face is black.
        return F.grid_sample(pixels + 1, places_of, align_corners=False) - 1
