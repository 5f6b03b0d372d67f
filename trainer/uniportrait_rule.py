"""UniPortrait's layers and rule at the attention sites while they are trained.

The layers have the names of the published files; the rule is that of inference, written for training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Around, Call
from lib_portrait.attention.sites import Site
from lib_portrait.methods.uniportrait import PATHS


class LowRankLayers(nn.Module):
    """What is added to a linear layer: up(down(x)), nothing at first."""

    def __init__(self, inside: int, outside: int, rank: int):
        super().__init__()
        self.down = nn.Linear(inside, rank, bias=False)
        self.up = nn.Linear(rank, outside, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def beside(self, linear: nn.Linear, host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """host(x) + up(down(x)), where host computes the linear layer.

        As one product with the summed weights where that is the lesser work: its backward pass costs in * out
        operations a position, the two thin products together three times rank * (in + out). Only in full precision:
        in half of it what is added to a weight would be rounded away while it is small.
        """
        summed = 3 * (self.down.weight.numel() + self.up.weight.numel())
        full = x.dtype == linear.weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        if full and linear.weight.numel() <= summed:
            return F.linear(x, torch.addmm(linear.weight, self.up.weight, self.down.weight), linear.bias)
        return host(x) + self.up(self.down(x))


class SiteLayers(nn.Module):
    """The trained layers of one attention site, under the names of the published files."""

    def __init__(self, site: Site, rank: int):
        super().__init__()
        self.cross = site.cross
        for name, path in PATHS.items():
            linear = cast(nn.Linear, site.module.get_submodule(path))
            self.add_module(f"{name}_lora", LowRankLayers(linear.in_features, linear.out_features, rank))

    def low_rank(self, name: str) -> LowRankLayers:
        return cast(LowRankLayers, self.get_submodule(f"{name}_lora"))

    def add_identity_attention(self, site: Site) -> None:
        """W_k^id and W_v^id, beginning as the text's own (as IP-Adapter does)."""
        for name in ("to_k", "to_v"):
            own = cast(nn.Linear, site.module.get_submodule(name))
            layer = nn.Linear(own.in_features, own.out_features, bias=False)
            layer.weight.data.copy_(own.weight.data)
            self.add_module(f"{name}_faceid", layer)

    def add_router(self, site: Site, tokens: int) -> None:
        """theta, phi and W_aggr of eq. 3."""
        channels, context = site.channels, site.context
        self.to_q_router = _two_layers(channels, channels)
        self.to_k_router = _two_layers(context, channels)
        self.aggr_router = nn.Linear(tokens, 1)

    def route(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logits of eq. 3: hidden (B, n, C), tokens (B, N, T, D) -> (B, n, N)."""
        aggregated = self.aggr_router(tokens.transpose(2, 3)).squeeze(-1)
        return self.to_q_router(hidden) @ self.to_k_router(aggregated).transpose(1, 2)


def _two_layers(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, inside * 2), nn.GELU(), nn.Linear(inside * 2, outside, bias=False))


@dataclass
class Condition:
    """What the rule adds in one UNet call: tokens (B, N, T, D); present (B, N) bool.

    noise: gives Gumbel noise of a shape, or None for plain arg-max routing. logits: filled with each site's routing.
    scale: lambda of the decoupled cross-attention, of all rows or (B, 1, 1).
    """

    tokens: Tensor
    present: Tensor
    noise: Callable[[int, torch.Size], Tensor] | None
    logits: dict[int, Tensor]
    scale: float | Tensor = 1.0


@dataclass(frozen=True)
class Told:
    """What a UNet with people is told: captions (B, 77), ID tokens (B, N, T, D), which of them there are (B, N) bool,
    ID scales (B, 1, 1)."""

    tokens: Tensor
    people: Tensor
    present: Tensor
    scale: Tensor

    def and_also(self, other: Told) -> Told:
        return Told(*(torch.cat([getattr(told, part.name) for told in (self, other)]) for part in fields(self)))


class TrainingRule:
    """UniPortrait at the attention sites, differentiable, with identities of its own for every row.

    The rule of inference (`methods.uniportrait.UniPortraitRule`) keeps keys and fused weights from step to step, which
    training changes at every step; a test holds the two to the same output.
    """

    def __init__(self, lora: nn.ModuleDict, identity: nn.ModuleDict):
        """lora: SiteLayers by site whose LoRA (and router) apply; identity: those whose W_k^id, W_v^id do."""
        self.lora, self.identity = lora, identity
        self.condition: Condition | None = None
        self._query: dict[int, tuple[Tensor, Tensor]] = {}

    def active(self, progress: float) -> bool:
        return True

    def must_visit(self, site: Site) -> bool:
        return site.cross

    def overrides(self, site: Site, call: Call) -> dict[str, Around]:
        layers = cast(SiteLayers, self.lora[str(site.index)])

        def project(name: str, host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            linear = cast(nn.Linear, site.module.get_submodule(PATHS[name]))
            return layers.low_rank(name).beside(linear, host, x)

        def query(host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            q = project("to_q", host, x)
            self._query[site.index] = (x, q)
            return q

        def output(host: Callable[[Tensor], Tensor], attended: Tensor) -> Tensor:
            call.visited.add(site.index)
            hidden, q = self._query.pop(site.index)
            assert self.condition is not None
            return project("to_out", host, attended + self.condition.scale * self._attend(site, hidden, q))

        found: dict[str, Around] = {
            PATHS[name]: lambda host, x, name=name: project(name, host, x)
            for name in ("to_q", "to_k", "to_v", "to_out")
        }
        return {**found, "to_q": query, "to_out.0": output} if site.cross else found

    def _attend(self, site: Site, hidden: Tensor, q: Tensor) -> Tensor:
        """Each position's attention to the identity it is routed to (eq. 2): (B, n, inner)."""
        condition = self.condition
        assert condition is not None
        layers = cast(SiteLayers, self.identity[str(site.index)])
        rows, people = condition.tokens.shape[:2]
        key, value = (
            site.split_heads(cast(nn.Linear, layers.get_submodule(name))(condition.tokens.flatten(0, 1)))
            for name in ("to_k_faceid", "to_v_faceid")
        )
        heads = site.split_heads(q)
        if people == 1:
            return F.scaled_dot_product_attention(heads, key, value).transpose(1, 2).flatten(2)
        each = F.scaled_dot_product_attention(heads.repeat_interleave(people, dim=0), key, value)
        each = each.transpose(1, 2).flatten(2).unflatten(0, (rows, people))
        router = cast(SiteLayers, self.lora[str(site.index)])
        logits = router.route(hidden, condition.tokens)
        logits = logits.masked_fill(~condition.present[:, None], -torch.inf)
        condition.logits[site.index] = logits
        if condition.noise is None:
            shares = F.one_hot(logits.argmax(dim=-1), people).to(q.dtype)
        else:
            # Gumbel-softmax, straight through: one identity forward, the soft shares' gradient backward.
            soft = (logits + condition.noise(site.index, logits.shape).to(logits.dtype)).softmax(dim=-1)
            hard = F.one_hot(soft.argmax(dim=-1), people).to(soft.dtype)
            shares = hard - soft.detach() + soft
        return torch.einsum("bni,binc->bnc", shares, each)
