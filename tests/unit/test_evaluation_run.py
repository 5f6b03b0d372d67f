"""`portrait.py evaluate` from its settings to its files, with small random networks; and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

import portrait as command_line
from lib_portrait.attention import find_sites
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.checkpoints.kit import Manifest, read_manifest, write_manifest
from lib_portrait.checkpoints.store import Folders, Store
from lib_portrait.conditioning import Conditioner
from lib_portrait.errors import PortraitError
from lib_portrait.faces.detection import Detector, Face
from lib_portrait.faces.features import pixels_of, recognition_view
from lib_portrait.faces.heatmap_detector import DetectorNetwork, faces_in, heatmap_detector
from lib_portrait.faces.service import FaceService
from lib_portrait.methods.declarations import adapter_files
from lib_portrait.methods.fusion import FaceFusion, Properties
from lib_portrait.methods.instantfamily import FaceProjections
from lib_portrait.request import Identity, Photo, PortraitRequest
from lib_portrait.standalone import sampling
from lib_portrait.standalone.control import save_control
from lib_portrait.standalone.model import save_model
from tests.parity.unets import diffusers_unet
from tests.small_networks import small_kit, small_manifest, small_model, tiny_backbone, tiny_vision
from trainer.attribute_network import AttributeNetwork
from trainer.companions import stored_file
from trainer.evaluation import generators, page, run
from trainer.evaluation.guided import guidance_options, swept
from trainer.evaluation.instruments import find_faces, fingerprint, open_recogniser, refuse_conditioning_network
from trainer.evaluation.page import evaluate_all
from trainer.evaluation.plans import ProtocolSettings
from trainer.evaluation.populations import PhotoFolder
from trainer.evaluation.run import EvaluationSettings, evaluate
from trainer.shards import encode_png

EYES_TO_MOUTH = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.6], [0.38, 0.75], [0.62, 0.75]], np.float32)


def two_halves(image: np.ndarray) -> list[Face]:
    """A face in each half of every picture."""
    half = np.array([image.shape[1] / 2, image.shape[0]], np.float32)
    corners = [np.array([left, 0], np.float32) for left in (0, image.shape[1] / 2)]
    return [Face(np.concatenate([corner, corner + half]), EYES_TO_MOUTH * half + corner, 0.99) for corner in corners]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like models/world with small random networks, in that one's place; a detector that needs no face."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        save_model(small_model(), folder / "world.safetensors")
        small_kit(folder, "world")
        # `tiny_backbone` seeds itself, and so would be the network that conditions.
        measuring = {name: tensor + 0.1 for name, tensor in tiny_backbone().state_dict().items()}
        save_file(measuring, folder / "world-measuring.safetensors")
        projections = {"visual_projection.weight": torch.randn(8, 64), "text_projection.weight": torch.randn(8, 48)}
        heads = {"heads": "1", "activation": "gelu"}
        save_file({**tiny_vision(), **projections}, folder / "small_vision.safetensors", heads)
        AttributeNetwork().save(folder / "world-attributes.safetensors", {})
        small_manifest(folder, "world")
        patch.setattr(run, "WORLD", folder)
        patch.setattr(run, "MODELS", folder)
        patch.setattr(run, "open_detector", lambda name, folders: Detector("halves", "1", two_halves))
        yield folder


def settings(world: Path, output: Path, *protocols: str, **changes: Any) -> EvaluationSettings:
    small = EvaluationSettings(
        output,
        protocols or ("single",),
        checkpoint=world / "world.safetensors",
        protocol_settings=ProtocolSettings(number=2, prompts=1, pictures=1),
        gallery=3,
        size=64,
        steps=1,
        batch=2,
        processes=1,
    )
    return replace(small, **changes)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that were generated."""
    batches: list[int] = []
    sample = sampling.sample

    def counted(model: Any, samplings: Sequence[Any], conditioning: Any, routing: Any, **more: Any) -> Any:
        batches.append(len(samplings))
        return sample(model, samplings, conditioning, routing, **more)

    monkeypatch.setattr(sampling, "sample", counted)
    return batches


