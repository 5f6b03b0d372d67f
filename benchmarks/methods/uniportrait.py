"""UniPortrait at the released sizes, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Site, find_sites
from lib_portrait.attention.lora import LowRank
from lib_portrait.methods.uniportrait import Adapter, IDEmbedding, Person, Router, SiteWeights, UniPortraitRule

TOKENS, RANK, WIDTH = 16, 128, 768


def rules(
    unet: nn.Module, counts: Sequence[int], latent: int
) -> Iterator[tuple[dict[str, Any], Callable[[], UniPortraitRule]]]:
    adapter = random_adapter(find_sites(unet))
    for count in counts:
        yield {"ids": count}, functools.partial(UniPortraitRule, adapter, people(count))


def random_adapter(sites: list[Site]) -> Adapter:
    """An adapter of the released sizes (16 tokens, rank 128) with random weights."""

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape) / shape[-1] ** 0.5

    def lora(site: Site) -> dict[str, LowRank]:
        inside = {"to_q": site.channels, "to_k": site.context, "to_v": site.context, "to_out": site.inner}
        outside = {"to_q": site.inner, "to_k": site.inner, "to_v": site.inner, "to_out": site.channels}
        return {name: LowRank(weight(outside[name], RANK) * 0.1, weight(RANK, inside[name])) for name in inside}

    def router(site: Site) -> Router:
        c, d = site.channels, site.context
        return Router(
            theta=(weight(2 * c, c), torch.zeros(2 * c), weight(c, 2 * c)),
            phi=(weight(2 * d, d), torch.zeros(2 * d), weight(c, 2 * d)),
            aggregate=(weight(1, TOKENS), torch.zeros(1)),
        )

    weights = {}
    for site in sites:
        single, multi = lora(site), lora(site)
        if site.cross:
            key, value = weight(site.inner, site.context), weight(site.inner, site.context)
            weights[site.index] = SiteWeights(single, multi, key, value, router(site))
        else:
            weights[site.index] = SiteWeights(single, multi)
    return Adapter(IDEmbedding(64, 64, TOKENS, 64, WIDTH, 1), weights)


def people(count: int) -> list[Person]:
    """Random people with one set of unconditional tokens, as in a real request."""
    unconditional = torch.randn(TOKENS, WIDTH)
    return [Person({POSITIVE: torch.randn(TOKENS, WIDTH), NEGATIVE: unconditional}, scale=0.7) for _ in range(count)]
