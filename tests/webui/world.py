"""The small random world of the WebUI tests: checkpoints, LoRAs, a control network, an adapter and its face networks.

Sizes are as small as the layouts allow; all weights are random, scaled so that a person in the picture shows clearly.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_portrait.faces.recognition import IR_18, Backbone
from tests.webui.build_models import CHANNELS, CONTEXT, HEADS

KIT = "tiny"
ID_TOKENS = 4
EMBEDDING_WIDTH = 64
BACKBONE_WIDTHS = (16, 16, 32, 64, 128)
VISION_WIDTH = 64
RANK = 4
# ldm's blocks with attention in the published order, as diffusers names them, and their channels.
BLOCKS = (
    *((f"down_blocks_{level}_attentions_{i}", CHANNELS * 2**level) for level in range(3) for i in range(2)),
    *((f"up_blocks_{level}_attentions_{i}", CHANNELS * 2 ** (3 - level)) for level in (1, 2, 3) for i in range(3)),
    ("mid_block_attentions_0", CHANNELS * 4),
)
LDM_PATHS = (
    *(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)),
    *(f"output_blocks.{i}.1" for i in range(3, 12)),
    "middle_block.1",
)


@dataclass(frozen=True)
class World:
    """Where the files are. models: a WebUI's models folder, filled."""

    models: Path
    channels: int = CHANNELS
    context: int = CONTEXT
    heads: int = HEADS

    def checkpoint(self, name: str) -> Path:
        return self.models / "Stable-diffusion" / f"{name}.safetensors"

    @property
    def kit(self) -> Path:
        return self.models / "Portrait"


def make_world(models: Path, webui: Path, python: Path) -> World:
    """Fills `models`. Raises CalledProcessError, with its output, if the WebUI's Python cannot make the checkpoints."""
    folder = models / "Stable-diffusion"
    folder.mkdir(parents=True)
    script = Path(__file__).with_name("build_models.py")
    made = subprocess.run(
        [str(python), str(script), str(folder), str(webui)], capture_output=True, text=True, check=False, timeout=300
    )
    if made.returncode:
        raise RuntimeError(f"{script.name} failed with the WebUI's Python:\n{made.stdout}\n{made.stderr}")
    (models / "ControlNet").mkdir()
    (folder / "control.safetensors").rename(models / "ControlNet" / "control.safetensors")
    for seed, name in enumerate(("soft", "hard")):
        (models / "Lora").mkdir(exist_ok=True)
        save_file(lora(seed), models / "Lora" / f"{name}.safetensors")
    world = World(models)
    world.kit.mkdir()
    make_kit(world.kit)
    return world


class _Random:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, gain: float = 1.0) -> Tensor:
        """Normal, with a deviation that keeps a linear layer's output as large as its input, times gain."""
        inside = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
        return torch.randn(shape, generator=self.generator) * (gain * inside**-0.5)


def lora(seed: int) -> dict[str, Tensor]:
    """A LoRA for the UNet's attention in the layout of kohya's trainer."""
    random = _Random(100 + seed)
    made = {}
    for block, channels in BLOCKS:
        for attention, context in (("attn1", channels), ("attn2", CONTEXT)):
            for part, inside in (("to_q", channels), ("to_k", context), ("to_v", context), ("to_out_0", channels)):
                name = f"lora_unet_{block}_transformer_blocks_0_{attention}_{part}"
                made[f"{name}.lora_down.weight"] = random(RANK, inside)
                made[f"{name}.lora_up.weight"] = random(channels, RANK)
                made[f"{name}.alpha"] = torch.tensor(float(RANK))
    return made


def make_kit(folder: Path) -> None:
    """An adapter for the SD1 checkpoints of this world, in the layout of the released files, with its face networks."""
    metadata = {"backbone": "tiny_backbone.safetensors", "vision": "tiny_vision.safetensors"}
    faceid = {f"faceid_proj.{name}": tensor for name, tensor in _embedding(_Random(1)).items()}
    faceid |= {f"faceid_adapter.{name}": tensor for name, tensor in _sites(_Random(2), router=False).items()}
    router = {f"faceid_adapter.{name}": tensor for name, tensor in _sites(_Random(3), router=True).items()}
    save_file(faceid, folder / f"uniportrait-faceid_{KIT}.safetensors", metadata=metadata)
    save_file(router, folder / f"uniportrait-router_{KIT}.safetensors")
    save_file(_backbone(_Random(4)), folder / metadata["backbone"])
    save_file(_vision(_Random(5)), folder / metadata["vision"])


