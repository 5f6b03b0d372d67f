"""Faces are found, ordered and described alike, whichever detector is there."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib_portrait.errors import PortraitError
from lib_portrait.faces import detection
from lib_portrait.faces.alignment import align_face, template
from lib_portrait.faces.detection import (
    Detector,
    Face,
    available_detectors,
    detect_faces,
    detect_in_photo,
    get_detector,
    turned,
    turned_back,
)
from tests.portraits import DRAWN, NAMES, portrait

LANDMARKS = template(112)


def face_at(x: float, y: float, size: float = 112, score: float = 0.99) -> Face:
    box = np.array([x, y, x + size, y + size], np.float32)
    return Face(box, LANDMARKS * (size / 112) + np.array([x, y], np.float32), score)


def scripted(*answers: list[Face], **trust: float) -> tuple[Detector, list[np.ndarray]]:
    """A detector that gives one answer after the other, and the list of what it was shown. trust: see `Detector`."""
    seen: list[np.ndarray] = []

    def find(image):
        seen.append(image)
        return answers[len(seen) - 1]

    return Detector("scripted", "1", find, **trust), seen


@pytest.fixture
def without(monkeypatch):
    """Hides packages from the search for installed ones."""

    def hide(*packages):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in packages else found(name))

    return hide


@pytest.fixture
def mtcnn():
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    return get_detector("mtcnn", [])


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def test_faces_are_counted_from_the_left():
    detector, seen = scripted([face_at(500, 0), face_at(20, 300, 40), face_at(200, 10)])
    found = detect_faces(np.zeros((600, 800, 3), np.uint8), detector)
    assert [face.box[0] for face in found] == [20, 200, 500]
    assert len(seen) == 1


def test_a_second_try_is_made_with_a_grey_border():
    image = np.full((200, 401, 3), 7, np.uint8)
    detector, seen = scripted([], [face_at(120, 70)])
    (face,) = detect_faces(image, detector)
    padded = seen[1]
    assert padded.shape == (300, 601, 3)
    assert (padded[50:250, 100:501] == 7).all()
    assert (padded[:50] == 128).all() and (padded[:, :100] == 128).all()
    np.testing.assert_array_equal(face.box, [20, 20, 132, 132])
    np.testing.assert_allclose(face.landmarks, LANDMARKS + np.float32(20), atol=1e-4)


def test_boxes_end_at_the_edge_but_landmarks_may_not():
    detector, _ = scripted([], [face_at(80, 40)])
    (face,) = detect_faces(np.zeros((200, 400, 3), np.uint8), detector)
    np.testing.assert_array_equal(face.box, [0, 0, 92, 102])
    np.testing.assert_allclose(face.landmarks, LANDMARKS + np.array([-20, -10], np.float32), atol=1e-4)


def test_no_face_anywhere_is_an_empty_list():
    detector, seen = scripted([], [])
    assert detect_faces(np.zeros((64, 64, 3), np.uint8), detector) == []
    assert len(seen) == 2


def test_faces_without_extent_or_numbers_are_left_out():
    nan = Face(np.array([0, 0, 9, 9], np.float32), np.full((5, 2), np.nan, np.float32), 0.9)
    flat = Face(np.array([0, 0, 9, 9], np.float32), np.ones((5, 2), np.float32), 0.9)
    thin = Face(np.array([5, 0, 5, 9], np.float32), LANDMARKS, 0.9)
    detector, _ = scripted([nan, flat, thin, face_at(1, 1)])
    assert len(detect_faces(np.zeros((200, 200, 3), np.uint8), detector)) == 1


def test_of_two_looks_at_one_face_the_surer_counts():
    """The first look takes half a face for a whole one, and sees a second person whom the other look misses."""
    half, whole = face_at(0, 60, 100, 0.96), face_at(60, 90, 220, 0.998)
    other = face_at(310, 20, 80, 0.95)
    detector, seen = scripted([half, other], [whole], sure=0.999)
    left, right = detect_faces(np.zeros((300, 400, 3), np.uint8), detector)
    assert len(seen) == 2
    np.testing.assert_allclose(left.landmarks, whole.landmarks - np.float32([100, 75]), atol=1e-4)
    assert right is not other and right.score == 0.95
    detector, seen = scripted([half], [face_at(60, 90, 220, 0.95)], sure=0.999)
    (kept,) = detect_faces(np.zeros((300, 400, 3), np.uint8), detector)
    assert kept.score == 0.96


def test_a_sure_first_look_is_the_only_one():
    detector, seen = scripted([face_at(10, 10, score=0.999), face_at(200, 10, score=0.5)], sure=0.999)
    assert detect_in_photo(np.zeros((200, 400, 3), np.uint8), detector)[0] == 0
    assert len(seen) == 1


def test_second_looks_are_at_a_smaller_picture_and_told_in_pixels_of_the_large_one():
    detector, seen = scripted([], [face_at(300, 300)])
    (face,) = detect_faces(np.zeros((2048, 4096, 3), np.uint8), detector)
    assert seen[1].shape == (512 + 2 * 128, 1024 + 2 * 256, 3)
    np.testing.assert_allclose(face.box, np.array([44, 172, 156, 284]) * 4)
    np.testing.assert_allclose(face.landmarks, (LANDMARKS + np.float32([44, 172])) * 4, atol=1e-3)


@pytest.mark.parametrize("turn", range(4))
def test_a_place_in_the_turned_picture_is_told_in_pixels_of_the_one_that_came(turn):
    places = np.array([[3, 5], [30, 6], [17, 15], [4, 20], [33, 21]])
    image = np.zeros((50, 40, 3), np.uint8)
    for number, (x, y) in enumerate(places):
        image[y, x] = number + 1
    upright = turned(image, turn)
    assert upright.shape[:2] == ((50, 40) if turn % 2 == 0 else (40, 50))
    found = [np.argwhere(upright[..., 0] == number + 1)[0][::-1] for number in range(5)]
    box = np.concatenate([np.min(found, axis=0), np.max(found, axis=0)]).astype(np.float32)
    back = turned_back(Face(box, np.array(found, np.float32), 0.7), turn, 40, 50)
    np.testing.assert_array_equal(back.landmarks, places)
    np.testing.assert_array_equal(back.box, [3, 5, 33, 21])
    assert back.score == 0.7
    if turn == 1:  # clockwise: what was at the top is at the right
        assert upright[:, -1].tobytes() == image[0, :].tobytes()


def by_orientation(scores: dict[int, float], people: int = 1, **trust: float) -> Detector:
    """Finds faces of these scores in a photo whose top left pixel was put there by so many quarters of turning."""

    def find(image):
        corners = [image[0, 0, 0], image[0, -1, 0], image[-1, -1, 0], image[-1, 0, 0]]
        turn = corners.index(255) if 255 in corners else None  # a bordered picture shows it nowhere
        if turn not in scores:
            return []
        return [face_at(10 + 130 * number, 10, score=scores[turn]) for number in reversed(range(people))]

    return Detector("turning", "1", find, **trust)


MARKED = np.zeros((300, 400, 3), np.uint8)
MARKED[0, 0] = 255
TRUST = {"sure": 0.9995, "least": 0.9, "surer": 0.1}


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({0: 0.998, 2: 0.9999}, 2),
        ({0: 0.976, 1: 0.9999, 3: 0.99}, 1),
        ({3: 0.9998}, 3),
        # Twice as sure is chance, in drawn people above all.
        ({0: 0.92, 2: 0.985}, 0),
        ({3: 0.983}, 0),
        ({0: 0.9996, 1: 1.0}, 0),
        ({}, 0),
    ],
)
def test_a_photo_is_turned_to_where_its_face_is_clearly_surest(scores, expected):
    turn, faces = detect_in_photo(MARKED, by_orientation(scores, **TRUST))
    assert turn == expected
    assert [face.score for face in faces] == ([scores[turn]] if turn in scores else [])


def test_of_a_detector_that_is_never_sure_the_surest_orientation_counts():
    assert detect_in_photo(MARKED, by_orientation({0: 0.7, 1: 0.8}, sure=1.0, least=0.5))[0] == 1
    assert detect_in_photo(MARKED, by_orientation({0: 0.8, 1: 0.7}, sure=1.0, least=0.5))[0] == 0


def test_people_of_a_turned_photo_are_counted_from_the_left_as_one_sees_them():
    turn, faces = detect_in_photo(MARKED, by_orientation({1: 0.9999}, people=2, **TRUST))
    assert turn == 1
    assert [face.box[0] for face in faces] == [10, 140]


def test_a_drawn_picture_is_never_turned():
    assert detect_faces(MARKED, by_orientation({1: 0.9999, 2: 0.9999, 3: 0.9999}, **TRUST)) == []


@pytest.mark.parametrize("turn", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_real_photo_that_lies_or_stands_on_its_head_gives_the_upright_face(mtcnn, name, turn):
    photo = Image.open(portrait(name)).convert("RGB")
    photo.thumbnail((600, 600), Image.Resampling.LANCZOS)
    upright = np.asarray(photo)
    (expected,) = detect_faces(upright, mtcnn)
    lying = turned(upright, turn)
    back, (face,) = detect_in_photo(lying, mtcnn)
    assert back == 4 - turn
    np.testing.assert_array_equal(face.landmarks, expected.landmarks)
    told = turned_back(face, back, *lying.shape[1::-1])
    crops = [align_face(*one).astype(int) for one in ((lying, told.landmarks), (upright, expected.landmarks))]
    assert np.abs(crops[0] - crops[1]).mean() < 1, "landmarks in the lying photo give the upright crop, too"


def test_half_a_face_found_at_first_sight_does_not_stand_for_the_whole(mtcnn):
    photo = np.asarray(Image.open(portrait(NAMES[2])).convert("RGB").resize((600, 600), Image.Resampling.LANCZOS))
    (reference,) = detect_faces(photo, mtcnn)
    corners = reference.box.reshape(2, 2)
    centre, reach = corners.mean(axis=0), 0.825 / 2 * np.ptp(corners, axis=0)
    (left, top), (right, bottom) = np.round(centre - reach).astype(int), np.round(centre + reach).astype(int)
    cut, corner = np.ascontiguousarray(photo[top:bottom, left:right]), np.array([left, top])
    (half,) = mtcnn.find(cut)
    off = 2 * reach[0] / 0.825
    assert half.score > 0.9 and np.abs(half.landmarks + corner - reference.landmarks).max() > 0.15 * off
    (face,) = detect_faces(cut, mtcnn)
    assert np.abs(face.landmarks + corner - reference.landmarks).max() < 0.05 * off


@pytest.mark.parametrize("names", [DRAWN[:2], NAMES[1:3]], ids=["drawn", "photos"])
def test_mtcnn_counts_two_people_from_the_left(mtcnn, names):
    two = np.hstack([pixels(portrait(name)) for name in names])
    width = two.shape[1]
    left, right = detect_faces(two, mtcnn)
    assert left.box[2] < width / 2 < right.box[0]
    (mirrored, _) = detect_faces(np.ascontiguousarray(two[:, ::-1]), mtcnn)
    assert mirrored.box[0] == pytest.approx(width - right.box[2], abs=0.03 * width)


def test_mtcnn_finds_a_face_in_a_tiny_picture(mtcnn):
    small = np.asarray(Image.open(portrait()).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
    assert len(detect_faces(small, mtcnn)) == 1


def test_mtcnn_finds_a_face_in_a_huge_picture_at_full_size(mtcnn):
    huge = np.asarray(Image.open(portrait()).convert("RGB").resize((5000, 5000)))
    (face,) = detect_faces(huge, mtcnn)
    (reference,) = detect_faces(pixels(portrait()), mtcnn)
    np.testing.assert_allclose(face.landmarks / 5000, reference.landmarks / 256, atol=0.01)


@pytest.mark.parametrize("name", [DRAWN[0], NAMES[0], NAMES[2]])
@pytest.mark.parametrize("cut", [0.0, 0.1, 0.15])
def test_mtcnn_places_landmarks_well_in_photos_cut_to_the_face(mtcnn, name, cut):
    """Within a tenth of the face's width; the bare package is off by up to half of it, or finds nothing."""
    whole = pixels(portrait(name))
    (reference,) = detect_faces(whole, mtcnn)
    corner, end = reference.box[:2], reference.box[2:]
    left, top = (corner + cut * (end - corner)).astype(int)
    right, bottom = (end - cut * (end - corner)).astype(int)
    (face,) = detect_faces(np.ascontiguousarray(whole[max(top, 0) : bottom, max(left, 0) : right]), mtcnn)
    off = np.abs(face.landmarks + np.array([max(left, 0), max(top, 0)]) - reference.landmarks).max()
    assert off < 0.1 * (end - corner)[0]


