"""OmniPortrait: every person's e_mix in the place of one word; guidance, its other half, is timed by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lib_portrait.attention import find_sites
from lib_portrait.attention.injection import Call
from lib_portrait.methods.omniportrait import OmniPortraitRule, PivotEncoder, PivotIdentity

TRAINING: dict[str, tuple[str, ...]] = {}
# The width of OpenCLIP ViT-L/14's embeddings.
IMAGE = 768


class _Rule(OmniPortraitRule):
    """Each person's word is the next token, whatever the row says."""

    def context(self, call: Call, context: torch.Tensor) -> torch.Tensor:
        words = tuple((1 + number,) for number in range(len(self.people)))
        call.table = {number: replace(row, words=words) for number, row in call.table.items()}
        return super().context(call, context)


def rules(
    unet: nn.Module, counts: Sequence[int], latent: int
) -> Iterator[tuple[dict[str, Any], Callable[[], OmniPortraitRule]]]:
    width = next(site.context for site in find_sites(unet) if site.cross)
    adapter = PivotEncoder(IMAGE, width).requires_grad_(False)
    for count in counts:
        people = [PivotIdentity(one) for one in torch.randn(count, IMAGE)]

        def make(people: Sequence[PivotIdentity] = people) -> OmniPortraitRule:
            return _Rule(adapter, people)

        yield {"ids": count}, make
