"""The identity loss: is the face that the model draws known again as the one it was given?

As in PuLID (arXiv 2404.16022) the picture is drawn from pure noise in a few steps: x_0 of a noised photo shows whose it
is, whatever the adapter says. As in ReFL (arXiv 2304.05977) gradients flow through the last of these steps only, which
goes from a random t to x_0. As in WithAnyone (arXiv 2510.14975) the face is not only drawn to its own person but, by
InfoNCE, away from everybody else whom it could be taken for. UniPortrait itself trains without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lib_portrait.faces.detection import Detector, detect_faces
from lib_portrait.faces.recognition import Backbone
from lib_portrait.standalone.measuring import greedy_pairs
from trainer.faces import crop_to
from trainer.features import global_feature
from trainer.losses import infonce

# Steps of drawing before the last one, which begins below `LAST_BELOW`, where x_0 is a face and not a blur of many.
DRAWN_IN, LAST_BELOW = 6, 400
# The share of a batch that is drawn: it takes as long as three times as many samples of the diffusion loss.
SHARE = 0.5
# Of InfoNCE, and of how many people beside those of a picture.
TEMPERATURE, OTHERS = 0.07, 1000


@dataclass(frozen=True)
class Others:
    """People for faces to be told from: embeddings of length one (K, e), and the people's numbers (K)."""

    embeddings: Tensor
    who: Tensor


@dataclass(frozen=True)
class FaceLosses:
    """Means over the faces that are found, 0 where there are none.

    id_loss: 1 - cosine to the person given. infonce: InfoNCE in cosines, by how much others are as like, or more.
    top1: the share of faces that are most like their own person. found: the share of faces asked for that are found.
    """

    id_loss: Tensor
    infonce: Tensor
    top1: Tensor
    found: Tensor


class IdentityLoss:
    """How like the person given a face is as drawn, by a recognition network's embeddings, and how like others.

    Only the part of the picture that the aligned face takes is decoded; gradients flow back through recognition,
    alignment and decoder, which stay as they are. scale: the VAE's scaling factor.
    """

    def __init__(self, vae: AutoencoderKL, backbone: Backbone, detector: Detector, scale: float, others: Others):
        self.vae = vae.requires_grad_(False).eval()
        self.backbone = backbone.requires_grad_(False).eval()
        self.detector = detector
        self.scale = scale
        self.others = others

    def to(self, device: torch.device) -> None:
        self.vae.to(device)
        self.backbone.to(device)
        self.others = Others(self.others.embeddings.to(device), self.others.who.to(device))

    def __call__(self, latent: Tensor, intrinsic: Tensor, present: Tensor, who: Tensor) -> FaceLosses:
        """The losses of the faces in drawn pictures; gradients lead to `latent`.

        latent: x_0 (B, 4, h, w), scaled. intrinsic (B, N, m, d): the recognition network's local features of the faces
        given, present (B, N) bool: which of them there are, who (B, N): their numbers. Faces of a picture and people
        are paired as measuring pairs them.
        """
        # In full precision: SD1's decoder overflows in half of it.
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float()
            crops = self.find(latent.detach(), present.sum(dim=1).tolist())
            rows = torch.tensor([row for row, found in enumerate(crops) for _ in found], device=latent.device)
            if not len(rows):
                none = latent.new_zeros(())
                return FaceLosses(latent.sum() * 0, none, none, none)
            places = torch.stack([crop for found in crops for crop in found]).to(latent.device)
            made = F.normalize(self.backbone(self.faces(latent[rows], places))[0])
            id_losses, infonces, top1 = [], [], []
            for row in rows.unique():
                people = who[row, present[row]]
                given = F.normalize(global_feature(self.backbone, intrinsic[row, present[row]]))
                similar, to_others = made[rows == row] @ given.T, made[rows == row] @ self.others.embeddings.T
                others = ~torch.isin(self.others.who, people)
                for person, face in greedy_pairs(similar.detach()).items():
                    own, all_of_them = similar[face, person], torch.cat([similar[face], to_others[face, others]])
                    id_losses.append(1 - own)
                    infonces.append(infonce(own, all_of_them, TEMPERATURE))
                    top1.append((own >= all_of_them.max()).float())
            found = len(id_losses) / present.sum()
            id_loss, nce, first = (torch.stack(each).mean() for each in (id_losses, infonces, top1))
            return FaceLosses(id_loss, nce, first, found)

    @torch.no_grad()
    def find(self, latent: Tensor, most: Sequence[int]) -> list[list[Tensor]]:
        """Where the aligned faces of each picture lie, the largest `most` of them: (2, 3) each, see `crop_to`."""
        pixels = (self.vae.decode(latent / self.scale).sample.clamp(-1, 1) + 1) * 127.5
        found = []
        for picture, people in zip(pixels.permute(0, 2, 3, 1).round().byte().cpu().numpy(), most, strict=True):
            faces = sorted(detect_faces(np.ascontiguousarray(picture), self.detector), key=lambda face: -face.area)
            found.append([crop_to(face.landmarks, picture.shape[1::-1]) for face in faces[:people]])
        return found

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
