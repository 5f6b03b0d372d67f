"""Faces land on the ArcFace template."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_portrait.faces.alignment import PORTRAIT, align_face, fit_aligned, portrait, similarity, template

transforms = st.tuples(st.floats(0.25, 4), st.floats(-np.pi, np.pi), st.floats(-500, 500), st.floats(-500, 500))


def matrix(scale: float, angle: float, x: float, y: float) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, x], [s, c, y]])


def umeyama(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Umeyama 1991, eq. 40-42, by singular values, as scikit-image has it."""
    mean_s, mean_t = source.mean(0), target.mean(0)
    s, t = source - mean_s, target - mean_t
    u, d, v = np.linalg.svd(t.T @ s / len(s))
    signs = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = u @ np.diag(signs) @ v
    scale = (d * signs).sum() / s.var(axis=0).sum()
    return np.c_[scale * rotation, mean_t - scale * rotation @ mean_s]


@given(transforms)
def test_a_known_similarity_is_recovered(parameters):
    expected = matrix(*parameters)
    points = template().astype(np.float64)
    moved = points @ expected[:, :2].T + expected[:, 2]
    np.testing.assert_allclose(similarity(points, moved), expected, atol=1e-8)


@given(st.lists(st.tuples(st.floats(-1000, 1000), st.floats(-1000, 1000)), min_size=5, max_size=5, unique=True))
def test_any_landmarks_give_umeyamas_estimate(points):
    source = np.array(points)
    if np.ptp(source, axis=0).min() < 1e-3:
        return
    target = template().astype(np.float64)
    estimate, expected = similarity(source, target), umeyama(source, target)
    np.testing.assert_allclose(
        source @ estimate[:, :2].T + estimate[:, 2], source @ expected[:, :2].T + expected[:, 2], atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(0.4, 2.5), st.floats(-np.pi, np.pi), st.floats(-50, 50), st.floats(-50, 50))
def test_aligning_undoes_a_known_similarity(scale, angle, x, y):
    """A smooth crop is put into a picture turned, scaled and shifted; aligning that picture gives the crop back."""
    rows, columns = np.mgrid[:224, :224] / 224
    crop = np.stack([rows, columns, (rows + columns) / 2], -1)
    crop = (60 + 120 * crop).astype(np.uint8)
    placed = matrix(scale, angle, 0, 0)
    placed[:, 2] = np.array([400 + x, 400 + y]) - placed[:, :2] @ (112, 112)
    picture = cv2.warpAffine(crop, placed, (800, 800), borderValue=(0, 0, 0))
    landmarks = (template() @ placed[:, :2].T + placed[:, 2]).astype(np.float32)
    back = align_face(picture, landmarks)
    assert back.shape == (224, 224, 3)
    assert back.dtype == np.uint8
    assert np.abs(back[30:-30, 30:-30].astype(int) - crop[30:-30, 30:-30]).max() <= 4


def test_a_filtered_crop_lies_where_the_official_one_does():
    """On a picture without fine detail the two are the same: half a pixel of the crop would be five grey levels."""
    rows, columns = np.sin(np.mgrid[:1500, :1200] * 2 * np.pi / 300)
    smooth = (128 + 120 * np.stack([rows, columns, rows * columns], -1)).astype(np.uint8)
    landmarks = (template() * 4.3 + (90, 150)).astype(np.float32)
    official, filtered = align_face(smooth, landmarks), align_face(smooth, landmarks, filtered=True)
    inner = slice(5, -5), slice(5, -5)
    assert np.abs(official[inner].astype(int) - filtered[inner]).max() <= 3


def test_a_filtered_crop_of_a_large_face_does_not_alias():
    """Of stripes finer than the crop's pixels nothing is left; the official crop shows them as coarse ones."""
    fine = np.zeros((1400, 1400, 3), np.uint8)
    fine[:, ::2] = 255
    landmarks = (template() * 5.31 + (60, 60)).astype(np.float32)
    inner = slice(30, -30), slice(30, -30)
    assert align_face(fine, landmarks)[inner].std() > 60
    assert align_face(fine, landmarks, filtered=True)[inner].std() < 25


