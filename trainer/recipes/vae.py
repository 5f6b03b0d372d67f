"""The picture autoencoder of a world: ldm's AutoencoderKL, trained from scratch.

Nine tenths of its work is in the decoder's last two levels, which see the whole resolution. `--coarse` trains without
them: the level before writes its picture as blocks of pixels, and encoder and bottleneck learn several times faster.
A second run with `--initial` then trains all of it.

Loss: absolute difference of pixels and of their gradients, faces counting more; `--detail` adds that of high-passes,
counting more where the picture has detail, which keeps moles and wrinkles; with a recognition network also the
difference of its features, which keeps what tells people apart; Kullback-Leibler term of the posterior; and, for a
share of the steps, the same after latents and pictures were both halved (EQ-VAE, arXiv 2502.09509), which makes
latents that a diffusion model learns faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.faces.weights import fitting
from trainer.architectures import VAE_CHANNELS, deepened, vae_like, world_vae
from trainer.draws import Draws
from trainer.loop import Recipe, Settings, fast_on_gpu
from trainer.shards import Shards

FACE_WEIGHT = 3.0
ON_FACES = 0.7
# Side of the mean that a high-pass takes away, and how much more than a smooth place one with detail counts.
AROUND, DETAILED = 5, 1.6
# A recognition network of 80 px shows faces of 128 px pictures about this much larger.
SEEN = 1.5 * 128 / 80
# How many pictures the latents' scale is measured on.
SCALE_PICTURES = 64


class Crops:
    """Random crops: "pixels" (3, s, s) in [-1, 1], "weight" (1, s, s), FACE_WEIGHT on faces and 1 elsewhere.

    Most crops are centred somewhere on a face: faces are what a picture's latent has to keep most of.
    """

    def __init__(self, shards: Shards, size: int, on_faces: float = ON_FACES):
        self.shards, self.size, self.on_faces = shards, size, on_faces

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        picture, labels = self.shards.picture(index), self.shards.labels(index)
        rng = np.random.default_rng(seed)
        room = np.array(picture.shape[:2]) - self.size
        corner = rng.uniform(0, 1, 2) * room
        faces = self.shards.record(index).faces
        if faces and rng.random() < self.on_faces:
            x0, y0, x1, y1 = faces[int(rng.integers(len(faces)))].box
            corner = rng.uniform((y0, x0), (y1, x1)) - self.size / 2
        top, left = np.clip(corner, 0, room).astype(int).tolist()
        window = np.s_[top : top + self.size, left : left + self.size]
        pixels = torch.from_numpy(np.ascontiguousarray(picture[window])).permute(2, 0, 1).float() / 127.5 - 1
        weight = torch.ones(1, self.size, self.size)
        if labels is not None:
            weight += (FACE_WEIGHT - 1) * (torch.from_numpy(labels[window]) > 0).float()
        if rng.random() < 0.5:
            pixels, weight = pixels.flip(-1), weight.flip(-1)
        return {"pixels": pixels, "weight": weight}


class Blocks(nn.Module):
    """A picture from the decoder's second level, 4 x 4 pixels a place: sub-pixel convolution, arXiv 1609.05158."""

    LEVELS, SIDE = 2, 4

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        width = vae.config.block_out_channels[-self.LEVELS]
        for unused in (vae.decoder.up_blocks[self.LEVELS - 1].upsamplers, vae.decoder.up_blocks[self.LEVELS :]):
            unused.requires_grad_(False)
        vae.decoder.conv_norm_out.requires_grad_(False)
        vae.decoder.conv_out.requires_grad_(False)
        self.norm = nn.GroupNorm(32, width)
        self.pixels = nn.Conv2d(width, 3 * self.SIDE**2, 3, padding=1)

    def forward(self, vae: AutoencoderKL, latent: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to pixels (B, 3, 8 h, 8 w)."""
        decoder = vae.decoder
        hidden = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latent)))
        for level, block in enumerate(decoder.up_blocks[: self.LEVELS]):
            for resnet in block.resnets:
                hidden = resnet(hidden, temb=None)
            if level < self.LEVELS - 1:
                hidden = block.upsamplers[0](hidden)
        made: Tensor = F.pixel_shuffle(self.pixels(F.silu(self.norm(hidden))), self.SIDE)
        return made


class VAERecipe(Recipe):
    """See the module. `decoder_only` leaves the latents as they are."""

    name = "vae"

    def __init__(
        self,
        data: Path,
        crop: int = 64,
        kl: float = 2e-4,
        halved: float = 0.0,
        decoder_only: bool = False,
        coarse: bool = False,
        initial: Path | None = None,
        recognition: Path | None = None,
        perceptual: float = 0.3,
        channels: Sequence[int] = VAE_CHANNELS,
        layers: int = 0,
        absolute: float = 1.0,
        gradient: float = 0.5,
        detail: float = 0.0,
        on_faces: float = ON_FACES,
    ):
        super().__init__()
        self.data = Crops(Shards.under(data), crop, on_faces)
        self.kl, self.halved, self.decoder_only = kl, halved, decoder_only
        self.absolute, self.gradient, self.detail = absolute, gradient, detail
        if initial is None:
            self.vae = world_vae(channels, layers)
        else:
            tensors = read_tensors(initial).tensors
            vae = vae_like(tensors, initial.name)
            vae.load_state_dict(fitting(vae, tensors, initial.name))
            self.vae = deepened(vae, layers)
        self.perceptual = perceptual
        # In a list: it is not trained, and no child.
        self._recognition: list[Backbone] = []
        if recognition is not None:
            self._recognition = [backbone_from_state_dict(read_tensors(recognition, "backbone").tensors).float()]
            self._scale = SEEN * self._recognition[0].image_size / len(self.data.shards.picture(0))
        self.blocks = Blocks(self.vae) if coarse else None
        if decoder_only:
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def samples(self) -> Crops:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        pixels, weight = batch["pixels"], batch["weight"]
        posterior = self.vae.encode(pixels).latent_dist
        latent = posterior.mean + posterior.std * draws.randn(*posterior.mean.shape[1:])
        if draws.shared() < self.halved and not self.decoder_only:
            latent, pixels, weight = (F.avg_pool2d(x, 2) for x in (latent, pixels, weight))
        made = self.vae.decode(latent).sample if self.blocks is None else self.blocks(self.vae, latent)
        error = (made - pixels).abs()
        slopes = [(_slope(made, axis) - _slope(pixels, axis)).abs() for axis in (2, 3)]
        reconstruction = (weight * error).sum() / (3 * weight.sum())
        gradient = sum((w * s).sum() / (3 * w.sum()) for s, w in zip(slopes, (weight[:, :, 1:], weight[:, :, :, 1:])))
        detail = detail_difference(made, pixels, weight) if self.detail else made.new_zeros(())
        features = self._feature_difference(made, pixels)
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return {
            "loss": self.absolute * reconstruction
            + self.gradient * gradient
            + self.detail * detail
            + self.perceptual * features
            + self.kl * kl,
            "absolute": error.mean(),
            "detail": detail,
            "features": features,
            "kl": kl,
            "deviation": latent.std(),
        }

    def _feature_difference(self, made: Tensor, pixels: Tensor) -> Tensor:
        """Mean over the recognition network's taps of the squared distance of features of unit length (as in LPIPS)."""
        if not self._recognition:
            return made.new_zeros(())
        # The network sees faces about this much larger, or smaller, than they are in the pictures.
        seen = F.interpolate(torch.cat([made, pixels]), scale_factor=self._scale, mode="bilinear", align_corners=False)
        distances = []
        for tap in self._recognition[0].local(seen)[:-1]:
            ours, theirs = F.normalize(tap, dim=1).chunk(2)
            distances.append((ours - theirs).square().sum(dim=1).mean())
        return torch.stack(distances).mean()

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        fast_on_gpu(self.vae, device)
        for network in self._recognition:
            network.to(device)
        if settings.compile:
            self.vae.encoder.compile()
            self.vae.decoder.compile()

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        pixels = self._whole(8).to(draws.device)
        latent = self.vae.encode(pixels).latent_dist.mean
        made = self.vae.decode(latent).sample if self.blocks is None else self.blocks(self.vae, latent)
        rows = torch.cat([torch.cat(list(half), dim=2) for half in (pixels, made)], dim=1)
        return {"reconstruction": rows / 2 + 0.5}

    def _whole(self, number: int) -> Tensor:
        """The first pictures, whole: (number, 3, H, W) in [-1, 1]."""
        number = min(number, len(self.data))
        whole = [torch.from_numpy(self.data.shards.picture(i).copy()).permute(2, 0, 1) for i in range(number)]
        return torch.stack(whole).float() / 127.5 - 1

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """vae.safetensors in diffusers' names; its metadata's scaling_factor gives the latents unit deviation."""
        with torch.no_grad():
            pixels = self._whole(SCALE_PICTURES).to(next(self.parameters()).device)
            deviation = torch.cat([self.vae.encode(part).latent_dist.mean for part in pixels.split(16)]).std()
        facts = {**facts, "scaling_factor": f"{1 / float(deviation):.5f}"}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.vae.state_dict().items()}
        write_tensors(folder / "vae.safetensors", tensors, facts)


