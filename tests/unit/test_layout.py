"""Control pictures, and people's places from a picture: skeletons and circles as drawn, faces from the left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner
from lib_portrait.control_picture import COLOURS, LIMBS, POINTS, Circle, heads, skeletons, with_circles
from lib_portrait.errors import PortraitError
from lib_portrait.faces.service import FaceService
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.request import Identity, Photo, PortraitRequest, Region, json_schema, parse_request, to_json
from trainer.shards import encode_png
from trainer.world import render, sample_scene

SIZE = (256, 256)


def head(x: float, y: float, width: float, ears: int = 2) -> np.ndarray:
    """A pose that is seen from the front: nose, neck, eyes and as many ears."""
    points = np.full((POINTS, 2), np.nan, np.float32)
    points[0], points[1] = (x, y), (x, y + width)
    points[14], points[15] = (x - width / 5, y - width / 5), (x + width / 5, y - width / 5)
    for ear, side in ((16, -1), (17, 1))[:ears]:
        points[ear] = x + side * width / 2, y - width / 6
    return points


def test_a_skeleton_has_limbs_where_both_ends_are_seen_and_points_on_them() -> None:
    pose = head(128, 100, 60)
    drawn = skeletons([pose], SIZE)
    assert drawn.shape == (256, 256, 3) and tuple(drawn[100, 128]) == COLOURS[0]
    for (start, end), colour in zip(LIMBS, COLOURS):
        ends = pose[[start, end]]
        if np.isfinite(ends).all():
            x, y = ends.mean(axis=0).round().astype(int)
            assert np.abs(drawn[y, x].astype(int) - np.array(colour) * 0.6).max() < 2
    assert not drawn[170:].any() and not skeletons([np.full((POINTS, 2), np.nan)], SIZE).any()


def test_circles_lie_on_the_whole_picture_whatever_part_is_shown() -> None:
    circles = [Circle(0.5, 0.25, 0.1, (255, 0, 0)), Circle(0.55, 0.25, 0.05, (0, 0, 255))]
    drawn = with_circles(torch.zeros(1, 3, 200, 100), circles)[0]
    x, y = torch.meshgrid(torch.arange(100) + 0.5, torch.arange(200) + 0.5, indexing="xy")
    red = (x - 50) ** 2 + (y - 50) ** 2 <= 10**2
    blue = (x - 55) ** 2 + (y - 50) ** 2 <= 5**2
    assert torch.equal(drawn[2] > 0, blue) and torch.equal(drawn[0] > 0, red & ~blue)
    part = with_circles(torch.zeros(3, 200, 100), circles, (0.25, 0.0, 0.75, 0.5))
    assert (part[0] > 0).sum() == pytest.approx(4 * int((red & ~blue).sum()), rel=0.05)
    assert float(part[2, 100, 60]) == 1.0 and not drawn[1].any()


def test_heads_of_a_skeleton_are_found_from_the_left() -> None:
    people = [head(180, 120, 40), head(70, 90, 60), head(120, 200, 30, ears=1)]
    found = heads(skeletons(people, SIZE))
    assert len(found) == 3 and [round((x0 + x1) / 2) for x0, _, x1, _ in found[::2]] == [70, 180]
    for (x0, y0, x1, y1), (x, y, width) in zip(found[::2], ((70, 90, 60), (180, 120, 40))):
        assert (x0, x1) == pytest.approx((x - width / 2, x + width / 2), abs=1.5)
        assert (y0, y1) == pytest.approx((y - 0.65 * width, y + 0.65 * width), abs=2)
    assert heads(np.full((64, 64, 3), 90, np.uint8)) == [] and heads(np.zeros((64, 64, 3), np.uint8)) == []


@pytest.mark.parametrize("seed", [1, 2, 5, 19])
def test_the_poses_of_the_world_show_its_faces(seed: int) -> None:
    picture = render(sample_scene(seed), 256)
    found = heads(skeletons([face.pose for face in picture.faces], SIZE))
    assert len(found) == len(picture.faces)
    for box, face in zip(found, sorted(picture.faces, key=lambda face: face.box[0])):
        x0, y0, x1, y1 = face.box
        assert x0 < (box[0] + box[2]) / 2 < x1 and y0 < (box[1] + box[3]) / 2 < y1
        assert 0.5 < (box[2] - box[0]) / (x1 - x0) < 2
        # The eyes of the pose are those of the landmarks, left in the picture before right.
        seen = np.isfinite(face.pose[14:16]).all(axis=1)
        assert np.allclose(face.pose[14:16][seen], face.landmarks[:2][seen]) and np.allclose(
            face.pose[0], face.landmarks[2]
        )
        assert face.pose[2, 0] < face.pose[1, 0] < face.pose[5, 0] and face.pose[1, 1] > face.pose[0, 1]


# ------------------------------------------------------------------------------------------------------ in requests


@pytest.fixture
def conditioner(tmp_path: Path) -> Conditioner:
    store = Store(Folders([tmp_path]), adapter_files())
    return Conditioner(FaceService([], tmp_path / "cache"), store)


def layout(*people: np.ndarray, size: tuple[int, int] = SIZE) -> Photo:
    return Photo.of(encode_png(skeletons(people, size)))


def asked(*regions: Region | None, picture: Photo) -> PortraitRequest:
    person = Photo("a" * 64)
    identities = tuple(Identity((person,), region=region) for region in regions)
    return PortraitRequest(identities, layout=picture)


def test_people_without_a_region_get_the_faces_from_the_left(conditioner: Conditioner) -> None:
    own = Region(box=(0.0, 0.0, 0.1, 0.1))
    picture = layout(head(180, 120, 40), head(70, 90, 60), head(220, 60, 24))
    request, notices = conditioner.placed(asked(None, own, None, picture=picture), (512, 512))
    assert request.layout is None and request.identities[1].region == own
    boxes = [identity.region.box for identity in request.identities if identity.region is not None]
    assert boxes[0] == pytest.approx((40 / 256, 51 / 256, 100 / 256, 129 / 256), abs=0.01)
    assert boxes[2] == pytest.approx((160 / 256, 94 / 256, 200 / 256, 146 / 256), abs=0.01)
    assert [str(one) for one in notices] == ["layout: it shows 3 faces, of which the first 2 from the left are taken."]
    same, told = conditioner.placed(request, (512, 512))
    assert same is request and not told


def test_more_people_than_faces_is_an_error_that_names_both(conditioner: Conditioner) -> None:
    with pytest.raises(PortraitError, match=r"shows 1 faces, and 2 people.*identities\[0\], identities\[1\]") as caught:
        conditioner.placed(asked(None, None, picture=layout(head(70, 90, 60))), (512, 512))
    assert caught.value.field == "layout"


def test_a_layout_of_another_shape_or_that_cannot_be_read_is_refused(conditioner: Conditioner) -> None:
    with pytest.raises(PortraitError, match="their shapes differ"):
        conditioner.placed(asked(None, picture=layout(head(70, 90, 60))), (512, 768))
    with pytest.raises(PortraitError, match="layout"):
        conditioner.placed(asked(None, picture=Photo.of(b"no picture")), (512, 512))
    with pytest.raises(PortraitError, match="not kept here"):
        conditioner.placed(asked(None, picture=Photo("b" * 64)), (512, 512))


def test_a_face_at_the_edge_is_taken_as_far_as_it_is_there(conditioner: Conditioner) -> None:
    request, _ = conditioner.placed(asked(None, picture=layout(head(128, 20, 60))), (512, 512))
    region = request.identities[0].region
    assert region is not None and region.box is not None and region.box[1] == 0.0 and region.box[3] > 0.2


def test_the_request_says_it_as_it_says_photos() -> None:
    digits = f"sha256:{'a' * 64}"
    form: dict[str, Any] = {"identities": [{"photos": [digits]}], "layout": digits}
    assert to_json(parse_request(form)) == form and jsonschema.Draft202012Validator(json_schema()).is_valid(form)
    for wrong in (1, "no base64!", {"picture": digits}):
        with pytest.raises(PortraitError) as caught:
            parse_request({**form, "layout": wrong})
        assert caught.value.field.startswith("layout")
    assert parse_request({**form, "layout": None}).layout is None
