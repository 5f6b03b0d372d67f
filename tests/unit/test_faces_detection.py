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
from lib_portrait.faces.alignment import template
from lib_portrait.faces.detection import Detector, Face, available_detectors, detect_faces, get_detector
from tests.portraits import DRAWN, NAMES, portrait

LANDMARKS = template(112)


def face_at(x: float, y: float, size: float = 112, score: float = 0.99) -> Face:
    box = np.array([x, y, x + size, y + size], np.float32)
    return Face(box, LANDMARKS * (size / 112) + np.array([x, y], np.float32), score)


def scripted(*answers: list[Face]) -> tuple[Detector, list[np.ndarray]]:
    """A detector that gives one answer after the other, and the list of what it was shown."""
    seen: list[np.ndarray] = []

    def find(image):
        seen.append(image)
        return answers[len(seen) - 1]

    return Detector("scripted", "1", find), seen


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


@pytest.mark.parametrize("name", [*DRAWN[:2], NAMES[0], NAMES[2]])
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
    stand_in(monkeypatch, lambda path, providers: types.SimpleNamespace(prepare=lambda **options: None))
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "det_10g.onnx").write_bytes(content)
        keys.add(get_detector("insightface", [tmp_path]).key)
    assert len(keys) == 2


def test_a_broken_insightface_is_passed_over_aloud(monkeypatch, tmp_path, no_home, caplog):
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    (tmp_path / "det_10g.onnx").write_bytes(b"not onnx")

    def broken(path, providers):
        raise ImportError("numpy.core.multiarray failed to import")

    stand_in(monkeypatch, broken)
    assert get_detector(None, [tmp_path]).name == "mtcnn"
    assert "multiarray" in caplog.text and "mtcnn" in caplog.text
    with pytest.raises(PortraitError, match="does not start.*multiarray.*Repair"):
        get_detector("insightface", [tmp_path])


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
