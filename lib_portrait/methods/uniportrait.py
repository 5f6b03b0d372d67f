"""UniPortrait: A Unified Framework for Identity-Preserving Single- and Multi-Human Image Personalization.

arXiv 2408.05939; the numbers to match are those of the official code (junjiehe96/UniPortrait, Apache-2.0).

In the paper's order: the ID embedding (sec. 3.2) turns the features of one person's photos into a few tokens F_id; the
decoupled cross-attention adds an attention over these tokens to the one over the text; with several people the ID
router (sec. 3.3) gives every position of the picture to one of them; LoRA adapts the UNet's own attention (sec. 3.4).
The modules have the names of the published files; training and inference compute with the same ones, and what
inference keeps from step to step is made anew at every call while it is trained.

Notation: B rows, N identities, T ID tokens each (16), D context width (768), H heads of width d, C channels of a site
and n positions.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.decoupled import PROJECTIONS, DecoupledAttention, id_attention, projection_sizes
from lib_portrait.attention.injection import Call
from lib_portrait.attention.lora import LowRank
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.regions import Claims, Region, RegionsAtSites
from lib_portrait.attention.rows import NEGATIVE, POSITIVE
from lib_portrait.attention.scales import LocalScales
from lib_portrait.attention.sites import Site, spatial_shape
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.faces.features import FaceFeatures
from lib_portrait.faces.references import IdentityFaces, Reference
from lib_portrait.faces.weights import checked, fill, unfilled, unfit
from lib_portrait.methods.base import Method, Options, Placement, Rule

# What stands before the names of tensors in the released files, and the names that a site has there.
EMBEDDING, SITES = "faceid_proj.", "faceid_adapter."
ID_ATTENTION = ("to_k_faceid.weight", "to_v_faceid.weight")
ROUTER_LAYERS = (
    *(f"{name}.{part}" for name in ("to_q_router", "to_k_router") for part in ("0.weight", "0.bias", "2.weight")),
    "aggr_router.weight",
    "aggr_router.bias",
)
_LORA = tuple(f"{name}_lora.{part}.weight" for name in PROJECTIONS for part in ("up", "down"))
FACEID_NAMES, ROUTER_NAMES = frozenset(_LORA + ID_ATTENTION), frozenset(_LORA + ROUTER_LAYERS)

FAMILY = "Load a Stable Diffusion checkpoint of the adapter's family (SD1.5 for uniportrait sd15)."

log = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------- ID embedding, sec. 3.2


class PerceiverAttention(nn.Module):
    """Attention of the queries over features and queries together: keys and values come from [features; queries]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, width * 2, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, features: Tensor, queries: Tensor, keep: Tensor | None = None) -> Tensor:
        """features (B, m, width), queries (B, T, width) -> (B, T, width).

        keep (B, m) bool: which of the features are seen; None for all.
        """
        seen = None
        if keep is not None:
            seen = torch.cat([keep, keep.new_ones(queries.shape[:2])], dim=1)[:, None, None, :]
        features, queries = self.norm1(features), self.norm2(queries)
        q = self.to_q(queries)
        k, v = self.to_kv(torch.cat([features, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


def _two_layers(inside: int, hidden: int, outside: int, bias: bool) -> nn.Sequential:
    """A two-layer MLP with GELU. bias: whether the last layer has one."""
    return nn.Sequential(nn.Linear(inside, hidden), nn.GELU(), nn.Linear(hidden, outside, bias=bias))


def _feed_forward(width: int, factor: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width * factor, bias=False),
        nn.GELU(),
        nn.Linear(width * factor, width, bias=False),
    )


class IDEmbedding(nn.Module):
    """The Q-Former of sec. 3.2: T learnable queries gather intrinsic ID and face structure features layer by layer.

    Parameter names are those of the released file's ``faceid_proj``. The head width is 64 as published, or the largest
    power of two below it that divides the width (the file does not say).
    """

    def __init__(
        self, intrinsic: int, structure: int, tokens: int, width: int, output: int, depth: int, ff_factor: int = 4
    ):
        super().__init__()
        heads = width // math.gcd(width, 64)
        self.intrinsic_width, self.structure_width = intrinsic, structure
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_id = _two_layers(intrinsic, 2 * intrinsic, width, bias=True)
        self.proj_clip = _two_layers(structure, 2 * structure, width, bias=True)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(width, heads), PerceiverAttention(width, heads), _feed_forward(width, ff_factor)]
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, output)
        self.norm_out = nn.LayerNorm(output)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], field: str = "checkpoint") -> IDEmbedding:
        """The module a ``faceid_proj`` state dict describes; every size is read off the tensors.

        field: the file's name. Raises PortraitError when names, shapes or values are not those of an ID embedding.
        """
        try:
            _, count, width = tensors["latents"].shape
            layers = {int(key.split(".")[1]) for key in tensors if key.startswith("layers.")}
            with unfilled():
                module = IDEmbedding(
                    intrinsic=tensors["proj_id.0.weight"].shape[1],
                    structure=tensors["proj_clip.0.weight"].shape[1],
                    tokens=count,
                    width=width,
                    output=tensors["proj_out.weight"].shape[0],
                    depth=len(layers),
                    ff_factor=tensors["layers.0.2.1.weight"].shape[0] // width,
                )
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise _unlike(field, f"its ID embedding is not UniPortrait's ({error})") from None
        odd = sorted(set(tensors) - set(module.state_dict()))
        if odd:
            raise _unlike(field, f"its ID embedding is not UniPortrait's ({EMBEDDING}{odd[0]} has no place in it)")
        fill(module, tensors, field, EMBEDDING)
        return module.float()

    def forward(
        self, intrinsic: Tensor, structure: Tensor, beta: float | Tensor = 1.0, keep: Tensor | None = None
    ) -> Tensor:
        """F_id of one identity a row: intrinsic (B, m_r, d_r), structure (B, m_s, d_s) -> (B, T, D).

        beta scales the structure branch of every layer (fig. I(a)); a tensor (B, 1, 1) gives each row its own. Several
        photos of one identity come concatenated along the tokens (sec. 3.2, multi-reference). keep (B, m_s) bool leaves
        structure tokens out: with beta 0 the dropping regularisation of training (sec. 3.4).
        """
        queries = self.latents.expand(intrinsic.shape[0], -1, -1)
        intrinsic, structure = self.proj_id(intrinsic), self.proj_clip(structure)
        for layer in self.layers:
            attend_intrinsic, attend_structure, feed_forward = cast(nn.ModuleList, layer)
            queries = attend_intrinsic(intrinsic, queries) + queries
            queries = beta * attend_structure(structure, queries, keep) + queries
            queries = feed_forward(queries) + queries
        return self.norm_out(self.proj_out(queries))


