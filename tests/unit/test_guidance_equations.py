"""Eq. 6 to 11 of OmniPortrait, each against ten plain lines."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lib_portrait.guidance import equations


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rounds", "power"), [(3, 2.0), (1, 0.5), (0, 2.0)])
def test_eq_6(rounds: int, power: float) -> None:
    attention, affinity = drawn(4, 6).softmax(dim=1), drawn(24, 24, seed=1).softmax(dim=1)
    plain = [[float(value) for value in row] for row in attention]
    for _ in range(rounds):
        low, high = min(map(min, plain)), max(map(max, plain))
        plain = [[((value - low) / (high - low)) ** power for value in row] for row in plain]
    flat = [value for row in plain for value in row]
    spread = torch.tensor([sum(float(a) * b for a, b in zip(row, flat)) for row in affinity]).double().reshape(4, 6)
    expected = (spread - spread.min()) / (spread.max() - spread.min())
    found = equations.refined(attention, affinity, rounds, power)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(equations.region_mask(found, (4, 6), 0.3), found > 0.3)
    assert equations.region_mask(found, (8, 12)).shape == (8, 12)


def test_a_map_without_a_peak_marks_nothing() -> None:
    flat = equations.refined(torch.full((4, 4), 0.2), torch.full((16, 16), 1 / 16))
    assert not equations.region_mask(flat, (8, 8)).any()


@pytest.mark.parametrize("block", [1, 40, 2**24])
def test_eq_7(block: int) -> None:
    reference, generated = drawn(17, 5), drawn(40, 5, seed=1)
    numbers, distances = equations.match(reference, generated, block)
    for point, number, distance in zip(reference, numbers, distances):
        apart = [math.dist(point.tolist(), other.tolist()) for other in generated]
        assert int(number) == apart.index(min(apart)) and float(distance) == pytest.approx(min(apart), abs=1e-6)


def test_matching_holds_no_more_distances_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = torch.addmm

    def counted(*args: object, **kwargs: object) -> Tensor:
        made = plain(*args, **kwargs)  # type: ignore[arg-type]
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(torch, "addmm", counted)
    equations.match(drawn(100, 3), drawn(64, 3), 640)
    assert max(sizes) == 640 and sum(sizes) == 6400


def test_matching_has_no_gradient() -> None:
    generated = drawn(6, 4).requires_grad_()
    _, distances = equations.match(drawn(3, 4, seed=1), generated)
    assert not distances.requires_grad


def test_of_several_references_the_nearest_has_a_position() -> None:
    reference, generated = drawn(30, 4), drawn(9, 4, seed=1)
    owners = torch.arange(3).repeat_interleave(10)
    matched, distances = equations.match(reference, generated)
    chosen = equations.nearest_reference(matched, distances, owners, len(generated))
    for position in range(len(generated)):
        claims = [i for i in range(30) if int(matched[i]) == position]
        if claims:
            owner = int(owners[min(claims, key=lambda i: float(distances[i]))])
            assert [bool(chosen[i]) for i in claims] == [int(owners[i]) == owner for i in claims]
    assert not chosen.all()
    assert equations.nearest_reference(matched, distances, torch.zeros_like(owners), len(generated)).all()


def test_eq_8_to_10() -> None:
    reference, generated = drawn(12, 5), drawn(12, 5, seed=1)
    total = 0.0
    for a, b in zip(reference.tolist(), generated.tolist()):
        cosine = sum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b))
        total += (cosine + 1) / 2
    found = equations.similarity(reference, generated)
    assert float(found) == pytest.approx(total, abs=1e-9)
    assert float(equations.similarity(reference, generated, "mean")) == pytest.approx(total / 12, abs=1e-9)
    assert float(equations.energy(found, 8.5)) == pytest.approx(8.5 / (1 + total), abs=1e-9)


def test_centred_features_are_measured_by_the_reference() -> None:
    reference, generated = 5 + drawn(50, 3) * torch.tensor([1.0, 10.0, 0.0]), drawn(20, 3, seed=1)
    own, other = equations.centred(reference, generated)
    torch.testing.assert_close(own.mean(dim=0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(own[:, :2].std(dim=0, unbiased=False), torch.ones(2).double())
    for channel in (0, 1):
        expected = (generated[:, channel] - reference[:, channel].mean()) / reference[:, channel].std(unbiased=False)
        torch.testing.assert_close(other[:, channel], expected)
    # A channel that is the same all over the reference is not blown up.
    assert float(other[:, 2].abs().max()) < 1e4


def test_eq_9_leaves_nothing_outside_of_the_mask() -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1:3, 2:] = True
    gradient, eps = drawn(3, 4, 4), drawn(3, 4, 4, seed=1)
    masked = equations.background_masked(gradient, mask)
    assert torch.equal(masked[:, mask], gradient[:, mask]) and not masked[:, ~mask].any()
    share = equations.as_share(masked, eps, mask, 0.25)
    assert float(share.norm()) == pytest.approx(0.25 * float(eps[:, mask].norm()))
    torch.testing.assert_close(share / share.norm(), masked / masked.norm())
    nothing = torch.zeros_like(gradient)
    assert torch.equal(equations.as_share(nothing, eps, mask, 0.25), nothing)


@pytest.mark.parametrize("w", [0.0, 1.0, 7.5])
def test_eq_11_has_the_gradient_once(w: float) -> None:
    eps_uncond, eps_cond, gradient, z, alpha = *(drawn(4, 2, 2, seed=seed) for seed in range(4)), torch.tensor(0.6)
    expected = eps_uncond + w * (eps_cond - eps_uncond) + gradient
    uncond, cond = (equations.guided(eps, gradient) for eps in (eps_uncond, eps_cond))
    torch.testing.assert_close(uncond + w * (cond - uncond), expected)
    # The same of a model that predicts v = alpha eps - sigma z0, where z = alpha z0 + sigma eps.
    sigma = (1 - alpha**2).sqrt()
    uncond, cond = (
        equations.guided(alpha * eps - sigma * (z - sigma * eps) / alpha, gradient, alpha)
        for eps in (eps_uncond, eps_cond)
    )
    torch.testing.assert_close(equations.eps_of(uncond + w * (cond - uncond), z, alpha), expected, atol=1e-6, rtol=0)
    z0 = equations.z0_of(eps_cond, z, alpha)
    torch.testing.assert_close(alpha * z0 + sigma * eps_cond, z)
    assert equations.guides(600.0, 0.6, 1000) and not equations.guides(600.5, 0.6, 1000)
