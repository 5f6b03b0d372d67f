"""The recipe `fusion` trains what inference uses: k_f and v_f alone, of pairs of photos of one person, with drops."""

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

from lib_portrait.attention import POSITIVE, Injection, mark
from lib_portrait.checkpoints.formats import read_header
from lib_portrait.checkpoints.kit import read_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.methods.fusion import STEP, FaceFusion, FusedIdentity, FusionRule, Properties
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
from trainer.features import FACE_ONLY, Features, FrozenNetworks, LatentEncoder, features_path, precompute, uncaptioned
from trainer.loop import train
from trainer.recipes import fusion
from trainer.references import PicturesWithReferences
from trainer.shards import FaceRecord, Record, Shards, encode_png, writing

# Who is in each picture; b is nowhere else, and nobody is alone in the last but one.
WHO = (("a",), ("a",), ("b",), ("c",), ("a", "c"), ("d",), ("d",))
UNREADABLE = 6


def face(name: str, left: float, wide: float = 30.0) -> FaceRecord:
    points = ((left + 8, 20.0), (left + 20, 20.0), (left + 14, 26.0), (left + 9, 32.0), (left + 19, 32.0))
    return FaceRecord(name, "woman", (left, 8.0, left + wide, 40.0), points)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "data" / "people-00000.tar"
    path.parent.mkdir()
    with writing(path) as writer:
        for number, names in enumerate(WHO):
            # The second face of a picture is a small one.
            faces = tuple(face(name, 2.0 + 30 * i, 5.0 if i else 30.0) for i, name in enumerate(names))
            picture = b"no picture" if number == UNREADABLE else encode_png(rng.integers(0, 256, (64, 64, 3), np.uint8))
            writer.add(f"{number:04d}", picture, "png", Record("a woman", faces, {}), None)
    return path


