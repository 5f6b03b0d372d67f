"""Where people are in a picture, and their poses: torchvision's Keypoint R-CNN, read from its published file.

keypointrcnn_resnet50_fpn_coco-fc266e95.pth, trained on COCO's 17 points, which here become OpenPose's 18.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d

from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.control_picture import POINTS
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import check_finite

# Of each of OpenPose's points, the one of COCO's 17 that it is; the neck (1), which COCO has not, is halfway between
# the shoulders.
FROM_COCO = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
NECK, SHOULDERS = 1, (5, 6)
# As Detectron, which trained the first of these networks, shows them: facebookresearch/Detectron, utils/vis.py,
# `vis_one_image`. The score of a point is the height of its heat map's peak, of no fixed range.
PERSON_SCORE, POINT_SCORE = 0.9, 2.0


@dataclass(frozen=True)
class Person:
    """Somebody in a picture. box (4): x0, y0, x1, y1 in pixels. pose (18, 2) in pixels, NaN for what is not seen."""

    box: tuple[float, float, float, float]
    pose: NDArray[np.float32]


def people_finder(path: Path, device: str = "cpu") -> Callable[[NDArray[np.uint8]], list[Person]]:
    """What finds the people in a picture (H, W, 3) uint8 RGB, the surest first, by the network in a file.

    Raises PortraitError for a file that holds something else.
    """
    tensors = read_tensors(path, "keypoints").tensors
    check_finite(tensors, path.name)
    network = keypoint_network()
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise PortraitError(
            "keypoints",
            f"{path.name} does not hold torchvision's Keypoint R-CNN",
            "Use keypointrcnn_resnet50_fpn_coco-fc266e95.pth, as torchvision publishes it.",
        ) from None
    network.requires_grad_(False).eval().to(device)

    def find(image: NDArray[np.uint8]) -> list[Person]:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            found = {name: value.cpu().numpy() for name, value in network([pixels])[0].items()}
        return [
            Person((float(x0), float(y0), float(x1), float(y1)), openpose(points[:, :2], heights))
            for (x0, y0, x1, y1), score, points, heights in zip(
                found["boxes"], found["scores"], found["keypoints"], found["keypoints_scores"]
            )
            if score >= PERSON_SCORE
        ]

    return find


def keypoint_network() -> nn.Module:
    """`torchvision.models.detection.keypointrcnn_resnet50_fpn` as it is with the weights COCO_V1, without them."""
    backbone = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    network = KeypointRCNN(_resnet_fpn_extractor(backbone, 0), num_classes=2, num_keypoints=17)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    return network


def openpose(points: NDArray[np.floating], scores: NDArray[np.floating]) -> NDArray[np.float32]:
    """COCO's points (17, 2) with their scores (17) as OpenPose's (18, 2) float32, NaN where the score is too low."""
    seen = np.where((scores >= POINT_SCORE)[:, None], points, np.nan)
    pose = seen[list(FROM_COCO)].astype(np.float32)
    pose[NECK] = seen[list(SHOULDERS)].mean(axis=0)
    assert len(pose) == POINTS
    return pose