def test_another_world_is_measured_by_its_own_kit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shipped one is not even there."""
    own = run.of_kit(world)
    assert own == {"checkpoint": world / "world.safetensors", "adapters": ("world",)}
    asked = settings(world, tmp_path / "out", kit=world, **own)
    monkeypatch.setattr(run, "WORLD", tmp_path / "nowhere")
    evaluate(asked, lambda text: None)
    told = json.loads((tmp_path / "out" / "single.json").read_text("utf-8"))
    assert set(told["weights"]["instruments"]) >= {"recogniser", "clip", "attributes"}


def test_an_adapter_of_any_method_is_evaluated_by_its_own_options(
    world: Path, tmp_path: Path, generated: list[int]
) -> None:
    """Two adapters of one name and of two methods; pairs with and without a region for each person."""
    unet = diffusers_unet()
    fusion = FaceFusion.for_sites(find_sites(unet), Properties(reference_size=64))
    folder = tmp_path / "fusion"
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in fusion.state_dict().items()}
    save_file(tensors, folder / "fusion_world.safetensors", fusion.properties.to_metadata())
    asked = settings(world, tmp_path / "out", "single", "multi", adapters=("world", f"fused={folder}"))
    asked = replace(asked, protocol_settings=replace(asked.protocol_settings, sides=True), options=("face_only",))
    single, multi = evaluate(asked, lambda text: None)
    names = ["text only", "world", "fused"]
    assert [row.variant.name for row in single.rows] == [*names, "real pictures"]
    sides = ["world, side by side", "fused, side by side"]
    assert [row.variant.name for row in multi.rows] == [*names, *sides, "real pictures"]
    told = json.loads((tmp_path / "out" / "single.json").read_text("utf-8"))
    assert set(told["weights"]["fused"]) == {"checkpoint", "yaml", "fusion"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "multi.jsonl").read_text("utf-8").splitlines()]
    pictures = {line["row"]: Image.open(tmp_path / "out" / line["picture"]) for line in lines}
    requests = {
        row: json.loads(picture.info["portrait"])["request"]
        for row, picture in pictures.items()
        if row in names + sides
    }
    assert requests["fused"]["method"] == "fusion" and requests["fused"]["face_only"] is True
    assert "region" not in requests["fused"]["identities"][0]
    regions = [one["region"]["box"] for one in requests["fused, side by side"]["identities"]]
    assert regions == [[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]
    made = {row: np.asarray(picture) for row, picture in pictures.items()}
    assert (made["fused"] != made["text only"]).any() and (made["fused"] != made["fused, side by side"]).any()
    for wrong in ("nonsense", "face_only=perhaps"):
        with pytest.raises(PortraitError, match="option"):
            evaluate(replace(asked, output=tmp_path / "wrong", options=(wrong,)))


def test_tables_lines_and_sheets_are_written_and_nothing_is_generated_twice(
    world: Path, tmp_path: Path, generated: list[int]
) -> None:
    wanted, said = settings(world, tmp_path, "single", "multi", "references"), []
    single, multi, references = evaluate(wanted, said.append)
    # Of two people a picture each without and with them, of their pair too, and further ones with 2 and 4 photos.
    assert sum(generated) == 2 * 2 + 2 * 1 + 2 * 2
    assert [row.variant.name for row in single.rows] == ["text only", "world", "real pictures"]
    shown = [column.name for column in multi.columns]
    assert shown[:4] == ["lowest similarity", "MultiSim", "both shown", "both placed"]
    text_only, injected, real = multi.rows
    assert injected.numbers["both placed"] is not None
    assert text_only.numbers["both placed"] is real.numbers["both placed"] is None
    assert "Both shown: each has a face" in (tmp_path / "multi.md").read_text("utf-8")
    assert len(references.rows) == 5
    assert said == [(tmp_path / f"{protocol}.md").read_text("utf-8") for protocol in wanted.protocols]
    for protocol in wanted.protocols:
        result = json.loads((tmp_path / f"{protocol}.json").read_text("utf-8"))
        assert result["settings"]["steps"] == 1 and result["settings"]["people"] == "held-out"
        assert set(result["weights"]["instruments"]) == {"recogniser", "clip", "attributes"}
        assert {"faceid", "backbone", "vision", "checkpoint"} <= set(result["weights"]["world"])
        lines = [json.loads(line) for line in (tmp_path / f"{protocol}.jsonl").read_text("utf-8").splitlines()]
        assert len(lines) == len(result["rows"]) * (1 if protocol == "multi" else 2)
        for line in lines:
            assert Image.open(tmp_path / line["picture"]).size == (64, 64)
            assert all(-1 <= value <= 1 for value in line["similarity"])
        assert Image.open(tmp_path / f"{protocol}.png").width > 64
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    generated.clear()
    evaluate(wanted)
    assert generated == []
    assert {path: path.read_bytes() for path in before} == before


def test_groups_have_a_table_for_each_size_and_one_for_all(world: Path, tmp_path: Path, generated: list[int]) -> None:
    sizes = ProtocolSettings(number=3, prompts=1, pictures=1, people_per_picture=(2, 3), sides=True)
    said: list[str] = []
    tables = evaluate(settings(world, tmp_path, "groups", protocol_settings=sizes), said.append)
    assert [table.plan.name for table in tables] == ["groups-2", "groups-3"]
    names = ["text only", "world", "world, side by side", "real pictures"]
    assert all([row.variant.name for row in table.rows] == names for table in tables)
    assert said[-1] == (tmp_path / "groups.md").read_text("utf-8") and "## boxes hit %" in said[-1]
    lines = [json.loads(line) for line in (tmp_path / "groups-3.jsonl").read_text("utf-8").splitlines()]
    beside = next(line for line in lines if line["row"] == "world, side by side")
    request = json.loads(Image.open(tmp_path / beside["picture"]).info["portrait"])["request"]
    thirds = [(0.0, 0.0, 1 / 3, 1.0), (1 / 3, 0.0, 2 / 3, 1.0), (2 / 3, 0.0, 1.0, 1.0)]
    assert [tuple(one["region"]["box"]) for one in request["identities"]] == thirds
    # Faces are found at a quarter and three quarters of the width.
    assert beside["hit"] == [True, False, True]
    assert [line["hit"] for line in lines if line["row"] != beside["row"]] == [None] * 3
    assert len(beside["between"]) == 3 and beside["multisim"] is not None
    # In the JSON of each size is what the pictures of as many people were made with.
    weights = json.loads((tmp_path / "groups-3.json").read_text("utf-8"))["weights"]["world"]
    assert "router" in weights
    assert sum(generated) == 2 * 3


def test_each_row_with_people_has_a_guided_one_and_there_is_one_with_guidance_alone(
    world: Path, tmp_path: Path, generated: list[int]
) -> None:
    said = {"strength": 0.5, "gradient": "share", "begin": 1.0}
    counts = ProtocolSettings(number=2, prompts=1, pictures=1, reference_guidance=said)
    asked = settings(world, tmp_path, protocol_settings=counts, steps=2, detector="halves")
    (single,) = evaluate(asked, lambda text: None)
    names = ["text only", "world", "world + guidance", "reference guidance only", "real pictures"]
    assert [row.variant.name for row in single.rows] == names
    lines = [json.loads(line) for line in (tmp_path / "single.jsonl").read_text("utf-8").splitlines()]
    pictures: dict[str, list[Image.Image]] = {}
    for line in lines:
        pictures.setdefault(line["row"], []).append(Image.open(tmp_path / line["picture"]))
    facts = {row: json.loads(own[0].info["portrait"]) for row, own in pictures.items()}
    for row, guided in zip(names, (False, False, True, True, False)):
        assert [line["guided"] for line in lines if line["row"] == row] == [[True] if guided else None] * 2
        assert ("guidance" in (facts[row].get("request") or {})) == ("finder" in facts[row]) == guided
    assert facts["world + guidance"]["request"]["guidance"] == {"enabled": True, **said}
    assert facts["world + guidance"]["finder"] == "halves-1"
    # A row and its guided one differ by the guidance alone, and are given the same whole photos.
    bare = {name: value for name, value in facts["world + guidance"]["request"].items() if name != "guidance"}
    assert bare == facts["world"]["request"] and isinstance(bare["identities"][0]["photos"][0], str)
    made = {row: [np.asarray(picture) for picture in own] for row, own in pictures.items()}
    for one, other in (("world", "world + guidance"), ("text only", "reference guidance only")):
        assert all((a != b).any() for a, b in zip(made[one], made[other]))
    assert [one.minus for one in single.differences if one.variant == "world + guidance"] == ["world"]
    assert single.rows[2].numbers["guided"] is not None and single.rows[1].numbers["guided"] is None
    assert "Guided: share" in (tmp_path / "single.md").read_text("utf-8")
    assert json.loads((tmp_path / "single.json").read_text("utf-8"))["rows"][2]["guidance"]["options"] == said


def test_what_the_kit_says_of_guidance_decides_the_picture(world: Path, tmp_path: Path, generated: list[int]) -> None:
    folder = tmp_path / "kit"
    shutil.copytree(world, folder)
    manifest = read_manifest(folder / "kit.json")
    write_manifest(folder / "kit.json", replace(manifest, guidance={"block": 0, "gradient": "share"}))
    counts = ProtocolSettings(number=1, prompts=1, pictures=1, reference_guidance={"strength": 0.5, "begin": 1.0})
    told = {}
    for place in (world, folder):
        own = settings(place, tmp_path / place.name, protocol_settings=counts, steps=2, detector="halves")
        own = replace(own, adapters=(f"a={place}",))
        evaluate(own, lambda text: None)
        lines = [json.loads(line) for line in (own.output / "single.jsonl").read_text("utf-8").splitlines()]
        (line,) = (line for line in lines if line["row"] == "a + guidance")
        told[place] = json.loads(Image.open(own.output / line["picture"]).info["portrait"])["request"]["guidance"]
    assert told[world] == {"enabled": True, "strength": 0.5, "begin": 1.0}
    assert told[folder] == {**told[world], "block": 0, "gradient": "share"}
    result = json.loads((tmp_path / "kit" / "single.json").read_text("utf-8"))
    assert result["settings"]["reference_guidance"]["a"] == {"block": 0, "gradient": "share"}


def test_whom_guidance_does_not_find_is_drawn_without_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the table says of how many that is true."""
    monkeypatch.setattr(FaceService, "ovals", lambda service, picture: [])
    counts = ProtocolSettings(number=1, prompts=1, pictures=1, reference_guidance={"begin": 1.0})
    asked = settings(world, tmp_path, protocol_settings=counts, steps=2, detector="halves")
    (single,) = evaluate(asked, lambda text: None)
    lines = [json.loads(line) for line in (tmp_path / "single.jsonl").read_text("utf-8").splitlines()]
    assert [line["guided"] for line in lines] == [None, None, [False], [False], None]
    made = [np.asarray(Image.open(tmp_path / line["picture"]), np.int16) for line in lines]
    # Guided rows run apart from the others, which changes their last digits.
    assert abs(made[0] - made[3]).max() <= 2 and abs(made[1] - made[2]).max() <= 2
    estimate = single.rows[2].numbers["guided"]
    assert estimate is not None and estimate.value == 0


