"""Photos as users have them, in the real WebUI: lying on their side, from an iPhone, with bystanders."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image, ImageFilter

from tests.webui.server import Client
from tests.webui.world import KIT

pytestmark = pytest.mark.webui


def opened(photo: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(photo))).convert("RGB")


def sent(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def drawn(server: Client, photo: Any) -> Any:
    answer = server.generate({"checkpoint": KIT, "identities": [{"photos": [photo]}]})
    assert answer.status == 200, answer.detail
    return answer


def test_a_lying_photo_draws_the_same_person_and_says_that_it_was_turned(
    server: Client, people: dict[str, str]
) -> None:
    upright = opened(people["ada"])
    lying = sent(upright.transpose(Image.Transpose.ROTATE_90))
    first, second = (
        server.call("/portrait/detect", {"image": photo, "crops": True}).body["faces"][0]
        for photo in (people["ada"], lying)
    )
    assert (first["turn"], second["turn"]) == (0, 90)
    assert first["crop"] == second["crop"]
    assert second["notices"] == ["the photo was turned by 90° to the right"]
    left, top, right, bottom = first["box"]
    assert second["box"] == pytest.approx([top, upright.width - 1 - right, bottom, upright.width - 1 - left], abs=0.1)
    plain, turned = drawn(server, people["ada"]), drawn(server, lying)
    assert opened(plain.images[0]).tobytes() == opened(turned.images[0]).tobytes()
    assert "was turned by 90° to the right" in turned.info["infotexts"][0]
    assert "was turned" not in plain.info["infotexts"][0]


def test_a_blurred_bystander_is_counted_after_the_people_a_photo_is_of(server: Client, people: dict[str, str]) -> None:
    ada, ben, cleo = (opened(people[name]).resize((512, 512)) for name in ("ada", "ben", "cleo"))
    group = Image.new("RGB", (1536, 512))
    for place, face in enumerate((cleo.filter(ImageFilter.GaussianBlur(12)), ada, ben)):
        group.paste(face, (512 * place, 0))
    faces = server.call("/portrait/detect", {"image": sent(group)}).body["faces"]
    assert [face["index"] for face in faces] == [0, 1, 2]
    assert [int(face["box"][0] // 512) for face in faces] == [1, 2, 0]
    assert [face["bystander"] for face in faces] == [False, False, True]
    assert "far less sharp" in faces[2]["notices"][0]
    assert sum(face["largest"] for face in faces[:2]) == 1


def test_an_iphone_s_photo_is_read(server: Client, people: dict[str, str]) -> None:
    package = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    out = io.BytesIO()
    package.from_pillow(opened(people["ada"])).save(out, quality=95)
    answer = server.call("/portrait/detect", {"image": base64.b64encode(out.getvalue()).decode()})
    if "pillow-heif" in answer.detail:
        pytest.skip("the WebUI has no pillow-heif: start it once without --skip-prepare-environment")
    assert answer.status == 200, answer.detail
    assert len(answer.body["faces"]) == 1
