"""Files that the trainer begins with are looked at as those of inference are: by tensor, for values, with a remedy."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_portrait.attention import find_sites
from lib_portrait.checkpoints import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import StoredFile, read_manifest, write_manifest
from lib_portrait.errors import PortraitError
from tests.parity.unets import diffusers_unet
from trainer.frozen import NetworkFiles, frozen_networks
from trainer.recipes.uniportrait_start import begin_with_faceid, begin_with_router, second_stage
from trainer.recipes.vision import VisionRecipe
from trainer.release import interpolate_adapters, reduce_rank, renew_manifest, write_checkpoint

WORLD = Path(__file__).parents[2] / "models" / "world"
PARITY = Path(__file__).parents[1] / "data" / "parity"


def spoilt(folder: Path, role: str, part: str) -> Path:
    """The small adapter's file of a role, with one NaN."""
    tensors = dict(read_tensors(PARITY / f"uniportrait-{role}_small.bin").tensors)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = torch.nan
    path = folder / f"uniportrait-{role}_mine.safetensors"
    write_tensors(path, tensors)
    return path


class WithLora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q_lora = nn.ModuleDict({"down": nn.Linear(2, 1)})


READERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "stage 1": ("faceid", "latents", lambda file: begin_with_faceid(WithLora(), file)),
    "stage 2": ("faceid", "to_v_faceid", lambda file: second_stage(file, [])),
    "router": ("router", "aggr_router", lambda file: begin_with_router(nn.Module(), file)),
    "VAE": ("faceid", "latents", lambda file: frozen_networks(NetworkFiles(vae=file), "cpu")),
    "between": (
        "faceid",
        "latents",
        lambda file: interpolate_adapters(file, file, 0.5, file.with_name("out.safetensors")),
    ),
    "reduced": ("faceid", "lora", lambda file: reduce_rank(file, 2, file.with_name("out.safetensors"))),
}


@pytest.mark.parametrize("case", READERS)
def test_values_that_are_not_finite_are_refused_by_file_and_tensor(case: str, tmp_path: Path) -> None:
    role, part, read = READERS[case]
    path = spoilt(tmp_path, role, part)
    with pytest.raises(PortraitError, match=rf"^{path.name}: .*{part}.* holds infinities or NaN"):
        read(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda file: VisionRecipe(file.parent, file), r"^base\.safetensors: the tensor .* is missing"),
        (lambda file: write_checkpoint(file, file, file), r"base\.safetensors does not hold a world's UNet"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(load: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    write_tensors(path, {"text_encoder.other": torch.zeros(1), "unet.other": torch.zeros(1)})
    with pytest.raises(PortraitError, match=said):
        load(path)


def test_a_first_stage_without_lora_is_refused(tmp_path: Path) -> None:
    tensors = read_tensors(PARITY / "uniportrait-faceid_small.bin").tensors
    path = tmp_path / "uniportrait-faceid_mine.safetensors"
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if "lora" not in name})
    with pytest.raises(PortraitError, match="mine.safetensors holds no LoRA"):
        second_stage(path, find_sites(diffusers_unet()))


def test_a_manifest_is_renewed_from_the_files_beside_it(tmp_path: Path) -> None:
    shipped = read_manifest(WORLD / "kit.json")
    stale = dataclasses.replace(
        shipped,
        encoders={**shipped.encoders, "backbone": StoredFile("world-recognition.safetensors", "0" * 64, 8)},
        base=StoredFile("world.safetensors"),
        detector=StoredFile("world-detector.safetensors", "1" * 64),
        text_encoder=None,
        picture=(512, 512),
    )
    write_manifest(tmp_path / "kit.json", stale)
    for name in ("world-recognition.safetensors", "world.safetensors", "world.yaml"):
        shutil.copyfile(WORLD / name, tmp_path / name)
    renew_manifest(tmp_path)
    # The detector is not there: what the manifest said of it stays.
    assert read_manifest(tmp_path / "kit.json") == dataclasses.replace(shipped, detector=stale.detector)
