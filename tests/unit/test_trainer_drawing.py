"""What is drawn while a network is trained goes along DDIM, with guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from trainer.diffusion import Noising
from trainer.drawing import draw, guided


def test_drawing_goes_to_each_rows_own_time_along_ddim() -> None:
    """Where the predicted noise is always that of one picture, every way of going there ends in the same place."""
    torch.manual_seed(3)
    noising, noise, picture = Noising(), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    last, seen = torch.tensor([0, 250, 400]), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        abar = noising.alphas_bar[t][:, None, None, None]
        return (x - abar.sqrt() * picture) / (1 - abar).sqrt()

    first = torch.full((3,), 999)
    made = draw(noise, last, 6, noising, predict)
    assert torch.allclose(made, noising(picture, predict(noise, first), last), atol=1e-3)
    times = torch.stack([*seen[:6], last])
    assert len(seen) == 6 + 1 and (times[0] == 999).all() and (times.diff(dim=0) < 0).all()


def test_the_picture_of_a_prediction_is_what_was_noised() -> None:
    torch.manual_seed(2)
    noising, latent, noise = Noising(), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 400, 999])
    assert torch.allclose(noising.denoised(noising(latent, noise, t), noise, t), latent, atol=1e-4)


def test_guidance_goes_beyond_what_the_caption_says() -> None:
    without, told = torch.tensor(1.0), torch.tensor(2.0)
    assert guided(without, told, guidance=5) == 6 and guided(without, told, guidance=1) == 2
