"""Fusion: references that are looked at once a request, seen by positive rows or by all, and such as ride along."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lib_portrait.attention import find_sites
from lib_portrait.attention.sites import Site
from lib_portrait.methods.fusion import STEP, FaceFusion, FusedIdentity, FusionRule, Properties

TRAINING: dict[str, tuple[str, ...]] = {}
CASES: tuple[dict[str, Any], ...] = (
    {"reference_t": 0, "negative": False},
    {"reference_t": 0, "negative": True},
    {"reference_t": STEP, "negative": False},
)


class _Host:
    """Random latents and random texts."""

    alphas_cumprod = torch.linspace(0.999, 0.005, 1000)
    prediction: Literal["epsilon", "v"] = "epsilon"
    state: Hashable = None

    def __init__(self, unet: nn.Module, sites: Sequence[Site]):
        self.unet = unet
        self._width = next(site.context for site in sites if site.cross)

    def latent(self, picture: np.ndarray) -> Tensor:
        return torch.randn(1, 4, picture.shape[0] // 8, picture.shape[1] // 8)

    def text(self, prompt: str) -> Tensor:
        return torch.randn(1, 77, self._width)

    def positions(self, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
        return ()

    def emphasis(self, prompt: str) -> tuple[float, ...]:
        return (1.0,) * 77

    def call(self, latent: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(latent, t, context)


def rules(
    unet: nn.Module, counts: Sequence[int], latent: int
) -> Iterator[tuple[dict[str, Any], Callable[[], FusionRule]]]:
    """Several people stand side by side, each in a region; references are of the picture's size."""
    sites = find_sites(unet)
    adapter = FaceFusion.for_sites(sites).requires_grad_(False)
    rng = np.random.default_rng(0)
    for count in counts:
        pictures = rng.integers(0, 256, (count, 8 * latent, 8 * latent, 3), dtype=np.uint8)
        regions = [(i / count, 0.0, (i + 1) / count, 1.0) if count > 1 else None for i in range(count)]
        people = [FusedIdentity((one,), region) for one, region in zip(pictures, regions)]
        for case in CASES:

            def make(people: Sequence[FusedIdentity] = people, case: dict[str, Any] = case) -> FusionRule:
                adapter.properties = Properties(**case)
                adapter.kept.clear()
                rule = FusionRule(adapter, people)
                rule.prepare(_Host(unet, sites))  # type: ignore[arg-type]
                return rule

            yield {"ids": count, **case}, make
