"""The embedded world from nothing: pictures, its networks, each method's adapter, the kit, what it can do.

portrait.py train world --output runs/world --minutes 2400
portrait.py train world --output runs/world --device cuda --minutes 9      a large GPU, all processor cores

Each stage goes on where it was broken off, and is left out when it is done. `runs/world/kit` is then what
`portrait.py generate --models runs/world/kit` and `portrait.py evaluate --kit runs/world/kit` take.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib_portrait.checkpoints.kit import ALONE, SUFFIX, Sampling, read_manifest, write_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import ADAPTED
from trainer import release
from trainer.companions import MODELS, stored_file
from trainer.dataset import WorldSettings, make_world
from trainer.engines import LocalEngine
from trainer.frozen import NetworkFiles, precompute_shards
from trainer.loop import progress
from trainer.recipes import recipe_module, train_recipe
from trainer.shards import Shards
from trainer.stages import Stage, Stages

ROOT = Path(__file__).resolve().parents[1]
# Stages at once on a GPU: more would take its time from the autoencoder, which the base model waits for.
TOGETHER = 3
# Minutes on a GPU from which it pays to translate autoencoder and base model for it first, which takes one or two.
COMPILED_FROM = 15.0
# Steps that no run reaches: one that has minutes ends by the clock.
ENDLESS = 10**7
CHECKPOINT = "world.safetensors"
# Pictures of a shard, each of which one process draws: small enough that all have their share to the end.
SHARD = 250
# Photos of so many held-out people lie beside the weights.
SAMPLE_PEOPLE = 6
SAMPLES = "samples.json"
SAMPLING = Sampling("DDIM", 20, 5)
# The share of all minutes that each method has.
METHOD_SHARE = 18.0


@dataclass(frozen=True)
class Training:
    """How a recipe is trained as a stage. steps: where no minutes are given. batch: on a CPU, and on a GPU.

    exact: always in float32, for what half precision does not serve: margins between cosines. read: its samples are
    pictures, which take a processor longer to prepare than latents. again: the file of an earlier export that it can
    go on from where its checkpoints are gone.
    """

    recipe: str
    share: float
    needs: tuple[str, ...]
    steps: int
    batch: tuple[int, int]
    rate: float
    options: str
    ema: float = 0.0
    exact: bool = False
    read: bool = True
    again: str = ""


# `{...}` stands for a place, or a number of `WorldOptions`.
TRAININGS = {
    "autoencoder": Training(
        "vae",
        16,
        ("pictures",),
        20000,
        (8, 192),
        2e-3,
        "--crop {crop} --kl 1e-4 --absolute 4 --gradient 1 --detail 2 --on-faces 0.75 --channels {vae_channels} "
        "--layers {vae_layers}",
        ema=0.998,
        again="vae.safetensors",
    ),
    "recognition": Training(
        "recognition",
        5,
        ("pictures",),
        2000,
        (64, 512),
        2e-3,
        "--side {conditioning_side} --factors {factors}",
        exact=True,
    ),
    "measuring": Training(
        "recognition",
        5,
        ("pictures",),
        2000,
        (64, 512),
        2e-3,
        "--network measuring --side {measuring_side} --factors 300 --seed 7",
        exact=True,
    ),
    "detector": Training("detector", 2, ("pictures",), 800, (32, 256), 5e-3, "", exact=True),
    "attributes": Training("attributes", 3, ("pictures",), 1500, (32, 256), 5e-3, "", exact=True),
    # Once the latents are as they stay, what tells people apart counts too. The base model need not wait for it.
    "decoder": Training(
        "vae",
        6,
        ("autoencoder", "recognition"),
        3000,
        (8, 96),
        1e-3,
        "--crop {crop} --absolute 4 --gradient 1 --detail 2 --on-faces 0.75 --decoder-only --perceptual 0.3 "
        "--initial {autoencoder}/vae.safetensors --recognition {recognition}/world-recognition.safetensors",
        ema=0.99,
    ),
    "base": Training(
        "base",
        40,
        ("latents",),
        40000,
        (16, 512),
        1.5e-3,
        "--vae {autoencoder}/vae.safetensors --gamma 5 --face-weight 1 --channels {unet_channels} "
        "--layers {unet_layers} --heads {heads}",
        ema=0.999,
        read=False,
        again="base.safetensors",
    ),
    "vision": Training("vision", 3, ("base",), 800, (64, 512), 1e-3, "--base {base}/base.safetensors", ema=0.99),
}
# How every method's adapter is trained, beside what its recipe says itself.
ADAPTER = Training(
    "", METHOD_SHARE, ("faces",), 4000, (16, 96), 1.5e-3, "--checkpoint {kit}/world.safetensors --name {name}", 0.995
)


@dataclass(frozen=True)
class WorldOptions:
    """What a world is made like. size: of its pictures, number: how many there are, identities: of how many people.

    crop: side of what the autoencoder learns from. factors: how much the conditioning network is taught to tell what
    people are drawn from; 0 for identity alone, as networks of photographs are. together: stages at once. tiny: of
    everything as little as possible, to see that it goes through.
    """

    output: Path
    device: str = "cpu"
    size: int = 256
    number: int = 30000
    identities: int = 6000
    crop: int = 128
    vae_channels: tuple[int, ...] = (64, 128, 128, 128)
    vae_layers: int = 1
    unet_channels: tuple[int, ...] = (64, 128, 256, 256)
    unet_layers: int = 1
    heads: int = 1
    conditioning_side: int = 112
    measuring_side: int = 96
    factors: float = 300.0
    together: int = 1
    processes: int = 1
    seed: int = 0
    tiny: bool = False

    def __post_init__(self) -> None:
        if self.size % 64 or not 64 <= self.size <= 1024:
            raise PortraitError("size", f"{self.size} was given", "Give a multiple of 64, from 64 to 1024.")
        if self.crop % 8 or not 0 < self.crop <= self.size:
            raise PortraitError("crop", f"{self.crop} was given", f"Give a multiple of 8, up to {self.size}.")
        for name in ("together", "processes"):
            if getattr(self, name) < 1:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give 1 or more.")

    @property
    def pictures(self) -> Path:
        return self.output / "pictures"

    @property
    def kit(self) -> Path:
        return self.output / "kit"

    def run(self, name: str) -> Path:
        return self.output / name

    def export(self, name: str) -> Path:
        return self.run(name) / "export"


# What `--tiny` makes everything like.
TINY = {
    "size": 128,
    "number": 24,
    "identities": 6,
    "crop": 64,
    "vae_channels": (32, 32, 32, 32),
    "vae_layers": 0,
    "unet_channels": (32, 32, 32, 32),
    "conditioning_side": 48,
    "measuring_side": 32,
}
TINY_STEPS, TINY_BATCH = 2, 4

Evaluate = Callable[[Path, Path, Sequence[str], str, bool], object]


def stages_of(options: WorldOptions, evaluate: Evaluate) -> Stages:
    """All stages of a world, in order.

    evaluate: measures what the kit's adapters of these names can do: its folder, that of the results, the names, the
    device, whether it is to be brief.
    """
    stages = [Stage("pictures", 8, (), lambda minutes: _pictures(options))]
    for name, training in TRAININGS.items():
        if training.recipe == "base":
            stages.append(Stage("latents", 2, ("autoencoder",), lambda minutes: _latents(options)))
        stages.append(_stage(options, name, training))
    networks = ("decoder", "base", "recognition", "measuring", "detector", "attributes", "vision")
    stages.append(Stage("checkpoint", 0.5, networks, lambda minutes: _checkpoint(options)))
    stages.append(Stage("faces", 4, ("checkpoint", "latents"), lambda minutes: _faces(options)))
    last: list[str] = []
    for method in ADAPTED:
        runs = adapter_trainings(method)
        for name, training in runs.items():
            stages.append(_stage(options, name, training, adapter_name(method)))
        last.append(list(runs)[-1])
    stages.append(Stage("kit", 0.5, tuple(last), lambda minutes: _kit(options, dict(zip(ADAPTED, last)))))
    names = [adapter_name(method) for method in ADAPTED]

    def _evaluation(minutes: float) -> bool:
        evaluate(options.kit, options.output / "evaluation", names, options.device, options.tiny)
        return True

    stages.append(Stage("evaluation", 6, ("kit",), _evaluation))
    stages.append(Stage("sheet", 1, ("kit",), lambda minutes: _sheet(options)))
    return Stages(stages, options.output / "stages")


def adapter_name(method: str) -> str:
    """An adapter's name in the kit: the first method's is that of the world, which a request means that names none."""
    return "world" if method == ADAPTED[0] else f"world-{method}"


def adapter_trainings(method: str) -> dict[str, Training]:
    """The stages that train a method's adapter, one after the other, by name.

    They are what WORLD_RUNS of its recipe says: the options of each run, in which `{previous}` stands for the export of
    the run before, and `{name}`, `{backbone}`, `{vision}` and `{detector}` for the adapter's name and for networks of
    the world. A recipe that says nothing has one run, with no options of its own.
    """
    runs: Sequence[str] = getattr(recipe_module(method), "WORLD_RUNS", ("",))
    trainings = {}
    needs = ADAPTER.needs
    for number, text in enumerate(runs):
        name = method if len(runs) == 1 else f"{method}-{number + 1}"
        options = f"{ADAPTER.options} {text}".replace("{previous}", "{" + needs[-1] + "}" if number else "")
        trainings[name] = dataclasses.replace(
            ADAPTER,
            recipe=method,
            share=METHOD_SHARE / len(runs),
            needs=needs,
            steps=ADAPTER.steps // len(runs),
            options=options,
        )
        needs = (name,)
    return trainings


def _stage(options: WorldOptions, name: str, training: Training, adapter: str = "") -> Stage:
    def work(minutes: float) -> bool:
        settings = train_recipe(training.recipe, arguments_of(options, name, training, minutes, adapter))
        return progress(settings).done

    return Stage(name, training.share, training.needs, work)


def arguments_of(options: WorldOptions, name: str, training: Training, minutes: float, adapter: str = "") -> list[str]:
    """The arguments of `portrait.py train RECIPE` for a stage. minutes: 0 for its own number of steps."""
    on_gpu = options.device == "cuda"
    values = {one.name: getattr(options, one.name) for one in dataclasses.fields(options)}
    values |= {key: " ".join(map(str, value)) for key, value in values.items() if isinstance(value, tuple)}
    values |= {one: shlex.quote(str(options.export(one))) for one in _run_names()}
    kit = shlex.quote(str(options.kit))
    networks = {"backbone": "recognition", "vision": "vision", "detector": "detector"}
    files = {role: f"{kit}/world-{file}.safetensors" for role, file in networks.items()}
    # A stage is called as the network it makes, and that one's place in the kit is what adapters are told.
    values |= {**({} if not adapter else files), "kit": kit, "name": adapter}
    words = shlex.split(training.options.format(**values))
    steps, batch = (TINY_STEPS, TINY_BATCH) if options.tiny else (training.steps, training.batch[on_gpu])
    if minutes:
        length = ["--steps", str(ENDLESS), "--budget", f"{minutes:.4f}"]
    else:
        length = ["--steps", str(steps), "--cooldown", str(steps // 2)]
    numbers = {
        "data": options.pictures,
        "output": options.run(name),
        "optimizer": "muon",
        "batch": batch,
        "rate": training.rate,
        "warmup": 0 if options.tiny else 50,
        "ema": training.ema,
        "precision": "no" if training.exact else precision_of(options.device),
        "save-every": 200,
        "workers": _workers(options, training),
    }
    if "--seed" not in words:
        numbers["seed"] = options.seed
    arguments = [*length, *(text for key, value in numbers.items() for text in (f"--{key}", str(value)))]
    if training.again and on_gpu and minutes >= COMPILED_FROM:
        arguments.append("--compile")
    if training.again:
        arguments += _begun_before(options.run(name), training.again)
    return [*arguments, *words]


def _run_names() -> list[str]:
    return [*TRAININGS, *(name for method in ADAPTED for name in adapter_trainings(method))]


def precision_of(device: str) -> str:
    """bf16 where matrices are multiplied in it faster than in float32: on GPUs, and processors with AMX."""
    return "bf16" if device == "cuda" or has_amx() else "no"


def has_amx(file: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has AMX with bf16, as Linux tells."""
    try:
        return "amx_bf16" in file.read_text("utf-8").split()
    except OSError:
        return False


