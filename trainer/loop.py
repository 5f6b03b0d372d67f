"""The one training loop, on Hugging Face Accelerate: what is trained, on what and with which loss is a `Recipe`.

A run lives in a folder: `checkpoints/` to go on from, `export/` with the averaged weights in the form they are used in,
`losses.jsonl`, TensorBoard's events in `tensorboard/`, `run.json` with the settings. Started again with the same
settings it goes on where the last checkpoint stands, with the very losses an unbroken run would have had.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import default_collate as collate_tensors
from tqdm import tqdm

from lib_portrait.errors import PortraitError
from trainer.draws import Draws, ResumableSampler
from trainer.optimizers import optimizers_of

# Accelerate's names of what the forward pass computes in, and what frozen networks are kept in.
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPTIMIZERS = ("adamw", "muon")
# The share of a budget over which the rate falls.
FALLING = 0.5
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class Settings:
    """How a run goes. Times are in optimizer steps.

    batch: samples of one process at once; a step sees batch x accumulate x processes of them. optimizer: adamw, or
    muon for networks trained from scratch. rate: after `warmup` linear steps, falling to zero along a half cosine over
    the last `cooldown`. ema: decay of the averaged weights, 0 for none (networks with batch normalisation need that).
    clip: largest norm of the gradient. minutes: stop (and save) after so long, 0 for never. budget: minutes of training
    over all starts of the run, after which it is done as after its last step, the rate falling to zero over the second
    half of them in place of `cooldown`; 0 for as many as its steps take. compile: networks that can be are translated
    for the device first, which takes a minute or two.
    """

    output: Path
    steps: int
    batch: int
    accumulate: int = 1
    optimizer: str = "adamw"
    rate: float = 1e-4
    warmup: int = 200
    cooldown: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    precision: str = "no"
    checkpointing: bool = False
    compile: bool = False
    workers: int = 0
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 0
    keep: int = 2
    minutes: float = 0.0
    budget: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give a whole number of 1 or more.")
        for name in ("warmup", "cooldown", "weight_decay", "seed", "workers", "sample_every", "minutes", "budget"):
            if not getattr(self, name) >= 0:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give a number of 0 or more.")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise PortraitError(name, f"{getattr(self, name)} was given", "Give a number above 0.")
        if not 0 <= self.ema < 1:
            raise PortraitError("ema", f"{self.ema} was given", "Give a decay below 1, or 0 for none.")
        if self.optimizer not in OPTIMIZERS:
            raise PortraitError("optimizer", f"{self.optimizer!r} was given", f"Give one of: {', '.join(OPTIMIZERS)}.")
        if self.precision not in PRECISIONS:
            raise PortraitError("precision", f"{self.precision!r} was given", f"Give one of: {', '.join(PRECISIONS)}.")


class Samples(Protocol):
    """What a recipe trains on: sample number `index`, augmented by `seed`, as tensors to be stacked into a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        """Raises ValueError for a sample that cannot be used."""


