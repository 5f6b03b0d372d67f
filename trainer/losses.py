"""Losses that are not one recipe's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CurricularFace(nn.Module):
    """CurricularFace (arXiv 2004.00288): a margin for the true class, weights for hard negatives that grow as t does.

    t follows the mean cosine of the true class (eq. 6 there, with alpha), so that hard negatives count little early and
    much late. embeddings (B, d), classes (B) whole numbers -> the cross entropy of s times the modulated cosines.
    """

    t: Tensor

    def __init__(self, width: int, classes: int, margin: float = 0.5, scale: float = 64.0, alpha: float = 0.01):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width) * 0.01)
        self.margin, self.scale, self.alpha = margin, scale, alpha
        self.register_buffer("t", torch.zeros(()))

    def forward(self, embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the share of samples whose true class has the largest cosine."""
        cosines = (F.normalize(embeddings) @ F.normalize(self.weight).T).clamp(-1, 1)
        true = cosines.gather(1, classes[:, None])
        # cos(theta + m), and past theta = pi - m, where it would rise again, a straight line instead.
        sines = (1 - true**2).clamp(min=1e-7).sqrt()
        margin = torch.tensor(self.margin)
        with_margin = true * torch.cos(margin) - sines * torch.sin(margin)
        linear = true - torch.sin(torch.pi - margin) * margin
        target = torch.where(true > torch.cos(torch.pi - margin), with_margin, linear)
        if self.training:
            with torch.no_grad():
                self.t.lerp_(true.mean(), self.alpha)
        hard = cosines > with_margin
        logits = torch.where(hard, cosines * (self.t + cosines), cosines).scatter(1, classes[:, None], target)
        right = (cosines.argmax(dim=1) == classes).float().mean()
        return F.cross_entropy(self.scale * logits, classes), right


def contrastive(pictures: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss of (B, d) pictures and texts, and how often the right text was the nearest."""
    logits = scale * F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(dim=1) == target).float().mean()


def infonce(own: Tensor, cosines: Tensor, temperature: float) -> Tensor:
    """InfoNCE (arXiv 1807.03748) in cosines: -tau log softmax at `own` of all `cosines` (K), which it is one of.

    0 where nobody else comes near, tau log 2 where one other is as like, and with many of them more.
    """
    return temperature * (cosines / temperature).logsumexp(dim=0) - own
