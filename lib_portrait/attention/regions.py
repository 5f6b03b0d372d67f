"""Where in the picture people belong, and how much of what is sampled that is.

Regions lie on the finished picture, in fractions of its width and height. What a UNet samples may be another part of
it: the crop of an inpainting at full resolution, or the first pass of a hires fix whose second one cuts off the edges.
A `Box` says which, and may reach beyond 0 and 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lib_portrait.attention.injection import Call
from lib_portrait.attention.sites import Site
from lib_portrait.errors import Notice, PortraitError

# (left, top, right, bottom).
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# A region is a box, or the (h, w) shares of a mask, in [0, 1], over the whole picture.
Region = Box | Tensor

# Of a position: below this a person is not there. A mask's black may be some levels above 0, as JPEG leaves it.
FAINTEST = 0.02
# Of the picture: overlaps below this are how two outlines meet, not what somebody meant.
SMALLEST_OVERLAP = 0.005
# Positions along either side that overlaps are measured with.
MEASURED = 256
# By how much of a position regions must overlap for more than one person to claim it.
OVERLAP = 0.01
# A position lies inside of a region where at least this share of it does.
INSIDE = 0.5


def coverage(region: Region, shape: tuple[int, int], place: Box = WHOLE) -> Tensor:
    """How much of each of (h, w) equal positions of `place` lies inside the region: (h, w) float32 in [0, 1].

    Beyond the picture's edge the region goes on as it is at the edge, as hosts fill a picture there.
    """
    left, top, right, bottom = place
    if isinstance(region, Tensor):
        height, width = region.shape
        down, across = _shares(_edges(height), (top, bottom), shape[0]), _shares(_edges(width), (left, right), shape[1])
        return (down @ region.to(down) @ across.T).float().clamp(0, 1)
    down = _shares(_open(region[1], region[3]), (top, bottom), shape[0])
    across = _shares(_open(region[0], region[2]), (left, right), shape[1])
    return (down * across.T).float()


def grown(box: Box, by: float) -> Box:
    """The box with its width and height grown by the share `by` of them, about its middle; beyond the picture too."""
    left, top, right, bottom = box
    across, down = (right - left) * by / 2, (bottom - top) * by / 2
    return left - across, top - down, right + across, bottom + down


def bounds(mask: Tensor) -> Box:
    """The box about what of a mask (h, w) is white by half, or about all of it that is not black."""
    height, width = mask.shape
    rows, columns = (mask >= min(INSIDE, float(mask.max()))).nonzero(as_tuple=True)
    return (
        columns.min().item() / width,
        rows.min().item() / height,
        (columns.max().item() + 1) / width,
        (rows.max().item() + 1) / height,
    )


def inside(shares: Tensor) -> Tensor:
    """Which positions lie inside of each region, bool, of their shares (..., h, w) in [0, 1] as `coverage` gives them.

    A region that covers no position by half is that of the positions it covers most: at the coarse levels a small face
    would be nowhere else.
    """
    most = shares.amax(dim=(-2, -1), keepdim=True)
    return (shares > 0) & (shares >= most.clamp(max=INSIDE))


def _edges(count: int) -> Tensor:
    """The edges of `count` equal intervals of [0, 1], the outermost ones without end: (count + 1)."""
    inner = torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1]
    return torch.cat([inner.new_tensor([-torch.inf]), inner, inner.new_tensor([torch.inf])])


def _open(low: float, high: float) -> Tensor:
    """The two edges of one interval, without end where it reaches the picture's edge: (2)."""
    ends = (-torch.inf if low <= 0 else low, torch.inf if high >= 1 else high)
    return torch.tensor(ends, dtype=torch.float64)


def _shares(edges: Tensor, span: tuple[float, float], count: int) -> Tensor:
    """How much of each of `count` equal parts of `span` lies between each two edges: (count, edges - 1) float64."""
    ends = torch.linspace(*span, count + 1, dtype=torch.float64)
    low = torch.maximum(ends[:-1, None], edges[None, :-1])
    high = torch.minimum(ends[1:, None], edges[None, 1:])
    return (high - low).clamp(min=0) * (count / (span[1] - span[0]))


