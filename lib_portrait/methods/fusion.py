"""Fusion Is All You Need: Face Fusion for Customized Identity-Preserving Image Synthesis.

Under review as a conference paper at ICLR 2025; no code or weights are published, so the file layout is this project's.

In the paper's order: the reference's latent runs through the same UNet (sec. 3.1), whose hidden states h_f at every
cross-attention two new linear layers turn into keys and values (sec. 3.2, eq. 2), which stand behind those of the text
in one softmax (eq. 3 to 5). Several references of one person follow each other (sec. 3.3, eq. 6); several people are
kept apart by masks (sec. 3.4, eq. 7).

What the paper leaves open is a property of the weights, `Properties`: how noisy the reference is when the UNet looks at
it, what text it is looked at with, how large it is, and whether negative rows see it.

Notation: N identities, m positions of a reference at a site, n positions of the picture, H heads of width d,
C channels of a site, T timesteps of the model.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.arguments import TIMESTEPS, Arguments
from lib_portrait.attention.injection import Call, Injection, Wrapper
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.regions import Box, Region, coverage, inside
from lib_portrait.attention.rows import NEGATIVE, POSITIVE, REFERENCE, Row, mark_conditions
from lib_portrait.attention.schedule import noised
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.errors import PortraitError
from lib_portrait.faces.cache import Recent
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.faces.weights import fill, unfilled
from lib_portrait.methods.base import Host, Method, Options, Placement, Rule

# Whom a position's queries see besides the text, where it is not the number of one identity.
EVERYBODY, NOBODY = -1, -2
# The noise level of a reference that is as noisy as the picture at each step.
STEP = "step"
# References whose hidden states are kept from request to request: about 23 MiB each at SD1.5's size in half precision.
KEPT = 8

# h_f of one reference at each cross-attention, by site number: (1, m, C), or (B, m, C) where every row has its own.
HiddenStates = Mapping[int, Tensor]

# The first arguments of a UNet's forward, as ldm names them.
_POSITIONAL = ("x", "timesteps", "context", "y")
_REMEDY = "Use a file that the recipe `fusion` exported, unmodified."


# ---------------------------------------------------------------------------------------------- fused attention, eq. 2


@dataclass(frozen=True)
class Properties:
    """How the weights were trained to see a reference; the file's metadata holds it.

    reference_t: the timestep whose noise level the reference has, 0 to T - 1, or STEP. reference_text: the prompt that
    it is seen with. reference_size: its height and width in pixels. negative: whether negative rows see it too.
    """

    reference_t: int | str = 0
    reference_text: str = ""
    reference_size: int = 512
    negative: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError."""
        fixed = isinstance(self.reference_t, int) and self.reference_t >= 0
        if not (fixed or self.reference_t == STEP):
            raise ValueError(f"reference_t is {self.reference_t!r}")
        if self.reference_size < 8 or self.reference_size % 8:
            raise ValueError(f"reference_size is {self.reference_size}")

    @property
    def rides(self) -> bool:
        """Whether the reference changes from step to step, and so goes along in the picture's own UNet calls."""
        return self.reference_t == STEP

    @property
    def seeing(self) -> tuple[int, ...]:
        """The kinds of rows that see the reference."""
        return (POSITIVE, NEGATIVE) if self.negative else (POSITIVE,)

    def to_metadata(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], field: str = "checkpoint") -> Properties:
        """Raises PortraitError where one is missing or makes no sense."""
        try:
            given = {one.name: metadata[one.name] for one in fields(Properties)}
            t, negative = given["reference_t"], {"True": True, "False": False}[given["negative"]]
            return Properties(
                t if t == STEP else int(t), given["reference_text"], int(given["reference_size"]), negative
            )
        except (KeyError, ValueError) as error:
            raise PortraitError(
                field, f"its metadata does not say how the reference is seen ({error})", _REMEDY
            ) from None


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
    """A `FaceKeys` for every cross-attention of a UNet, by site number, and how they were trained to see a reference.

    kept: hidden states of the references seen last, by what decides them.
    """

    def __init__(self, properties: Properties | None = None):
        super().__init__()
        self.properties = properties or Properties()
        self.kept: Recent[HiddenStates] = Recent(KEPT)

    @staticmethod
    def for_sites(sites: Sequence[Site], properties: Properties | None = None) -> FaceFusion:
        """New layers for a UNet's sites; they begin as the keys and values of the self-attention beside each.

        That one attends to hidden states of the same width, so the reference is seen in its own terms from the start.
        """
        made = FaceFusion(properties)
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
    def from_tensors(
        tensors: Mapping[str, Tensor], properties: Properties | None = None, field: str = "checkpoint"
    ) -> FaceFusion:
        """The layers of a file with the keys ``{site}.to_k_face.weight`` and ``{site}.to_v_face.weight``.

        Raises PortraitError for other keys, shapes that do not belong together, and numbers that are not finite.
        """
        made, keys = FaceFusion(properties), set(tensors)
        for name in sorted(tensors):
            number = name.partition(".")[0]
            pair = {f"{number}.to_k_face.weight", f"{number}.to_v_face.weight"}
            if not number.isdecimal() or name not in pair or not pair <= keys:
                raise PortraitError(field, f"{name!r} is no key of Fusion's layers, or one of a pair", _REMEDY)
            shape = tuple(tensors[name].shape)
            if len(shape) != 2 or shape != tuple(tensors[min(pair)].shape):
                raise PortraitError(field, f"{name} has the shape {shape}", _REMEDY)
            if number not in made:
                with unfilled():
                    made[number] = FaceKeys(shape[1], shape[0])
        if not made:
            raise PortraitError(field, "it holds no layers", _REMEDY)
        fill(made, tensors, field)
        return made.float()

    def of(self, site: Site) -> FaceKeys:
        return cast(FaceKeys, self[str(site.index)])

    @property
    def shapes(self) -> dict[int, tuple[int, int]]:
        """(inner, C) of each site."""
        weights = {int(number): cast(FaceKeys, layers).to_k_face.weight for number, layers in self.items()}
        return {number: (weight.shape[0], weight.shape[1]) for number, weight in weights.items()}

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the layers were made for a UNet with these attention sites."""
        wanted = {site.index: (site.inner, site.channels) for site in sites if site.cross}
        found = self.shapes
        if wanted != found:
            differing = sorted(number for number in wanted | found if wanted.get(number) != found.get(number))
            first = differing[0]
            raise PortraitError(
                "checkpoint",
                f"the adapter was made for another kind of model: at {len(differing)} of its attention layers, first "
                f"layer {first}, where it has {found.get(first)} and the loaded model {wanted.get(first)}",
                "Load a Stable Diffusion checkpoint of the adapter's family.",
            )


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, faces: Sequence[tuple[Tensor, Tensor]], seen: Tensor | None = None
) -> Tensor:
    """One softmax over the text's keys and the faces' (eq. 3 to 7): (B, H, n, d).

    q (B, H, n, d); k, v (B, H, m_c, d) of the text; faces: K_f and V_f of each identity, (B or 1, H, m, d) each,
    several references one behind the other (eq. 6). seen (n): whom each position's queries may see besides the text,
    the number of an identity, EVERYBODY or NOBODY; None for everybody everywhere (eq. 3).

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


