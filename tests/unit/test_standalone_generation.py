"""Promises of `portrait.py generate`: pictures, a sheet and the settings, or an error that says what to do."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import portrait as command_line
from lib_portrait.commands import generate
from lib_portrait.errors import PortraitError
from lib_portrait.faces import service
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.infotext import from_infotext
from lib_portrait.methods.declarations import declarations
from lib_portrait.request import Identity, PortraitRequest
from lib_portrait.standalone import generation, measuring, samples
from lib_portrait.standalone.measuring import Measurer, greedy_pairs
from lib_portrait.standalone.model import save_model
from lib_portrait.standalone.sheet import Cell, Section, draw_sheet
from tests.small_networks import small_kit, small_manifest, small_model, tiny_backbone

FAST = ["--steps", "2", "--size", "64x64"]
EYES_TO_MOUTH = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.6], [0.38, 0.75], [0.62, 0.75]], np.float32)


def noise(seed: int, side: int = 112) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def two_halves(image: np.ndarray) -> list[Face]:
    """A face in each half of every picture, but for those that are black in the middle."""
    height, width = image.shape[:2]
    if not image[height // 2, width // 2].any():
        return []
    half = np.array([width / 2, height], np.float32)
    corners = [np.array([left, 0], np.float32) for left in (0, width / 2)]
    return [Face(np.concatenate([corner, corner + half]), EYES_TO_MOUTH * half + corner, 0.99) for corner in corners]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like models/world with small random networks, in that one's place; a detector that needs no face."""
    folder = tmp_path_factory.mktemp("root") / "models" / "world"
    with pytest.MonkeyPatch.context() as patch:
        folder.mkdir(parents=True)
        save_model(small_model(), folder / "world.safetensors")
        small_kit(folder, "world")
        # Not the network that conditions, by whose content it could be found.
        measuring_weights = {name: tensor.clone() for name, tensor in tiny_backbone().state_dict().items()}
        next(iter(measuring_weights.values())).mul_(0.9)
        save_file(measuring_weights, folder / "world-measuring.safetensors")
        (folder / "faces").mkdir()
        for name in ("man-0019-0", "man-0019-1", "woman-0009-0", "woman-0009-1"):
            noise(len(name) + int(name[-1])).save(folder / "faces" / f"{name}.png")
        patch.setattr(generate, "ROOT", folder.parents[1])
        sheet = {"title": "Samples", "people": 6, "one": ["a photo of a {word} in a park", "a {word}"]}
        (folder / "samples.json").write_text(json.dumps({**sheet, "two": ["a photo of {both} in a park", "{both}"]}))
        patch.setattr(generation, "CACHE", folder / "cache")
        (folder / "world-detector.safetensors").touch()
        small_manifest(folder, "world")
        patch.setattr(generation, "open_detector", lambda *_: Detector("halves", "1", two_halves))
        patch.setattr(service, "get_detector", lambda name, folders: Detector("halves", "1", two_halves))
        yield folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("eve.png", "ada.png", "ada,2.png", "bob.png")):
        noise(seed).save(folder / name)
    Image.new("RGB", (64, 64)).save(folder / "nobody.png")
    Image.new("L", (64, 64), 255).crop((0, 0, 64, 64)).save(folder / "mask.png")
    return folder


