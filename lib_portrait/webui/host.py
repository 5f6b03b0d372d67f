"""What a method may ask of the WebUI's model before it draws: `methods.base.Host`, as `standalone.host` for diffusers.

Everything goes through the host's own functions, which move the networks (medvram, lowvram), cast (half precision,
upcast sampling, fp8) and apply LoRAs, hypernetworks and embeddings as in the sampling itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from modules import devices, lowvram, prompt_parser, sd_samplers_common, sd_vae, shared
from torch import Tensor, nn

from lib_portrait.attention.rows import word_positions
from lib_portrait.errors import PortraitError
from lib_portrait.webui import hooks

# Of an inpainting model: what is painted (1), and the latent of what is not (4).
INPAINTING_CHANNELS = 5
# `approximation` of `samples_to_images_tensor` for none.
FULL_DECODING = 0
VAE_REMEDY = "Choose another VAE, or start the WebUI with --no-half-vae."


class WebuiHost:
    """The WebUI's loaded model: SD1 and SD2 (ldm), SDXL (sgm), and their inpainting models.

    size: (width, height) in pixels of the pictures that are drawn, which SDXL's conditions tell.
    """

    def __init__(self, sd_model: Any, size: tuple[int, int]):
        self.sd_model = sd_model
        self.size = size
        self._unpainted: dict[tuple[int, int], Tensor] = {}

    @property
    def unet(self) -> nn.Module:
        return self.sd_model.model.diffusion_model

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32, of the model's schedule as the settings change it (zero terminal SNR)."""
        return self.sd_model.alphas_cumprod.float()

    @property
    def prediction(self) -> Literal["epsilon", "v"]:
        return "v" if self.sd_model.parameterization == "v" else "epsilon"

    @property
    def state(self) -> Hashable:
        """Changes with all of the host's that gives other latents, contexts or UNet outputs of the same input."""
        info = self.sd_model.sd_checkpoint_info
        hypernetworks = tuple((one.name, one.multiplier) for one in shared.loaded_hypernetworks)
        schedule = float(self.sd_model.alphas_cumprod[-1])
        skipped = shared.opts.CLIP_stop_at_last_layers
        return info.filename, info.sha256, sd_vae.loaded_vae_file, schedule, skipped, hypernetworks, lora_state()

    def latent(self, picture: np.ndarray) -> Tensor:
        """(1, 4, H / 8, W / 8) float32 of a picture (H, W, 3) uint8 RGB, scaled as the UNet sees it.

        The mean of the posterior, so that a picture has one latent. H and W are multiples of 8. Raises PortraitError
        where the VAE gives infinities or NaN.
        """
        return self._encode(torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1)

    @torch.no_grad()
    def picture(self, latent: Tensor) -> np.ndarray:
        """The picture (H, W, 3) uint8 RGB of a latent (1, 4, H / 8, W / 8), by the whole VAE.

        Also within a call of the UNet: what the host has moved off the device for the VAE (medvram) is back there
        afterwards. Raises PortraitError where the VAE gives infinities or NaN.
        """
        decoded = sd_samplers_common.samples_to_images_tensor(latent, FULL_DECODING, self.sd_model)
        if lowvram.is_enabled(self.sd_model):
            for hook in list(self.sd_model.model._forward_pre_hooks.values()):
                hook(self.sd_model.model, ())
        if not bool(decoded.isfinite().all()):
            raise PortraitError("model", "its VAE gives infinite or undefined numbers", VAE_REMEDY, 500)
        pixels = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(1, 2, 0).cpu().numpy()

    def text(self, prompt: str) -> Any:
        """The conditions of a prompt as the host has them: (1, n, D), or SDXL's mapping."""
        width, height = self.size
        with torch.no_grad(), devices.autocast():
            return self.sd_model.get_learned_conditioning(
                prompt_parser.SdConditioning([prompt], width=width, height=height)
            )

    def positions(self, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
        """Where a word stands in the context of a prompt with emphasis, breaks and embeddings; () where it does not."""
        chunks, _ = self._embedder.tokenize_line(prompt)
        (tokens,) = self._embedder.tokenize([word])
        return word_positions([token for chunk in chunks for token in chunk.tokens], tokens)

    def emphasis(self, prompt: str) -> tuple[float, ...]:
        """What each position of the prompt's context is multiplied with, but for the restored mean of all of it."""
        chunks, _ = self._embedder.tokenize_line(prompt)
        weights = tuple(float(weight) for chunk in chunks for weight in chunk.multipliers)
        return (1.0,) * len(weights) if shared.opts.emphasis == "Ignore" else weights

    @property
    def _embedder(self) -> Any:
        """What makes tokens of prompts; SDXL has two text encoders, whose tokens are the same."""
        text_model = self.sd_model.cond_stage_model
        return next(one for one in getattr(text_model, "embedders", [text_model]) if hasattr(one, "tokenize_line"))

    def call(self, latent: Tensor, t: Tensor, context: Any) -> Tensor:
        """The UNet's output (B, 4, h, w) for latents (B, 4, h, w), timesteps (B,) or (), conditions of B rows or one.

        An inpainting model is asked to paint everything. Raises PortraitError for models with inputs that nothing can
        be put into here (depth, instruct-pix2pix, unCLIP).
        """
        rows = len(latent)
        if isinstance(context, Mapping):
            conditions = {key: value.expand(rows, *value.shape[1:]) for key, value in context.items()}
        else:
            conditions = {"c_crossattn": [context.expand(rows, -1, -1)]}
        if concatenated := self._concatenated(latent):
            conditions["c_concat"] = concatenated
        with _alone(self.unet):
            return self.sd_model.apply_model(latent, t.expand(rows), conditions)

    def bare(self) -> contextlib.AbstractContextManager[None]:
        return hooks.left_out(self.unet)

    def adds_to(self, layer: nn.Module) -> bool:
        return hooks.adds_to(layer)

    def _concatenated(self, latent: Tensor) -> list[Tensor]:
        """What stands beside the latent's channels at the UNet's entry."""
        unet: Any = self.unet
        channels = unet.in_channels - latent.shape[1]
        if "adm" in str(self.sd_model.model.conditioning_key) or channels not in (0, INPAINTING_CHANNELS):
            raise PortraitError(
                "model",
                "its UNet takes more than a latent and a text",
                "Load a text-to-image or an inpainting checkpoint.",
            )
        if not channels:
            return []
        shape = (latent.shape[-2], latent.shape[-1])
        if shape not in self._unpainted:
            # As the host fills them in txt2img: a grey picture, all of which is to be painted.
            grey = self._encode(torch.zeros(1, 3, *(8 * side for side in shape)))
            self._unpainted[shape] = torch.cat([torch.ones_like(grey[:, :1]), grey], dim=1)
        return [self._unpainted[shape].to(latent).expand(len(latent), -1, -1, -1)]

    # sgm's VAE draws from its posterior, and with it from the random numbers of others.
    @torch.random.fork_rng(devices=())
    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior of pixels (1, 3, H, W) in [-1, 1]."""
        vae = self.sd_model.first_stage_model
        moments: list[Tensor] = []
        hook = vae.quant_conv.register_forward_hook(lambda module, args, output: moments.append(output))
        try:
            with devices.without_autocast():
                self.sd_model.encode_first_stage(pixels.to(devices.device, devices.dtype_vae))
        finally:
            hook.remove()
        mean = moments[0].chunk(2, dim=1)[0].float() * self.sd_model.scale_factor
        if not bool(mean.isfinite().all()):
            raise PortraitError("model", "its VAE gives infinite or undefined numbers", VAE_REMEDY, 500)
        return mean


@contextlib.contextmanager
def _alone(unet: nn.Module) -> Iterator[None]:
    """Without the `forward` that ControlNet and others put on the UNet's instance, and without what its units hang onto
    layers: what they do there is for the pictures that are drawn, in calls that they have marked."""
    theirs = vars(unet).pop("forward", None)
    try:
        with hooks.left_out(unet):
            yield
    finally:
        if theirs is not None:
            unet.forward = theirs


def lora_state() -> Hashable:
    """Changes with the networks that the built-in Lora extension has loaded, for it may apply them without touching
    weights ("Lora/Networks: use old method" in its settings)."""
    loaded = getattr(sys.modules.get("networks"), "loaded_networks", ())
    return tuple((net.name, net.te_multiplier, net.unet_multiplier, net.dyn_dim) for net in loaded)
