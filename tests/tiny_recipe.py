"""A training that takes no time: two small layers learn numbers drawn from a sample's own number.

`python -m tests.tiny_recipe OUTPUT CALL SIGNAL CHANGES` trains with those changes of the settings (JSON), and in that
forward pass sends that signal to itself and the processes that load its data; of several processes the second does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
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


def _sending(call: int, number: int) -> Callable[[Tiny], None]:
    def each_call(recipe: Tiny) -> None:
        if recipe.calls == call and os.environ.get("RANK", "1") == "1":
            os.killpg(0, number)

    return each_call


if __name__ == "__main__":
    output, call, number, changes = sys.argv[1:]
    chosen = settings(Path(output), **json.loads(changes))
    # Drop-out is each process's own, with which two would not train what one does.
    alone = "RANK" not in os.environ
    train(seeded(lambda: Tiny(drawn=alone, each_call=_sending(int(call), int(number))), chosen), chosen)
