"""The life of a request in the WebUI, on a stand-in for it: what is drawn, what is refused where, what is left."""

from __future__ import annotations

import base64
import copy
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lib_portrait.checkpoints.store import AUTOMATIC
from lib_portrait.errors import PortraitError
from lib_portrait.methods.base import Rule
from tests.host_stand_in import LOOPBACK, PLOT, UPSCALE, Host, Img2Img, Processed, Processing, standing_in
from tests.parity.unets import ldm_config, ldm_unet
from tests.small_networks import small_kit

OFF = ({"enabled": False}, "")
LEFT = {"box": [0, 0, 0.5, 1]}
RIGHT = {"box": [0.5, 0, 1, 1]}


def photo(seed: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"image": base64.b64encode(stream.getvalue()).decode(), "aligned": True}


ADA, BEN = photo(1), photo(2)


def one(**changes: Any) -> tuple[Any, ...]:
    """The panel's values for one person; changes: to the identity."""
    return ask({"photos": [ADA], **changes})


def ask(*identities: dict[str, Any], **changes: Any) -> tuple[Any, ...]:
    return ({"checkpoint": "small", "identities": list(identities), **changes}, "")


def two(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, **changes: Any) -> tuple[Any, ...]:
    return ask({"photos": [ADA], **(first or {})}, {"photos": [BEN], **(second or {})}, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("host")
    (place / "models" / "Portrait").mkdir(parents=True)
    small_kit(place / "models" / "Portrait", "small")
    return place


@pytest.fixture(scope="module")
def unets() -> dict[str, torch.nn.Module]:
    """Two checkpoints of one family."""
    first = ldm_unet()
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        parameter.data.mul_(0.97)
    return {"first": first, "second": second}


@pytest.fixture(scope="module")
def untouched(unets: dict[str, torch.nn.Module]) -> dict[str, dict[str, Any]]:
    return {name: traces(unet) for name, unet in unets.items()}


@pytest.fixture
def host(folder: Path, unets: dict[str, torch.nn.Module], untouched: dict[str, dict[str, Any]]) -> Iterator[Host]:
    """The host; nothing may be left in its UNets nor on its progress bar, whatever a test does."""
    host = Host(folder, unets)
    with standing_in(host.modules):
        host.load_portrait()
        yield host
    host.take_hooks_off()
    assert host.state.textinfo is None
    assert {name: traces(unet) for name, unet in unets.items()} == untouched


def traces(unet: torch.nn.Module) -> dict[str, Any]:
    """Whatever an injection could have left in a UNet: attributes, hooks and written weights of every module."""
    found: dict[str, Any] = {}
    for name, module in unet.named_modules():
        hooks = sum(len(value) for key, value in vars(module).items() if "hooks" in key and value)
        found[name] = sorted(vars(module)), hooks
    for name, parameter in unet.named_parameters():
        found[f"{name}:"] = parameter.data_ptr(), parameter._version, parameter.grad
    return found


def ours(p: Any) -> set[str]:
    """What of Portrait hangs on a processing object, and its keys of the infotext. The job stays as long as it does."""
    held = {
        name
        for name, value in vars(p).items()
        if name != "portrait_job" and (name.startswith("portrait") or "lib_portrait" in type(value).__module__)
    }
    return held | {key for key in p.extra_generation_params if key.startswith("Portrait")}


def images(processed: Processed) -> list[bytes]:
    return [image.tobytes() for image in processed.images]


def outputs(host: Host) -> list[torch.Tensor]:
    """What every UNet call gave since the last time."""
    calls, host.calls[:] = list(host.calls), []
    return [call.output for call in calls if call.output is not None]


def differ(first: torch.Tensor, second: torch.Tensor) -> list[bool]:
    """For each row whether it differs."""
    return [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]


def refused(host: Host, p: Any, calls: int = 0) -> PortraitError:
    """The fault with which a request ends, after that many calls of the UNet; nothing of it was left to a callback."""
    del host.calls[:]
    with pytest.raises(PortraitError) as caught:
        host.generate(p)
    assert len(outputs(host)) == calls
    assert [text for text in host.reported if text.startswith("Error running")] == []
    return caught.value


# ------------------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, {}),
        ({"batch_cond_uncond": False}, {"batch_size": 2}),
        ({}, {"batch_size": 2, "n_iter": 2}),
        ({}, {"tokens": (9, 6)}),
        ({"pad_cond_uncond": True}, {"tokens": (9, 6)}),
        ({"pad_cond_uncond": True}, {"tokens": (6, 9), "mapping": True}),
        ({"pad_cond_uncond_v0": True}, {"tokens": (6, 9)}),
        ({"skip_early_cond": 0.5}, {}),
        ({}, {"mapping": True}),
        ({}, {"batch_size": 2, "prompts_of_each": [2, 1]}),
        ({}, {"enable_hr": True, "denoising_strength": 0.7}),
        ({}, {"sampler_name": "Heun", "steps": 2}),
    ],
    ids=["together", "apart", "batches", "lengths", "padded", "padded mapping", "cut", "no negative", "mapping", "AND",
         "hires", "second order"],
)  # fmt: skip
def test_every_row_of_the_sampling_has_the_people_and_the_hosts_own_context(
    host: Host, options: dict[str, Any], own: dict[str, Any]
) -> None:
    vars(host.opts).update(options)
    plain = images(host.generate(Processing(host, OFF, **own)))
    vanilla = [*host.calls]
    del host.calls[:]
    p = Processing(host, two(), **own)
    drawn = host.generate(p)
    assert all(a != b for a, b in zip(images(drawn), plain, strict=True))
    assert all(all(differ(a.output, b.output)) for a, b in zip(host.calls, vanilla, strict=True))
    # What a neighbour's hook sees of the text is what the host made of it.
    assert [call.context.shape for call in host.calls] == [call.context.shape for call in vanilla]
    assert all(torch.equal(a.context, b.context) for a, b in zip(host.calls, vanilla, strict=True))
    assert ours(p) == {"Portrait"}
    assert images(host.generate(Processing(host, OFF, **own))) == plain
    assert host.reported == []


