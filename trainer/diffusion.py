"""SD1's noise schedule and the loss of noise prediction."""

from __future__ import annotations

import argparse

from diffusers import DDPMScheduler
from torch import Tensor

# Stable Diffusion 1: scaled_linear, 1000 steps, noise prediction.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
}


class Noising:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps."""

    def __init__(self) -> None:
        self.alphas_bar: Tensor = DDPMScheduler(**SCHEDULE).alphas_cumprod

    def __call__(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """latent, noise (B, 4, h, w), t (B) whole numbers in [0, 1000) -> the noisy latent."""
        abar = self.alphas_bar.to(latent)[t][:, None, None, None]
        return abar.sqrt() * latent + (1 - abar).sqrt() * noise

    def denoised(self, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latent x_0 that a prediction of the noise stands for; all as in `__call__`."""
        abar = self.alphas_bar.to(noisy)[t][:, None, None, None]
        return (noisy - (1 - abar).sqrt() * noise) / abar.sqrt()

    def weights(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR, the weight of the squared error of the noise (Min-SNR, arXiv 2303.09556): (B)."""
        abar = self.alphas_bar.to(t.device)[t]
        snr = abar / (1 - abar)
        return snr.clamp(max=gamma) / snr


def emphasised(squared: Tensor, faces: Tensor, weight: float) -> Tensor:
    """The squared error (B, 4, h, w) averaged over each sample, where faces count 1 + weight times: (B).

    faces: the part of each position that faces cover, (B, h, w) in [0, 1]. A face is a quarter of a portrait or less,
    and what it will be judged by.
    """
    counts = (1 + weight * faces)[:, None]
    return (squared * counts).mean(dim=(1, 2, 3)) / counts.mean(dim=(1, 2, 3))


def add_face_weight(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--face-weight", type=float, default=0.0, help="how much more the error counts where faces are; default 0"
    )
