"""`portrait.py bench step`: what a step with people costs beside a bare one, by any of the methods.

An SD1.5-size ldm `UNetModel` (random weights, 64x64 latents, batch of one negative and one positive row) runs bare and
with 1, 2, 4 and 8 people. Bare and injected runs are taken in turns in one process, so that whatever else the machine
does falls on both; the ratio is the median over the pairs. Attention runs as in the WebUI's default optimisation
(PyTorch's scaled dot product), which makes the bare step as fast as it gets. "kept" is what the rule holds from step to
step, in MiB.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lib_portrait.attention import NEGATIVE, POSITIVE, Injection, mark
from lib_portrait.methods.declarations import declarations

WIDTH = 768


def sd15_unet() -> nn.Module:
    """The UNet of configs/stable-diffusion/v1-inference.yaml with random weights. Needs stable-diffusion-sdkit."""
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    def scaled_dot_product_forward(
        self: Any, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            project.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    CrossAttention.forward = scaled_dot_product_forward
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        attention_resolutions=[4, 2, 1],
        num_res_blocks=2,
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=1,
        context_dim=WIDTH,
        use_checkpoint=False,
        legacy=False,
    )
    return unet.eval().requires_grad_(False)


def held() -> int:
    """Bytes of all tensors that there are."""
    gc.collect()
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors()}
    return sum(storages.values())


def _tensors() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and not one.is_meta]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="portrait.py bench step", description=__doc__)
    methods = [one.name for one in declarations() if one.has_adapter]
    parser.add_argument("--method", choices=methods, default=methods[0], help=f"default {methods[0]}")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs for each number of people (at least 5)")
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of people")
    parser.add_argument("--latent", type=int, default=64, help="height and width of the latent")
    options = parser.parse_args(argv)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")

    torch.manual_seed(0)
    bare = sd15_unet()
    # The same weights in a second network, so that one can stay injected while the other stays untouched.
    with torch.device("meta"):
        twin = sd15_unet()
    twin.load_state_dict(bare.state_dict(), assign=True)
    x = torch.randn(2, 4, options.latent, options.latent)
    t = torch.tensor([500, 500])
    text = torch.randn(2, 77, WIDTH)
    marked = torch.cat([mark(text[:1], NEGATIVE), mark(text[1:], POSITIVE)])
    with torch.no_grad():
        bare(x, t, text)
        method = importlib.import_module(f"benchmarks.methods.{options.method}")
        for facts, make in method.rules(twin, options.ids, options.latent):
            before = held()
            with Injection(twin, make()):
                twin(x, t, marked)
                kept = held() - before
                pairs = []
                for _ in range(options.pairs):
                    pairs.append((seconds(lambda: bare(x, t, text)), seconds(lambda: twin(x, t, marked))))
            line = {
                "name": "step",
                "method": options.method,
                **facts,
                "ratio": round(statistics.median(injected / alone for alone, injected in pairs), 4),
                "kept": round(kept / 2**20, 1),
                "pairs": [[round(alone, 4), round(injected, 4)] for alone, injected in pairs],
            }
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
