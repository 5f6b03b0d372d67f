"""Main faces are counted before bystanders, and what is doubtful about a face is said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from lib_portrait.faces import order
from lib_portrait.faces.alignment import align_face, template
from lib_portrait.faces.detection import Face, get_detector
from tests.portraits import NAMES, portrait

SIZE = (1000, 400)


def blurred_by(sigma: float) -> np.ndarray:
    """Noise of full contrast without detail finer than that, (224, 224, 3) uint8."""
    noise = np.random.default_rng(0).random((224, 224, 3), dtype=np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), sigma), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


SHARP, SOFT = blurred_by(2), blurred_by(14)


def face_at(x: float, size: float, y: float = 10) -> Face:
    box = np.array([x, y, x + size, y + size], np.float32)
    return Face(box, (template(112) * (size / 112) + (x, y)).astype(np.float32), 0.99)


def counted(*faces: tuple[Face, np.ndarray]) -> list[tuple[int, str]]:
    return order.counted([face for face, _ in faces], [crop for _, crop in faces], SIZE)


def test_people_of_much_the_same_size_and_sharpness_are_counted_from_the_left():
    assert counted((face_at(0, 200), SHARP), (face_at(300, 100), SHARP), (face_at(500, 160), SHARP)) == [
        (0, ""),
        (1, ""),
        (2, ""),
    ]


def test_faces_far_smaller_come_last_from_the_left():
    small, main = (face_at(0, 60), SHARP), (face_at(300, 200), SHARP)
    assert counted(small, main, (face_at(600, 61), SHARP), (face_at(700, 180), SHARP)) == [
        (1, ""),
        (3, ""),
        (0, order.SMALL),
        (2, order.SMALL),
    ]


def test_faces_far_less_sharp_come_last():
    assert order.sharpness(SHARP) > 20 * order.sharpness(SOFT) > 0
    assert counted((face_at(0, 200), SOFT), (face_at(300, 150), SHARP)) == [(1, ""), (0, order.BLURRED)]


def test_a_photo_that_is_blurred_all_over_has_main_faces():
    assert counted((face_at(0, 200), SOFT), (face_at(300, 150), SOFT)) == [(0, ""), (1, "")]


def test_faces_with_eyes_or_mouth_outside_come_last_where_another_is_whole():
    cut = (face_at(-90, 200), SHARP)
    assert counted(cut, (face_at(300, 150), SHARP)) == [(1, ""), (0, order.CUT)]
    # Of a passer-by in the background nobody would say that the photo is of him.
    assert counted(cut, (face_at(300, 40), SHARP)) == [(0, ""), (1, order.SMALL)]
    assert counted(cut) == [(0, "")]


@pytest.mark.parametrize(
    ("face", "why", "turn", "said"),
    [
        (face_at(300, 200), "", 0, ()),
        (face_at(300, 200), order.BLURRED, 0, (order.BLURRED,)),
        (face_at(300, 59), "", 0, ("this face is only 59 pixels wide, likeness will be weak",)),
        (face_at(300, 60), "", 0, ()),
        (face_at(-90, 200), "", 0, (order.OUTSIDE,)),
        (face_at(-90, 200), order.CUT, 0, (order.CUT,)),
        (face_at(300, 250, y=210), "", 0, (order.OUTSIDE,)),
        (face_at(300, 200), "", 1, ("the photo was turned by 90° to the right",)),
        (face_at(300, 200), "", 2, ("the photo was turned by 180°",)),
        (face_at(300, 200), "", 3, ("the photo was turned by 90° to the left",)),
    ],
)
def test_what_is_said_of_a_face(face, why, turn, said):
    assert order.notices(face, why, turn, SIZE) == said


@pytest.mark.parametrize("name", NAMES)
def test_a_real_face_out_of_focus_is_told_from_a_sharp_one_of_whatever_size(name):
    """Blurred by a thirtieth of its width it is a bystander beside itself; shrunk to 60 pixels it is not."""
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    photo = cv2.imread(str(portrait(name)))[..., ::-1]
    (face,) = get_detector("mtcnn", []).find(np.ascontiguousarray(photo))
    crop = align_face(photo, face.landmarks)
    blurred = cv2.GaussianBlur(photo, (0, 0), order.width(face) / 30)
    scale = 60 / order.width(face)
    shrunk = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    sharp = order.sharpness(crop)
    assert order.sharpness(align_face(blurred, face.landmarks)) < order.SHARPNESS_SHARE * sharp
    assert order.sharpness(align_face(shrunk, face.landmarks * scale)) > 3 * order.SHARPNESS_SHARE * sharp
