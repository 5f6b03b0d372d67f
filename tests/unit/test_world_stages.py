"""The embedded world as one command: what its stages are told, and that it goes through from nothing to a kit."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")
pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

import portrait as command_line
from lib_portrait.checkpoints.formats import read_header, read_tensors, write_tensors
from lib_portrait.checkpoints.kit import read_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations import ADAPTED
from lib_portrait.standalone.model import load_model
from trainer import lent_gpu, world_stages
from trainer.architectures import unet_like, vae_like, world_text_encoder, world_unet, world_vae
from trainer.recipes import read_options, recipe_module
from trainer.release import write_checkpoint
from trainer.world_stages import TINY, TRAININGS, WorldOptions, adapter_trainings, arguments_of, has_amx, stages_of


def nothing(*arguments: object) -> None:
    pass


def settings_of(options: WorldOptions, name: str, minutes: float = 0.0) -> tuple[argparse.Namespace, object]:
    """A stage's options and settings, as its recipe reads them."""
    trainings = {**TRAININGS, **{n: t for method in ADAPTED for n, t in adapter_trainings(method).items()}}
    training = trainings[name]
    adapter = "" if name in TRAININGS else world_stages.adapter_name(training.recipe)
    return read_options(training.recipe, arguments_of(options, name, training, minutes, adapter))


STAGES = [*TRAININGS, *(name for method in ADAPTED for name in adapter_trainings(method))]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_options_that_its_recipe_knows(name: str, tmp_path: Path) -> None:
    """A place with a space in its name, too; nothing is left to be filled in."""
    options, settings = settings_of(WorldOptions(tmp_path / "a world"), name)
    assert settings.output == tmp_path / "a world" / name and options.data == tmp_path / "a world" / "pictures"
    told = [str(value) for value in vars(options).values()]
    assert not any(re.search(r"[{}]", text) for text in told)
    assert settings.steps > 0 and settings.cooldown == settings.steps // 2 and settings.budget == 0
    _, timed = settings_of(WorldOptions(tmp_path), name, minutes=3.0)
    assert (timed.budget, timed.cooldown) == (3.0, 0) and timed.steps > 10**6


def test_the_order_of_stages_is_that_of_what_they_need_and_ends_in_evaluation_and_sheet(tmp_path: Path) -> None:
    stages = stages_of(WorldOptions(tmp_path), nothing)
    names = list(stages.stages)
    assert names[0] == "pictures" and names[-3:] == ["kit", "evaluation", "sheet"]
    for method in ADAPTED:
        assert names.index("faces") < names.index(next(iter(adapter_trainings(method)))) < names.index("kit")