def seen_by(regions: Sequence[Region | None], shape: tuple[int, int], place: Box) -> Tensor | None:
    """Whom the positions of a site see (eq. 7): (h * w) for `fused_attention`, or None where nobody has a mask.

    regions: where each identity belongs. shape: (h, w) of the site, which shows `place` of the picture. The key of
    identity i is out of sight wherever another has a mask, also inside i's own; so where two masks overlap only the
    text is seen.
    """
    if all(region is None for region in regions):
        return None
    claims = torch.zeros(len(regions), shape[0] * shape[1], dtype=torch.bool)
    for own, region in zip(claims, regions, strict=True):
        if region is not None:
            own[:] = inside(coverage(region, shape, place)).flatten()
    count = claims.sum(dim=0)
    seen = torch.where(count == 1, claims.int().argmax(dim=0), EVERYBODY)
    return torch.where(count > 1, NOBODY, seen)


# --------------------------------------------------------------------------------------------- reference pass, sec. 3.1


def fitted(latent: Tensor, shape: tuple[int, int]) -> Tensor:
    """A square latent (1, 4, s, s) on a canvas of (h, w): scaled to its shorter side, its edges going on beyond."""
    side, (height, width) = min(shape), shape
    if latent.shape[-1] != side:
        latent = F.interpolate(latent.float(), size=(side, side), mode="bilinear", antialias=True).to(latent)
    across, down = width - side, height - side
    return F.pad(latent, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate")


# ---------------------------------------------------------------------------------------------------------------- rule


@dataclass(frozen=True)
class FusedIdentity:
    """One person: the pictures of the references, (size, size, 3) uint8, and where and when the person belongs.

    region: None for everywhere that nobody else has. start, end: share of the sampling, 0 to 1.
    """

    references: tuple[np.ndarray, ...] = ()
    region: Region | None = None
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


@dataclass
class _SiteState:
    """Of one site, what does not change from step to step: K_f and V_f of each identity, or the layers that make them
    of what rides; and who is seen where."""

    made_for: object = None
    faces: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    layers: FaceKeys | None = None
    seen: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)


