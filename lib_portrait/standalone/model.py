"""A Stable Diffusion 1 checkpoint, one file with ldm's names, as diffusers' networks; and back into such a file.

Nothing is ever fetched: the description of the networks is the .yaml beside the file, or that of SD1, and the tokenizer
is CLIP's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import TextEncoder
from lib_portrait.checkpoints.text_encoder import (
    FORMER_SIZES,
    FORMER_TARGET,
    SD1_TEXT,
    TARGET,
    VOCABULARY,
    VOCABULARY_FILES,
    text_sizes,
)
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import all_finite, not_finite
from lib_portrait.standalone import layout

YAML_BYTES = 2**20

_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}
_REMEDY = "Use a single-file Stable Diffusion 1.x checkpoint (.safetensors or .ckpt)."
# Keys that only other models' files have, and what these are. The first that is found counts.
_OTHERS = {
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint",
    "double_blocks.": "a Flux checkpoint",
    "conditioner.embedders.1.": "an SDXL checkpoint",
    "conditioner.embedders.": "an SDXL refiner or SD 2 checkpoint",
    "cond_stage_model.model.": "an SD 2 checkpoint",
    "cond_stage_model.roberta.": "an AltDiffusion checkpoint",
    "lora_unet_": "a LoRA",
    "faceid_adapter.": "an adapter of Portrait",
    "control_model.": "a ControlNet",
    "down_blocks.": "a UNet in diffusers' layout",
}
_INPUTS = {9: "an inpainting checkpoint", 8: "an instruct-pix2pix checkpoint", 5: "a depth checkpoint"}


@dataclass
class Model:
    """A text-to-image model, ready to sample. The VAE stays in float32, where half precision could overflow.

    config: the .yaml's content. `vae.config.scaling_factor` is its scale_factor. number: its own, for caches of what
    was made with it.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    config: dict[str, Any]
    number: int = field(default_factory=itertools.count().__next__, init=False)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def size(self) -> int:
        """Side in pixels of the pictures the model was trained on."""
        return int(self._params["image_size"]) * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def schedule(self) -> dict[str, Any]:
        """The noise schedule, as arguments of diffusers' schedulers."""
        return {
            "num_train_timesteps": int(self._params["timesteps"]),
            "beta_start": float(self._params["linear_start"]),
            "beta_end": float(self._params["linear_end"]),
            "beta_schedule": "scaled_linear",
            "prediction_type": _PREDICTIONS[self._params.get("parameterization", "eps")],
        }

    @property
    def _params(self) -> dict[str, Any]:
        return self.config["model"]["params"]


def make_model(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel) -> Model:
    """A model of networks that were trained here; `save_model` writes it.

    The VAE's `scaling_factor` is the one the UNet was trained with. Raises PortraitError for networks that no SD1
    file can describe.
    """
    sizes = text_encoder.config.to_dict()
    text = text_sizes({name: sizes[name] for name in SD1_TEXT}, "text_encoder")
    config = layout.describe(unet.config, vae.config, text)
    return Model(unet, vae, text_encoder, load_tokenizer(), config)


def text_encoder_of(network: CLIPTextModel) -> TextEncoder:
    """A text encoder's sizes, as the manifests of kits have them."""
    return TextEncoder(**{name: getattr(network.config, name) for name in TextEncoder.__dataclass_fields__})


# ---------------------------------------------------------------------------------------------------------------- load