def test_an_option_of_guidance_is_swept_and_plotted(world: Path, tmp_path: Path, generated: list[int]) -> None:
    sweeps = (("begin", (0.6, 1.0)), ("noise", ("fixed", "step")))
    counts = ProtocolSettings(number=2, prompts=1, pictures=1, sweeps=sweeps, reference_guidance={"strength": 20.0})
    asked = settings(world, tmp_path, "guidance", protocol_settings=counts, steps=2, detector="halves")
    begin, noise = evaluate(asked, lambda text: None)
    rows = ["text only", "world", "world, begin = 0.6", "world, begin = 1", "real pictures"]
    assert [row.variant.name for row in begin.rows] == rows
    assert [dict(row.variant.guidance.options) for row in begin.rows[2:4]] == [
        {"strength": 20.0, "begin": 0.6},
        {"strength": 20.0, "begin": 1.0},
    ]
    assert [row.variant.name for row in noise.rows][2:4] == ["world, noise = fixed", "world, noise = step"]
    for part in ("begin", "noise"):
        assert Image.open(tmp_path / f"guidance-{part}-plot.png").width > 800
        assert (tmp_path / f"guidance-{part}.md").is_file()
    whole = (tmp_path / "guidance.md").read_text("utf-8")
    assert "## Reference guidance: begin" in whole and "| world, noise = step |" in whole
    # Named by the user, what guidance does alone is swept too.
    alone = evaluate(replace(asked, adapters=("none",)), lambda text: None)[0]
    names = [row.variant.name for row in alone.rows]
    assert names == [
        "text only",
        "reference guidance only, begin = 0.6",
        "reference guidance only, begin = 1",
        "real pictures",
    ]