def test_rows_get_the_same_however_the_host_joins_them(host: Host) -> None:
    def rows(**options: Any) -> torch.Tensor:
        vars(host.opts).update(options)
        host.generate(Processing(host, two(), steps=1, batch_size=2))
        return torch.cat(outputs(host))

    together = rows()
    torch.testing.assert_close(rows(batch_cond_uncond=False), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows(skip_early_cond=1.0), together[:2], atol=1e-5, rtol=1e-5)


def asks_the_host(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> list[str]:
    """Has rules ask the host for a UNet call before they draw; the checkpoints that were asked, by name."""
    asked: list[str] = []

    def prepare(rule: Any, host: Any) -> None:
        asked.append(host.sd_model.name)
        host.call(torch.zeros(1, 4, 8, 8), torch.tensor(500), host.text("a person"))
        if len(asked) == fails_at:
            raise PortraitError("photos", "they cannot be seen by this model", "Use others.")

    monkeypatch.setattr(Rule, "prepare", prepare)
    return asked


CHANGES = [
    ({"n_iter": 2}, ["first", "first"]),
    ({"steps": 4, "refiner_checkpoint": "second", "refiner_switch_at": 0.5}, ["first", "second"]),
    ({"enable_hr": True, "denoising_strength": 0.7, "hr_checkpoint_name": "second"}, ["first", "second"]),
    ({"enable_hr": True, "denoising_strength": 0.7}, ["first"]),
]


@pytest.mark.parametrize(("own", "expected"), CHANGES)
def test_a_rule_is_prepared_once_for_each_model_of_a_sampling(
    host: Host, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], expected: list[str]
) -> None:
    drawn = images(host.generate(Processing(host, one(), **own)))
    calls = len(outputs(host))
    asked = asks_the_host(monkeypatch)
    # What it asks for is none of the sampling's, and changes nothing there.
    assert images(host.generate(Processing(host, one(), **own))) == drawn
    assert asked == expected
    assert len(outputs(host)) == calls + len(expected)
    assert host.reported == []


@pytest.mark.parametrize(("own", "calls"), [(CHANGES[0][0], 1), (CHANGES[1][0], 1 + 2 + 1)])
def test_a_rule_that_cannot_be_prepared_ends_the_request(
    host: Host, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], calls: int
) -> None:
    asked = asks_the_host(monkeypatch, fails_at=1 if calls == 1 else 2)
    error = refused(host, Processing(host, one(), **own), calls)
    assert "cannot be seen by this model" in str(error)
    assert len(asked) == (1 if calls == 1 else 2)


def test_the_hosts_conditions_are_not_written_to(host: Host) -> None:
    """The host uses them for every step, and shares them among extensions."""
    p = Processing(host, one(), mapping=True)
    host.generate(p)
    assert [(set(cond), cond["crossattn"].shape) for cond in (p.c, p.uc)] == [
        ({"crossattn", "vector"}, (1, 6, 48)),
        ({"crossattn", "vector"}, (1, 6, 48)),
    ]


def test_a_person_is_there_within_their_window_only(host: Host) -> None:
    def first_difference(**window: float) -> list[bool]:
        """Of each step, drawn from the same latent in both."""
        host.run = lambda unet, x, timesteps, context: unet(torch.ones_like(x), timesteps, context=context)
        host.generate(Processing(host, OFF, steps=4))
        plain = outputs(host)
        host.generate(Processing(host, one(**window), steps=4))
        return [all(differ(a, b)) for a, b in zip(outputs(host), plain, strict=True)]

    assert first_difference(start=0.5) == [False, False, True, True]
    assert first_difference(end=0.5) == [True, True, False, False]
    assert first_difference(start=0.25, end=0.5) == [False, True, False, False]


def test_the_same_request_gives_the_same_picture_and_leaves_the_random_numbers(host: Host) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    # A photo that no other test has: the face networks are made for it, which draws random numbers.
    values = two(second={"photos": [photo(3)]})
    first = images(host.generate(Processing(host, values)))
    assert torch.equal(torch.get_rng_state(), before)
    assert images(host.generate(Processing(host, values))) == first


def test_what_is_being_prepared_is_shown_and_taken_away(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str | None] = []
    host.before_call = lambda step: shown.append(host.state.textinfo)
    load = sys.modules["lib_portrait.checkpoints.store"].read_tensors
    monkeypatch.setattr(
        "lib_portrait.checkpoints.store.read_tensors", lambda *args: shown.append(host.state.textinfo) or load(*args)
    )
    host.generate(Processing(host, one(), steps=1))
    *preparing, sampling = shown
    assert preparing[:2] == ["Portrait: loading the adapter"] * 2 and sampling is None


