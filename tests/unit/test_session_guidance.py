"""Reference guidance in the life of a request in the WebUI, on the stand-in for it: with a method and with none."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from PIL import Image

from lib_portrait.errors import PortraitError
from lib_portrait.guidance.reference import ReferenceGuidance
from tests.host_stand_in import LOOPBACK, Host, Img2Img, Processing
from tests.unit.test_session import (  # noqa: F401
    ADA,
    BEN,
    LEFT,
    OFF,
    RIGHT,
    differ,
    folder,
    host,
    images,
    one,
    ours,
    outputs,
    photo,
    refused,
    traces,
    unets,
    untouched,
)

GUIDANCE = {"begin": 1.0, "gradient": "share", "strength": 0.5}


def alone(*identities: dict[str, Any], **guidance: Any) -> tuple[Any, ...]:
    people = list(identities or [{"photos": [ADA], "region": LEFT}])
    return ({"method": "none", "identities": people, "guidance": {**GUIDANCE, **guidance}}, "")


def with_method(**guidance: Any) -> tuple[Any, ...]:
    (request, *_) = one(region=LEFT)
    return ({**request, "guidance": {**GUIDANCE, **guidance}}, "")


@pytest.mark.parametrize("values", [alone(), with_method()], ids=["alone", "with a method"])
@pytest.mark.parametrize(
    "own",
    [{}, {"batch_size": 2, "n_iter": 2}, {"enable_hr": True, "denoising_strength": 0.7}, {"mapping": True},
     {"sampler_name": "Heun"}],
    ids=["plain", "batches", "hires", "mapping", "second order"],
)  # fmt: skip
def test_it_changes_every_row_and_leaves_nothing(host: Host, values: Any, own: dict[str, Any]) -> None:  # noqa: F811
    (request, _) = values
    off = OFF if request.get("method") == "none" else ({**request, "guidance": {"enabled": False}}, "")
    plain = images(host.generate(Processing(host, off, **own)))
    without = [call for call in host.calls if call.output is not None]
    del host.calls[:]
    p = Processing(host, values, **own)
    guided = host.generate(p)
    assert all(a != b for a, b in zip(images(guided), plain, strict=True))
    # Before them come the looks at the reference.
    drawn = outputs(host)[-len(without) :]
    assert all(all(differ(a, b.output)) for a, b in zip(drawn, without, strict=True))
    assert ours(p) == {"Portrait"} | ({"Portrait notices"} & ours(p)) and p.comments.keys() <= {
        "Portrait: guidance: the mask is the oval of the face's landmarks: there is no face parser "
        "(portrait.py download facexlib)."
    }
    assert images(host.generate(Processing(host, off, **own))) == plain
    assert host.reported == []


def test_it_is_prepared_for_each_model_of_a_sampling(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: list[str] = []
    prepare = ReferenceGuidance.prepare
    monkeypatch.setattr(
        ReferenceGuidance, "prepare", lambda self, asked: seen.append(asked.sd_model.name) or prepare(self, asked)
    )
    own = {"steps": 4, "refiner_checkpoint": "second", "refiner_switch_at": 0.5}
    plain = images(host.generate(Processing(host, OFF, **own)))
    assert images(host.generate(Processing(host, alone(), **own))) != plain
    assert seen == ["first", "second"]


REFUSED = [
    (alone(begin=0.0), {}, "guidance.begin", "no step of the sampling"),
    (alone({"photos": [ADA]}), {}, "identities[0]", "region"),
    (alone({"photos": [ADA], "region": LEFT}, {"photos": [BEN]}), {}, "identities[1]", "region"),
    (alone(where="routing"), {}, "identities[0].region", "no routing map"),
    (alone(block=3), {}, "guidance.block", "Give a whole number"),
]


@pytest.mark.parametrize(("values", "own", "field", "word"), REFUSED, ids=[case[2] for case in REFUSED])
def test_where_it_did_nothing_there_is_no_picture(
    host: Host,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    values: Any,
    own: dict[str, Any],
    field: str,
    word: str,
) -> None:
    monkeypatch.setattr(sys.modules["lib_portrait.faces.service"].FaceService, "ovals", lambda self, picture: [])
    if field == "guidance.block":
        values = (
            {**values[0], "guidance": {**GUIDANCE, "block": 3}},
            "",
        )
        monkeypatch.setattr("lib_portrait.guidance.features.decoder_blocks", lambda unet: ["a", "b", "c"])
    with pytest.raises(PortraitError, match=word) as caught:
        host.generate(Processing(host, values, **own))
    assert caught.value.field == field
    assert [text for text in host.reported if text.startswith("Error running")] == []


def test_a_face_that_is_found_guides_without_a_region(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    left = torch.zeros(64, 64, dtype=torch.bool)
    left[:, :32] = True
    service = sys.modules["lib_portrait.faces.service"].FaceService
    monkeypatch.setattr(service, "ovals", lambda self, picture: [left.numpy()])
    found = images(host.generate(Processing(host, alone({"photos": [ADA]}))))
    told = images(host.generate(Processing(host, alone())))
    assert found == told


def test_a_picture_of_a_batch_in_which_nobody_is_found_is_told(
    host: Host,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faces: list[Any] = []
    service = sys.modules["lib_portrait.faces.service"].FaceService

    def ovals(self: Any, picture: Any) -> list[Any]:
        faces.append(picture)
        return [picture[..., 0] >= 0] if len(faces) % 2 else []

    monkeypatch.setattr(service, "ovals", ovals)
    p = Processing(host, alone({"photos": [ADA]}), batch_size=2, steps=1)
    host.generate(p)
    assert (
        "Portrait: identities[0]: reference guidance found this person at no step in picture 2 of the batch."
        in p.comments
    )


def test_a_strength_of_0_draws_what_there_is_without_it_and_says_so(host: Host) -> None:  # noqa: F811
    plain = images(host.generate(Processing(host, OFF)))
    p = Processing(host, alone(strength=0))
    assert images(host.generate(p)) == plain
    assert "a strength of 0 leaves reference guidance out" in p.extra_generation_params["Portrait notices"]


def test_in_pieces_it_cannot_be_drawn(host: Host) -> None:  # noqa: F811
    def tiled(unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        halves = x.chunk(2, dim=-1)
        return torch.cat([unet(half, timesteps, context=context) for half in halves], dim=-1)

    host.run = tiled
    with pytest.raises(PortraitError, match="in pieces") as caught:
        host.generate(Processing(host, alone()))
    assert caught.value.field == "guidance"


def test_what_was_interrupted_is_no_fault(host: Host) -> None:  # noqa: F811
    host.before_call = lambda step: setattr(host.state, "interrupted", True)
    assert len(host.generate(Processing(host, alone({"photos": [ADA]}))).images) == 1


def test_a_fault_within_a_guided_step_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def fails(self: Any, features: Any, current: Any) -> Any:
        raise RuntimeError("planted")

    with monkeypatch.context() as patched:
        patched.setattr(ReferenceGuidance, "energy", fails)
        with pytest.raises(RuntimeError, match="planted"):
            host.generate(Processing(host, alone()))
    assert torch.is_grad_enabled()
    assert images(host.generate(Processing(host, OFF))) and host.generate(Processing(host, alone())).images


def test_where_it_acted_is_shown_behind_the_pictures_and_saved_beside_them(host: Host) -> None:  # noqa: F811
    p = Processing(host, alone(show=True), batch_size=2, n_iter=2, saves=True)
    processed = host.generate(p)
    assert len(processed.images) == 8 and len(processed.infotexts) == 8
    assert all(isinstance(one, Image.Image) and one.height > one.width for one in processed.images[4:])
    p = Processing(host, alone(show=True), LOOPBACK)
    assert len(host.generate(p).images) == 1
    assert "no place for pictures of reference guidance" in p.extra_generation_params["Portrait notices"]


def test_the_infotext_says_what_is_not_the_default_and_what_a_kit_says(
    host: Host,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def said(values: Any) -> str:
        p = Processing(host, values)
        host.generate(p)
        return str(p.extra_generation_params["Portrait"])

    assert said(alone()).startswith(
        "none; guidance; guidance.strength 0.5; guidance.begin 1; guidance.gradient share | "
    )
    store = sys.modules["lib_portrait.checkpoints.store"].Store
    monkeypatch.setattr(store, "guidance", lambda self, manifest, base: {"block": 2.0, "strength": 9.0, "power": 2.0})
    text = said(({"method": "none", "guidance": {"begin": 1}, "identities": [{"photos": [ADA], "region": RIGHT}]}, ""))
    assert text.startswith(
        "none; guidance; guidance.strength 9; guidance.begin 1; guidance.block 2; guidance.power 2 | "
    )


def test_a_pass_of_adetailer_need_not_show_everybody(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys.modules["lib_portrait.faces.service"].FaceService, "ovals", lambda self, picture: [])
    p = Img2Img(host, alone({"photos": [ADA]}))
    p._ad_inner = True
    assert len(host.generate(p).images) == 1
    assert photo and traces


def test_a_region_lies_on_the_whole_picture_where_only_its_masked_part_is_sampled(host: Host) -> None:  # noqa: F811
    """The crop shows the lower right quarter: a region of just that is all of it, half of it is not."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 32, 64, 64))

    def drawn(region: list[float]) -> list[bytes]:
        values = alone({"photos": [ADA], "region": {"box": region}})
        return images(host.generate(Img2Img(host, values, image_mask=mask)))

    everywhere = drawn([0.0, 0.0, 1.0, 1.0])
    assert drawn([0.5, 0.5, 1.0, 1.0]) == everywhere
    assert drawn([0.5, 0.5, 0.75, 1.0]) != everywhere
