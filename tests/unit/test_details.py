"""Fine detail: moles are found where a person has them, in pictures that show them, and not where nobody has one."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from trainer.evaluation.autoencoder import measure_autoencoder
from trainer.evaluation.details import (
    FOUND,
    KEPT,
    FaceDetails,
    MolesFound,
    Spot,
    contrast,
    contrast_kept,
    find_details,
    find_moles,
    freckles_told,
    posed,
    share_kept,
    spots_of,
    visible_moles,
)
from trainer.world import Mole, Scene, render, sample_scene, world_person
from trainer.world.raster import OVERSAMPLING
from trainer.world.render import person_renderers

SIZE = 256


def photograph(number: int) -> Scene:
    """A held-out person in their own scene, drawn as a clear photo."""
    scene = sample_scene(number, [world_person(10 * number + 9)])
    return replace(scene, style="photo", blur=0.0, noise=0.0, fade=0.0)


def with_moles(scene: Scene, *moles: Mole) -> Scene:
    (one,) = scene.people
    return replace(scene, people=(replace(one, person=replace(one.person, moles=moles)),))


@pytest.fixture(scope="module")
def shown():
    """Pictures of seven people, the same without moles, and the moles to be seen."""
    return [visible_moles(photograph(number), SIZE) for number in range(7)]


def test_the_contrast_is_that_of_a_disc_on_a_plain_ground() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
    image[np.hypot(x - 30, y - 34) < 3] = 100
    assert contrast(image, Spot(30, 34, 3, 3)) == pytest.approx(0.5)
    assert contrast(image, Spot(30, 20, 3, 3)) == 0
    assert contrast(image, Spot(28, 34, 3, 3)) < 0.45
    # Two pixels beside its place it is found where it may be looked for.
    assert contrast(image, Spot(28, 34, 3, 3), reach=2) == pytest.approx(0.5)
    assert contrast(image, Spot(2, 34, 3, 3)) == 0  # its ring is not in the picture
    assert contrast(255 - image, Spot(30, 34, 3, 3)) < 0


def test_where_a_dark_edge_passes_there_is_no_mole() -> None:
    image = np.full((64, 64, 3), 200, np.uint8)
    image[:32] = 60
    assert contrast(image, Spot(30, 32, 3, 3)) < FOUND


def test_moles_are_where_they_are_drawn(shown) -> None:
    spots = [spot for _, _, seen in shown for spot in seen]
    assert len(spots) >= 5
    for picture, bare, seen in shown:
        changed = np.abs(picture.astype(int) - bare).max(axis=2) > 12
        for spot in seen:
            assert changed[int(spot.y), int(spot.x)]
            assert spot.diameter >= 2.5


def test_a_mole_that_is_turned_away_or_under_hair_is_not_asked_for() -> None:
    def seen(mole: Mole, **situation: object) -> int:
        scene = with_moles(photograph(1), mole)
        (one,) = scene.people
        changed = replace(one.situation, **{"yaw": 0.0, "hat": None, "glasses": False, **situation})
        return len(visible_moles(replace(scene, people=(replace(one, situation=changed),)), SIZE)[2])

    cheek = Mole(0.4, 0.35, 0.04)
    assert [seen(cheek), seen(cheek, yaw=-50.0), seen(cheek, yaw=50.0)] == [1, 1, 0]
    assert seen(Mole(0.0, -0.75, 0.04)) == 0  # in the hair


def test_a_sharp_picture_keeps_moles_a_blurred_one_loses_them_and_one_without_has_none(shown) -> None:
    def kept(change) -> float:
        flags = [flag for picture, bare, seen in shown for flag in share_kept(picture, change(picture, bare), seen)]
        return sum(flags) / len(flags)

    assert kept(lambda picture, bare: picture) == 1
    assert kept(lambda picture, bare: cv2.GaussianBlur(picture, (0, 0), 0.5)) > 0.95
    assert kept(lambda picture, bare: cv2.GaussianBlur(picture, (0, 0), 2.5)) < 0.2
    assert kept(lambda picture, bare: bare) == 0
    assert KEPT == 0.5


def test_freckles_lose_contrast_with_sharpness() -> None:
    scene = photograph(0)
    one = scene.people[0]
    scene = replace(scene, people=(replace(one, person=replace(one.person, freckles=1.0)),))
    picture = render(scene, SIZE).image
    (renderer,) = person_renderers(scene, SIZE)
    freckles = spots_of(renderer, "freckles", 1 / OVERSAMPLING)
    assert len(freckles) > 10
    assert contrast_kept(picture, picture, freckles) == 1
    softer = contrast_kept(picture, cv2.GaussianBlur(picture, (0, 0), 1.5), freckles)
    assert softer is not None and softer < 0.6
    assert contrast_kept(picture, picture, []) is None


def test_the_head_is_turned_as_its_landmarks_say() -> None:
    scene = with_moles(photograph(0), Mole(0.0, -0.3, 0.03), Mole(0.25, 0.4, 0.03), Mole(-0.25, 0.4, 0.03))
    (truth,) = person_renderers(scene, SIZE)
    found = posed(scene.people[0].person, truth.landmarks())
    assert found.situation.yaw == pytest.approx(truth.situation.yaw, abs=8)
    assert found.situation.roll == pytest.approx(truth.situation.roll, abs=3)
    places = [np.array([[spot.x, spot.y] for spot in spots_of(one)]) for one in (found, truth)]
    # Within four of the picture's pixels, where moles are looked for.
    assert len(places[0]) == 3 and np.linalg.norm(places[0] - places[1], axis=1).max() < 4 * OVERSAMPLING


def test_moles_of_a_face_of_which_only_landmarks_are_known(shown) -> None:
    there = found = bare = false = missing = 0
    for number, (picture, without, _) in enumerate(shown):
        scene = photograph(number)
        landmarks = render(scene, SIZE).faces[0].landmarks
        person = scene.people[0].person
        own, none = find_moles(picture, landmarks, person), find_moles(without, landmarks, person)
        there, found = there + own.moles, found + own.found
        bare, false = bare + own.bare, false + own.false
        missing += none.found
        assert none.moles == own.moles
    assert there >= 6 and found / there > 0.7
    assert missing / there < 0.35 and false <= 0.35 * max(bare, 1)


def details_of(freckled: float, spoil=lambda picture: picture) -> list[FaceDetails]:
    """Of pictures of six people who have as many freckles, which are looked at after something was done to them."""
    found = []
    for number in range(6):
        scene = photograph(number)
        (one,) = scene.people
        scene = replace(scene, people=(replace(one, person=replace(one.person, freckles=freckled, skin_tone=0.3)),))
        picture = render(scene, SIZE)
        found.append(find_details(spoil(picture.image), picture.faces[0].landmarks, scene.people[0].person))
    return found


def test_freckles_are_told_from_none() -> None:
    with_freckles, without, few = details_of(1.0), details_of(0.0), details_of(0.08)
    assert [one.freckled for one in (with_freckles[0], without[0], few[0])] == [True, False, None]
    told = freckles_told([*with_freckles, *without, *few, None])
    assert told[6:] == [None] * 13
    assert np.mean(told[:6]) > 0.9
    # A blur takes them away.
    blurred = [details_of(share, lambda picture: cv2.GaussianBlur(picture, (0, 0), 4)) for share in (1.0, 0.0)]
    assert np.mean(freckles_told(blurred[0] + blurred[1])[:6]) < np.mean(told[:6]) - 0.1
    assert freckles_told(with_freckles) == [None] * 6  # nobody is without


def test_the_share_of_those_with_less_is_told_and_ties_count_half() -> None:
    def one(freckled: bool | None, speckle: float | None) -> FaceDetails:
        return FaceDetails(MolesFound(0, 0, 0, 0), freckled, speckle)

    row = [
        one(True, 0.2),
        one(True, 0.1),
        one(True, None),
        *(one(False, value) for value in (0.0, 0.1, 0.1, 0.3, None)),
    ]
    assert freckles_told(row)[:3] == [0.75, 0.5, None]


def test_moles_and_freckles_are_looked_for_in_one_pose(shown) -> None:
    scene = photograph(1)
    landmarks, person = render(scene, SIZE).faces[0].landmarks, scene.people[0].person
    assert find_details(shown[1][0], landmarks, person).moles == find_moles(shown[1][0], landmarks, person)


def test_what_an_autoencoder_keeps() -> None:
    whole, shown = measure_autoencoder(lambda image: image, SIZE, people=4)
    blurred, _ = measure_autoencoder(lambda image: cv2.GaussianBlur(image, (0, 0), 2.5), SIZE, people=4)
    assert whole.moles == blurred.moles > 0 and shown.shape == (SIZE * 2, SIZE * 4, 3)
    assert (whole.moles_kept, whole.moles_made_up, whole.freckles) == (1, 0, 1) and whole.psnr > 100
    assert blurred.moles_kept < 0.5 and blurred.freckles < 0.5 and 20 < blurred.psnr < 35
    assert whole.photo_to_reference is None  # nobody was asked who it is
