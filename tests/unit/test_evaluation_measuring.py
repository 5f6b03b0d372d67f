"""From a picture to numbers, from numbers to a table: with a stand-in for the detector and the recogniser."""

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
from lib_portrait.request import Guidance
from trainer.evaluation.details import FaceDetails, MolesFound
from trainer.evaluation.generators import PictureCache
from trainer.evaluation.instruments import Clip, Recogniser
from trainer.evaluation.measuring import FACE, Gallery, Instruments, Measurements, boxes_hit, measure
from trainer.evaluation.plans import EvaluationPlan, Sample, Variant
from trainer.evaluation.prompts import MULTI, SINGLE
from trainer.evaluation.report import across, as_json, as_json_lines, compared, markdown, tabulate, verdict
from trainer.world import world_person

LANDMARKS = np.array([[10, 12], [22, 12], [16, 18], [11, 24], [21, 24]], np.float32)
# Three people in three directions.
GALLERY = Gallery(np.eye(3))


class Attributes:
    """Stands for the attribute network."""

    def __init__(self, **predicted: str):
        self.predicted = predicted

    def predict(self, pictures: Sequence[Any]) -> list[dict[str, str]]:
        return [self.predicted] * len(pictures)


def instruments(faces: Sequence[Sequence[float]], fid: str = "clip", **predicted: str) -> Instruments:
    """faces: the embeddings of the faces that are found, from left to right; the last is the largest."""
    boxes = [Face(np.array([i, 0, 2 * i + 8, 30], np.float32), LANDMARKS, 1.0) for i in range(len(faces))]
    found = Detector("fixed", "1", lambda image: boxes)
    recogniser = Recogniser("fixed", "", lambda image, faces_found: np.array(faces, np.float64))
    clip = Clip(
        "fixed",
        lambda texts: np.array([[0.6, 0.8]] * len(texts)),
        lambda images: (np.array([[1.0, 0.0]] * len(images)), np.array([[5.0]] * len(images))),
    )
    return Instruments(found, recogniser, clip, Attributes(**predicted) if predicted else None, fid)  # type: ignore[arg-type]


def sample(people: tuple[int, ...], prompt: int = 0, seed: int = 0) -> Sample:
    words = ["woman"] * len(people)
    chosen = (SINGLE if len(people) == 1 else MULTI)[prompt]
    return Sample(people, chosen, chosen.text(words), chosen.attributes(words), seed)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    cache = PictureCache(tmp_path)
    cache.put(np.zeros((32, 32, 3), np.uint8), {"number": 1})
    return cache.path({"number": 1})


def routed(tmp_path: Path, rows: list[list[int]]) -> Path:
    """A picture whose parts belong to these people."""
    cache = PictureCache(tmp_path)
    cache.put(np.zeros((32, 32, 3), np.uint8), {"rows": rows}, torch.tensor(rows))
    return cache.path({"rows": rows})


def test_faces_are_matched_greedily_each_once(picture: Path) -> None:
    """The left face is like both (0.8, 0.6), the right one like the first only (0.6, 0): the first takes the left one,
    which leaves 0 for the second, though 0.6 and 0.6 were to be had."""
    (measured,) = measure([picture], [sample((0, 1))], GALLERY, instruments([[0.8, 0.6, 0], [0.6, 0, 0.8]]), True)
    assert measured.similarity == pytest.approx((0.8, 0.0))
    assert measured.lowest == pytest.approx(0)
    assert measured.between == pytest.approx((0.48,))
    assert measured.multisim == pytest.approx((0.8 + 0) / 2 + 1 - 0.48)
    # The second person has to take a face that is more like the first.
    assert measured.recognised == (True, False) and not measured.shows_everybody
    # The right face is most like the third person, then like the first.
    assert measured.ranks == (1, 3)
    assert (measured.top_k(1), measured.top_k(3), measured.detection_rate) == (0.5, 1.0, 1.0)