class Recipe(nn.Module, ABC):
    """One method's training: its trained modules are children of it, its frozen ones are kept out of `children()`."""

    name: str

    @abstractmethod
    def samples(self) -> Samples: ...

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        """The losses of a batch; the one called "loss" is minimised. All randomness comes from `draws`."""

    @abstractmethod
    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """Writes the weights as they are used, `facts` among their metadata."""

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        """Called once before training: frozen modules go to `device` in `dtype`, checkpointing is switched on."""

    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Pictures (3, H, W) in [0, 1] for TensorBoard, by name."""
        return {}

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        """Parameter groups; weights of one dimension (norms, biases) do not decay.

        Those marked "orthogonal" are for Muon: all matrices but tables of vectors (tokens, classes), whose rows are
        learned one by one.
        """
        tables = {id(table) for table in self.tables()}
        weights = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in weights if p.ndim > 1 and id(p) not in tables]
        return [
            {"params": matrices, "weight_decay": settings.weight_decay, "orthogonal": settings.optimizer == "muon"},
            {"params": [p for p in weights if id(p) in tables], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def tables(self) -> list[Tensor]:
        """The weights that are a list of vectors rather than a matrix."""
        return [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]


class _Lenient(Dataset[dict[str, Tensor]]):
    """Samples, with the next good one in place of one that cannot be used; "unusable" is how many were passed over."""

    LONGEST_GAP = 100

    def __init__(self, samples: Samples):
        self.samples = samples

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        for passed in range(self.LONGEST_GAP):
            try:
                sample = self.samples[(index + passed) % len(self.samples), seed]
            except ValueError as error:
                last = error
                continue
            return {**sample, "unusable": torch.tensor(passed)}
        raise PortraitError(
            "data", f"{self.LONGEST_GAP} samples in a row cannot be used, the last because {last}", "Check the data."
        )


def seeded(build: Callable[[], Recipe], settings: Settings) -> Recipe:
    """A recipe whose random weights are those of the run's seed."""
    torch.manual_seed(settings.seed)
    return build()


def fast_on_gpu(network: nn.Module, device: torch.device) -> None:
    """Moves a network of convolutions to a GPU with its channels last, which tensor cores want; a CPU may be slower."""
    if device.type == "cuda":
        network.to(device).to(memory_format=torch.channels_last)