def test_calls_of_others_during_the_sampling_are_left_alone(host: Host) -> None:
    """A neighbour may ask the UNet about something of its own between two steps."""
    plain, injected = [], []

    def ask_aside(found: list[torch.Tensor]) -> Callable[[int], None]:
        def before_call(step: int) -> None:
            ones = torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 6, 48)
            found.append(host.unet(ones[0], ones[1], context=ones[2]).detach())

        return before_call

    host.before_call = ask_aside(plain)
    host.generate(Processing(host, OFF))
    host.before_call = ask_aside(injected)
    host.generate(Processing(host, one()))
    assert all(torch.equal(a, b) for a, b in zip(plain, injected, strict=True))


# ------------------------------------------------------------------------------------------- faults before the sampling


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (ask(), "identities"),
        (one(scale="much"), "identities[0].scale"),
        (ask({"photos": ["sha256:" + 64 * "0"]}), "identities[0].photos[0]"),
        (ask({"photos": [ADA]}, checkpoint="absent"), "checkpoint"),
        (ask({"photos": [ADA]}, colour=1), "colour"),
        (({**one()[0]}, [ADA]), "args[1]"),
        (one(region={"box": [0.5, 0.5, 0.5001, 1]}), "identities[0].region"),
    ],
    ids=["nobody", "no number", "unknown photo", "no file", "unknown key", "beside the object", "region too small"],
)
def test_a_request_at_fault_ends_before_the_first_step(host: Host, values: tuple[Any, ...], field: str) -> None:
    error = refused(host, Processing(host, values))
    assert error.field == field and 400 <= error.status_code < 500
    assert host.reported == []


def test_a_fault_is_said_in_the_panels_words_where_the_request_comes_from_there(host: Host) -> None:
    panel_values = sys.modules["lib_portrait.webui.panel_values"]
    blank = panel_values.identity_values(None)
    photos = f'["sha256:{64 * "0"}"]'
    blocks = [blank, {**blank, "photos": photos}]
    own = (True, "UniPortrait", "small", 1.0, 1.0, False, *(block[name] for block in blocks for name in blank))
    values = (*own, panel_values.NOTHING_BEYOND, *(None for _ in panel_values.further_controls(2)))
    assert refused(host, Processing(host, values)).field == "Identity 2, photo 1"


def test_a_fault_ends_a_sampling_that_no_init_came_before(host: Host) -> None:
    """Scripts call `p.sample` on their own."""
    p = Processing(host, one(scale="much"))
    p.scripts.each("before_process", p)
    p.scripts.each("process", p)
    with pytest.raises(PortraitError, match=r"identities\[0\]\.scale"):
        p.sample(None, None, (), (), 0, ())
    assert host.calls == []


def test_a_checkpoint_of_another_family_is_refused(host: Host) -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    host.shared.sd_model.model.diffusion_model, fitting = UNetModel(**{**ldm_config(), "context_dim": 40}), host.unet
    try:
        assert refused(host, Processing(host, one())).field == "checkpoint"
    finally:
        host.shared.sd_model.model.diffusion_model = fitting


def test_what_breaks_while_preparing_is_reported_and_raised_as_a_fault_of_ours(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_portrait.checkpoints.store.read_tensors", lambda *args: 1 / 0)
    error = refused(host, Processing(host, one(), is_api=True))
    assert (error.status_code, error.field) == (500, "Portrait") and "ZeroDivisionError" in error.problem
    assert host.reported == ["Portrait failed"]
    assert isinstance(error.__cause__ or error, PortraitError)


def test_the_api_gets_a_requests_fault_without_a_traceback(host: Host) -> None:
    http_exception = host.modules["fastapi.exceptions"].HTTPException
    error = refused(host, Processing(host, one(scale=9), is_api=True))
    assert isinstance(error, http_exception) and type(error).__name__ == "PortraitError"
    assert host.reported == [f"Portrait: {error.detail}"]
    refused(host, Processing(host, one(scale=9)))
    assert len(host.reported) == 1, "the page prints it itself"


def test_a_window_that_no_step_lies_in_is_refused_before_the_sampling(host: Host) -> None:
    late = one(start=0.7)
    assert refused(host, Processing(host, late, steps=2)).field == "identities[0].start"
    assert refused(host, Processing(host, one(end=0.2, start=0.1), steps=4)).field == "identities[0].end"
    assert len(host.generate(Processing(host, late, steps=4)).images) == 1
    # One of the two passes is enough; a sampler of second order steps twice as often.
    host.generate(Processing(host, late, steps=2, enable_hr=True, hr_second_pass_steps=4))
    host.generate(Processing(host, late, steps=2, sampler_name="Heun"))
    # Who is not to be drawn may have any window.
    host.generate(Processing(host, two(second={"scale": 0, "start": 0.9, "end": 0.95}), steps=2))


@pytest.mark.parametrize("whole", [False, True])
def test_a_region_outside_of_what_is_painted_is_refused(host: Host, whole: bool) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 32, 64, 64))
    own = {"image_mask": mask, "inpaint_full_res": whole}
    error = refused(host, Img2Img(host, two({"region": RIGHT}, {"region": LEFT}), **own))
    assert error.field == "identities[1].region" and "outside" in error.problem
    host.generate(Img2Img(host, two({"region": RIGHT}), **own))
    # ADetailer repaints one face after the other: not everybody is in each.
    host.generate(Img2Img(host, one(region=LEFT), _ad_inner=True, **own))