def test_further_faces_do_not_count(picture: Path) -> None:
    (measured,) = measure([picture], [sample((1,))], GALLERY, instruments([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]]), True)
    assert (measured.faces, measured.similarity, measured.ranks) == (3, (pytest.approx(0.6),), (2,))
    assert measured.multisim is None


def test_a_missing_face_counts_nothing_and_is_not_identified(picture: Path) -> None:
    (one,) = measure([picture], [sample((0, 1))], GALLERY, instruments([[0, 1, 0]]), True)
    assert one.similarity == (None, pytest.approx(1)) and one.ranks == (None, 1)
    assert (one.lowest, one.detection_rate, one.top_k(1), one.multisim) == (0, 0.5, 0.5, pytest.approx(0.5))
    (nobody,) = measure([picture], [sample((2,))], GALLERY, instruments([]), True)
    assert (nobody.faces, nobody.lowest, nobody.detection_rate, nobody.top_k(3)) == (0, 0, 0, 0)


def test_the_prompt_is_measured_by_clip_and_by_its_attributes(picture: Path) -> None:
    predicted = {"people": "1", "women": "1", "style": "cartoon", "background": "park", "hat": "none"}
    (measured,) = measure([picture], [sample((0,))], GALLERY, instruments([[1, 0, 0]], **predicted), True)
    assert measured.clip_t == pytest.approx(0.6)
    # "a photo of a woman in a park" says nothing about a hat.
    assert measured.shown == {"people": True, "women": True, "style": False, "background": True}
    assert measured.accuracy == 0.75
    (photo,) = measure([picture], [sample((0,))], GALLERY, instruments([[1, 0, 0]], **predicted), False)
    assert photo.clip_t is None and photo.accuracy is None


def test_fid_compares_pictures_or_the_largest_faces(picture: Path) -> None:
    faces = [[1, 0, 0], [0, 1, 0]]
    (measured,) = measure([picture], [sample((0,))], GALLERY, instruments(faces), True)
    assert measured.features is not None and measured.features.tolist() == [5.0]
    (measured,) = measure([picture], [sample((0,))], GALLERY, instruments(faces, FACE), True)
    assert measured.features is not None and measured.features.tolist() == [0, 1, 0]
    (measured,) = measure([picture], [sample((0,))], GALLERY, instruments([], FACE), True)
    assert measured.features is None


def test_a_picture_shows_both_when_each_has_a_face_that_is_more_like_them(picture: Path) -> None:
    """Whoever else of the gallery the faces are like."""
    found = [
        ((True, True), [[0.5, 0.4, 0.9], [0.0, 0.1, 0.9]]),
        ((True, False), [[0.8, 0.6, 0], [0.6, 0.5, 0.6]]),
        ((True, False), [[1, 0, 0]]),
        ((False, False), []),
    ]
    for recognised, faces in found:
        (measured,) = measure([picture], [sample((0, 1))], GALLERY, instruments(faces), True)
        assert (measured.recognised, measured.shows_everybody) == (recognised, all(recognised))
        assert measured.places_everybody is None


def test_a_picture_places_both_when_their_faces_lie_where_it_was_routed_to_them(tmp_path: Path) -> None:
    """The faces' centres are at x = 4 and 5.5 of 32 pixels, in the second and third of sixteen columns; y at half."""
    left, right = [[0] * 16], [[1] * 16]
    apart = [[-1, 0, 0, 0] + [1] * 12]
    boxes = [Face(np.array([x - 1, 10, x + 1, 22], np.float32), LANDMARKS, 1.0) for x in (4, 20)]
    cases = [(apart, True), (left, False), (right, False), ([[-1] * 16], False), ([[1, 0, 1, 1] + [1] * 12], False)]
    for rows, placed in cases:
        fixed = replace(instruments([[1, 0, 0], [0, 1, 0]]), detector=Detector("fixed", "1", lambda image: boxes))
        (measured,) = measure([routed(tmp_path, rows)], [sample((0, 1))], GALLERY, fixed, True)
        assert measured.shows_everybody and measured.places_everybody == placed, rows
    fixed = replace(instruments([[1, 0, 0], [0.9, 0.1, 0]]), detector=Detector("fixed", "1", lambda image: boxes))
    (measured,) = measure([routed(tmp_path, apart)], [sample((0, 1))], GALLERY, fixed, True)
    assert measured.placed == (True, True) and not measured.places_everybody


