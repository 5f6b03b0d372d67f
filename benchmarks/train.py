"""`portrait.py bench train`: samples a second of the training loop beside those of its frozen UNet alone.

The loop is the real one (`trainer.loop.train`) with a method's recipe on made-up features; the bare UNet
runs forward and, down to its input, backward on the same shapes. Both are timed in turns in one process: every few
steps the loop waits while the bare UNet does as many, so that whatever else the machine does falls on both. The ratio
is the median over these pairs. Peak memory is that of a process (on a GPU: of the device) that does only one of both.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from lib_portrait.methods.declarations import ADAPTED
from lib_portrait.standalone import layout
from lib_portrait.standalone.model import load_model, make_model, save_model
from trainer.architectures import world_text_encoder, world_unet, world_vae
from trainer.draws import Draws
from trainer.features import features_path
from trainer.loop import PRECISIONS, Recipe, Samples, Settings, train
from trainer.recipes import recipe_module
from trainer.shards import FaceRecord, Record, encode_png, writing

SAMPLES = 64
# Points of a pose, the length of an image encoder's embeddings, and a caption in CLIP's tokens.
POINTS, IMAGE = 18, 768
PHOTO_OF_A_PERSON = (320, 1125, 539, 320, 2533)


@dataclass(frozen=True)
class Shapes:
    """What a model is trained on. latent: its side; intrinsic, structure: a face's features."""

    latent: int
    intrinsic: tuple[int, int]
    structure: tuple[int, int]


SHAPES = {"world": Shapes(16, (25, 128), (64, 288)), "sd15": Shapes(64, (49, 512), (256, 1728))}


def random_model(kind: str, path: Path) -> None:
    """A single-file model of that kind with random weights."""
    torch.manual_seed(0)
    if kind == "world":
        save_model(make_model(world_unet(), world_vae(), world_text_encoder()), path)
        return
    params = layout.SD1["model"]["params"]
    sizes = layout.unet_config(params["unet_config"]["params"], kind)
    unet = UNet2DConditionModel(**sizes, sample_size=params["image_size"])
    vae = AutoencoderKL(**layout.vae_config(params["first_stage_config"]["params"], params["scale_factor"], kind))
    save_model(make_model(unet, vae, CLIPTextModel(CLIPTextConfig(**layout.SD1_TEXT))), path)


