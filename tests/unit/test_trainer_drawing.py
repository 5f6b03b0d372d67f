"""What is drawn while a network is trained goes along DDIM, with guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from lib_portrait.errors import PortraitError
from trainer.diffusion import NoiseSchedule
from trainer.drawing import ddim_sample, guided

# The schedule of a checkpoint that predicts v, and betas that are not SD1's.
OTHER = {"num_train_timesteps": 800, "beta_start": 0.0005, "beta_end": 0.02, "prediction_type": "v_prediction"}
SCHEDULES = pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule(OTHER)], ids=["epsilon", "v"])


@SCHEDULES
def test_drawing_goes_to_each_rows_own_time_along_ddim(schedule: NoiseSchedule) -> None:
    """Where what is predicted is always of one picture, every way of going there ends in the same place."""
    torch.manual_seed(3)
    noise, picture = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    last, seen, end = torch.tensor([0, 250, 400]), [], len(schedule.alphas_bar) - 1

    def noise_in(x: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_bar[t][:, None, None, None]
        return (x - abar.sqrt() * picture) / (1 - abar).sqrt()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return schedule.target(picture, noise_in(x, t), t)

    first = torch.full((3,), end)
    made = ddim_sample(noise, last, 6, schedule, predict)
    assert torch.allclose(made, schedule(picture, noise_in(noise, first), last), atol=1e-3)
    times = torch.stack([*seen, last])
    assert len(seen) == 6 and (times[0] == end).all() and (times.diff(dim=0) < 0).all()


@SCHEDULES
def test_a_prediction_stands_for_the_picture_and_the_noise_that_were_mixed(schedule: NoiseSchedule) -> None:
    torch.manual_seed(2)
    latent, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 400, len(schedule.alphas_bar) - 1])
    noisy, predicted = schedule(latent, noise, t), schedule.target(latent, noise, t)
    assert torch.allclose(schedule.denoised(noisy, predicted, t), latent, atol=1e-4)
    assert torch.allclose(schedule.noise(noisy, predicted, t), noise, atol=1e-4)


def test_what_v_is_and_how_much_its_error_counts() -> None:
    """arXiv 2202.00512, appendix D, and arXiv 2303.09556: an error of v is one of the picture, times SNR + 1."""
    schedule, t = NoiseSchedule(OTHER), torch.tensor([10, 500])
    latent, noise = torch.full((2, 4, 1, 1), 2.0), torch.full((2, 4, 1, 1), 3.0)
    abar = schedule.alphas_bar[t]
    assert len(schedule.alphas_bar) == 800
    assert torch.allclose(schedule.target(latent, noise, t)[:, 0, 0, 0], 3 * abar.sqrt() - 2 * (1 - abar).sqrt())
    snr = abar / (1 - abar)
    assert torch.allclose(schedule.weights(t, 5.0), snr.clamp(max=5) / (snr + 1))
    assert torch.allclose(NoiseSchedule().weights(t, 1e9), torch.ones(2)), "all errors of the noise count alike"


def test_what_nothing_here_predicts_is_refused() -> None:
    with pytest.raises(PortraitError, match="sample"):
        NoiseSchedule({"prediction_type": "sample"})


def test_guidance_goes_beyond_what_the_caption_says() -> None:
    uncond, cond = torch.tensor(1.0), torch.tensor(2.0)
    assert guided(uncond, cond, guidance=5) == 6 and guided(uncond, cond, guidance=1) == 2