def _embedding(random: _Random) -> dict[str, Tensor]:
    width = EMBEDDING_WIDTH
    made = {"latents": torch.randn(1, ID_TOKENS, width, generator=random.generator)}
    structure = sum(BACKBONE_WIDTHS[1:-1]) + VISION_WIDTH
    for name, inside in (("proj_id", BACKBONE_WIDTHS[-1]), ("proj_clip", structure)):
        made[f"{name}.0.weight"], made[f"{name}.0.bias"] = random(inside * 2, inside), torch.zeros(inside * 2)
        made[f"{name}.2.weight"], made[f"{name}.2.bias"] = random(width, inside * 2), torch.zeros(width)
    for layer in range(2):
        for part in range(2):
            name = f"layers.{layer}.{part}"
            for norm in ("norm1", "norm2"):
                made[f"{name}.{norm}.weight"], made[f"{name}.{norm}.bias"] = torch.ones(width), torch.zeros(width)
            # Sharp attention: averaged over all patches, random features of two faces would hardly differ.
            made[f"{name}.to_q.weight"] = random(width, width, gain=3)
            made[f"{name}.to_kv.weight"] = random(2 * width, width, gain=2)
            made[f"{name}.to_out.weight"] = random(width, width, gain=3)
        made[f"layers.{layer}.2.0.weight"], made[f"layers.{layer}.2.0.bias"] = torch.ones(width), torch.zeros(width)
        made[f"layers.{layer}.2.1.weight"] = random(4 * width, width)
        made[f"layers.{layer}.2.3.weight"] = random(width, 4 * width)
    made["proj_out.weight"], made["proj_out.bias"] = random(CONTEXT, width), torch.zeros(CONTEXT)
    made["norm_out.weight"], made["norm_out.bias"] = torch.ones(CONTEXT), torch.zeros(CONTEXT)
    return made


def _sites(random: _Random, router: bool) -> dict[str, Tensor]:
    """What one of the two adapter files holds for every site: LoRA, and W_k^id, W_v^id or the router at cross sites."""
    made = {}
    for number, (channels, cross) in enumerate((channels, cross) for _, channels in BLOCKS for cross in (False, True)):
        context = CONTEXT if cross else channels
        for part, inside in (("to_q", channels), ("to_k", context), ("to_v", context), ("to_out", channels)):
            made[f"{number}.{part}_lora.down.weight"] = random(RANK, inside, gain=0.5)
            made[f"{number}.{part}_lora.up.weight"] = random(channels, RANK, gain=0.5)
        if cross and router:
            made[f"{number}.to_q_router.0.weight"] = random(2 * channels, channels)
            made[f"{number}.to_q_router.0.bias"] = random(2 * channels, gain=0.1)
            made[f"{number}.to_q_router.2.weight"] = random(channels, 2 * channels)
            made[f"{number}.to_k_router.0.weight"] = random(2 * CONTEXT, CONTEXT)
            made[f"{number}.to_k_router.0.bias"] = random(2 * CONTEXT, gain=0.1)
            made[f"{number}.to_k_router.2.weight"] = random(channels, 2 * CONTEXT)
            made[f"{number}.aggr_router.weight"] = random(1, ID_TOKENS)
            made[f"{number}.aggr_router.bias"] = random(1, gain=0.1)
        elif cross:
            made[f"{number}.to_k_faceid.weight"] = random(channels, CONTEXT)
            made[f"{number}.to_v_faceid.weight"] = random(channels, CONTEXT, gain=2)
    return made


def _backbone(random: _Random) -> dict[str, Tensor]:
    state = Backbone(IR_18, BACKBONE_WIDTHS, embedding=64).state_dict()
    for name, tensor in state.items():
        if tensor.dim() >= 2:
            state[name] = random(*tensor.shape, gain=1.4)
        elif name.endswith("running_var"):
            state[name] = torch.ones_like(tensor)
    return state


def _vision(random: _Random) -> dict[str, Tensor]:
    """A CLIP vision tower in transformers' layout: three layers, of which the last is not used."""
    width, prefix = VISION_WIDTH, "vision_model."
    made = {
        "embeddings.class_embedding": random(width),
        "embeddings.patch_embedding.weight": random(width, 3, 14, 14, gain=3),
        "embeddings.position_embedding.weight": random(16 * 16 + 1, width),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(3):
        name = f"encoder.layers.{layer}"
        norms += [f"{name}.layer_norm1", f"{name}.layer_norm2"]
        for part, outside, inside in (
            *((f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", 2 * width, width),
            ("mlp.fc2", width, 2 * width),
        ):
            made[f"{name}.{part}.weight"], made[f"{name}.{part}.bias"] = random(outside, inside), torch.zeros(outside)
    for norm in norms:
        made[f"{norm}.weight"], made[f"{norm}.bias"] = torch.ones(width), torch.zeros(width)
    made = {prefix + name: tensor for name, tensor in made.items()}
    made["visual_projection.weight"] = random(width, width)
    return made