@pytest.fixture
def data(shard: Path) -> Path:
    """The shard with latents and references of 8 x 8 positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49000, (len(WHO), 77), generator=generator)
    places = [(sample, 0) for sample in range(len(WHO)) if sample != UNREADABLE]
    latents = torch.randn(len(WHO), 4, 8, 8, generator=generator).half()
    latents[UNREADABLE] = torch.nan
    save_file(
        {
            "latents": latents,
            "tokens": tokens.int(),
            "size": torch.full((len(WHO), 2), SIDE, dtype=torch.int32),
            "references": torch.randn(len(places), 4, 8, 8, generator=generator).half(),
            "reference_sample": torch.tensor([sample for sample, _ in places], dtype=torch.int32),
            "reference_face": torch.tensor([number for _, number in places], dtype=torch.int32),
        },
        features_path(shard),
        metadata={"vae": "v", "references": str(SIDE)},
    )
    return shard.parent


def recipe(monkeypatch: pytest.MonkeyPatch, data: Path, *arguments: str) -> fusion.FusionRecipe:
    return made_recipe(monkeypatch, fusion, data, *arguments)


def test_a_reference_is_another_photo_of_the_one_person_there(data: Path) -> None:
    pictures = PicturesWithReferences(Shards.under(data), 2.0)
    assert [(one.sample, one.record.id) for one in pictures.faces] == [(0, "a"), (1, "a"), (6, "d")]
    references = pictures.features.references
    seen = {
        next(place for place, own in references.items() if torch.equal(own.float() * 2, sample["reference"]))
        for sample in (pictures[0, (0, 0, draw)] for draw in range(12))
    }
    assert seen == {(1, 0), (4, 0)}
    sample = pictures[0, (0, 0, 0)]
    assert torch.equal(sample["latent"], pictures.features.latents[0].float() * 2)
    assert sample["region"].sum() == pytest.approx(30 * 32 / 64)
    with pytest.raises(ValueError, match="cannot be used"):
        pictures[2, (0, 0, 0)]


def test_references_are_latents_of_the_squares_about_large_faces(shard: Path) -> None:
    encoded: list[Tensor] = []

    class Keeping(LatentEncoder):
        def __init__(self) -> None:
            pass

        def __call__(self, pictures: Tensor) -> Tensor:
            encoded.append(pictures)
            return torch.nn.functional.avg_pool2d(pictures, 8)[:, [0, 1, 2, 0]]

    class Words:
        def __call__(self, text: str, **options: Any) -> Any:
            return argparse.Namespace(input_ids=[49406] * 77)

    def made(references: int) -> dict[str, Tensor]:
        frozen = FrozenNetworks(Keeping(), Words(), None, {"vae": "v"}, references)  # type: ignore[arg-type]
        precompute([shard], frozen, batch=4)
        return load_file(features_path(shard))

    assert "references" not in made(0)
    latents = encoded[:2]
    encoded.clear()
    found = made(32)
    assert [tuple(one.shape[1:]) for one in encoded] == [(3, 32, 32)] * len(encoded), "latents are not made again"
    # Of the second, smaller face of picture 4 and the picture that cannot be read there is none.
    assert found["reference_sample"].tolist() == [0, 1, 2, 3, 4, 5] and not found["reference_face"].any()
    assert found["references"].shape == (6, 4, 4, 4) and found["latents"].shape == (7, 4, 8, 8) and len(latents) == 2
    squares = torch.cat(encoded)
    grey = (squares[:, :, 0, 0].abs() < 0.01).all(dim=1)
    assert 0 < grey.sum() < len(grey) and FACE_ONLY == 0.5, "some are faces alone"
    assert Features(Shards.under(shard)).hashes == {"vae": "v", "references": "32"}
    before = features_path(shard).stat().st_mtime_ns
    made(32)
    assert features_path(shard).stat().st_mtime_ns == before


@pytest.mark.parametrize("t", ["30", STEP])
def test_what_is_trained_is_what_inference_computes(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path, t: str
) -> None:
    made = ready(recipe(monkeypatch, data, "--reference-t", t, "--reference-text", "a person"), tmp_path)
    unet, batch, times = made.model.unet, batch_of(made), torch.tensor([900, 500, 20])
    noise = torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        hidden = made._look(batch["reference"], noise, times)
        predicted = made._predict(
            batch["latent"], times, batch["caption_ids"], hidden, torch.tensor([True, True, False])
        )
        text = made.model.text_encoder(batch["caption_ids"]).last_hidden_state
    eject(made)
    for row in range(3):
        own = times[row : row + 1] if t == STEP else torch.tensor([30])
        noisy = made.schedule(batch["reference"][row : row + 1], noise[row : row + 1], own)
        rule = FusionRule(made.adapter, [FusedIdentity()])
        look = rule.look(unet, lambda: unet(noisy, own, mark(made._reference_text, 3)))  # noqa: B023
        rule.see([[look]])
        with torch.no_grad(), Injection(unet, rule):
            one = text[row : row + 1]
            alone = unet(
                batch["latent"][row : row + 1], times[row : row + 1], mark(one, POSITIVE) if row < 2 else one
            ).sample
        assert (predicted[row] - alone[0]).abs().max() < 1e-5


def test_only_the_face_layers_are_trained_and_the_export_says_how(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made = recipe(monkeypatch, data, "--reference-t", "7", "--reference-text", "a face", "--negative")
    began = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in made.model.unet.state_dict().items()}
    assert train(made, settings(tmp_path, save_every=5)) == 5
    eject(made)
    assert all(not torch.equal(tensor, began[name]) for name, tensor in made.state_dict().items())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in made.model.unet.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and all(np.isfinite(line["loss"]) for line in lines)
    path = tmp_path / "export" / "fusion_tiny.safetensors"
    metadata = read_header(path)[1]
    assert Properties.from_metadata(metadata) == Properties(7, "a face", SIDE, True)
    FaceFusion.from_tensors(load_file(path)).check_fits(made.injections[0].sites)
    manifest = read_manifest(tmp_path / "export" / "tiny.kit.json")
    assert (manifest.method, manifest.adapter, manifest.picture) == ("fusion", {"fusion": path.name}, (SIDE, SIDE))
    assert manifest.training["reference_t"] == "7"
    again = recipe(monkeypatch, data, "--initial", str(path))
    again.export(tmp_path, {})
    assert Properties.from_metadata(read_header(tmp_path / path.name)[1]) == Properties(0, "", SIDE, False)
    assert "reference_text" not in read_manifest(tmp_path / "tiny.kit.json").training
    assert torch.equal(next(again.parameters()), next(made.parameters()).half().float())
    assert next(again.parameters()).requires_grad


def test_captions_and_references_are_dropped_in_a_tenth_each(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    made, seen, captions = ready(recipe(monkeypatch, data), tmp_path), [], []
    empty = uncaptioned(torch.zeros(1, 77, dtype=torch.long))

    def predict(noisy: Tensor, t: Tensor, caption_ids: Tensor, hidden: Any, sees: Tensor) -> Tensor:
        seen.append(sees)
        captions.append((caption_ids == empty).all(dim=1))
        return noisy

    monkeypatch.setattr(made, "_look", lambda *args: {})
    monkeypatch.setattr(made, "_predict", predict)
    batch = {name: tensor.repeat_interleave(400, dim=0) for name, tensor in batch_of(made).items()}
    made(batch, draws(1200))
    without, untold = ~torch.cat(seen), torch.cat(captions)
    assert without.float().mean() == pytest.approx(0.1, abs=0.03)
    assert untold.float().mean() == pytest.approx(0.1, abs=0.03)
    assert (without & untold).float().mean() < 0.03, "one does not bring the other"


def test_gradient_checkpointing_gives_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path
) -> None:
    found = []
    for checkpointing in (False, True):
        found.append(gradients(ready(recipe(monkeypatch, data), tmp_path, checkpointing=checkpointing)))
    check_the_same(*found)


def test_pictures_are_drawn_below_their_references(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter_recipe, "STEPS", 2)
    made = ready(recipe(monkeypatch, data), tmp_path)
    made.data.faces = made.data.faces[:2]
    shown = made.pictures(draws(8))["people"]
    assert shown.shape[0] == 3 and shown.isfinite().all() and 0 <= shown.min() <= shown.max() <= 1
    assert shown.shape[1:] == (2 * 8, 2 * 8), "two rows of two, the tiny VAE does not enlarge"


def test_what_cannot_be_trained_on_is_refused(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    with pytest.raises(PortraitError, match="reference_t|1000"):
        recipe(monkeypatch, data, "--reference-t", "1000")
    path = next(data.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors, path, {"vae": "v", "references": "32"})
    with pytest.raises(PortraitError, match="32 pixels"):
        recipe(monkeypatch, data)
    save_file({name: tensor for name, tensor in tensors.items() if name != "references"}, path, {"vae": "v"})
    with pytest.raises(PortraitError, match="hold no references"):
        recipe(monkeypatch, data)
