"""The identity loss looks at the face that inference would cut out, and pulls the prediction to who it shall be."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from diffusers import AutoencoderKL

from lib_portrait.faces.alignment import align_face, template
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.faces.features import pixels_of, recognition_view
from lib_portrait.faces.recognition import Backbone
from trainer.faces import crop_to
from trainer.features import global_feature
from trainer.identity_loss import TEMPERATURE, FaceLosses, IdentityLoss, Others

WIDTH, HEIGHT = 160, 128
WHO = torch.tensor([[1], [2]])
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


NOBODY = Others(torch.zeros(0, 20), torch.zeros(0, dtype=torch.long))


def loss_with(
    vae: Enlarging, network: Backbone, found: Sequence[Sequence[str]] = (), others: Others = NOBODY
) -> IdentityLoss:
    """With a detector that finds these faces in the pictures shown to it, again and again."""
    turns = itertools.cycle(found)

    def find(image: NDArray[np.uint8]) -> list[Face]:
        if image.shape != (HEIGHT, WIDTH, 3):  # the second try, with a border round the picture
            return []
        faces = [LANDMARKS[name].astype(np.float32) for name in next(turns)]
        return [Face(np.concatenate([face.min(axis=0), face.max(axis=0)]), face, 1.0) for face in faces]

    return IdentityLoss(cast(AutoencoderKL, vae), network, Detector("known", "1", find), 2.0, others)


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
    crops = torch.stack([crop_to(LANDMARKS[name], (WIDTH, HEIGHT)) for name in names])
    found = loss_with(vae, network).faces(latent, crops)
    whole = Enlarging().decode(latent / 2).sample
    assert found.shape == (len(names), 3, 48, 48)
    for own, picture, name in zip(found, whole, names, strict=True):
        image = ((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        expected = recognition_view(pixels_of([align_face(image, LANDMARKS[name], 224)]), 48)[0]
        apart = (own - expected).abs()
        # At the picture's edge the two ways of blending with black differ by a pixel.
        assert apart.median() < 0.01 and apart.mean() < 0.02, (float(apart.median()), float(apart.mean()))


def test_no_more_than_the_face_is_decoded() -> None:
    vae = Enlarging()
    crop = crop_to(LANDMARKS["upright"], (WIDTH, HEIGHT))[None]
    loss_with(vae, backbone()).faces(smooth_latents(1), crop)
    assert vae.seen == [(1, 4, 8, 8)]


def features(loss: IdentityLoss, latent: Tensor, names: list[str]) -> Tensor:
    crops = torch.stack([crop_to(LANDMARKS[name], (WIDTH, HEIGHT)) for name in names])
    return loss.backbone(loss.faces(latent, crops))[1][-1].flatten(2).transpose(1, 2)


def test_it_is_nothing_for_the_very_face_and_its_gradient_leads_there() -> None:
    names = ["upright", "turned"]
    loss = loss_with(Enlarging(), backbone(), [[name] for name in names])
    latent, one = smooth_latents(2), torch.ones(2, 1, dtype=torch.bool)
    own = features(loss, latent, names)[:, None]
    same = loss(latent, own, one, WHO)
    assert same.id_loss == pytest.approx(0, abs=1e-5) and same.found == same.top1 == 1
    other = latent.flip(0).clone().requires_grad_()
    before = loss(other, own, one, WHO).id_loss
    assert before > 1e-3
    for _ in range(20):
        (gradient,) = torch.autograd.grad(loss(other, own, one, WHO).id_loss, other)
        other = (other - 0.5 * gradient / gradient.norm()).detach().requires_grad_()
    assert loss(other, own, one, WHO).id_loss < 0.8 * before
    assert not any(parameter.requires_grad for parameter in loss.backbone.parameters())


def test_the_largest_face_counts_and_a_picture_without_one_does_not() -> None:
    loss = loss_with(Enlarging(), backbone(), [["upright", "turned"], [], ["turned"]])
    latent, one = smooth_latents(3).requires_grad_(), torch.ones(3, 1, dtype=torch.bool)
    own = features(loss, latent, ["turned"] * 3).detach()[:, None]
    who = torch.tensor([[1], [2], [3]])
    like = loss(latent, own, one, who)
    assert like.id_loss.item() == pytest.approx(0, abs=1e-5) and float(like.found) == pytest.approx(2 / 3)
    (gradient,) = torch.autograd.grad(loss(latent, own.flip(0), one, who).id_loss, latent)
    assert gradient.flatten(1).abs().sum(dim=1).ne(0).tolist() == [True, False, True]

    nobody = loss_with(Enlarging(), backbone(), [[], [], []])
    like = nobody(latent, own, one, who)
    (gradient,) = torch.autograd.grad(like.id_loss, latent)
    assert like.id_loss == like.infonce == like.top1 == like.found == 0
    assert not gradient.any(), "a step without any face is a step still"


def test_of_several_people_each_is_held_to_the_face_most_like_them() -> None:
    loss = loss_with(Enlarging(), backbone(), [["upright", "turned"], ["turned"]])
    latent = smooth_latents(2)
    upright, turned = (features(loss, latent, [name] * 2) for name in ("upright", "turned"))
    somebody = features(loss, smooth_latents(4)[2:], ["in profile"] * 2)
    present = torch.tensor([[True, True, False], [False, True, True]])
    intrinsic = torch.stack([upright, turned, somebody], dim=1)
    who = torch.tensor([[1, 2, -1], [-1, 2, 3]])
    like = loss(latent, intrinsic, present, who)
    assert like.id_loss == pytest.approx(0, abs=1e-5) and like.top1 == 1
    assert like.found == 0.75, "the fourth person is in no picture"
    twice = loss(latent[:1], torch.stack([turned, turned], dim=1)[:1], torch.ones(1, 2, dtype=torch.bool), who[:1, :2])
    alone = loss_with(Enlarging(), backbone(), [["upright"]])(
        latent[:1], turned[:1, None], torch.ones(1, 1).bool(), who[:1, :1]
    )
    assert twice.id_loss == pytest.approx(float(alone.id_loss) / 2, rel=1e-4), "two people are never held to one face"


def test_a_face_is_told_from_everybody_but_the_photos_of_its_own_person() -> None:
    """InfoNCE over the people of the picture and the others (WithAnyone, arXiv 2510.14975)."""
    network = backbone()
    latent = smooth_latents(1)
    plain = loss_with(Enlarging(), network, [["upright"]])
    own, second = (features(plain, latent, [name]) for name in ("upright", "turned"))
    made = F.normalize(global_feature(network, own))[0]
    torch.manual_seed(4)
    strangers = F.normalize(torch.randn(3, 20))
    embeddings = torch.cat([made[None], strangers])
    one, two = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)

    def told(who: Sequence[int], intrinsic: Tensor, present: Tensor, people: Sequence[int]) -> FaceLosses:
        others = Others(embeddings, torch.tensor(who))
        loss = loss_with(Enlarging(), network, [["upright"]], others)
        return loss(latent, intrinsic, present, torch.tensor([people]))

    like = told([7, 8, 9, 10], own[:, None], one, [7])
    cosines = torch.cat([torch.ones(1), strangers @ made])
    expected = float(-(cosines / TEMPERATURE).log_softmax(dim=0)[0] * TEMPERATURE)
    assert float(like.infonce) == pytest.approx(expected, abs=1e-5) and like.top1 == 1
    assert float(told([6, 8, 9, 10], own[:, None], one, [7]).infonce) > TEMPERATURE * 0.69, "a twin is somebody else"
    assert told([6, 8, 9, 10], second[:, None], one, [7]).top1 == 0, "more like number 6"

    beside = told([7, 8, 9, 10], torch.stack([own, second], dim=1), two, [7, 11])
    cosines = torch.cat([cosines, F.normalize(global_feature(network, second)) @ made])
    expected = float(-(cosines / TEMPERATURE).log_softmax(dim=0)[0] * TEMPERATURE)
    assert float(beside.infonce) == pytest.approx(expected, abs=1e-5), "from who else is in the picture too"
