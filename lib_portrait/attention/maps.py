"""Who was put where in a picture: routing maps, and what of it attends to a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_portrait.attention.injection import Call
from lib_portrait.attention.sites import Site


class RoutingMaps:
    """Collects where each person went in each picture: per site and step, and averaged over both.

    A map tells for every position which of N people it was given to: the one that a router chose, or those whose
    region it lies in. The choice and not the router's softmax: it is what the picture was made with, and in the mean
    over sites and steps it still tells people apart where each softmax decides by little. Where a picture has
    several positive rows, its map is the mean of theirs.
    """

    def __init__(self, keep_all: bool = False):
        self.keep_all = keep_all
        self.maps: dict[tuple[int, float, int], Tensor] = {}
        """(site number, progress, picture) -> (N, h, w) of the last call; filled only with `keep_all`."""
        self._sums: dict[tuple[int, int], dict[int, tuple[Tensor, int]]] = {}
        self._last: tuple[int, int] | None = None

    def add(self, site: Site, call: Call, pictures: Sequence[int], shares: Tensor) -> None:
        """shares (rows, n, N) of the positive rows of a call; pictures: the number of each row's picture."""
        if site.index in call.repeated:
            return
        h, w = call.shape_at(site, shares.shape[1])
        maps = shares.detach().float().transpose(1, 2).unflatten(-1, (h, w))
        resized = F.interpolate(maps, size=call.latent, mode="bilinear", align_corners=False).cpu()
        # Kept apart by shape: hires fix changes the latent's size, and the last pass is the one that is seen.
        self._last = call.latent
        sums = self._sums.setdefault(call.latent, {})
        for picture in dict.fromkeys(pictures):
            own = [row for row, other in enumerate(pictures) if other == picture]
            if self.keep_all:
                self.maps[(site.index, call.progress, picture)] = maps[own].mean(dim=0).cpu()
            total, count = sums.get(picture, (torch.zeros_like(resized[0]), 0))
            sums[picture] = (total + resized[own].sum(dim=0), count + len(own))

    def mean(self) -> Tensor | None:
        """(pictures, N, h, w) in [0, 1] at the size of the last latent; None before the first map.

        A picture that was never seen is nobody's.
        """
        if self._last is None:
            return None
        means = {picture: total / count for picture, (total, count) in self._sums[self._last].items()}
        nobody = torch.zeros_like(next(iter(means.values())))
        return torch.stack([means.get(picture, nobody) for picture in range(max(means) + 1)])


def word_attention(site: Site, x: Tensor, context: Tensor, words: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """How much each position of a cross-attention attends to people's words: (B, N, n) in [0, 1], float32.

    A(m) of OmniPortrait (sec. 3.2, eq. 5 and 6), the mean over the heads. site, x (B, n, channels), context (B, m, D):
    as `Site.arguments` gives them. words: of each row and each of N people, as `Row.words` has them; of several words
    of one person the sum, and 0 where there is none. Gradients pass.
    """
    layer: Any = site.module
    q, k = site.split_heads(layer.to_q(x)), site.split_heads(layer.to_k(context))
    attention = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)
    chosen = attention.new_zeros(len(words), max(map(len, words), default=0), context.shape[1])
    for row, people in enumerate(words):
        for person, positions in enumerate(people):
            chosen[row, person, list(positions)] = 1
    return chosen @ attention.mT