def test_regions_lie_where_the_masked_area_is_painted(host: Host) -> None:
    """The crop shows the lower right quarter: a region of just that is all of it, half of it is not."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 32, 64, 64))

    def drawn(**person: Any) -> list[bytes]:
        return images(host.generate(Img2Img(host, one(**person), image_mask=mask)))

    everywhere = drawn()
    assert drawn(region={"box": [0.5, 0.5, 1, 1]}) == everywhere
    assert drawn(region={"box": [0.5, 0.5, 0.75, 1]}) != everywhere


def test_regions_and_a_script_that_draws_in_pieces_are_refused(host: Host) -> None:
    error = refused(host, Processing(host, one(region=LEFT), UPSCALE))
    assert error.field == "identities[0].region" and "SD upscale" in error.problem
    host.generate(Processing(host, one(), UPSCALE))


def test_a_refiner_of_another_family_is_refused_before_the_sampling(host: Host, folder: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({key: torch.zeros(32, 40)}, folder / "second.safetensors")
    try:
        swapped = {"refiner_checkpoint": "second", "refiner_switch_at": 0.5}
        assert refused(host, Processing(host, one(), **swapped)).field == "refiner"
        assert refused(host, Processing(host, one(), enable_hr=True, hr_checkpoint_name="second")).field == (
            "hires checkpoint"
        )
    finally:
        (folder / "second.safetensors").unlink()


# --------------------------------------------------------------------------------------------------- faults in mid-step


def at_step(number: int, fault: Callable[[Any], None]) -> Callable[[Any], None]:
    """A neighbour's denoiser callback that does something to the parameters of one step."""

    def callback(params: Any) -> None:
        if params.denoiser.step == number:
            fault(params)

    return callback


@pytest.mark.parametrize("step", [0, 1])
def test_what_breaks_in_our_callback_is_raised_from_the_unets_call_of_the_same_step(host: Host, step: int) -> None:
    reached: list[int] = []
    host.before_call = reached.append
    broken = at_step(step, lambda params: setattr(params, "x", None))
    host.callbacks["callbacks_cfg_denoiser"].insert(0, broken)
    caught: list[PortraitError] = []

    def run(unet: torch.nn.Module, x: Any, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        try:
            return unet(torch.ones(2, 4, 8, 8), timesteps, context=context)
        except PortraitError as error:
            caught.append(error)
            raise

    host.run = run
    # The stand-in itself needs the latent after the callback.
    host.callbacks["callbacks_cfg_denoiser"].append(lambda params: setattr(params, "x", torch.ones(2, 4, 8, 8)))
    error = refused(host, Processing(host, one()), calls=step)
    assert error.status_code == 500 and "AttributeError" in error.problem
    assert len(caught) == 1 and reached == list(range(step + 1))
    assert host.reported == ["Portrait failed"]


def test_a_neighbours_callback_that_fails_costs_nobody_their_person(host: Host) -> None:
    drawn = images(host.generate(Processing(host, one())))
    host.callbacks["callbacks_cfg_denoiser"].insert(0, lambda params: 1 / 0)
    assert images(host.generate(Processing(host, one()))) == drawn
    assert len(host.reported) == 2


@pytest.mark.parametrize("call", [0, 1])
def test_an_exception_in_the_unet_comes_out_as_it_is(host: Host, call: int) -> None:
    plain = images(host.generate(Processing(host, OFF)))
    layer = host.unet.middle_block[1].transformer_blocks[0].attn2.to_v
    reached: list[int] = []

    def fail(*args: Any) -> None:
        reached.append(1)
        if len(reached) == call + 1:
            raise ValueError("in mid-call")

    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="mid-call"):
        host.generate(Processing(host, one()))
    hook.remove()
    assert images(host.generate(Processing(host, OFF))) == plain


