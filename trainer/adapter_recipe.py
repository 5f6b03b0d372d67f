"""What the recipes of all methods share: an adapter that is trained on a frozen model, and its export with its kit."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_portrait.attention import Injection
from lib_portrait.checkpoints.files import AdapterFiles
from lib_portrait.checkpoints.formats import SAFETENSORS_SUFFIX, write_tensors
from lib_portrait.checkpoints.kit import SUFFIX, Manifest, bare_name, write_manifest
from lib_portrait.standalone.model import Model, load_model
from trainer import companions
from trainer.companions import Companion
from trainer.diffusion import NoiseSchedule, add_face_weight, face_weighted
from trainer.drawing import STEPS, ddim_sample, guided
from trainer.draws import Draws
from trainer.features import Features, uncaptioned
from trainer.loop import Recipe, Samples, Settings

# Of how many of the first samples TensorBoard has pictures.
SHOWN = 4


class AdapterRecipe(Recipe):
    """An adapter on a frozen model of SD1.5's layout, the world's or any other.

    files: what the method's weights are called. data: latents with their captions, and `features` of the shards that
    they come from. Frozen things stay out of children(): they are neither trained nor saved.
    """

    files: AdapterFiles
    data: Any

    def __init__(self, options: argparse.Namespace):
        """options: those of `add_adapter_options`."""
        super().__init__()
        self.adapter_name = bare_name(options.name, "name")
        self.base, self.licence = options.checkpoint, options.licence
        self.gamma, self.face_weight = options.gamma, options.face_weight
        model = load_model(options.checkpoint)
        model.unet.requires_grad_(False).eval()
        model.text_encoder.requires_grad_(False).eval()
        self.schedule = NoiseSchedule(model.schedule)
        self.companions: Sequence[Companion] = ()
        self.injections: Sequence[Injection] = ()
        self._frozen: dict[str, Any] = {"model": model}

    @property
    def model(self) -> Model:
        return self._frozen["model"]

    @property
    def hashes(self) -> Mapping[str, str]:
        """SHA-256, by role, of the networks that the features of faces come from."""
        features: Features = self.data.features
        return features.hashes

    def samples(self) -> Samples:
        return self.data

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        for network in (self.model.unet, self.model.text_encoder):
            network.to(device, dtype)
        if settings.checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            # Checkpointing works in training mode only; the UNet has no dropout that this would switch on.
            self.model.unet.train()

    @torch.no_grad()
    def encoded(self, caption_ids: Tensor) -> Tensor:
        """The text encoder's last hidden state (B, 77, d) of captions (B, 77)."""
        return self.model.text_encoder(caption_ids).last_hidden_state

    def predicted(self, noisy: Tensor, t: Tensor, text: Tensor, **residuals: Any) -> Tensor:
        """What the injected UNet predicts of `noisy` (B, 4, h, w), in float32. text (B, 77, d): with its rows' marks.

        residuals: a ControlNet's, by the names that diffusers' UNet has for them.
        """
        unet = self.model.unet
        predicted = unet(noisy.to(unet.dtype), t, text, **residuals).sample
        # Gradient checkpointing runs the layers again during the backward pass, and the rules must act there too.
        for injection in self.injections:
            injection.resume()
        return predicted.float()

    def noised(self, latent: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, 4, h, w), any t (B), and x_t (B, 4, h, w) of latents."""
        noise, t = draws.randn(*latent.shape[1:]), draws.randint(len(self.schedule.alphas_bar))
        return noise, t, self.schedule(latent, noise, t)

    def diffusion_loss(self, predicted: Tensor, latent: Tensor, noise: Tensor, t: Tensor, faces: Tensor) -> Tensor:
        """L_diff of a batch, (): the squared error of the prediction (UniPortrait eq. 1, OmniPortrait eq. 5).

        With `--face-weight` it counts more where faces (B, h, w) in [0, 1] are, with `--gamma` by Min-SNR's weight.
        """
        squared = (predicted - self.schedule.target(latent, noise, t)).square()
        error = face_weighted(squared, faces, self.face_weight)
        weight = self.schedule.weights(t, self.gamma) if self.gamma else torch.ones_like(error)
        return (weight * error).mean()

    def first_samples(self, device: torch.device) -> dict[str, Tensor]:
        """The batch of the first samples, which TensorBoard shows."""
        first = [self.data[i, (0, 0, 0)] for i in range(min(SHOWN, len(self.data)))]
        return {name: torch.stack([sample[name] for sample in first]).to(device) for name in first[0]}

    @torch.no_grad()
    def drawn(
        self,
        batch: Mapping[str, Tensor],
        draws: Draws,
        predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Latents (B, 4, h, w) of a batch's captions, drawn as a request with default settings draws them.

        predict: what the UNet predicts (2B, 4, h, w) of x_t, t, captions, and of which rows are the positive ones
        (2B); the first half are the unconditional rows, without a caption.
        """
        rows, caption_ids = len(batch["latent"]), batch["caption_ids"]
        ids = torch.cat([uncaptioned(caption_ids), caption_ids])
        positive = torch.arange(2 * rows, device=draws.device) >= rows

        def both(x: Tensor, t: Tensor) -> Tensor:
            return guided(*predict(x.repeat(2, 1, 1, 1), t.repeat(2), ids, positive).chunk(2))

        end = torch.zeros(rows, dtype=torch.long, device=draws.device)
        return ddim_sample(draws.randn(*batch["latent"].shape[1:])[:rows], end, STEPS, self.schedule, both)

    @torch.no_grad()
    def decoded(self, latent: Tensor) -> Tensor:
        """The pictures (B, 3, H, W) in [0, 1] of latents of unit deviation."""
        vae = self.model.vae.to(latent.device)
        return (vae.decode(latent / self.data.scale).sample.float() / 2 + 0.5).clamp(0, 1)

    def write_adapter(
        self,
        folder: Path,
        role: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        training: Mapping[str, str],
        adapter: Mapping[str, str] | None = None,
        **entries: Any,
    ) -> Path:
        """Writes a file of the adapter, in fp16, what it cannot be used without, and the kit's manifest that names all.

        role: of the file. metadata: of the file, beside the hashes of the features. training, entries: of the manifest.
        adapter: the adapter's other files, by role. Returns the file's path.
        """
        part = next(one for one in self.files.parts if one.role == role)
        names = part.filenames(self.adapter_name)
        path = folder / next(name for name in names if name.endswith(SAFETENSORS_SUFFIX))
        half = {name: tensor.detach().half().contiguous().cpu() for name, tensor in tensors.items()}
        write_tensors(path, half, {**metadata, "features": str(sorted(self.data.features.hashes.items()))})
        for companion in self.companions:
            companion.export_to(folder)
        manifest = Manifest(
            name=self.adapter_name,
            method=self.files.method,
            adapter={**(adapter or {}), role: path.name},
            encoders=companions.encoder_files(self.files, self.companions, self.hashes),
            training=training,
            **companions.of_base(self.base, self.model, self.licence),
            **entries,
        )
        write_manifest(folder / f"{self.adapter_name}{SUFFIX}", manifest)
        return path


