"""Who is left out on purpose, in some cells of a plot, or by an extension that draws on its own: it is said."""

from __future__ import annotations

import base64
import io
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.webui.conftest import webui_python
from tests.webui.oracle import Oracle, assert_nobody_is_seen
from tests.webui.server import Client, Recording, plotted, running
from tests.webui.test_matrix import one, two
from tests.webui.world import KIT, World

pytestmark = pytest.mark.webui


def said(answer: Any, key: str = "Portrait notices") -> str:
    assert answer.status == 200, answer.detail
    return answer.info["extra_generation_params"].get(key, "")


@pytest.mark.parametrize(
    ("changes", "first", "notice"),
    [
        ({"scale": 0}, {}, "scale: it is 0: nobody is drawn."),
        ({}, {"scale": 0}, "identities[0].scale: it is 0: this person is not drawn."),
        ({"lora_scale": 0}, {}, "lora_scale: it is 0: the adapter's LoRA is left out."),
    ],
)
def test_what_was_left_out_on_purpose_is_noticed(
    server: Client, people: dict[str, str], changes: dict[str, Any], first: dict[str, Any], notice: str
) -> None:
    identities = [{"photos": [people["ada"]], **first}, {"photos": [people["ben"]]}]
    answer = server.generate({"checkpoint": KIT, "identities": identities, **changes})
    assert said(answer) == notice
    assert notice in answer.info["infotexts"][0]


def test_a_window_in_one_of_two_passes_is_enough(server: Client, people: dict[str, str]) -> None:
    late = {"checkpoint": KIT, "identities": [{"photos": [people["ada"]], "start": 0.7}]}
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7}
    assert server.generate(late, **hires, steps=4, hr_second_pass_steps=2).status == 200
    assert server.generate(late, **hires, steps=2, hr_second_pass_steps=4).status == 200
    assert server.generate(late, **hires, steps=2, hr_second_pass_steps=2).status == 422


@pytest.mark.parametrize("broken", ["!!!", base64.b64encode(b"no picture").decode()])
def test_nothing_is_read_of_a_request_that_is_switched_off(
    server: Client, oracle: Oracle, people: dict[str, str], broken: str
) -> None:
    off = {"enabled": False, "identities": [{"photos": [broken], "scale": 99}], "unknown": 1}
    recording = server.record(off)
    assert recording.answer.status == 200, recording.answer.detail
    assert_nobody_is_seen(recording, oracle)


# ---------------------------------------------------------------------------------------------------------------- plots


def test_a_plot_says_which_cells_failed_and_keeps_the_others(server: Client, people: dict[str, str]) -> None:
    late = {"checkpoint": KIT, "identities": [{"photos": [people["ada"]], "start": 0.7}]}
    body = plotted(server, {"script_name": "x/y/z plot", "script_args": ["Steps", "4,2,3"]})
    answer = server.generate(late, **body)
    assert said(answer, "Portrait faults").startswith("1 of 3 cells: identities[0].start: no step of the sampling")
    _, four, two, three = answer.info["infotexts"]
    assert ["Portrait faults" in text for text in (four, two, three)] == [False, True, True]
    pictures = [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in answer.images[1:]]
    assert all(len(picture.convert("L").getcolors()) > 1 for picture in pictures), "words instead of black"
    assert server.generate(one(people)).status == 200


def test_a_plot_without_a_fault_says_nothing(server: Client, people: dict[str, str]) -> None:
    body = plotted(server, {"script_name": "x/y/z plot", "script_args": ["[Portrait] ID scale", "0.5,1"]})
    answer = server.generate(two(people), **body)
    assert said(answer, "Portrait faults") == ""
    assert len({*answer.images[1:]}) == 2


# ------------------------------------------------------------------------------------------------------------ ADetailer


@pytest.fixture(scope="module")
def with_adetailer(webui_dir: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A WebUI that has ADetailer as well."""
    extension = webui_dir / "extensions" / "adetailer"
    if not (extension / "scripts" / "!adetailer.py").is_file():
        pytest.skip(f"no ADetailer in {extension.parent}: install Bing-su/adetailer there")
    python = webui_python(webui_dir)
    there = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('mediapipe', 'ultralytics'))))"
    if subprocess.run([str(python), "-c", there], check=False).returncode:
        pytest.skip("the WebUI's Python has no mediapipe or ultralytics, which ADetailer needs")
    with running(webui_dir, python, world.models, tmp_path_factory.mktemp("webui-adetailer"), [extension]) as client:
        yield client


def detail(client: Client, people: dict[str, str], names: str, portrait: Any = None, **tab: Any) -> Recording:
    """img2img of one step, then the face of the photo given drawn anew by ADetailer in two (0.4 of 4, and one more)."""
    photo = Image.open(io.BytesIO(base64.b64decode(people["ben"]))).convert("RGB").resize((512, 512))
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    settings = {"ad_model": "mediapipe_face_short", "ad_denoising_strength": 0.4, "ad_mask_k": 1, **tab}
    with client.options(ad_script_names=names):
        return client.record(
            portrait,
            alwayson_scripts={"ADetailer": {"args": [True, True, settings]}},
            init_images=[base64.b64encode(stream.getvalue()).decode()],
            steps=4,
        )


def marks(recording: Recording) -> list[int]:
    return [call["marks"] for call in recording.calls]


def test_adetailer_draws_the_person_where_its_setting_names_portrait(
    with_adetailer: Client, people: dict[str, str]
) -> None:
    recording = detail(with_adetailer, people, "negpip, portrait", one(people))
    assert said(recording.answer) == ""
    assert marks(recording) == [1, 1, 1], "the picture's step and the face's two"
    again = detail(with_adetailer, people, "negpip, portrait", two(people, show_routing=True))
    assert marks(again) == [1, 1, 1]
    assert len(again.answer.images) == 2


def test_adetailer_without_the_person_is_noticed(with_adetailer: Client, people: dict[str, str]) -> None:
    recording = detail(with_adetailer, people, "negpip", one(people))
    assert marks(recording) == [1, 0, 0]
    assert said(recording.answer) == (
        "ADetailer: it draws faces anew without their people: add \"portrait\" to the script names in "
        "Settings > ADetailer."
    )  # fmt: skip
    assert said(with_adetailer.generate(one(people))) == "", "it is not enabled here"


def test_a_fault_inside_adetailer_is_heard(with_adetailer: Client, people: dict[str, str]) -> None:
    own = {"ad_use_sampler": True, "ad_sampler": "DDIM", "ad_use_steps": True, "ad_steps": 1}
    recording = detail(with_adetailer, people, "portrait", one(people), **own)
    assert marks(recording) == [1]
    assert recording.answer.status == 422
    assert recording.answer.detail.startswith("steps: DDIM drew no step")
    assert with_adetailer.generate(one(people)).status == 200
