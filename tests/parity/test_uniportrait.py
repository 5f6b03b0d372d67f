"""The numbers of the official UniPortrait code, on diffusers' UNet and on the genuine ldm UNet."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, mark
from lib_portrait.methods.uniportrait import Adapter, IDEmbedding, Person, UniPortraitRule
from tests.parity.unets import DATA, diffusers_unet, flatten, ldm_unet, load_bin

pytestmark = pytest.mark.parity

EMBEDDING_TOLERANCE = 1e-5
UNET_TOLERANCE = 1e-4
CASES = [(n, scale, False) for n in (1, 2, 3) for scale in (0.0, 0.7, 1.0)] + [(2, 0.7, True), (3, 0.7, True)]


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(DATA / "unet_cases.safetensors")


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter.from_tensors(
        flatten(load_bin("uniportrait-faceid_small.bin")), flatten(load_bin("uniportrait-router_small.bin"))
    )


@pytest.fixture(scope="module", params=["diffusers", "ldm"])
def unet(request: pytest.FixtureRequest) -> nn.Module:
    return diffusers_unet() if request.param == "diffusers" else ldm_unet()


def people(cases: dict[str, torch.Tensor], n: int, scale: float, masked: bool) -> list[Person]:
    """The case's identities. Its two rows have tokens of their own: they play the negative and the positive row."""
    tokens = cases[f"id_tokens.n{n}"].unflatten(1, (n, -1))
    masks = cases[f"mask.n{n}"][0] if masked else [None] * n
    return [Person({NEGATIVE: tokens[0, i], POSITIVE: tokens[1, i]}, scale=scale, region=masks[i]) for i in range(n)]


def run(unet: nn.Module, cases: dict[str, torch.Tensor], rows: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    """The UNet's noise for the given rows, marked by their kind."""
    text = cases["text"]
    context = torch.cat([mark(text[i : i + 1], (NEGATIVE, POSITIVE)[i]) for i in rows])
    with torch.no_grad():
        out = unet(cases["x"][list(rows)], cases["t"][list(rows)], context)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.mark.parametrize(("n", "scale", "masked"), CASES)
def test_unet_output(
    unet: nn.Module, adapter: Adapter, cases: dict[str, torch.Tensor], n: int, scale: float, masked: bool
) -> None:
    expected = cases[f"eps.n{n}.scale{scale}" + (".masked" if masked else "")]
    with Injection(unet, UniPortraitRule(adapter, people(cases, n, scale, masked))):
        found = run(unet, cases)
        apart = torch.cat([run(unet, cases, (0,)), run(unet, cases, (1,))])
        swapped = run(unet, cases, (1, 0)).flip(0)
    print(f"largest difference {(found - expected).abs().max():.2e}")
    assert (found - expected).abs().max() <= UNET_TOLERANCE
    assert (apart - expected).abs().max() <= UNET_TOLERANCE
    assert (swapped - expected).abs().max() <= UNET_TOLERANCE


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_id_embedding(references: int, beta: float) -> None:
    data = load_file(DATA / "id_embedding.safetensors")
    weights = {key.removeprefix("weight."): value for key, value in data.items() if key.startswith("weight.")}
    embedding = IDEmbedding.from_tensors(weights)
    intrinsic = data[f"intrinsic.refs{references}"].flatten(0, 1)[None]
    structure = data[f"structure.refs{references}"].flatten(0, 1)[None]
    found = embedding(intrinsic, structure, beta)
    assert (found - data[f"out.refs{references}.beta{beta}"]).abs().max() <= EMBEDDING_TOLERANCE