def test_all_of_it_is_gathered_on_a_page(world: Path, tmp_path: Path) -> None:
    counts = ProtocolSettings(
        number=2,
        prompts=1,
        pictures=1,
        people_per_picture=(2,),
        betas=(0.0, 0.1),
        references=(1,),
        sweeps=(("begin", (1.0,)),),
    )
    asked = settings(world, tmp_path, protocol_settings=counts, steps=2, detector="halves")
    said: list[str] = []
    tables = evaluate_all(asked, said.append)
    names = ["single", "multi", "groups-2", "references", "beta", "guidance-begin"]
    assert [table.plan.name for table in tables] == names
    text = (tmp_path / "evaluation.md").read_text("utf-8")
    for name in names:
        assert f"]({name}.png)" in text and (tmp_path / f"{name}.png").is_file()
        assert (tmp_path / f"{name.partition('-')[0]}.md").read_text("utf-8") in text
    assert "](guidance-begin-plot.png)" in text
    lines = text.splitlines()
    at = lines.index("## Side by side")
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[at + 4 : at + 9]
    }
    assert list(rows) == ["text only", "world", "world + guidance", "reference guidance only", "real pictures"]
    head = [cell.strip() for cell in lines[at + 2].split("|")[2:-1]]
    of = {row: dict(zip(head, cells)) for row, cells in rows.items()}
    multi = {row.variant.name: row.numbers for row in tables[1].rows}
    beside = multi["world, side by side + guidance"]["both shown"]
    assert beside is not None
    assert of["world + guidance"]["pairs, side by side %"].startswith(f"{100 * beside.value:.1f}")
    assert of["real pictures"]["seconds a picture"] == of["text only"]["pairs, side by side %"] == "–"
    assert float(of["world"]["seconds a picture"]) > 0 and float(of["text only"]["× text only"]) > 0.1
    with pytest.raises(PortraitError, match="nobody is drawn without"):
        evaluate_all(replace(asked, adapters=("none",)))
    with pytest.raises(PortraitError, match="others beside"):
        evaluate_all(replace(asked, protocols=("all", "single")))


