"""A small face detector that gives a heat map: what each cell of a picture says of a face in its middle.

Kits bring one for their kind of pictures: of drawn people, detectors made for photographs miss every seventh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import DETECTORS, SCRFD_FILE, Detector, Face, get_detector
from lib_portrait.faces.trunk import GRID, SIDE, STRIDE, Trunk, filled, read_network, save_network, view

KIND = "detector"
# Score, box and landmarks of a cell; lengths are told in units of this many pixels of the 128.
CHANNELS, UNIT = 1 + 4 + 10, 32.0
SCORE = 0.5
# Of two faces whose middles are nearer than this share of their widths, one is the other.
NEAREST = 0.5


class DetectorNetwork(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] to what each 8 x 8 cell says of a face in its middle: (B, 15, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.hidden = nn.Conv2d(self.trunk.width, self.trunk.width, 3, 1, 1)
        self.out = nn.Conv2d(self.trunk.width, CHANNELS, 1)
        # Most cells hold no face: without this the first steps are spent on learning that.
        with torch.no_grad():
            cast(Tensor, self.out.bias)[0] = -4.0

    def forward(self, pictures: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(self.trunk(pictures))))

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        save_network(self, path, KIND, facts)

    @staticmethod
    def load(path: Path) -> DetectorNetwork:
        """Raises PortraitError for a file that holds something else."""
        tensors, _ = read_network(path, KIND)
        return filled(DetectorNetwork(), tensors, path, KIND)


def centres() -> Tensor:
    """The middles of the cells in pixels, x before y: (2, 16, 16)."""
    middle = (torch.arange(GRID) + 0.5) * STRIDE
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"))


def faces_in(cells: Tensor, score: float = SCORE) -> list[Face]:
    """The faces that one picture's cells (15, 16, 16) tell of, in pixels of the 128, the surest first."""
    scores = cells[0].sigmoid()
    # A face lights up several cells: the brightest of each neighbourhood tells.
    peaks = (scores >= F.max_pool2d(scores[None], 3, 1, 1)[0]) & (scores >= score)
    points = (centres().repeat(CHANNELS // 2, 1, 1) + cells[1:] * UNIT)[:, peaks].T.reshape(-1, CHANNELS // 2, 2)
    faces: list[Face] = []
    for confidence, place in sorted(zip(scores[peaks].tolist(), points.numpy()), key=lambda one: -one[0]):
        face = Face(place[:2].reshape(4).astype(np.float32), place[2:].astype(np.float32), confidence)
        apart = (
            np.linalg.norm((face.box - other.box).reshape(2, 2).mean(axis=0))
            > NEAREST * min(face.box[2] - face.box[0], other.box[2] - other.box[0])
            for other in faces
        )
        if all(apart):
            faces.append(face)
    return faces


def heatmap_detector(path: Path, device: torch.device | str = "cpu") -> Detector:
    """The detector in a file that `DetectorNetwork.save` wrote. Raises PortraitError for a file that holds something
    else."""
    network = DetectorNetwork.load(path).to(device)

    def find(image: NDArray[np.uint8]) -> list[Face]:
        with torch.no_grad():
            cells = network(view(image)[None].to(device))[0].cpu()
        scale = np.array(image.shape[1::-1], np.float32) / SIDE
        return [
            Face((face.box.reshape(2, 2) * scale).reshape(4), face.landmarks * scale, face.score)
            for face in faces_in(cells)
        ]

    return Detector("heatmap", file_sha256(path)[:16], find)


def open_detector(choice: str, models: Sequence[Path], device: torch.device | str = "cpu") -> Detector:
    """A detector by its name, mtcnn or insightface, or by the path of its file: insightface's or one of these.

    Raises PortraitError when it cannot be had.
    """
    if choice in DETECTORS:
        return get_detector(choice, models)
    if not Path(choice).is_file():
        raise PortraitError(
            "detector", f"there is no file {choice}", f"Give one of {', '.join(DETECTORS)} or a detector's file."
        )
    if Path(choice).name == SCRFD_FILE:
        return get_detector("insightface", [Path(choice).parent])
    return heatmap_detector(Path(choice), device)