def test_of_three_people_each_pair_is_compared_and_missing_ones_are_known(picture: Path) -> None:
    faces = [[0.8, 0.6, 0], [0, 0.8, 0.6]]
    (measured,) = measure([picture], [sample((0, 1, 2))], GALLERY, instruments(faces), True)
    assert measured.similarity == (pytest.approx(0.8), pytest.approx(0.8), None)
    assert measured.between == (pytest.approx(0.48), None, None)
    assert measured.mean == pytest.approx(1.6 / 3) and measured.lowest == 0 and not measured.shows_everybody
    assert measured.multisim == pytest.approx(1.6 / 3 + 0.52 / 3)
    (alone,) = measure([picture], [sample((0,))], GALLERY, instruments(faces), True)
    assert alone.between == () and alone.multisim is None


def test_a_box_is_hit_by_a_face_whose_centre_lies_in_it_each_face_once(picture: Path) -> None:
    def face(x: float, y: float) -> Face:
        return Face(np.array([x - 3, y - 4, x + 3, y + 4], np.float32), LANDMARKS, 1.0)

    # Of a picture 100 wide and 50 high.
    left, right = (0.0, 0.0, 0.5, 1.0), (0.4, 0.0, 1.0, 1.0)
    for faces, hit in (
        ([face(10, 25), face(90, 25)], (True, True)),
        ([face(10, 25), face(20, 40)], (True, False)),
        ([face(45, 25)], (True, False)),  # in both, nearer to the left one's middle
        ([face(49, 25)], (False, True)),
        ([], (False, False)),
    ):
        assert boxes_hit(faces, [left, right], (50, 100)) == hit, faces
    assert boxes_hit([face(10, 45)], [(0.0, 0.0, 1.0, 0.8)], (50, 100)) == (False,)
    asked = [[(0.0, 0.0, 0.3, 1.0), (0.9, 0.0, 1.0, 1.0)]]
    (measured,) = measure([picture], [sample((0, 1))], GALLERY, instruments([[1, 0, 0]]), True, boxes=asked)
    assert measured.hit == (True, False) and measured.boxes_hit == 0.5
    (unasked,) = measure([picture], [sample((0, 1))], GALLERY, instruments([[1, 0, 0]]), True, boxes=[None])
    assert unasked.hit is None and unasked.boxes_hit is None


def test_what_is_guided_or_has_places_is_compared_with_the_same_without() -> None:
    guidance = Guidance(True, {"strength": 1.0})
    rows = [
        Variant("text only"),
        Variant("a", "a"),
        Variant("a + guidance", "a", guidance=guidance),
        Variant("a, beside", "a", sides=True, guidance=guidance),
        Variant("b", "b"),
        Variant("placed", "placed", laid_out=True),
        Variant("c", "c"),
        Variant("b, beside", "b", sides=True),
        Variant("b, laid out", "b", laid_out=True),
        Variant("alone, beside", "alone", sides=True, guidance=guidance),
        Variant("alone", "alone", guidance=guidance),
        Variant("b again", "b", guidance=guidance),
        Variant("real", real=True),
    ]
    minus = {name: minus for minus, name in compared(rows)}
    assert minus == {
        "a": "text only",
        "a + guidance": "a",
        "a, beside": "a + guidance",  # the same without guidance is not there
        "b": "a",
        "placed": "b",
        "c": "placed",
        "b, beside": "b",
        "b, laid out": "b",
        "alone, beside": "alone",
        "alone": "text only",
        "b again": "b",
    }
    assert [minus for minus, _ in compared(rows[:2])] == ["text only"]


