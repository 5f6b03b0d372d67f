"""The IR face recognition network (ResNet with pre-activated basic blocks) in the layout of TFace and CurricularFace.

UniPortrait reads four of its activations, one after the last block of each stage: the first three carry the face's
structure, the last one its intrinsic identity (UniPortrait, sec. 3.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lib_portrait.faces.weights import beside, fill, unfilled, unfit

# Blocks in each of the four stages.
IR_18 = (2, 2, 2, 2)
IR_34 = (3, 4, 6, 3)
IR_50 = (3, 4, 14, 3)
IR_101 = (3, 13, 30, 3)

_BLOCK = re.compile(r"body\.(\d{1,4})\.(.+)")
_SE_OR_BOTTLENECK = re.compile(r"res_layer\.(se_block|[6-9])\..+")


class ResidualBlock(nn.Module):
    """BN, 3x3 convolution, BN, PReLU, strided 3x3 convolution, BN; beside it the input, subsampled or projected."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.shortcut_layer: nn.Module
        if width_in == width:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(width_in),
            nn.Conv2d(width_in, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class Backbone(nn.Module):
    """The network, with the official names of its parameters.

    blocks: how many in each stage. widths: channels of the input layer and of each stage. embedding: length of the
    identity embedding. image_size: side of the face it sees, 112 in all published files.
    """

    def __init__(
        self,
        blocks: Sequence[int] = IR_101,
        widths: Sequence[int] = (64, 64, 128, 256, 512),
        embedding: int = 512,
        image_size: int = 112,
    ):
        super().__init__()
        self.widths = tuple(widths)
        self.image_size = image_size
        self.embedding_width = embedding
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        body: list[nn.Module] = []
        ends = []
        for count, width_in, width in zip(blocks, widths[:-1], widths[1:], strict=True):
            body.append(ResidualBlock(width_in, width, stride=2))
            body.extend(ResidualBlock(width, width, stride=1) for _ in range(count - 1))
            ends.append(len(body) - 1)
        self.taps = tuple(ends)
        self.body = nn.Sequential(*body)
        grid = image_size // 2 ** len(blocks)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(widths[-1]),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(widths[-1] * grid**2, embedding),
            nn.BatchNorm1d(embedding, affine=False),
        )

    def forward(self, face: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Embedding (B, 512) and the four taps of faces (B, 3, 112, 112) in [-1, 1]."""
        taps = self.local(face)
        return self.output_layer(taps[-1]), taps

    def local(self, face: Tensor) -> list[Tensor]:
        """The four taps alone, of pictures of any size.

        Those of an IR-101 follow body blocks 2, 15, 45, 48: at 112 px (B, 64, 56, 56), (B, 128, 28, 28),
        (B, 256, 14, 14), (B, 512, 7, 7).
        """
        x = self.input_layer(face)
        taps = []
        for index, block in enumerate(self.body):
            x = block(x)
            if index in self.taps:
                taps.append(x)
        return taps


def backbone_from_state_dict(tensors: Mapping[str, Tensor], field: str = "backbone") -> Backbone:
    """The network that a file's tensors describe, in evaluation mode: depth, widths and sizes are read off them.

    A stage begins where a block projects its shortcut, that is where the width changes. Raises PortraitError naming
    `field` when the tensors are those of another network (the IR-SE and bottleneck kinds included).
    """
    named = beside(tensors, "input_layer.0.weight")
    found = [(int(match[1]), match[2]) for match in map(_BLOCK.fullmatch, named) if match]
    linear = named.get("output_layer.3.weight")
    if not found or linear is None or linear.ndim != 2:
        raise unfit(field, "it is not an IR face recognition network")
    if any(_SE_OR_BOTTLENECK.fullmatch(part) for _, part in found):
        raise unfit(field, "it is an IR network of the SE or bottleneck kind, which no adapter here was trained on")
    starts = sorted({0} | {index for index, part in found if part == "shortcut_layer.0.weight"})
    count = 1 + max(index for index, _ in found)
    if len(starts) != 4 or count > len(named):
        raise unfit(field, f"it has {len(starts)} stages instead of 4")
    blocks = [after - start for start, after in zip(starts, [*starts[1:], count], strict=True)]

    def width(name: str) -> int:
        tensor = named.get(name)
        if tensor is None or tensor.ndim != 4 or not tensor.shape[0]:
            raise unfit(field, f"the convolution {name} is missing or has another shape")
        return tensor.shape[0]

    widths = [width("input_layer.0.weight"), *(width(f"body.{start}.res_layer.1.weight") for start in starts)]
    grid = math.isqrt(linear.shape[1] // widths[-1])
    if not grid:
        raise unfit(field, f"output_layer.3.weight has the shape {tuple(linear.shape)}")
    with unfilled():
        backbone = Backbone(blocks, widths, embedding=linear.shape[0], image_size=grid * 2 ** len(blocks))
    fill(backbone, named, field)
    return backbone
