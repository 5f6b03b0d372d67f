"""The base model of a world: an SD1-layout UNet and its CLIP-layout text encoder, trained together from scratch.

Noise prediction on SD1's schedule, weighted by Min-SNR; the caption is left out in a share of the samples, for
classifier-free guidance. Needs the latents and tokens of `portrait.py dataset features`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lib_portrait.checkpoints.formats import read_header, read_tensors, write_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import fitting
from trainer.architectures import HEADS, UNET_CHANNELS, unet_like, vae_like, world_text_encoder, world_unet
from trainer.diffusion import NoiseSchedule, add_face_weight, face_weighted
from trainer.drawing import STEPS, ddim_sample, guided
from trainer.draws import Draws
from trainer.faces import faces_of, region_of
from trainer.features import Features, uncaptioned
from trainer.loop import Recipe, Settings, fast_on_gpu
from trainer.shards import FaceRecord, Shards


class Latents:
    """ "latent" (4, h, w) scaled to unit deviation, "caption_ids" (77), "faces" (h, w) the part that faces cover."""

    def __init__(self, shards: Shards, scale: float):
        self.features, self.scale = Features(shards), scale
        self.faces: dict[int, list[FaceRecord]] = {}
        for face in faces_of(shards)[0]:
            self.faces.setdefault(face.sample, []).append(face.record)

    def __len__(self) -> int:
        return len(self.features.latents)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, _ = draw
        if not self.features.usable[index]:
            raise ValueError("its picture cannot be used")
        latent = self.features.latents[index].float() * self.scale
        size, shape = self.features.sizes[index].tolist(), latent.shape[1:]
        regions = [region_of(face, size, shape) for face in self.faces.get(index, ())]
        return {
            "latent": latent,
            "caption_ids": self.features.tokens[index].long(),
            "faces": torch.stack([torch.zeros(shape), *regions]).amax(dim=0),
        }


class BaseRecipe(Recipe):
    """See the module. vae: vae.safetensors of the recipe `vae`, whose metadata hold the latents' scale.

    initial: base.safetensors of another run to begin with. text: one whose text encoder it begins with, whatever the
    UNet beside it is like. fixed_text: the text encoder stays as it was there, so that what was trained against it
    still fits.
    """

    name = "base"

    def __init__(
        self,
        data: Path,
        vae: Path,
        dropped: float = 0.1,
        gamma: float = 5.0,
        initial: Path | None = None,
        face_weight: float = 0.0,
        fixed_text: bool = False,
        channels: Sequence[int] = UNET_CHANNELS,
        layers: int = 1,
        heads: int = HEADS,
        text: Path | None = None,
    ):
        super().__init__()
        self.scale = latent_scale(vae)
        self.data = Latents(Shards.under(data), self.scale)
        self.dropped, self.gamma, self.face_weight, self.schedule = dropped, gamma, face_weight, NoiseSchedule()
        self.heads, self.latent = heads, self.data.features.latents.shape[-1]
        self.text_encoder = world_text_encoder()
        if initial is None:
            self.unet = world_unet(channels, layers, heads, self.latent)
        else:
            own, facts = _stored(initial, "unet")
            self.unet = unet_like(own, facts, initial.name)
            self.heads = int(facts.get("heads", HEADS))
            self.unet.load_state_dict(fitting(self.unet, own, initial.name, "unet."))
        text = text or initial
        if text is not None:
            own, _ = _stored(text, "text_encoder")
            self.text_encoder.load_state_dict(fitting(self.text_encoder, own, text.name, "text_encoder."))
        self.text_encoder.requires_grad_(not fixed_text)
        # Not a child: it is not trained, and only draws pictures for the log.
        self._vae = [vae]

    def networks(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        fast_on_gpu(self.unet, device)
        if settings.checkpointing:
            self.unet.enable_gradient_checkpointing()
        if settings.compile:
            self.unet.compile()

    def samples(self) -> Latents:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        caption_ids = torch.where(draws.rand()[:, None] < self.dropped, uncaptioned(caption_ids), caption_ids)
        noise, t = draws.randn(*latent.shape[1:]), draws.randint(1000)
        text = self.text_encoder(caption_ids).last_hidden_state
        predicted = self.unet(self.schedule(latent, noise, t), t, text).sample
        squared = (predicted.float() - noise).square()
        error = face_weighted(squared, batch["faces"], self.face_weight)
        return {"loss": (self.schedule.weights(t, self.gamma) * error).mean(), "noise_error": squared.mean()}

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Eight pictures of the first captions, as a request with default settings draws them."""
        caption_ids = torch.stack([self.data[i, (0, 0, 0)]["caption_ids"] for i in range(8)]).to(draws.device)
        text = self.text_encoder(torch.cat([uncaptioned(caption_ids), caption_ids])).last_hidden_state

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return guided(*self.unet(x.repeat(2, 1, 1, 1), t.repeat(2), text).sample.chunk(2))

        noise = draws.randn(*self.data.features.latents.shape[1:])[:8]
        end = torch.zeros(8, dtype=torch.long, device=draws.device)
        latent = ddim_sample(noise, end, STEPS, self.schedule, predict)
        tensors = read_tensors(self._vae[0]).tensors
        vae = vae_like(tensors, self._vae[0].name)
        vae.load_state_dict(fitting(vae, tensors, self._vae[0].name))
        pictures = vae.eval().to(draws.device).decode(latent / self.scale).sample / 2 + 0.5
        return {"captions": torch.cat([torch.cat(list(half), dim=2) for half in pictures.chunk(2)], dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """base.safetensors: unet.* and text_encoder.* in diffusers' and transformers' names.

        Its metadata say what the weights do not: the number of heads, and the side of the latents.
        """
        tensors = {
            f"{name}.{key}": tensor.contiguous().cpu()
            for name, network in self.networks().items()
            for key, tensor in network.state_dict().items()
        }
        own = {"heads": str(self.heads), "latent": str(self.latent)}
        write_tensors(folder / "base.safetensors", tensors, {**facts, **own})


def _stored(file: Path, network: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """One of the two networks that a base.safetensors holds, and the file's metadata."""
    stored = read_tensors(file)
    start = f"{network}."
    return {k.removeprefix(start): v for k, v in stored.tensors.items() if k.startswith(start)}, stored.metadata


def latent_scale(vae: Path) -> float:
    """The factor that gives latents unit deviation, from the metadata of vae.safetensors."""
    text = read_header(vae)[1].get("scaling_factor")
    if text is None:
        raise PortraitError("vae", f"{vae.name} does not say its scaling_factor", "Use the recipe vae's export.")
    return float(text)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", type=Path, required=True, help="vae.safetensors, as exported by the recipe vae")
    parser.add_argument("--dropped", type=float, default=0.1, help="share of samples without their caption")
    parser.add_argument("--gamma", type=float, default=5.0, help="Min-SNR's gamma")
    parser.add_argument("--initial", type=Path, help="base.safetensors of another run to begin with, of its widths")
    parser.add_argument(
        "--channels",
        type=int,
        nargs=4,
        default=UNET_CHANNELS,
        metavar="N",
        help=f"of the UNet's levels, multiples of the first; default {' '.join(map(str, UNET_CHANNELS))}",
    )
    parser.add_argument("--layers", type=int, default=1, help="residual blocks of a level, default 1")
    parser.add_argument("--heads", type=int, default=HEADS, help=f"of every attention, default {HEADS}")
    parser.add_argument("--text", type=Path, help="base.safetensors of a run whose text encoder to begin with")
    parser.add_argument(
        "--fixed-text",
        action="store_true",
        help="leave the text encoder of --initial or --text as it is; a vision tower fits on",
    )
    add_face_weight(parser)


def build(options: argparse.Namespace) -> Recipe:
    if options.fixed_text and options.initial is None and options.text is None:
        raise PortraitError(
            "fixed_text", "a text encoder of random weights would stay so", "Give --initial or --text as well."
        )
    return BaseRecipe(
        options.data,
        options.vae,
        options.dropped,
        options.gamma,
        options.initial,
        options.face_weight,
        options.fixed_text,
        options.channels,
        options.layers,
        options.heads,
        options.text,
    )