def _workers(options: WorldOptions, training: Training) -> int:
    """Processes that prepare a stage's samples. On a CPU the cores are those that train."""
    if options.device != "cuda":
        return 0
    cores = os.cpu_count() or 1
    return max(1, cores // (2 if options.together > 1 else 1) - 1) if training.read else max(1, min(4, cores // 4))


def _begun_before(run: Path, file: str) -> list[str]:
    """`--initial` for a run whose export came from elsewhere, without its checkpoints; it begins anew in its place."""
    before = run.with_name(f"{run.name}-before")
    if (run / "export" / file).is_file() and not list((run / "checkpoints").glob("step-*")):
        shutil.rmtree(before, ignore_errors=True)
        run.rename(before)
    export = before / "export" / file
    return ["--initial", str(export)] if export.is_file() else []


def _pictures(options: WorldOptions) -> bool:
    shard = SHARD if options.number >= SHARD else max(1, options.number // 3)
    world = WorldSettings(0, options.number, options.identities, options.size, shard, True, "bmp")
    make_world(options.pictures, world, processes=options.processes)
    return True


def _latents(options: WorldOptions) -> bool:
    files = NetworkFiles(vae=options.export("autoencoder") / "vae.safetensors")
    precompute_shards(_shards(options), files, options.device, batch=64, engine=LocalEngine(_precomputing(options)))
    return True


def _faces(options: WorldOptions) -> bool:
    """Features of faces, and latents of the squares about them, for the methods that read them."""
    files = NetworkFiles(
        vae=options.export("autoencoder") / "vae.safetensors",
        backbone=options.kit / "world-recognition.safetensors",
        vision=options.kit / "world-vision.safetensors",
        image=options.kit / "world-vision.safetensors",
    )
    precompute_shards(
        _shards(options), files, options.device, options.size, batch=64, engine=LocalEngine(_precomputing(options))
    )
    return True


def _shards(options: WorldOptions) -> list[Path]:
    return Shards.under(options.pictures).paths


def _precomputing(options: WorldOptions) -> int:
    return max(1, options.processes - 2) if options.device == "cuda" else 1


def _checkpoint(options: WorldOptions) -> bool:
    """The base model as one file in the kit's folder, and the networks of faces beside it."""
    options.kit.mkdir(parents=True, exist_ok=True)
    vae, base = options.export("decoder") / "vae.safetensors", options.export("base") / "base.safetensors"
    release.write_checkpoint(vae, base, options.kit / CHECKPOINT)
    for name in ("recognition", "measuring", "vision", "detector", "attributes"):
        file = f"world-{name}.safetensors"
        # One of two steps finds nobody, and what comes after it could not be rehearsed.
        own = MODELS / "world" if options.tiny and name == "detector" else options.export(name)
        shutil.copyfile(own / file, options.kit / file)
    return True


def _kit(options: WorldOptions, runs: dict[str, str]) -> bool:
    """The adapters and their manifests beside the checkpoint, sample people, and the logs of all runs.

    runs: by method, the stage whose export is its adapter.
    """
    kit = options.kit
    own = {name: stored_file(kit / f"world-{name}.safetensors") for name in ("detector", "measuring", "attributes")}
    for method, run in runs.items():
        export, name = options.export(run), adapter_name(method)
        manifest = read_manifest(export / f"{name}{SUFFIX}")
        control = [manifest.control.name] if manifest.control is not None else []
        for file in (*manifest.adapter.values(), *control):
            shutil.copyfile(export / file, kit / file)
        manifest = dataclasses.replace(
            manifest,
            detector=own["detector"],
            measuring=own["measuring"],
            attributes=own["attributes"],
            sampling=SAMPLING,
        )
        write_manifest(kit / (ALONE if method == ADAPTED[0] else f"{name}{SUFFIX}"), manifest)
    release.write_photos(kit / "faces", 2 if options.tiny else SAMPLE_PEOPLE)
    shutil.copyfile(MODELS / "world" / SAMPLES, kit / SAMPLES)
    logs = kit / "logs"
    logs.mkdir(exist_ok=True)
    for name in _run_names():
        for source, suffix in (("losses.jsonl", "jsonl"), ("run.json", "json")):
            if (options.run(name) / source).is_file():
                shutil.copyfile(options.run(name) / source, logs / f"{name}.{suffix}")
    return True


def _sheet(options: WorldOptions) -> bool:
    """`portrait.py generate` with the kit, for each method."""
    from lib_portrait.request import parse_request
    from lib_portrait.standalone.generation import PortraitPipeline, Results, generate_samples

    steps = {"steps": 2} if options.tiny else {}
    for method in ADAPTED:
        with Results.begin(options.output / "sheets" / method) as results:
            pipeline = PortraitPipeline(options.kit / CHECKPOINT, [options.kit, MODELS], options.device, _say_notice)
            generate_samples(
                pipeline,
                results,
                steps,
                lambda identities, method=method: parse_request(  # type: ignore[misc]
                    {"identities": identities, "method": method, "checkpoint": adapter_name(method)}
                ),
            )
    return True


def _say_notice(notice: object) -> None:
    print(notice, flush=True)


# ------------------------------------------------------------------------------------------------------------- command


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="RUNS", help="folder for everything")
    parser.add_argument("--minutes", type=float, default=0.0, help="for all of it, over all starts; default: by steps")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="STAGE",
        help="repeatable; also a stage that is done, which then has these minutes more",
    )
    parser.add_argument("--without", action="append", default=[], metavar="STAGE", help="repeatable")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--together", type=int, help=f"stages at once; default 1, on a GPU {TOGETHER}")
    parser.add_argument("--processes", type=int, help="that draw pictures and cut out faces; default: a core each")
    parser.add_argument("--size", type=int, help="side of the pictures, default 256")
    parser.add_argument("--number", type=int, help="of pictures, default 30000")
    parser.add_argument("--identities", type=int, help="people that appear, default 6000")
    parser.add_argument("--crop", type=int, help="side of what the autoencoder learns from, default 128")
    for name, what in (("vae", "autoencoder"), ("unet", "UNet")):
        text = f"of the {what}'s levels, multiples of the first"
        parser.add_argument(f"--{name}-channels", type=int, nargs=4, metavar="N", help=text)
        parser.add_argument(f"--{name}-layers", type=int, metavar="N", help=f"residual blocks of the {what}'s levels")
    parser.add_argument("--heads", type=int, help="of the UNet's attention, default 1")
    parser.add_argument(
        "--factors",
        type=float,
        help="how much the conditioning network is to tell people's factors; "
        "default 300, and 0, identity alone, on a GPU, which has time for it",
    )
    parser.add_argument("--seed", type=int, help="default 0")
    parser.add_argument("--tiny", action="store_true", help="of everything as little as possible: a rehearsal")


