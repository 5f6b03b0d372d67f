"""Alignment of a face to the ArcFace template."""

from __future__ import annotations

import cv2
import numpy as np

# Eyes, nose, corners of the mouth (left to right as seen) in a 112-pixel crop: insightface, utils/face_align.py.
TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]],
    dtype=np.float32,
)
CROP_SIZE = 224


def template(size: int = CROP_SIZE) -> np.ndarray:
    """The five landmarks of an aligned face in a crop of `size` pixels, (5, 2) float32, x before y."""
    return TEMPLATE_112 * (size / 112)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that take `source` (N, 2) nearest to `target` (N, 2), as a (2, 3) matrix.

    Least squares, as in Umeyama 1991 (eq. 40 ff.). With points as complex numbers a plane similarity is w = a z + b,
    so the answer is that of a linear regression. Raises ValueError when all source points coincide.
    """
    z = source.astype(np.float64) @ (1, 1j)
    w = target.astype(np.float64) @ (1, 1j)
    spread = z - z.mean()
    norm = np.vdot(spread, spread).real
    if not norm > 0:
        raise ValueError("the landmarks all coincide")
    a = np.vdot(spread, w) / norm
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def align_face(image: np.ndarray, landmarks: np.ndarray, size: int = CROP_SIZE, filtered: bool = False) -> np.ndarray:
    """The face turned, scaled and shifted onto the template, (size, size, 3) uint8; black beyond the picture's edge.

    image: (H, W, 3) uint8. landmarks: (5, 2) in its pixels: left eye, right eye, nose, left and right mouth corner.
    The same as insightface's `face_align.norm_crop`, which skips pixels of a face larger than the crop; `filtered`
    averages over them. Raises ValueError when all landmarks coincide.
    """
    matrix = similarity(landmarks, template(size))
    scale = float(np.hypot(*matrix[:, 0]))
    if filtered and scale < 1:
        image, matrix = _shrunk(image, matrix, scale)
    return cv2.warpAffine(image, matrix, (size, size), borderValue=0.0)


def _shrunk(image: np.ndarray, matrix: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The picture at about `scale` of its size, each pixel a mean of the old ones, and the `matrix` (2, 3) for it."""
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    grown = np.array([width / size[0], height / size[1]])
    # Whole numbers are the middles of pixels, in both pictures.
    shift = (grown - 1) / 2
    moved = np.column_stack([matrix[:, :2] * grown, matrix[:, 2] + matrix[:, :2] @ shift])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), moved


def fit_aligned(image: np.ndarray, size: int = CROP_SIZE) -> np.ndarray:
    """A picture that already is an aligned crop, brought to (size, size, 3). Raises ValueError when it is not square.

    A side may be up to a tenth longer than the other; the middle is used then.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    if max(height, width) > 1.1 * side:
        raise ValueError(f"it is {width}x{height} pixels")
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square)
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
