"""RB-Guidance (OmniPortrait, section 3.3): people's own photos guide the sampling, on top of any method and of none.

Before the sampling the UNet looks at each reference, noised to t0, and its decoder features are kept (`Recent`, by the
photo, the model and t0). Within each guided call the features of the picture are matched to them inside each person's
mask, and the gradient of eq. 10's energy joins the noise prediction.

Left open by the paper, and decided here:

- The reference is seen with an empty prompt, as DIFT sees pictures whose category it does not know, and by the bare
  UNet, without the method's people in it.
- Eq. 9: the gradient with respect to the latent is masked, see `equations.background_masked`. Where several people are
  guided, their energies are summed and the one gradient is masked by their masks together.
- Whom the maps of eq. 6 belong to: the word of each identity. They are the mean over the cross-attentions, and the
  self-attentions, of the level that is nearest to 16 x 16 positions, which is where L_loc is trained.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Call, Injection
from lib_portrait.attention.maps import word_attention
from lib_portrait.attention.regions import FAINTEST, WHOLE, Box, Region, coverage
from lib_portrait.attention.rows import Row
from lib_portrait.attention.schedule import noised, signal_rate
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.errors import PortraitError
from lib_portrait.faces.cache import Recent
from lib_portrait.guidance import equations
from lib_portrait.guidance.features import FeatureGuidance, Pass, blocks_before, level_of
from lib_portrait.methods.base import Host, Rule
from lib_portrait.options import Value

# References whose features are kept from request to request: 2.5 MiB each at SD1.5's size in half precision.
KEPT = 32
_kept: Recent[Tensor] = Recent(KEPT)
# A position lies inside a mask where at least this share of it does.
INSIDE = 0.5
# Positions of the attention maps of eq. 6.
MAP_POSITIONS = 16 * 16

# Finds the faces in a picture (H, W, 3) uint8 RGB: a mask (H, W) bool of each.
Locate = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class GuidedPerson:
    """One identity as RB-Guidance needs it, in the request's order.

    references: pictures (S, S, 3) uint8 RGB about the face, S a multiple of 8. masks: of the face in each, (S, S) bool.
    region: where the person belongs in the picture, None where that is not said. guided: whether guidance acts on it.
    start, end: the window of the sampling in which it does, in shares of the steps, 0 to 1.
    """

    references: tuple[np.ndarray, ...] = ()
    masks: tuple[np.ndarray, ...] = ()
    region: Region | None = None
    guided: bool = True
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class GuidedStep:
    """What was done for one picture of the batch in one call.

    t: the timestep. progress: of the sampling, 0 to 1. energy: E. similarity: the mean over pairs of eq. 8 for each
    person, None for who was not guided. gradient: the norm of what joined eps. masks: (N, H, W) bool, of each person on
    the latent, on the CPU.
    """

    picture: int
    t: float
    progress: float
    energy: float
    similarity: tuple[float | None, ...]
    gradient: float
    masks: Tensor


@dataclass
class _Attention:
    """What the attention layers of one level, of size `shape`, showed in a pass, by site: the attention to each
    person's words (P, N, n), and of the picture to itself (P, n, n)."""

    shape: tuple[int, int]
    cross: dict[int, Tensor] = field(default_factory=dict)
    own: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Points:
    """A person's reference features inside M_ref (n, C), and the number of the reference that each is of (n)."""

    features: Tensor
    owners: Tensor


@dataclass
class _Found:
    """What the energy of a pass found: E of each row, each person's similarity, masks (P, N, H, W) on the latent."""

    energies: list[float]
    similarities: list[tuple[float | None, ...]]
    masks: Tensor


def forget() -> None:
    """Drops the features of references that are kept from request to request."""
    _kept.clear()


