"""InstantFamily: Masked Attention for Zero-shot Multi-ID Image Generation.

arXiv 2404.19427; no code or weights are published, so the file layout is this project's.

In the paper's order: of every face a recognition network gives one global and L^2 local tokens, each projected to the
width of the text's embeddings and stacked behind them (sec. 3.3, eq. 4, 5); every cross-attention of the UNet and of
the ControlNet makes keys and values of the stack with its own layers, and sees each face where its mask is (sec. 3.4,
eq. 6 to 8). The only weights here are the projections; what else is trained is the ControlNet, a file of its own that
the kit's manifest names.

What the paper leaves open: M_t is 1 everywhere. A projection is a linear layer and a layer norm, for the text's
embeddings are normalised so. Of several photos of one person the features are averaged, not their tokens stacked: with
the paper's mask every key counts everywhere, and so a person's presence in the others' places would grow with the
number of their photos. Negative rows see the text alone.

Notation: B rows, N faces, T = L^2 + 1 tokens each, D width of the context, H heads of width d, m tokens of the text,
n positions of the picture.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.lora import Unchanged
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.regions import Box, Region, bounds, coverage, grown, inside
from lib_portrait.attention.rows import POSITIVE
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.control_picture import Circle
from lib_portrait.errors import PortraitError
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.faces.weights import checked, fill, unfilled
from lib_portrait.methods.base import Method, Options, Placement, Rule

# How faces are kept apart (the option `mask`): M times the logits (eq. 6), keys left out where M is 0, or M = 1.
MULTIPLY, EXCLUDE, NONE = "multiply", "exclude", "none"

# Of the circles in control images, by the number of the identity: as far from one another as from a skeleton's limbs.
COLOURS = ("ffffff", "80ffff", "c0ff80", "808080", "ffc080", "8080ff", "ff80c0", "c08080")

_REMEDY = "Use a file that the recipe `instantfamily` exported, unmodified."


# ------------------------------------------------------------------------------------------- embedding stack, eq. 4, 5


@dataclass(frozen=True)
class Properties:
    """What the weights were trained with; the file's metadata holds it.

    local_side: L, the side of the grid of local features. margin: by which share of their width and height boxes of
    faces are grown (sec. 4.2). inner: the width of the keys at each cross-attention of the UNet, by site. colours: of
    the circles in the control image, "rrggbb" by the number of the identity. circle: their radius, in widths of a face.
    """

    local_side: int = 7
    margin: float = 0.25
    inner: tuple[int, ...] = ()
    colours: tuple[str, ...] = COLOURS
    circle: float = 0.125

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.local_side < 1 or not 0 <= self.margin <= 4 or not 0 < self.circle <= 1 or not self.inner:
            raise ValueError(f"local_side {self.local_side}, margin {self.margin}, circle {self.circle}")
        if not self.colours or not all(re.fullmatch("[0-9a-f]{6}", colour) for colour in self.colours):
            raise ValueError(f"colours {' '.join(self.colours)}")

    def circle_on(self, face: Box, number: int) -> Circle:
        """The circle of a face (sec. 4.2), about its middle and in the colour of the identity's number."""
        left, top, right, bottom = face
        red, green, blue = bytes.fromhex(self.colours[number % len(self.colours)])
        return Circle((left + right) / 2, (top + bottom) / 2, self.circle * (right - left), (red, green, blue))

    def to_metadata(self) -> dict[str, str]:
        return {
            name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for name, value in asdict(self).items()
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], field: str = "checkpoint") -> Properties:
        """Raises PortraitError where one is missing or makes no sense."""
        try:
            given = {one.name: metadata[one.name] for one in fields(Properties)}
            return Properties(
                int(given["local_side"]),
                float(given["margin"]),
                tuple(map(int, given["inner"].split())),
                tuple(given["colours"].split()),
                float(given["circle"]),
            )
        except (KeyError, ValueError) as error:
            raise PortraitError(
                field, f"its metadata does not say what it was trained with ({error})", _REMEDY
            ) from None