def test_groups_are_told_at_a_glance_by_their_size() -> None:
    tables = []
    for size, similarity in ((2, 0.5), (3, 0.25)):
        people = [tuple(range(size)), tuple(range(size, 2 * size))]
        rows = [Variant("adapter", "adapter")] + ([Variant("other", "other")] if size == 3 else [])
        plan = EvaluationPlan("groups", f"{size} people", [sample(group) for group in people], rows, part=str(size))
        one = Measurements(
            size, (similarity,) * size, (1,) * size, (0.0,) * (size * (size - 1) // 2), 0.2, {}, None, (True,) * size
        )
        tables.append(tabulate(plan, {row.name: [one, one] for row in rows}, [], 100, [f"Note {size}."]))
        assert json.loads(as_json(tables[-1], {}))["part"] == str(size)
    lines = across(tables).splitlines()
    at = lines.index("## MultiSim")
    assert [lines[at + 2], *lines[at + 4 : at + 6]] == [
        "|  | 2 people | 3 people |",
        "| adapter | 1.50 ± 0.00 | 1.25 ± 0.00 |",
        "| other | – | 1.25 ± 0.00 |",
    ]
    assert "## lowest similarity %" in lines and "## all shown %" in lines
    # Nobody was asked for in a box.
    assert not any("boxes hit" in line for line in lines)
    assert "Note 2." in lines and "Note 3." in lines


def test_moles_and_freckles_of_people_of_the_world_have_columns(picture: Path) -> None:
    """What is looked for, and where, is the matter of `details`; here it is that it reaches the table."""
    person = world_person(9)
    (measured,) = measure([picture], [sample((0,))], GALLERY, instruments([[1, 0, 0]]), True, drawn=lambda one: person)
    assert measured.details is not None and measured.to_json()["details"]["moles"]["found"] == 0
    (unknown,) = measure([picture], [sample((0,))], GALLERY, instruments([[1, 0, 0]]), True)
    (faceless,) = measure([picture], [sample((0,))], GALLERY, instruments([]), True, drawn=lambda one: person)
    (pair,) = measure(
        [picture], [sample((0, 1))], GALLERY, instruments([[1, 0, 0], [0, 1, 0]]), True, drawn=lambda one: person
    )
    assert unknown.details is faceless.details is pair.details is None
    found = [
        FaceDetails(MolesFound(4, 3, 2, 1), True, 0.2),
        FaceDetails(MolesFound(0, 0, 0, 0), False, 0.1),
        FaceDetails(MolesFound(2, 1, 4, 0), False, 0.3),
        None,
    ]
    people = [sample((one,)) for one in range(4)]
    plan = EvaluationPlan("single", "One person", people, [Variant("adapter", "adapter"), Variant("other", "other")])
    rows = {"adapter": [replace(measured, details=one) for one in found]}
    rows["other"] = [replace(measured, details=found[0] and replace(found[0], speckle=0.0)), *rows["adapter"][1:]]
    table = tabulate(plan, rows, [], 100, [])
    numbers = {name: one and (one.value, one.pictures) for name, one in table.rows[0].numbers.items()}
    assert numbers["moles kept"] == (0.625, 2) and numbers["moles elsewhere"] == (0.25, 2)
    # Darker than one of two pictures without freckles.
    assert numbers["freckles"] == (0.5, 1)
    (difference,) = table.differences
    assert difference.numbers["freckles"] is not None and difference.numbers["freckles"].value == -0.5
    assert "| moles kept % | moles elsewhere % | freckles % |" in markdown(table)
    bare = tabulate(plan, {name: [unknown] * 4 for name in rows}, [], 100, [])
    assert "moles" not in markdown(bare)


def test_the_sheet_says_which_pictures_show_both() -> None:
    def verdict_of(recognised: tuple[bool, ...], placed: tuple[bool, ...] | None) -> list[str]:
        return verdict(Measurements(2, (0.5,) * len(recognised), (1, 1), (0.0,), 0.2, {}, None, recognised, placed))

    assert verdict_of((True, True), (True, True)) == ["both placed"]
    assert verdict_of((True, True), (True, False)) == ["misplaced"]
    assert verdict_of((True, True), None) == ["both shown"]
    assert verdict_of((True, False), (True, True)) == ["not both shown"]
    assert verdict_of((True,), None) == []
    assert verdict_of((True, True, True), None) == ["all shown"]
    assert verdict_of((True, True, False), None) == ["not all shown"]


def test_pairs_have_a_column_for_pictures_that_show_both(picture: Path) -> None:
    plan = EvaluationPlan(
        "multi", "Two people", [sample((0, 1)), sample((0, 2)), sample((1, 2))], [Variant("adapter", "adapter")]
    )
    measured = [
        Measurements(2, (0.5, 0.5), (1, 1), (0.0,), 0.2, {}, None, (True, both)) for both in (True, False, True)
    ]
    places = [replace(one, placed=where) for one, where in zip(measured, ((True, True), (True, True), (True, False)))]
    for pictures, placed in ((places, "33.3 ± 33.3"), (measured, None)):
        text = markdown(tabulate(plan, {"adapter": pictures}, [], 100, []))
        names, values = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:6:2])
        assert values[names.index("both shown %")] == "66.7 ± 66.7"
        # What is known of no picture has no column.
        assert ("both placed %" in names) == (placed is not None)
        assert placed is None or values[names.index("both placed %")].startswith("33.3 ± ")