class ReferenceGuidance(FeatureGuidance):
    """RB-Guidance for `attention.Injection(guidance=...)`, during one or several samplings.

    people: in the request's order. options: values of `options.OPTIONS`. rule: of the method that draws the people, for
    its routing map; None where there is none. locate: see `Locate`; None where faces cannot be found.
    place: the part of the finished picture that the UNet samples at the moment.
    record: what was done since `begin`; empty where nothing was guided.

    Raises PortraitError where nothing tells where a guided person is.
    """

    def __init__(
        self,
        people: Sequence[GuidedPerson],
        options: Mapping[str, Value],
        rule: Rule[Any] | None = None,
        locate: Locate | None = None,
    ):
        super().__init__(int(options["block"]), checkpointing=bool(options["checkpointing"]))
        self.people = list(people)
        self.options = options
        self.rule = rule
        self.locate = locate
        self.place: Box = WHOLE
        self.record: list[GuidedStep] = []
        self._guided = [number for number, person in enumerate(self.people) if person.guided and person.references]
        self._host: Host | None = None
        self._text: Any = None
        # Of each guided person's references: features (C, h, w), or, where these are another's at each step, latents.
        self._references: dict[int, list[Tensor]] = {}
        self._latents: dict[int, list[Tensor]] = {}
        self._points: dict[int, _Points] = {}
        self._routes = False
        self._progress = 0.0
        self._steps: list[float] = []
        # By picture and size of the latent: each guided person's face, where it was found.
        self._faces: dict[tuple[int, int, int], dict[int, Tensor]] = {}
        self._attention: _Attention | None = None
        self._found: _Found | None = None

    # ---- before the sampling

    def begin(self) -> None:
        """Before each sampling, and before the rule is prepared: forgets what belongs to the one before."""
        self.record.clear()
        self._steps.clear()
        self._faces.clear()
        self._known.clear()
        self._routes = self.rule is not None and self.rule.locates()

    @torch.no_grad()
    def prepare(self, host: Host) -> None:
        """Before each sampling, and when the host changes its model within one: has its UNet look at the references.

        Costs a UNet call, up to the features, for each reference that is not kept; with noise "step" none here, but one
        a guided step. Raises PortraitError for a model without the timestep or the block, and a mask without a face.
        """
        self._host = host
        self.alphas_cumprod = host.alphas_cumprod if host.prediction == "v" else None
        path, t = self.path_of(host.unet), int(self.options["reference_t"])
        if t >= len(host.alphas_cumprod):
            raise PortraitError(
                "guidance.reference_t",
                f"the loaded model has {len(host.alphas_cumprod)} timesteps",
                f"Give a whole number from 0 to {len(host.alphas_cumprod) - 1}.",
            )
        for number in self._guided:
            for photo, mask in enumerate(self.people[number].masks):
                if not mask.any():
                    raise PortraitError(
                        f"identities[{number}].photos[{photo}]",
                        "no part of it is taken for the face, so that it cannot guide",
                        "Use another photo, or leave this person out of the reference guidance.",
                    )
        for kept in (self._references, self._latents, self._points):
            kept.clear()
        self._text = host.text("")
        for number in self._guided:
            references = self.people[number].references
            if self.options["noise"] == "step":
                self._latents[number] = [host.latent(picture) for picture in references]
            else:
                self._references[number] = [
                    _kept_features(host, picture, t, path, self._text) for picture in references
                ]

    # ---- what is guided

    @property
    def reached(self) -> bool:
        """Whether any step since `begin` fulfilled eq. 11's condition, whatever came of it."""
        return bool(self._steps)

    def active(self, progress: float) -> bool:
        self._progress = progress
        return bool(self._guided) and float(self.options["strength"]) > 0

    def guides(self, picture: int, t: float) -> bool:
        """Eq. 11's condition, and of the steps that fulfil it every k-th; a step is a timestep."""
        assert self._host is not None, "prepare() comes first"
        if not equations.guides(t, float(self.options["begin"]), len(self._host.alphas_cumprod)):
            return False
        if not self._steps or self._steps[-1] != t:
            self._steps.append(t)
        return (len(self._steps) - 1) % int(self.options["every"]) == 0

    def adds_to(self, site: Site) -> bool:
        return self._host is not None and self._host.adds_to(site.module)

    def before(self, current: Pass, run: Callable[[], Tensor], call: Call, injection: Injection) -> None:
        """Finds the faces where nothing else tells where people are, and has the UNet look at references that are as
        noisy as the step."""
        sources = [{self._source(number, mark) for number in self._guided} for mark in current.marks]
        self._attention = None
        if any("attention" in own for own in sources):
            self._attention = _Attention(_map_shape(injection, self.path_of(injection.unet), call.latent))
        if any("face" in own for own in sources):
            self._find_faces(current, run, call.latent)
        if self._latents:
            assert self._host is not None
            with injection.aside(), self._host.bare():
                self._look_at_step(injection.unet, current)

    def _source(self, number: int, mark: Row) -> str:
        """What tells where a person is in a row: "region", "attention", "routing" or "face"."""
        person, chosen = self.people[number], str(self.options["where"])
        known = {
            "region": person.region is not None,
            "attention": len(mark.words) > number and bool(mark.words[number]),
            "routing": self._routes,
            "face": self.locate is not None,
        }
        if chosen == "automatic":
            chosen = next((source for source, there in known.items() if there), "region")
        if not known[chosen]:
            _refuse(number, chosen)
        return chosen

    def _find_faces(self, current: Pass, run: Callable[[], Tensor], latent: tuple[int, int]) -> None:
        """Looks for faces in what the UNet predicts now (eq. 2), in pictures where they are not found yet."""
        wanted = [row for row, picture in enumerate(current.pictures) if (picture, *latent) not in self._faces]
        if not wanted:
            return
        assert self._host is not None and self.locate is not None
        prediction = run().float()
        for row in wanted:
            z, t = current.z[row, : prediction.shape[1]].float(), current.t[row]
            alpha = signal_rate(self._host.alphas_cumprod, t)
            eps = equations.eps_of(prediction[row], z, None if self.alphas_cumprod is None else alpha)
            picture = self._host.picture(equations.z0_of(eps, z, alpha)[None])
            faces = [torch.from_numpy(np.asarray(face, dtype=bool)) for face in self.locate(picture)]
            mark = current.marks[row]
            own = [number for number in self._guided if self._source(number, mark) == "face"]
            # The largest ones, from the left in the request's order: a bystander is smaller.
            faces = sorted(faces, key=lambda face: -int(face.sum()))[: len(own)]
            if len(faces) == len(own):
                faces.sort(key=lambda face: float(face.nonzero()[:, 1].float().mean()))
                found = (mark.picture, *latent)
                self._faces[found] = dict(zip(own, faces, strict=True))

    def _look_at_step(self, unet: nn.Module, current: Pass) -> None:
        """The features of references that are as noisy as the pass's first row."""
        assert self._host is not None
        path, z, t = self.path_of(unet), current.z, current.t[:1]
        context, vector = (
            (self._text, None)
            if isinstance(self._text, Tensor)
            else (
                self._text["crossattn"],
                self._text.get("vector"),
            )
        )
        more = {} if vector is None else {"y": vector.to(z)}
        for number, latents in self._latents.items():
            own = []
            for latent in latents:
                noisy = noised(latent, float(t), self._host.alphas_cumprod)
                # Behind the latent stand an inpainting model's mask, here of everything, and the picture beside it.
                behind = noisy.new_zeros(1, z.shape[1] - noisy.shape[1], *noisy.shape[2:])
                behind[:, :1] = 1
                x = torch.cat([noisy, behind], dim=1).to(z)
                # Without what stands around the UNet's forward, ours included.
                run = functools.partial(type(unet).forward, unet, x, t, context.to(z), **more)
                own.append(_seen(unet, path, run))
            self._references[number] = own
        self._points.clear()

    # ---- within the call

    @property
    def looks(self) -> bool:
        return self._attention is not None

    @torch.no_grad()
    def look(self, site: Site, x: Tensor, context: Tensor, current: Pass) -> None:
        """Keeps A^c and A_s of eq. 6, the means over heads, at the level where they are taken."""
        attention = self._attention
        if attention is None or site.index in attention.cross or site.index in attention.own:
            return
        if x.shape[1] != attention.shape[0] * attention.shape[1]:
            return
        layer: Any = site.module
        rows, words = current.rows, [mark.words or ((),) for mark in current.marks]
        if site.cross:
            attention.cross[site.index] = word_attention(site, x[rows], context[rows], words)
        else:
            q, k = (site.split_heads(project(x[rows])).float() for project in (layer.to_q, layer.to_k))
            attention.own[site.index] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=1)

    def energy(self, features: Tensor, current: Pass) -> Tensor:
        """E of each picture (eq. 10), the sum over its guided people."""
        strength = 1.0 if self.options["gradient"] == "share" else float(self.options["strength"])
        size = (current.z.shape[-2], current.z.shape[-1])
        masks = torch.zeros(len(features), len(self.people), *size, dtype=torch.bool)
        energies: list[Tensor] = []
        similarities: list[tuple[float | None, ...]] = []
        for row, of_picture in enumerate(features):
            total = of_picture.new_zeros(())
            own: list[float | None] = [None] * len(self.people)
            for number in self._guided:
                if not takes_part(self.people[number].start, self.people[number].end, self._progress):
                    continue
                where = self._where(number, row, current)
                if where is None:
                    continue
                inside = where((of_picture.shape[-2], of_picture.shape[-1])).to(features.device)
                if not inside.any():
                    continue
                masks[row, number] = where(size).cpu()
                similarity, mean = self._similarity(number, of_picture[:, inside].T)
                total = total + equations.energy(similarity, strength)
                own[number] = mean
            energies.append(total)
            similarities.append(tuple(own))
        self._found = _Found([float(one.detach()) for one in energies], similarities, masks)
        return torch.stack(energies)

    def _similarity(self, number: int, generated: Tensor) -> tuple[Tensor, float]:
        """S (eq. 8, 9) of a person's features in the picture (m, C), and the mean over its pairs."""
        points = self._points_of(number, generated)
        reference = points.features
        if self.options["features"] == "centred":
            reference, generated = equations.centred(reference, generated)
        matched, distances = equations.match(reference, generated.detach())
        if int(points.owners[-1]):
            chosen = equations.nearest_reference(matched, distances, points.owners, len(generated))
            reference, matched = reference[chosen], matched[chosen]
        reduction = str(self.options["reduction"])
        similarity = equations.similarity(reference, generated[matched], reduction)
        return similarity, float(similarity.detach()) / (1 if reduction == "mean" else len(reference))

    def _points_of(self, number: int, like: Tensor) -> _Points:
        """A person's reference features where and in what the picture's are."""
        if number not in self._points:
            parts = []
            for features, mask in zip(self._references[number], self.people[number].masks, strict=True):
                share = coverage(torch.from_numpy(mask.astype(np.float32)), (features.shape[-2], features.shape[-1]))
                parts.append(features.to(like)[:, _inside(share).to(like.device)].T)
            owners = [torch.full((len(part),), owner, device=like.device) for owner, part in enumerate(parts)]
            self._points[number] = _Points(torch.cat(parts), torch.cat(owners))
        return self._points[number]

    def _where(self, number: int, row: int, current: Pass) -> Callable[[tuple[int, int]], Tensor] | None:
        """M_gen of a person in a row of the pass, for any (h, w): bool; None where the person is not there."""
        source, mark = self._source(number, current.marks[row]), current.marks[row]
        if source == "attention":
            return self._attended(number, row)
        if source == "region":
            region = self.people[number].region
            assert region is not None
            return lambda shape: _inside(coverage(region, shape, self.place))
        if source == "face":
            face = self._faces.get((mark.picture, *current.z.shape[-2:]), {}).get(number)
            return None if face is None else lambda shape: _inside(coverage(face.float(), shape))
        assert self.rule is not None
        share = self.rule.located(number, current.numbers[row])
        if share is None:
            return None
        return lambda shape: _inside(
            F.interpolate(share[None, None], size=shape, mode="bilinear", align_corners=False)[0, 0]
        )

    def _attended(self, number: int, row: int) -> Callable[[tuple[int, int]], Tensor]:
        """M_gen by eq. 6."""
        attention = self._attention
        if attention is None or not attention.cross or not attention.own:
            raise PortraitError(
                "guidance.where",
                "no attention layer shows the map of a word at a level that the features come from",
                'Give the person a region, or choose another "where".',
            )
        cross = torch.stack([one[row, number] for one in attention.cross.values()]).mean(dim=0)
        own = torch.stack([one[row] for one in attention.own.values()]).mean(dim=0)
        rounds, power = int(self.options["rounds"]), float(self.options["power"])
        refined = equations.refined(cross.reshape(attention.shape), own, rounds, power)
        return lambda shape: equations.region_mask(refined, shape, float(self.options["threshold"]))

    def added(self, gradient: Tensor, current: Pass, prediction: Tensor) -> Tensor:
        """grad E inside the masks (eq. 9), scaled where it is to be a share of eps; and what is to be told of it."""
        found, t = self._found, current.t
        assert found is not None
        added = torch.zeros_like(gradient)
        for row, picture in enumerate(current.pictures):
            if all(one is None for one in found.similarities[row]):
                continue
            mask = found.masks[row].any(dim=0).to(gradient.device)
            own = equations.background_masked(gradient[row], mask)
            if self.options["gradient"] == "share":
                alpha = None if self.alphas_cumprod is None else signal_rate(self.alphas_cumprod, t[row])
                z = current.z[row, : len(own)].detach().to(own)
                eps = equations.eps_of(prediction[row].to(own), z, alpha)
                own = equations.as_share(own, eps, mask, float(self.options["strength"]))
            added[row] = own
            step = GuidedStep(
                picture,
                float(t[row]),
                self._progress,
                found.energies[row],
                found.similarities[row],
                float(own.norm()),
                found.masks[row],
            )
            self.record.append(step)
        return added


