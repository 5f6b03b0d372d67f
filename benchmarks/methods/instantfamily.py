"""InstantFamily at the sizes of SD1.5 and an IR-101, with random weights: both masks, and none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lib_portrait.attention import find_sites
from lib_portrait.faces.recognition import Backbone
from lib_portrait.methods.instantfamily import EXCLUDE, MULTIPLY, NONE, FaceProjections, FamilyMember, FamilyRule

TRAINING: dict[str, tuple[str, ...]] = {}
WIDTH, SIDE = 512, 7


# Of a face in a row of people, in shares of what each has of the picture's width.
FACE = 0.6


def files(folder: Path, intrinsic: tuple[int, int]) -> tuple[str, str]:
    """A recognition network of random weights in the folder, and the recipe's option that names it.

    intrinsic: positions and channels of its last tap, of which alone the embedding is made.
    """
    path = folder / "backbone.safetensors"
    if not path.exists():
        positions, width = intrinsic
        network = Backbone((1,) * 4, (16, 16, 32, 64, width), WIDTH, 16 * math.isqrt(positions))
        save_file(network.state_dict(), path)
    return "--backbone", str(path)


def rules(
    unet: nn.Module, counts: Sequence[int], latent: int
) -> Iterator[tuple[dict[str, Any], Callable[[], FamilyRule]]]:
    """People stand side by side, each with a square face."""
    adapter = FaceProjections.for_sites(find_sites(unet), WIDTH, WIDTH).requires_grad_(False)
    for count in counts:
        tokens = adapter(torch.randn(count, WIDTH), torch.randn(count, SIDE**2, WIDTH))
        half = FACE / count / 2
        boxes = [((i + 0.5) / count - half, 0.5 - half, (i + 0.5) / count + half, 0.5 + half) for i in range(count)]
        people = [FamilyMember(own, box) for own, box in zip(tokens, boxes)]
        for mask in (MULTIPLY, EXCLUDE, NONE):
            yield {"ids": count, "mask": mask}, functools.partial(FamilyRule, adapter, people, mask)
