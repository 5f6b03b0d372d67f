"""What of a reference is face: the masks of RB-Guidance (OmniPortrait, sec. 3.3: M^ref) and of L_loc (sec. 3.2: M).

Parsed by the network that the WebUI itself fetches for face restoration (facexlib's ParseNet, of PSFRGAN), whose file
is read as it is published; without it, the oval that a face's landmarks give.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_portrait.faces.alignment import oval_radius, portrait, portrait_matrix, similarity, warped
from lib_portrait.faces.weights import beside, fill, unfilled, unfit

# Eyes, nose, corners of the mouth in FFHQ's crop of 512 pixels: facexlib, utils/face_restoration_helper.py.
FFHQ_512 = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ],
    dtype=np.float32,
)
# Of CelebAMask-HQ's classes, in the network's order, the face's: skin, nose, glasses, eyes, brows, mouth, lips. The
# others are the background, ears, hair, hat, earring, necklace, neck and clothes.
COUNT = 19
FACE = (1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
# What lies beyond so many radii of the landmarks' oval belongs to somebody else in the picture.
REACH = 1.3
# Where the network calls less of the landmarks' oval a face, it did not see one: a drawing, a face half hidden.
LEAST = 0.2


class Convolution(nn.Module):
    """A 3x3 convolution of mirrored edges; `scale` halves ("down") or doubles ("up") height and width."""

    def __init__(self, width_in: int, width: int, scale: str = "", normed: bool = False, active: bool = False):
        super().__init__()
        self.scale, self.active = scale, active
        self.conv2d = nn.Conv2d(width_in, width, 3, 2 if scale == "down" else 1, bias=not normed)
        if normed:
            self.norm = nn.ModuleDict({"norm": nn.BatchNorm2d(width)})

    def forward(self, x: Tensor) -> Tensor:
        if self.scale == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.conv2d(functional.pad(x, (1, 1, 1, 1), mode="reflect"))
        if hasattr(self, "norm"):
            x = self.norm["norm"](x)
        return functional.leaky_relu(x, 0.2) if self.active else x


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, scale: str = ""):
        super().__init__()
        self.shortcut_func = Convolution(width_in, width, scale) if scale else nn.Identity()
        first, second = ("up", "") if scale == "up" else ("", scale)
        self.conv1 = Convolution(width_in, width, first, normed=True, active=True)
        self.conv2 = Convolution(width, width, second, normed=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_func(x) + self.conv2(self.conv1(x))


class ParseNet(nn.Module):
    """facexlib's ParseNet as it is published (512 pixels, 19 classes), with its parameter names.

    Its second output, the picture once more, is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        down, up = (64, 128, 256, 256, 256), (256, 256, 256, 128, 64)
        self.encoder = nn.Sequential(
            Convolution(3, 64), *(ResidualBlock(*pair, "down") for pair in itertools.pairwise(down))
        )
        self.body = nn.Sequential(*(ResidualBlock(256, 256) for _ in range(10)))
        self.decoder = nn.Sequential(*(ResidualBlock(*pair, "up") for pair in itertools.pairwise(up)))
        self.out_mask_conv = Convolution(64, COUNT)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 19, H, W) of pictures (B, 3, H, W) in [-1, 1]; H and W multiples of 16."""
        features = self.encoder(x)
        return self.out_mask_conv(self.decoder(features + self.body(features)))

    @torch.inference_mode()
    def face(self, crop: np.ndarray) -> np.ndarray:
        """Whether each pixel of a crop (S, S, 3) uint8, aligned to `FFHQ_512`, is of the face: (S, S) bool."""
        pixels = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
        classes = self(pixels).argmax(dim=1)[0].numpy()
        return np.isin(classes, FACE)


def parser_from_state_dict(tensors: Mapping[str, Tensor], field: str = "parser") -> ParseNet:
    """The network that a file's tensors hold, in evaluation mode. Raises PortraitError naming `field` and the tensor
    where they are of another."""
    named = beside(tensors, "out_mask_conv.conv2d.weight")
    if not named:
        raise unfit(field, "it is no ParseNet of facexlib: out_mask_conv.conv2d.weight is missing")
    with unfilled():
        network = ParseNet()
    fill(network, named, field)
    return network.float()


@dataclass(frozen=True)
class MaskedPortrait:
    """A reference and what of it is face.

    picture: the square about the face, (S, S, 3) uint8, see `alignment.portrait`. mask: (S, S) bool. parsed: whether a
    network said which pixels the face is. how: where the mask comes from, a clause for people.
    """

    picture: np.ndarray
    mask: np.ndarray
    parsed: bool
    how: str


def masked_portrait(image: np.ndarray, landmarks: np.ndarray, size: int, parser: ParseNet | None) -> MaskedPortrait:
    """The square about a face, and its mask.

    image: (H, W, 3) uint8. landmarks: (5, 2) in its pixels, as in `alignment.align_face`. The mask never is empty.
    Raises ValueError when all landmarks coincide.
    """
    picture, matrix = portrait(image, landmarks, size), portrait_matrix(landmarks, size)
    mask, parsed = _mask(image, landmarks, matrix, size, parser)
    if parsed:
        how = "the mask is the face parser's"
    elif parser is None:
        how = "the mask is the oval of the face's landmarks: there is no face parser (portrait.py download facexlib)"
    else:
        how = "the mask is the oval of the face's landmarks: the face parser saw no face there"
    return MaskedPortrait(picture, mask, parsed, how)


def face_mask(image: np.ndarray, landmarks: np.ndarray, parser: ParseNet | None) -> np.ndarray:
    """Where in a picture (H, W, 3) uint8 a face with these landmarks (5, 2) is, as in `masked_portrait`: (H, W)."""
    height, width = image.shape[:2]
    mask, _ = _mask(image, landmarks, np.eye(2, 3), max(height, width), parser)
    return mask[:height, :width]


def _mask(
    image: np.ndarray, landmarks: np.ndarray, matrix: np.ndarray, size: int, parser: ParseNet | None
) -> tuple[np.ndarray, bool]:
    """The mask on a square of `size` pixels that `matrix` (2, 3) takes the picture to; whether it is the parser's."""
    radius = oval_radius(landmarks @ matrix[:, :2].T + matrix[:, 2], size)
    oval = radius <= 1
    if parser is None:
        return oval, False
    to_crop = similarity(landmarks, FFHQ_512)
    face = parser.face(warped(image, to_crop, 512)).astype(np.float32)
    back = np.linalg.inv(np.vstack([to_crop, (0, 0, 1)]))
    # From the crop to the square: out of the one into the photo, and into the other.
    onto = (np.vstack([matrix, (0, 0, 1)]) @ back)[:2]
    mask = (warped(face, onto, size, cv2.BORDER_CONSTANT) >= 0.5) & (radius <= REACH)
    if (mask & oval).sum() < LEAST * oval.sum():
        return oval, False
    return mask, True