def _inside(share: Tensor) -> Tensor:
    """Of shares (h, w) in [0, 1] the positions that belong to a mask: at least half of them, or as much as any has, for
    at coarse levels a small face would be nowhere else."""
    return (share >= FAINTEST) & (share >= min(INSIDE, share.max().item()))


def _refuse(number: int, source: str) -> NoReturn:
    """Raises PortraitError: what is to say where a person is does not."""
    problem = {
        "region": "nothing tells the reference guidance where this person is",
        "attention": "the prompt has no word that stands for this person",
        "routing": "the method has no routing map that would tell where this person is",
        "face": "no face detector is there that could find this person",
    }[source]
    raise PortraitError(
        f"identities[{number}].region",
        problem,
        'Give the person a region, or leave the guidance\'s "where" automatic.',
    )


def _map_shape(injection: Injection, path: str, latent: tuple[int, int]) -> tuple[int, int]:
    """The size of the level that eq. 6's maps are taken at: of those with attention before the features the one that is
    nearest to 16 x 16 positions, the finer of two."""
    unet = injection.unet
    before = tuple(f"{block}." for block in blocks_before(unet, path))
    levels = {level_of(site, unet) for site in injection.sites if site.cross and site.path.startswith(before)}
    shapes = []
    for level in sorted(levels):
        height, width = latent
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)
        shapes.append((height, width))
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * shape[1] / MAP_POSITIONS)))