def test_a_new_method_needs_nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its recipe alone says how it is trained; one that says nothing has one run."""
    module = recipe_module(ADAPTED[-1])
    monkeypatch.setattr(module, "WORLD_RUNS", ("--first {name}", "--second {previous}/x {backbone}"))
    runs = adapter_trainings(ADAPTED[-1])
    assert [run.needs for run in runs.values()] == [("faces",), (next(iter(runs)),)]
    options = WorldOptions(tmp_path)
    first, second = (arguments_of(options, name, run, 0, "world-new") for name, run in runs.items())
    assert first[-2:] == ["--first", "world-new"]
    assert second[-3:] == [
        "--second",
        f"{options.export(next(iter(runs)))}/x",
        f"{options.kit}/world-recognition.safetensors",
    ]
    monkeypatch.delattr(module, "WORLD_RUNS")
    assert list(adapter_trainings(ADAPTED[-1])) == [ADAPTED[-1]]


def test_a_gpu_gets_large_batches_in_bf16_and_processes_that_prepare_them(tmp_path: Path) -> None:
    on_gpu = WorldOptions(tmp_path, device="cuda", together=5)
    for name in TRAININGS:
        _, small = settings_of(WorldOptions(tmp_path), name)
        _, large = settings_of(on_gpu, name)
        assert large.batch > small.batch and large.workers > small.workers == 0
        assert large.precision == ("no" if TRAININGS[name].exact else "bf16")


def test_half_precision_is_for_processors_that_multiply_in_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("flags : fpu avx512f amx_bf16 amx_tile\n")
    assert has_amx(file)
    file.write_text("flags : fpu avx512f avx512_bf16\n")
    assert not has_amx(file) and not has_amx(tmp_path / "none")


def test_an_autoencoder_from_elsewhere_is_gone_on_from_its_export(tmp_path: Path) -> None:
    options = WorldOptions(tmp_path)
    export = options.export("autoencoder")
    export.mkdir(parents=True)
    (export / "vae.safetensors").touch()
    chosen, _ = settings_of(options, "autoencoder")
    assert chosen.initial == tmp_path / "autoencoder-before" / "export" / "vae.safetensors" and chosen.initial.is_file()
    # With checkpoints of its own a run goes on as any other, from the same beginning.
    (options.run("autoencoder") / "checkpoints" / "step-00000002").mkdir(parents=True)
    export.mkdir(parents=True)
    (export / "vae.safetensors").touch()
    assert settings_of(options, "autoencoder")[0].initial == chosen.initial and export.is_dir()


@pytest.mark.parametrize("wrong", [{"size": 100}, {"crop": 300}, {"crop": 20}, {"together": 0}])
def test_worlds_that_cannot_be_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(PortraitError, match=next(iter(wrong))):
        WorldOptions(tmp_path, **wrong)


def test_a_stage_in_a_process_of_its_own_has_the_options_of_the_whole(tmp_path: Path) -> None:
    line = ["--output", "x y", "--minutes", "9", "--tiny", "--without", "sheet", "--together=3", "--number", "7"]
    words = world_stages._command(line, "base", 2.5)[3:]
    assert words[:2] == ["train", "world"]
    parser = argparse.ArgumentParser()
    world_stages.configure(parser)
    chosen = parser.parse_args(words[2:])
    assert (chosen.output, chosen.only, chosen.minutes, chosen.together) == (Path("x y"), ["base"], 2.5, 1)
    assert chosen.tiny and chosen.number == 7 and chosen.without == []


def test_networks_are_as_wide_as_their_weights(tmp_path: Path) -> None:
    """Also through a checkpoint, whose .yaml says the size of its pictures."""
    torch.manual_seed(0)
    vae, unet = world_vae((32, 64, 64, 32), 1), world_unet((32, 64, 32, 64), 2, heads=2, latent=32)
    like = vae_like(vae.state_dict(), "v")
    assert (like.config.block_out_channels, like.config.layers_per_block) == ((32, 64, 64, 32), 1)
    like.load_state_dict(vae.state_dict())
    facts = {"heads": "2", "latent": "32"}
    same = unet_like(unet.state_dict(), facts, "u")
    assert same.config.attention_head_dim == 2 and same.config.sample_size == 32
    same.load_state_dict(unet.state_dict())
    # What was made before widths were options.
    old = unet_like(world_unet().state_dict(), {}, "u")
    assert (old.config.attention_head_dim, old.config.sample_size) == (4, 16)
    assert vae_like(world_vae().state_dict(), "v").config.layers_per_block == 0
    for build in (lambda: vae_like(unet.state_dict(), "u"), lambda: unet_like(vae.state_dict(), {}, "v")):
        with pytest.raises(PortraitError, match="does not hold"):
            build()
    write_tensors(tmp_path / "vae.safetensors", dict(vae.state_dict()), {"scaling_factor": "0.5"})
    tensors = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    tensors |= {f"text_encoder.{name}": tensor for name, tensor in world_text_encoder().state_dict().items()}
    write_tensors(tmp_path / "base.safetensors", tensors, facts)
    write_checkpoint(tmp_path / "vae.safetensors", tmp_path / "base.safetensors", tmp_path / "world.safetensors")
    model = load_model(tmp_path / "world.safetensors")
    assert model.size == 256 and model.unet.config.attention_head_dim == 2
    noise = torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 77, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.unet(*noise).sample, unet.half().float()(*noise).sample)


# ------------------------------------------------------------------------------------------------- a lent machine


def packed(work: Path, size: int) -> Path:
    """A world of one kit file of so many random bytes, packed."""
    (work / "kit").mkdir(parents=True)
    (work / "kit" / "notes.bin").write_bytes(random.Random(0).randbytes(size))
    (work / "stages").mkdir()
    for name in ("kit", "pictures"):
        (work / "stages" / f"{name}.json").write_text('{"done": true, "seconds": 1, "minutes": 0}')
    lent_gpu.pack(work, work / "parts")
    return work / "parts"


def test_what_comes_back_in_parts_is_what_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lent_gpu, "PART", 4096)
    parts = packed(tmp_path / "there", 6 * 4096)
    folders, first = [], 0
    while not folders or first:
        folders.append(tmp_path / f"call{len(folders)}")
        first = lent_gpu.send(parts, first, folders[-1])
        assert len(list(folders[-1].iterdir())) <= 1 + lent_gpu.PARTS
        assert all(file.stat().st_size <= 4096 for file in folders[-1].iterdir())
    assert len(folders) > 1
    arguments = ["take", *map(str, folders), "--output", str(tmp_path / "here")]
    assert lent_gpu.main(arguments) == 0
    there, here = ((tmp_path / place / "kit" / "notes.bin").read_bytes() for place in ("there", "here"))
    assert there == here
    # The pictures stay there, and are drawn again if anything needs them.
    assert [path.name for path in (tmp_path / "here" / "stages").iterdir()] == ["kit.json"]
    assert lent_gpu.main(arguments) == 1  # it would be written over


def test_parts_that_are_missing_damaged_or_of_another_run_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lent_gpu, "PART", 4096)
    parts = packed(tmp_path / "there", 3 * 4096)
    target = tmp_path / "whole.tar"
    second = parts / "world.tar.001"
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(PortraitError, match=r"world\.tar\.001 did not come back"):
        lent_gpu.join([parts], target)
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PortraitError, match=r"world\.tar\.001.*damaged"):
        lent_gpu.join([parts], target)
    second.write_bytes(whole)
    index = json.loads((parts / "parts.json").read_text())
    (parts / "parts.json").write_text(json.dumps({**index, "sha256": hashlib.sha256(b"").hexdigest()}))
    with pytest.raises(PortraitError, match="not what was packed"):
        lent_gpu.join([parts], target)
    with pytest.raises(PortraitError, match="2 different"):
        lent_gpu.join([parts, packed(tmp_path / "other", 5000)], target)
    assert not target.exists()


def test_a_training_that_takes_too_long_is_asked_to_end(tmp_path: Path) -> None:
    code = "import pathlib, signal, sys, time\n"
    code += (
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(3)))\n"
    )
    code += "time.sleep(60)"

    assert (
        lent_gpu.until([sys.executable, "-c", code, str(tmp_path / "saved")], time.monotonic() + 3, dict(os.environ))
        == 3
    )
    assert (tmp_path / "saved").exists()


# --------------------------------------------------------------------------------------------------- all of it


@pytest.mark.slow
def test_from_nothing_to_a_kit_and_on_from_what_a_lent_machine_gave_back(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "runs"
    line = f"train world --output {home} --tiny --processes 1"

    def portrait(words: str) -> int:
        return command_line.run(command_line.parse(words.split()))

    assert portrait(f"{line} --without evaluation --without sheet") == 0
    model = load_model(home / "kit" / "world.safetensors")
    assert model.size == TINY["size"] and model.vae.config.block_out_channels == TINY["vae_channels"]
    kit = read_manifest(home / "kit" / "kit.json")
    assert (kit.name, kit.method) == ("world", ADAPTED[0]) and kit.picture == (model.size, model.size)
    for file in (kit.base, kit.detector, kit.measuring, kit.attributes, *kit.encoders.values()):
        data = (home / "kit" / file.name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.size)
    for method in ADAPTED[1:]:
        other = read_manifest(home / "kit" / f"world-{method}.kit.json")
        assert other.method == method and all((home / "kit" / name).is_file() for name in other.adapter.values())
    assert {path.stem for path in (home / "kit" / "logs").glob("*.jsonl")} <= set(STAGES)

    lent_gpu.pack(home, tmp_path / "parts")
    assert lent_gpu.main(["take", str(tmp_path / "parts"), "--output", str(tmp_path / "taken")]) == 0
    # Exports that were not packed are there again, in the precision of the kit.
    for stage, file in (("base", "base.safetensors"), ("decoder", "vae.safetensors")):
        own, back = (read_tensors(place / stage / "export" / file).tensors for place in (home, tmp_path / "taken"))
        assert own.keys() == back.keys()
        for name, tensor in own.items():
            assert torch.equal(back[name], tensor.half().float()), name
    assert read_header(tmp_path / "taken" / "base" / "export" / "base.safetensors")[1]["latent"] == "16"
    capfd.readouterr()
    taken = line.replace(str(home), str(tmp_path / "taken"))
    assert portrait(taken) == 0
    said = capfd.readouterr().out
    begun = re.findall(r"^(\S+): (?:as long|[\d.]+ min)", said, re.MULTILINE)
    assert begun == ["evaluation", "sheet"]
    table = (tmp_path / "taken" / "evaluation" / "single.md").read_text("utf-8")
    assert all(f"| {world_stages.adapter_name(method)} |" in table for method in ADAPTED)
    assert all(list((tmp_path / "taken" / "sheets" / method).rglob("sheet.png")) for method in ADAPTED)
