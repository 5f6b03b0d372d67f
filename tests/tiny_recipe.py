"""A training that takes no time: two small layers learn numbers drawn from a sample's own number."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.loop import Recipe, Settings, seeded, train


def settings(output: Path, **changes: Any) -> Settings:
    values = {"steps": 12, "batch": 4, "rate": 1e-2, "warmup": 2, "ema": 0.9, "log_every": 2, "save_every": 4}
    return Settings(**{"output": output, **values, **changes})


class Numbers:
    """Sample i: "x" (3) drawn from i, plus noise drawn from its augmentation's seed where there is to be any."""

    def __init__(self, number: int = 10, bad: frozenset[int] = frozenset(), noise: float = 0.1):
        self.number, self.bad, self.noise = number, bad, noise

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        if index in self.bad:
            raise ValueError(f"number {index} is bad")
        own, noise = np.random.default_rng(index), np.random.default_rng(seed)
        return {"x": torch.from_numpy(own.standard_normal(3) + self.noise * noise.standard_normal(3)).float()}


class Tiny(Recipe):
    """`each_call` gets the recipe at every forward pass."""

    name = "tiny"

    def __init__(
        self, data: Numbers | None = None, drawn: bool = True, each_call: Callable[[Tiny], None] | None = None
    ):
        super().__init__()
        self.data, self.drawn, self.each_call = data or Numbers(), drawn, each_call
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2 if drawn else 0.0), nn.Tanh(), nn.Linear(8, 1))
        self.calls = 0

    def samples(self) -> Numbers:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        self.calls += 1
        if self.each_call is not None:
            self.each_call(self)
        x = batch["x"]
        target = x.sum(dim=1, keepdim=True)
        if self.drawn:
            x, target = x + 0.1 * draws.randn(3), target + 0.1 * draws.rand()[:, None] * draws.shared()
        loss = (self.layers(x) - target).square().mean()
        return {"loss": loss, "size": x.norm()}

    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        return {"noise": draws.rand(3, 8, 8)[0]}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        tensors = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "tiny.safetensors", metadata=dict(facts))


def exit_statuses(
    output: Path, call: int, number: int, environments: Sequence[Mapping[str, str | None]], **changes: Any
) -> list[int | None]:
    """Trains in a process (and group) of its own for each of `environments`, what to change in it (None: to leave out).

    In forward pass `call` each sends signal `number` to itself and the processes that load its data; of several
    processes the second does. What they say is printed.
    """
    # Each is forked off one that has imported this file: importing it takes longer than all of the training.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    logs = [output.with_name(f"{output.name}-{rank}.log") for rank in range(len(environments))]
    started = [
        context.Process(
            target=_train,
            args=(output, call, number, dict(environment), changes, log, multiprocessing.get_start_method()),
        )
        for environment, log in zip(environments, logs, strict=True)
    ]
    for process in started:
        process.start()
    for process, log in zip(started, logs, strict=True):
        process.join(300)
        process.kill()
        process.join()
        print(log.read_text())
    return [process.exitcode for process in started]


def _train(
    output: Path,
    call: int,
    number: int,
    environment: dict[str, str | None],
    changes: dict[str, Any],
    log: Path,
    start_method: str,
) -> None:
    # Processes that load data are started as they are in a process that was not forked off.
    multiprocessing.set_start_method(start_method, force=True)
    os.setsid()
    with log.open("w") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

    def each_call(recipe: Tiny) -> None:
        if recipe.calls == call and os.environ.get("RANK", "1") == "1":
            os.killpg(0, number)

    chosen = settings(output, **changes)
    # Drop-out is each process's own, with which two would not train what one does.
    alone = "RANK" not in os.environ
    train(seeded(lambda: Tiny(drawn=alone, each_call=each_call), chosen), chosen)