class FaceProjections(nn.Module):
    """The projections of global and local features to the width of the context (sec. 3.3)."""

    def __init__(self, global_width: int, local_width: int, context: int, properties: Properties):
        """context: D. The widths d_gf and d_lf are kept by the names that `FaceFeatures` has for the features."""
        super().__init__()
        self.context, self.properties = context, properties
        self.widths = {"embedding": global_width, "intrinsic": local_width}
        self.global_proj, self.local_proj = (
            nn.Sequential(nn.Linear(width, context, bias=False), nn.LayerNorm(context))
            for width in (global_width, local_width)
        )

    @staticmethod
    def for_sites(sites: Sequence[Site], global_width: int, local_width: int, **properties: Any) -> FaceProjections:
        """New projections for a UNet's sites. properties: those beside `inner`."""
        cross = [site for site in sites if site.cross]
        inner = tuple(site.inner for site in cross)
        return FaceProjections(global_width, local_width, cross[0].context, Properties(inner=inner, **properties))

    @staticmethod
    def from_tensors(
        tensors: Mapping[str, Tensor], properties: Properties, field: str = "checkpoint"
    ) -> FaceProjections:
        """The projections of a file, to compute with. Raises PortraitError for other keys, shapes that do not belong
        together, and numbers that are not finite."""
        context, global_width = checked(tensors, "global_proj.0.weight", (None, None), field).shape
        _, local_width = checked(tensors, "local_proj.0.weight", (context, None), field).shape
        with unfilled():
            made = FaceProjections(global_width, local_width, context, properties)
        odd = sorted(set(tensors) - set(made.state_dict()))
        if odd:
            raise PortraitError(field, f"{odd[0]!r} is no key of InstantFamily's projections", _REMEDY)
        fill(made, tensors, field)
        return made.float()

    def forward(self, embedding: Tensor, local: Tensor) -> Tensor:
        """K_fn of faces (sec. 3.3): embedding (..., d_gf) and local (..., L^2, d_lf) -> (..., T, D), the global token
        first."""
        return torch.cat([self.global_proj(embedding)[..., None, :], self.local_proj(local)], dim=-2)

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the projections were made for a UNet with these attention sites."""
        wanted = [(site.inner, site.context) for site in sites if site.cross]
        found = [(inner, self.context) for inner in self.properties.inner]
        if wanted != found:
            raise PortraitError(
                "checkpoint",
                f"the adapter was made for another kind of model: one with {len(found)} text attentions with contexts "
                f"of width {self.context}, the loaded one has {len(wanted)} of width {wanted[0][1]}"
                + (" and other layers" if (len(found), self.context) == (len(wanted), wanted[0][1]) else ""),
                "Load a Stable Diffusion checkpoint of the adapter's family.",
            )


# ----------------------------------------------------------------------------------- masked cross-attention, eq. 6 to 8


class Part(NamedTuple):
    """A part of a picture in which the same masks are 1. inside (N): the masks there, 1 or 0. faces: the numbers of
    those that are 1. positions: of the part."""

    inside: Tensor
    faces: Tensor
    positions: Tensor


class FaceMasks:
    """M_f1 ... M_fN of eq. 7 at one site: 1 or 0, for all rows or for each.

    inside: (1 or B, N, n) bool. present: (B, N) bool, which faces a row's stack has; None for all.
    """

    def __init__(self, inside: Tensor, present: Tensor | None = None):
        self.inside, self.present = inside, present

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The distinct parts of a picture whose masks are the same in all rows."""
        found: dict[tuple[bool, ...], list[int]] = {}
        for position, column in enumerate(self.inside[0].T.tolist()):
            found.setdefault(tuple(column), []).append(position)

        def on_device(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=self.inside.device)

        return [
            Part(on_device(who).bool(), on_device([i for i, there in enumerate(who) if there]), on_device(positions))
            for who, positions in found.items()
        ]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, masks: FaceMasks | None, mask: str = MULTIPLY
) -> Tensor:
    """softmax((M * Q K^T) / sqrt(d)) V over the text's tokens and the faces' (eq. 4 to 7): (B, H, n, d).

    q (B, H, n, d); k, v (B, H, m, d) of the text; key, value (B or 1, H, N, T, d) of the faces. masks: None for 1
    everywhere. mask: MULTIPLY as eq. 6 has it, or EXCLUDE, where M = 0 is a logit of -inf, or NONE.

    Where masks are the same for all rows, this is an ordinary attention for each distinct part of the picture, in which
    the keys of the faces that are not there are zero vectors (MULTIPLY) or left out (EXCLUDE): no mask of n times all
    keys is made. Rows with masks of their own, in training, have them multiplied as they stand.
    """
    rows = len(q)
    if masks is None or (mask == NONE and masks.present is None):
        keys, values = [x.flatten(2, 3).expand(rows, -1, -1, -1) for x in (key, value)]
        return F.scaled_dot_product_attention(q, torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2))
    if masks.present is not None or len(masks.inside) > 1:
        return _row_by_row(q, k, v, key, value, masks, mask)
    out = torch.empty_like(q)
    for part in masks.parts:
        if mask == MULTIPLY:
            keys, values = key * part.inside[:, None, None], value
        else:
            keys, values = (x.index_select(2, part.faces) for x in (key, value))
        keys, values = (x.flatten(2, 3).expand(rows, -1, -1, -1) for x in (keys, values))
        keys, values = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)
        out[:, :, part.positions] = F.scaled_dot_product_attention(q[:, :, part.positions], keys, values)
    return out