def interpolate(master: Tensor, others: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Identity interpolation (sec. 3.2): (1 - sum w) F_master + sum w_i F_i, all of shape (T, D)."""
    mixed = master * (1.0 - math.fsum(weights))
    for other, weight in zip(others, weights, strict=True):
        mixed = mixed + other * weight
    return mixed


# ------------------------------------------------------------- layers of an attention site, decoupled cross-attention


class SiteLayers(nn.Module):
    """What one file holds for one attention site, under its names there; dtype and device are the file's until moved.

    LoRA pairs ``to_q_lora`` ... ``to_out_lora`` (sec. 3.4); at cross-attentions W_k^id and W_v^id (sec. 3.2; the faceid
    file), or the router (eq. 3; the router file). What is computed follows the dtype and device of what comes in.
    """

    to_k_faceid: nn.Linear
    to_v_faceid: nn.Linear
    to_q_router: nn.Sequential
    to_k_router: nn.Sequential
    aggr_router: nn.Linear

    def add_lora(self, name: str, inside: int, outside: int, rank: int) -> None:
        self.add_module(f"{name}_lora", LowRank(inside, outside, rank))

    def add_id_attention(self, context: int, inner: int) -> None:
        """W_k^id and W_v^id: context is D, inner H * d."""
        self.to_k_faceid = nn.Linear(context, inner, bias=False)
        self.to_v_faceid = nn.Linear(context, inner, bias=False)

    def add_router(self, theta: tuple[int, int, int], phi: tuple[int, int, int], tokens: int) -> None:
        """theta on positions, phi on aggregated identities, W_aggr over the T tokens (eq. 3).

        theta: widths (C, 2C, C) of its two layers; phi: (D, 2D, C).
        """
        self.to_q_router = _two_layers(*theta, bias=False)
        self.to_k_router = _two_layers(*phi, bias=False)
        self.aggr_router = nn.Linear(tokens, 1)

    @property
    def lora(self) -> dict[str, LowRank]:
        """The LoRA pairs by the projection they belong to (`PROJECTIONS`)."""
        found = {name: getattr(self, f"{name}_lora", None) for name in PROJECTIONS}
        return {name: pair for name, pair in found.items() if pair is not None}

    @property
    def has_id_attention(self) -> bool:
        return hasattr(self, "to_k_faceid")

    @property
    def has_router(self) -> bool:
        return hasattr(self, "aggr_router")

    @property
    def trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def keys_values(self, site: Site, id_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """W_k^id F and W_v^id F (sec. 3.2): (B, N, T, D) -> (B, N, H, T, d) each."""
        key, value = (
            site.split_heads(_linear(layer, id_tokens.flatten(0, 1))).unflatten(0, id_tokens.shape[:2])
            for layer in (self.to_k_faceid, self.to_v_faceid)
        )
        return key, value

    def router_keys(self, id_tokens: Tensor) -> Tensor:
        """phi(W_aggr F) of eq. 3, folded with theta's last layer, which is linear: (B, N, T, D) -> (B, N, 2C).

        Positions then need the first of theta's two matrix products only.
        """
        aggregated = _linear(self.aggr_router, id_tokens.transpose(-1, -2)).squeeze(-1)
        first, _, last = self.to_k_router
        identities = _linear(last, F.gelu(_linear(first, aggregated)))
        return identities @ cast(nn.Linear, self.to_q_router[2]).weight.to(identities)

    def theta(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (2C, C) and bias (2C) of theta's first layer, on the device and in the dtype of `like`."""
        first = cast(nn.Linear, self.to_q_router[0])
        return first.weight.to(like), first.bias.to(like)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The linear layer on x, on x's device and in its dtype."""
    weight, bias = cast(nn.Linear, layer).weight, cast(nn.Linear, layer).bias
    return F.linear(x, weight.to(x), None if bias is None else bias.to(x))


# -------------------------------------------------------------------------------------------------- ID router, eq. 2, 3


def routing_logits(hidden: Tensor, theta: tuple[Tensor, Tensor], router_keys: Tensor) -> Tensor:
    """Eq. 3, theta(h)^T phi(W_aggr F): hidden (B, n, C), router_keys (N, 2C) or (B, N, 2C) -> (B, n, N).

    theta, router_keys: as `SiteLayers` gives them, theta's last layer in the keys.
    """
    weight, bias = theta
    return F.gelu(F.linear(hidden.to(weight.dtype), weight, bias)) @ router_keys.transpose(-1, -2)


def choose(logits: Tensor, noise: Tensor | None = None, group_of: Tensor | None = None) -> Tensor:
    """Whom eq. 2 gives each position to, 1 or 0: (B, n, N), who has the largest of the logits.

    logits (B, n, N): -inf of those who do not claim a position; nobody is chosen where nobody claims it.
    noise: Gumbel noise of that shape, for training: then the choice is by chance, as likely as the softmax of the
    logits says, and straight through, with the gradient of this softmax (Gumbel-softmax, sec. 3.3).
    group_of (N): the group of each; those of the group of who is chosen are chosen too, as far as they claim it.
    """
    noisy = logits if noise is None else logits + noise.to(logits.dtype)
    group = torch.arange(logits.shape[-1], device=logits.device) if group_of is None else group_of
    hard = ((group == group[noisy.argmax(dim=-1, keepdim=True)]) & (logits > -torch.inf)).to(logits.dtype)
    if noise is None:
        return hard
    soft = noisy.softmax(dim=-1)
    return hard - soft.detach() + soft


def routing_loss(
    logits: Mapping[int, Tensor], regions: Tensor, present: Tensor, latent: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Eq. 4 without its lambda, and the share of face positions whose arg-max is right; means over sites and rows.

    logits: by site (B, n, N), -inf of people who are not there; regions (B, N, h, w) the masks M at the latent's size,
    empty of those; present (B, N) bool.
    """
    losses, rights = [], []
    for site_logits in logits.values():
        shape = spatial_shape(site_logits.shape[1], latent)
        masks = F.adaptive_avg_pool2d(regions, shape).flatten(2).transpose(1, 2)
        union = masks.amax(dim=-1)
        routed = site_logits.float().softmax(dim=-1)
        squared = ((routed - masks) ** 2).sum(dim=-1)
        people = present.sum(dim=1).clamp(min=1)
        area = union.sum(dim=1).clamp(min=1e-6)
        losses.append(((union**2 * squared).sum(dim=1) / area / people).mean())
        right = (site_logits.argmax(dim=-1) == masks.argmax(dim=-1)).float()
        rights.append(((union * right).sum(dim=1) / area).mean())
    return torch.stack(losses).mean(), torch.stack(rights).mean().detach()


# ------------------------------------------------------------------------------------------------------------- adapter


class Adapter(nn.Module):
    """A UniPortrait adapter: the ID embedding and the layers of every attention site.

    faceid, router: `SiteLayers` by site number, those of the two files; the router's are none without its file.
    files: the names of the two.
    """

    def __init__(
        self,
        embedding: IDEmbedding,
        faceid: Mapping[int, SiteLayers],
        router: Mapping[int, SiteLayers] | None = None,
        files: tuple[str, str] = ("faceid", "router"),
    ):
        super().__init__()
        self.embedding = embedding
        self.faceid, self.router = (
            nn.ModuleDict({str(index): layers for index, layers in (own or {}).items()}) for own in (faceid, router)
        )
        self.files = files

    @property
    def has_router(self) -> bool:
        return any(layers.has_router for layers in cast(Mapping[str, SiteLayers], self.router).values())

    @property
    def id_attentions(self) -> dict[int, tuple[int, int]]:
        """The shape (H * d, D) of W_k^id and W_v^id at each cross-attention, by site number."""
        layers = cast(Mapping[str, SiteLayers], self.faceid)
        shapes = {int(index): own.to_k_faceid.weight.shape for index, own in layers.items() if own.has_id_attention}
        return {index: (inner, context) for index, (inner, context) in shapes.items()}

    def faceid_at(self, site: Site) -> SiteLayers:
        """What the faceid file holds for a site; nothing for one that is not in it."""
        return _at(self.faceid, site)

    def router_at(self, site: Site) -> SiteLayers:
        """What the router file holds for a site; nothing for one that is not in it."""
        return _at(self.router, site)

    def lora_at(self, site: Site, several: bool) -> dict[str, LowRank]:
        """A site's LoRA pairs (sec. 3.4): one set of weights for one identity, another for several."""
        return (self.router_at(site) if several else self.faceid_at(site)).lora

    @staticmethod
    def from_tensors(
        faceid: Mapping[str, Tensor], router: Mapping[str, Tensor] | None, files: tuple[str, str] = ("faceid", "router")
    ) -> Adapter:
        """An adapter from the flat tensors of the released files, to compute with and not to train.

        faceid: ``faceid_proj.*`` and ``faceid_adapter.{site}.*`` (LoRA for one ID, W_k^id, W_v^id);
        router: ``faceid_adapter.{site}.*`` (the router, and the LoRA for several IDs, there named ``lora``), or None;
        files: the names of the two. Tensors of other names are left out, and the log names them.
        Raises PortraitError naming file and tensor when one is missing, does not fit the others, or is not finite.
        """
        embedding = IDEmbedding.from_tensors(_under(faceid, EMBEDDING), files[0])
        single = _by_site(_under(faceid, SITES), files[0], FACEID_NAMES)
        multi = _by_site(_under(router, SITES), files[1], ROUTER_NAMES) if router is not None else {}
        if router is not None and not any(name in ROUTER_LAYERS for tensors in multi.values() for name in tensors):
            raise PortraitError(files[1], "the file holds no ID router", "Use UniPortrait's router file.")
        if not any("to_k_faceid.weight" in tensors for tensors in single.values()):
            raise PortraitError(files[0], "the file holds no ID attention", "Use UniPortrait's faceid file.")
        _, count, _ = embedding.latents.shape
        width = embedding.norm_out.weight.shape[0]
        single_layers, multi_layers = (
            {index: _SiteTensors(file, index, own).layers(width, count) for index, own in sorted(tensors.items())}
            for file, tensors in zip(files, (single, multi), strict=True)
        )
        attends = {index for index, layers in single_layers.items() if layers.has_id_attention}
        routes = {index for index, layers in multi_layers.items() if layers.has_router}
        if router is not None and attends - routes:
            raise unfit(files[1], f"the tensor {SITES}{min(attends - routes)}.{ROUTER_LAYERS[0]} is missing")
        if routes - attends:
            site = min(routes - attends)
            raise _unlike(files[1], f"it has a router at site {site}, where {files[0]} has no ID attention")
        return Adapter(embedding, single_layers, multi_layers, files)

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the adapter was made for a UNet with these attention sites."""
        own, known = self.id_attentions, {*self.faceid, *self.router}
        cross = [site for site in sites if site.cross]
        for site in cross:
            found = own.get(site.index)
            if found != (site.inner, site.context):
                raise PortraitError(
                    "checkpoint",
                    f"{self.files[0]} was made for another kind of model: it has {len(own)} ID attentions, the loaded "
                    f"model {len(cross)} text attentions; at {site.path} it has {found}, the model "
                    f"{(site.inner, site.context)}",
                    FAMILY,
                )
        if len(own) != len(cross) or not known <= {str(site.index) for site in sites}:
            raise PortraitError(
                "checkpoint",
                f"{self.files[0]} was made for another kind of model: it has {len(own)} ID attentions, the loaded "
                f"model {len(cross)} text attentions, among {len(known)} and {len(sites)} attention layers",
                FAMILY,
            )
        for site in sites:
            self._check_layers(site)

    def _check_layers(self, site: Site) -> None:
        """Raises PortraitError unless LoRA and router of a site fit its linear layers."""
        wanted = {name: (outside, inside) for name, (inside, outside) in projection_sizes(site).items()}
        found = [
            (file, f"{name}_lora", (pair.up.weight.shape[0], pair.down.weight.shape[1]), wanted[name])
            for file, layers in zip(self.files, (self.faceid_at(site), self.router_at(site)), strict=True)
            for name, pair in layers.lora.items()
        ]
        if self.router_at(site).has_router:
            hidden, width = cast(nn.Linear, self.router_at(site).to_q_router[0]).weight.shape
            found.append((self.files[1], "to_q_router.0.weight", (hidden, width), (hidden, site.channels)))
        for file, name, shape, fitting in found:
            if shape != fitting:
                raise PortraitError(
                    "checkpoint",
                    f"{SITES}{site.index}.{name} in {file} is made for a layer of shape ({shape[0]}, {shape[1]}), the "
                    f"loaded model has ({fitting[0]}, {fitting[1]}) at {site.path}",
                    FAMILY,
                )


def _at(layers: nn.ModuleDict, site: Site) -> SiteLayers:
    return cast(SiteLayers, layers[str(site.index)]) if str(site.index) in layers else SiteLayers()


@dataclass(frozen=True)
class _SiteTensors:
    """The tensors that one file holds for one site."""

    file: str
    index: int
    tensors: Mapping[str, Tensor]

    def any_of(self, names: Collection[str]) -> bool:
        return any(name in self.tensors for name in names)

    def take(self, name: str, *shape: int | None) -> tuple[int, ...]:
        """The shape of the tensor of that name, None for any size. Raises PortraitError when it is not like that."""
        return tuple(checked(self.tensors, name, shape, self.file, f"{SITES}{self.index}.").shape)

    def layers(self, width: int, tokens: int) -> SiteLayers:
        """The modules that these tensors are of, without a copy. width: D; tokens: T."""
        with unfilled():
            layers = SiteLayers()
            for name in PROJECTIONS:
                up, down = f"{name}_lora.up.weight", f"{name}_lora.down.weight"
                if self.any_of((up, down)):
                    rank, inside = self.take(down, None, None)
                    layers.add_lora(name, inside, self.take(up, None, rank)[0], rank)
            if self.any_of(ID_ATTENTION):
                inner, _ = self.take("to_k_faceid.weight", None, width)
                self.take("to_v_faceid.weight", inner, width)
                layers.add_id_attention(width, inner)
            if self.any_of(ROUTER_LAYERS):
                theta = self._two_layers("to_q_router", None, None)
                phi = self._two_layers("to_k_router", width, theta[2])
                self.take("aggr_router.weight", 1, tokens)
                self.take("aggr_router.bias", 1)
                layers.add_router(theta, phi, tokens)
        layers.load_state_dict({name: self.tensors[name].detach() for name in layers.state_dict()}, assign=True)
        return layers.requires_grad_(False).eval()

    def _two_layers(self, name: str, inside: int | None, outside: int | None) -> tuple[int, int, int]:
        hidden, inside = self.take(f"{name}.0.weight", None, inside)
        self.take(f"{name}.0.bias", hidden)
        outside, _ = self.take(f"{name}.2.weight", outside, hidden)
        return inside, hidden, outside


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _by_site(tensors: Mapping[str, Tensor], file: str, known: Collection[str]) -> dict[int, dict[str, Tensor]]:
    """The tensors of known names by site. Others are left out with a warning: the official code leaves them out too."""
    found: dict[int, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        if not re.fullmatch(r"[0-9]{1,4}", number):
            raise _unlike(file, f"{key[:80]!r} is no key of an adapter")
        if name in known:
            found.setdefault(int(number), {})[name] = tensor
        else:
            others.append(f"{SITES}{key}"[:80])
    if others:
        log.warning("%s: %d tensors are not read, the first is %s", file, len(others), others[0])
    return found


def _unlike(file: str, problem: str) -> PortraitError:
    return PortraitError(file, problem, "Use an unmodified UniPortrait file, downloaded whole.")


# --------------------------------------------------------------------------------------------- conditions of a sampling


@dataclass(frozen=True)
class Person:
    """One identity as the rule needs it.

    tokens: F_id of each kind of row ({POSITIVE: (T, D), NEGATIVE: (T, D)}); a kind that is absent gets no identity.
    scale: lambda of the decoupled cross-attention. start, end: share of the sampling in which it takes part, 0 to 1.
    region: where it belongs in the picture, or None to let the router decide.
    """

    tokens: dict[int, Tensor]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    region: Region | None = None

    @property
    def strength(self) -> float:
        return self.scale

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


@dataclass(frozen=True)
class Identities:
    """The identities of each row of a batch, for training.

    id_tokens: F_id (B, N, T, D). present (B, N) bool: which of them there are, one at least in each row.
    scale (B, 1, 1): lambda of the decoupled cross-attention.
    """

    id_tokens: Tensor
    present: Tensor
    scale: Tensor

    def cat(self, other: Identities) -> Identities:
        """The rows of both."""
        return Identities(*(torch.cat([getattr(one, part.name) for one in (self, other)]) for part in fields(self)))


# --------------------------------------------------------------------------------------------------------------- rules


class BatchRule(DecoupledAttention):
    """UniPortrait with identities of its own for every row, as it is trained: all rows in one batched evaluation.

    several: whether rows have several identities, whom the router gives the positions to.
    """

    def __init__(self, adapter: Adapter, several: bool):
        super().__init__()
        self.adapter, self.several = adapter, several
        self.identities: Identities | None = None
        self.noise: Callable[[int, torch.Size], Tensor] | None = None
        self.logits: dict[int, Tensor] = {}
        """By site number, since `begin`: the logits of eq. 3, (B, n, N), -inf of people who are not there."""

    def begin(self, identities: Identities, noise: Callable[[int, torch.Size], Tensor] | None = None) -> None:
        """What the next UNet call is conditioned on.

        noise: Gumbel noise of a shape for a site, for the choice of eq. 2 in training; None for the likeliest identity.
        """
        self.identities, self.noise, self.logits = identities, noise, {}

    def active(self, progress: float) -> bool:
        return True

    def must_visit(self, site: Site) -> bool:
        return site.cross

    def lora(self, site: Site) -> dict[str, LowRank]:
        return self.adapter.lora_at(site, self.several)

    def added(self, site: Site, call: Call, hidden: Tensor, q: Tensor) -> Tensor:
        own = self.identities
        assert own is not None, "begin() comes first"
        key, value = (x.to(q.dtype) for x in self.adapter.faceid_at(site).keys_values(site, own.id_tokens))
        shares = None
        if self.several:
            router = self.adapter.router_at(site)
            logits = routing_logits(hidden, router.theta(q), router.router_keys(own.id_tokens).to(q.dtype))
            logits = self.logits[site.index] = logits.masked_fill(~own.present[:, None], -torch.inf)
            shares = choose(logits, None if self.noise is None else self.noise(site.index, logits.shape))
        return own.scale * id_attention(site.split_heads(q), key, value, shares)


@dataclass(frozen=True)
class _Conditions:
    """What rows of one kind attend to at a site, of A active people.

    groups: the places among the active people of those whose tokens are equal; group_of (A): the group of each. key,
    value: (1, G, H, T, d), one entry for each group; router_keys (A, 2C) where there is something to route.
    """

    groups: list[list[int]]
    group_of: Tensor
    key: Tensor
    value: Tensor
    router_keys: Tensor | None


@dataclass
class _SiteState:
    """What one site keeps from step to step, for one set of active people.

    made_for: the active people and the query's device and dtype. scales: (A), of the active people.
    theta: of eq. 3, where there is something to route. local_scales: filled while people's scales differ.
    """

    made_for: tuple[object, ...] = ()
    kinds: dict[int, _Conditions] = field(default_factory=dict)
    scales: Tensor = field(default_factory=lambda: torch.empty(0))
    theta: tuple[Tensor, Tensor] | None = None
    local_scales: LocalScales = field(default_factory=LocalScales)


class UniPortraitRule(DecoupledAttention, Rule[Person]):
    """UniPortrait with the same people for all rows of a kind, as pictures are sampled.

    With several people each position attends to the one the router gives it (eq. 2), or to the one whose region it lies
    in.

    Raises PortraitError if several people are asked for and the adapter has no router.
    """

    def __init__(
        self,
        adapter: Adapter,
        people: Sequence[Person],
        lora_scale: float = 1.0,
        routing: RoutingMaps | None = None,
    ):
        if len(people) > 1 and not adapter.has_router:
            raise PortraitError(
                "identities",
                f"{len(people)} people were asked for, but this checkpoint has no router file",
                "Put its uniportrait-router file beside the faceid file, or ask for one person.",
            )
        DecoupledAttention.__init__(self, lora_scale)
        Rule.__init__(self, people, routing)
        self.adapter = adapter
        self._regions = RegionsAtSites([person.region for person in people])
        self._states: dict[int, _SiteState] = {}
        # Filled where somebody asks for it: (N, h, w) of a row, by its number, at each site.
        self._routed: dict[int, dict[int, Tensor]] | None = None

    def begin(self) -> None:
        """Forgets what belongs to the sampling before: who was drawn, and with which scale at which position."""
        super().begin()
        if self._routed is not None:
            self._routed.clear()
        for state in self._states.values():
            state.local_scales.clear()

    def lora(self, site: Site) -> dict[str, LowRank]:
        return self.adapter.lora_at(site, len(self.people) > 1)

    # ---- the decoupled cross-attention

    def added(self, site: Site, call: Call, hidden: Tensor, q: Tensor) -> Tensor | None:
        numbers, kinds = call.numbers or [], call.kinds
        call.check_rows(site, len(q))
        active = tuple(i for i, person in enumerate(self.people) if person.active(call.progress))
        drawn = [i for i in active if self.people[i].scale > 0]
        if not drawn:
            return None
        state = self._prepared(site, active, q)
        if POSITIVE in kinds:
            self.drawn.update(drawn)
        claims = self._regions.at(site, call, active, self.place, q)
        added = torch.zeros_like(q)
        # Positive rows first: negative ones take their scales.
        for kind in sorted(set(kinds), key=lambda kind: kind != POSITIVE):
            if kind not in state.kinds:
                continue
            rows = call.rows_of(kind)
            # All rows are of one kind where cond and uncond run apart: a view then saves the copies.
            every = len(rows) == q.shape[0]
            q_rows, hidden_rows = (q, hidden) if every else (q[rows], hidden[rows])
            identity = self._attend(
                site, call, state, active, [numbers[row] for row in rows], q_rows, hidden_rows, claims
            )
            if every:
                added = identity
            else:
                added[rows] = identity
        return added

    def _attend(
        self,
        site: Site,
        call: Call,
        state: _SiteState,
        active: Sequence[int],
        numbers: Sequence[int],
        q: Tensor,
        hidden: Tensor,
        claims: Claims | None,
    ) -> Tensor:
        """Sum over people of weight * attention to their tokens, for rows of one kind: (R, n, H * d).

        numbers: the rows', in the call's table.
        """
        of = state.kinds[call.table[numbers[0]].kind]
        heads = site.split_heads(q)
        differ = len({self.people[i].scale for i in active}) > 1
        if len(of.groups) == 1 and claims is None:
            # One person, or several whose tokens are equal (the unconditional ones): nothing to route.
            self._record(site, call, numbers, q.new_full((*q.shape[:2], len(active)), 1 / len(active)))
            seen = id_attention(heads, of.key, of.value)
            if differ:
                return seen * state.local_scales.of(call, numbers, state.scales, q.shape[1]).mean(dim=-1, keepdim=True)
            return seen * self.people[active[0]].scale
        shares = self._shares(state, of, hidden, claims)
        self._record(site, call, numbers, shares)
        # Where regions alone decide, whoever is at a position is there in every row.
        routed = claims is None or claims.overlap or claims.free is not None
        if differ and routed:
            weights = shares * state.local_scales.of(call, numbers, state.scales, q.shape[1])
            if call.table[numbers[0]].kind == POSITIVE:
                whole = shares.sum(dim=-1, keepdim=True).clamp(min=1e-6)
                state.local_scales.keep(numbers, weights.sum(dim=-1, keepdim=True) / whole)
        else:
            weights = shares * state.scales
        of_groups = torch.stack([weights[..., group].sum(dim=-1) for group in of.groups], dim=-1)
        return id_attention(heads, of.key, of.value, of_groups)

    def _shares(self, state: _SiteState, of: _Conditions, hidden: Tensor, claims: Claims | None) -> Tensor:
        """The share of each position that each active person has: (R, n, A), at most 1 together.

        A region gives its person the share of a position that lies inside it. What the regions leave is shared by the
        people without one, by routing (eq. 2), or is nobody's. Where regions overlap the router decides between those
        who claim the position: who is chosen gets their whole share, the others what that leaves.
        """
        if claims is None:
            return _evenly(self._chosen(state, of, hidden, None))
        shares = claims.shares.expand(len(hidden), -1, -1)
        if claims.overlap:
            chosen = self._chosen(state, of, hidden, claims.shares > 0)
            first, others = shares * chosen, shares * (1 - chosen)
            first = first / first.sum(dim=-1, keepdim=True).clamp(min=1)
            left = 1 - first.sum(dim=-1, keepdim=True)
            shares = first + others * (left / others.sum(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
        if claims.free is not None:
            left = (1 - shares.sum(dim=-1, keepdim=True)).clamp(min=0)
            shares = shares + left * _evenly(self._chosen(state, of, hidden, claims.free))
        return shares

    def _chosen(self, state: _SiteState, of: _Conditions, hidden: Tensor, claims: Tensor | None) -> Tensor:
        """Whom eq. 2 chooses among those who claim a position, 1 or 0: (R, n, A).

        claims: bool, for all rows and positions or for each, of the A active people, or None if all claim all. People
        whose tokens are equal (the unconditional ones), whom no router can tell apart, are chosen together.
        """
        if of.router_keys is None or state.theta is None:
            # One person alone: theirs is what they claim.
            one = state.scales.new_ones(*hidden.shape[:2], 1)
            return one if claims is None else one * claims
        logits = routing_logits(hidden, state.theta, of.router_keys)
        if claims is not None:
            logits = logits.masked_fill(~claims, -torch.inf)
        return choose(logits, group_of=of.group_of)

    def _record(self, site: Site, call: Call, numbers: Sequence[int], shares: Tensor) -> None:
        """Gives the routing maps the shares (R, n, A) of the active people, while all people are active."""
        rows = [call.table[number] for number in numbers]
        if rows[0].kind != POSITIVE or shares.shape[-1] != len(self.people):
            return
        if self.routing is not None:
            self.routing.add(site, call, [row.picture for row in rows], shares)
        if self._routed is not None and site.index not in call.repeated:
            maps = shares.detach().float().transpose(1, 2).unflatten(-1, call.shape_at(site, shares.shape[1]))
            for number, own in zip(numbers, maps, strict=True):
                # Sites come in the order in which the UNet runs them: one that is there already begins a new call.
                seen = self._routed.setdefault(number, {})
                if site.index in seen:
                    seen.clear()
                seen[site.index] = own

    def locates(self) -> bool:
        """One person alone has every position."""
        several = len(self.people) > 1
        self._routed = {} if several else None
        return several

    def located(self, person: int, number: int) -> Tensor | None:
        """The mean of the router's choices at the sites that have run."""
        maps = [own[person] for own in (self._routed or {}).get(number, {}).values()]
        if not maps:
            return None
        shape = max((own.shape for own in maps), key=lambda shape: shape[0] * shape[1])
        resized = [F.interpolate(own[None, None], size=shape, mode="bilinear", align_corners=False) for own in maps]
        return torch.cat(resized).mean(dim=0)[0]

    # ---- what does not change from step to step, unless it is trained

    def _prepared(self, site: Site, active: tuple[int, ...], q: Tensor) -> _SiteState:
        """The site's state for these people and a query's device and dtype."""
        state = self._states.setdefault(site.index, _SiteState())
        made_for, several = (active, q.device, q.dtype), len(active) > 1
        tokens = {kind for i in active for kind in self.people[i].tokens}
        layers, router = self.adapter.faceid_at(site), self.adapter.router_at(site)
        if state.made_for != made_for:
            state.made_for = made_for
            state.scales = q.new_tensor([self.people[i].scale for i in active])
            state.local_scales.clear()
        elif not (layers.trained or (several and router.trained) or self._tokens_trained(active)):
            return state
        state.kinds, state.theta = {}, router.theta(q) if several else None
        for kind in tokens:
            own = torch.stack([self.people[i].tokens[kind].to(q.device, torch.float32) for i in active])
            groups: list[list[int]] = []
            for place, one in enumerate(own):
                same = next((group for group in groups if torch.equal(own[group[0]], one)), None)
                if same is None:
                    groups.append([place])
                else:
                    same.append(place)
            group_of = [next(g for g, group in enumerate(groups) if place in group) for place in range(len(active))]
            key, value = layers.keys_values(site, own[[group[0] for group in groups]][None])
            state.kinds[kind] = _Conditions(
                groups,
                torch.tensor(group_of, device=q.device),
                key.to(q.dtype).contiguous(),
                value.to(q.dtype).contiguous(),
                router.router_keys(own).to(q.dtype) if several else None,
            )
        return state

    def _tokens_trained(self, active: Sequence[int]) -> bool:
        return any(tokens.requires_grad for i in active for tokens in self.people[i].tokens.values())


def _evenly(chosen: Tensor) -> Tensor:
    """Who was chosen for a position, (R, n, A), 1 or 0, as shares of it."""
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------------------------------------- method


class UniPortrait(Method):
    """UniPortrait for the hosts: its adapter is an `Adapter`, what it needs of an identity a `Person`."""

    name = "uniportrait"

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> Adapter:
        router = files["router"].tensors if "router" in files else None
        return Adapter.from_tensors(files["faceid"].tensors, router, (names["faceid"], names.get("router", "router")))

    def check_fits(self, adapter: Adapter, sites: Sequence[Site]) -> None:
        adapter.check_fits(sites)

    def text_attentions(self, adapter: Adapter) -> dict[str, list[tuple[int, int]]]:
        return {"to_k": list(adapter.id_attentions.values())}

    def feature_widths(self, adapter: Adapter) -> dict[str, int]:
        return {
            "intrinsic": adapter.embedding.intrinsic_width,
            "structure": adapter.embedding.structure_width,
        }

    def encode(
        self, adapter: Adapter, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> Person:
        """F_id of the identity, with those mixed into it, and of no face."""
        beta = float(own["structure"])

        def id_tokens(references: Sequence[Reference]) -> Tensor:
            return _embed(adapter, [reference.features for reference in references], beta)

        others = [id_tokens(mixed.references) for mixed in faces.mixed]
        tokens = {
            POSITIVE: interpolate(id_tokens(faces.references), others, [mixed.weight for mixed in faces.mixed]),
            NEGATIVE: _embed(adapter, [faces.no_face], beta),
        }
        scale = float(options["scale"]) * float(own["scale"])
        return Person(tokens, scale, placement.start, placement.end, placement.region)

    def notices(self, options: Options, own: Sequence[Options]) -> list[Notice]:
        if options["scale"] == 0:
            found = [Notice("scale", "it is 0: nobody is drawn")]
        else:
            found = [
                Notice(f"identities[{i}].scale", "it is 0: this person is not drawn")
                for i, one in enumerate(own)
                if one["scale"] == 0
            ]
        if options["lora_scale"] == 0:
            found.append(Notice("lora_scale", "it is 0: the adapter's LoRA is left out"))
        return found

    def rule(self, adapter: Adapter, people: Sequence[Person], options: Options) -> UniPortraitRule:
        return UniPortraitRule(adapter, people, float(options["lora_scale"]))


METHOD = UniPortrait()


def _embed(adapter: Adapter, features: Sequence[FaceFeatures], beta: float) -> Tensor:
    """F_id from the features of one person's photos, concatenated along the tokens (sec. 3.2): (T, D) float32."""
    intrinsic = torch.cat([one.intrinsic for one in features]).float()
    structure = torch.cat([one.structure for one in features]).float()
    return adapter.embedding(intrinsic[None], structure[None], beta)[0]