def test_filtering_leaves_faces_smaller_than_the_crop_as_they_are():
    picture = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    landmarks = (template() * 0.9 + (20, 20)).astype(np.float32)
    np.testing.assert_array_equal(align_face(picture, landmarks), align_face(picture, landmarks, filtered=True))


def test_what_lies_beyond_the_picture_is_black():
    white = np.full((224, 224, 3), 255, np.uint8)
    crop = align_face(white, template() + np.float32(100))
    assert crop[0, 0].tolist() == [255] * 3
    assert crop[-1, -1].tolist() == [0] * 3


def test_coinciding_landmarks_are_refused():
    with pytest.raises(ValueError, match="coincide"):
        align_face(np.zeros((50, 50, 3), np.uint8), np.full((5, 2), 7, np.float32))


def test_an_aligned_crop_is_used_as_it_is():
    crop = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit_aligned(crop), crop)


@pytest.mark.parametrize("shape", [(112, 112), (512, 512), (300, 320), (320, 300)])
def test_other_square_crops_are_resized(shape):
    assert fit_aligned(np.zeros((*shape, 3), np.uint8)).shape == (224, 224, 3)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_an_oblong_picture_is_no_aligned_crop(shape):
    with pytest.raises(ValueError, match=f"{shape[1]}x{shape[0]}"):
        fit_aligned(np.zeros((*shape, 3), np.uint8))


def ramps(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row of a picture."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


@pytest.mark.parametrize("angle", [0.0, 0.4])
@pytest.mark.parametrize(("width", "size"), [(40, 64), (120, 48)], ids=["enlarged", "shrunk"])
def test_the_square_about_a_face_is_centred_upright_and_of_the_faces_size(angle, width, size):
    """A face `width` pixels wide as the template counts, in the middle of a picture, turned by any angle."""
    placed = matrix(width / 112, angle, 0, 0)
    placed[:, 2] = np.array([125, 110]) - placed[:, :2] @ (56, 56)
    landmarks = (template(112) @ placed[:, :2].T + placed[:, 2]).astype(np.float32)
    square = portrait(ramps(220, 250), landmarks, size).astype(float)
    side = PORTRAIT * width
    places = (np.arange(size) + 0.5 - size / 2) * side / size
    inside = slice(2, -2)
    np.testing.assert_allclose(square[size // 2, inside, 0], np.clip(125 + places, 0, 249)[inside], atol=2)
    np.testing.assert_allclose(square[inside, size // 2, 1], np.clip(110 + places, 0, 219)[inside], atol=2)


def test_beyond_the_edge_the_square_goes_on_as_the_picture_ends():
    landmarks = template(112) * np.float32(0.5)
    square = portrait(ramps(60, 60) + 30, landmarks, 64)
    np.testing.assert_array_equal(square[0], square[5])
    assert square[0, 0].tolist() == [30, 30, 30]


def test_around_the_face_alone_all_is_grey():
    """The oval turns with the face; its landmarks are in it, the square's corners are not."""
    image = np.full((200, 200, 3), 255, np.uint8)
    for angle in (0.0, 0.6):
        placed = matrix(0.7, angle, 0, 0)
        placed[:, 2] = 100 - placed[:, :2] @ (56, 56)
        landmarks = (template(112) @ placed[:, :2].T + placed[:, 2]).astype(np.float32)
        square = portrait(image, landmarks, 112, face_only=True)[:, :, 0]
        assert square[0, 0] == square[-1, 0] == square[0, -1] == square[-1, -1] == 128
        found = (landmarks - 100) * 112 / (PORTRAIT * 0.7 * 112) + 55.5
        assert all(square[round(y), round(x)] == 255 for x, y in found)
        assert 0 < ((square > 128) & (square < 255)).mean() < 0.25, "its edge is soft"
        covered = (square > 128).mean()
        assert covered == pytest.approx(np.pi * 46 * 58 * 1.2**2 / (PORTRAIT * 112) ** 2, rel=0.05)
        middle = np.argwhere(square == 255)
        tilt = np.linalg.eigh(np.cov(middle.T))[1][:, -1]
        assert abs(np.arctan2(tilt[1], tilt[0]) % np.pi - (-angle) % np.pi) < 0.1
