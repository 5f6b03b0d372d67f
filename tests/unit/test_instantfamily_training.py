"""The recipe `instantfamily` trains what inference uses: projections and a ControlNet, faces told in random order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from diffusers import ControlNetModel

from lib_portrait.attention import POSITIVE, Injection, control_sites, find_sites, mark
from lib_portrait.attention.regions import grown
from lib_portrait.checkpoints.formats import read_header
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.checkpoints.kit import read_manifest
from lib_portrait.control_picture import skeletons, with_circles
from lib_portrait.errors import PortraitError
from lib_portrait.methods.instantfamily import EXCLUDE, FaceProjections, FamilyMember, FamilyRule, Properties
from lib_portrait.standalone.control import load_control
from tests.adapter_training import (
    SIDE,
    batch_of,
    check_the_same,
    draws,
    eject,
    gradients,
    made_recipe,
    ready,
    settings,
)
from tests.small_networks import tiny_backbone
from trainer import adapter_recipe
from trainer.families import PicturesOfFamilies
from trainer.features import features_path, global_feature, uncaptioned
from trainer.loop import train
from trainer.recipes import instantfamily
from trainer.shards import FaceRecord, Record, Shards, encode_png, poses_of, writing

# How many people are in each picture.
PEOPLE = (1, 6, 2)


def face(number: int, i: int) -> FaceRecord:
    left, top = 2.0 + 10 * i, 4.0 + 3 * i
    points = ((left + 2, top + 3), (left + 6, top + 3), (left + 4, top + 5), (left + 2, top + 8), (left + 6, top + 8))
    return FaceRecord(f"{i}", None, (left, top, left + 8, top + 12), points)


def pose(i: int) -> list[Any]:
    points: list[Any] = [None] * 18
    points[0], points[1], points[2] = [6.0 + 10 * i, 9.0 + 3 * i], [6.0 + 10 * i, 24.0], [2.0 + 10 * i, 26.0]
    return points


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(1)
    path = tmp_path / "data" / "people-00000.tar"
    path.parent.mkdir()
    with writing(path) as writer:
        for number, people in enumerate(PEOPLE):
            record = Record(
                "people", tuple(face(number, i) for i in range(people)), {"poses": [*map(pose, range(people))]}
            )
            picture = encode_png(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            writer.add(f"{number:04d}", picture, "png", record, None)
    places = [(sample, number) for sample, people in enumerate(PEOPLE) for number in range(people)]
    backbone = tmp_path / "tiny_backbone.safetensors"
    save_file(dict(tiny_backbone().state_dict()), backbone)
    save_file(
        {
            "latents": torch.randn(len(PEOPLE), 4, 8, 8, generator=generator).half(),
            "tokens": torch.randint(1, 49000, (len(PEOPLE), 77), generator=generator).int(),
            "size": torch.full((len(PEOPLE), 2), SIDE, dtype=torch.int32),
            "intrinsic": torch.randn(len(places), 49, 16, generator=generator).half(),
            "structure": torch.zeros(len(places), 1, 1).half(),
            "sample": torch.tensor([sample for sample, _ in places], dtype=torch.int32),
            "face": torch.tensor([number for _, number in places], dtype=torch.int32),
        },
        features_path(path),
        metadata={"vae": "v", "backbone": file_sha256(backbone)},
    )
    return path.parent


def recipe(monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str) -> instantfamily.InstantFamilyRecipe:
    backbone = str(data.parent / "tiny_backbone.safetensors")
    return made_recipe(monkeypatch, instantfamily, data, "--backbone", backbone, *arguments)


def awake(made: instantfamily.InstantFamilyRecipe, run: Path, **own: Any) -> instantfamily.InstantFamilyRecipe:
    """The same, ready, with a ControlNet that says something: its last layers begin as zeros."""
    ready(made, run, **own)
    silent = (made.control.controlnet_mid_block, made.control.controlnet_cond_embedding.conv_out)
    for convolution in (*made.control.controlnet_down_blocks, *silent):
        torch.nn.init.normal_(convolution.weight, std=0.1)
    return made


def pictures(data: Path, other_photos: float = 0.0) -> PicturesOfFamilies:
    def pooled(local: Tensor) -> Tensor:
        return global_feature(tiny_backbone(), local)

    return PicturesOfFamilies(Shards.under(data), 2.0, 4, pooled, 0.25, Properties(inner=(1,)).circle_on, other_photos)


def test_four_of_six_are_told_in_random_order_and_all_are_posed(data: Path) -> None:
    family = pictures(data)
    record, local = Shards.under(data).record(1), family.features.face
    told = set()
    for draw in range(20):
        sample = family[1, (0, 0, draw)]
        order = [next(n for n in range(6) if torch.equal(local(1, n)[0].float(), one)) for one in sample["intrinsic"]]
        told.add(tuple(order))
        assert len(set(order)) == 4 and sample["present"].all()
        posed = torch.from_numpy(skeletons(poses_of(record), (SIDE, SIDE))).permute(2, 0, 1).float() / 255
        circles = []
        for number, n in enumerate(order):
            x0, y0, x1, y1 = record.faces[n].box
            circles.append(family.circle((x0 / SIDE, y0 / SIDE, x1 / SIDE, y1 / SIDE), number))
        assert torch.equal(sample["control"], (with_circles(posed, circles) * 255).round().byte())
        assert len({circle.colour for circle in circles}) == 4
        left, top, right, bottom = grown(record.faces[order[0]].box, 0.25)
        area = (min(right, SIDE) - max(left, 0)) * (bottom - max(top, 0)) / 64
        assert float(sample["shares"][0].sum()) == pytest.approx(area, rel=1e-4)
        torch.testing.assert_close(
            sample["embedding"], global_feature(tiny_backbone(), sample["intrinsic"]), atol=1e-5, rtol=1e-5
        )
    assert len(told) > 10
    alone = family[0, (0, 0, 0)]
    assert alone["present"].tolist() == [True, False, False, False] and not alone["shares"][1:].any()


def test_other_photos_tell_of_the_same_person_where_asked_for(data: Path) -> None:
    own, other = (
        {tuple(family[0, (0, 0, draw)]["intrinsic"][0, 0].tolist()) for draw in range(12)}
        for family in (pictures(data), pictures(data, 1.0))
    )
    first = pictures(data).features.face
    assert own == {tuple(first(0, 0)[0][0].float().tolist())}
    assert other == {tuple(first(sample, 0)[0][0].float().tolist()) for sample in (1, 2)}


@pytest.mark.parametrize("mask", ["multiply", EXCLUDE])
def test_what_is_trained_is_what_inference_computes(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, mask: str
) -> None:
    made = awake(recipe(monkeypatch, data, "--mask", mask), tmp_path)
    model, control, batch, times = made.model, made.control, batch_of(made), torch.tensor([900, 500, 20])
    with torch.no_grad():
        predicted = made._predict(
            batch["latent"], times, batch["caption_ids"], batch, torch.tensor([True, True, False])
        )
        text = model.text_encoder(batch["caption_ids"]).last_hidden_state
        tokens = made.adapter(F.normalize(batch["embedding"], dim=-1), batch["intrinsic"])
    eject(made)
    records = [Shards.under(data).record(row) for row in range(3)]
    for row in range(3):
        people = []
        for n in range(int(batch["present"][row].sum())):
            number = next(
                i
                for i in range(PEOPLE[row])
                if torch.equal(made.data.features.face(row, i)[0].float(), batch["intrinsic"][row, n])
            )
            box = grown(tuple(value / SIDE for value in records[row].faces[number].box), 0.25)
            people.append(FamilyMember(tokens[row, n], box))
        x, t, hint = batch["latent"][row : row + 1], times[row : row + 1], batch["control"][row : row + 1] / 255
        context = text[row : row + 1] if row == 2 else mark(text[row : row + 1], POSITIVE)
        rule = FamilyRule(made.adapter, people, mask)
        with (
            torch.no_grad(),
            Injection(model.unet, rule),
            Injection(control, rule, sites=control_sites(control, model.unet)),
        ):
            down, middle = control(x, t, context, hint, return_dict=False)
            alone = model.unet(
                x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=middle
            ).sample
        assert (predicted[row] - alone[0]).abs().max() < 2e-5, row


def test_projections_and_control_are_trained_and_the_export_says_how(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made = recipe(monkeypatch, data, "--margin", "0.5")
    began = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in made.model.unet.state_dict().items()}
    assert train(made, settings(tmp_path, 4, save_every=4)) == 4
    eject(made)
    still = [name for name, tensor in made.state_dict().items() if torch.equal(tensor, began[name])]
    assert not still
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in made.model.unet.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(np.isfinite(line["loss"]) for line in lines)
    export = tmp_path / "export"
    path, network = export / "instantfamily_tiny.safetensors", export / "control_instantfamily_tiny.safetensors"
    properties = Properties.from_metadata(read_header(path)[1])
    assert properties == made.adapter.properties and (properties.margin, properties.local_side) == (0.5, 7)
    FaceProjections.from_tensors(load_file(path), properties).check_fits(find_sites(made.model.unet))
    manifest = read_manifest(export / "tiny.kit.json")
    assert (manifest.method, manifest.adapter) == ("instantfamily", {"instantfamily": path.name})
    assert manifest.control is not None and manifest.control.sha256 == file_sha256(network)
    assert manifest.encoders["backbone"].sha256 == file_sha256(data.parent / "tiny_backbone.safetensors")
    own, theirs = load_control(network, made.model.unet), ControlNetModel.from_pretrained(export / network.stem)
    for name, tensor in made.control.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor.half().float()) and torch.equal(
            theirs.state_dict()[name].float(), tensor.half().float()
        )
    again = recipe(monkeypatch, data, "--margin", "0.5", "--initial", str(path), "--control", str(network))
    assert all(
        torch.equal(tensor, made.state_dict()[name].half().float()) for name, tensor in again.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in again.parameters())
    with pytest.raises(PortraitError, match="another model, network or margin"):
        recipe(monkeypatch, data, "--initial", str(path))


def test_the_control_net_learns_at_its_share_of_the_rate(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made = recipe(monkeypatch, data, "--control-rate", "0.1")
    rates = {
        id(parameter): group["lr"]
        for group in made.groups(settings(tmp_path, rate=2e-3))
        for parameter in group["params"]
    }
    for name, parameter in made.named_parameters():
        assert rates[id(parameter)] == pytest.approx(2e-4 if name.startswith("control.") else 2e-3), name
    with pytest.raises(PortraitError, match="control_rate"):
        recipe(monkeypatch, data, "--control-rate", "0")


def test_captions_and_faces_are_dropped_in_a_tenth_each(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made, seen, captions = recipe(monkeypatch, data), [], []
    empty = uncaptioned(torch.zeros(1, 77, dtype=torch.long))

    def predict(noisy: Tensor, t: Tensor, caption_ids: Tensor, batch: Any, told: Tensor) -> Tensor:
        seen.append(told)
        captions.append((caption_ids == empty).all(dim=1))
        return noisy

    monkeypatch.setattr(made, "_predict", predict)
    batch = {name: tensor.repeat_interleave(400, dim=0) for name, tensor in batch_of(made).items()}
    made(batch, draws(1200))
    without, untold = ~torch.cat(seen), torch.cat(captions)
    assert without.float().mean() == pytest.approx(0.1, abs=0.03)
    assert untold.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (without & untold).float().mean() < 0.03


def test_gradient_checkpointing_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    found = []
    for checkpointing in (False, True):
        found.append(gradients(awake(recipe(monkeypatch, data), tmp_path, checkpointing=checkpointing)))
    check_the_same(*found)


def test_pictures_are_drawn_below_their_control(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter_recipe, "STEPS", 2)
    made = awake(recipe(monkeypatch, data), tmp_path)
    shown = made.pictures(draws(8))["people"]
    assert shown.shape == (3, 2 * 8, 3 * 8) and shown.isfinite().all() and 0 <= shown.min() <= shown.max() <= 1


def test_what_cannot_be_trained_on_is_refused(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    path = data.parent / "bare" / "people-00000.tar"
    path.parent.mkdir()
    with writing(path) as writer:
        writer.add("0000", encode_png(np.zeros((64, 64, 3), np.uint8)), "png", Record("a", (face(0, 0),), {}), None)
    features = {name: tensor[:1] for name, tensor in load_file(features_path(data / path.name)).items()}
    backbone = file_sha256(data.parent / "tiny_backbone.safetensors")
    save_file(features, features_path(path), {"vae": "v", "backbone": backbone})
    with pytest.raises(PortraitError, match=r"no poses.*--poses"):
        recipe(monkeypatch, path.parent)
    with pytest.raises(PortraitError, match="not those of a control file"):
        recipe(monkeypatch, data, "--control", str(data.parent / "tiny_backbone.safetensors"))
    beside = features_path(data / path.name)
    save_file(load_file(beside), beside, {"vae": "v", "backbone": "another"})
    with pytest.raises(PortraitError, match="come from another network"):
        recipe(monkeypatch, data)


@pytest.mark.parametrize("poses", [None, 1, [[1.0, 2.0]], [[[1.0, 2.0]] * 17], [[[1.0, "x"]] * 18], [[[1.0]] * 18]])
def test_records_of_no_poses_are_refused(poses: Any) -> None:
    with pytest.raises(ValueError, match=r"pose|number"):
        poses_of(Record("", (), {} if poses is None else {"poses": poses}))
