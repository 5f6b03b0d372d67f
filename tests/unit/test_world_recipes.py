"""The recipes that make the embedded world, one after the other as its README says, for two steps each.

What comes out is what ships, only untrained: the same files, which generation reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="the trainer's requirements are not installed")
pytest.importorskip("skia", reason="the world is drawn with skia", exc_type=ImportError)

import portrait as command_line
from lib_portrait.attention.sites import find_sites
from lib_portrait.checkpoints.formats import read_header, read_tensors, write_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import backbone_from_state_dict
from lib_portrait.faces.vision import vision_from_state_dict
from lib_portrait.methods.uniportrait import Adapter
from lib_portrait.standalone.model import load_model
from lib_portrait.standalone.sampling import Sampling, sample
from trainer import release
from trainer.architectures import world_measuring, world_recognition, world_vae
from trainer.recipes.base import BaseRecipe, latent_scale
from trainer.recipes.vae import VAERecipe, detail_difference

QUICK = "--steps 2 --batch 4 --warmup 0 --log-every 1 --save-every 2 --ema 0 --optimizer muon"
NUMBER = 40


def portrait(line: str) -> None:
    """`portrait.py` with these arguments; no path in them may hold spaces."""
    assert command_line.run(command_line.parse(line.split())) == 0, line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of every recipe, and the shards they were trained on."""
    home = tmp_path_factory.mktemp("world")

    def train(recipe: str, run: str, options: str = "") -> Path:
        portrait(f"train {recipe} --data {home}/shards --output {home}/{run} {QUICK} {options}")
        return home / run / "export"

    # Few people for so few pictures: recognition needs somebody twice.
    portrait(f"dataset world --output {home}/shards --number {NUMBER} --identities 8 --processes 1")
    coarse = train("vae", "vae-coarse", "--coarse")
    recognition = train("recognition", "recognition", "--factors 1 --ema 0") / "world-recognition.safetensors"
    train("recognition", "measuring", "--network measuring --ema 0")
    initial = f"--initial {coarse}/vae.safetensors"
    vae = train("vae", "vae", f"{initial} --recognition {recognition} --decoder-only") / "vae.safetensors"
    portrait(f"dataset features {home}/shards --vae {vae}")
    base = train("base", "base", f"--vae {vae}") / "base.safetensors"
    vision = train("vision", "vision", f"--base {base}") / "world-vision.safetensors"
    release.write_checkpoint(vae, base, home / "world.safetensors")
    portrait(f"dataset features {home}/shards --vae {vae} --backbone {recognition} --vision {vision}")
    adapter = f"--checkpoint {home}/world.safetensors --name world --rank 4 --tokens 4 --width 64 --depth 1"
    faceid = train("uniportrait", "stage-1", adapter) / "uniportrait-faceid_world.safetensors"
    train("uniportrait", "stage-2", f"{adapter} --stage 2 --faceid {faceid}")
    return home


def test_the_fine_pass_of_the_autoencoder_keeps_the_coarse_ones_latents(runs: Path) -> None:
    """So a base model can be trained in between."""
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = []
    for run in ("vae-coarse", "vae"):
        vae = world_vae().eval()
        vae.load_state_dict(load_file(runs / run / "export" / "vae.safetensors"))
        with torch.no_grad():
            latents.append(vae.encode(pictures).latent_dist.mean)
    assert torch.equal(*latents)
    scales = [latent_scale(runs / run / "export" / "vae.safetensors") for run in ("vae-coarse", "vae")]
    assert scales[0] == pytest.approx(scales[1])
    changed = [
        not torch.equal(*(load_file(runs / run / "export" / "vae.safetensors")[name] for run in ("vae-coarse", "vae")))
        for name in ("decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.conv_in.weight")
    ]
    assert changed == [True, True, False]


