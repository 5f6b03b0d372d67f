"""UniPortrait: A Unified Framework for Identity-Preserving Single- and Multi-Human Image Personalization.

arXiv 2408.05939; the numbers to match are those of the official code (junjiehe96/UniPortrait, Apache-2.0).

In the paper's order: the ID embedding (sec. 3.2) turns the features of one person's photos into a few tokens F_id; the
decoupled cross-attention adds an attention over these tokens to the one over the text; with several people the ID
router (sec. 3.3) gives every position of the picture to one of them; LoRA adapts the UNet's own attention (sec. 3.4).

Notation: N identities, T ID tokens each (16), D context width (768), H heads of width d, n positions.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Around, Call
from lib_portrait.attention.lora import FusedLinear, LowRank
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.regions import Box, Region, coverage
from lib_portrait.attention.rows import NEGATIVE, POSITIVE
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.faces.features import FaceFeatures
from lib_portrait.faces.references import IdentityFaces, Reference
from lib_portrait.faces.weights import checked, fill
from lib_portrait.methods.base import Method, Options, Placement, Rule

# By how much of a position regions must overlap for the router to be asked.
OVERLAP = 0.01
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
# The names the linear layers have inside an attention layer of the UNet.
PATHS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}

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


def _mlp(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, inside * 2), nn.GELU(), nn.Linear(inside * 2, outside))


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
        self.proj_id = _mlp(intrinsic, width)
        self.proj_clip = _mlp(structure, width)
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
            with torch.device("meta"):
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


# ------------------------------------------------------------------------------------------------------------- adapter


@dataclass(frozen=True)
class Router:
    """The ID router of one site (eq. 3): theta on positions, phi on aggregated identities, both two-layer MLPs.

    theta: (weight (2C, C), bias (2C), weight (C, 2C)); phi: the same from D; aggregate: weight (1, T), bias (1).
    """

    theta: tuple[Tensor, Tensor, Tensor]
    phi: tuple[Tensor, Tensor, Tensor]
    aggregate: tuple[Tensor, Tensor]

    def identity_keys(self, tokens: Tensor) -> Tensor:
        """phi(W_aggr F_id) folded with theta's last layer, which is linear: (N, T, D) -> (N, 2C)."""
        w_in, bias, w_out = (x.to(tokens) for x in self.phi)
        weight, offset = (x.to(tokens) for x in self.aggregate)
        aggregated = F.linear(tokens.transpose(1, 2), weight, offset).squeeze(-1)
        keys = F.linear(F.gelu(F.linear(aggregated, w_in, bias)), w_out)
        return keys @ self.theta[2].to(tokens)


@dataclass(frozen=True)
class SiteWeights:
    """What an adapter holds for one site. `key` and `value` (W_k^id, W_v^id: (inner, D)) stand at cross sites only."""

    lora_single: dict[str, LowRank] = field(default_factory=dict)
    lora_multi: dict[str, LowRank] = field(default_factory=dict)
    key: Tensor | None = None
    value: Tensor | None = None
    router: Router | None = None