def check_takes_part(region: Region, field: str, seen: Tensor, place: Box = WHOLE) -> None:
    """Raises PortraitError if somebody of this region could not be seen.

    field: where the region stands in the request. seen: (h, w) in [0, 1], how much of each position of `place` is
    painted.
    """
    shape = (seen.shape[0], seen.shape[1])
    if (coverage(region, shape, place) * seen).max() >= FAINTEST:
        return
    if coverage(region, shape).max() < FAINTEST:
        problem = "the region is too small, or its mask too dark, to put anybody there"
        remedy = "Make it larger; in a mask, white is inside."
    else:
        problem = "the region lies wholly outside of what is painted, so this person could not take part"
        remedy = "Let it reach into what is inpainted, or leave the person out."
    raise PortraitError(field, problem, remedy)


def overlaps(regions: Sequence[Region | None], there: str) -> list[Notice]:
    """One notice for each two people whose regions overlap: who they are and on how much of the picture.

    there: a clause on what the method makes of such places.
    """
    fields = [coverage(region, (MEASURED, MEASURED)) if region is not None else None for region in regions]
    notices = []
    for j, second in enumerate(fields):
        for i, first in enumerate(fields[:j]):
            if first is None or second is None:
                continue
            # Shares that fit into a position beside each other are no overlap: two soft outlines that meet.
            share = (first + second - 1).clamp(min=0).mean().item()
            if share >= SMALLEST_OVERLAP:
                notices.append(
                    Notice(
                        f"identities[{j}].region",
                        f"it overlaps that of identities[{i}] on {share:.0%} of the picture, {there}",
                    )
                )
    return notices


@dataclass(frozen=True)
class Claims:
    """What people's regions say of the n positions of a site, for A people.

    shares (1, n, A): how much of a position lies in each person's region, 0 for those without one, who are `free`
    (A) bool, or None where everybody has one. overlap: whether more than one person claims a position.
    """

    shares: Tensor
    free: Tensor | None
    overlap: bool


class RegionsAtSites:
    """People's regions, resized to the sites of a UNet; what was resized once is kept."""

    def __init__(self, regions: Sequence[Region | None]):
        self.regions = list(regions)
        self._covered: dict[Hashable, Tensor] = {}
        self._claims: dict[Hashable, Claims] = {}

    def at(self, site: Site, call: Call, people: tuple[int, ...], place: Box, like: Tensor) -> Claims | None:
        """The claims of some people (by number) at a site, or None where none of them has a region.

        place: the part of the picture that the call's latent is of. like (B, n, ...): what the site sees, whose device
        and dtype the claims have. PortraitError if its positions are no whole level.
        """
        free = [self.regions[person] is None for person in people]
        if all(free):
            return None
        shape = call.shape_at(site, like.shape[1])
        key = (people, place, call.latent, shape, like.device, like.dtype)
        if key not in self._claims:
            maps = torch.stack([self._coverage(person, place, call.latent) for person in people])
            resized = F.interpolate(maps[None], size=shape, mode="bilinear", align_corners=False)
            shares = resized.flatten(2).transpose(1, 2)
            overlap = bool((shares.sum(dim=-1) > 1 + OVERLAP).any())
            freed = torch.tensor(free, device=like.device) if any(free) else None
            self._claims[key] = Claims(shares.to(like), freed, overlap)
        return self._claims[key]

    def _coverage(self, person: int, place: Box, latent: tuple[int, int]) -> Tensor:
        """The person's region on the latent, (h, w); zero without one."""
        key = (person, place, latent)
        if key not in self._covered:
            region = self.regions[person]
            self._covered[key] = torch.zeros(latent) if region is None else coverage(region, latent, place)
        return self._covered[key]
