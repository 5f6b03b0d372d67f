"""The world's truth lies where its pixels are: masks, landmarks, marks of the skin, and what may change them."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

pytest.importorskip("skia", reason="skia-python needs the system's libEGL and libGL", exc_type=ImportError)

from trainer.world import Mole, Picture, Placement, Scene, Situation, WorldPerson, render, sample_scene, world_person
from trainer.world.light import Light
from trainer.world.person_renderer import PersonRenderer
from trainer.world.skin import FACE_SIDE, FACE_TOP, HEAD_LON, HEAD_Y

SIZE = 256
PEOPLE = [world_person(index) for index in range(60)]
HAIRY = [person for person in PEOPLE if person.hair_line < 0.5][:6]
PLAIN = replace(
    next(person for person in PEOPLE if not person.woman),
    hair_line=0.3,
    hair_length=0.1,
    hair_sweep=0.5,
    beard=0.0,
    moustache=0.0,
    freckles=0.0,
    moles=(),
)

FRONT = Light((0.0, 0.0, 1.0), 0.4, (1.0, 1.0, 1.0))


def portrait(person: WorldPerson, situation: Situation | None = None, size: int = SIZE) -> Picture:
    placement = Placement(person, situation or Situation(), x=0.5, y=0.45, size=0.3)
    return render(Scene((placement,), contrast=0.4), size)


def changed(one: Picture, other: Picture, by: int = 6) -> np.ndarray:
    """The pixels (H, W) bool in which two pictures differ by more than `by` of 255."""
    return np.abs(one.image.astype(int) - other.image.astype(int)).max(-1) > by


def near(points: np.ndarray, radius: float, size: int = SIZE) -> np.ndarray:
    """The pixels (H, W) bool within `radius` of one of the points (N, 2)."""
    y, x = np.mgrid[:size, :size] + 0.5
    return (np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1]) < radius).any(-1)


@pytest.mark.parametrize("yaw", [-40, 0, 35])
@pytest.mark.parametrize("person", HAIRY, ids=lambda person: str(person.number))
def test_the_mask_is_where_the_face_was_painted(person, yaw, monkeypatch):
    person = replace(person, beard=0.0)
    plain = portrait(person, Situation(yaw=yaw))
    tints = PersonRenderer._skin_tints

    def paint(renderer):
        # One cell in from the edge: colours run on to the next points of the lattice.
        face = (np.abs(HEAD_LON) < FACE_SIDE - 0.1) & (HEAD_Y > FACE_TOP + 0.1)
        return np.where(face, 1 - tints(renderer) * 0.5, tints(renderer))

    monkeypatch.setattr(PersonRenderer, "_skin_tints", paint)
    painted = changed(plain, portrait(person, Situation(yaw=yaw)), by=20)
    mask = plain.faces[0].mask
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool)
    # Skin shines through the thin hair of the hair line, which the mask counts as hair.
    assert (painted & ~wide).sum() < 0.05 * painted.sum()
    # Eyes, lips, brows and lines are drawn on the face and keep their colour.
    assert (mask & painted).sum() > 0.7 * mask.sum()


@pytest.mark.parametrize("seed", range(12))
def test_landmarks_and_masks_lie_in_their_boxes(seed):
    picture = render(sample_scene(seed), 128)
    for face in picture.faces:
        x0, y0, x1, y1 = face.box
        rows, columns = np.nonzero(face.mask)
        assert rows.size
        assert columns.min() >= x0 - 1.5 and columns.max() <= x1 + 1.5
        assert rows.min() >= y0 - 1.5 and rows.max() <= y1 + 1.5
        margin = 0.06 * (x1 - x0)
        inside = (face.landmarks > [x0 - margin, y0 - margin]) & (face.landmarks < [x1 + margin, y1 + margin])
        # A long head's chin may lie under the picture's edge, its landmarks with it.
        assert inside.all() or y1 >= 127 or x0 <= 1 or x1 >= 127


@pytest.mark.parametrize("roll", [-18, 0, 18])
@pytest.mark.parametrize("person", PEOPLE[:8], ids=lambda person: str(person.number))
def test_landmarks_of_a_frontal_face_are_ordered_and_in_the_mask(person, roll):
    person = replace(person, hair_length=0.1, hair_sweep=0.5)
    face = portrait(person, Situation(roll=roll)).faces[0]
    left, right, nose, mouth_left, mouth_right = face.landmarks
    assert left[0] < nose[0] < right[0] and mouth_left[0] < mouth_right[0]
    assert max(left[1], right[1]) < nose[1] < (mouth_left[1] + mouth_right[1]) / 2
    assert all(face.mask[int(y), int(x)] for x, y in face.landmarks)


@pytest.mark.parametrize("gaze", [(-0.5, 0.0), (0.0, 0.0), (0.5, 0.4)])
@pytest.mark.parametrize("yaw", [-20, 0, 20])
def test_eye_landmarks_are_the_drawn_irises(gaze, yaw):
    blue, brown = (
        replace(PLAIN, eye_hue=hue, eye_opening=0.9, eye_size=0.9, eye_spacing=0.6, nose_bridge=0.2)
        for hue in (0.85, 0.0)
    )
    situation = Situation(yaw=yaw, gaze=gaze, eyes_open=1.2)
    one, other = portrait(blue, situation, 512), portrait(brown, situation, 512)
    difference = changed(one, other, by=15)
    middle = (one.faces[0].landmarks[0, 0] + one.faces[0].landmarks[1, 0]) / 2
    rows, columns = np.nonzero(difference)
    for landmark, side in zip(one.faces[0].landmarks[:2], (columns < middle, columns > middle)):
        # Only the colour of the iris differs; lids cover its top and bottom, so only x is sharp.
        assert abs(np.median(columns[side]) + 0.5 - landmark[0]) < 3.5
        assert abs(rows[side].mean() + 0.5 - landmark[1]) < 9
        x, y = landmark.astype(int)
        assert one.image[y, x].max() < 70, "the pupil is black"


@pytest.mark.parametrize("yaw", [-35, -15, 0, 15, 35])
@pytest.mark.parametrize("place", [(-0.35, 0.42), (0.3, 0.45), (0.1, -0.25)])
def test_a_mole_is_drawn_where_the_surface_carries_it(place, yaw):
    marked = replace(PLAIN, moles=(Mole(*place, 0.035),))
    difference = changed(portrait(PLAIN, Situation(yaw=yaw)), portrait(marked, Situation(yaw=yaw)))
    rows, columns = np.nonzero(difference)
    assert rows.size > 3
    renderer = PersonRenderer(marked, Situation(yaw=yaw), (128.0, 0.45 * 256), 0.3 * 256, FRONT)
    expected = renderer.outline_of("moles")[:2, 0]
    assert np.hypot(columns.mean() + 0.5 - expected[0], rows.mean() + 0.5 - expected[1]) < 2
    assert not (difference & ~near(expected[None], 7)).any()


def test_a_mole_goes_out_of_sight_on_the_far_side():
    marked = replace(PLAIN, moles=(Mole(0.45, 0.62, 0.035),))
    counts = []
    for yaw in (-50, 58):
        situation = Situation(yaw=yaw)
        counts.append(changed(portrait(PLAIN, situation), portrait(marked, situation), by=0).sum())
    assert counts[0] > 5 and counts[1] == 0


def test_a_turned_head_is_no_shifted_head():
    """Under yaw the nose's tip, which stands out, moves further than the irises, which lie behind it."""
    moved = portrait(PLAIN, Situation(yaw=25)).faces[0].landmarks - portrait(PLAIN).faces[0].landmarks
    assert moved[2, 0] > moved[:2, 0].mean() + 3
    nodded = portrait(PLAIN, Situation(pitch=15)).faces[0].landmarks - portrait(PLAIN).faces[0].landmarks
    assert nodded[2, 1] > nodded[:2, 1].mean() + 1


