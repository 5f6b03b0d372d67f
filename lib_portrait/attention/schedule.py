"""How much signal and noise there is at a timestep, of a model's abar (T,): sqrt(abar) x_0 + sqrt(1 - abar) eps."""

from __future__ import annotations

import torch
from torch import Tensor


def noised(latent: Tensor, t: float, alphas_cumprod: Tensor) -> Tensor:
    """The latent (1, 4, h, w) as it is at timestep t: sqrt(abar) x_0 + sqrt(1 - abar) eps.

    eps is the same whenever the size is. alphas_cumprod: abar (T,). t may lie between two timesteps, as some samplers
    have it; then the logarithm of sqrt((1 - abar) / abar) does between theirs.
    """
    # Drawn on the CPU, so that it is the same on every device.
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)).to(latent)
    low = min(int(t), len(alphas_cumprod) - 1)
    high, share = min(low + 1, len(alphas_cumprod) - 1), t - low
    # The logit of abar is -2 log sigma.
    before, after = alphas_cumprod[[low, high]].double().cpu().logit()
    logit = torch.lerp(before, after, share)
    return latent * logit.sigmoid().sqrt().item() + noise * (-logit).sigmoid().sqrt().item()


def signal_rate(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """alpha_t = sqrt(alphas_cumprod[t]) in float32; between two steps the log SNR is interpolated, as k-diffusion does.

    t: any shape, in [0, T - 1].
    """
    log_snr = torch.logit(alphas_cumprod.to(t.device, torch.float32))
    low = t.long().clamp(0, len(log_snr) - 1)
    high = (low + 1).clamp(max=len(log_snr) - 1)
    return torch.sigmoid(torch.lerp(log_snr[low], log_snr[high], t.float() - low)).sqrt()
