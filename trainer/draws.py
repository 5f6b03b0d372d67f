"""Randomness that depends on nothing but the seed, the step and a sample's place in the global batch.

So a run that was killed goes on as if it had not been, and two processes draw what one process would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

Draw = tuple[int, tuple[int, int, int]]


class Draws:
    """The random numbers of one training step, drawn for the global batch and cut to this process's part of it."""

    def __init__(self, seed: int, step: int, micro: int, total: int, part: slice, device: torch.device):
        """micro: number of the micro-batch under gradient accumulation. total: samples over all processes."""
        state = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]
        self._generator = torch.Generator().manual_seed(int(state))
        self.total, self.part, self.device = total, part, device

    def randn(self, *shape: int) -> Tensor:
        """(b, *shape) normal numbers, b being this process's samples."""
        return torch.randn(self.total, *shape, generator=self._generator)[self.part].to(self.device)

    def rand(self, *shape: int) -> Tensor:
        """(b, *shape) uniform numbers in [0, 1)."""
        return torch.rand(self.total, *shape, generator=self._generator)[self.part].to(self.device)

    def shared(self) -> float:
        """One uniform number in [0, 1) that all processes draw alike."""
        return float(torch.rand((), generator=self._generator))

    def randint(self, high: int, *shape: int) -> Tensor:
        """(b, *shape) whole numbers in [0, high)."""
        return torch.randint(high, (self.total, *shape), generator=self._generator)[self.part].to(self.device)


class ResumableSampler(Sampler[list[Draw]]):
    """Endless batches of (sample number, seed of its augmentation), from any step on.

    Epoch e visits the samples in the permutation that (seed, e) gives. A global batch is cut into equal parts, one a
    process: together the processes see what one process with the whole batch would.
    """

    def __init__(self, samples: int, batch: int, seed: int, first: int = 0, rank: int = 0, processes: int = 1):
        """batch: samples of one process. first: number of the micro-batch to begin with."""
        self.samples, self.batch, self.seed = samples, batch, seed
        self.first, self.rank, self.processes = first, rank, processes

    def __iter__(self) -> Iterator[list[Draw]]:
        number, epoch, order = self.first, -1, np.empty(0, np.int64)
        while True:
            start = (number * self.processes + self.rank) * self.batch
            drawn: list[Draw] = []
            for position in range(start, start + self.batch):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    order = np.random.default_rng([self.seed, epoch, 0x0DE]).permutation(self.samples)
                drawn.append((int(order[position % self.samples]), (self.seed, number, position)))
            yield drawn
            number += 1