def _row_by_row(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, masks: FaceMasks, mask: str) -> Tensor:
    rows, (_, _, faces, tokens, width) = len(q), key.shape
    keys, values = (x.flatten(2, 3).expand(rows, -1, -1, -1) for x in (key, value))
    text = q @ k.transpose(2, 3) * width**-0.5
    face = (q @ keys.transpose(2, 3) * width**-0.5).unflatten(-1, (faces, tokens))
    # (B or 1, 1, n, N, 1)
    where = masks.inside.transpose(1, 2)[:, None, :, :, None]
    if mask == MULTIPLY:
        face = face * where
    elif mask == EXCLUDE:
        face = face.masked_fill(~where, -torch.inf)
    if masks.present is not None:
        face = face.masked_fill(~masks.present[:, None, None, :, None], -torch.inf)
    weights = torch.cat([text, face.flatten(-2)], dim=-1).softmax(dim=-1)
    return weights.to(values.dtype) @ torch.cat([v, values], dim=2)


# ---------------------------------------------------------------------------------------------------------------- rule


@dataclass(frozen=True)
class FamilyMember:
    """One person: K_fn (T, D), and where and when the person belongs.

    region: of the face, grown; None for everywhere. face: the box of the face itself, where there is a region. start,
    end: share of the sampling, 0 to 1.
    """

    tokens: Tensor
    region: Region | None = None
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0
    face: Box | None = None

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


@dataclass(frozen=True)
class Families:
    """The faces of each row of a batch, for training.

    tokens: K_f (B, N, T, D). present (B, N) bool: which of them there are. shares (B, N, h, w) in [0, 1]: how much of
    each position of the latent each grown face covers.
    """

    tokens: Tensor
    present: Tensor
    shares: Tensor


@dataclass
class _SiteState:
    """Of one site, what does not change from step to step: the faces' keys and values, and where they are seen."""

    unchanged: Unchanged
    faces: tuple[Tensor, Tensor] | None = None
    masks: dict[tuple[object, ...], FaceMasks | None] = field(default_factory=dict)