def test_the_colour_of_the_eyes_changes_only_the_eyes():
    one = portrait(PLAIN)
    other = portrait(replace(PLAIN, eye_hue=1 - round(PLAIN.eye_hue)))
    difference = changed(one, other, by=0)
    assert difference.any()
    assert not (difference & ~near(one.faces[0].landmarks[:2], 14)).any()


@pytest.mark.parametrize("factor", ["mouth_width", "lip_upper", "lip_colour"])
def test_the_shape_of_the_mouth_leaves_the_upper_face_alone(factor):
    one, other = (portrait(replace(PLAIN, **{factor: value})) for value in (0.2, 0.8))
    difference = changed(one, other, by=0)
    nose = one.faces[0].landmarks[2, 1]
    assert difference[int(nose) :].any()
    assert not difference[: int(nose)].any()


def test_every_factor_shows():
    from trainer.world import FACTORS

    assert len(FACTORS) >= 24
    base = replace(
        PLAIN, hair_length=0.2, beard=0.8, beard_shape=0.5, moustache=0.6, bun=0.5, freckles=0.4, blush=0.5, age=0.5
    )
    for factor in FACTORS:
        # No two steps are compared across a hair style's threshold alone: the far ends differ in any case.
        one, other = (portrait(replace(base, **{factor: value}), Situation(yaw=20)) for value in (0.05, 0.95))
        assert changed(one, other, by=3).sum() > 12, factor


def test_people_in_front_hide_little_of_those_behind():
    visible = []
    for seed in range(25):
        scene = sample_scene(seed, count=4)
        faces = render(scene, 128).faces
        for index, face in enumerate(faces):
            alone = render(replace(scene, people=(scene.people[index],)), 128).faces[0]
            visible.append(face.mask.sum() / alone.mask.sum())
            for other in faces[:index]:
                low, high = np.maximum(face.box[:2], other.box[:2]), np.minimum(face.box[2:], other.box[2:])
                shared = np.prod(np.maximum(high - low, 0))
                areas = [np.prod(each.box[2:] - each.box[:2]) for each in (face, other)]
                assert shared < 0.2 * min(areas)
                assert not (face.mask & other.mask).any()
    assert np.mean(visible) > 0.95
    assert min(visible) > 0.4