def test_what_is_swept_where_nothing_is_said_goes_out_from_what_works(world: Path, tmp_path: Path) -> None:
    counts = ProtocolSettings(number=1, prompts=1, pictures=1)
    prepared = run.prepare(settings(world, tmp_path, "guidance", protocol_settings=counts))
    assert [plan.part for plan in prepared.plans] == ["begin", "strength", "reference_t"]
    said = [
        [one.guidance.options[plan.part] for one in plan.variants if one.guidance.enabled] for plan in prepared.plans
    ]
    assert said[1] == [2.125, 4.25, 8.5, 17.0, 34.0]
    assert run._usual_sweeps(counts, {"strength": 0.4})[1] == ("strength", (0.1, 0.2, 0.4, 0.8, 1.6))
    given = replace(counts, reference_guidance={"strength": 0.2})
    assert run._usual_sweeps(given, {"strength": 0.4})[1][1][2] == 0.2
    stepwise = replace(counts, reference_guidance={"noise": "step"})
    assert [name for name, _ in run._usual_sweeps(stepwise, {})] == ["begin", "strength"]


def test_a_broken_run_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = generators.PictureCache.put

    def breaks(cache: generators.PictureCache, *put_there: Any) -> None:
        if cache.written == 3:
            raise KeyboardInterrupt
        put(cache, *put_there)

    with monkeypatch.context() as patch:
        patch.setattr(generators.PictureCache, "put", breaks)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(world, tmp_path, batch=1))
    assert not (tmp_path / "single.md").exists()
    assert sum(generated) == 4
    evaluate(settings(world, tmp_path, batch=1))
    # The fourth was lost, the other three were not generated again.
    assert sum(generated) == 5


