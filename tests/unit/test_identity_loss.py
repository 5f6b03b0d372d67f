"""The identity loss looks at the face that inference would cut out, and pulls the prediction to who it shall be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from lib_portrait.faces.alignment import template
from lib_portrait.faces.features import pixels_of, recognition_view
from lib_portrait.faces.recognition import Backbone
from trainer import identity_loss
from trainer.diffusion import Noising
from trainer.faces import aligned, crop_of
from trainer.identity_loss import LATEST, IdentityLoss
from trainer.shards import FaceRecord

WIDTH, HEIGHT = 160, 128
LANDMARKS = {
    "upright": template(56) + np.array((50, 30)),
    "turned": (template(70) - 35) @ np.array([[0.9, -0.43], [0.43, 0.9]]) + np.array((75, 66)),
    "in profile": (template(60) - 30) * np.array((0.4, 1)) + np.array((70, 60)),
    "over the edge": template(64) - np.array((14, 9)),
    "larger than the picture": template(200) - np.array((20, 30)),
}


class Enlarging(nn.Module):
    """Instead of a decoder: the first three channels, 8 pixels to a position."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def decode(self, latent: Tensor) -> SimpleNamespace:
        self.seen.append(tuple(latent.shape))
        return SimpleNamespace(sample=F.interpolate(latent[:, :3], scale_factor=8, mode="nearest"))


def record(landmarks: np.ndarray) -> FaceRecord:
    points = tuple((float(x), float(y)) for x, y in landmarks)
    return FaceRecord("somebody", "woman", (0.0, 0.0, 1.0, 1.0), points)


def backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(blocks=(1, 1, 1, 1), widths=(8, 8, 12, 16, 24), embedding=20, image_size=48)


def smooth_latents(number: int) -> Tensor:
    """Latents in [-1, 1], scaled by 2, that change little from one position to the next."""
    torch.manual_seed(1)
    coarse = torch.rand(number, 4, 3, 4) * 2 - 1
    return 2 * F.interpolate(coarse, size=(HEIGHT // 8, WIDTH // 8), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("names", [[name] for name in LANDMARKS] + [list(LANDMARKS)], ids=lambda names: "+".join(names))
def test_the_face_is_the_one_that_alignment_cuts_out_of_the_whole_picture(names: list[str]) -> None:
    vae, network = Enlarging(), backbone()
    latent = smooth_latents(len(names))
    records = [record(LANDMARKS[name]) for name in names]
    crops = torch.stack([crop_of(one, (WIDTH, HEIGHT)) for one in records])
    found = IdentityLoss(vae, network, scale=2.0).faces(latent, crops)
    whole = Enlarging().decode(latent / 2).sample
    assert found.shape == (len(names), 3, 48, 48)
    for own, picture, one in zip(found, whole, records, strict=True):
        image = ((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        expected = recognition_view(pixels_of([aligned(image, one, 224)]), 48)[0]
        apart = (own - expected).abs()
        # At the picture's edge the two ways of blending with black differ by a pixel.
        assert apart.median() < 0.01 and apart.mean() < 0.02, (float(apart.median()), float(apart.mean()))


def test_no_more_than_the_face_is_decoded() -> None:
    vae = Enlarging()
    crop = crop_of(record(LANDMARKS["upright"]), (WIDTH, HEIGHT))[None]
    IdentityLoss(vae, backbone(), scale=2.0).faces(smooth_latents(1), crop)
    assert vae.seen == [(1, 4, 8, 8)]


def features(loss: IdentityLoss, latent: Tensor, crops: Tensor) -> Tensor:
    return loss.backbone(loss.faces(latent, crops))[1][-1].flatten(2).transpose(1, 2)


def test_it_is_nothing_for_the_very_face_and_its_gradient_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_loss, "SHARE", 1.0)
    loss = IdentityLoss(Enlarging(), backbone(), scale=2.0)
    latent = smooth_latents(2)
    crops = torch.stack([crop_of(record(LANDMARKS[name]), (WIDTH, HEIGHT)) for name in ("upright", "turned")])
    early, asked = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    own = features(loss, latent, crops)
    assert loss(latent, early, asked, crops, own) == pytest.approx(0, abs=1e-5)
    other = latent.flip(0).clone().requires_grad_()
    before = loss(other, early, asked, crops, own)
    assert before > 1e-3
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(other, early, asked, crops, own), other)
        other = (other - 0.5 * gradient / gradient.norm()).detach().requires_grad_()
    assert loss(other, early, asked, crops, own) < 0.8 * before
    assert not any(parameter.requires_grad for parameter in loss.backbone.parameters())


def test_rows_without_a_face_and_with_much_noise_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_loss, "SHARE", 0.5)
    loss = IdentityLoss(Enlarging(), backbone(), scale=2.0)
    latent = smooth_latents(4).requires_grad_()
    crops = crop_of(record(LANDMARKS["upright"]), (WIDTH, HEIGHT)).expand(4, 2, 3)
    own = features(loss, latent.flip(0), crops).detach()
    t = torch.tensor([LATEST, 10, 20, 30])
    asked = torch.tensor([True, False, True, True])
    (gradient,) = torch.autograd.grad(loss(latent, t, asked, crops, own), latent)
    assert gradient.flatten(1).abs().sum(dim=1).ne(0).tolist() == [False, False, True, True]
    (gradient,) = torch.autograd.grad(loss(latent, t, torch.ones(4, dtype=torch.bool), crops, own), latent)
    assert gradient.flatten(1).abs().sum(dim=1).ne(0).tolist() == [False, True, True, False], "half of the batch"
    assert loss(latent, t + 1000, asked, crops, own) == 0


def test_the_picture_of_a_prediction_is_what_was_noised() -> None:
    torch.manual_seed(2)
    noising, latent, noise = Noising(), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    t = torch.tensor([0, 400, 999])
    assert torch.allclose(noising.denoised(noising(latent, noise, t), noise, t), latent, atol=1e-4)
