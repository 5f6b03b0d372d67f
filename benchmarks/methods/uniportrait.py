"""UniPortrait at the released sizes, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Site, find_sites
from lib_portrait.attention.decoupled import projection_sizes
from lib_portrait.methods.uniportrait import Adapter, IDEmbedding, Person, SiteLayers, UniPortraitRule

TOKENS, RANK, WIDTH = 16, 128, 768
TRAINING = {"world": ("--rank", "32", "--width", "192", "--depth", "4")}


def rules(
    unet: nn.Module, counts: Sequence[int], latent: int
) -> Iterator[tuple[dict[str, Any], Callable[[], UniPortraitRule]]]:
    adapter = random_adapter(find_sites(unet))
    for count in counts:
        yield {"ids": count}, functools.partial(UniPortraitRule, adapter, people(count))


def random_adapter(sites: list[Site]) -> Adapter:
    """An adapter of the released sizes (16 tokens, rank 128) with random weights."""

    def layers(site: Site) -> SiteLayers:
        made = SiteLayers()
        for name, (inside, outside) in projection_sizes(site).items():
            made.add_lora(name, inside, outside, RANK)
        return made

    faceid, router = ({site.index: layers(site) for site in sites} for _ in range(2))
    for site in sites:
        if site.cross:
            c, d = site.channels, site.context
            faceid[site.index].add_id_attention(d, site.inner)
            router[site.index].add_router((c, 2 * c, c), (d, 2 * d, c), TOKENS)
    adapter = Adapter(IDEmbedding(64, 64, TOKENS, 64, WIDTH, 1), faceid, router)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return adapter.requires_grad_(False)


def people(count: int) -> list[Person]:
    """Random people with one set of unconditional tokens, as in a real request."""
    unconditional = torch.randn(TOKENS, WIDTH)
    return [Person({POSITIVE: torch.randn(TOKENS, WIDTH), NEGATIVE: unconditional}, scale=0.7) for _ in range(count)]