def run(*arguments: str | Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return command_line.run(command_line.parse(["generate", *map(str, arguments)]))


def settings(output: Path, number: int = 1) -> dict[str, Any]:
    return json.loads((output / f"{number:04}" / "settings.json").read_text("utf-8"))


# ----------------------------------------------------------------------------------------------------------- end to end


def test_without_arguments_the_world_s_people_are_shown(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output", tmp_path, *FAST) == 0
    made = settings(tmp_path)
    # Two people alone with two prompts each, and both together with two; these have routing maps.
    assert [entry["people"] for entry in made["pictures"]] == [
        *(["woman 0009"],) * 2,
        *(["man 0019"],) * 2,
        *(["woman 0009", "man 0019"],) * 2,
    ]
    assert made["pictures"][0]["prompt"] == "a photo of a woman in a park"
    assert made["pictures"][4]["prompt"] == "a photo of a woman and a man in a park"
    assert (made["checkpoint"], made["adapter"]) == ("world.safetensors", "world")
    for entry in made["pictures"]:
        assert Image.open(tmp_path / "0001" / entry["file"]).size == (64, 64)
        assert ("routing" in entry) == (len(entry["people"]) == 2)
        if "routing" in entry:
            assert Image.open(tmp_path / "0001" / entry["routing"]).height > 64, "the legend stands below"
        assert all(-1 <= one["own"] <= 1 for one in entry["similarity"])
        assert all((one["others"] is None) == (len(entry["people"]) == 2) for one in entry["similarity"])
    assert "measured by world-measuring.safetensors" in made["measuring"]
    sheet = Image.open(tmp_path / "0001" / "sheet.png")
    # Reference, another photo, two prompts; and for the pairs two references and two pictures with their maps.
    assert sheet.width >= 6 * 160
    told = capsys.readouterr()
    assert f"{tmp_path / '0001' / 'sheet.png'}" in told.out
    assert "8 of 8 faces found; similarity to the reference" in told.out
    both = [entry["shows_everybody"] for entry in made["pictures"] if len(entry["people"]) == 2]
    assert len(both) == 2 and f"; {sum(both)} of 2 pairs show both people where they were routed" in told.out
    assert all(one["placed"] is not None for entry in made["pictures"][4:] for one in entry["similarity"])


def test_reference_guidance_alone_needs_a_photo_and_nothing_else(
    world: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[str | Path] = ["--checkpoint", world / "world.safetensors", "--prompt", "a woman", *FAST]
    plain = [*arguments, "--output", tmp_path / "plain"]
    assert run(*plain) == 0
    arguments += ["--method", "none", "--face", photos / "eve.png", "--region", "0,0,0.5,1", "--output", tmp_path]
    guidance = ["--guidance-begin", "1", "--guidance-gradient", "share", "--guidance-strength", "0.5"]
    assert run(*arguments, *guidance, "--guidance-show") == 0
    made = settings(tmp_path)
    (entry,) = made["pictures"]
    assert made["method"] == "none" and "adapter" not in made and made["request"]["guidance"]["strength"] == 0.5
    shown = Image.open(tmp_path / "0001" / entry["guided"])
    assert shown.width == 64 and shown.height > 64
    guided, alone = (
        np.asarray(Image.open(folder / "0001" / "001.png")).astype(int) for folder in (tmp_path, tmp_path / "plain")
    )
    assert np.abs(guided - alone).max() > 5
    # Measured all the same: the checkpoint's kit brings a network for it.
    assert "measured by world-measuring.safetensors" in made["measuring"] and len(entry["similarity"]) == 1
    assert run(*arguments) == 1 and "Switch reference guidance on" in capsys.readouterr().err
    assert run(*arguments, "--guidance-begin", "0") == 1 and "no step of the sampling" in capsys.readouterr().err


def test_people_of_one_s_own_in_a_checkpoint_of_one_s_own(world: Path, photos: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--checkpoint", world / "world.safetensors", "--prompt", "two women, 1"]
    arguments += ["--prompt", "two women, 2", "--count", "2", "--seed", "40", "--negative-prompt", "blurry"]
    arguments += ["--face", photos / "eve.png", "--region", "0,0,0.5,1", "--face-scale", "0.9"]
    arguments += ["--face", f"{photos / 'ada.png'}#1,{photos / 'bob.png'}#aligned", "--structure", "0.3"]
    arguments += ["--mix", f"{photos / 'ada,2.png'}=0.25", "--region", photos / "mask.png", "--start", "0.1"]
    arguments += ["--scale", "0.6", "--show-routing", "--sampler", "euler", "--cfg", "3", "--output", tmp_path]
    assert run(*arguments, *FAST) == 0
    made = settings(tmp_path)
    seeds = [(entry["prompt"], entry["seed"]) for entry in made["pictures"]]
    assert seeds == [("two women, 1", 40), ("two women, 1", 41), ("two women, 2", 40), ("two women, 2", 41)]
    first = made["pictures"][0]
    assert (first["negative_prompt"], first["sampler"], first["guidance"]) == ("blurry", "euler", 3.0)
    assert len(first["similarity"]) == 2
    request = from_infotext(json.dumps(made["request"]), generate.LIMITS)
    eve, ada = request.identities
    assert (request.options["scale"], request.shows_maps, request.checkpoint) == (0.6, True, "world")
    assert (eve.options["scale"], eve.region and eve.region.box) == (0.9, (0.0, 0.0, 0.5, 1.0))
    assert [(photo.face, photo.aligned) for photo in ada.photos] == [(1, False), (None, True)]
    assert (ada.options["structure"], ada.start, ada.mix[0].weight) == (0.3, 0.1, 0.25)
    assert ada.region is not None and ada.region.mask is not None


@pytest.mark.parametrize("options", [(), ("--filter-crops",)])
def test_whether_large_faces_are_filtered_is_an_option_and_kept(
    world: Path, photos: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert run("--prompt", "x", "--face", photos / "eve.png", "--output", tmp_path, *options, *FAST) == 0
    assert settings(tmp_path)["filter_crops"] == bool(options)


def test_runs_do_not_overwrite_each_other_and_repeat_exactly(world: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a man", "--face", photos / "bob.png", "--output", tmp_path, *FAST]
    assert run(*arguments) == run(*arguments) == run(*arguments, "--seed", "1") == 0
    first, again, other = ((tmp_path / f"000{i}" / "001.png").read_bytes() for i in (1, 2, 3))
    assert first == again != other


def test_a_request_as_the_api_takes_it_says_everything(world: Path, photos: Path, tmp_path: Path) -> None:
    request = {"identities": [{"photos": ["file:eve.png", {"image": "file:bob.png", "face": 1}]}], "scale": 0.5}
    (photos / "request.json").write_text(json.dumps(request))
    asked = ["--request", photos / "request.json", "--prompt", "a man", "--lora-scale", "0.5", "--output", tmp_path]
    assert run(*asked, *FAST) == 0
    made = settings(tmp_path)["request"]
    assert (made["scale"], made["lora_scale"], made["identities"][0]["photos"][1]["face"]) == (0.5, 0.5, 1)


def test_nobody_need_be_asked_for(world: Path, tmp_path: Path) -> None:
    assert run("--prompt", "a park", "--output", tmp_path, *FAST) == 0
    made = settings(tmp_path)
    assert "request" not in made
    assert made["pictures"][0]["people"] == []


def test_the_command_line_can_say_all_that_a_request_can() -> None:
    parser = argparse.ArgumentParser()
    generate.configure(parser)
    flags = {action.dest for action in parser._actions}
    person, whole = {"photos": "faces"}, {"identities": "faces", "enabled": "request", "checkpoint": "adapter"}
    assert {person.get(one.name, one.name) for one in fields(Identity) if one.name != "options"} <= flags
    assert {whole.get(one.name, one.name) for one in fields(PortraitRequest) if one.name != "options"} <= flags
    for method in declarations():
        assert {option.name for option in method.identity_options} <= flags
        assert {f"all_{option.name}" for option in method.options} <= flags


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_request_file_may_have_any_mark_that_editors_write(
    world: Path, photos: Path, tmp_path: Path, coding: str
) -> None:
    request = {"identities": [{"photos": ["file:eve.png"]}], "scale": 0.5}
    (photos / "marked.json").write_text(json.dumps(request), coding)
    assert run("--request", photos / "marked.json", "--prompt", "ä", "--output", tmp_path, *FAST) == 0
    assert settings(tmp_path)["request"]["scale"] == 0.5


# -------------------------------------------------------------------------------------------------------- which photos


# As long as a name may be.
COMMAS = "commas/" + "x," * 125 + ".jpg"


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with photos of awkward names; nothing in them is looked at."""
    (tmp_path / "bob").mkdir()
    (tmp_path / "commas").mkdir()
    for name in ("a,b.jpg", "a", "c.JPG", "d#1.png", "bob/1.jpg", "bob/2.webp", "bob/notes.txt", "bob/._1.jpg", COMMAS):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "none").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["c.JPG"], ["c.JPG"]),
        (["a,b.jpg,c.JPG"], ["a,b.jpg", "c.JPG"]),
        (["c.JPG,a,b.jpg#1,a"], ["c.JPG", "a,b.jpg#1", "a"]),
        (["c.JPG", "a,b.jpg"], ["c.JPG", "a,b.jpg"]),
        (["bob"], ["bob/1.jpg", "bob/2.webp"]),
        (["bob#aligned"], ["bob/1.jpg#aligned", "bob/2.webp#aligned"]),
        (["bob/*.jpg,c.JPG"], ["bob/1.jpg", "c.JPG"]),
        (["b*/*"], ["bob/1.jpg", "bob/2.webp"]),
        (["*.[jJ]*"], ["a,b.jpg", "c.JPG"]),
        (["d#1.png,d#1.png#0"], ["d#1.png", "d#1.png#0"]),
        (["gone.jpg,c.JPG,x"], ["gone.jpg", "c.JPG", "x"]),
        ([",".join(["c.JPG"] * 1000)], ["c.JPG"] * 1000),
        ([f"c.JPG,{COMMAS}#aligned,bob/1.jpg,{COMMAS}"], ["c.JPG", f"{COMMAS}#aligned", "bob/1.jpg", COMMAS]),
    ],
)
def test_folders_patterns_and_commas_in_names(album: Path, texts: list[str], names: list[str]) -> None:
    assert [name.replace("\\", "/") for name in generate._names(texts)] == names


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--face", "none", r"--face: none holds no pictures\. Their names end in .*\.jpg"),
        ("--face", "z*.jpg", r"--face: z\*\.jpg holds no pictures"),
        ("--face", "a,b.jpg,gone.jpg", r"--face: gone\.jpg cannot be read"),
        ("--mix", "c.JPG,gone.jpg=0.5", r"--mix: gone\.jpg cannot be read"),
    ],
)
def test_what_is_no_photo_is_named(album: Path, option: str, text: str, told: str) -> None:
    words = ["--face", text] if option == "--face" else ["--face", "c.JPG", "--mix", text]
    options = command_line.parse(["generate", "--prompt", "x", *words])
    with pytest.raises(PortraitError, match=told):
        generate.request_of(options)


def test_a_shell_s_expanded_pattern_is_one_person(album: Path) -> None:
    options = command_line.parse(["generate", "--prompt", "x", "--face", "bob/1.jpg", "c.JPG", "--start", "0.1"])
    (face,) = options.faces
    identity = generate.identity_of(face)
    assert (len(identity["photos"]), identity["start"]) == (2, 0.1)


def test_which_face_of_several_is_taken_is_told_by_the_file_s_name(
    world: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, before anything is drawn; not where the photo says which."""
    asked = ["--prompt", "a man", "--prompt", "two men", "--face", photos / "eve.png", f"{photos / 'ada.png'}#1"]
    asked += ["--mix", f"{photos / 'bob.png'}=0.2", "--output", tmp_path]
    assert run(*asked, *FAST) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "largest" in line]
    assert said == [
        f"{option} {photos / name}: 2 faces, the largest is taken; #0 to #1 behind the file's name choose one, "
        "counted from the left."
        for option, name in (("--face", "eve.png"), ("--mix", "bob.png"))
    ]
    kept = [text for text in settings(tmp_path)["notices"] if "largest" in text]
    assert len(kept) == 2 and not any(str(photos) in text for text in kept)


# --------------------------------------------------------------------------------------------------------- not measured


@pytest.mark.parametrize("missing", ["world-measuring.safetensors", "world-detector.safetensors"])
def test_without_a_measuring_network_pictures_are_made_and_the_sheet_says_so(
    world: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name != missing and is_file(path))
    notes: list[str] = []
    drawn = draw_sheet
    monkeypatch.setattr(generation, "draw_sheet", lambda title, texts, parts: notes.extend(texts) or drawn("", [], []))
    assert run("--prompt", "a man", "--face", photos / "bob.png", "--output", tmp_path / "out", *FAST) == 0
    made = settings(tmp_path / "out")
    assert made["summary"] is None
    assert "similarity" not in made["pictures"][0]
    for text in (made["measuring"], notes[-1], capsys.readouterr().out):
        assert "imilarity not measured" in text
        assert f"{missing} is not there; get the kit anew" in text


def test_another_adapter_than_the_world_s_is_not_measured(world: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    small_kit(tmp_path / "own", "mine")
    asked = ["--prompt", "a man", "--face", photos / "bob.png", "--adapter", "mine", "--models", tmp_path / "own"]
    assert run(*asked, "--output", tmp_path / "out", *FAST) == 0
    made = settings(tmp_path / "out")
    assert made["adapter"] == "mine"
    assert made["measuring"].startswith("similarity not measured: mine comes without a network")


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--face", "{p}/nobody.png"], r"--face .*nobody\.png: no face was found\..*FILE#aligned an aligned crop"),
        (["--face", "{p}/eve.png,{p}/nobody.png"], r"--face \S*nobody\.png: no face"),
        (["--face", "{p}/eve.png", "--mix", "{p}/nobody.png=0.5"], r"--mix \S*nobody\.png: no face was found"),
        (["--face", "{p}/eve.png#2"], r"--face \S*eve\.png#2: face 2 was asked for, but 2 were found"),
        (["--face", "{p}/missing.png"], r"--face: .*missing\.png cannot be read \(No such file"),
        (["--face", "{p}/eve.png#left"], r"#left no face of one\. Write #0"),
        (["--face", "{p}/eve.png", "--region", "0,0,2,1"], r"region\.box\[2\].*out of range"),
        (["--face", "{p}/eve.png", "--mix", "{p}/bob.png"], "has no weight.*0.3 for a share of 30 %"),
        (["--face", "{p}/eve.png", "--scale", "3"], "scale: 3.0 is out of range"),
        (["--face", "{p}/eve.png"] * 17, "17 people, at most 16"),
        (["--face", "{p}/eve.png", "--adapter", "other"], "'other' is not complete.*uniportrait-faceid_other"),
        (["--lora-scale", "1"], "--lora-scale: there is nobody"),
        (["--adapter", "world"], "--adapter: there is nobody"),
        (["--checkpoint", "{p}/none.safetensors"], r"none\.safetensors"),
        (["--checkpoint", "{p}/eve.png"], r"eve\.png"),
        (["--request", "{p}/none.json"], "cannot be read"),
        (["--size", "100x100"], "100x100 is not possible.*multiples of 8"),
        (["--device", "cuda"], "--device: this machine has no cuda"),
    ],
)
def test_what_cannot_be_done_is_told_with_its_remedy_and_leaves_nothing(
    world: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    filled = [text.format(p=photos) for text in arguments]
    assert run("--prompt", "somebody", "--output", tmp_path, "--steps", "1", *filled) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("portrait.py: ")
    assert re.search(told, line), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--face", "a.png"], "a --prompt is needed"),
        (["--structure", "1", "--prompt", "x"], "write it behind that person's --face"),
        (["--face", "a.png", "--start", "0.1", "--start", "0.2"], "given twice for the same --face"),
        (["--count", "0", "--prompt", "x"], "from 1 to 1000"),
        (["--count", "2"], "--count needs a --prompt"),
        (["--size", "big", "--prompt", "x"], "'big' is no size"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_checkpoint_with_nan_gives_an_error_and_no_picture(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(world / "world.safetensors")
    tensors["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "spoilt.safetensors")
    (tmp_path / "spoilt.yaml").write_bytes((world / "world.yaml").read_bytes())
    output = tmp_path / "out"
    code = run("--checkpoint", tmp_path / "spoilt.safetensors", "--prompt", "a man", "--output", output, *FAST)
    assert code != 0
    assert "spoilt.safetensors: first_stage_model.decoder.conv_out.bias holds infinities" in capsys.readouterr().err
    assert not list(output.rglob("*.png"))


@pytest.mark.parametrize("gone", ["world.safetensors", "kit.json", "faces", "samples.json"])
def test_a_kit_that_is_not_whole_is_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    for path in world.iterdir():
        if path.name != gone:
            (tmp_path / "models" / "world").mkdir(parents=True, exist_ok=True)
            (tmp_path / "models" / "world" / path.name).symlink_to(path)
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert run("--output", tmp_path / "out") == 1
    assert "git checkout models`" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([], "one lists no prompts with {word}"),
        ({"one": ["{both}"], "two": ["{both}"]}, "one lists no prompts with {word}"),
        ({"one": ["{word}"], "two": [1]}, "two lists no prompts with {both}"),
        ({"one": ["{word}"], "two": ["{both}"], "title": "x", "people": 0}, "no number of people"),
    ],
)
def test_samples_that_say_nothing_of_use_are_refused(tmp_path: Path, entries: Any, told: str) -> None:
    (tmp_path / "faces").mkdir()
    noise(0).save(tmp_path / "faces" / "eve.png")
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    with pytest.raises(PortraitError, match=told):
        samples.read_samples(tmp_path)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(PortraitError, match="is no JSON"):
        samples.read_samples(tmp_path)


def test_an_output_that_cannot_be_written_is_told(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(PortraitError, match=r"--output: .*Give another folder"),
        generation.Results.begin(tmp_path / "file"),
    ):
        pass


# -------------------------------------------------------------------------------------------------------------- samples


def test_sample_people_are_told_from_the_names_of_their_photos(tmp_path: Path) -> None:
    for name in ("woman-0019-1", "woman-0019-0", "man-0009-0", "0029-0", "woman-anna", "eve"):
        noise(0).save(tmp_path / f"{name}.png")
    people = samples.sample_people(tmp_path)
    assert [(one.name, one.word, [photo.stem for photo in one.photos]) for one in people] == [
        ("eve", "person", ["eve"]),
        ("woman-anna", "woman", ["woman-anna"]),
        ("man 0009", "man", ["man-0009-0"]),
        ("woman 0019", "woman", ["woman-0019-0", "woman-0019-1"]),
        ("person 0029", "person", ["0029-0"]),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [(("woman", "woman"), "two women"), (("man", "woman"), "a man and a woman"), (("person",) * 2, "two people")],
)
def test_two_people_are_told_as_captions_do(words: tuple[str, str], told: str) -> None:
    assert samples.both_words(*words) == told
    assert samples.both_words(*words, each=True) == f"a {words[0]} and a {words[1]}"


# -------------------------------------------------------------------------------------------------- measuring and sheet


def test_faces_and_people_are_paired_greedily_each_once() -> None:
    similar = torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.2, 0.3]])
    assert greedy_pairs(similar) == {0: 0, 1: 2}
    assert greedy_pairs(similar[:1]) == {0: 0}


def measuring_as(monkeypatch: pytest.MonkeyPatch, embeddings: list[list[float]]) -> Measurer:
    """A measurer that finds a face in each half of a picture, with these embeddings from left to right."""
    measurer = Measurer(tiny_backbone(), Detector("halves", "1", two_halves))
    monkeypatch.setattr(measurer, "embed", lambda crops: torch.tensor(embeddings))
    return measurer


LEFT_AND_RIGHT = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("embeddings", "owners", "recognised", "placed", "everybody"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], LEFT_AND_RIGHT, (True, True), (True, True), True),
        ([[1.0, 0.0], [0.0, 1.0]], None, (True, True), (None, None), True),
        # The people stand where the other one belongs.
        ([[0.0, 1.0], [1.0, 0.0]], LEFT_AND_RIGHT, (True, True), (False, False), False),
        # All of the picture is the first one's: the second has no place in it.
        ([[1.0, 0.0], [0.0, 1.0]], LEFT_AND_RIGHT * 0, (True, True), (True, False), False),
        # Nobody's part is nobody's.
        ([[1.0, 0.0], [0.0, 1.0]], torch.tensor([[-1, 1]]), (True, True), (False, True), False),
        # Both faces are the first one's; the second has to take what is left.
        ([[1.0, 0.0], [0.8, 0.6]], LEFT_AND_RIGHT, (True, False), (True, True), False),
    ],
)
def test_a_picture_shows_everybody_when_each_has_a_face_of_their_own_in_their_place(
    monkeypatch: pytest.MonkeyPatch,
    embeddings: list[list[float]],
    owners: torch.Tensor | None,
    recognised: tuple[bool, bool],
    placed: tuple[bool | None, bool | None],
    everybody: bool,
) -> None:
    measurer = measuring_as(monkeypatch, embeddings)
    measured = measurer.similarities(np.full((64, 64, 3), 9, np.uint8), torch.eye(2), [0, 1], owners)
    assert tuple(one.recognised for one in measured) == recognised
    assert tuple(one.placed for one in measured) == placed
    assert measuring.shows_everybody(measured) == everybody