@pytest.mark.parametrize("names", [DRAWN[:2], NAMES[2:]], ids=["drawn", "photos"])
def test_looking_closer_at_one_person_does_not_turn_it_into_the_next(mtcnn, names):
    """A smaller and a larger face side by side, both cut by the picture's edge and in each other's window."""
    canvas = np.full((380, 520, 3), 128, np.uint8)
    for name, left, size in zip(names, (0, 240), ((240, 320), (280, 380)), strict=True):
        (face,) = detect_faces(pixels(portrait(name)), mtcnn)
        cut = Image.fromarray(pixels(portrait(name))).crop(tuple(face.box.astype(int))).resize(size)
        canvas[: size[1], left : left + size[0]] = np.asarray(cut)
    left_face, right_face = detect_faces(canvas, mtcnn)
    assert left_face.landmarks[:, 0].max() < 250
    assert right_face.landmarks[:, 0].min() > 250


@pytest.mark.parametrize("shape", [(32, 32), (19, 400), (32, 4000), (64, 64), (300, 200)])
def test_mtcnn_finds_nobody_in_noise_of_any_shape(mtcnn, shape):
    noise = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    assert detect_faces(noise, mtcnn) == []


def test_mtcnn_is_chosen_where_insightface_is_missing(without, no_home, tmp_path):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    (tmp_path / "det_10g.onnx").write_bytes(b"x")
    without("insightface", "onnxruntime")
    assert available_detectors([tmp_path]) == ["mtcnn"]
    assert get_detector(None, [tmp_path]).name == "mtcnn"


