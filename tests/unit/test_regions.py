"""Promises of `lib_portrait.attention.regions`: where on what is sampled a region of the whole picture lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lib_portrait.attention.regions import WHOLE, Box, check_takes_part, coverage, overlaps
from lib_portrait.errors import PortraitError


def test_a_box_covers_positions_by_its_exact_area() -> None:
    covered = coverage((0.25, 0.0, 0.75, 0.1), (10, 8))
    assert covered.dtype == torch.float32
    assert torch.allclose(covered[0], torch.tensor([0, 0, 1, 1, 1, 1, 0, 0.0]))
    assert covered[1:].max() == 0
    part = coverage((0.3, 0.25, 0.55, 1.0), (2, 2))
    assert torch.allclose(part, torch.tensor([[0.4 * 0.5, 0.1 * 0.5], [0.4, 0.1]]))


def test_a_mask_keeps_its_greys_and_its_area_at_every_size() -> None:
    mask = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coverage(mask, (48, 64)), mask)
    assert torch.allclose(coverage(mask, (12, 16)), F.avg_pool2d(mask[None], 4)[0], atol=1e-6)
    for shape in ((7, 5), (50, 90), (1, 1)):
        assert coverage(mask, shape).mean().item() == pytest.approx(mask.mean().item(), abs=1e-5)


@pytest.mark.parametrize("place", [(0.0, 0.0, 0.5, 1.0), (0.25, 0.5, 0.75, 1.0), (0.5, 0.25, 0.625, 0.5)])
def test_a_crop_sees_its_part_of_the_region(place: Box) -> None:
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
    left, top, right, bottom = (round(64 * edge) for edge in place)
    assert torch.allclose(coverage(mask, (bottom - top, right - left), place), mask[top:bottom, left:right], atol=1e-6)
    box = (0.25, 0.25, 0.6, 0.8)
    whole = coverage(box, (64, 64))
    assert torch.allclose(coverage(box, (bottom - top, right - left), place), whole[top:bottom, left:right], atol=1e-6)


def test_beyond_the_picture_a_region_goes_on_as_at_its_edge() -> None:
    mask = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    beyond = coverage(mask, (4, 4), (-0.5, -0.5, 1.5, 1.5))
    assert torch.equal(
        beyond, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0.5, 0.5, 0.25, 0.25], [0.5, 0.5, 0.25, 0.25]])
    )
    half = coverage((0.0, 0.0, 0.5, 1.0), (4, 4), (-0.5, -0.5, 1.5, 1.5))
    assert torch.equal(half, torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4))


def test_somebody_outside_of_what_is_painted_is_named() -> None:
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    for region in ((0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 0.6, 0.1), left):
        check_takes_part(region, "identities[1].region", left)
    for region, seen, place in (
        ((0.5, 0.0, 1.0, 1.0), left, WHOLE),
        (left.flip(1), left, WHOLE),
        ((0.5, 0.0, 1.0, 1.0), torch.ones(8, 8), (0.0, 0.0, 0.5, 1.0)),
    ):
        with pytest.raises(PortraitError, match="wholly outside of what is painted") as caught:
            check_takes_part(region, "identities[1].region", seen, place)
        assert caught.value.field == "identities[1].region"
        assert caught.value.status_code == 422


@pytest.mark.parametrize("region", [torch.full((16, 16), 3 / 255), (0.5, 0.5, 0.5005, 0.5005)])
def test_a_region_in_which_nobody_fits_is_refused(region: torch.Tensor | Box) -> None:
    with pytest.raises(PortraitError, match="too small, or its mask too dark"):
        check_takes_part(region, "identities[0].region", torch.ones(64, 64))


def test_overlaps_are_told_by_whom_and_how_much() -> None:
    notices = overlaps([(0.0, 0.0, 0.6, 1.0), None, (0.4, 0.0, 1.0, 1.0), (0.0, 0.9, 0.1, 1.0)], "where both are")
    told = [str(notice) for notice in notices]
    assert len(told) == 2
    assert told[0] == "identities[2].region: it overlaps that of identities[0] on 20% of the picture, where both are."
    assert told[1].startswith("identities[3].region: it overlaps that of identities[0] on 1%")


def test_outlines_that_meet_are_no_overlap() -> None:
    ramp = torch.linspace(0, 1, 64).expand(64, 64)
    assert overlaps([ramp, 1 - ramp], "where both are") == []
    assert overlaps([(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)], "where both are") == []
    assert overlaps([(0.0, 0.0, 0.502, 1.0), (0.5, 0.0, 1.0, 1.0)], "where both are") == []
