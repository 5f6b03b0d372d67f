"""Decoupled cross-attention (IP-Adapter, arXiv 2308.06721): attention to a picture's tokens beside that to the text's.

Where an attention layer runs is not seen from outside, but its projections are: the query is caught where the layer
computes it, and what is added goes into its output projection. So any optimisation of the host runs underneath.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.lora import FusedLinear, LowRank
from lib_portrait.attention.sites import Site
from lib_portrait.errors import PortraitError

# The linear layers of an attention site, and their names inside the UNet's layer.
PATHS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
PROJECTIONS = tuple(PATHS)


def id_attention(q: Tensor, key: Tensor, value: Tensor, shares: Tensor | None = None) -> Tensor:
    """Attention to the identities, each by its share of a position (sec. 3.2, 3.3): (B, n, H * d).

    sum_i shares_i softmax(q K_i^T / sqrt(d)) V_i of queries q (B, H, n, d), key and value (B or 1, N, H, T, d) and
    shares (B, n, N); None where the one identity has all positions.
    """
    rows, heads, positions, width = q.shape
    if shares is None:
        key, value = (x[:, 0].expand(rows, -1, -1, -1) for x in (key, value))
        return F.scaled_dot_product_attention(q, key, value).transpose(1, 2).flatten(2)
    if shares.requires_grad or len(key) > 1:
        # All identities' tokens in one product, where every share has a gradient or each row identities of its own.
        keys, values = (x.transpose(1, 2).flatten(2, 3) for x in (key, value))
        weights = (q @ keys.transpose(-1, -2) * width**-0.5).unflatten(-1, key.shape[1:4:2]).softmax(dim=-1)
        weights = weights * shares[:, None, :, :, None].to(weights.dtype)
        return (weights.flatten(-2).to(values.dtype) @ values).transpose(1, 2).flatten(2)
    # Each position for the people it belongs to only: with eight people the cost is that of one.
    out = q.new_zeros(rows, positions, heads * width)
    queries = q.transpose(1, 2)
    for i in range(key.shape[1]):
        row, position = shares[..., i].nonzero(as_tuple=True)
        if not len(row):
            continue
        chosen = queries[row, position].transpose(0, 1).unsqueeze(0)
        seen = F.scaled_dot_product_attention(chosen, key[:, i], value[:, i])[0].transpose(0, 1).flatten(1)
        out[row, position] += (seen * shares[row, position, i].unsqueeze(-1)).to(out.dtype)
    return out


def projection_sizes(site: Site) -> dict[str, tuple[int, int]]:
    """(in, out) of each of a site's projections."""
    return {
        "to_q": (site.channels, site.inner),
        "to_k": (site.context, site.inner),
        "to_v": (site.context, site.inner),
        "to_out": (site.inner, site.channels),
    }


class DecoupledAttention(ABC):
    """What is around the projections of a UNet's attention layers, for `attention.Injection`.

    At every cross-attention `added` joins the text's attention before the output projection; at every attention, self
    and cross, there is LoRA on q, k, v and out.
    """

    def __init__(self, lora_scale: float = 1.0):
        self.lora_scale = lora_scale
        self._hidden: dict[int, Tensor] = {}
        self._query: dict[int, tuple[Tensor, Tensor]] = {}
        """By site number, while the site runs: its input, and beside it its query."""

    @abstractmethod
    def lora(self, site: Site) -> Mapping[str, LowRank]:
        """The site's LoRA pairs by projection."""

    @abstractmethod
    def added(self, site: Site, call: Call, hidden: Tensor, q: Tensor) -> Tensor | None:
        """What is added to the text's attention, (B, n, H * d), or None for nothing.

        Of the site's input hidden (B, n, C) and its query q (B, n, H * d).
        """

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        linears = {
            name: FusedLinear(site.module.get_submodule(PATHS[name]), pair, self.lora_scale)
            for name, pair in self.lora(site).items()
            if self.lora_scale > 0
        }

        def project(name: str, host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return linears[name](host, x, call) if name in linears else host(x)

        def layer(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            # Others may change what enters a projection, and that is not the layer's input then.
            self._hidden[site.index] = site.input(args, kwargs)
            try:
                return host(*args, **kwargs)
            finally:
                del self._hidden[site.index]

        def query(host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            q = project("to_q", host, x)
            self._query[site.index] = (self._hidden.get(site.index, x), q)
            return q

        def output(host: Callable[[Tensor], Tensor], attended: Tensor) -> Tensor:
            hidden, q = self._query.pop(site.index, (None, None))
            if hidden is None or q is None or attended.shape != q.shape:
                raise PortraitError(
                    "model",
                    f"{site.path} was run in a way its projections do not show",
                    "Choose another cross attention optimization in Settings > Optimizations.",
                    500,
                )
            call.visited.add(site.index)
            added = self.added(site, call, hidden, q)
            return project("to_out", host, attended if added is None else attended + added.to(attended.dtype))

        functions: dict[str, Wrapper] = {
            PATHS[name]: lambda host, x, name=name: project(name, host, x) for name in linears
        }
        return {**functions, "": layer, "to_q": query, "to_out.0": output} if site.cross else functions