def test_without_any_detector_the_remedy_is_named(without, no_home):
    without("insightface", "onnxruntime", "facenet_pytorch")
    assert available_detectors([]) == []
    with pytest.raises(PortraitError, match="no face detector is installed.*--no-deps facenet-pytorch") as caught:
        get_detector(None, [])
    assert caught.value.status_code == 500


def test_an_unknown_detector_is_refused():
    with pytest.raises(PortraitError, match="'dlib' is not a detector. Use one of: insightface, mtcnn"):
        get_detector("dlib", [])


def test_insightface_asked_for_by_name_says_which_file_goes_where(no_home, tmp_path):
    with pytest.raises(PortraitError, match=r"det_10g.onnx were not found.*buffalo_l"):
        get_detector("insightface", [tmp_path])


def stand_in(monkeypatch, get_model) -> None:
    """An insightface package whose `get_model` is the given one."""
    package, zoo = types.ModuleType("insightface"), types.ModuleType("insightface.model_zoo")
    zoo.get_model = get_model
    monkeypatch.setitem(sys.modules, "insightface", package)
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", zoo)
    monkeypatch.setattr(detection, "_installed", lambda name: True)


@pytest.mark.parametrize("place", ["", "buffalo_l", "models/buffalo_l", "insightface/models/buffalo_l"])
def test_insightface_gets_bgr_at_640_and_its_answer_is_read(monkeypatch, tmp_path, no_home, place):
    file = tmp_path / place / "det_10g.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"weights")
    calls = []

    class Model:
        taskname, use_kps = "detection", True

        def prepare(self, ctx_id, input_size, det_thresh):
            calls.append((input_size, det_thresh))

        def detect(self, image, max_num, metric):
            calls.append(image[0, 0].tolist())
            return np.array([[10, 20, 122, 132, 0.8]]), LANDMARKS[None].astype(np.float64)

    stand_in(monkeypatch, lambda path, providers: calls.append(path) or Model())
    detector = get_detector(None, [tmp_path])
    assert detector.name == "insightface"
    image = np.zeros((200, 200, 3), np.uint8)
    image[..., 0] = 255
    (face,) = detector.find(image)
    assert calls == [str(file), ((640, 640), 0.5), [0, 0, 255]]
    assert face.score == pytest.approx(0.8)
    assert face.box.tolist() == [10, 20, 122, 132]
    np.testing.assert_allclose(face.landmarks, LANDMARKS)