def test_the_detail_term_is_the_difference_of_high_passes_where_there_is_detail() -> None:
    """Pixel by pixel as it is written down: a picture minus its 5 x 5 mean, weighted 1 + 1.6 h / mean(h)."""
    torch.manual_seed(0)
    made, pixels, weight = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.rand(2, 1, 9, 8) + 0.5

    def passed(picture: torch.Tensor) -> torch.Tensor:
        out = picture.clone()
        for y in range(9):
            for x in range(8):
                near = picture[:, :, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                out[:, :, y, x] -= near.mean(dim=(2, 3))
        return out

    total = 0.0
    for one in range(2):
        true, drawn = passed(pixels[one : one + 1])[0], passed(made[one : one + 1])[0]
        strength = true.abs().mean(dim=0)
        for y in range(9):
            for x in range(8):
                counts = float(weight[one, 0, y, x]) * (1 + 1.6 * float(strength[y, x] / strength.mean()))
                total += counts * float((true[:, y, x] - drawn[:, y, x]).abs().sum())
    wanted = total / (3 * float(weight.sum()))
    assert float(detail_difference(made, pixels, weight)) == pytest.approx(wanted, rel=1e-5)
    assert float(detail_difference(pixels, pixels, weight)) == 0
    # A level that is wrong everywhere is no detail, and a picture without any is no reason to divide by nothing.
    assert float(detail_difference(pixels + 0.3, pixels, weight)) == pytest.approx(0, abs=1e-5)
    assert float(detail_difference(pixels, torch.zeros_like(pixels), weight)) > 0


def test_an_autoencoder_with_more_layers_begins_as_the_one_it_goes_on_from(runs: Path) -> None:
    """And what is new in it learns from the first step."""
    before = VAERecipe(runs / "shards", initial=runs / "vae" / "export" / "vae.safetensors").vae
    after = VAERecipe(runs / "shards", initial=runs / "vae" / "export" / "vae.safetensors", layers=1).vae
    assert (before.config.layers_per_block, after.config.layers_per_block) == (0, 1)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.equal(before(pictures).sample, after(pictures).sample)
    after(pictures).sample.square().mean().backward()
    for block in (*after.encoder.down_blocks, *after.decoder.up_blocks):
        assert block.resnets[-1].conv2.weight.grad.abs().max() > 0


def test_an_autoencoder_and_a_base_model_of_other_widths_and_sizes(runs: Path, tmp_path: Path) -> None:
    """As of 256 pixels: the latents are the pictures' eighth, and all is read off the files."""
    portrait(f"dataset world --output {tmp_path}/shards --number 8 --identities 6 --size 256 --kind bmp --processes 1")
    line = f"--data {tmp_path}/shards --output {tmp_path}/%s {QUICK}"
    widths = "--channels 32 64 64 32 --layers 1 --crop 64 --absolute 4 --gradient 1 --detail 2 --on-faces 0.75"
    portrait(f"train vae {line % 'vae'} {widths}")
    vae = tmp_path / "vae" / "export" / "vae.safetensors"
    recognition = runs / "recognition" / "export" / "world-recognition.safetensors"
    portrait(
        f"train vae {line % 'decoder'} --crop 64 --detail 2 --decoder-only --initial {vae} --recognition {recognition}"
    )
    portrait(f"dataset features {tmp_path}/shards --vae {vae} --processes 2")
    portrait(f"train base {line % 'base'} --vae {vae} --channels 32 32 64 32 --heads 1")
    base = tmp_path / "base" / "export" / "base.safetensors"
    assert {name: read_header(base)[1][name] for name in ("heads", "latent")} == {"heads": "1", "latent": "32"}
    # Begun with that file, a run has its widths whatever the defaults are.
    portrait(f"train base {line % 'again'} --vae {vae} --initial {base}")
    release.write_checkpoint(tmp_path / "decoder" / "export" / "vae.safetensors", base, tmp_path / "world.safetensors")
    model = load_model(tmp_path / "world.safetensors")
    assert model.size == 256 and model.unet.config.block_out_channels == (32, 32, 64, 32)
    assert model.unet.config.attention_head_dim == 1 and model.vae.config.block_out_channels == (32, 64, 64, 32)
    losses = (tmp_path / "vae" / "losses.jsonl").read_text().splitlines()
    assert '"detail": 0.0' not in losses[-1] and '"detail": ' in losses[-1]


def test_the_networks_of_faces_load_as_they_were_trained(runs: Path) -> None:
    for run, name, build in (
        ("recognition", "world-recognition", world_recognition),
        ("measuring", "world-measuring", world_measuring),
    ):
        network = backbone_from_state_dict(read_tensors(runs / run / "export" / f"{name}.safetensors").tensors)
        assert network.image_size == build().image_size and network.widths == build().widths
        face = torch.rand(2, 3, network.image_size, network.image_size)
        assert network.float()(face)[0].isfinite().all()
    tower = read_tensors(runs / "vision" / "export" / "world-vision.safetensors")
    assert vision_from_state_dict(tower.tensors, tower.metadata, "vision").grid == 8


def test_one_file_holds_the_base_model_as_it_was_trained(runs: Path) -> None:
    """The UNet of world.safetensors predicts what the recipe's did, up to the rounding of float16."""
    model = load_model(runs / "world.safetensors")
    tensors = load_file(runs / "base" / "export" / "base.safetensors")
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, tensors[f"unet.{name}"].half().float()), name
    scale = latent_scale(runs / "vae" / "export" / "vae.safetensors")
    assert model.vae.config.scaling_factor == pytest.approx(scale)
    (picture,) = sample(model, [Sampling("a photo of a woman", width=128, height=128, steps=2)])
    assert picture.shape == (128, 128, 3)