def rate_at(step: int, settings: Settings, seconds: float = 0.0) -> float:
    """Share of the full learning rate at a step counted from 0, so many seconds of training after the run's beginning.

    Under a budget how many steps there will be is not known beforehand, and the clock says how far the run is.
    """
    rising = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    left, cooldown = float(settings.steps - step), float(settings.cooldown)
    if settings.budget:
        left, cooldown = settings.budget * 60 - seconds, settings.budget * 60 * FALLING
    falling = 0.5 - 0.5 * math.cos(math.pi * min(1.0, max(left, 0.0) / cooldown)) if cooldown else 1.0
    return min(rising, falling)


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps, seconds of training, and whether it is done."""

    step: int
    seconds: float
    done: bool


def progress(settings: Settings) -> Progress:
    """How far the run in `settings.output` is, by its newest checkpoint."""
    found = _checkpoints(settings)
    if not found:
        return Progress(0, 0.0, False)
    step, seconds = _step_of_checkpoint(found[-1]), float(_logged(found[-1]).get("seconds", 0.0))
    return Progress(step, seconds, step >= settings.steps or 0 < settings.budget * 60 <= seconds)


def train(recipe: Recipe, settings: Settings) -> int:
    """Train until `settings.steps`, going on from the newest checkpoint of the run. Returns the step reached.

    Raises PortraitError when the folder holds a run with other settings, the device cannot compute in the precision
    asked for, or losses, gradients or weights are no longer finite numbers: these are neither saved nor exported.
    """
    accelerator = _accelerator(settings)
    if settings.budget and accelerator.num_processes > 1:
        raise PortraitError("budget", "the clocks of several processes differ", "Give --steps and --cooldown instead.")
    if settings.ema and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in recipe.modules()):
        raise PortraitError(
            "ema",
            f"{recipe.name} normalises by batch, and its running statistics do not fit averaged weights",
            "Add --ema 0.",
        )
    torch.manual_seed(settings.seed)
    recipe.prepare(accelerator.device, PRECISIONS[settings.precision], settings)
    data = _Lenient(recipe.samples())
    total = settings.batch * accelerator.num_processes
    # A launcher that starts fewer processes than it was asked for says nothing.
    accelerator.print(
        f"Samples a step: {total * settings.accumulate} ({accelerator.num_processes} processes x "
        f"{settings.accumulate} x {settings.batch})"
    )
    _claim(accelerator, settings, recipe, total, len(data.samples))

    made = optimizers_of(recipe.groups(settings), settings.rate)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
    trained, *optimizers = accelerator.prepare(recipe, *made)
    weights = [p for p in recipe.parameters() if p.requires_grad]
    ema = EMAModel(weights, decay=settings.ema, use_ema_warmup=True, power=0.75) if settings.ema else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    first, logged = _resume(accelerator, settings)
    before = float(logged.get("seconds", 0.0))
    if ema is not None:
        ema.to(accelerator.device)
    log = _Log(accelerator, settings, first, logged)
    watch = _Watch(accelerator, settings)

    sampler = ResumableSampler(
        len(data.samples),
        settings.batch,
        settings.seed,
        first * settings.accumulate,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = iter(
        DataLoader(
            data,
            batch_sampler=sampler,
            num_workers=settings.workers,
            worker_init_fn=_leave_signals_to_the_loop,
            collate_fn=collate_tensors,
            pin_memory=accelerator.device.type == "cuda",
        )
    )
    part = slice(accelerator.process_index * settings.batch, (accelerator.process_index + 1) * settings.batch)
    any_says = _agreement(accelerator)
    started = time.monotonic()
    step = first

    def seconds() -> float:
        return before + time.monotonic() - started

    with _stop_signals() as stopped:
        trained.train()
        while step < settings.steps and not 0 < settings.budget * 60 <= before:
            share = rate_at(step, settings, seconds())
            for optimizer, full in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = rate * share
            for micro in range(settings.accumulate):
                batch = next(loader)
                unusable = batch.pop("unusable")
                batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                draws = Draws(settings.seed, step, micro, total, part, accelerator.device)
                # For what draws on its own: dropout.
                torch.manual_seed((settings.seed * 1_000_003 + step * 101 + micro) * 64 + accelerator.process_index)
                with accelerator.accumulate(trained):
                    losses = trained(batch, draws)
                    loss = losses["loss"]
                    if not loss.requires_grad:
                        # All that conditions was dropped in this batch, and nothing in it depends on the weights; other
                        # processes wait for the gradient all the same.
                        loss = loss + 0 * sum(weight.sum() for weight in weights)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(weights, settings.clip)
                        losses["gradient"] = torch.as_tensor(norm)
                    watch.see(step + 1, losses)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad(set_to_none=True)
                log.add(losses, unusable)
            step += 1
            if ema is not None:
                ema.step(weights)
            log.step(step, settings.rate * share)
            done = 0 < settings.budget * 60 <= seconds()
            over = settings.minutes > 0 and time.monotonic() - started > settings.minutes * 60
            ends = any_says(over or done or bool(stopped))
            saved = step % settings.save_every == 0 or step == settings.steps or ends
            shown = settings.sample_every > 0 and step % settings.sample_every == 0
            if saved or shown or step % settings.log_every == 0:
                watch.refuse_unsound(step, recipe if saved else None)
            if (saved or shown) and accelerator.is_main_process:
                recipe.eval()
                with _averaged(ema, weights):
                    if shown:
                        log.pictures(step, recipe, Draws(settings.seed, 0, 0, 64, slice(0, 64), accelerator.device))
                    if saved:
                        export(recipe, settings, {"steps": str(step), "seed": str(settings.seed)})
                recipe.train()
            if saved:
                _save(accelerator, settings, step, {**log.since_last_line(), "seconds": seconds()})
            if ends:
                break
    if step == first and accelerator.is_main_process:
        # Nothing left to train: the weights are exported once more, as today's code writes them.
        with _averaged(ema, weights):
            recipe.eval()
            export(recipe, settings, {"steps": str(step), "seed": str(settings.seed)})
    log.close(step)
    accelerator.end_training()
    return step


def export(recipe: Recipe, settings: Settings, facts: Mapping[str, str]) -> None:
    """The recipe's export, in place of the last one only when it is whole.

    Raises PortraitError when a number in it is not finite; the last one then stays.
    """
    folder, part, old = (settings.output / name for name in ("export", "export.part", "export.old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    recipe.export(part, {"trainer": "portrait", "recipe": recipe.name, **facts})
    unsound = _unsound_tensors(part)
    if unsound:
        shutil.rmtree(part)
        raise PortraitError(
            "export",
            f"{len(unsound)} tensors hold infinities or NaN as they would be written, the first {unsound[0]}",
            f"Begin anew with a lower --rate than {settings.rate:g}, in another --output.",
        )
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _unsound_tensors(folder: Path) -> list[str]:
    """The tensors of a folder's files that hold a number that is not finite.

    They are read from the files: what was finite in training may be too large for the precision that is written.
    """
    unsound = []
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            unsound += [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    return unsound


def _accelerator(settings: Settings) -> Accelerator:
    """Raises PortraitError for a precision that the device does not have, and for a launch that cuts weights up."""
    unknown = PortraitError(
        "precision",
        f"{settings.precision} was given, which this device does not compute in",
        f"Give {'no' if settings.precision == 'bf16' else 'bf16 or no'}.",
    )
    # What it keeps of an earlier run in this process would forbid another precision.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            # Without this, processes that were started together on a machine without a GPU would not find each other.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=settings.precision,
            gradient_accumulation_steps=settings.accumulate,
            log_with="tensorboard",
            project_dir=str(settings.output / "tensorboard"),
        )
    except ValueError as error:
        # Which accelerators have which precision is Accelerate's to know; its other complaints are about other things.
        if "mixed precision" not in str(error):
            raise
        raise unknown from error
    if accelerator.distributed_type in SHARDED:
        raise PortraitError(
            "accelerate",
            f"{accelerator.distributed_type.value} cuts weights into pieces, which averaging and export do not know",
            "Launch with --multi_gpu: what is trained here fits a GPU whole.",
        )
    if settings.precision != "no" and not accelerator.native_amp:
        # On the CPU Accelerate leaves fp16 out without a word, and the frozen networks alone would be in it.
        raise unknown
    return accelerator


def _facts(settings: Settings, recipe: Recipe, total: int, samples: int) -> dict[str, Any]:
    """What a run must not change between two starts: all that decides its losses."""
    free = {"output", "steps", "cooldown", "minutes", "budget", "workers", "checkpointing", "compile", "precision"}
    free |= {"log_every", "save_every", "sample_every", "keep", "batch"}
    fixed = {k: v for k, v in dataclasses.asdict(settings).items() if k not in free}
    return {"recipe": recipe.name, "samples": samples, "batch_of_a_step": total * settings.accumulate, **fixed}


def _claim(accelerator: Accelerator, settings: Settings, recipe: Recipe, total: int, samples: int) -> None:
    """Notes the run's facts in its folder. Raises PortraitError, in every process, for a folder of another run."""
    settings.output.mkdir(parents=True, exist_ok=True)
    note, facts = settings.output / "run.json", _facts(settings, recipe, total, samples)
    if note.exists():
        there = json.loads(note.read_text())["fixed"]
        other = [f"{name} {there.get(name)} -> {value}" for name, value in facts.items() if there.get(name) != value]
        if other:
            raise PortraitError(
                "output",
                f"{settings.output} holds a run with other settings: {', '.join(other)}",
                "Give the settings it was begun with, or another --output.",
            )
    everything = {name: str(value) for name, value in dataclasses.asdict(settings).items() if name != "output"}
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write(note, json.dumps({"fixed": facts, "last_start": everything}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole text or, when the process is killed meanwhile, what was there before."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _checkpoints(settings: Settings) -> list[Path]:
    return sorted((settings.output / "checkpoints").glob("step-????????"))


def _resume(accelerator: Accelerator, settings: Settings) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint's step, and what was noted beside it, see `_logged`."""
    found = _checkpoints(settings)
    if not found:
        return 0, {}
    accelerator.load_state(str(found[-1]))
    return _step_of_checkpoint(found[-1]), _logged(found[-1])


def _logged(checkpoint: Path) -> dict[str, Any]:
    """What was added to the log since the last line before a checkpoint, and how many "seconds" were trained."""
    note = checkpoint / "log.json"
    # Checkpoints were once made at lines of the log alone, where nothing has been added since.
    return json.loads(note.read_text()) if note.exists() else {}


def _step_of_checkpoint(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _save(accelerator: Accelerator, settings: Settings, step: int, logged: Mapping[str, Any]) -> None:
    """A checkpoint that appears under its name only when it is whole; the oldest beyond `keep` go."""
    folder = settings.output / "checkpoints" / f"step-{step:08d}"
    part = folder.with_suffix(".part")
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "log.json").write_text(json.dumps(logged))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
        for old in _checkpoints(settings)[: -settings.keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _any(accelerator: Accelerator, mine: bool) -> bool:
    """Whether any process says so; all hear the same."""
    return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum") > 0)


def _agreement(accelerator: Accelerator) -> Callable[[bool], bool]:
    """As `_any`, but asked of the processes alone: a GPU that has steps in its queue is not waited for."""
    if accelerator.num_processes == 1:
        return bool
    group = cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo"))

    def any_says(mine: bool) -> bool:
        said = torch.tensor(int(mine))
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group)
        return bool(said)

    return any_says


def _leave_signals_to_the_loop(worker: int) -> None:
    """For processes that load data, to which a terminal's Ctrl-C goes as well: the step under way needs them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _averaged(ema: EMAModel | None, weights: list[nn.Parameter]) -> Iterator[None]:
    """The averaged weights in place of the trained ones."""
    if ema is None:
        yield
        return
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(weights)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is no longer empty once the process was asked to end (SIGTERM, SIGINT).

    The loop then ends the step under way and saves. A second SIGINT ends it at once.
    """
    caught: list[int] = []
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    for number in previous:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Watch:
    """Notes the first step whose loss or gradient was not finite, where they are: a GPU does not wait for it."""

    NEVER = 2**62

    def __init__(self, accelerator: Accelerator, settings: Settings):
        self.accelerator, self.settings = accelerator, settings
        self.first = torch.tensor(self.NEVER, device=accelerator.device)

    def see(self, step: int, losses: Mapping[str, Tensor]) -> None:
        # Gradients that float16 cannot hold are what its scaling of the loss is for: those steps are left out.
        names = ("loss",) if self.accelerator.scaler is not None else ("loss", "gradient")
        for name in names:
            if name in losses:
                finite = losses[name].detach().isfinite().to(self.first.device)
                self.first = torch.where(finite, self.first, self.first.clamp(max=step))

    def refuse_unsound(self, step: int, recipe: Recipe | None) -> None:
        """Raises PortraitError, in every process, when a step up to `step` was unsound, or a recipe's weights are."""
        first = int(self.accelerator.gather(self.first).min())
        if first < self.NEVER:
            self._refuse("loss", f"it, or its gradient, is not a finite number since step {first}")
        if recipe is not None:
            floats = [tensor for tensor in recipe.state_dict().values() if tensor.is_floating_point()]
            unsound = sum((~tensor.isfinite().all()).int() for tensor in floats)
            if _any(self.accelerator, bool(unsound)):
                self._refuse("weights", f"{int(unsound)} of {len(floats)} tensors are not finite after step {step}")

    def _refuse(self, field: str, problem: str) -> None:
        remedy = f"Begin anew with a lower --rate than {self.settings.rate:g}, in another --output"
        saved = _checkpoints(self.settings)
        if saved and self.settings.precision != "no":
            remedy += f", or go on from step {_step_of_checkpoint(saved[-1])} with --precision no"
        kept = f"; the state of step {_step_of_checkpoint(saved[-1])} and its export are kept" if saved else ""
        raise PortraitError(field, problem + kept, remedy + ".")


class _Log:
    """Means of the losses since the last line: into losses.jsonl, TensorBoard and the progress bar."""

    def __init__(self, accelerator: Accelerator, settings: Settings, first: int, logged: Mapping[str, Any]):
        """logged: of the checkpoint at step `first`, from `since_last_line`; nothing in a new run."""
        self.accelerator, self.settings = accelerator, settings
        self.file = settings.output / "losses.jsonl"
        sums: dict[str, float] = logged.get("sums", {})
        self.sums = {name: torch.tensor(value, device=accelerator.device) for name, value in sums.items()}
        self.count: int = logged.get("count", 0)
        # Samples passed over: by this process, and, when they were last counted, by all.
        self.unusable_in_all: int = logged.get("unusable", 0)
        self.unusable = self.unusable_in_all if accelerator.is_main_process else 0
        self.last = (time.monotonic(), first)
        self.bar = tqdm(
            initial=first, total=settings.steps, unit="step", disable=not accelerator.is_main_process, mininterval=5
        )
        accelerator.init_trackers("", init_kwargs={"tensorboard": {"purge_step": first + 1}})
        if accelerator.is_main_process and self.file.exists():
            # What a killed run logged after its last checkpoint is about to be logged again.
            lines = [line for line in self.file.read_text().splitlines() if _step_of(line) <= first]
            _write(self.file, "".join(line + "\n" for line in lines))

    def add(self, losses: Mapping[str, Tensor], unusable: Tensor) -> None:
        for name, value in losses.items():
            # Where they are: to fetch them would make a GPU wait at every step.
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.unusable += int(unusable.sum())
        self.count += 1

    def step(self, step: int, rate: float) -> None:
        self.bar.update()
        if step % self.settings.log_every:
            return
        # The gradient's norm comes once a step, the losses with every micro-batch.
        counts = {"gradient": self.count // self.settings.accumulate}
        values = {name: total / counts.get(name, self.count) for name, total in self._mean_sums().items()}
        self._count_unusable()
        now = time.monotonic()
        samples = (step - self.last[1]) * self.settings.batch * self.settings.accumulate
        values |= {
            "rate": rate,
            "unusable": float(self.unusable_in_all),
            "samples_per_second": samples * self.accelerator.num_processes / (now - self.last[0]),
        }
        self.last, self.sums, self.count = (now, step), {}, 0
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self.accelerator.log(values, step=step)

    def since_last_line(self) -> dict[str, Any]:
        """What a checkpoint needs to hold, so that the next line is that of an unbroken run; asked in all processes.

        sums: means over the processes. count: of micro-batches. unusable: samples passed over since the run began.
        """
        self._count_unusable()
        return {"sums": self._mean_sums(), "count": self.count, "unusable": self.unusable_in_all}

    def _mean_sums(self) -> dict[str, float]:
        device = self.accelerator.device
        return {name: float(self.accelerator.reduce(total.to(device), "mean")) for name, total in self.sums.items()}

    def _count_unusable(self) -> None:
        mine = torch.tensor(self.unusable, device=self.accelerator.device)
        self.unusable_in_all = int(self.accelerator.reduce(mine, "sum"))

    def pictures(self, step: int, recipe: Recipe, draws: Draws) -> None:
        with torch.no_grad():
            pictures = recipe.pictures(draws)
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        for name, picture in pictures.items():
            writer.add_image(name, picture.clamp(0, 1).cpu(), step)

    def close(self, step: int) -> None:
        self.bar.close()
        if not self.accelerator.is_main_process:
            return
        if self.unusable_in_all:
            print(f"{self.unusable_in_all} samples could not be used and were passed over.")
        print(f"Step {step} of {self.settings.steps}; weights in {self.settings.output / 'export'}")


def _step_of(line: str) -> float:
    """The step that a line of losses.jsonl is about; infinity for one that was not written to its end."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