def test_other_weights_of_insightface_are_another_detector(monkeypatch, tmp_path, no_home):
    model = types.SimpleNamespace(taskname="detection", use_kps=True, prepare=lambda **options: None)
    stand_in(monkeypatch, lambda path, providers: model)
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "det_10g.onnx").write_bytes(content)
        keys.add(get_detector("insightface", [tmp_path]).key)
    assert len(keys) == 2


def test_a_broken_insightface_is_passed_over_aloud(monkeypatch, tmp_path, no_home, caplog):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    (tmp_path / "det_10g.onnx").write_bytes(b"onnx")
    # As if importing it had failed.
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.model_zoo", None)
    monkeypatch.setattr(detection, "_installed", lambda name: True)
    assert get_detector(None, [tmp_path]).name == "mtcnn"
    assert "insightface does not start" in caplog.text and "mtcnn" in caplog.text
    with pytest.raises(PortraitError, match="does not start.*ModuleNotFoundError.*Repair or remove the packages"):
        get_detector("insightface", [tmp_path])


def test_damaged_weights_are_not_blamed_on_packages(monkeypatch, tmp_path, no_home):
    (tmp_path / "det_10g.onnx").write_bytes(b"not onnx")

    def broken(path, providers):
        raise RuntimeError("Protobuf parsing failed.")

    stand_in(monkeypatch, broken)
    with pytest.raises(PortraitError, match=r"det_10g.onnx is damaged.*Protobuf.*Fetch det_10g.onnx.*again") as caught:
        get_detector("insightface", [tmp_path])
    assert "package" not in caught.value.detail