def main(arguments: Sequence[str], evaluate: Evaluate) -> int:
    """`portrait.py train world` with these arguments; evaluate: see `stages_of`. 0 when all that was asked for is done.

    Raises PortraitError for options that make no sense, and what the stages raise.
    """
    parser = argparse.ArgumentParser(
        prog="portrait.py train world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configure(parser)
    chosen = parser.parse_args(arguments)
    options = options_of(chosen)
    stages = stages_of(options, evaluate)
    todo = stages.chosen(chosen.only, chosen.without)
    if chosen.minutes < 0:
        raise PortraitError("minutes", f"{chosen.minutes} was given", "Give a number above 0.")
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if chosen.only and options.together == 1:
        stages.check(todo)
        done = all(stages.one(name, _more(stages, name, chosen.minutes), _say) for name in todo)
    elif options.together > 1:
        done = stages.run_beside(
            todo, chosen.minutes, options.together, lambda name, minutes: _command(arguments, name, minutes), say=_say
        )
    else:
        done = stages.run(todo, chosen.minutes, _say)
    if done and "kit" in todo:
        _say(f"The kit: {options.kit}")
    return 0 if done else 1


def _more(stages: Stages, name: str, minutes: float) -> float:
    """The minutes of a stage that is asked for by name, over all its starts: of one that is done, so many more."""
    note = stages.note(name)
    if not minutes or (note.done and not note.seconds):
        return minutes
    return note.seconds / 60 + minutes if note.done else note.minutes or minutes


def _command(arguments: Sequence[str], name: str, minutes: float) -> list[str]:
    """What does one stage of this command in a process of its own, in this very environment."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import portrait; "
    code += "sys.exit(portrait.run(portrait.parse(sys.argv[1:])))"
    own = [*_without(arguments, ("--minutes", "--only", "--without", "--together")), "--together", "1"]
    return [sys.executable, "-c", code, "train", "world", *own, "--only", name, "--minutes", f"{minutes:.4f}"]


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line without these options and their one value each."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in names:
            next(words, None)
        elif word.partition("=")[0] not in names:
            kept.append(word)
    return kept


def options_of(chosen: argparse.Namespace) -> WorldOptions:
    """The options of a command line, defaults by the device. Raises PortraitError for a device that is not there."""
    there = torch.cuda.is_available()
    device = chosen.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        raise PortraitError("device", "there is no CUDA GPU here", "Leave --device away.")
    if device == "cpu" and there:
        raise PortraitError("device", "training takes the GPU that it finds", "Set CUDA_VISIBLE_DEVICES to nothing.")
    own = {one.name: getattr(chosen, one.name, None) for one in dataclasses.fields(WorldOptions)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in own.items() if v is not None}
    defaults: dict[str, Any] = {"device": device, "processes": os.cpu_count() or 1}
    if device == "cuda":
        defaults |= {"together": TOGETHER, "factors": 0.0}
    return WorldOptions(**{**defaults, **(TINY if chosen.tiny else {}), **given})


def _say(text: str) -> None:
    print(text, flush=True)
