"""From a picture to numbers, from numbers to a table: with a detector and a recogniser that say what they are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

from lib_portrait.faces.detection import Detector, Face
from trainer.evaluation.artist import Pool
from trainer.evaluation.instruments import Clip, Recogniser
from trainer.evaluation.measuring import FACE, Gallery, Instruments, Seen, measure
from trainer.evaluation.plans import Plan, Row, Shot
from trainer.evaluation.prompts import MULTI, SINGLE
from trainer.evaluation.report import as_json, as_lines, markdown, tabulate, verdict

LANDMARKS = np.array([[10, 12], [22, 12], [16, 18], [11, 24], [21, 24]], np.float32)
# Three people in three directions.
GALLERY = Gallery(np.eye(3))


class Teller:
    """Stands for the attribute network."""

    def __init__(self, **told: str):
        self.told = told

    def tell(self, pictures: Sequence[Any]) -> list[dict[str, str]]:
        return [self.told] * len(pictures)


def instruments(faces: Sequence[Sequence[float]], fid: str = "clip", **told: str) -> Instruments:
    """faces: the embeddings of the faces that are found, from left to right; the last is the largest."""
    boxes = [Face(np.array([i, 0, 2 * i + 8, 30], np.float32), LANDMARKS, 1.0) for i in range(len(faces))]
    found = Detector("told", "1", lambda image: boxes)
    recogniser = Recogniser("told", "", lambda image, seen: np.array(faces, np.float64))
    clip = Clip(
        "told",
        lambda texts: np.array([[0.6, 0.8]] * len(texts)),
        lambda images: (np.array([[1.0, 0.0]] * len(images)), np.array([[5.0]] * len(images))),
    )
    return Instruments(found, recogniser, clip, Teller(**told) if told else None, fid)  # type: ignore[arg-type]


def shot(people: tuple[int, ...], prompt: int = 0, seed: int = 0) -> Shot:
    words = ["woman"] * len(people)
    chosen = (SINGLE if len(people) == 1 else MULTI)[prompt]
    return Shot(people, chosen, chosen.text(words), chosen.attributes(words), seed)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pool = Pool(tmp_path)
    pool.put(np.zeros((32, 32, 3), np.uint8), {"number": 1})
    return pool.path({"number": 1})


def routed(tmp_path: Path, rows: list[list[int]]) -> Path:
    """A picture whose parts belong to these people."""
    pool = Pool(tmp_path)
    pool.put(np.zeros((32, 32, 3), np.uint8), {"rows": rows}, torch.tensor(rows))
    return pool.path({"rows": rows})


def test_faces_are_matched_greedily_each_once(picture: Path) -> None:
    """The left face is like both (0.8, 0.6), the right one like the first only (0.6, 0): the first takes the left one,
    which leaves 0 for the second, though 0.6 and 0.6 were to be had."""
    (seen,) = measure([picture], [shot((0, 1))], GALLERY, instruments([[0.8, 0.6, 0], [0.6, 0, 0.8]]), True)
    assert seen.similarity == pytest.approx((0.8, 0.0))
    assert seen.lowest == pytest.approx(0)
    assert seen.between == pytest.approx(0.48)
    assert seen.multisim == pytest.approx((0.8 + 0) / 2 + 1 - 0.48)
    # The second person has to take a face that is more like the first.
    assert seen.recognised == (True, False) and not seen.shows_everybody
    # The right face is most like the third person, then like the first.
    assert seen.ranks == (1, 3)
    assert (seen.within(1), seen.within(3), seen.found) == (0.5, 1.0, 1.0)


def test_further_faces_do_not_count(picture: Path) -> None:
    (seen,) = measure([picture], [shot((1,))], GALLERY, instruments([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]]), True)
    assert (seen.faces, seen.similarity, seen.ranks) == (3, (pytest.approx(0.6),), (2,))
    assert seen.multisim is None


def test_a_missing_face_counts_nothing_and_is_not_identified(picture: Path) -> None:
    (one,) = measure([picture], [shot((0, 1))], GALLERY, instruments([[0, 1, 0]]), True)
    assert one.similarity == (None, pytest.approx(1)) and one.ranks == (None, 1)
    assert (one.lowest, one.found, one.within(1), one.multisim) == (0, 0.5, 0.5, pytest.approx(0.5))
    (nobody,) = measure([picture], [shot((2,))], GALLERY, instruments([]), True)
    assert (nobody.faces, nobody.lowest, nobody.found, nobody.within(3)) == (0, 0, 0, 0)


def test_the_prompt_is_measured_by_clip_and_by_its_attributes(picture: Path) -> None:
    told = {"people": "1", "women": "1", "style": "cartoon", "background": "park", "hat": "none"}
    (seen,) = measure([picture], [shot((0,))], GALLERY, instruments([[1, 0, 0]], **told), True)
    assert seen.clip_t == pytest.approx(0.6)
    # "a photo of a woman in a park" says nothing about a hat.
    assert seen.shown == {"people": True, "women": True, "style": False, "background": True}
    assert seen.accuracy == 0.75
    (photo,) = measure([picture], [shot((0,))], GALLERY, instruments([[1, 0, 0]], **told), False)
    assert photo.clip_t is None and photo.accuracy is None


def test_fid_compares_pictures_or_the_largest_faces(picture: Path) -> None:
    faces = [[1, 0, 0], [0, 1, 0]]
    (seen,) = measure([picture], [shot((0,))], GALLERY, instruments(faces), True)
    assert seen.features is not None and seen.features.tolist() == [5.0]
    (seen,) = measure([picture], [shot((0,))], GALLERY, instruments(faces, FACE), True)
    assert seen.features is not None and seen.features.tolist() == [0, 1, 0]
    (seen,) = measure([picture], [shot((0,))], GALLERY, instruments([], FACE), True)
    assert seen.features is None


def test_a_picture_shows_both_when_each_has_a_face_that_is_more_like_them(picture: Path) -> None:
    """Whoever else of the gallery the faces are like."""
    found = [
        ((True, True), [[0.5, 0.4, 0.9], [0.0, 0.1, 0.9]]),
        ((True, False), [[0.8, 0.6, 0], [0.6, 0.5, 0.6]]),
        ((True, False), [[1, 0, 0]]),
        ((False, False), []),
    ]
    for recognised, faces in found:
        (seen,) = measure([picture], [shot((0, 1))], GALLERY, instruments(faces), True)
        assert (seen.recognised, seen.shows_everybody) == (recognised, all(recognised))
        assert seen.places_everybody is None


def test_a_picture_places_both_when_their_faces_lie_where_it_was_routed_to_them(tmp_path: Path) -> None:
    """The faces' centres are at x = 4 and 5.5 of 32 pixels, in the second and third of sixteen columns; y at half."""
    left, right = [[0] * 16], [[1] * 16]
    apart = [[-1, 0, 0, 0] + [1] * 12]
    boxes = [Face(np.array([x - 1, 10, x + 1, 22], np.float32), LANDMARKS, 1.0) for x in (4, 20)]
    cases = [(apart, True), (left, False), (right, False), ([[-1] * 16], False), ([[1, 0, 1, 1] + [1] * 12], False)]
    for rows, placed in cases:
        told = replace(instruments([[1, 0, 0], [0, 1, 0]]), detector=Detector("told", "1", lambda image: boxes))
        (seen,) = measure([routed(tmp_path, rows)], [shot((0, 1))], GALLERY, told, True)
        assert seen.shows_everybody and seen.places_everybody == placed, rows
    told = replace(instruments([[1, 0, 0], [0.9, 0.1, 0]]), detector=Detector("told", "1", lambda image: boxes))
    (seen,) = measure([routed(tmp_path, apart)], [shot((0, 1))], GALLERY, told, True)
    assert seen.placed == (True, True) and not seen.places_everybody