def test_processes_share_the_generation(
    world: Path, tmp_path: Path, generated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    wanted = settings(world, tmp_path, protocol_settings=ProtocolSettings(number=3, prompts=2, pictures=1))
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    shares = []
    for place in range(2):
        assert run._generate_share(wanted, place, 2) is None
        shares.append(sum(generated))
    assert shares == [8, 12]
    evaluate(wanted)
    assert sum(generated) == 12


def test_what_goes_wrong_in_a_process_is_told_in_its_words(world: Path, tmp_path: Path) -> None:
    problem = run._generate_share(settings(world, tmp_path, adapters=("nobody",)), 0, 2)
    assert problem is not None and problem[0] == "checkpoint" and "nobody" in problem[1]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_the_recogniser_that_conditions_may_not_measure(world: Path, tmp_path: Path, generated: list[int]) -> None:
    """Under whatever name, precision or prefix."""
    tensors = load_file(world / "small_backbone.safetensors")
    disguised = {
        f"module.{name}": tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    save_file(disguised, tmp_path / "another.safetensors")
    for path in (world / "small_backbone.safetensors", tmp_path / "another.safetensors"):
        with pytest.raises(PortraitError, match="the very network") as raised:
            evaluate(settings(world, tmp_path / "out", recogniser=str(path)))
        assert raised.value.field == "recogniser"
    assert generated == []
    measuring = open_recogniser(world / "world-measuring.safetensors")
    refuse_conditioning_network(measuring, world / "small_backbone.safetensors")
    assert measuring.weights != fingerprint(read_tensors(world / "small_backbone.safetensors").tensors)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"recogniser": "nowhere.safetensors"}, "recogniser"),
        ({"clip": "ViT-L-14:nowhere.pt"}, "clip"),
        ({"attributes": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"people": "nowhere"}, "people"),
        ({"adapters": ("world", "world")}, "adapter"),
        ({"gallery": 0}, "gallery"),
        ({"protocols": ("single", "triple")}, "protocol"),
        ({"adapters": ("none",)}, "adapter"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_generated(
    world: Path, tmp_path: Path, generated: list[int], changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(PortraitError) as raised:
        evaluate(settings(world, tmp_path, **changes))
    assert raised.value.field == field
    assert generated == []


def test_photographs_are_not_measured_by_what_only_knows_drawn_people(world: Path, tmp_path: Path) -> None:
    for person in ("ada", "eve"):
        (tmp_path / "photos" / person).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((64, 64, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / person / f"{number}.png")
    nobody = Detector("none", "1", lambda image: [])
    people = PhotoFolder(tmp_path / "photos", 1, nobody)
    assert [person.name for person in people.people] == ["ada", "eve"]
    with pytest.raises(PortraitError, match="FaceNet") as raised:
        evaluate(settings(world, tmp_path / "out", people=str(tmp_path / "photos")))
    assert raised.value.field == "recogniser"
    with pytest.raises(PortraitError, match="nobody in .*photos has 3 photos"):
        PhotoFolder(tmp_path / "photos", 2, nobody)


def test_photographs_of_a_folder_are_turned_upright_and_drawn_pictures_are_not(tmp_path: Path) -> None:
    """A detector that is sure of a face only where the photo's white half is above."""

    def find(image: np.ndarray) -> list[Face]:
        rows = image[image.shape[0] // 4, :, 0].mean(), image[image.shape[0] * 3 // 4, :, 0].mean()
        score = 0.99 if rows[0] > rows[1] + 50 else 0.5
        points = np.array([[20, 20], [40, 20], [30, 30], [22, 40], [38, 40]], np.float32)
        return [Face(np.array([10, 10, 50, 50], np.float32), points, score)]

    upright = np.zeros((60, 80, 3), np.uint8)
    upright[:30] = 255
    (tmp_path / "ada").mkdir()
    for number, turns in enumerate((0, 1)):
        Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns))).save(tmp_path / "ada" / f"{number}.png")
    detector, said = Detector("half", "1", find, sure=0.9), []
    people = PhotoFolder(tmp_path, 1, detector, said.append)
    np.testing.assert_array_equal(people.photo(0, 0).image, upright)
    for _ in range(2):
        np.testing.assert_array_equal(people.photo(0, 1).image, upright)
    assert said == [f"{tmp_path / 'ada' / '1.png'} was turned by 90° to the right."]
    lying = np.ascontiguousarray(np.rot90(upright))
    assert {face.score for face in find_faces(lying, detector)} == {0.5}


def test_the_command_line_becomes_settings(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[EvaluationSettings] = []
    monkeypatch.setattr(run, "evaluate", evaluated.append)
    line = f"evaluate single beta --output {tmp_path} --adapter a={world} --adapter world --number 3 --betas 0 0.5"
    line += " --recogniser r.pt --fid face --steps 7 --device cpu --processes 2"
    assert command_line.run(command_line.parse([*line.split(), "--attributes", ""])) == 0
    (chosen,) = evaluated
    assert chosen == EvaluationSettings(
        tmp_path,
        ("single", "beta"),
        adapters=(f"a={world}", "world"),
        protocol_settings=ProtocolSettings(number=3, betas=(0.0, 0.5)),
        recogniser="r.pt",
        attributes="",
        fid="face",
        steps=7,
        processes=2,
    )
    line = f"evaluate groups guidance --output {tmp_path} --reference-guidance strength=0.3,gradient=share"
    line += " --sweep begin=0.4,0.6 --sweep noise=fixed,step --people-per-picture 2 5 --names-each --device cpu"
    assert command_line.run(command_line.parse(line.split())) == 0
    assert evaluated[1].protocol_settings == ProtocolSettings(
        people_per_picture=(2, 5),
        names_each=True,
        reference_guidance={"strength": 0.3, "gradient": "share"},
        sweeps=(("begin", (0.4, 0.6)), ("noise", ("fixed", "step"))),
    )
    assert command_line.run(command_line.parse(["evaluate", "single", "--output", "x", "--reference-guidance"])) == 0
    assert evaluated[2].protocol_settings.reference_guidance == {}
    monkeypatch.setattr(page, "evaluate_all", evaluated.append)
    assert command_line.run(command_line.parse(["evaluate", "all", "--output", "x"])) == 0
    assert evaluated[3].protocols == ("all",)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("strength=0.3", {"strength": 0.3}),
        ("strength=0.3, every=2 ,gradient=share,checkpointing=", {"strength": 0.3, "every": 2.0, "gradient": "share"}),
        ('{"strength": 0.3, "checkpointing": true}', {"strength": 0.3, "checkpointing": True}),
    ],
)
def test_guidance_is_given_as_text_or_json(text: str, options: dict[str, Any]) -> None:
    given = guidance_options(text)
    assert {name: given[name] for name in options} == options
    assert set(given) - set(options) <= {"checkpointing"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("force=1", "no option of reference guidance"),
        ("strength", "no value of it"),
        ("strength=much", "no value of it"),
        ("strength=-1", "out of range"),
        ("every=1.5", "no whole number"),
        ("noise=loud", "no choice"),
        ('{"strength": "0.3"}', "no number"),
        ('{"strength": 0.3', "no JSON"),
        ('{"force": 1}', "no option of reference guidance"),
    ],
)
def test_guidance_that_there_is_not_is_refused(text: str, problem: str) -> None:
    with pytest.raises(PortraitError, match=problem) as raised:
        guidance_options(text)
    assert raised.value.field.startswith("--reference-guidance")


