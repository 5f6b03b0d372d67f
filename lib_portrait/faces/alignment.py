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


# The side of a portrait over the width of the ArcFace template: hair and chin are in it.
PORTRAIT = 1.75
# The face's oval on the template of 112 pixels: its centre, its half axes, and over what part of them its edge is soft.
_OVAL_CENTRE, _OVAL_AXES, _OVAL_EDGE = (56.0, 58.0), (46.0, 58.0), 0.2
_BLANK = 127.5


def portrait(image: np.ndarray, landmarks: np.ndarray, size: int, face_only: bool = False) -> np.ndarray:
    """The square about a face as it stands in the picture, not turned, without black corners: (size, size, 3) uint8.

    image: (H, W, 3) uint8. landmarks: (5, 2) in its pixels, as in `align_face`, which say where the square lies and
    how large it is: boxes differ from detector to detector. Beyond the picture's edge its outermost pixels go on.
    face_only: grey outside of the oval that the landmarks give, softly. Raises ValueError when all landmarks coincide.
    """
    matrix = portrait_matrix(landmarks, size)
    square = warped(image, matrix, size)
    if not face_only:
        return square
    radius = oval_radius(landmarks @ matrix[:, :2].T + matrix[:, 2], size)
    kept = np.clip((1 + _OVAL_EDGE - radius) / _OVAL_EDGE, 0, 1)[:, :, None]
    return np.rint(square * kept + _BLANK * (1 - kept)).astype(np.uint8)


def portrait_matrix(landmarks: np.ndarray, size: int) -> np.ndarray:
    """What takes points of a picture into the square that `portrait` cuts out of it: (2, 3), scale and shift alone."""
    to_template = similarity(landmarks, template(112))
    scale = float(np.hypot(*to_template[:, 0])) * size / (PORTRAIT * 112)
    # Whole numbers are the middles of pixels.
    centre = np.linalg.solve(to_template[:, :2], 56.0 - to_template[:, 2])
    return np.column_stack([np.eye(2) * scale, (size - 1) / 2 - scale * centre])


def oval_radius(landmarks: np.ndarray, size: int) -> np.ndarray:
    """How far the pixels of a square are from the middle of a face with these landmarks (5, 2): (size, size), 1 on the
    edge of its oval, from hairline to chin."""
    to_template = similarity(landmarks, template(112))
    places = np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1)
    on_template = places @ to_template[:, :2].T + to_template[:, 2]
    return np.linalg.norm((on_template - _OVAL_CENTRE) / _OVAL_AXES, axis=-1)


def warped(image: np.ndarray, matrix: np.ndarray, size: int, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """The picture (H, W) or (H, W, C) on a square of `size` pixels by `matrix` (2, 3), averaged where that shrinks it.

    border: of cv2, what is beyond its edge.
    """
    scale = float(np.hypot(*matrix[:, 0]))
    if scale < 1:
        image, matrix = _shrunk(image, matrix, scale)
    return cv2.warpAffine(image, matrix, (size, size), borderMode=border)