class FamilyRule(Rule[FamilyMember]):
    """Masked cross-attention at the cross-attentions of one UNet, and of a ControlNet called within its calls.

    mask: as for `masked_attention`. families: the faces of each row, in training; people are not looked at then, and
    every row of the kind POSITIVE sees its own.
    """

    in_control = True
    replaces_attention = True

    def __init__(
        self,
        adapter: FaceProjections,
        people: Sequence[FamilyMember] = (),
        mask: str = MULTIPLY,
        routing: RoutingMaps | None = None,
    ):
        super().__init__(people, routing)
        self.adapter, self.mask = adapter, mask
        self.families: Families | None = None

    @property
    def circles(self) -> list[Circle]:
        """One for each person with a region."""
        properties = self.adapter.properties
        return [properties.circle_on(one.face, i) for i, one in enumerate(self.people) if one.face is not None]

    def active(self, progress: float) -> bool:
        return self.families is not None or super().active(progress)

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        layer: Any = site.module
        state = _SiteState(Unchanged(layer.to_k, layer.to_v)) if site.cross else None

        def masked(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            assert state is not None
            x, context = site.arguments(args, kwargs)
            call.check_rows(site, len(x))
            call.visited.add(site.index)
            seeing = call.rows_of(POSITIVE)
            if not seeing:
                return host(*args, **kwargs)
            if len(seeing) == len(x):
                return self._masked(site, call, state, x, context)
            rest = [row for row in range(len(x)) if row not in seeing]
            own = self._masked(site, call, state, x[seeing], context[seeing])
            out = own.new_empty(len(x), *own.shape[1:])
            out[seeing], out[rest] = own, host(x[rest], context[rest], **site.others(kwargs))
            return out

        return {"": masked} if site.cross else {}

    def _masked(self, site: Site, call: Call, state: _SiteState, x: Tensor, context: Tensor) -> Tensor:
        """The layer's output for the rows of a call that see the faces."""
        q, k, v = site.qkv(x, context)
        if self.families is not None:
            tokens, masks = self.families.tokens, self._masks_of_rows(site, call, x)
            key, value = _keys_values(site, tokens.to(context))
            return site.out(masked_attention(q, k, v, key, value, masks, self.mask))
        active = tuple(n for n, person in enumerate(self.people) if person.active(call.progress))
        self.drawn.update(active)
        # After `qkv`, which let the host bring its weights up to date.
        if not state.unchanged(call, context.device, context.dtype, active) or state.faces is None:
            tokens = torch.stack([self.people[n].tokens for n in active])[None]
            # What is kept from call to call holds no graph: the host's weights are none of ours to train.
            with torch.no_grad():
                state.faces = _keys_values(site, tokens.to(context))
            state.masks = {}
        where = (self.place, call.latent, x.shape[1])
        if where not in state.masks:
            shape = call.shape_at(site, x.shape[1])
            state.masks[where] = masks_at([self.people[n].region for n in active], shape, self.place, q.device)
        return site.out(masked_attention(q, k, v, *state.faces, state.masks[where], self.mask))

    def _masks_of_rows(self, site: Site, call: Call, x: Tensor) -> FaceMasks:
        assert self.families is not None
        shares = F.adaptive_avg_pool2d(self.families.shares, call.shape_at(site, x.shape[1]))
        return FaceMasks(inside(shares).flatten(2), self.families.present)


def _keys_values(site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of faces by the site's own layers: (B, N, T, D) -> (B, H, N, T, d) each."""
    layer: Any = site.module
    key, value = (
        site.split_heads(project(tokens.flatten(1, 2))).unflatten(2, tokens.shape[1:3])
        for project in (layer.to_k, layer.to_v)
    )
    return key, value


def masks_at(
    regions: Sequence[Region | None], shape: tuple[int, int], place: Box, device: torch.device | str = "cpu"
) -> FaceMasks | None:
    """M_f of each face (eq. 8) at a site of (h, w) positions, which show `place` of the picture; None where nobody has
    a region, and so M is 1 everywhere."""
    if all(region is None for region in regions):
        return None
    masks = [
        torch.ones(shape, dtype=torch.bool) if region is None else inside(coverage(region, shape, place))
        for region in regions
    ]
    return FaceMasks(torch.stack(masks).flatten(1)[None].to(device))


# -------------------------------------------------------------------------------------------------------------- method


class InstantFamily(Method):
    """InstantFamily for the hosts: its adapter is a `FaceProjections`, its people `FamilyMember`s."""

    name = "instantfamily"

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> FaceProjections:
        file, name = files["instantfamily"], names["instantfamily"]
        return FaceProjections.from_tensors(file.tensors, Properties.from_metadata(file.metadata, name), name)

    def check_fits(self, adapter: FaceProjections, sites: Sequence[Site]) -> None:
        adapter.check_fits(sites)

    def text_attentions(self, adapter: FaceProjections) -> dict[str, list[tuple[int, int]]]:
        return {"to_k": [(inner, adapter.context) for inner in adapter.properties.inner]}

    def feature_widths(self, adapter: FaceProjections) -> dict[str, int]:
        return adapter.widths

    def encode(
        self, adapter: FaceProjections, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> FamilyMember:
        """The tokens of the mean of the photos' features; a box is grown, a drawn mask stays as it is."""
        found = [reference.features for reference in faces.references]
        local = torch.stack([one.intrinsic.float() for one in found])
        side = adapter.properties.local_side
        if local.shape[1] != side**2:
            raise PortraitError(
                "checkpoint",
                f"the adapter reads {side}x{side} local features of a face, the recognition network gives "
                f"{local.shape[1]}",
                "Use the recognition backbone that the adapter was trained with.",
            )
        # Of recognition networks the direction alone tells who it is.
        embedding = F.normalize(torch.stack([one.embedding.float() for one in found]), dim=-1)
        tokens = adapter(embedding.mean(dim=0), local.mean(dim=0))
        region, face = placement.region, None
        if isinstance(region, Tensor):
            face = bounds(region)
        elif region is not None:
            face, region = region, grown(region, adapter.properties.margin)
        return FamilyMember(tokens, region, placement.start, placement.end, face=face)

    def rule(self, adapter: FaceProjections, people: Sequence[FamilyMember], options: Options) -> FamilyRule:
        mask = str(options["mask"])
        homeless = next((i for i, person in enumerate(people) if person.region is None), None)
        if homeless is not None and len(people) > 1 and mask != NONE:
            raise PortraitError(
                f"identities[{homeless}].region",
                "this person has no place, and InstantFamily keeps several people apart by where their faces are",
                "Give each person a region about where the face shall be, or choose the mask `none`.",
            )
        return FamilyRule(adapter, people, mask)


METHOD = InstantFamily()