@pytest.mark.parametrize(
    ("text", "problem"),
    [("begin", "no values"), ("begin=", "no values"), ("begin=0.5,0.50", "twice"), ("begin=2", "out of range")],
)
def test_what_cannot_be_swept_is_refused(text: str, problem: str) -> None:
    with pytest.raises(PortraitError, match=problem) as raised:
        swept(text)
    assert raised.value.field.startswith("--sweep")


# ------------------------------------------------------------------------------------------------- the world's detector


def test_a_detector_s_cells_tell_one_face_each(tmp_path: Path) -> None:
    cells = torch.full((15, 16, 16), -9.0)
    cells[1:] = 0
    # A face at cell (4, 6) that lights up its neighbour too, and another far from it.
    for row, column, score in ((4, 6, 5.0), (4, 7, 2.0), (12, 3, 1.0)):
        cells[0, row, column] = score
        offset = (6 - column) * 8 if row == 4 else 0
        for point, (x, y) in enumerate(((-16, -16), (16, 16), (-6, -4), (6, -4), (0, 2), (-5, 8), (5, 8))):
            cells[1 + 2 * point, row, column] = (x + offset) / 32
            cells[2 + 2 * point, row, column] = y / 32
    faces = faces_in(cells)
    assert [face.box.tolist() for face in faces] == [[36, 20, 68, 52], [12, 84, 44, 116]]
    assert faces[0].landmarks[2].tolist() == [52, 38]
    DetectorNetwork().save(tmp_path / "world-detector.safetensors", {})
    detector = heatmap_detector(tmp_path / "world-detector.safetensors")
    assert detector.name == "heatmap"
    detector.find(np.zeros((64, 96, 3), np.uint8))
    shutil.copy(tmp_path / "world-detector.safetensors", tmp_path / "attributes.safetensors")
    with pytest.raises(PortraitError, match="holds no attributes network but detector"):
        AttributeNetwork.load(tmp_path / "attributes.safetensors")


