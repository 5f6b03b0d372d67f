"""A small model and what the tests of all methods' recipes do with one."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lib_portrait.standalone import layout
from lib_portrait.standalone.model import Model, load_tokenizer
from trainer import adapter_recipe
from trainer.adapter_recipe import AdapterRecipe
from trainer.draws import Draws
from trainer.loop import Settings

CONTEXT, SIDE = 32, 64


def tiny_model() -> Model:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=CONTEXT, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    return Model(unet, vae, text, load_tokenizer(), layout.SD1)


def made_recipe(monkeypatch: pytest.MonkeyPatch, module: ModuleType, data: Path, *arguments: str) -> Any:
    """The recipe of a method's module on the tiny model, whose pictures are said to have SIDE pixels a side."""
    model = tiny_model()
    monkeypatch.setattr(type(model), "size", SIDE)
    monkeypatch.setattr(adapter_recipe, "load_model", lambda path: model)
    base = data.parent / "base.safetensors"
    base.write_bytes(b"stands for the checkpoint: exports say which one they were made for")
    parser = argparse.ArgumentParser()
    module.configure(parser)
    options = parser.parse_args(["--checkpoint", str(base), "--name", "tiny", *arguments])
    options.data = data
    torch.manual_seed(0)
    made = module.build(options)
    assert isinstance(made, AdapterRecipe)
    return made


def settings(run: Path, steps: int = 5, **own: Any) -> Settings:
    return Settings(
        **{"output": run, "steps": steps, "batch": 3, "rate": 5e-3, "warmup": 0, "ema": 0.0, "log_every": 1, **own}
    )


def ready(made: Any, run: Path, **own: Any) -> Any:
    made.prepare(torch.device("cpu"), torch.float32, settings(run, **own))
    return made


def eject(made: AdapterRecipe) -> None:
    for injection in made.injections:
        injection.eject()


def batch_of(made: AdapterRecipe, rows: int = 3) -> dict[str, Tensor]:
    """The first samples that can be used."""
    samples: list[dict[str, Tensor]] = []
    for i in itertools.count():
        with contextlib.suppress(ValueError):
            samples.append(made.data[i % len(made.data), (0, 0, i)])
        if len(samples) == rows:
            break
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def draws(rows: int = 3, step: int = 0) -> Draws:
    return Draws(0, step, 0, rows, slice(0, rows), torch.device("cpu"))


def gradients(made: AdapterRecipe, rows: int = 3) -> list[Tensor]:
    """Those of one batch, of every parameter; the recipe is ejected then."""
    made(batch_of(made, rows), draws(rows))["loss"].backward()
    eject(made)
    found = [parameter.grad for parameter in made.parameters()]
    assert all(one is not None for one in found)
    return [one.clone() for one in found if one is not None]


def check_the_same(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert one.abs().max() > 0