def test_a_base_model_goes_on_with_its_text_encoder_as_it_is(runs: Path) -> None:
    """Faces may count more. The vision tower that was trained against that text encoder then still fits."""
    begun = runs / "base" / "export" / "base.safetensors"
    line = f"train base --data {runs}/shards --vae {runs}/vae/export/vae.safetensors {QUICK} --face-weight 5"
    portrait(f"{line} --output {runs}/on --initial {begun} --fixed-text")
    before, after = load_file(begun), load_file(runs / "on" / "export" / "base.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("unet.") for name in moved)
    assert command_line.run(command_line.parse(f"{line} --output {runs}/off --fixed-text".split())) == 1


def test_a_base_model_takes_the_text_encoder_of_one_with_another_unet(runs: Path) -> None:
    vae, text = runs / "vae" / "export" / "vae.safetensors", runs / "base" / "export" / "base.safetensors"
    begun = BaseRecipe(runs / "shards", vae, channels=(32, 32, 64, 32), heads=1, text=text)
    assert begun.unet.config.block_out_channels == (32, 32, 64, 32)
    stored = load_file(text)
    for name, tensor in begun.text_encoder.state_dict().items():
        assert torch.equal(tensor, stored[f"text_encoder.{name}"]), name


def test_both_stages_fit_the_base_model(runs: Path) -> None:
    faceid, router = (adapter_file(runs, stage) for stage in (1, 2))
    adapter = Adapter.from_tensors(load_file(faceid), load_file(router))
    adapter.check_fits(find_sites(load_model(runs / "world.safetensors").unet))
    assert adapter.has_router
    assert read_header(router)[1]["recipe"] == "uniportrait stage 2"


def test_photos_of_held_out_people_lie_beside_the_weights(tmp_path: Path) -> None:
    release.write_photos(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"man-0009-{k}.png" for k in range(release.PHOTOS)]


def adapter_file(runs: Path, stage: int) -> Path:
    """What a stage exports, beside what it brings along."""
    return runs / f"stage-{stage}" / "export" / f"uniportrait-{'faceid' if stage == 1 else 'router'}_world.safetensors"


@pytest.mark.parametrize("stage", [1, 2])
def test_an_adapter_can_be_taken_between_two(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """WiSE-FT: the weights themselves are averaged, and the file says so."""
    first = adapter_file(runs, stage)
    stored = read_tensors(first)
    second = tmp_path / "second.safetensors"
    write_tensors(second, {name: tensor + 1 for name, tensor in stored.tensors.items()}, stored.metadata)
    arguments = ["release", "--output", str(tmp_path / "made"), "--between", str(first), str(second)]
    monkeypatch.setattr(sys, "argv", [*arguments, "0.25"])
    release.main()
    made = read_tensors(tmp_path / "made" / "second.safetensors")
    for name, tensor in stored.tensors.items():
        torch.testing.assert_close(made.tensors[name].float(), tensor.float() + 0.25, rtol=2e-3, atol=2e-3)
    assert made.metadata["between"].startswith("0.25") and made.metadata["recipe"] == stored.metadata["recipe"]

    monkeypatch.setattr(sys, "argv", [*arguments, "1.5"])
    with pytest.raises(PortraitError, match="0 to 1"):
        release.main()
    lacking = dict(list(stored.tensors.items())[1:])
    write_tensors(second, lacking, stored.metadata)
    with pytest.raises(PortraitError, match="other layers"):
        release.interpolate_adapters(first, second, 0.5, tmp_path / "none.safetensors")


def test_an_adapter_can_be_brought_down_to_a_rank(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files, whose LoRA is of rank 4: the nearest of rank 2 in up @ down, all else as it was."""
    files = [adapter_file(runs, stage) for stage in (1, 2)]
    arguments = ["release", "--output", str(tmp_path / "made"), "--rank"]
    monkeypatch.setattr(sys, "argv", [*arguments, "2", *map(str, files)])
    release.main()
    for file in files:
        before, after = read_tensors(file), read_tensors(tmp_path / "made" / file.name)
        assert before.tensors.keys() == after.tensors.keys()
        for name, tensor in before.tensors.items():
            if "_lora." not in name:
                assert torch.equal(after.tensors[name], tensor)
            elif name.endswith(".up.weight"):
                down = name.replace(".up.", ".down.")
                assert (after.tensors[name].shape[1], len(after.tensors[down])) == (2, 2)
                whole, made = (one.tensors[name].float() @ one.tensors[down].float() for one in (before, after))
                lost, least = torch.linalg.matrix_norm(made - whole), torch.linalg.svdvals(whole)[2:4].norm()
                assert float(lost) == pytest.approx(float(least), rel=0.02, abs=1e-5)
        assert after.metadata["recipe"] == before.metadata["recipe"] and "rank 2" in after.metadata["reduced"]

    for rank, problem in (("4", "no LoRA of a rank above 4"), ("0", "1 or more")):
        monkeypatch.setattr(sys, "argv", [*arguments, rank, str(files[0])])
        with pytest.raises(PortraitError, match=problem):
            release.main()