def test_a_picture_in_pieces_takes_people_but_no_regions(host: Host) -> None:
    def tiled(unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return torch.cat([unet(piece, timesteps, context=context) for piece in x.split(8, dim=3)], dim=3)

    host.run = tiled
    wide = {"width": 128}
    drawn = images(host.generate(Processing(host, one(), **wide)))
    assert drawn != images(host.generate(Processing(host, OFF, **wide)))
    error = refused(host, Processing(host, one(region=LEFT), **wide))
    assert error.field == "identities[0].region" and "in pieces" in error.problem


@pytest.mark.parametrize("role", ["refiner", "hires"])
def test_a_checkpoint_of_another_family_in_mid_sampling_ends_it_in_the_unets_call(host: Host, role: str) -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    odd = SimpleNamespace(model=SimpleNamespace(diffusion_model=UNetModel(**{**ldm_config(), "context_dim": 40})))
    host.models["odd"] = odd
    before = traces(odd.model.diffusion_model)
    swapped = {"refiner_checkpoint": "odd", "refiner_switch_at": 0.5}
    if role == "hires":
        swapped = {"enable_hr": True, "hr_checkpoint_name": "odd"}
    error = refused(host, Processing(host, one(), **swapped), calls=1 if role == "refiner" else 2)
    assert error.field == "checkpoint" and error.status_code == 422
    assert traces(odd.model.diffusion_model) == before


# ------------------------------------------------------------------------------------------------- the model is swapped


@pytest.mark.parametrize(
    "swapped",
    [{"refiner_checkpoint": "second", "refiner_switch_at": 0.5}, {"enable_hr": True, "hr_checkpoint_name": "second"}],
    ids=["refiner", "hires"],
)
def test_the_checkpoint_that_comes_in_mid_sampling_has_the_people_and_the_old_one_is_clean(
    host: Host, swapped: dict[str, Any]
) -> None:
    first = host.unet
    clean = traces(first)
    host.generate(Processing(host, OFF, **swapped))
    vanilla = [*host.calls]
    del host.calls[:]
    found: list[bool] = []
    host.before_call = lambda step: found.append(traces(first) == clean)
    host.generate(Processing(host, one(), **swapped))
    checkpoints = [call.checkpoint for call in host.calls]
    assert checkpoints == [call.checkpoint for call in vanilla] and set(checkpoints) == {"first", "second"}
    assert all(all(differ(a.output, b.output)) for a, b in zip(host.calls, vanilla, strict=True))
    assert found == [name == "second" for name in checkpoints]


# ------------------------------------------------------------------------------------------------ faults after sampling


@pytest.mark.parametrize("steps", [(0,), (1,), (0, 1)])
def test_a_step_whose_rows_reached_the_unet_without_the_people_is_a_fault(host: Host, steps: tuple[int, ...]) -> None:
    """A neighbour calls the UNet with contexts of its own."""
    step: list[int] = []
    host.before_call = step.append

    def run(unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return unet(x, timesteps, context=torch.ones(2, 6, 48) if step[-1] in steps else context)

    host.run = run
    error = refused(host, Processing(host, one()), calls=2)
    assert error.status_code == 500 and f"of 2 rows of the prompt only {2 - len(steps)}" in error.problem


def test_a_unet_that_is_not_called_is_a_fault(host: Host) -> None:
    host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)
    error = refused(host, Processing(host, two(), batch_size=2))
    assert error.status_code == 500 and "of 4 rows of the prompt only 0" in error.problem


@pytest.mark.parametrize("kept", ["interrupted", "skipped", "stopping_generation"])
def test_what_the_user_ends_is_no_fault(host: Host, kept: str) -> None:
    """Of the step at which it ended, rows are missing; some people's windows may not have begun."""
    host.before_call = lambda step: setattr(host.state, kept, True)
    host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)
    p = Processing(host, two(second={"start": 0.5}))
    assert len(host.generate(p).images) == 1
    assert ours(p) == {"Portrait"}


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
def test_a_sampling_without_a_step_is_a_fault(host: Host, sampler: str) -> None:
    """DDIM draws one step less than others in img2img."""
    p = Img2Img(host, one(), sampler_name=sampler, denoising_strength=0.1)
    if sampler == "DDIM":
        error = refused(host, p)
        assert error.field == "steps" and "DDIM drew no step" in error.problem
        assert "sampling steps 2, denoising strength 0.1" in error.problem
    else:
        assert len(host.generate(p).images) == 1


def test_a_window_that_no_step_lay_in_is_a_fault_where_the_steps_were_not_known_before(host: Host) -> None:
    adaptive = {"sampler_name": "DPM adaptive", "steps": 2}
    error = refused(host, Processing(host, one(start=0.7), **adaptive), calls=2)
    assert error.field == "identities[0].start" and "0, 0.5" in error.problem
    host.generate(Processing(host, one(start=0.4), **adaptive))


def test_a_person_whose_steps_never_reached_the_unet_is_a_fault(host: Host) -> None:
    """A neighbour draws the first step twice and leaves out the second: as many rows as there should be."""
    step: list[int] = []
    host.before_call = step.append

    def run(unet: torch.nn.Module, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if step[-1] == 1:
            return torch.zeros_like(x)
        unet(x, timesteps, context=context)
        return unet(x, timesteps, context=context)

    host.run = run
    error = refused(host, Processing(host, two(second={"start": 0.5})), calls=2)
    assert error.field == "identities[1]" and "added at no step" in error.problem
    host.generate(Processing(host, two(second={"start": 0.5, "scale": 0})))


def test_each_sampling_is_judged_by_itself(host: Host) -> None:
    """What the first batch drew does not make good for the second."""
    samplings: list[int] = []
    host.before_call = lambda step: samplings.append(step)
    host.run = lambda unet, x, timesteps, context: (
        torch.zeros_like(x) if len(samplings) > 2 else unet(x, timesteps, context=context)
    )
    error = refused(host, Processing(host, one(), n_iter=2), calls=2)
    assert "of 2 rows of the prompt only 0" in error.problem


# ---------------------------------------------------------------------------------- processing objects, used again


def test_nothing_is_left_on_a_processing_object(host: Host) -> None:
    p = Processing(host, one())
    before = set(vars(p))
    host.generate(p)
    assert ours(p) == {"Portrait"}, "the pictures' parameters keep it"
    assert {name for name in set(vars(p)) - before if callable(vars(p)[name])} == set()
    off = Processing(host, OFF)
    host.generate(off)
    assert ours(off) == set()


@pytest.mark.parametrize("where", ["request", "window", "UNet"])
def test_a_processing_object_that_failed_is_as_new_when_it_is_used_again(host: Host, where: str) -> None:
    """Scripts catch what fails and process the same object another time."""
    values = {"request": one(scale=9), "window": one(start=0.9), "UNet": one()}[where]
    p = Processing(host, values)
    plain = images(host.generate(Processing(host, OFF)))
    if where == "UNet":
        host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)
    with pytest.raises(PortraitError):
        host.process_images(p)
    # Until then it stays refused, also where a script samples by itself.
    if where != "UNet":
        with pytest.raises(PortraitError):
            p.sample(p.c, p.uc, (1,), (1,), 0, p.prompts) if where == "window" else p.init((), (), ())
    host.run = lambda unet, x, timesteps, context: unet(x, timesteps, context=context)
    p.script_args = (0, *one())
    drawn = images(host.process_images(p))
    assert drawn == images(host.generate(Processing(host, one()))) != plain
    p.script_args = (0, *OFF)
    assert images(host.generate(p)) == plain
    assert ours(p) == set()


