"""The noise schedule that a UNet was made for, what it predicts, and how much its error counts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from lib_portrait.errors import PortraitError

# Stable Diffusion 1: scaled_linear, 1000 steps, noise prediction.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
}


class NoiseSchedule:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, and what a UNet predicts of it: eps, or v.

    v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (arXiv 2202.00512, appendix D). Latents, noise and predictions are
    (B, 4, h, w), t (B) whole numbers in [0, steps). Both predictions are linear in eps and x_0, so guidance holds for
    either.
    """

    def __init__(self, schedule: Mapping[str, Any] = SCHEDULE) -> None:
        """schedule: arguments of diffusers' schedulers, as `Model.schedule` has them."""
        scheduler = DDPMScheduler(**{**SCHEDULE, **schedule})
        self.alphas_bar: Tensor = scheduler.alphas_cumprod
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise PortraitError(
                "checkpoint",
                f"it predicts {self.prediction_type!r}",
                "Use a checkpoint that predicts the noise or v (parameterization eps or v in its .yaml).",
            )

    def __call__(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of a latent x_0."""
        signal, spread = self._factors(t, latent)
        return signal * latent + spread * noise

    def target(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet has to predict."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._factors(t, latent)
        return signal * noise - spread * latent

    def denoised(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The latent x_0 that a prediction stands for."""
        signal, spread = self._factors(t, noisy)
        if self.prediction_type == "epsilon":
            return (noisy - spread * predicted) / signal
        return signal * noisy - spread * predicted

    def noise(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        """The noise eps that a prediction stands for."""
        if self.prediction_type == "epsilon":
            return predicted
        signal, spread = self._factors(t, noisy)
        return signal * predicted + spread * noisy

    def weights(self, t: Tensor, gamma: float) -> Tensor:
        """Min-SNR's weight of the squared error of a prediction (arXiv 2303.09556, sec. 3.4): (B).

        min(SNR, gamma) / SNR for the noise, min(SNR, gamma) / (SNR + 1) for v.
        """
        abar = self.alphas_bar.to(t.device)[t]
        snr = abar / (1 - abar)
        return snr.clamp(max=gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1)."""
        abar = self.alphas_bar.to(like)[t][:, None, None, None]
        return abar.sqrt(), (1 - abar).sqrt()


def face_weighted(squared: Tensor, faces: Tensor, weight: float) -> Tensor:
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