def high_pass(picture: Tensor) -> Tensor:
    """A picture (B, C, H, W) without the mean of the 5 x 5 pixels around each; at the edge of those there are."""
    mean = F.avg_pool2d(picture, AROUND, stride=1, padding=AROUND // 2, count_include_pad=False)
    return picture - mean


def detail_difference(made: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    """Mean absolute difference of the high-passes of two pictures (B, 3, H, W), the second the true one.

    weight (B, 1, H, W), beside which a place counts by 1 + 1.6 h, h the true picture's own high-pass there, over its
    mean in that picture. So a mole, dark on smooth skin, counts for more than all the skin about it.
    """
    own = high_pass(pixels)
    strength = own.abs().mean(dim=1, keepdim=True)
    relative = strength / strength.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    counts = weight * (1 + DETAILED * relative)
    return (counts * (high_pass(made) - own).abs()).sum() / (3 * weight.sum())


def _slope(picture: Tensor, axis: int) -> Tensor:
    return picture.diff(dim=axis)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--crop", type=int, default=64, help="side of the crops that it learns from, in pixels")
    parser.add_argument("--kl", type=float, default=2e-4, help="weight of the Kullback-Leibler term")
    parser.add_argument("--halved", type=float, default=0.0, help="share of the steps at half the resolution")
    parser.add_argument("--decoder-only", action="store_true", help="leave the latents as they are")
    parser.add_argument("--coarse", action="store_true", help="leave out the decoder's last two levels, to begin with")
    parser.add_argument("--initial", type=Path, help="vae.safetensors of another run to begin with")
    parser.add_argument("--recognition", type=Path, help="a recognition network whose features pictures should keep")
    parser.add_argument("--perceptual", type=float, default=0.3, help="weight of the difference of these features")
    parser.add_argument(
        "--channels",
        type=int,
        nargs=4,
        default=VAE_CHANNELS,
        metavar="N",
        help=f"of its levels, multiples of the first; default {' '.join(map(str, VAE_CHANNELS))}",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="residual blocks of a level before the bottleneck; more than --initial has are added to it",
    )
    parser.add_argument("--absolute", type=float, default=1.0, help="weight of the difference of pixels")
    parser.add_argument("--gradient", type=float, default=0.5, help="weight of that of their gradients")
    parser.add_argument("--detail", type=float, default=0.0, help="weight of that of high-passes; 2 keeps moles")
    parser.add_argument("--on-faces", type=float, default=ON_FACES, help="share of the crops centred on a face")


def build(options: argparse.Namespace) -> Recipe:
    return VAERecipe(
        options.data,
        crop=options.crop,
        kl=options.kl,
        halved=options.halved,
        decoder_only=options.decoder_only,
        coarse=options.coarse,
        initial=options.initial,
        recognition=options.recognition,
        perceptual=options.perceptual,
        channels=options.channels,
        layers=options.layers,
        absolute=options.absolute,
        gradient=options.gradient,
        detail=options.detail,
        on_faces=options.on_faces,
    )
