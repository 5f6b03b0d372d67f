"""A UNet, or a ControlNet, as an ordered list of attention sites.

The order is the one in which published adapters number their layers: diffusers' `unet.attn_processors`, which lists the
down blocks, then the up blocks, then the mid block, and in every transformer block `attn1` before `attn2`. The key
``"{i}.to_k_faceid.weight"`` of an adapter belongs to site i. Three layouts are understood: ldm (SD1, SD2), sgm (SDXL;
the same names as ldm, with several transformer blocks in a row) and diffusers.

A ControlNet is a copy of a UNet's first part and its middle; its sites have the numbers of those that they copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lib_portrait.errors import PortraitError

# The parts of a UNet in the order of the published numbering.
LAYOUTS = {
    "ldm": ("input_blocks", "output_blocks", "middle_block"),
    "diffusers": ("down_blocks", "up_blocks", "mid_block"),
}

# The arguments of an attention layer's forward, as ldm and sgm name them, by every layout's name.
_ARGUMENTS = {
    "x": "x",
    "hidden_states": "x",
    "context": "context",
    "encoder_hidden_states": "context",
    "mask": "mask",
    "attention_mask": "mask",
}


@dataclass(frozen=True, eq=False)
class Site:
    """One attention layer of a UNet.

    index: its number in the published order. path: its name inside the UNet.
    cross: whether it attends to the text (attn2) or to the picture itself (attn1).
    channels: width of its input; inner: width of queries, keys and values (heads * head_dim);
    context: width of what keys and values are made from.
    module: the layer itself, with children to_q, to_k, to_v and to_out (whose first entry is the linear layer).
    """

    index: int
    path: str
    cross: bool
    channels: int
    inner: int
    context: int
    heads: int
    module: nn.Module

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, heads * d) -> (B, heads, n, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    # ---- for rules that replace the softmax, and so stand around the layer as a whole

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's forward was called with, on every layout: x (B, n, channels) and context (B, m, context).

        forward(x, context=None, mask=None) in ldm and sgm, forward(hidden_states, encoder_hidden_states=None,
        attention_mask=None) in diffusers; without a context the layer attends to x. Raises PortraitError for a mask:
        what it hides would be seen again.
        """
        given = dict(zip(("x", "context", "mask"), args))
        given |= {_ARGUMENTS[name]: value for name, value in kwargs.items() if name in _ARGUMENTS and value is not None}
        if given.get("mask") is not None:
            raise PortraitError(
                "model", f"{self.path} was given an attention mask", "Switch off extensions that mask attention.", 500
            )
        x, context = given["x"], given.get("context")
        return x, x if context is None else context

    @staticmethod
    def input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """What the layer attends from, x (B, n, channels), whatever else its forward was called with."""
        x: torch.Tensor = args[0] if args else next(kwargs[name] for name in ("x", "hidden_states") if name in kwargs)
        return x

    @staticmethod
    def others(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What the layer's forward was called with beside `arguments`."""
        return {name: value for name, value in kwargs.items() if name not in _ARGUMENTS}

    def qkv(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries of x (B, n, channels), keys and values of context (B, m, context): (B, heads, n or m, d) each.

        By the layer's own modules, so that LoRAs of the host and of other rules are in them.
        """
        layer: Any = self.module
        return (
            self.split_heads(layer.to_q(x)),
            self.split_heads(layer.to_k(context)),
            self.split_heads(layer.to_v(context)),
        )

    def out(self, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output of what the attention gave: (B, heads, n, d) -> (B, n, channels)."""
        hidden = attended.transpose(1, 2).flatten(2)
        for module in self.module.to_out:  # type: ignore[union-attr]
            hidden = module(hidden)
        return hidden


def layout_of(unet: nn.Module) -> str:
    """ "ldm" or "diffusers". Raises PortraitError for anything else (SD3 and Flux have no such UNet)."""
    for layout, parts in LAYOUTS.items():
        if all(hasattr(unet, part) for part in parts):
            return layout
    raise PortraitError(
        "model", f"{type(unet).__name__} is not a Stable Diffusion UNet", "Load an SD1.5-family checkpoint."
    )


def _transformer_blocks(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in part.named_modules():
        if hasattr(module, "attn1") and hasattr(module, "attn2"):
            yield path, module


def _natural(path: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path)]


def find_sites(unet: nn.Module) -> list[Site]:
    """All attention sites of `unet`, in the published order.

    Works on ldm's and sgm's `UNetModel` and on diffusers' `UNet2DConditionModel`, whatever the attention optimisation.
    """
    sites = _sites_of(unet, LAYOUTS[layout_of(unet)])
    if not sites:
        raise PortraitError("model", "its UNet has no attention layers", "Load an SD1.5-family checkpoint.")
    return sites


def _sites_of(network: nn.Module, parts: Sequence[str]) -> list[Site]:
    """The attention layers of these parts of a network, numbered in this order."""
    sites: list[Site] = []
    for part in parts:
        blocks = sorted(_transformer_blocks(getattr(network, part)), key=lambda item: _natural(item[0]))
        for path, block in blocks:
            for name in ("attn1", "attn2"):
                attention = getattr(block, name)
                sites.append(
                    Site(
                        index=len(sites),
                        path=f"{part}.{path}.{name}",
                        cross=name == "attn2",
                        channels=attention.to_q.in_features,
                        inner=attention.to_q.out_features,
                        context=attention.to_k.in_features,
                        heads=attention.heads,
                        module=attention,
                    )
                )
    return sites


def control_sites(control: nn.Module, unet: nn.Module) -> list[Site]:
    """The attention sites of a ControlNet for `unet`, each with the number and path of the UNet's site that it copies.

    control: sd-webui-controlnet's `ControlNet`, or its `PlugableControlModel` around one, ldm's, or diffusers'
    `ControlNetModel`. Raises PortraitError where it is none, or one for another kind of model.
    """
    control = getattr(control, "control_model", control)
    own = {site.path: site for site in find_sites(unet)}
    _, last, middle = LAYOUTS[layout_of(unet)]
    if not hasattr(control, middle) or hasattr(control, last):
        raise PortraitError("model", f"{type(control).__name__} is not a ControlNet", "Use a ControlNet's own model.")
    found = {site.path: site for site in _sites_of(control, (LAYOUTS[layout_of(unet)][0], middle))}
    copied = [path for path in own if not path.startswith(f"{last}.")]
    if [*found] != copied or any(_sizes(found[path]) != _sizes(own[path]) for path in copied):
        raise PortraitError(
            "model", "this ControlNet was made for another kind of model", "Choose one of the checkpoint's family."
        )
    return [replace(site, index=own[path].index) for path, site in found.items()]


def _sizes(site: Site) -> tuple[int, ...]:
    return site.channels, site.inner, site.context, site.heads


def spatial_shape(tokens: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a site that sees `tokens` positions of a latent of (height, width).

    Each level of the UNet halves both, rounding up (a stride-2 convolution with padding 1). Raises ValueError when no
    level has that many positions, as when another extension has merged or cut tokens.
    """
    height, width = latent
    while height * width > tokens and (height > 1 or width > 1):
        height, width = -(-height // 2), -(-width // 2)
    if height * width != tokens:
        raise ValueError(f"{tokens} positions are no level of a {latent[0]}x{latent[1]} latent")
    return height, width