@pytest.mark.parametrize("model", [None, types.SimpleNamespace(taskname="recognition"), "SCRFD without landmarks"])
def test_another_model_of_that_name_is_refused_when_it_is_loaded(monkeypatch, tmp_path, no_home, model):
    (tmp_path / "det_10g.onnx").write_bytes(b"another model")
    if isinstance(model, str):
        model = types.SimpleNamespace(taskname="detection", use_kps=False)
    stand_in(monkeypatch, lambda path, providers: model)
    with pytest.raises(PortraitError, match=r"det_10g.onnx holds a model that finds no faces.*Fetch") as caught:
        get_detector("insightface", [tmp_path])
    assert caught.value.field == "detector"


def test_damaged_weights_of_mtcnn_are_named_and_not_the_photo(monkeypatch):
    package = pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")

    def broken(**options):
        raise RuntimeError("PytorchStreamReader failed reading zip archive")

    monkeypatch.setattr(package, "MTCNN", broken)
    with pytest.raises(PortraitError, match="weights that come with facenet-pytorch are damaged.*force-reinstall"):
        detect_faces(np.zeros((64, 64, 3), np.uint8), get_detector("mtcnn", []))


def scrfd_that_sees(file: Path, box: tuple[int, int, int, int], landmarks: np.ndarray, score: float) -> None:
    """An ONNX file with SCRFD's nine outputs at 640 pixels that always reports this one face."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    outputs, nodes, constants = [], [], []
    column, row, stride, side = 10, 10, 32, 20
    centre = np.array([column, row]) * stride
    place = (row * side + column) * 2
    distances = np.array([*(centre - box[:2]), *(box[2:] - centre)]) / stride
    values = {
        1: np.array([score]),
        4: distances,
        10: ((landmarks - centre) / stride).reshape(10),
    }
    for width, value in values.items():
        for step in (8, 16, 32):
            name = f"out_{width}_{step}"
            table = np.zeros(((640 // step) ** 2 * 2, width), np.float32)
            if step == stride:
                table[place] = value
            constants.append(numpy_helper.from_array(table, f"{name}_values"))
            nodes.append(helper.make_node("Identity", [f"{name}_values"], [name]))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, table.shape))
    image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "h", "w"])
    graph = helper.make_graph(nodes, "scrfd", [image], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))


def test_the_real_insightface_reads_an_scrfd_file(tmp_path, no_home):
    for package in ("insightface", "onnxruntime", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    landmarks = LANDMARKS * 2 + np.float32(200)
    scrfd_that_sees(tmp_path / "det_10g.onnx", (200, 180, 440, 450), landmarks, 0.9)
    detector = get_detector(None, [tmp_path])
    assert detector.name == "insightface"
    (face,) = detect_faces(np.zeros((1280, 1280, 3), np.uint8), detector)
    np.testing.assert_allclose(face.box, [400, 360, 880, 900], atol=1e-2)
    np.testing.assert_allclose(face.landmarks, landmarks * 2, atol=1e-2)
    assert face.score == pytest.approx(0.9)


@pytest.mark.parametrize("content", ["another", "half", "text"])
def test_the_real_insightface_says_what_is_wrong_with_the_file(tmp_path, no_home, content):
    for package in ("insightface", "onnxruntime", "onnx"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnx
    from onnx import TensorProto, helper

    file = tmp_path / "det_10g.onnx"
    if content == "another":
        image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, 112, 112])
        out = helper.make_tensor_value_info("683", TensorProto.FLOAT, [1, 3, 112, 112])
        graph = helper.make_graph([helper.make_node("Identity", ["input.1"], ["683"])], "arcface", [image], [out])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(file))
    else:
        scrfd_that_sees(file, (200, 180, 440, 450), LANDMARKS * 2, 0.9)
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if content == "half" else b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(PortraitError) as caught:
        get_detector("insightface", [tmp_path])
    assert str(file) in caught.value.problem
    assert "Fetch det_10g.onnx" in caught.value.remedy