def test_a_processing_object_may_be_processed_several_times(host: Host) -> None:
    p = Processing(host, one(), LOOPBACK)
    texts = []
    for values in (one(), one(scale=0.5), OFF, two()):
        p.script_args = (LOOPBACK, *values)
        texts += host.process_images(p).infotexts
    assert ["Portrait: " in text for text in texts] == [True, True, False, True]
    assert len({*texts}) == 4 and "scale" in texts[1] and "scale" not in texts[3]
    p.close()


def test_copies_have_requests_of_their_own(host: Host) -> None:
    """While one is under way, or after it: a copy has the guards of the object it is a copy of."""
    axes = sys.modules["lib_portrait.webui.axes"]
    alone = [images(host.generate(Processing(host, one(scale=scale)))) for scale in (0.5, 1.0)]
    p = Processing(host, one())
    p.scripts.each("before_process", p)
    p.scripts.each("process", p)
    drawn = []
    for scale in (0.5, 1.0):
        cell = copy.copy(p)
        cell.extra_generation_params = dict(p.extra_generation_params)
        setattr(cell, axes.ATTRIBUTE, {"identities[0].scale": scale})
        drawn.append(images(host.process_images(cell)))
        assert ours(cell) == {axes.ATTRIBUTE, "Portrait"}
    assert drawn == alone
    off = copy.copy(p)
    off.script_args = (0, *OFF)
    assert images(host.process_images(off)) == images(host.generate(Processing(host, OFF)))
    assert ours(off) == set()
    # The object itself can still be sampled, with its own.
    p.prompts = ["prompt"]
    p.setup_conds()
    with torch.no_grad():
        p.sample(p.c, p.uc, (1,), (1,), 0, p.prompts)
    assert outputs(host)
    p.script_args = (0, *OFF)
    host.generate(p)
    assert ours(p) == set() and off.closed == 0 and p.closed == 1


def test_a_copy_does_not_draw_the_object_that_it_is_a_copy_of(host: Host) -> None:
    """What a neighbour put on the object, below our guard, is bound to the object."""
    expected = images(host.generate(Processing(host, one(), steps=1)))
    p = Processing(host, one())
    inner = p.sample
    p.sample = lambda *args, **kwargs: inner(*args, **kwargs)
    p.scripts.each("before_process", p)
    cell = copy.copy(p)
    cell.steps = 1
    assert images(host.process_images(cell)) == expected
    p.close()


@pytest.mark.parametrize("name", ["init", "sample"])
def test_a_neighbours_wrapper_stays_where_it_is(host: Host, name: str) -> None:
    """Wrapper ours, below ours, and ours once more around it when the object is processed again."""
    expected = images(host.generate(Processing(host, one())))
    plain = images(host.generate(Processing(host, OFF)))
    told: list[str] = []

    def wrap(p: Any) -> None:
        inner = getattr(p, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            told.append(name)
            return inner(*args, **kwargs)

        setattr(p, name, wrapped)

    p = Processing(host, one())
    wrap(p)
    below = vars(p)[name]
    assert images(host.process_images(p)) == expected and vars(p)[name] is below and len(told) == 1
    p.scripts.neighbours.append(SimpleNamespace(process=wrap))
    assert images(host.process_images(p)) == expected and len(told) == 3
    assert images(host.process_images(p)) == expected and len(told) == 6
    p.script_args = (0, *OFF)
    assert images(host.generate(p)) == plain
    assert ours(p) == set()


def test_a_fault_is_raised_through_a_neighbours_wrapper(host: Host) -> None:
    def wrap(p: Any) -> None:
        inner = p.sample
        p.sample = lambda *args, **kwargs: inner(*args, **kwargs)

    p = Processing(host, one())
    p.scripts.neighbours.append(SimpleNamespace(process=wrap))
    host.process_images(p)
    host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)
    with pytest.raises(PortraitError, match="only 0 reached the UNet"):
        host.process_images(p)


# ------------------------------------------------------------------------------------------------ infotext and notices