def load_model(checkpoint: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """The model in a single file with the .yaml beside it if there is one; of a .ckpt only tensors are read.

    dtype: of UNet and text encoder. Raises PortraitError: no such file (404), damaged, of another kind of model
    (SDXL, SD 2, inpainting, LoRA, ...), weights that are missing, not finite or do not fit the description, no
    tokenizer (500).
    """
    checkpoint = Path(checkpoint)
    tensors = read_tensors(checkpoint, inside="state_dict").tensors
    _check_kind(tensors, checkpoint.name)
    tensors |= _unnested_text(tensors)
    field = checkpoint.name
    config, text_config = _checked(_read_yaml(checkpoint.with_suffix(".yaml")), field)
    params = config["model"]["params"]
    unet_config = layout.unet_config(params["unet_config"]["params"], field)
    vae_config = layout.vae_config(params["first_stage_config"]["params"], float(params["scale_factor"]), field)
    tokenizer = load_tokenizer()
    # On "meta" nothing is allocated and no random weights are drawn.
    with torch.device("meta"):
        unet = UNet2DConditionModel(**unet_config, sample_size=params["image_size"])
        vae = AutoencoderKL(**vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    for network, key, kind in (
        (unet, _unet_key(unet.config), dtype),
        (vae, _vae_key(vae.config), torch.float32),
        (text_encoder, layout.text_key, dtype),
    ):
        _fill(network, tensors, key, torch.device(device), kind, field)
    return Model(unet, vae, text_encoder, tokenizer, config)


def load_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer. Raises PortraitError (500) when its files are not there."""
    missing = [name for name in VOCABULARY_FILES if not (VOCABULARY / name).is_file()]
    if missing:
        raise PortraitError(
            "tokenizer",
            f"{', '.join(missing)} cannot be read in {VOCABULARY}",
            "These files travel with this project: get them back with `git checkout models/text`, or copy those of any "
            "CLIP tokenizer there.",
            500,
        )
    return CLIPTokenizer.from_pretrained(str(VOCABULARY), local_files_only=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The description beside a checkpoint, or SD1's where there is none."""
    try:
        if path.stat().st_size > YAML_BYTES:
            raise PortraitError(
                path.name, "it is larger than any description of a model", f"Correct {path} or move it away."
            )
        config = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        return layout.SD1
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise PortraitError(path.name, f"it cannot be read ({reason})", f"Correct {path} or move it away.") from None
    if not isinstance(config, dict):
        raise PortraitError(path.name, "it describes no model", f"Correct {path} or move it away.")
    return config


def _checked(config: Mapping[str, Any], field: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A description of SD1's kind with what it leaves unsaid, and the configuration of the text encoder it asks for."""

    def part(holder: Any, name: str) -> dict[str, Any]:
        value = holder.get(name) if isinstance(holder, Mapping) else None
        if not isinstance(value, dict):
            raise PortraitError(field, f"its .yaml does not tell {name}", "Use the .yaml that belongs to the file.")
        return value

    model = part(config, "model")
    params = {**layout.SD1["model"]["params"], **part(model, "params")}
    text = part(params, "cond_stage_config")
    for section in ("unet_config", "first_stage_config"):
        part(part(params, section), "params")
    if model.get("target") != layout.DIFFUSION_TARGET or params.get("parameterization", "eps") not in _PREDICTIONS:
        kind = f"{model.get('target')}, {params.get('parameterization', 'eps')}"
        raise PortraitError(field, f"its .yaml describes another kind of model ({kind})", _REMEDY)
    numbers = [params[name] for name in ("scale_factor", "linear_start", "linear_end", "timesteps", "image_size")]
    if not all(isinstance(number, (int, float)) and 0 < number < 1e6 for number in numbers):
        raise PortraitError(field, f"its .yaml has unusable numbers ({numbers})", "Correct the .yaml or move it away.")
    options = text.get("params") or {}
    if text.get("target") == TARGET and isinstance(options, Mapping):
        text_config = text_sizes(options, field)
    elif text.get("target") == FORMER_TARGET and not options:
        text_config = FORMER_SIZES
    elif text.get("target") == layout.CLIP_TARGET and set(options) <= {"version"}:
        text_config = SD1_TEXT
    else:
        raise PortraitError(
            field, f"its .yaml asks for another text encoder ({text.get('target')}, {options})", _REMEDY
        )
    return {**config, "model": {**model, "params": params}}, text_config


def _check_kind(tensors: Mapping[str, Tensor], field: str) -> None:
    """Raises PortraitError unless the keys are those of a whole SD1 checkpoint."""
    entry = tensors.get(f"{layout.UNET}input_blocks.0.0.weight")
    what = next((what for start, what in _OTHERS.items() if any(key.startswith(start) for key in tensors)), None)
    if what is None and entry is not None and entry.ndim == 4 and entry.shape[1] != 4:
        what = _INPUTS.get(entry.shape[1], f"a checkpoint whose UNet takes {entry.shape[1]} channels")
    if what is not None:
        raise PortraitError(field, f"it is {what}", _REMEDY)
    parts = {"UNet": layout.UNET, "VAE": layout.VAE, "text encoder": layout.TEXT.removesuffix("text_model.")}
    missing = [name for name, start in parts.items() if not any(key.startswith(start) for key in tensors)]
    if len(missing) == len(parts):
        raise PortraitError(field, "it is no Stable Diffusion checkpoint", _REMEDY)
    if missing:
        raise PortraitError(field, f"it has no {' and no '.join(missing)}", "Use a file that holds the whole model.")


def _unnested_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Files of some mergers leave ``text_model.`` out of the text encoder's names; here it is put in."""
    short = layout.TEXT.removesuffix("text_model.")
    return {
        layout.TEXT + key[len(short) :]: tensor
        for key, tensor in tensors.items()
        if key.startswith(short) and not key.startswith(layout.TEXT)
    }


def _unet_key(config: Mapping[str, Any]) -> Callable[[str], str]:
    attended = tuple(kind.startswith("CrossAttn") for kind in config["up_block_types"])
    return lambda name: layout.unet_key(name, config["layers_per_block"], attended)


def _vae_key(config: Mapping[str, Any]) -> Callable[[str], str]:
    return lambda name: layout.vae_key(name, len(config["block_out_channels"]))


def _fill(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    key: Callable[[str], str],
    device: torch.device,
    dtype: torch.dtype,
    field: str,
) -> None:
    """Makes the tensors with the names `key` gives the weights of a network that was built on "meta"."""
    filled = {}
    for name, wanted in network.state_dict().items():
        tensor = tensors.get(key(name))
        if tensor is None:
            raise PortraitError(field, f"the tensor {key(name)} is missing", f"Get the file anew, or: {_REMEDY}")
        if tensor.ndim == 4 and wanted.ndim == 2:
            # ldm's VAE has 1x1 convolutions where diffusers has linear layers.
            tensor = tensor.flatten(1)
        if tensor.shape != wanted.shape:
            raise PortraitError(
                field,
                f"{key(name)} has the shape {tuple(tensor.shape)} instead of {tuple(wanted.shape)}",
                "If it is no plain SD 1.x model, put its .yaml beside it.",
            )
        narrowed = tensor.to(dtype)
        if not all_finite(narrowed):
            raise not_finite(field, f"{key(name)} in {dtype}" if all_finite(tensor) else key(name))
        filled[name] = narrowed.to(device)
    network.load_state_dict(filled, assign=True)
    for name, buffer in list(network.named_buffers()):
        if buffer.is_meta:
            # CLIP's position numbers, which are no weights.
            owner = network.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
    network.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------- save


def save_model(model: Model, path: Path) -> None:
    """Writes the model as one .safetensors with ldm's names and weights in float16, and its description beside it.

    The noise schedule stands there as in SD1's own files, in float32. Raises PortraitError when the disk is full (507).
    """
    path = Path(path)
    tensors = {}
    for network, key in (
        (model.unet, _unet_key(model.unet.config)),
        (model.vae, _vae_key(model.vae.config)),
        (model.text_encoder, layout.text_key),
    ):
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensors[key(name)] = tensor.detach().half()
    for name, tensor in tensors.items():
        if name.startswith(layout.VAE) and ".attn_1." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    positions = model.text_encoder.config.max_position_embeddings
    tensors[f"{layout.TEXT}embeddings.position_ids"] = torch.arange(positions)[None]
    tensors |= schedule_buffers(model.schedule)
    write_tensors(path, tensors)
    path.with_suffix(".yaml").write_text(yaml.safe_dump(model.config, sort_keys=False), "utf-8")


def schedule_buffers(schedule: Mapping[str, Any]) -> dict[str, Tensor]:
    """What ldm's `DDPM.register_schedule` keeps of a noise schedule (v_posterior 0): each (steps,) float32."""
    start, end = schedule["beta_start"] ** 0.5, schedule["beta_end"] ** 0.5
    betas = np.linspace(start, end, schedule["num_train_timesteps"], dtype=np.float64) ** 2
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    variance = betas * (1 - before) / (1 - kept)
    buffers = {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - kept),
        "log_one_minus_alphas_cumprod": np.log(1 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / kept),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / kept - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - kept),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
    }
    return {name: torch.from_numpy(values).float() for name, values in buffers.items()}