def test_a_picture_with_a_face_too_few_does_not_show_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = measuring_as(monkeypatch, [])
    nobody = measurer.similarities(np.zeros((64, 64, 3), np.uint8), torch.eye(2), [0, 1], LEFT_AND_RIGHT)
    assert not measuring.shows_everybody(nobody)
    assert not measuring.shows_everybody([measuring.FaceSimilarity(0.9, None, True, True), nobody[1]])


def test_parts_of_a_picture_are_whose_share_is_largest() -> None:
    routing = torch.tensor([[[0.5, 0.0], [0.2, 0.0]], [[0.4, 0.9], [0.3, 0.0]]])
    assert measuring.owners_of(routing).tolist() == [[0, 1], [1, -1]]


def test_likeness_tells_own_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = measuring_as(monkeypatch, [[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    left = np.full((224, 224, 3), 10, np.uint8)
    references = torch.eye(3)
    one, two = measurer.similarities(left, references, [0, 1])
    assert (one.own, two.own) == (pytest.approx(0.6), pytest.approx(1.0))
    assert (one.others, two.others) == (0.0, 0.0)
    (alone,) = measurer.similarities(left, references, [0])
    assert (alone.own, alone.others) == (pytest.approx(0.6), pytest.approx(0.8))
    *_, nobody = measurer.similarities(left, references, [0, 1, 2])
    assert nobody == measuring.FaceSimilarity(None, None, False)


def test_a_network_in_half_precision_measures_like_in_full(tmp_path: Path) -> None:
    """The world's own file is in half precision."""
    network = tiny_backbone().eval()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(halves, tmp_path / "measuring.safetensors")
    detector = Detector("none", "1", lambda image: [])
    crops = [np.random.default_rng(seed).integers(0, 255, (224, 224, 3), np.uint8) for seed in range(3)]
    measured = Measurer.load(tmp_path / "measuring.safetensors", detector).embed(crops)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, Measurer(network, detector).embed(crops), atol=5e-3, rtol=0)


def test_the_sheet_keeps_every_word_and_picture() -> None:
    cells = [Cell(Image.new("RGB", (128, 128), (i, 90, 200)), ["word " * 20]) for i in range(3)]
    sheet = np.asarray(draw_sheet("Title", ["note " * 100], [Section("Heading", [cells, cells[:1]], ["a", "b", "c"])]))
    for i in range(3):
        shown = (sheet == (i, 90, 200)).all(axis=-1)
        assert shown.sum() == (2 if i == 0 else 1) * 160 * 160
    ground = sheet[0, 0]
    assert (sheet[-8:] == ground).all() and (sheet[:, -8:] == ground).all()
