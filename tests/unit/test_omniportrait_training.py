"""The recipe `omniportrait` trains what inference uses: one linear layer alone, by both losses of eq. 5, with drops."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")

from lib_portrait.attention import POSITIVE, Injection, Row, mark
from lib_portrait.checkpoints.kit import read_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.faces.features import FaceFeatures
from lib_portrait.methods.omniportrait import OmniPortraitRule, PivotEncoder, PivotIdentity, localization_loss
from lib_portrait.standalone.model import load_tokenizer
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
from trainer import adapter_recipe
from trainer.features import Features, FrozenNetworks, LatentEncoder, features_path, precompute, uncaptioned
from trainer.loop import train
from trainer.recipes import omniportrait
from trainer.recipes.omniportrait_data import PicturesWithPivots
from trainer.shards import FaceRecord, Record, Shards, encode_png, writing

E = 6
IMAGE = "1" * 64
# Who is in each picture, with which noun, and what is said of it.
SAMPLES = (
    (("a",), "woman", "a woman in a hat, the woman smiles"),
    (("a",), "woman", "a portrait of a girl"),
    (("b",), "man", "a man in a forest"),
    (("a", "b"), "woman", "a woman and a man"),
    (("c",), "woman", "a forest"),
    (("d",), None, "a man beside a person"),
)


def face(name: str, noun: str | None, left: float) -> FaceRecord:
    points = ((left + 8, 20.0), (left + 20, 20.0), (left + 14, 26.0), (left + 9, 32.0), (left + 19, 32.0))
    return FaceRecord(name, noun, (left, 8.0, left + 30, 40.0), points)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "data" / "people-00000.tar"
    path.parent.mkdir()
    with writing(path) as writer:
        for number, (names, noun, caption) in enumerate(SAMPLES):
            faces = tuple(face(name, noun, 2.0 + 30 * i) for i, name in enumerate(names))
            labels = None
            if number == 0:
                labels = np.zeros((SIDE, SIDE), np.uint8)
                labels[8:40, 4:28] = 1
            picture = encode_png(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))
            writer.add(f"{number:04d}", picture, "png", Record(caption, faces, {}), labels)
    return path


class MeanEncoder(LatentEncoder):
    def __init__(self) -> None:
        pass

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(pictures, 8)[:, [0, 1, 2, 0]]


class MeanColours:
    """Stands for the image encoder: the mean colour of each half of a face."""

    def encode(self, crops: Any) -> list[FaceFeatures]:
        halves = [torch.tensor([*one[:112].mean((0, 1)), *one[112:].mean((0, 1))]).float() / 255 for one in crops]
        return [FaceFeatures(torch.empty(0), torch.empty(0), image=one) for one in halves]


def frozen(images: Any, network: Any = None, **hashes: str) -> FrozenNetworks:
    return FrozenNetworks(MeanEncoder(), load_tokenizer(), None, {"vae": "v", **hashes}, 0, images, network)


@pytest.fixture
def data(shard: Path) -> Path:
    precompute([shard], frozen(MeanColours(), image=IMAGE), batch=4)
    return shard.parent


def recipe(monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str) -> omniportrait.OmniPortraitRecipe:
    return made_recipe(monkeypatch, omniportrait, data, *arguments)


def test_a_triplet_is_a_noun_a_face_and_its_mask(data: Path) -> None:
    tokenizer = load_tokenizer()

    def tokens(word: str) -> list[int]:
        return tokenizer(word, add_special_tokens=False).input_ids

    pictures = PicturesWithPivots(Shards.under(data), 2.0, tokens)
    # Of the others one has two people, and one a caption without a word for its person.
    assert [face.sample for face in pictures.faces] == [0, 1, 2, 5]
    words = [tokenizer.convert_ids_to_tokens(pictures.features.tokens[face.sample]) for face in pictures.faces]
    shown = [[spoken[place] for place in places] for spoken, places in zip(words, pictures.words)]
    assert shown == [["woman</w>"] * 2, ["girl</w>"], ["man</w>"], ["man</w>"]]
    first = pictures[0, (0, 0, 0)]
    assert first["word"].nonzero().flatten().tolist() == [*pictures.words[0]] == [2, 8]
    assert torch.equal(first["latent"], pictures.features.latents[0].float() * 2)
    # Masks of the shard, else the oval; in parts of the latent's positions.
    labelled = torch.zeros(8, 8)
    labelled[1:5, :3], labelled[1:5, 3] = 1, 0.5
    labelled[1:5, 0] = 0.5
    assert torch.equal(first["mask"], labelled)
    oval = pictures[1, (0, 0, 0)]["mask"]
    assert oval[2:4, 1:3].min() > 0.9 and not oval[:, 6:].any()
    # A person's other photo, and where there is none the picture itself.
    images = pictures.features.images
    seen = {tuple(pictures[0, (0, 0, draw)]["e_ref"].tolist()) for draw in range(12)}
    assert seen == {tuple(images[place][0].float().tolist()) for place in ((1, 0), (3, 0))}
    assert torch.equal(pictures[3, (0, 0, 5)]["e_ref"], images[5, 0][0].float())


def test_features_are_added_to_those_there_are_and_say_whose_they_are(shard: Path) -> None:
    precompute([shard], frozen(None), batch=4)
    before = load_file(features_path(shard))
    with pytest.raises(PortraitError, match="no embeddings of an image encoder.*--image"):
        _ = Features(Shards.under(shard)).images
    asked = []

    class Everywhere:
        def face(self, crop: np.ndarray) -> np.ndarray:
            asked.append(crop.shape)
            return np.ones(crop.shape[:2], bool)

    precompute([shard], frozen(MeanColours(), Everywhere(), image=IMAGE, parser="p"), batch=4)
    after = load_file(features_path(shard))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after["image"].shape == (7, E) and after["mask"].shape == (7, 8, 8)
    assert asked == [(512, 512, 3)] * 6, "the picture that has its own masks is not parsed"
    assert Features(Shards.under(shard)).hashes == {"vae": "v", "image": IMAGE, "parser": "p"}


def test_what_is_trained_is_what_inference_computes(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made = ready(recipe(monkeypatch, data), tmp_path)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    unet, batch, times = made.model.unet, batch_of(made), torch.tensor([900, 500, 20])
    words = batch["word"].clone()
    words[1] = False
    with torch.no_grad():
        predicted = made._predict(batch["latent"], times, batch["caption_ids"], batch["e_ref"], words)
        text = made.model.text_encoder(batch["caption_ids"]).last_hidden_state
    attention = torch.stack([made.rule.attention[site] for site in made.located]).mean(dim=0)
    eject(made)
    for row in range(3):
        positions = tuple(words[row].nonzero().flatten().tolist())
        rule = OmniPortraitRule(made.adapter, [PivotIdentity(batch["e_ref"][row])], watched=made.located)
        one = slice(row, row + 1)
        with torch.no_grad(), Injection(unet, rule, rows={1: Row(POSITIVE, words=(positions,))}):
            alone = unet(batch["latent"][one], times[one], mark(text[one], 1)).sample
        assert (predicted[row] - alone[0]).abs().max() < 1e-5
        own = torch.stack([rule.attention[site] for site in made.located]).mean(dim=0)[0]
        torch.testing.assert_close(attention[row], own, atol=1e-6, rtol=1e-5)
        assert bool(own.any()) == bool(positions)


def test_the_rate_is_the_papers() -> None:
    parser = argparse.ArgumentParser()
    omniportrait.configure(parser)
    assert parser.get_default("rate") == 2e-5


def test_the_loss_is_equation_5(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    made = ready(recipe(monkeypatch, data, "--eta", "0.3"), tmp_path)
    monkeypatch.setattr(omniportrait, "CAPTION_DROPPED", 0.0)
    monkeypatch.setattr(omniportrait, "ID_DROPPED", 0.0)
    batch = batch_of(made)
    with torch.no_grad():
        losses = made(batch, draws())
    attention = torch.stack([made.rule.attention[site] for site in made.located]).mean(dim=0)
    shape = made.shapes[made.located[0]]
    assert shape == (8, 8), "of the tiny model's levels the one nearest to 16 x 16"
    by_hand = torch.stack([(attention[row].view(shape) - batch["mask"][row]).square().mean() for row in range(3)])
    torch.testing.assert_close(localization_loss(attention, batch["mask"], shape), by_hand)
    torch.testing.assert_close(losses["location"], by_hand.mean())
    torch.testing.assert_close(losses["loss"], losses["diffusion"] + 0.3 * by_hand.mean())


def test_only_the_linear_layer_is_trained_and_the_export_is_a_kit(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made = recipe(monkeypatch, data)
    began = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert set(began) == {"adapter.projection.weight", "adapter.projection.bias"}
    frozen_weights = {name: tensor.clone() for name, tensor in made.model.unet.state_dict().items()}
    assert train(made, settings(tmp_path, save_every=5)) == 5
    eject(made)
    assert all(not torch.equal(tensor, began[name]) for name, tensor in made.state_dict().items())
    assert made.adapter.projection.weight[:, :E].abs().max() > 0
    assert all(torch.equal(tensor, frozen_weights[name]) for name, tensor in made.model.unet.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(np.isfinite(line[name]) for line in lines for name in ("loss", "diffusion", "location"))
    path = tmp_path / "export" / "omniportrait_tiny.safetensors"
    again = PivotEncoder.from_tensors(load_file(path))
    assert torch.equal(again.projection.weight, made.adapter.projection.weight.half().float())
    manifest = read_manifest(tmp_path / "export" / "tiny.kit.json")
    assert (manifest.method, manifest.adapter) == ("omniportrait", {"omniportrait": path.name})
    assert manifest.picture == (SIDE, SIDE) and manifest.training["eta"] == "0.002"
    further = recipe(monkeypatch, data, "--initial", str(path))
    assert torch.equal(further.adapter.projection.weight, again.projection.weight)
    assert further.adapter.projection.weight.requires_grad


def test_the_manifest_names_the_image_encoder_by_its_content(
    monkeypatch: pytest.MonkeyPatch, shard: Path, tmp_path: Path
) -> None:
    from lib_portrait.checkpoints.hashes import file_sha256

    encoder = tmp_path / "my-encoder.safetensors"
    save_file({"class_embedding": torch.zeros(3)}, encoder)
    precompute([shard], frozen(MeanColours(), image=file_sha256(encoder)), batch=4)
    made = recipe(monkeypatch, shard.parent, "--vision", str(encoder))
    export = tmp_path / "export"
    export.mkdir()
    made.export(export, {})
    stored = read_manifest(export / "tiny.kit.json").encoders["vision"]
    assert (stored.name, stored.sha256) == (encoder.name, file_sha256(encoder))
    assert file_sha256(export / encoder.name) == stored.sha256
    other = tmp_path / "other.safetensors"
    save_file({"class_embedding": torch.ones(3)}, other)
    with pytest.raises(PortraitError, match="another network than other.safetensors"):
        recipe(monkeypatch, shard.parent, "--vision", str(other))


def test_of_features_that_do_not_say_whose_they_are_no_encoder_is_named(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    path = next(data.glob("*.features.safetensors"))
    save_file(load_file(path), path, {"vae": "v"})
    recipe(monkeypatch, data).export(tmp_path, {})
    assert "vision" not in read_manifest(tmp_path / "tiny.kit.json").encoders


def test_captions_and_ids_are_dropped_in_a_tenth_each(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made, captions, without = ready(recipe(monkeypatch, data), tmp_path), [], []
    empty = uncaptioned(torch.zeros(1, 77, dtype=torch.long))

    def predict(noisy: Tensor, t: Tensor, caption_ids: Tensor, e_ref: Tensor, words: Tensor) -> Tensor:
        captions.append((caption_ids == empty).all(dim=1))
        without.append(~words.any(dim=1))
        made.rule.attention = {site: torch.zeros(len(noisy), 64) for site in made.located}
        return noisy

    monkeypatch.setattr(made, "_predict", predict)
    batch = {name: tensor.repeat_interleave(400, dim=0) for name, tensor in batch_of(made).items()}
    made(batch, draws(1200))
    untold, no_id = torch.cat(captions), torch.cat(without)
    assert bool((no_id | ~untold).all()), "without a caption there is no word"
    assert untold.float().mean() == pytest.approx(0.1, abs=0.03)
    assert no_id[~untold].float().mean() == pytest.approx(0.1, abs=0.03)


def test_gradient_checkpointing_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    found = []
    for checkpointing in (False, True):
        found.append(gradients(ready(recipe(monkeypatch, data, "--eta", "50"), tmp_path, checkpointing=checkpointing)))
    check_the_same(*found)


def test_pictures_are_drawn_below_those_they_are_of(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(adapter_recipe, "STEPS", 2)
    made = ready(recipe(monkeypatch, data), tmp_path)
    shown = made.pictures(draws(8))["people"]
    assert shown.shape == (3, 2 * 8, 4 * 8) and shown.isfinite().all() and 0 <= shown.min() <= shown.max() <= 1


def test_what_cannot_be_trained_on_is_refused(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    with pytest.raises(PortraitError, match="eta"):
        recipe(monkeypatch, data, "--eta", "-1")
    narrow = tmp_path / "narrow.safetensors"
    save_file(PivotEncoder(E - 1, 48).state_dict(), narrow)
    with pytest.raises(PortraitError, match=f"width {E - 1}, the features have {E}"):
        recipe(monkeypatch, data, "--initial", str(narrow))
    path = next(data.glob("*.features.safetensors"))
    tensors = load_file(path)
    tensors["tokens"][:, 1:] = 49407
    save_file(tensors, path, {"vae": "v", "image": IMAGE})
    with pytest.raises(PortraitError, match="nobody is alone.*captions"):
        recipe(monkeypatch, data)