def test_an_adapter_trained_on_the_global_feature_is_given_that(world: Path, tmp_path: Path) -> None:
    """Table 3's first row: its file takes the recogniser's embedding where others take its local features."""
    folder = tmp_path / "global"
    folder.mkdir()
    small_kit(folder, "global")
    faceid = folder / "uniportrait-faceid_global.safetensors"
    names = {"backbone": "small_backbone.safetensors", "vision": "small_vision.safetensors", "components": "global"}
    save_file(load_file(faceid), faceid, names)
    store, name = Store(Folders([folder]), adapter_files()), "global"
    photo = Photo.of(encode_png(np.full((224, 224, 3), 90, np.uint8)), aligned=True)
    conditioner = Conditioner(run._face_service(store.kit(name), tmp_path / "cache", "mtcnn"), store)
    encoder = conditioner._encoder(store.kit(name), "cpu", torch.float32, print)
    features = conditioner.faces.features(photo, "photo", encoder)
    with torch.no_grad():
        embedding, _ = tiny_backbone()(recognition_view(pixels_of([conditioner.faces.crop(photo, "photo")])))
    assert torch.allclose(features.intrinsic, embedding, atol=1e-5)
    assert conditioner.faces.zero(encoder).intrinsic.shape == embedding.shape
    request = PortraitRequest((Identity((photo,)),), checkpoint=name)
    assert conditioner.prepare(request, (64, 64)).people[0].tokens
    local = Store(Folders([world]), adapter_files()).kit("world")
    assert type(run._face_service(local, tmp_path / "cache", "mtcnn")) is FaceService


def test_places_and_poses_reach_the_methods_that_need_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, backbone, folder = small_model(), tiny_backbone(), tmp_path / "family"
    folder.mkdir()
    projections = FaceProjections.for_sites(find_sites(model.unet), backbone.embedding_width, backbone.widths[-1])
    file = folder / "instantfamily_family.safetensors"
    save_file(dict(projections.state_dict()), file, projections.properties.to_metadata())
    network = save_control(ControlNetModel.from_unet(model.unet), folder, "control_family")
    encoders = {"backbone": stored_file(world / "small_backbone.safetensors")}
    manifest = Manifest("family", "instantfamily", {"instantfamily": file.name}, encoders, control=stored_file(network))
    write_manifest(folder / "family.kit.json", manifest)
    seen: list[tuple[Any, Any]] = []
    sample = sampling.sample

    def watched(model: Any, samplings: Sequence[Any], conditioning: Any, routing: Any, control: Any = None) -> Any:
        if conditioning is not None:
            assert len(samplings) == 1, "each has a layout of its own"
            seen.append((conditioning, control))
        return sample(model, samplings, conditioning, routing, control=control)

    monkeypatch.setattr(sampling, "sample", watched)
    counts = ProtocolSettings(number=2, prompts=1, pictures=2, layouts=True)
    adapters = (f"family={folder}", "world")
    asked = settings(world, tmp_path / "out", "multi", adapters=adapters, protocol_settings=counts)
    evaluate(replace(asked, batch=1))
    by_method = {
        name: [(own, control) for own, control in seen if own.request.method == name]
        for name in ("instantfamily", "uniportrait")
    }
    assert len(by_method["instantfamily"]) == 2 and len(by_method["uniportrait"]) == 4
    boxes = {tuple(one.region.box for one in own.request.identities) for own, _ in by_method["instantfamily"]}
    laid_out = [own.request for own, _ in by_method["uniportrait"] if own.request.identities[0].region is not None]
    assert len(boxes) == 2 and boxes == {tuple(one.region.box for one in own.identities) for own in laid_out}
    assert all(control is None for _, control in by_method["uniportrait"])
    first, second = (control.picture for _, control in by_method["instantfamily"])
    assert first.shape == (3, 64, 64) and not torch.equal(first, second)
    lines = [json.loads(line) for line in (tmp_path / "out" / "multi.jsonl").read_text().splitlines()]
    assert all(len(line["placed"]) == 2 for line in lines if line["row"] in ("family", "world, laid out"))
    facts = json.loads((tmp_path / "out" / "multi.json").read_text())
    assert facts["weights"]["family"]["control"] == manifest.control.sha256  # type: ignore[union-attr]
    before = len(seen)
    evaluate(replace(asked, batch=1))
    assert len(seen) == before, "they were generated again"