def test_the_sheet_tells_which_pictures_show_both() -> None:
    def told(recognised: tuple[bool, ...], placed: tuple[bool, ...] | None) -> list[str]:
        return verdict(Seen(2, (0.5,) * len(recognised), (1, 1), 0.0, 0.2, {}, None, recognised, placed))

    assert told((True, True), (True, True)) == ["both placed"]
    assert told((True, True), (True, False)) == ["misplaced"]
    assert told((True, True), None) == ["both shown"]
    assert told((True, False), (True, True)) == ["not both shown"]
    assert told((True,), None) == []


def test_pairs_have_a_column_for_pictures_that_show_both(picture: Path) -> None:
    plan = Plan("multi", "Two people", [shot((0, 1)), shot((0, 2)), shot((1, 2))], [Row("adapter", "adapter")])
    seen = [Seen(2, (0.5, 0.5), (1, 1), 0.0, 0.2, {}, None, (True, both)) for both in (True, False, True)]
    places = [replace(one, placed=where) for one, where in zip(seen, ((True, True), (True, True), (True, False)))]
    for pictures, placed in ((places, "33.3 ± 33.3"), (seen, None)):
        text = markdown(tabulate(plan, {"adapter": pictures}, [], 100, []))
        names, values = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:6:2])
        assert values[names.index("both shown %")] == "66.7 ± 66.7"
        # What nobody knows of any picture has no column.
        assert ("both placed %" in names) == (placed is not None)
        assert placed is None or values[names.index("both placed %")].startswith("33.3 ± ")


