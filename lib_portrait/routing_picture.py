"""Routing maps as pictures: which part of a result belongs to whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Told apart by hue and lightness, also with colour-deficient sight (after Okabe and Ito).
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (120, 120, 120),
)
COLOUR_NAMES = ("orange", "light blue", "green", "pink", "yellow", "dark blue", "red", "grey")
OPACITY = 0.6


def draw_routing(pictures: Sequence[Image.Image], maps: Sequence[torch.Tensor]) -> list[Image.Image]:
    """Each picture in grey under the colours of the people its positions were routed to.

    maps: one tensor (rows, N, h, w) in [0, 1] for each sampling, whose rows are its pictures in order, or several rows
    a picture (AND), which are averaged. Person i has COLOURS[i].
    """
    drawn: list[Image.Image] = []
    per_sampling = max(1, len(pictures) // max(1, len(maps)))
    for number, picture in enumerate(pictures):
        rows = maps[min(number // per_sampling, len(maps) - 1)]
        share = rows.shape[0] // per_sampling
        own = rows[(number % per_sampling) * share :][:share] if share else rows
        drawn.append(_draw(picture, own.mean(dim=0)))
    return drawn


def _draw(picture: Image.Image, shares: torch.Tensor) -> Image.Image:
    """shares (N, h, w)."""
    size = (picture.height, picture.width)
    smooth = F.interpolate(shares[None], size=size, mode="bilinear", align_corners=False)[0].clamp(0, 1).numpy()
    palette = np.array([COLOURS[i % len(COLOURS)] for i in range(len(smooth))], dtype=np.float32)
    colour = np.einsum("nhw,nc->hwc", smooth, palette)
    # Where nobody was routed (outside all regions) the grey picture shows through.
    alpha = OPACITY * smooth.sum(axis=0).clip(0, 1)[..., None]
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    colour = np.divide(colour, smooth.sum(axis=0)[..., None].clip(1e-6))
    return Image.fromarray((grey * (1 - alpha) + colour * alpha).clip(0, 255).astype(np.uint8))
