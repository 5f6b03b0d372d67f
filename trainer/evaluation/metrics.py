"""From measurements to numbers: MultiSim, identification, FID, and means with errors.

Pictures of one person are not independent of each other: errors are taken over people, never over pictures.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
# The people that a picture is of, by number: what is known of a picture is known of all of them.
Members = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error over people (None for fewer than two, or three where pairs are counted), and the
    number of pictures behind it."""

    value: float
    error: float | None
    pictures: int


# ---------------------------------------------------------------------------------------------------------- a picture


def multisim(own: Sequence[float | None], between: Sequence[float | None]) -> float:
    """InstantFamily's MultiSim (eq. 11): (s(A, A') + s(B, B')) / 2 + 1 - s(A', B').

    own: similarity of each reference to its face, None where it has none; between: of each two of the faces to each
    other. The paper prints it for two people. Of more it is here the mean of the first term over the people and of the
    second over the pairs of them, which for two is the same. Nor does it say what a missing face counts. Here its
    similarity is 0, and the second term of its pairs too, as if the two faces were one and the same: a missing person
    must not pass for people kept apart.
    """
    alike = sum(value or 0.0 for value in own) / len(own)
    return alike + sum(0.0 if value is None else 1 - value for value in between) / len(between)


def rank(face: Floats, gallery: Floats, person: int) -> int:
    """Place, from 1, of `person` among the people of the gallery (N, d) when sorted by similarity to the face (d)."""
    similarities = gallery @ face
    return 1 + int((similarities > similarities[person]).sum())


# ------------------------------------------------------------------------------------------------------- many of them


def jackknife(statistic: Callable[[NDArray[np.bool_]], float], members: Members) -> float | None:
    """Standard error of a statistic by leaving out every person once, with all pictures that the person is in. People
    who are only ever in the same pictures are left out once together.

    statistic: of the pictures that a mask (n) lets in. For the mean of single people's means this is the familiar
    deviation of those means over sqrt(N); it also holds for pairs, which share people, and for what is no mean (FID).
    None where too little is left without a person.
    """
    people = sorted({person for group in members for person in group})
    without = (np.array([person not in group for group in members]) for person in people)
    masks = list({mask.tobytes(): mask for mask in without}.values())
    if len(masks) < 2 or not all(mask.any() for mask in masks):
        return None
    values = np.array([statistic(mask) for mask in masks])
    count = len(masks)
    return float(np.sqrt((count - 1) / count * ((values - values.mean()) ** 2).sum()))


def cluster_mean(values: Sequence[float | None], members: Members) -> Estimate | None:
    """The mean over people (or pairs) of their pictures' mean value, with its error. None values are left out.

    Returns None where nothing is left.
    """
    groups: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for value, group in zip(values, members, strict=True):
        if value is not None:
            groups[group].append(value)
    if not groups:
        return None
    means = np.array([math.fsum(group) / len(group) for group in groups.values()])
    return Estimate(
        float(means.mean()),
        jackknife(lambda mask: float(means[mask].mean()), list(groups)),
        sum(len(group) for group in groups.values()),
    )


# ---------------------------------------------------------------------------------------------------------------- FID


def frechet_distance(one: Floats, other: Floats) -> float:
    """Fréchet distance of two sets of features (n, d), (m, d), taken for normal (FID, arXiv 1706.08500, eq. 6)."""
    return frechet_from_moments(*moments(one), *moments(other))


def moments(features: Floats) -> tuple[Floats, Floats]:
    """Mean (d) and covariance (d, d) of features (n, d)."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_from_moments(mean: Floats, covariance: Floats, other_mean: Floats, other_covariance: Floats) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric: that
    stays real where there are fewer pictures than features and a matrix root would not.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    mixed = np.linalg.eigvalsh(root @ other_covariance @ root)
    distance = ((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other_covariance)
    return float(max(distance - 2 * np.sqrt(mixed.clip(min=0)).sum(), 0.0))


def fid(features: Floats, real: Floats, members: Members) -> Estimate | None:
    """FID of pictures' features (n, d) to real ones' (m, d), with its error. None below two pictures on either side.

    The error is that of the choice of people. It does not include the bias, which every FID of few pictures has: only
    those of equally many pictures can be compared.
    """
    if min(len(features), len(real)) < 2:
        return None
    reference = moments(real)

    def distance(mask: NDArray[np.bool_]) -> float:
        return frechet_from_moments(*moments(features[mask]), *reference)

    everything = np.ones(len(features), dtype=bool)
    counts = [sum(person not in group for group in members) for person in {p for group in members for p in group}]
    error = jackknife(distance, members) if min(counts) >= 2 else None
    return Estimate(distance(everything), error, len(features))