# -------------------------------------------------------------------------------------------------------------- tables


def seen_of(similarity: float, features: float, shown: dict[str, bool]) -> Seen:
    return Seen(1, (similarity,), (1 if similarity > 0.5 else 2,), None, 0.25, shown, np.array([features]))


@pytest.fixture
def result(picture: Path) -> tuple[Plan, dict[str, list[Seen]]]:
    rows = [Row("text only"), Row("adapter", "adapter"), Row("real pictures", real=True)]
    plan = Plan("single", "One person", [shot((0,)), shot((1,)), shot((2,), 2)], rows)
    yes, no = {"style": True, "background": True}, {"style": True, "background": False}
    seen = {
        "text only": [seen_of(0.0, 0.0, yes) for _ in range(3)],
        "adapter": [seen_of(0.5, 0.0, yes), seen_of(1.0, 2.0, yes), seen_of(0.0, 1.0, no)],
        "real pictures": [seen_of(1.0, 1.0, {}) for _ in range(3)],
    }
    return plan, seen


def test_the_table_reads_as_it_should(result: tuple[Plan, dict[str, list[Seen]]]) -> None:
    plan, seen = result
    table = tabulate(plan, seen, [np.array([0.0]), np.array([2.0])], 100, ["100 people."])
    lines = markdown(table).splitlines()
    assert lines[0] == "## One person"
    head = "| | similarity % | top-1 % | top-5 % | face found % | CLIP-T % | prompt accuracy % | FID |"
    assert next(line.replace("|  |", "| |") for line in lines if "similarity %" in line) == head
    adapter = next(line for line in lines if line.startswith("| adapter |"))
    cells = [cell.strip() for cell in adapter.strip("|").split("|")]
    # 0.5, 1, 0: a mean of 0.5 with the error 0.5 / sqrt(3); accuracies 1, 1, 0.5.
    assert cells[:3] == ["adapter", "50.0 ± 28.9", "33.3 ± 33.3"]
    assert cells[4:7] == ["100.0 ± 0.0", "25.0 ± 0.0", "83.3 ± 16.7"]
    # Means 1 and 1, variances 1 and 2.
    assert cells[7].startswith(f"{(2**0.5 - 1) ** 2:.1f}")
    assert "100 people." in lines
    assert any(line.startswith("| adapter − text only | +50.0 ± 28.9 |") for line in lines)
    assert any(line.startswith("| adapter | 100.0 ± 0.0 | 66.7 ± 33.3 |") for line in lines)


def test_the_json_holds_what_the_table_shows_and_what_it_was_made_with(
    result: tuple[Plan, dict[str, list[Seen]]], picture: Path, tmp_path: Path
) -> None:
    plan, seen = result
    table = tabulate(plan, seen, [], 100, [])
    told = json.loads(as_json(table, {"settings": {"steps": 15}}))
    assert (told["protocol"], told["settings"]) == ("single", {"steps": 15})
    (adapter,) = [row for row in told["rows"] if row["name"] == "adapter"]
    assert adapter["numbers"]["similarity"] == {
        "value": 0.5,
        "error": pytest.approx(0.5 / 3**0.5),
        "pictures": 3,
    }
    # Nothing real to compare with: no FID.
    assert "FID" not in adapter["numbers"]
    lines = as_lines(plan, seen, {row.name: [picture] * 3 for row in plan.rows}, tmp_path).splitlines()
    first = json.loads(lines[3])
    assert (len(lines), first["row"], first["similarity"], first["ranks"]) == (9, "adapter", [0.5], [2])
    assert tmp_path / first["picture"] == picture
