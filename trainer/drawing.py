"""Pictures sampled from a network while it is trained, as a request has them: DDIM with classifier-free guidance.

`lib_portrait.standalone.sampling` samples from what is finished; here every row has its own last t, and what is asked
of the network belongs to a recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lib_portrait.standalone.sampling import Sampling
from trainer.diffusion import NoiseSchedule

# Of a request that does not say, and the steps of the pictures for TensorBoard.
GUIDANCE, STEPS = Sampling("").guidance, Sampling("").steps


def guided(uncond: Tensor, cond: Tensor, *, guidance: float = GUIDANCE) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): the prediction, from the unconditional and the conditional one."""
    return uncond + guidance * (cond - uncond)


@torch.no_grad()
def ddim_sample(
    noise: Tensor, last: Tensor, steps: int, schedule: NoiseSchedule, predict: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """x_t (B, 4, h, w) at t = `last` (B), from pure noise (B, 4, h, w) in so many steps of DDIM (arXiv 2010.02502).

    At t = 0 that is a picture. predict: what the UNet predicts (B, 4, h, w), given x_t and t (B).
    """
    x, first = noise, len(schedule.alphas_bar) - 1
    times = [first + (last - first) * step // steps for step in range(steps + 1)]
    for now, then in itertools.pairwise(times):
        predicted = predict(x, now)
        x = schedule(schedule.denoised(x, predicted, now), schedule.noise(x, predicted, now), then)
    return x