@dataclass(frozen=True)
class Adapter:
    """A UniPortrait adapter: the ID embedding and the weights of every attention site, by site number.

    files: the names of the faceid file and the router file that it was read from.
    """

    embedding: IDEmbedding
    sites: dict[int, SiteWeights]
    files: tuple[str, str] = ("faceid", "router")

    @property
    def has_router(self) -> bool:
        return any(weights.router is not None for weights in self.sites.values())

    @staticmethod
    def from_tensors(
        faceid: Mapping[str, Tensor], router: Mapping[str, Tensor] | None, files: tuple[str, str] = ("faceid", "router")
    ) -> Adapter:
        """An adapter from the flat tensors of the released files.

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
        sites = {}
        for index in sorted({*single, *multi}):
            own = _SiteTensors(files[0], index, single.get(index, {}))
            other = _SiteTensors(files[1], index, multi.get(index, {}))
            key = value = routed = None
            if own.any_of(ID_ATTENTION):
                key = own.take("to_k_faceid.weight", None, width)
                value = own.take("to_v_faceid.weight", *key.shape)
            if router is not None and (key is not None or other.any_of(ROUTER_LAYERS)):
                routed = _router(other, count, width)
                if key is None:
                    raise _unlike(files[1], f"it has a router at site {index}, where {files[0]} has no ID attention")
            sites[index] = SiteWeights(_low_rank(own), _low_rank(other), key, value, routed)
        return Adapter(embedding, sites, files)

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the adapter was made for a UNet with these attention sites."""
        own = {index: weights for index, weights in self.sites.items() if weights.key is not None}
        cross = [site for site in sites if site.cross]
        for site in cross:
            weights = own.get(site.index)
            found = None if weights is None or weights.key is None else tuple(weights.key.shape)
            if found != (site.inner, site.context):
                raise PortraitError(
                    "checkpoint",
                    f"{self.files[0]} was made for another kind of model: it has {len(own)} ID attentions, the loaded "
                    f"model {len(cross)} text attentions; at {site.path} it has {found}, the model "
                    f"{(site.inner, site.context)}",
                    FAMILY,
                )
        if len(own) != len(cross) or not set(self.sites) <= {site.index for site in sites}:
            raise PortraitError(
                "checkpoint",
                f"{self.files[0]} was made for another kind of model: it has {len(own)} ID attentions, the loaded "
                f"model {len(cross)} text attentions, among {len(self.sites)} and {len(sites)} attention layers",
                FAMILY,
            )
        for site in sites:
            self._check_layers(site)

    def _check_layers(self, site: Site) -> None:
        """Raises PortraitError unless LoRA and router of a site fit its linear layers."""
        weights = self.sites.get(site.index, SiteWeights())
        wanted = {
            "to_q": (site.inner, site.channels),
            "to_k": (site.inner, site.context),
            "to_v": (site.inner, site.context),
            "to_out": (site.channels, site.inner),
        }
        found = [
            (file, f"{name}_lora", (pair.up.shape[0], pair.down.shape[1]), wanted[name])
            for file, pairs in zip(self.files, (weights.lora_single, weights.lora_multi), strict=True)
            for name, pair in pairs.items()
        ]
        if weights.router is not None:
            hidden, width = weights.router.theta[0].shape
            found.append((self.files[1], "to_q_router.0.weight", (hidden, width), (hidden, site.channels)))
        for file, name, shape, fitting in found:
            if shape != fitting:
                raise PortraitError(
                    "checkpoint",
                    f"{SITES}{site.index}.{name} in {file} is made for a layer of shape ({shape[0]}, {shape[1]}), the "
                    f"loaded model has ({fitting[0]}, {fitting[1]}) at {site.path}",
                    FAMILY,
                )


