"""From a scene to a picture and its ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from lib_portrait.errors import PortraitError

from .backgrounds import draw_background
from .captions import Caption, caption
from .light import Light
from .person_renderer import PersonRenderer
from .raster import OVERSAMPLING, Raster
from .scenes import Scene

PICTURE_SIZES = (64, 1024)  # limits of a picture's side

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class FaceTruth:
    """The ground truth of one face of a picture of H × W pixels.

    id: the identity's number. box: (4,) float32 x0, y0, x1, y1 of the whole face, forehead to chin, cut at the
    picture's edge. landmarks: (5, 2) float32 irises, nose tip, mouth corners, each left before right as seen in the
    picture. mask: (H, W) bool, the face's visible pixels: not those under hair, hat or another person. pose: (18, 2)
    float32, see `PersonRenderer.pose`.
    Coordinates are continuous: pixel i covers [i, i + 1].
    """

    id: int
    box: NDArray[np.float32]
    landmarks: NDArray[np.float32]
    mask: NDArray[np.bool_]
    pose: NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """image: (H, W, 3) uint8 RGB. faces: in the order of `Scene.people`, which `attributes.faces` counts by too."""

    image: Image
    caption: str
    attributes: Caption
    faces: tuple[FaceTruth, ...]


def scene_light(scene: Scene) -> Light:
    azimuth, elevation = np.deg2rad(scene.light)
    direction = (
        float(np.sin(azimuth) * np.cos(elevation)),
        float(-np.sin(elevation)),
        float(np.cos(azimuth) * np.cos(elevation)),
    )
    return Light(direction, scene.contrast, scene.light_colour)


def person_renderers(scene: Scene, size: int) -> list[PersonRenderer]:
    """The people of a scene, measured for a picture of `size`, in drawing coordinates (`OVERSAMPLING` a pixel)."""
    side, light = size * OVERSAMPLING, scene_light(scene)
    return [
        PersonRenderer(
            placement.person,
            placement.situation,
            (placement.x * side, placement.y * side),
            placement.size * side,
            light,
        )
        for placement in scene.people
    ]


def render(scene: Scene, size: int) -> Picture:
    """Draw a scene as a square picture of `size` pixels a side, with its ground truth.

    The same scene and size give the same bytes in every process. Raises PortraitError for a size outside 64 to 1024.
    """
    if not PICTURE_SIZES[0] <= size <= PICTURE_SIZES[1]:
        raise PortraitError(
            "size", f"{size} pixels a side were asked for", f"Give {PICTURE_SIZES[0]} to {PICTURE_SIZES[1]}."
        )
    raster = Raster(size)
    # Drawn at half the resolution of the people: a little out of focus, and a quarter of the work.
    background = draw_background(scene.background, scene.seed, size)
    cv2.resize(background, raster.pixels.shape[:2], dst=raster.pixels, interpolation=cv2.INTER_LINEAR)
    renderers = person_renderers(scene, size)
    for index, renderer in enumerate(renderers):
        renderer.draw(raster, index + 1)
    image = cv2.cvtColor(cv2.resize(raster.pixels, (size, size), interpolation=cv2.INTER_AREA), cv2.COLOR_RGBA2RGB)
    rng = np.random.default_rng([scene.seed, 0xA9E])
    image = degrade(draw_style(image, scene.style, rng), scene, rng)
    faces = tuple(
        FaceTruth(
            id=placement.person.number,
            box=np.clip(renderer.box() / OVERSAMPLING, 0, size).astype(np.float32),
            landmarks=(renderer.landmarks() / OVERSAMPLING).astype(np.float32),
            mask=np.asarray(raster.label_pixels[:, :, 0] == index + 1),
            pose=(renderer.pose() / OVERSAMPLING).astype(np.float32),
        )
        for index, (placement, renderer) in enumerate(zip(scene.people, renderers))
    )
    words = caption(scene)
    return Picture(image, words.text, words, faces)


def _paper(rng: np.random.Generator, size: int, cell: int, depth: float) -> NDArray[np.float32]:
    """Uneven paper: factors (size, size, 1) around 1, smooth over `cell` pixels."""
    coarse = rng.standard_normal((max(size // cell, 2), max(size // cell, 2)), dtype=np.float32)
    return (1 + depth * cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC))[:, :, None]


def draw_style(image: Image, style: str, rng: np.random.Generator) -> Image:
    """The picture (H, W, 3) in an art style; edges and colours of the faces stay where they are."""
    size = len(image)
    unit = max(size // 128, 1)
    if style == "painting":
        smooth = cv2.medianBlur(image, 2 * unit + 1).astype(np.float32)
        grey = smooth.mean(2, keepdims=True)
        smooth = grey + (smooth - grey) * 1.25
        return np.clip(smooth * _paper(rng, size, 3 * unit, 0.05), 0, 255).astype(np.uint8)
    if style == "watercolour":
        smooth = cv2.bilateralFilter(image, 5, 40, 2.0 * unit).astype(np.float32)
        washed = 255 - (255 - smooth) * 0.86 * _paper(rng, size, 14 * unit, 0.07)
        return np.clip(washed * _paper(rng, size, unit, 0.02), 0, 255).astype(np.uint8)
    if style == "pencil drawing":
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        soft = cv2.GaussianBlur(grey, (0, 0), 2.2 * unit)
        lines = cv2.divide(grey, soft, scale=255).astype(np.float32)
        drawn = np.clip(lines * 1.3 - 76, 0, 255) * 0.45 + (grey.astype(np.float32) * 0.9 + 35) * 0.55
        drawn = drawn[:, :, None] * _paper(rng, size, unit, 0.03) * np.array([1.0, 0.985, 0.95], np.float32)
        return np.clip(drawn, 0, 255).astype(np.uint8)
    if style == "cartoon":
        smooth = cv2.bilateralFilter(image, 5, 50, 2.0 * unit)
        grey = cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY)
        edges = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((unit + 1, unit + 1), np.uint8)).astype(np.float32)
        ink = 1 - np.clip((edges - 26) / 60, 0, 0.8)[:, :, None]
        flat = np.round(smooth.astype(np.float32) / 24) * 24
        return np.clip((128 + (flat - 128) * 1.1 + 4) * ink, 0, 255).astype(np.uint8)
    return image


def degrade(image: Image, scene: Scene, rng: np.random.Generator) -> Image:
    """The picture degraded as old photographs are: blur, faded colours, grain."""
    size = len(image)
    if scene.blur > 0:
        image = cv2.GaussianBlur(image, (0, 0), scene.blur * size / 128)
    if scene.fade <= 0 and scene.noise <= 0:
        return image
    result = image.astype(np.float32)
    if scene.fade > 0:
        sepia = result @ np.array([0.30, 0.59, 0.11], np.float32)
        sepia = sepia[:, :, None] * np.array([1.05, 0.92, 0.74], np.float32)
        result = result + (sepia * 0.85 + 26 - result) * 0.8 * scene.fade
    if scene.noise > 0:
        result += rng.standard_normal((size, size, 1), dtype=np.float32) * (6 * scene.noise)
    return np.clip(result, 0, 255).astype(np.uint8)
