"""The trunk of small networks that look at whole pictures, and the files that such networks are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import check_finite

Network = TypeVar("Network", bound=nn.Module)
SIDE = 128
WIDTHS = (24, 48, 80, 128)
STRIDE = 8
GRID = SIDE // STRIDE


class TrunkBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class Trunk(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] to maps (B, width, 16, 16) that see detail and surroundings."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        stem, quarter, eighth, sixteenth = widths
        self.width = sixteenth
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 5, 2, 2, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.quarter = TrunkBlock(stem, quarter, 2)
        self.eighth = nn.Sequential(TrunkBlock(quarter, eighth, 2), TrunkBlock(eighth, eighth, 1))
        self.sixteenth = nn.Sequential(TrunkBlock(eighth, sixteenth, 2), TrunkBlock(sixteenth, sixteenth, 1))
        self.lateral = nn.Conv2d(eighth, sixteenth, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        fine = self.eighth(self.quarter(self.stem(pictures)))
        return F.relu(self.lateral(fine) + F.interpolate(self.sixteenth(fine), scale_factor=2.0))


def view(image: NDArray[Any]) -> Tensor:
    """What the networks see of a picture (H, W, 3) uint8: (3, 128, 128) in [-1, 1]."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1
    if pixels.shape[1:] != (SIDE, SIDE):
        pixels = F.interpolate(pixels[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return pixels


def save_network(network: nn.Module, path: Path, kind: str, facts: Mapping[str, str], **settings: Any) -> None:
    """The network's tensors as fp16 safetensors; `kind` and `settings` among the metadata."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in network.state_dict().items()
    }
    write_tensors(path, tensors, {"network": kind, "settings": json.dumps(settings), **facts})


def read_network(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (float32) and settings of a file that `save_network` wrote. Raises PortraitError for any other file."""
    checkpoint = read_tensors(path)
    found = checkpoint.metadata.get("network")
    if found != kind:
        raise PortraitError(
            kind,
            f"{path.name} holds no {kind} network but {found or 'something else'}",
            f"Give the file of a {kind} network.",
        )
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in checkpoint.tensors.items()}
    return tensors, json.loads(checkpoint.metadata["settings"])


def filled(network: Network, tensors: Mapping[str, Tensor], path: Path, kind: str) -> Network:
    """The network with these tensors, to look at pictures with. Raises PortraitError where they do not fit."""
    check_finite(tensors, path.name)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise PortraitError(
            kind, f"{path.name} does not fit ({str(error)[:200]})", f"Train it again: portrait.py train {kind}."
        ) from None
    return network.eval().requires_grad_(False)
