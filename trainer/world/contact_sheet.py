"""Contact sheets: to see at a glance how alike people are, and whether the ground truth lies where it should."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from .people import world_person
from .render import Image, Picture, render
from .scenes import MOST_PEOPLE, sample_scene

COLOURS = ((255, 80, 80), (80, 220, 90), (90, 140, 255), (255, 210, 60))
GAP = 4


def overlay(picture: Picture) -> Image:
    """The picture with its ground truth on it: masks tinted, boxes, landmarks, identity numbers."""
    image = picture.image.copy()
    for colour, face in zip(COLOURS, picture.faces):
        image[face.mask] = (image[face.mask] * 0.65 + np.array(colour) * 0.35).astype(np.uint8)
        x0, y0, x1, y1 = np.round(face.box).astype(int).tolist()
        cv2.rectangle(image, (x0, y0), (x1, y1), colour, 1)
        for x, y in face.landmarks.tolist():
            cv2.circle(image, (int(x), int(y)), max(len(image) // 128, 1), (255, 255, 255), -1)
        cv2.putText(image, str(face.id), (x0, max(y0 - 2, 8)), cv2.FONT_HERSHEY_PLAIN, 0.7, colour, 1, cv2.LINE_AA)
    return image


def contact_sheet(
    identities: int, situations: int, seed: int = 0, size: int = 256, groups: int = 1, truth: bool = False
) -> NDArray[np.uint8]:
    """A sheet (H, W, 3) uint8 RGB: a row an identity, a column a situation, then `groups` rows of 2 to 4 people.

    Row r shows world_person(seed + r); `truth` draws masks, boxes, landmarks and numbers on every picture.
    """
    rows = []
    for row in range(identities):
        person = [world_person(seed + row)]
        rows.append([render(sample_scene((seed + row) * 1000 + k, person), size) for k in range(situations)])
    for row in range(groups):
        scenes = [sample_scene(row * 1000 + k + seed, count=2 + k % (MOST_PEOPLE - 1)) for k in range(situations)]
        rows.append([render(scene, size) for scene in scenes])
    step = size + GAP
    sheet = np.full((len(rows) * step + GAP, situations * step + GAP, 3), 255, np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * step + GAP, column * step + GAP
            sheet[top : top + size, left : left + size] = overlay(picture) if truth else picture.image
    return sheet