# -------------------------------------------------------------------------------------------------------------- tables


def measurements_of(similarity: float, features: float, shown: dict[str, bool]) -> Measurements:
    return Measurements(1, (similarity,), (1 if similarity > 0.5 else 2,), (), 0.25, shown, np.array([features]))


@pytest.fixture
def result(picture: Path) -> tuple[EvaluationPlan, dict[str, list[Measurements]]]:
    rows = [Variant("text only"), Variant("adapter", "adapter"), Variant("real pictures", real=True)]
    plan = EvaluationPlan("single", "One person", [sample((0,)), sample((1,)), sample((2,), 2)], rows)
    yes, no = {"style": True, "background": True}, {"style": True, "background": False}
    measured = {
        "text only": [measurements_of(0.0, 0.0, yes) for _ in range(3)],
        "adapter": [measurements_of(0.5, 0.0, yes), measurements_of(1.0, 2.0, yes), measurements_of(0.0, 1.0, no)],
        "real pictures": [measurements_of(1.0, 1.0, {}) for _ in range(3)],
    }
    return plan, measured


def test_the_table_reads_as_it_should(result: tuple[EvaluationPlan, dict[str, list[Measurements]]]) -> None:
    plan, measured = result
    table = tabulate(plan, measured, [np.array([0.0]), np.array([2.0])], 100, ["100 people."])
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
    result: tuple[EvaluationPlan, dict[str, list[Measurements]]], picture: Path, tmp_path: Path
) -> None:
    plan, measured = result
    table = tabulate(plan, measured, [], 100, [])
    result_json = json.loads(as_json(table, {"settings": {"steps": 15}}))
    assert (result_json["protocol"], result_json["settings"]) == ("single", {"steps": 15})
    (adapter,) = [row for row in result_json["rows"] if row["name"] == "adapter"]
    assert adapter["numbers"]["similarity"] == {
        "value": 0.5,
        "error": pytest.approx(0.5 / 3**0.5),
        "pictures": 3,
    }
    # Nothing real to compare with: no FID.
    assert "FID" not in adapter["numbers"]
    lines = as_json_lines(plan, measured, {row.name: [picture] * 3 for row in plan.variants}, tmp_path).splitlines()
    first = json.loads(lines[3])
    assert (len(lines), first["row"], first["similarity"], first["ranks"]) == (9, "adapter", [0.5], [2])
    assert tmp_path / first["picture"] == picture