def side_by_side(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in a row: (3, H, B W)."""
    return torch.cat(list(pictures), dim=2)


def with_share(
    groups: Sequence[Mapping[str, Any]], some: Sequence[Tensor], share: float, rate: float
) -> list[dict[str, Any]]:
    """Parameter groups in which `some` of the parameters learn at a share of the rate."""
    chosen, split = {id(parameter) for parameter in some}, []
    for group in groups:
        for theirs in (True, False):
            params = [p for p in group["params"] if (id(p) in chosen) is theirs]
            split.append({**group, "params": params, "lr": rate * (share if theirs else 1.0)})
    return [group for group in split if group["params"]]


def add_adapter_options(parser: argparse.ArgumentParser, files: AdapterFiles) -> None:
    stems = sorted({part.stem.format(name="NAME") for part in files.parts})
    parser.add_argument("--checkpoint", type=Path, required=True, help="the base model, a single SD1.5 file")
    parser.add_argument("--name", required=True, help=f"NAME in {' and '.join(stems)}{SAFETENSORS_SUFFIX}")
    parser.add_argument("--licence", metavar="TEXT", help="of the adapter, for its manifest; default: the base kit's")
    parser.add_argument("--gamma", type=float, default=0.0, help="Min-SNR's gamma; 0 for the plain loss")
    add_face_weight(parser)
