"""The numbers of `portrait.py evaluate`, compared with ones computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluation.metrics import cluster_mean, fid, frechet_distance, jackknife, multisim, rank


def test_multisim_is_equation_11_of_instantfamily() -> None:
    # (0.8 + 0.6) / 2 + (1 - 0.3)
    assert multisim((0.8, 0.6), between=[0.3]) == pytest.approx(1.4)
    assert multisim((1.0, 1.0), between=[0.0]) == 2


def test_leaving_somebody_out_does_not_pass_for_keeping_people_apart() -> None:
    assert multisim((0.8, None), between=[None]) == pytest.approx(0.4)
    assert multisim((None, None), between=[None]) == 0
    # With the third person two of three pairs are missing.
    assert multisim((0.8, 0.6, None), between=[0.3, None, None]) == pytest.approx(1.4 / 3 + 0.7 / 3)


def test_multisim_of_more_people_is_the_mean_over_people_and_over_pairs() -> None:
    rng = np.random.default_rng(0)
    own, faces = rng.uniform(0, 1, 5), rng.standard_normal((5, 8))
    faces /= np.linalg.norm(faces, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = own.mean() + np.mean([1 - faces[i] @ faces[j] for i, j in pairs])
    assert multisim(own, [float(faces[i] @ faces[j]) for i, j in pairs]) == pytest.approx(expected)


def test_the_rank_counts_the_people_who_are_more_similar() -> None:
    face = np.array([0.6, 0.8, 0.0])
    assert [rank(face, np.eye(3), person) for person in range(3)] == [2, 1, 3]


def test_means_and_errors_are_over_people_not_pictures() -> None:
    """Subject 0 has a mean of 0.5 from two pictures; the means 0.5, 1, 0 have the deviation 0.5 and so the error
    0.5 / sqrt(3). Further pictures of somebody change nothing as long as their mean is the same."""
    estimate = cluster_mean([0, 1, 1, 0], [(0,), (0,), (1,), (2,)])
    assert estimate is not None
    assert estimate.value == pytest.approx(0.5)
    assert estimate.error == pytest.approx(0.5 / math.sqrt(3))
    assert estimate.pictures == 4
    again = cluster_mean([0, 1, 1, 0, 0, 0, 0], [(0,), (0,), (1,), (2,), (2,), (2,), (2,)])
    assert again is not None and (again.value, again.error) == pytest.approx((estimate.value, estimate.error))


def test_what_could_not_be_measured_is_left_out() -> None:
    estimate = cluster_mean([None, 1.0, 3.0], [(0,), (0,), (1,)])
    assert estimate is not None and (estimate.value, estimate.error, estimate.pictures) == (2, pytest.approx(1), 2)
    assert cluster_mean([None], [(0,)]) is None


def test_errors_of_pairs_know_that_pairs_share_people() -> None:
    """Without person 0, 1, 2 what is left is 1, 2, 3: sqrt(2 / 3 * (1 + 0 + 1)), twice that of three strangers."""
    estimate = cluster_mean([3.0, 2.0, 1.0], [(0, 1), (0, 2), (1, 2)])
    assert estimate is not None and estimate.value == 2
    assert estimate.error == pytest.approx(math.sqrt(4 / 3))


def test_people_who_are_always_together_count_once_for_the_error() -> None:
    """Three pairs of strangers are as good as three people: deviation 1, error 1 / sqrt(3)."""
    strangers = cluster_mean([3.0, 2.0, 1.0], [(0, 1), (2, 3), (4, 5)])
    alone = cluster_mean([3.0, 2.0, 1.0], [(0,), (1,), (2,)])
    assert strangers is not None and strangers.error == pytest.approx(1 / math.sqrt(3))
    assert strangers == alone


def test_there_is_no_error_where_leaving_somebody_out_leaves_nothing() -> None:
    for values, members in (([1.0, 2.0], [(0,), (0,)]), ([1.0, 2.0], [(0, 1), (0, 1)])):
        estimate = cluster_mean(values, members)
        assert estimate is not None and estimate.error is None
    assert jackknife(lambda mask: float(mask.sum()), [(0, 1)]) is None


def test_the_frechet_distance_of_one_number_is_that_of_the_textbook() -> None:
    """Means 1 and 8, variances 2 and 32: (8 - 1)^2 + 2 + 32 - 2 sqrt(2 * 32) = 67."""
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[4.0], [12.0]])) == pytest.approx(67)


def test_the_frechet_distance_of_independent_numbers_adds_up() -> None:
    corners = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    # Variances 4/3 and 16/3 on one axis, equal ones on the other: (sqrt(16/3) - sqrt(4/3))^2 = 4/3; means 3 apart.
    assert frechet_distance(corners, corners * [2, 1] + [0, 3]) == pytest.approx(4 / 3 + 9)


def test_the_frechet_distance_holds_with_fewer_pictures_than_features() -> None:
    features = np.random.default_rng(0).standard_normal((3, 10))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(10, abs=1e-6)


def test_fid_tells_how_much_it_hangs_on_the_people() -> None:
    real = np.array([[0.0], [1.0], [2.0]])
    features = np.array([[0.0], [2.0], [0.0], [2.0], [0.0], [2.0]])
    estimate = fid(features, real, [(0,), (0,), (1,), (1,), (2,), (2,)])
    assert estimate is not None and estimate.pictures == 6
    # Any two of the people make the same four numbers, and so the same distance.
    assert estimate.error == pytest.approx(0, abs=1e-12)
    lopsided = fid(features + np.array([[0], [0], [0], [0], [5], [5]]), real, [(0,), (0,), (1,), (1,), (2,), (2,)])
    assert lopsided is not None and lopsided.error is not None and lopsided.error > 1
    assert fid(features[:1], real, [(0,)]) is None