# ---------------------------------------------------------------------------------------------- features of a reference


class _Seen(Exception):
    """Ends a UNet call whose features are all that is wanted."""

    def __init__(self, features: Tensor):
        self.features = features


def _seen(unet: nn.Module, path: str, run: Callable[[], object]) -> Tensor:
    """The activations (C, h, w) of a block in a UNet call of one row, which ends there.

    Raises PortraitError where it passes the block by.
    """

    def stop(module: nn.Module, args: object, output: Tensor) -> None:
        raise _Seen(output[0])

    handle = unet.get_submodule(path).register_forward_hook(stop)
    try:
        run()
    except _Seen as seen:
        return seen.features
    finally:
        handle.remove()
    raise PortraitError(
        "model",
        "the UNet did not run the block whose features guide it",
        "Switch off what replaces the UNet (TensorRT, compiled or exported UNets) and generate again.",
        500,
    )


def _kept_features(host: Host, picture: np.ndarray, t: int, path: str, text: Any) -> Tensor:
    """D_ref (C, h, w) of a picture noised to t, on the CPU: between requests the accelerator's memory is the host's."""
    key = (hashlib.sha256(picture.tobytes()).digest(), picture.shape, t, path, host.state)
    features = _kept.get(key)
    if features is None:
        latent = noised(host.latent(picture), t, host.alphas_cumprod)
        times = torch.full((1,), t, device=latent.device)
        features = _seen(host.unet, path, lambda: host.call(latent, times, text)).cpu().clone()
        _kept.put(key, features)
    return features
