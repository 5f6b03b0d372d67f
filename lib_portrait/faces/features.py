"""What a method's identity embedding reads of a face: intrinsic and structure features (UniPortrait, sec. 3.1).

Follows the official `get_single_faceid_embeds` (uniportrait/uniportrait_pipeline.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import Backbone
from lib_portrait.faces.vision import CLIP_MEAN, CLIP_STD, ImageTower, VisionTower


@dataclass(frozen=True)
class FaceFeatures:
    """Features of one face, on the CPU. They are shared with the caches: not to be written to.

    intrinsic: (49, 512), the recognition network's last tap. structure: (256, 448 + 1280), its other taps beside the
    CLIP patch tokens, on the CLIP tower's grid; (0, 0) of an encoder without a tower. embedding: (512), what the
    recognition network makes of the last tap. image: (768), the whole picture's embedding (OmniPortrait's e_ref).
    What an encoder does not give is empty. Sizes are those of the published networks; others follow their files.
    """

    intrinsic: Tensor
    structure: Tensor
    embedding: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))


def pixels_of(crops: Sequence[np.ndarray]) -> Tensor:
    """Crops (H, W, 3) uint8 of one size as (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def clip_view(pixels: Tensor) -> Tensor:
    """What the vision tower sees of pixels (B, 3, H, W) in [0, 1]: normalised with CLIP's mean and deviation."""
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def recognition_view(pixels: Tensor, size: int = 112) -> Tensor:
    """What the recognition network sees of pixels (B, 3, H, W) in [0, 1]: (B, 3, size, size) in [-1, 1]."""
    return functional.interpolate(pixels * 2 - 1, size=(size, size), mode="bilinear", align_corners=False)


class Encoder(Protocol):
    """What makes features of faces; see `FaceEncoder`."""

    @property
    def key(self) -> str: ...

    def encode(self, crops: Sequence[np.ndarray]) -> list[FaceFeatures]: ...

    def zero(self) -> FaceFeatures: ...


class FaceEncoder:
    """Both networks together. They are loaded by the first face that is in no cache, and not before.

    networks: gives the recognition network and the vision tower, None for methods that read none. weights_hash: stands
    for the weights of both in the caches' keys. device, dtype: where and in what the networks run.
    """

    def __init__(
        self,
        networks: Callable[[], tuple[Backbone, VisionTower | None]],
        weights_hash: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self._load = networks
        self.weights_hash = weights_hash
        self.device = torch.device(device)
        self.dtype = dtype

    @functools.cached_property
    def _networks(self) -> tuple[Backbone, VisionTower | None]:
        backbone, vision = self._load()
        return backbone.to(self.device, self.dtype), None if vision is None else vision.to(self.device, self.dtype)

    @property
    def key(self) -> str:
        """Tells the features of this encoder from those of others."""
        return f"{self.weights_hash}-{str(self.dtype).removeprefix('torch.')}"

    # Features outlive the caller's inference mode, in caches and in training, where inference tensors are refused.
    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, crops: Sequence[np.ndarray]) -> list[FaceFeatures]:
        """The features of aligned faces (224, 224, 3) uint8, in the encoder's dtype.

        Raises PortraitError when a network answers with infinities or NaN: damaged weights, or too narrow a dtype.
        """
        if not crops:
            return []
        backbone, vision = self._networks
        pixels = pixels_of(crops).to(self.device)
        embedding, taps = backbone(recognition_view(pixels, backbone.image_size).to(self.dtype))
        intrinsic, structure = _tokens(taps[-1]), embedding.new_zeros(len(crops), 0, 0)
        if vision is not None:
            clip = vision.penultimate(clip_view(pixels).to(self.dtype))
            size = (vision.grid, vision.grid)
            resized = [
                functional.interpolate(tap, size=size, mode="bilinear", align_corners=False) for tap in taps[:-1]
            ]
            structure = torch.cat([_tokens(torch.cat(resized, dim=1)), clip], dim=-1)
        self._check(intrinsic, structure, embedding)
        found = zip(intrinsic.cpu(), structure.cpu(), embedding.cpu(), strict=True)
        return [FaceFeatures(*(one.clone() for one in own)) for own in found]

    @torch.inference_mode(False)
    @torch.no_grad()
    def zero(self) -> FaceFeatures:
        """The features of no face, for the unconditional tokens: intrinsic and embedding 0, structure [0; CLIP(pixels
        of 0)].

        Raises PortraitError as `encode` does.
        """
        backbone, vision = self._networks
        _, *taps, last = backbone.widths
        grid = backbone.image_size // 2 ** (len(taps) + 1)
        structure = torch.zeros(0, 0, dtype=self.dtype)
        if vision is not None:
            size = vision.image_size
            clip = vision.penultimate(torch.zeros(1, 3, size, size, device=self.device, dtype=self.dtype))[0].cpu()
            self._check(clip)
            structure = torch.cat([clip.new_zeros(len(clip), sum(taps)), clip], dim=-1)
        return FaceFeatures(
            intrinsic=structure.new_zeros(grid**2, last),
            structure=structure,
            embedding=structure.new_zeros(backbone.embedding_width),
        )

    def _check(self, *features: Tensor) -> None:
        _check_finite(features, self.dtype)


class PictureEncoder:
    """A CLIP image encoder alone, whose embedding of a face is e_ref of OmniPortrait's Pivot ID Encoder (sec. 3.2).

    network: gives the tower, when the first face is in no cache. The rest as in `FaceEncoder`.
    """

    def __init__(
        self,
        network: Callable[[], ImageTower],
        weights_hash: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self._load = network
        self.weights_hash = weights_hash
        self.device = torch.device(device)
        self.dtype = dtype

    @functools.cached_property
    def _network(self) -> ImageTower:
        return self._load().to(self.device, self.dtype)

    @property
    def key(self) -> str:
        """Tells the features of this encoder from those of others."""
        return f"image-{self.weights_hash}-{str(self.dtype).removeprefix('torch.')}"

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(self, crops: Sequence[np.ndarray]) -> list[FaceFeatures]:
        """As `FaceEncoder.encode`: of each aligned face (224, 224, 3) uint8 its `image`, and nothing else."""
        if not crops:
            return []
        embeddings = self._network.embedding(pixels_of(crops).to(self.device, self.dtype))
        _check_finite([embeddings], self.dtype)
        nothing = torch.empty(0)
        return [FaceFeatures(nothing, nothing, image=one.clone()) for one in embeddings.cpu()]

    def zero(self) -> FaceFeatures:
        """The features of no face: an embedding of zeros."""
        nothing = torch.empty(0)
        return FaceFeatures(nothing, nothing, image=torch.zeros(self._network.projected, dtype=self.dtype))


def _check_finite(features: Sequence[Tensor], dtype: torch.dtype) -> None:
    if not all(bool(each.isfinite().all()) for each in features):
        raise PortraitError(
            "weights",
            f"the face networks give infinite or undefined features in {dtype}",
            "Fetch their files again, or run without half precision (--no-half).",
            status_code=500,
        )


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return maps.flatten(2).transpose(1, 2)
