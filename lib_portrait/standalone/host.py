"""What a method may ask of diffusers' model before it draws: `methods.base.Host`, as `webui.host` is for the WebUI."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lib_portrait.attention.rows import word_positions
from lib_portrait.standalone.model import Model


class DiffusersHost:
    """A `Model`, whose networks stay where they are and as they are."""

    def __init__(self, model: Model):
        self.model = model

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.model.unet

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32, of the model's own schedule."""
        return DDPMScheduler(**self.model.schedule).alphas_cumprod.to(self.model.device)

    @property
    def prediction(self) -> Literal["epsilon", "v"]:
        return "v" if self.model.schedule["prediction_type"] == "v_prediction" else "epsilon"

    @property
    def state(self) -> Hashable:
        return self.model.number

    @torch.no_grad()
    def latent(self, picture: np.ndarray) -> Tensor:
        """(1, 4, H / 8, W / 8) float32 of a picture (H, W, 3) uint8 RGB, scaled as the UNet sees it.

        The mean of the posterior, so that a picture has one latent. H and W are multiples of 8.
        """
        pixels = torch.from_numpy(picture).to(self.model.device).permute(2, 0, 1)[None] / 127.5 - 1
        return self.model.vae.encode(pixels).latent_dist.mode() * self.model.vae.config.scaling_factor

    @torch.no_grad()
    def picture(self, latent: Tensor) -> np.ndarray:
        """The picture (H, W, 3) uint8 RGB of a latent (1, 4, H / 8, W / 8) as the UNet sees it."""
        decoded = self.model.vae.decode(latent.to(self.model.vae.dtype) / self.model.vae.config.scaling_factor).sample
        return as_pixels(decoded)[0]

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The context (1, 77, D) of a prompt."""
        return encode_prompts(self.model, [prompt])

    def positions(self, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
        """Where a word stands in the prompt's context; () where it does not, or beyond what the model reads."""
        length = self.model.text_encoder.config.max_position_embeddings
        tokens = self.model.tokenizer(prompt, verbose=False).input_ids[: length - 1]
        return word_positions(tokens, self.model.tokenizer(word, add_special_tokens=False).input_ids)

    def emphasis(self, prompt: str) -> tuple[float, ...]:
        """1 for each position: prompts have no emphasis here."""
        return (1.0,) * self.model.text_encoder.config.max_position_embeddings

    def call(self, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The UNet's output (B, 4, h, w) for latents (B, 4, h, w), timesteps (B,) or () and contexts (B or 1, n, D)."""
        dtype = self.model.unet.dtype
        context = context.expand(len(latent), -1, -1)
        return self.model.unet(latent.to(dtype), t.expand(len(latent)), context.to(dtype)).sample

    def bare(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def adds_to(self, layer: nn.Module) -> bool:
        return False


def as_pixels(decoded: Tensor) -> list[np.ndarray]:
    """What the VAE gives, (B, 3, H, W) in about [-1, 1], as pictures (H, W, 3) uint8 RGB."""
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def encode_prompts(model: Model, prompts: Sequence[str]) -> Tensor:
    """The text's context (B, 77, D). A prompt of more than 77 tokens is cut there, with a warning that says so."""
    tokenizer, length = model.tokenizer, model.text_encoder.config.max_position_embeddings
    for prompt in prompts:
        numbers = tokenizer(prompt, verbose=False).input_ids
        if len(numbers) > length:
            lost = tokenizer.decode(numbers[length - 1 : -1]).strip()
            warnings.warn(
                f"the prompt has {len(numbers)} tokens, the model reads {length}; left out: {lost!r}", stacklevel=3
            )
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return model.text_encoder(tokens.input_ids.to(model.device)).last_hidden_state