@dataclass
class _Riding:
    """References that go along in the picture's UNet calls.

    latents: of each reference, without noise. text: what they are seen with, (1, n, D), and SDXL's vector beside it.
    """

    latents: list[Tensor]
    alphas_cumprod: Tensor
    text: Tensor
    vector: Tensor | None
    by_shape: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def at(self, shape: tuple[int, int], t: float) -> Tensor:
        if shape not in self.by_shape:
            self.by_shape[shape] = [fitted(latent, shape) for latent in self.latents]
        return torch.cat([noised(latent, t, self.alphas_cumprod) for latent in self.by_shape[shape]])


class FusionRule(Rule[FusedIdentity]):
    """Fused attention at the cross-attentions of one UNet, for `attention.Injection`.

    Rows of the kinds in `seeing`, by the weights' properties, see the references; others run as the host has them, and
    so do rows of the kind REFERENCE, which are looked at: what enters every cross-attention of theirs is h_f.
    """

    replaces_attention = True

    def __init__(self, adapter: FaceFusion, people: Sequence[FusedIdentity], routing: RoutingMaps | None = None):
        super().__init__(people, routing)
        self.adapter = adapter
        self.seeing = adapter.properties.seeing
        self.adds_rows = adapter.properties.rides
        self._hidden: list[HiddenStates] = []
        # Counts the looks, so that no site keeps what was made of an earlier one.
        self._looks = 0
        # Filled while a look is taken.
        self._recorded: dict[int, Tensor] | None = None
        self._riding: _Riding | None = None

    def active(self, progress: float) -> bool:
        return self._recorded is not None or super().active(progress)

    # ---- what the references look like to the UNet

    def see(self, references: Sequence[Sequence[HiddenStates]]) -> None:
        """Sets h_f of every person's references."""
        self._hidden = [
            {number: torch.cat([one[number] for one in own], dim=1) for number in own[0]} for own in references
        ]
        self._looks += 1

    @torch.no_grad()
    def prepare(self, host: Host) -> None:
        """Has the host's UNet look at the references (sec. 3.1), or keeps their latents where that is for every step.

        Raises PortraitError for a model that has not the timestep, or whose UNet passes a cross-attention by.
        """
        properties, text = self.adapter.properties, host.text(self.adapter.properties.reference_text)
        if properties.rides:
            context = text if isinstance(text, Tensor) else text["crossattn"]
            latents = [host.latent(picture) for person in self.people for picture in person.references]
            vector = None if isinstance(text, Tensor) else text.get("vector")
            self._riding = _Riding(latents, host.alphas_cumprod, context, vector)
            return
        t = cast(int, properties.reference_t)
        if t >= len(host.alphas_cumprod):
            raise PortraitError(
                "checkpoint",
                f"the adapter sees its references at timestep {t}, the loaded model has {len(host.alphas_cumprod)}",
                "Load a Stable Diffusion checkpoint of the adapter's family.",
            )
        found = []
        for person in self.people:
            own = []
            for picture in person.references:
                key = (hashlib.sha256(picture.tobytes()).digest(), picture.shape, properties, host.state)
                hidden = self.adapter.kept.get(key)
                if hidden is None:
                    latent = noised(host.latent(picture), t, host.alphas_cumprod)
                    times = torch.full((1,), t, device=latent.device)
                    hidden = self.look(
                        host.unet, functools.partial(host.call, latent, times, mark_conditions(text, REFERENCE))
                    )
                    # Between requests the accelerator's memory belongs to the host.
                    hidden = {site: states.cpu() for site, states in hidden.items()}
                    self.adapter.kept.put(key, hidden)
                own.append(hidden)
            found.append(own)
        self.see(found)

    def look(self, unet: nn.Module, run: Callable[[], object]) -> dict[int, Tensor]:
        """h_f of the references of one UNet call, whose rows are marked as REFERENCE: (B, m, C) by site number."""
        with Injection(unet, self, rows={REFERENCE: Row(REFERENCE)}):
            return self.recorded(run)

    @torch.no_grad()
    def recorded(self, run: Callable[[], object]) -> dict[int, Tensor]:
        """The same where this rule is injected already."""
        self._recorded = {}
        try:
            run()
            return self._recorded
        finally:
            self._recorded = None

    # ---- references that go along (`attention.injection.AddsRows`)

    def enter(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Adds the references behind the call's rows, as noisy as the first row that sees them."""
        riding = self._riding
        first = next((row for row, kind in enumerate(call.kinds) if kind in self.seeing), None)
        if riding is None:
            return args, kwargs
        self.added_rows = range(0)
        if self._recorded is not None or first is None:
            return args, kwargs
        numbers, count = cast("list[int]", call.numbers), len(riding.latents)
        rows = len(numbers)
        self.added_rows = range(rows, rows + count)
        own = max(call.table) + 1
        call.table, call.numbers = {**call.table, own: Row(REFERENCE)}, [*numbers, *[own] * count]
        times = torch.as_tensor(TIMESTEPS.of(args, kwargs)).flatten()
        t = float(times[first if len(times) > 1 else 0])
        latents = riding.at(call.latent, t)

        def grown(name: str, value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: grown(key, one) for key, one in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(grown(name, one) for one in value)
            if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != rows:
                return value
            added = value[first : first + 1].expand(count, *value.shape[1:])
            if name in ("x", "sample"):
                # Behind the latent stand an inpainting model's mask, here of everything, and the picture beside it.
                behind = torch.zeros_like(added[:, latents.shape[1] :])
                behind[:, :1] = 1
                added = torch.cat([latents.to(value), behind], dim=1)
            elif name in ("y", "text_embeds") and riding.vector is not None:
                added = riding.vector.to(value).expand_as(added)
            elif name.endswith("residuals") or name.endswith("residual"):
                added = torch.zeros_like(added)
            return torch.cat([value, added])

        return (
            tuple(grown(name, value) for name, value in zip_longest(_POSITIONAL[: len(args)], args, fillvalue="")),
            {name: grown(name, value) for name, value in kwargs.items()},
        )

    def leave(self, output: Any) -> Any:
        """The rows that were there before."""
        if not self.added_rows:
            return output
        if isinstance(output, Tensor):
            return output[: self.added_rows.start]
        if isinstance(output, tuple):
            return tuple(map(self.leave, output))
        return replace(output, sample=output.sample[: self.added_rows.start])

    # ---- at a site

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        state = _SiteState()

        def fused(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            x, context = site.arguments(args, kwargs)
            kinds, others = call.kinds, site.others(kwargs)
            call.check_rows(site, len(x))
            call.visited.add(site.index)
            if self._recorded is not None:
                self._recorded[site.index] = x[call.rows_of(REFERENCE)]
                return host(*args, **kwargs)
            seeing = [row for row, kind in enumerate(kinds) if kind in self.seeing]
            looked_at = list(self.added_rows)
            rest = [row for row in range(len(x)) if row not in seeing and row not in looked_at]
            parts = []
            if seeing:
                hidden = x[looked_at] if looked_at else None
                own = (x, context) if len(seeing) == len(x) else (x[seeing], context[seeing])
                parts.append((seeing, self._fused(site, call, state, *own, seeing, hidden)))
            if rest:
                every = len(rest) == len(x)
                parts.append((rest, host(*args, **kwargs) if every else host(x[rest], context[rest], **others)))
            if looked_at:
                assert self._riding is not None
                text = self._riding.text.to(context).expand(len(looked_at), -1, -1)
                parts.append((looked_at, host(x[looked_at], text, **others)))
            if len(parts) == 1:
                return parts[0][1]
            out = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
            for rows, values in parts:
                out[rows] = values
            return out

        return {"": fused} if site.cross else {}

    def _fused(
        self,
        site: Site,
        call: Call,
        state: _SiteState,
        x: Tensor,
        context: Tensor,
        rows: Sequence[int],
        riding: Tensor | None,
    ) -> Tensor:
        """The layer's output for the rows of a call that see the references; riding: h_f of those that go along."""
        q, k, v = site.qkv(x, context)
        active = [n for n, person in enumerate(self.people) if person.active(call.progress) and person.strength > 0]
        self.drawn.update(active)
        faces = self._faces(site, state, q, riding)
        own = [
            tuple(one if len(one) == 1 else one[list(rows)] for one in faces[number])  # each row's own, in training
            for number in active
        ]
        where = (self.place, call.latent, x.shape[1], *active)
        if where not in state.seen:
            shape = call.shape_at(site, x.shape[1])
            seen = seen_by([self.people[number].region for number in active], shape, self.place)
            state.seen[where] = None if seen is None else seen.to(q.device)
        return site.out(fused_attention(q, k, v, cast("list[tuple[Tensor, Tensor]]", own), state.seen[where]))

    def _faces(
        self, site: Site, state: _SiteState, q: Tensor, riding: Tensor | None
    ) -> Sequence[tuple[Tensor, Tensor]]:
        """K_f and V_f of every identity (eq. 2, 6), (B or 1, H, m, d) each.

        While the layers need no gradients, these are kept; of references that ride the layers are, where q is.
        """
        layers = self.adapter.of(site)
        weight = layers.to_k_face.weight
        trained = torch.is_grad_enabled() and weight.requires_grad
        made_for = (self._looks, q.device, q.dtype)
        if trained or state.made_for != made_for:
            state.made_for = None if trained else made_for
            state.seen.clear()
            dtype = weight.dtype if riding is None else q.dtype
            if (weight.device, weight.dtype) != (q.device, dtype):
                layers = copy.deepcopy(layers).to(q.device, dtype)
            if riding is None:
                state.faces = [_keys(site, layers, hidden[site.index], q) for hidden in self._hidden]
            else:
                state.layers = layers
        if riding is None:
            return state.faces
        assert state.layers is not None
        counts = [len(person.references) for person in self.people]
        return [_keys(site, state.layers, own.flatten(0, 1)[None], q) for own in riding.split(counts)]


def _keys(site: Site, layers: FaceKeys, hidden: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """K_f and V_f of h_f (B, m, C), as heads where and in what the queries are."""
    keys, values = layers(hidden.to(layers.to_k_face.weight))
    return site.split_heads(keys.to(q.dtype)), site.split_heads(values.to(q.dtype))


# -------------------------------------------------------------------------------------------------------------- method


class Fusion(Method):
    """Fusion for the hosts: its adapter is a `FaceFusion`, what it needs of an identity a `FusedIdentity`."""

    name = "fusion"

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> FaceFusion:
        file = files["fusion"]
        return FaceFusion.from_tensors(
            file.tensors, Properties.from_metadata(file.metadata, names["fusion"]), names["fusion"]
        )

    def check_fits(self, adapter: FaceFusion, sites: Sequence[Site]) -> None:
        adapter.check_fits(sites)

    def text_attentions(self, adapter: FaceFusion) -> dict[str, list[tuple[int, int]]]:
        """Eq. 1's queries come from hidden states of the width that eq. 2's keys do."""
        return {"to_q": list(adapter.shapes.values())}

    def encode(
        self, adapter: FaceFusion, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> FusedIdentity:
        """The squares about the faces, as they were trained on."""
        size, face_only = adapter.properties.reference_size, bool(options["face_only"])
        references = tuple(reference.portrait(size, face_only) for reference in faces.references)
        return FusedIdentity(references, placement.region, placement.start, placement.end)

    def rule(self, adapter: FaceFusion, people: Sequence[FusedIdentity], options: Options) -> FusionRule:
        return FusionRule(adapter, people)


METHOD = Fusion()
