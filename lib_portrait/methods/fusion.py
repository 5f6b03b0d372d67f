"""Fusion Is All You Need: Face Fusion for Customized Identity-Preserving Image Synthesis.

Under review as a conference paper at ICLR 2025; no code or weights are published, so the file layout is this project's.

In the paper's order: the reference's latent runs through the same UNet, whose hidden states h_f at every
cross-attention two new linear layers turn into keys and values (sec. 3.2, eq. 2), which stand behind those of the text
in one softmax (eq. 3 to 5). Several references of one person follow each other (sec. 3.3, eq. 6); several people are
kept apart by masks (sec. 3.4, eq. 7).

Notation: N identities, m positions of a reference at a site, n positions of the picture, H heads of width d,
C channels of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Around, Call, Injection
from lib_portrait.attention.rows import POSITIVE, mark
from lib_portrait.attention.sites import Site
from lib_portrait.errors import PortraitError

# Whom a position's queries see besides the text, where it is not the number of one identity.
EVERYBODY, NOBODY = -1, -2
# A position lies inside a mask where at least this share of it does.
INSIDE = 0.5

# h_f of one reference: its hidden states at each cross-attention, by site number, (m, C) each.
HiddenStates = Mapping[int, Tensor]


# ---------------------------------------------------------------------------------------------- fused attention, eq. 2


class FaceKeys(nn.Module):
    """Linear_kf and Linear_vf of one site (eq. 2): the only weights that are trained."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.to_k_face = nn.Linear(channels, inner, bias=False)
        self.to_v_face = nn.Linear(channels, inner, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """K_f and V_f of a reference's hidden states: (..., m, C) -> (..., m, inner) each."""
        return self.to_k_face(hidden), self.to_v_face(hidden)


class FaceFusion(nn.ModuleDict):
    """A `FaceKeys` for every cross-attention of a UNet, by site number."""

    @staticmethod
    def for_sites(sites: Sequence[Site]) -> FaceFusion:
        """New layers for a UNet's sites; they begin as the keys and values of the self-attention beside each.

        That one attends to hidden states of the same width, so the reference is seen in its own terms from the start.
        """
        made = FaceFusion()
        beside = {site.path.removesuffix(".attn1"): site for site in sites if not site.cross}
        for site in sites:
            if site.cross:
                layers = FaceKeys(site.channels, site.inner)
                own = beside[site.path.removesuffix(".attn2")]
                for name, layer in (("to_k", layers.to_k_face), ("to_v", layers.to_v_face)):
                    layer.weight.data.copy_(cast(nn.Linear, own.module.get_submodule(name)).weight.data)
                made[str(site.index)] = layers
        return made

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], field: str = "checkpoint") -> FaceFusion:
        """The layers of a file with the keys ``{site}.to_k_face.weight`` and ``{site}.to_v_face.weight``.

        Raises PortraitError for other keys, and for shapes that do not belong together.
        """
        made, keys = FaceFusion(), set(tensors)
        for name in sorted(tensors):
            number = name.partition(".")[0]
            pair = {f"{number}.to_k_face.weight", f"{number}.to_v_face.weight"}
            if not number.isdecimal() or name not in pair or not pair <= keys:
                raise PortraitError(field, f"{name!r} is no key of Fusion's layers, or one of a pair", _REMEDY)
            shape = tuple(tensors[name].shape)
            if len(shape) != 2 or shape != tuple(tensors[min(pair)].shape):
                raise PortraitError(field, f"{name} has the shape {shape}", _REMEDY)
            if number not in made:
                with torch.device("meta"):
                    made[number] = FaceKeys(shape[1], shape[0])
        made.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return made.eval().requires_grad_(False)

    def of(self, site: Site) -> FaceKeys:
        return cast(FaceKeys, self[str(site.index)])

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the layers were made for a UNet with these attention sites."""
        wanted = {str(site.index): (site.inner, site.channels) for site in sites if site.cross}
        found = {number: tuple(cast(FaceKeys, layers).to_k_face.weight.shape) for number, layers in self.items()}
        if wanted != found:
            differing = sorted((name for name in wanted | found if wanted.get(name) != found.get(name)), key=int)
            first = differing[0]
            raise PortraitError(
                "checkpoint",
                f"the adapter was made for another kind of model: at {len(differing)} of its attention layers, first "
                f"layer {first}, where it has {found.get(first)} and the loaded model {wanted.get(first)}",
                "Load a Stable Diffusion checkpoint of the adapter's family.",
            )


_REMEDY = "Use a file that the recipe `fusion` exported, unmodified."


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, faces: Sequence[tuple[Tensor, Tensor]], seen: Tensor | None = None
) -> Tensor:
    """One softmax over the text's keys and the faces' (eq. 3 to 7): (B, H, n, d).

    q (B, H, n, d); k, v (B, H, m_c, d) of the text; faces: K_f and V_f of each identity, (H, m, d) each, several
    references one behind the other (eq. 6). seen (n): whom each position's queries may see besides the text, the
    number of an identity, EVERYBODY or NOBODY; None for everybody everywhere (eq. 3).

    The -inf of eq. 7 are keys that are left out: positions that see the same faces are attended to together, so there
    is no mask of n times all keys.
    """

    def attend(queries: Tensor, visible: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        rows = (len(q), -1, -1, -1)
        keys = torch.cat([k, *(key.expand(rows) for key, _ in visible)], dim=2)
        values = torch.cat([v, *(value.expand(rows) for _, value in visible)], dim=2)
        return F.scaled_dot_product_attention(queries, keys, values)

    if seen is None:
        return attend(q, faces)
    out = torch.empty_like(q)
    for who in seen.unique().tolist():
        positions = (seen == who).nonzero().flatten()
        visible = faces if who == EVERYBODY else [] if who == NOBODY else [faces[who]]
        out[:, :, positions] = attend(q[:, :, positions], visible)
    return out


def seen_by(masks: Sequence[Tensor | None], latent: tuple[int, int], shape: tuple[int, int]) -> Tensor | None:
    """Whom the positions of a site see (eq. 7): (h * w) for `fused_attention`, or None where nobody has a mask.

    masks: (H, W) weights in [0, 1] of where each identity belongs, at any size, or None. latent, shape: (height, width)
    of the picture's latent and of the site. The key of identity i is out of sight wherever another has a mask, also
    inside i's own; so where two masks overlap only the text is seen.
    """
    if all(mask is None for mask in masks):
        return None
    inside = []
    for mask in masks:
        if mask is None:
            inside.append(torch.zeros(shape[0] * shape[1], dtype=torch.bool))
            continue
        image = mask[None, None].float()
        if image.shape[2] > latent[0] or image.shape[3] > latent[1]:
            # Fine masks are averaged down to the latent first: bilinear reduction alone would skip pixels.
            image = F.interpolate(image, size=latent, mode="area")
        image = F.interpolate(image, size=shape, mode="bilinear", align_corners=False)
        inside.append(image.flatten() >= INSIDE)
    claims = torch.stack(inside)
    number = claims.sum(dim=0)
    seen = torch.where(number == 1, claims.int().argmax(dim=0), EVERYBODY)
    return torch.where(number > 1, NOBODY, seen)


# --------------------------------------------------------------------------------------------- reference pass, sec. 3.1


class _Recording:
    """The rule of the reference pass: keeps what enters every cross-attention, and changes nothing."""

    def __init__(self) -> None:
        self.hidden: dict[int, Tensor] = {}

    def active(self, progress: float) -> bool:
        return True

    def must_visit(self, site: Site) -> bool:
        return site.cross

    def overrides(self, site: Site, call: Call) -> dict[str, Around]:
        def keep(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            call.visited.add(site.index)
            self.hidden[site.index] = site.arguments(args, kwargs)[0]
            return host(*args, **kwargs)

        return {"": keep} if site.cross else {}


@torch.no_grad()
def hidden_states(unet: nn.Module, run: Callable[[Tensor], object], context: Tensor) -> list[HiddenStates]:
    """h_f of the references of one UNet call, one mapping a row (sec. 3.1).

    context (B, m, D): the text that the references are seen with. run: calls the UNet with the references' latents and
    a context, which is given to it marked. Raises PortraitError where the UNet passes a cross-attention by.
    """
    rule = _Recording()
    with Injection(unet, rule):
        run(mark(context, POSITIVE))
    return [{site: hidden[row].clone() for site, hidden in rule.hidden.items()} for row in range(len(context))]


# ---------------------------------------------------------------------------------------------------------------- rule


@dataclass(frozen=True)
class FusedIdentity:
    """One person: the hidden states of each reference, and where the person belongs.

    region: (h, w) weights in [0, 1] at any size, or None for everywhere that nobody else has.
    start, end: share of the sampling in which the person takes part, 0 to 1.
    """

    references: tuple[HiddenStates, ...]
    region: Tensor | None = None
    start: float = 0.0
    end: float = 1.0

    def active(self, progress: float) -> bool:
        return self.start <= progress and (progress < self.end or self.end >= 1.0)


@dataclass
class _SiteState:
    """Of one site, what does not change from step to step: K_f and V_f by identity, and who is seen where."""

    made_for: object = None
    faces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    seen: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)


class FusionRule:
    """Fused attention at the cross-attentions of one UNet, for `attention.Injection`.

    seeing: the kinds of rows that see the references, a property of the weights. Rows of other kinds run as the host
    has them.
    """

    def __init__(self, fusion: FaceFusion, people: Sequence[FusedIdentity], seeing: Sequence[int] = (POSITIVE,)):
        self.fusion = fusion
        self.people = list(people)
        self.seeing = tuple(seeing)

    def active(self, progress: float) -> bool:
        return any(person.active(progress) for person in self.people)

    def must_visit(self, site: Site) -> bool:
        return site.cross

    def overrides(self, site: Site, call: Call) -> dict[str, Around]:
        state = _SiteState()

        def fused(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            x, context = site.arguments(args, kwargs)
            kinds = call.kinds
            if len(kinds) != len(x):
                raise PortraitError(
                    "rows",
                    f"{site.path} sees {len(x)} rows, the UNet was called with {len(kinds)}",
                    "Switch off extensions that split or join the batch inside the UNet.",
                    500,
                )
            call.visited.add(site.index)
            rows = [row for row, kind in enumerate(kinds) if kind in self.seeing]
            if len(rows) == len(kinds):
                return self._fused(site, call, state, x, context)
            out = host(*args, **kwargs)
            if rows:
                out[rows] = self._fused(site, call, state, x[rows], context[rows])
            return out

        return {"": fused} if site.cross else {}

    def _fused(self, site: Site, call: Call, state: _SiteState, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = site.qkv(x, context)
        active = [number for number, person in enumerate(self.people) if person.active(call.progress)]
        faces = self._faces(site, state, q)
        where = (call.latent, x.shape[1], *active)
        if where not in state.seen:
            shape = call.shape_at(site, x.shape[1])
            seen = seen_by([self.people[number].region for number in active], call.latent, shape)
            state.seen[where] = None if seen is None else seen.to(q.device)
        return site.out(fused_attention(q, k, v, [faces[number] for number in active], state.seen[where]))

    def _faces(self, site: Site, state: _SiteState, q: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """K_f and V_f of every identity (eq. 2, 6), (H, m, d) each; kept while the layers need no gradients."""
        layers = self.fusion.of(site)
        trained = torch.is_grad_enabled() and layers.to_k_face.weight.requires_grad
        made_for = (q.device, q.dtype)
        if trained or state.made_for != made_for:
            state.seen.clear()
            state.made_for = None if trained else made_for
            for number, person in enumerate(self.people):
                hidden = torch.cat([reference[site.index] for reference in person.references])
                weight = layers.to_k_face.weight
                keys, values = layers(hidden.to(weight.device, weight.dtype))
                heads = (site.split_heads(one[None].to(q.device, q.dtype))[0] for one in (keys, values))
                state.faces[number] = cast(tuple[Tensor, Tensor], tuple(heads))
        return state.faces
