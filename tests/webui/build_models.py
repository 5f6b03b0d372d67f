"""Run with the WebUI's own Python: writes small random checkpoints in the layouts that the WebUI loads.

    build_models.py FOLDER WEBUI

FOLDER gets text/ (tokenizer and a small text model's config), first.safetensors, second.safetensors (SD1 layout, other
weights), vpred.safetensors and inpaint.safetensors (the first one's, of a model that predicts v, and of one that
inpaints), sdxl.safetensors (SDXL layout), each with its .yaml beside it, and control.safetensors (a control network for
the SD1 layout). Nothing is downloaded; the tokenizer is made of open_clip's list of byte pairs.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

CHANNELS = 32
CONTEXT = 64
HEADS = 8
TEXT = {
    "vocab_size": 49408,
    "hidden_size": CONTEXT,
    "intermediate_size": 2 * CONTEXT,
    "projection_dim": CONTEXT,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "torch_dtype": "float32",
}


def byte_characters() -> list[str]:
    """The printable stand-ins of the 256 bytes in CLIP's vocabulary, in its order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    missing = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(missing)]


def write_text_model(folder: Path) -> None:
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SystemExit("the WebUI's Python has no open_clip")
    packed = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    pairs = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = pairs[1 : 49152 - 256 - 2 + 1]
    characters = byte_characters()
    words = characters + [c + "</w>" for c in characters] + ["".join(merge.split()) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]

    def token(text: str) -> dict:
        return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": "<|endoftext|>"}
    tokenizer = {
        "unk_token": {**end, "__type": "AddedToken"},
        "bos_token": {**start, "__type": "AddedToken"},
        "eos_token": {**end, "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "errors": "replace",
        "do_lower_case": True,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "vocab.json": json.dumps({word: i for i, word in enumerate(words)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(tokenizer),
        "config.json": json.dumps(TEXT),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    folder, webui = Path(sys.argv[1]), Path(sys.argv[2])
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    warnings.filterwarnings("ignore")
    for repository in ("stable-diffusion-stability-ai", "generative-models"):
        sys.path.insert(0, str(webui / "repositories" / repository))

    import torch
    from omegaconf import OmegaConf
    from pytorch_lightning.utilities import rank_zero
    from safetensors.torch import save_file

    # As modules/initialize_util.py does: ldm asks for the name that older releases had.
    sys.modules.setdefault("pytorch_lightning.utilities.distributed", rank_zero)
    from ldm.util import instantiate_from_config
    from transformers import CLIPTextConfig, CLIPTextModel

    # There are no weights to load: the text model comes from its config alone, as when the WebUI loads a checkpoint.
    CLIPTextModel.from_pretrained = classmethod(
        lambda cls, version, *args, **kwargs: CLIPTextModel(CLIPTextConfig.from_pretrained(version))
    )
    # Initial values are all replaced below.
    for initialise in ("xavier_uniform_", "kaiming_uniform_", "normal_", "uniform_", "trunc_normal_"):
        setattr(torch.nn.init, initialise, lambda tensor, *args, **kwargs: tensor)
        if hasattr(torch.nn.init, "_no_grad_" + initialise):
            setattr(torch.nn.init, "_no_grad_" + initialise, lambda tensor, *args, **kwargs: tensor)

    text = folder / "text"
    write_text_model(text)

    def random(state: dict, seed: int, keep: tuple[str, ...] = ()) -> dict:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, tensor in state.items():
            fixed = "." not in name or name.endswith("position_ids") or name.startswith(keep)
            if fixed or not tensor.is_floating_point():
                made[name] = tensor.clone()
            elif tensor.dim() == 1 and name.endswith(".weight"):
                made[name] = torch.ones_like(tensor)
            elif name.endswith("bias"):
                made[name] = torch.randn(tensor.shape, generator=generator) * 0.01
            elif "embedding" in name:
                made[name] = torch.randn(tensor.shape, generator=generator) * 0.3
            else:
                made[name] = torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        return {name: tensor.contiguous() for name, tensor in made.items()}

    sd1 = OmegaConf.load(webui / "configs" / "v1-inference.yaml")
    params = sd1.model.params
    params.unet_config.params.model_channels = CHANNELS
    params.unet_config.params.num_heads = HEADS
    params.unet_config.params.context_dim = CONTEXT
    params.unet_config.params.use_checkpoint = False
    params.first_stage_config.params.ddconfig.ch = 32
    params.cond_stage_config.params = {"version": str(text)}
    params.use_ema = False
    state = instantiate_from_config(sd1.model).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
    shared = ("betas", "alphas", "sqrt", "log_one", "posterior", "lvlb")
    for seed, name in enumerate(("first", "second")):
        save_file(random(state, seed, shared), folder / f"{name}.safetensors", metadata={"format": "pt"})
        OmegaConf.save(sd1, folder / f"{name}.yaml")
    first = random(state, 0, shared)
    entry = "model.diffusion_model.input_blocks.0.0.weight"
    inpaint = OmegaConf.merge(sd1, OmegaConf.load(webui / "configs" / "v1-inpainting-inference.yaml"))
    inpaint.model.params.merge_with({**sd1.model.params, "conditioning_key": "hybrid"})
    inpaint.model.params.unet_config.params.in_channels = 9
    more = torch.randn(CHANNELS, 5, 3, 3, generator=torch.Generator().manual_seed(9)) * 81**-0.5
    wider = {**first, entry: torch.cat([first[entry], more], dim=1).contiguous()}
    save_file(wider, folder / "inpaint.safetensors", metadata={"format": "pt"})
    OmegaConf.save(inpaint, folder / "inpaint.yaml")
    save_file(first, folder / "vpred.safetensors", metadata={"format": "pt"})
    OmegaConf.save(OmegaConf.merge(sd1, {"model": {"params": {"parameterization": "v"}}}), folder / "vpred.yaml")

    unet = {
        name[len("model.diffusion_model.") :]: tensor
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(random(control_shapes(unet), 7), folder / "control.safetensors", metadata={"format": "pt"})

    sdxl = OmegaConf.load(webui / "repositories/generative-models/configs/inference/sd_xl_base.yaml")
    params = sdxl.model.params
    params.network_config.params.update(
        adm_in_channels=6 * 256,
        model_channels=CHANNELS,
        num_head_channels=8,
        transformer_depth=[1, 1, 2],
        context_dim=CONTEXT,
        use_checkpoint=False,
    )
    params.first_stage_config.params.ddconfig.ch = 32
    embedders = params.conditioner_config.params.emb_models
    embedders[0].params = {"version": str(text), "layer": "hidden", "layer_idx": 2}
    del embedders[1]
    from sgm.util import instantiate_from_config as instantiate_sgm

    state = instantiate_sgm(sdxl.model).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")}
    save_file(random(state, 3, ("denoiser.",)), folder / "sdxl.safetensors", metadata={"format": "pt"})
    OmegaConf.save(sdxl, folder / "sdxl.yaml")


def control_shapes(unet: dict) -> dict:
    """A control network's tensors for this UNet: encoder, middle, convolutions of the hint, zero convolutions.

    Shapes as in cldm/cldm.py of ControlNet; its zero convolutions are not zero here, so that it has an effect.
    """
    import torch

    parts = ("time_embed.", "input_blocks.", "middle_block.")
    made = {name: tensor for name, tensor in unet.items() if name.startswith(parts)}
    widths = [3, 16, 16, 32, 32, 96, 96, 256, CHANNELS]
    for i, (before, after) in enumerate(pairwise(widths)):
        made[f"input_hint_block.{2 * i}.weight"] = torch.zeros(after, before, 3, 3)
        made[f"input_hint_block.{2 * i}.bias"] = torch.zeros(after)
    outputs = [CHANNELS] * 4 + [2 * CHANNELS] * 3 + [4 * CHANNELS] * 5
    for i, width in enumerate(outputs):
        made[f"zero_convs.{i}.0.weight"] = torch.zeros(width, width, 1, 1)
        made[f"zero_convs.{i}.0.bias"] = torch.zeros(width)
    made["middle_block_out.0.weight"] = torch.zeros(4 * CHANNELS, 4 * CHANNELS, 1, 1)
    made["middle_block_out.0.bias"] = torch.zeros(4 * CHANNELS)
    return made


if __name__ == "__main__":
    main()