def test_the_request_is_in_the_parameters_of_every_picture(host: Host) -> None:
    from lib_portrait.infotext import from_infotext

    processed = host.generate(Processing(host, one(scale=0.5), batch_size=2, n_iter=2))
    assert len(processed.infotexts) == 4
    for text in processed.infotexts:
        request = from_infotext(text.partition("Portrait: ")[2])
        assert request.identities[0].options["scale"] == 0.5 and request.checkpoint == "small"


def test_notices_are_in_the_parameters_and_below_the_gallery(host: Host) -> None:
    p = Processing(host, two(second={"scale": 0}))
    processed = host.generate(p)
    notice = "identities[1].scale: it is 0: this person is not drawn."
    assert p.extra_generation_params["Portrait notices"] == notice and notice in processed.infotexts[0]
    assert list(p.comments) == [f"Portrait: {notice}"]
    host.process_images(p)
    p.script_args = (0, *one())
    host.process_images(p)
    p.close()
    assert ours(p) == {"Portrait"}, "the former request's notices are gone"


def test_notices_name_people_as_the_panel_does(host: Host) -> None:
    instances, panel_values, inputs = (
        sys.modules[f"lib_portrait.webui.{name}"] for name in ("instances", "panel_values", "inputs")
    )
    blank = panel_values.identity_values(None)
    blocks = [blank]
    for seed, box in ((ADA, "0, 0, 70, 100"), (BEN, "40, 0, 100, 100")):
        sha = instances.remember(base64.b64decode(seed["image"]))
        photos = f'[{{"image": "sha256:{sha}", "aligned": true}}]'
        blocks.append({**blank, "photos": photos, "region": inputs.BOX, "box": box})
    own = (True, "UniPortrait", "small", 1.0, 1.0, False, *(block[name] for block in blocks for name in blank))
    values = (*own, panel_values.NOTHING_BEYOND, *(None for _ in panel_values.further_controls(3)))
    p = Processing(host, values)
    host.generate(p)
    assert p.extra_generation_params["Portrait notices"].startswith(
        "Identity 3, region: it overlaps that of Identity 2 on 30% of the picture"
    )


@pytest.mark.parametrize(
    ("options", "own", "told"),
    [({}, {}, True), ({"ad_script_names": "portrait"}, {}, False), ({}, {"_ad_disabled": True}, False)],
)
def test_adetailer_without_the_people_is_noticed(
    host: Host, options: dict[str, str], own: dict[str, bool], told: bool
) -> None:
    vars(host.opts).update(options)
    p = Processing(host, one(), **own)
    adetailer = SimpleNamespace(
        filename="/x/!adetailer.py", owner=None, args_from=0, args_to=0, is_ad_enabled=lambda *args: True
    )
    p.scripts.alwayson_scripts.append(adetailer)
    host.generate(p)
    assert ("ADetailer" in p.extra_generation_params.get("Portrait notices", "")) == told


# --------------------------------------------------------------------------------------------------------- routing maps


def test_a_routing_map_of_every_picture_is_appended_with_its_parameters(host: Host) -> None:
    plain = host.generate(Processing(host, two(), batch_size=2, n_iter=2))
    p = Processing(host, two(show_routing=True), batch_size=2, n_iter=2, grid=True)
    processed = host.generate(p)
    _, *rest = processed.images
    pictures, maps = rest[:4], rest[4:]
    assert [picture.tobytes() for picture in pictures] == images(plain), "looking changes nothing"
    assert len(maps) == 4 and len({drawn.tobytes() for drawn in maps}) == 4
    assert processed.infotexts[5:] == processed.infotexts[1:5]
    assert all(drawn.height > picture.height for drawn, picture in zip(maps, pictures))
    assert host.saved == {}


def test_routing_maps_are_saved_beside_the_saved_pictures(host: Host) -> None:
    p = Processing(host, two(show_routing=True), saves=True)
    processed = host.generate(p)
    assert list(host.saved) == ["pictures/00000.png"]
    host.opts.portrait_save_maps = True
    processed = host.generate(Processing(host, two(show_routing=True), saves=True))
    drawn, text = host.saved["pictures/00001-portrait-map.png"]
    assert drawn is processed.images[1] and text == processed.infotexts[1]


def test_the_inpaint_masks_among_the_results_get_no_map(host: Host) -> None:
    host.opts.return_mask = True
    mask = Image.new("L", (64, 64), 255)
    p = Img2Img(host, two(show_routing=True), image_mask=mask, mask_for_overlay=mask, batch_size=3, grid=True)
    processed = host.generate(p)
    # The grid; three pictures, each with its mask; three maps. The host gives masks no parameters of their own.
    assert len(processed.images) == len(processed.infotexts) == 10
    assert [text.partition(",")[0] for text in processed.infotexts[-3:]] == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_script_that_has_no_place_for_routing_maps_is_noticed(host: Host) -> None:
    p = Processing(host, two(show_routing=True), LOOPBACK)
    assert len(host.generate(p).images) == 1
    assert "Loopback has no place for routing maps" in p.extra_generation_params["Portrait notices"]


def test_interrupted_routing_maps_are_of_what_was_drawn(host: Host) -> None:
    host.before_call = lambda step: setattr(host.state, "interrupted", True)
    processed = host.generate(Processing(host, two(show_routing=True), n_iter=3))
    assert len(processed.images) == 2


# ---------------------------------------------------------------------------------------------- plots and neighbours


