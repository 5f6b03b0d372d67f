"""ControlNets (arXiv 2302.05543) for diffusers: files in, files out, and what one sees beside the UNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.store import Store
from lib_portrait.conditioning import Conditioning
from lib_portrait.control_picture import with_circles
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import fill
from lib_portrait.standalone.model import Model

# As diffusers' `from_pretrained` wants a folder.
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Control:
    """A ControlNet where the model is, and the picture that it sees, (3, H, W) in [0, 1], of the size of what is drawn.

    weight: of what it adds. trained: whether it was trained with the adapter, and so is told of the people too.
    """

    network: ControlNetModel
    picture: Tensor
    weight: float = 1.0
    trained: bool = True

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> dict[str, Any]:
        """What the UNet gets beside its other arguments, for latents (B, 4, h, w), t () and contexts (B, n, D)."""
        hint = self.picture.to(x).expand(len(x), -1, -1, -1)
        down, middle = self.network(x, t, context, hint, conditioning_scale=self.weight, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


class KitControls:
    """The ControlNets that kits name, of which the last one is kept."""

    def __init__(self) -> None:
        self._kept: tuple[Path, ControlNetModel] | None = None

    def control(self, conditioning: Conditioning, store: Store, model: Model, pose: np.ndarray, field: str) -> Control:
        """The one of a request's kit, where the model is, with everybody's circles on the pose (H, W, 3) uint8.

        field: what errors are about. Raises PortraitError where the kit names none, or one that is not there.
        """
        kit = conditioning.kit
        file = kit.manifest.control if kit.manifest is not None else None
        if file is None:
            raise PortraitError(field, f"{kit.name} names no ControlNet that it is for", "Leave it out.")
        path = store.locate(file, kit.home)
        if path is None:
            raise PortraitError(field, f"{file.name} is not there", f"Put it beside the kit {kit.name}.", 404)
        if self._kept is None or self._kept[0] != path:
            network = load_control(path, model.unet)
            for parameter in network.parameters():
                parameter.data = parameter.data.to(model.device, model.unet.dtype)
            self._kept = path, network
        picture = torch.from_numpy(pose.copy()).permute(2, 0, 1).float().to(model.device) / 255
        return Control(self._kept[1], with_circles(picture, conditioning.rule().circles))


def load_control(path: Path, unet: UNet2DConditionModel) -> ControlNetModel:
    """The ControlNet for this UNet in a file with diffusers' names, on the CPU.

    Raises PortraitError: no such file, of another kind or for another kind of model.
    """
    tensors = read_tensors(path, "control").tensors
    made = ControlNetModel.from_unet(unet, load_weights_from_unet=False).float()
    fill(made, tensors, path.name)
    odd = sorted(set(tensors) - set(made.state_dict()))
    if odd:
        raise PortraitError(path.name, f"{odd[0]} has no place in a ControlNet for this model", "Use its own.")
    return made.float()


def save_control(network: ControlNetModel, folder: Path, name: str) -> Path:
    """Writes NAME.safetensors, fp16 with diffusers' names, which sd-webui-controlnet reads too, and beside it the
    folder NAME that diffusers' `from_pretrained` reads. Returns the file."""
    path = folder / f"{name}.safetensors"
    tensors = {key: tensor.detach().half().contiguous().cpu() for key, tensor in network.state_dict().items()}
    write_tensors(path, tensors)
    beside = folder / name
    beside.mkdir(exist_ok=True)
    (beside / CONFIG).write_text(network.to_json_string(), "utf-8")
    target = beside / WEIGHTS
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(path)
    except OSError:
        write_tensors(target, tensors)
    return path