@dataclass(frozen=True)
class _SiteTensors:
    """The tensors that one file holds for one site."""

    file: str
    index: int
    tensors: Mapping[str, Tensor]

    def any_of(self, names: Collection[str]) -> bool:
        return any(name in self.tensors for name in names)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of that name and shape, None for any size. Raises PortraitError when it is not like that."""
        return checked(self.tensors, name, shape, self.file, f"{SITES}{self.index}.")


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


def _low_rank(site: _SiteTensors) -> dict[str, LowRank]:
    pairs = {}
    for name in PROJECTIONS:
        up, down = f"{name}_lora.up.weight", f"{name}_lora.down.weight"
        if site.any_of((up, down)):
            first = site.take(down, None, None)
            pairs[name] = LowRank(up=site.take(up, None, first.shape[0]), down=first)
    return pairs


def _router(site: _SiteTensors, tokens: int, width: int) -> Router:
    """tokens: T. width: D."""
    theta = _two_layers(site, "to_q_router", None, None)
    phi = _two_layers(site, "to_k_router", width, theta[2].shape[0])
    return Router(theta, phi, (site.take("aggr_router.weight", 1, tokens), site.take("aggr_router.bias", 1)))


def _two_layers(
    site: _SiteTensors, name: str, inside: int | None, outside: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    weight = site.take(f"{name}.0.weight", None, inside)
    hidden = weight.shape[0]
    return weight, site.take(f"{name}.0.bias", hidden), site.take(f"{name}.2.weight", outside, hidden)


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


# ---------------------------------------------------------------------------------------------------------------- rule


@dataclass(frozen=True)
class _Regions:
    """The active people's regions at one site.

    shares (1, n, A), 0 for those without one, who are `free` (A) bool, or None where all have one.
    overlap: whether more than one claims a position.
    """

    shares: Tensor
    free: Tensor | None
    overlap: bool


@dataclass
class _SiteState:
    """Keys, values and router keys of one site for one set of active people; and its query while the site runs.

    key, value: per kind (G, H, T, d), one entry for each group of people whose tokens are equal; group_of: per kind
    (A), the group of each active person. scales: (A), of the active people. local_scales: by the number of a positive
    row, the scale that each position had when that row was last here, (n, 1); filled while people's scales differ.
    """

    active: tuple[int, ...] = ()
    device: object = None
    groups: dict[int, list[list[int]]] = field(default_factory=dict)
    group_of: dict[int, Tensor] = field(default_factory=dict)
    key: dict[int, Tensor] = field(default_factory=dict)
    value: dict[int, Tensor] = field(default_factory=dict)
    router_key: dict[int, Tensor] = field(default_factory=dict)
    theta: tuple[Tensor, Tensor] | None = None
    scales: Tensor | None = None
    local_scales: dict[int, Tensor] = field(default_factory=dict)
    regions: dict[Hashable, _Regions] = field(default_factory=dict)
    query: Tensor | None = None
    hidden: Tensor | None = None


class UniPortraitRule(Rule[Person]):
    """UniPortrait at the attention sites of one UNet, for `attention.Injection`.

    At every cross-attention: text attention + s * attention(q, W_k^id F, W_v^id F) before the output projection
    (decoupled cross-attention, sec. 3.2), where with several people each position attends to the one the router gives
    it (eq. 2), or to the one whose region it lies in. At every attention, self and cross: LoRA on q, k, v and out, one
    set of weights for one person, another for several.

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
        super().__init__(people, routing)
        self.adapter = adapter
        self.lora_scale = lora_scale
        self._covered: dict[tuple[int, Box, tuple[int, int]], Tensor] = {}
        self._states: dict[int, _SiteState] = {}

    def begin(self) -> None:
        """Forgets what belongs to the sampling before: who was drawn, and with which scale at which position."""
        super().begin()
        for state in self._states.values():
            state.local_scales.clear()

    # ---- what Injection asks

    def overrides(self, site: Site, call: Call) -> dict[str, Around]:
        weights = self.adapter.sites.get(site.index, SiteWeights())
        pairs = weights.lora_single if len(self.people) == 1 else weights.lora_multi
        linears = {
            name: FusedLinear(site.module.get_submodule(PATHS[name]), pair, self.lora_scale)
            for name, pair in pairs.items()
            if self.lora_scale > 0
        }

        def project(name: str, host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return linears[name](host, x, call) if name in linears else host(x)

        functions: dict[str, Around] = {
            PATHS[name]: lambda host, x, name=name: project(name, host, x) for name in linears
        }
        if site.cross:
            state = self._states[site.index] = _SiteState()

            def query(host: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
                state.hidden, state.query = x, project("to_q", host, x)
                return state.query

            def output(host: Callable[[Tensor], Tensor], attended: Tensor) -> Tensor:
                hidden, q = state.hidden, state.query
                state.hidden = state.query = None
                if hidden is None or q is None or attended.shape != q.shape:
                    raise PortraitError(
                        "model",
                        f"{site.path} was run in a way its projections do not show",
                        "Choose another cross attention optimization in Settings > Optimizations.",
                        500,
                    )
                call.visited.add(site.index)
                return project("to_out", host, self._add_identities(site, call, state, hidden, q, attended))

            functions["to_q"] = query
            functions["to_out.0"] = output
        return functions

    # ---- the decoupled cross-attention

    def _add_identities(
        self, site: Site, call: Call, state: _SiteState, hidden: Tensor, q: Tensor, attended: Tensor
    ) -> Tensor:
        """attended + s * identity attention; hidden (B, n, C), q and attended (B, n, H * d)."""
        numbers, kinds = call.numbers or [], call.kinds
        if len(kinds) != q.shape[0]:
            raise PortraitError(
                "rows",
                f"{site.path} sees {q.shape[0]} rows, the UNet was called with {len(kinds)}",
                "Switch off extensions that split or join the batch inside the UNet.",
                500,
            )
        active = tuple(i for i, person in enumerate(self.people) if person.active(call.progress))
        if not any(self.people[i].scale > 0 for i in active):
            return attended
        if state.active != active or state.device != (q.device, q.dtype):
            self._prepare(site, state, active, q)
        if POSITIVE in kinds:
            self.drawn.update(i for i in active if self.people[i].scale > 0)
        regions = self._regions_at(site, call, state, q.shape[1]) if self._has_regions(active) else None
        added = torch.zeros_like(attended)
        # Positive rows first: negative ones take their scales.
        for kind in sorted(set(kinds), key=lambda kind: kind != POSITIVE):
            if kind not in state.key:
                continue
            rows = call.rows_of(kind)
            # All rows are of one kind where cond and uncond run apart: a view then saves the copies.
            every = len(rows) == q.shape[0]
            q_rows, hidden_rows = (q, hidden) if every else (q[rows], hidden[rows])
            identity = self._attend(site, call, state, [numbers[row] for row in rows], q_rows, hidden_rows, regions)
            if every:
                added = identity
            else:
                added[rows] = identity
        return attended + added.to(attended.dtype)

    def _attend(
        self,
        site: Site,
        call: Call,
        state: _SiteState,
        numbers: Sequence[int],
        q: Tensor,
        hidden: Tensor,
        regions: _Regions | None,
    ) -> Tensor:
        """Sum over people of weight * attention to their tokens, for rows of one kind: (R, n, H * d).

        numbers: the rows', in the call's table.
        """
        kind = call.table[numbers[0]].kind
        groups = state.groups[kind]
        heads = site.split_heads(q)
        if len(groups) == 1 and regions is None:
            # One person, or several whose tokens are equal (the unconditional ones): nothing to route.
            self._record(
                site, call, state, numbers, q.new_full((*q.shape[:2], len(state.active)), 1 / len(state.active))
            )
            key, value = (x[kind].expand(q.shape[0], -1, -1, -1) for x in (state.key, state.value))
            seen = F.scaled_dot_product_attention(heads, key, value).transpose(1, 2).flatten(2)
            if self._differ(state.active):
                return seen * self._scales(call, state, numbers, q.shape[1]).mean(dim=-1, keepdim=True)
            return seen * self.people[groups[0][0]].scale
        weights = self._weights(site, call, state, numbers, hidden, regions)
        out = torch.zeros_like(q)
        for g in range(len(groups)):
            # Each position is computed for the people it belongs to only: with eight people the cost is that of one.
            row, position = weights[..., g].nonzero(as_tuple=True)
            if not len(row):
                continue
            chosen = site.split_heads(q[row, position].unsqueeze(0))
            seen = F.scaled_dot_product_attention(chosen, state.key[kind][g : g + 1], state.value[kind][g : g + 1])
            seen = seen[0].transpose(0, 1).flatten(1) * weights[row, position, g].unsqueeze(-1)
            out[row, position] += seen.to(out.dtype)
        return out

    def _weights(
        self,
        site: Site,
        call: Call,
        state: _SiteState,
        numbers: Sequence[int],
        hidden: Tensor,
        regions: _Regions | None,
    ) -> Tensor:
        """How much each position belongs to each group of people, scales included: (R, n, G).

        A region gives its person the share of a position that lies inside it. What the regions leave is shared by the
        people without one, by routing (eq. 2), or is nobody's. Where regions overlap the router decides between those
        who claim the position: who is chosen gets their whole share, the others what that leaves.
        """
        active, kind = state.active, call.table[numbers[0]].kind
        if regions is None:
            everybody = torch.ones(len(active), dtype=torch.bool, device=hidden.device)
            weights = _evenly(self._chosen(state, kind, hidden, everybody), hidden)
        else:
            weights = self._shares(state, kind, hidden, regions)
        self._record(site, call, state, numbers, weights)
        assert state.scales is not None
        # Where regions alone decide, whoever is at a position is there in every row.
        routed = regions is None or regions.overlap or regions.free is not None
        if routed and self._differ(active):
            shares, weights = weights, weights * self._scales(call, state, numbers, weights.shape[1])
            if kind == POSITIVE:
                local = weights.sum(dim=-1, keepdim=True) / shares.sum(dim=-1, keepdim=True).clamp(min=1e-6)
                for number in dict.fromkeys(numbers):
                    own = [row for row, other in enumerate(numbers) if other == number]
                    state.local_scales[number] = local[own].mean(dim=0)
        else:
            weights = weights * state.scales
        groups = [[active.index(i) for i in group] for group in state.groups[kind]]
        return torch.stack([weights[..., group].sum(dim=-1) for group in groups], dim=-1)

    def _differ(self, active: Sequence[int]) -> bool:
        """Whether the active people's scales do: else no row needs to know who is where in another."""
        return len({self.people[i].scale for i in active}) > 1

    def _scales(self, call: Call, state: _SiteState, numbers: Sequence[int], positions: int) -> Tensor:
        """The scale that each active person's share of each position has, for rows of one kind: (R, n, A).

        In positive rows it is the person's own. The tokens of negative rows cannot be routed, for they are the same for
        all; but guidance pushes away from what a negative row shows at a position, so it must show there as much of a
        face as the positive row does: every share of the position has the scale of whom the positive row of the same
        picture gave it to, at this site, when it last ran (the mean over several). In one call, and where a host runs
        the positive rows first, as the WebUI does, that is in the same step; where it runs them later, in the step
        before. Before any has run, and where it had another size, everybody has their own scale, which with equal
        tokens comes to the mean of all.
        """
        assert state.scales is not None
        own = state.scales.expand(positions, -1)
        found = []
        for row in (call.table[number] for number in numbers):
            known = [
                state.local_scales[other]
                for other, positive in call.table.items()
                if row.kind != POSITIVE
                and positive.kind == POSITIVE
                and row.picture == positive.picture
                and len(state.local_scales.get(other, ())) == positions
            ]
            found.append(torch.stack(known).mean(dim=0).expand_as(own) if known else own)
        return torch.stack(found)

    def _shares(self, state: _SiteState, kind: int, hidden: Tensor, regions: _Regions) -> Tensor:
        """The share of each position that each active person has with these regions: (R, n, A), at most 1 together."""
        shares = regions.shares
        if regions.overlap:
            chosen = self._chosen(state, kind, hidden, shares > 0)
            first, others = shares * chosen, shares * ~chosen
            first = first / first.sum(dim=-1, keepdim=True).clamp(min=1)
            left = 1 - first.sum(dim=-1, keepdim=True)
            shares = first + others * (left / others.sum(dim=-1, keepdim=True).clamp(min=1e-6)).clamp(max=1)
        if regions.free is not None:
            left = (1 - shares.sum(dim=-1, keepdim=True)).clamp(min=0)
            shares = shares + left * _evenly(self._chosen(state, kind, hidden, regions.free), hidden)
        return shares.expand(hidden.shape[0], -1, -1)

    def _record(self, site: Site, call: Call, state: _SiteState, numbers: Sequence[int], shares: Tensor) -> None:
        """Gives the routing maps the shares (R, n, A) of the active people, while all people are active."""
        rows = [call.table[number] for number in numbers]
        if self.routing is not None and rows[0].kind == POSITIVE and len(state.active) == len(self.people):
            self.routing.add(site, call, [row.picture for row in rows], shares)

    def _chosen(self, state: _SiteState, kind: int, hidden: Tensor, claims: Tensor) -> Tensor:
        """Whom eq. 2 chooses among those who claim a position: (R, n, A) bool, of largest logit (eq. 3).

        claims: bool, for all rows and positions or for each, of the A active people. People whose tokens are equal (the
        unconditional ones), whom no router can tell apart, are chosen together. Nobody is where nobody claims.
        """
        if len(state.active) == 1:
            return claims.expand(*hidden.shape[:2], 1)
        w_in, bias = state.theta  # type: ignore[misc]
        # theta's last layer is folded into the identities' keys, which saves one of its two matrix products.
        logits = F.gelu(F.linear(hidden.to(w_in.dtype), w_in, bias)) @ state.router_key[kind].T
        best = logits.masked_fill(~claims, -torch.inf).argmax(dim=-1)
        group_of = state.group_of[kind]
        return (group_of == group_of[best].unsqueeze(-1)) & claims

    # ---- what does not change from step to step

    def _prepare(self, site: Site, state: _SiteState, active: tuple[int, ...], q: Tensor) -> None:
        weights = self.adapter.sites[site.index]
        assert weights.key is not None and weights.value is not None
        state.active, state.device = active, (q.device, q.dtype)
        state.scales = q.new_tensor([self.people[i].scale for i in active])
        state.local_scales.clear()
        state.regions.clear()
        for kind in sorted({kind for i in active for kind in self.people[i].tokens}):
            tokens = [self.people[i].tokens[kind].to(q.device, torch.float32) for i in active]
            groups: list[list[int]] = []
            for person, own in zip(active, tokens, strict=True):
                same = next((g for g in groups if torch.equal(tokens[active.index(g[0])], own)), None)
                if same is None:
                    groups.append([person])
                else:
                    same.append(person)
            distinct = torch.stack([tokens[active.index(group[0])] for group in groups])
            state.groups[kind] = groups
            numbers = [next(g for g, group in enumerate(groups) if person in group) for person in active]
            state.group_of[kind] = torch.tensor(numbers, device=q.device)
            for store, matrix in ((state.key, weights.key), (state.value, weights.value)):
                projected = F.linear(distinct, matrix.to(q.device, torch.float32)).to(q.dtype)
                store[kind] = site.split_heads(projected).contiguous()
            if weights.router is not None and len(active) > 1:
                keys = weights.router.identity_keys(torch.stack(tokens))
                state.router_key[kind] = keys.to(q.dtype)
                w_in, bias, _ = weights.router.theta
                state.theta = (w_in.to(q.device, q.dtype), bias.to(q.device, q.dtype))

    def _has_regions(self, active: Sequence[int]) -> bool:
        return any(self.people[i].region is not None for i in active)

    def _coverage(self, person: int, latent: tuple[int, int]) -> Tensor:
        """The person's region on the latent, (h, w); zero without one."""
        key = (person, self.place, latent)
        if key not in self._covered:
            region = self.people[person].region
            self._covered[key] = torch.zeros(latent) if region is None else coverage(region, latent, self.place)
        return self._covered[key]

    def _regions_at(self, site: Site, call: Call, state: _SiteState, tokens: int) -> _Regions:
        shape = call.shape_at(site, tokens)
        key = (self.place, call.latent, shape)
        if key not in state.regions:
            maps = torch.stack([self._coverage(i, call.latent) for i in state.active])
            resized = F.interpolate(maps[None], size=shape, mode="bilinear", align_corners=False)
            shares = resized.flatten(2).transpose(1, 2)
            overlap = bool((shares.sum(dim=-1) > 1 + OVERLAP).any())
            reference = state.key[next(iter(state.key))]
            free = [self.people[i].region is None for i in state.active]
            freed = torch.tensor(free, device=reference.device) if any(free) else None
            state.regions[key] = _Regions(shares.to(reference), freed, overlap)
        return state.regions[key]


def _evenly(chosen: Tensor, like: Tensor) -> Tensor:
    """Who was chosen for a position, (R, n, A) bool, as shares of it."""
    shares = chosen.to(like.dtype)
    return shares / shares.sum(dim=-1, keepdim=True).clamp(min=1)


# -------------------------------------------------------------------------------------------------------------- method


class UniPortrait(Method):
    """UniPortrait for the hosts: its adapter is an `Adapter`, what it needs of an identity a `Person`."""

    name = "uniportrait"

    def load(self, files: Mapping[str, Mapping[str, Tensor]], names: Mapping[str, str]) -> Adapter:
        return Adapter.from_tensors(
            files["faceid"], files.get("router"), (names["faceid"], names.get("router", "router"))
        )

    def check_fits(self, adapter: Adapter, sites: Sequence[Site]) -> None:
        adapter.check_fits(sites)

    def text_attentions(self, adapter: Adapter) -> dict[str, list[tuple[int, int]]]:
        keys = [weights.key for weights in adapter.sites.values() if weights.key is not None]
        return {"to_k": [(key.shape[0], key.shape[1]) for key in keys]}

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