def scaled(scale: Any) -> Callable[[Any], None]:
    axes = sys.modules["lib_portrait.webui.axes"]

    def change(cell: Any) -> None:
        setattr(cell, axes.ATTRIBUTE, {"identities[0].scale": scale})

    return change


def test_cells_of_a_plot_that_fail_say_so_in_their_place(host: Host) -> None:
    p = Processing(host, one(), PLOT)

    def broken(cell: Any) -> None:
        host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)

    good, bad, failed = host.plot(p, [scaled(0.5), scaled(9), broken])
    assert good is not None and bad is not None and failed is not None
    assert "Portrait faults" not in good.infotexts[0]
    assert bad.images[0].size == failed.images[0].size == (64, 64)
    assert "Portrait faults: identities[0].scale" in bad.infotexts[0] and "only 0 reached" in failed.infotexts[0]
    # The words, on a ground of one colour.
    assert all(len(one.images[0].getcolors(4096)) > 1 for one in (bad, failed))
    assert host.calls and host.reported == []
    assert p.extra_generation_params["Portrait faults"].startswith("1 of 3 cells: identities[0].scale")
    assert p.closed == 1


def test_a_plot_all_of_whose_cells_fail_is_a_fault(host: Host) -> None:
    p = Processing(host, one(), PLOT)
    with pytest.raises(PortraitError, match=r"identities\[0\]\.scale"):
        host.plot(p, [scaled(9), scaled(10)])
    assert p.closed == 1
    # The next request has a job of its own.
    host.generate(Processing(host, one()))


def test_a_cell_of_several_batches_shows_its_fault_in_each(host: Host) -> None:
    host.run = lambda unet, x, timesteps, context: torch.zeros_like(x)
    good: list[Any] = []

    def whole(cell: Any) -> None:
        host.run = lambda unet, x, timesteps, context: unet(x, timesteps, context=context)
        good.append(cell)

    results = host.plot(Processing(host, one(), PLOT, batch_size=2, n_iter=2), [scaled(1), whole])
    assert [len(result.images) for result in results if result is not None] == [4, 4]


def test_the_axes_values_are_checked_before_the_plot(host: Host) -> None:
    session = importlib.import_module("lib_portrait.webui.session")
    p = Processing(host, one(), PLOT)
    session.check_axis(p, [{"scale": 0.5}, {"scale": 1}])
    for cell, field in (
        ({"scale": 9}, "scale"),
        ({"identities[1].scale": 1}, "identities[1].scale"),
        ({"checkpoint": "absent"}, "checkpoint"),
    ):
        with pytest.raises(PortraitError) as caught:
            session.check_axis(p, [{"scale": 1}, cell])
        assert caught.value.field == field
    session.check_axis(Processing(host, OFF, PLOT), [{"scale": 9}])
    p.close()


def detailer(host: Host, values: tuple[Any, ...], found: list[Any]) -> SimpleNamespace:
    """A neighbour that draws every picture anew with an object of its own, and prints what fails there."""

    def postprocess_image(p: Any, picture: Any) -> None:
        if getattr(p, "_ad_inner", False):
            return
        inner = Processing(host, values, runner=p.scripts, _ad_inner=True, seed=5)
        with closing(inner):
            found.append(host.process_images(inner))

    return SimpleNamespace(postprocess_image=postprocess_image)


def test_a_neighbour_that_draws_in_between_has_the_people_and_the_outer_request_goes_on(host: Host) -> None:
    found: list[Processed] = []
    expected = images(host.generate(Processing(host, two(), n_iter=2)))
    inner = images(host.generate(Processing(host, one(), seed=5)))
    p = Processing(host, two(), n_iter=2)
    p.scripts.neighbours.append(detailer(host, one(), found))
    assert images(host.generate(p)) == expected
    assert [images(one) for one in found] == [inner, inner]
    assert ours(p) == {"Portrait"}


def test_a_fault_that_a_neighbour_swallows_is_raised_at_the_end(host: Host) -> None:
    p = Processing(host, one())
    p.scripts.neighbours.append(detailer(host, one(scale=9), []))
    with pytest.raises(PortraitError, match=r"identities\[0\]\.scale"):
        host.generate(p)
    assert p.closed == 1
    host.generate(Processing(host, one()))


# ------------------------------------------------------------------------------------------------ what the host loaded


def test_automatic_is_the_adapter_that_was_made_for_the_loaded_text_encoder(host: Host) -> None:
    session, request = importlib.import_module("lib_portrait.webui.session"), sys.modules["lib_portrait.request"]
    asked = request.parse_request(ask({"photos": [ADA]}, checkpoint=AUTOMATIC)[0])
    assert session.resolved(asked).checkpoint == "small"
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 77}
    encoder = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(**sizes)))
    host.shared.sd_model.cond_stage_model = SimpleNamespace(wrapped=encoder)
    assert session.resolved(asked).checkpoint == "world"
    named = request.parse_request(one()[0])
    assert session.resolved(named) is named


def test_loras_that_come_or_go_or_change_their_strength_are_noticed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = importlib.import_module("lib_portrait.webui.session")
    assert session.lora_state() == ()
    network = SimpleNamespace(name="style", te_multiplier=1.0, unet_multiplier=1.0, dyn_dim=None)
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(loaded_networks=[network]))
    first = session.lora_state()
    network.unet_multiplier = 0.5
    assert first != session.lora_state() != ()