def random_data(shapes: Shapes, folder: Path) -> None:
    """A shard of pictures with one person each, who is in two, and features beside it; what they show is never looked
    at."""
    side = shapes.latent * 8
    landmarks = ((0.4, 0.4), (0.6, 0.4), (0.5, 0.5), (0.4, 0.6), (0.6, 0.6))
    box, points = (0.3 * side, 0.3 * side, 0.7 * side, 0.7 * side), tuple((x * side, y * side) for x, y in landmarks)
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    shard = folder / "bench-00000.tar"
    with writing(shard) as made:
        for number in range(SAMPLES):
            face = FaceRecord(str(number // 2), None, box, points)
            pose = [[x * side, y * side] for x, y in np.linspace((0.4, 0.3), (0.6, 0.9), POINTS)]
            record = Record("a photo of a person", (face,), {"poses": [pose]})
            made.add(f"{number:04d}", picture, "png", record, None)
    tensors = {
        "latents": torch.randn(SAMPLES, 4, shapes.latent, shapes.latent).half(),
        "tokens": torch.randint(49406, (SAMPLES, 77), dtype=torch.int32),
        "size": torch.full((SAMPLES, 2), side, dtype=torch.int32),
        "intrinsic": torch.randn(SAMPLES, *shapes.intrinsic).half(),
        "structure": torch.randn(SAMPLES, *shapes.structure).half(),
        "zero_structure": torch.randn(shapes.structure).half(),
        "sample": torch.arange(SAMPLES, dtype=torch.int32),
        "face": torch.zeros(SAMPLES, dtype=torch.int32),
        "references": torch.randn(SAMPLES, 4, shapes.latent, shapes.latent).half(),
        "reference_sample": torch.arange(SAMPLES, dtype=torch.int32),
        "reference_face": torch.zeros(SAMPLES, dtype=torch.int32),
        "image": torch.randn(SAMPLES, IMAGE).half(),
        "mask": torch.rand(SAMPLES, shapes.latent, shapes.latent).half(),
        "image_sample": torch.arange(SAMPLES, dtype=torch.int32),
        "image_face": torch.zeros(SAMPLES, dtype=torch.int32),
    }
    # The word of a person in "a photo of a person", between the token that begins and the one that ends a text.
    tensors["tokens"][:, :7] = torch.tensor([49406, *PHOTO_OF_A_PERSON, 49407], dtype=torch.int32)
    save_file(tensors, features_path(shard), metadata={"vae": "bench", "references": str(side)})


class Bare:
    """The frozen UNet alone: forward and backward of a batch."""

    def __init__(self, unet: UNet2DConditionModel, batch: int, latent: int, device: torch.device):
        self.unet, self.device = unet, device
        self.latent = torch.randn(batch, 4, latent, latent, device=device, dtype=unet.dtype, requires_grad=True)
        self.t = torch.randint(1000, (batch,), device=device)
        self.text = torch.randn(batch, 77, unet.config.cross_attention_dim, device=device, dtype=unet.dtype)

    def step(self) -> None:
        self.unet(self.latent, self.t, self.text).sample.float().square().mean().backward()
        self.latent.grad = None

    def seconds(self, steps: int) -> float:
        start = now(self.device)
        for _ in range(steps):
            self.step()
        return now(self.device) - start


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Paired(Recipe):
    """A recipe that every `steps` forward passes stops the loop and lets the bare UNet do as many.

    pairs: seconds of the bare UNet and of the loop, each pair next to one another.
    """

    def __init__(self, recipe: Any, steps: int, batch: int, latent: int):
        super().__init__()
        self.name, self.recipe, self.steps, self.batch, self.latent = recipe.name, recipe, steps, batch, latent
        self.pairs: list[tuple[float, float]] = []
        self._bare: list[Bare] = []
        self._calls, self._since, self._bare_seconds = 0, 0.0, 0.0

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        self.recipe.prepare(device, dtype, settings)
        unet = self.recipe.model.unet
        # The same weights in a second network, which stays as it is while the first one is injected.
        with torch.device("meta"):
            twin = UNet2DConditionModel.from_config(unet.config)
        twin.load_state_dict({name: tensor.detach() for name, tensor in unet.state_dict().items()}, assign=True)
        self._bare = [Bare(twin.requires_grad_(False).eval(), self.batch, self.latent, device)]

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        if self._calls % self.steps == 0:
            bare = self._bare[0]
            stopped = now(bare.device)
            if self._calls:
                self.pairs.append((self._bare_seconds, stopped - self._since))
            self._bare_seconds = bare.seconds(self.steps)
            self._since = now(bare.device)
        self._calls += 1
        return self.recipe(batch, draws)

    def samples(self) -> Samples:
        return self.recipe.samples()

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        return self.recipe.groups(settings)

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """Nothing: these weights are of no use."""


def recipe_of(folder: Path, options: argparse.Namespace) -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    module = recipe_module(options.method)
    module.configure(parser)
    words = ["--data", str(folder), "--checkpoint", str(folder / "model.safetensors"), "--name", "bench"]
    sizes = importlib.import_module(f"benchmarks.methods.{options.method}")
    # What a recipe needs beside the data.
    files = sizes.files(folder, SHAPES[options.model].intrinsic) if hasattr(sizes, "files") else ()
    return module.build(parser.parse_args([*words, *sizes.TRAINING.get(options.model, ()), *files]))


def settings_of(folder: Path, options: argparse.Namespace, steps: int) -> Settings:
    return Settings(
        folder / "run",
        steps=steps,
        batch=options.batch,
        precision=options.precision,
        log_every=20,
        save_every=10**6 * 20,
    )


def peak(device: torch.device) -> int:
    """Most bytes that were in use at once: on the GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(which: str, folder: Path, options: argparse.Namespace) -> int:
    """Peak memory of two steps of the loop, or of the bare UNet, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if which == "loop":
        train(recipe_of(folder, options), settings_of(folder, options, 2))
    else:
        unet = load_model(folder / "model.safetensors", device, PRECISIONS[options.precision]).unet
        Bare(unet, options.batch, SHAPES[options.model].latent, device).seconds(2)
    return peak(device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="portrait.py bench train", description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), default="world", help="whose sizes; default world")
    parser.add_argument("--method", choices=ADAPTED, default=ADAPTED[0], help=f"whose recipe; default {ADAPTED[0]}")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="steps of each of a pair")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs (at least 5)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="no")
    parser.add_argument("--alone", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")
    if options.alone:
        print(json.dumps(alone(options.alone[0], Path(options.alone[1]), options)))
        return 0

    with tempfile.TemporaryDirectory(prefix="portrait-bench-") as name:
        folder = Path(name)
        random_model(options.model, folder / "model.safetensors")
        random_data(SHAPES[options.model], folder)
        words = [sys.executable, "-m", "benchmarks.train", "--model", options.model, "--batch", str(options.batch)]
        words += ["--precision", options.precision, "--method", options.method]
        memory = {}
        for which in ("bare", "loop"):
            command = [*words, "--alone", which, str(folder)]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
            memory[which] = int(done.stdout.splitlines()[-1])
        paired = Paired(recipe_of(folder, options), options.steps, options.batch, SHAPES[options.model].latent)
        # The first run of each is for warming up; the last pass only ends the last pair.
        chosen = settings_of(folder / "paired", options, (options.pairs + 1) * options.steps + 1)
        # Standard output is for the figures alone.
        with contextlib.redirect_stdout(sys.stderr):
            train(paired, chosen)
        pairs = paired.pairs[1:]
    samples = options.steps * options.batch
    line = {
        "name": "train",
        "method": options.method,
        "model": options.model,
        "batch": options.batch,
        "precision": options.precision,
        "trained_parameters": sum(p.numel() for p in paired.parameters() if p.requires_grad),
        "ratio": round(statistics.median(bare / loop for bare, loop in pairs), 4),
        "loop_samples_per_second": round(statistics.median(samples / loop for _, loop in pairs), 3),
        "bare_samples_per_second": round(statistics.median(samples / bare for bare, _ in pairs), 3),
        "loop_peak_mib": round(memory["loop"] / 2**20),
        "bare_peak_mib": round(memory["bare"] / 2**20),
        "pairs": [[round(bare, 4), round(loop, 4)] for bare, loop in pairs],
    }
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
