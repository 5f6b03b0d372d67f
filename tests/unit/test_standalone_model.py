"""Promises of `lib_portrait.standalone.model`: SD1 single files are read and written, exactly, offline, or refused."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from lib_portrait.checkpoints.text_encoder import FORMER_SIZES, FORMER_TARGET
from lib_portrait.errors import PortraitError
from lib_portrait.standalone import layout, model
from lib_portrait.standalone.model import Model, load_model, make_model, save_model, schedule_buffers
from tests.small_networks import small_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def original() -> Model:
    return small_model()


@pytest.fixture(scope="module")
def saved(original: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "small.safetensors"
    save_model(original, path)
    return path


@pytest.fixture(scope="module")
def loaded(saved: Path) -> Model:
    return load_model(saved)


def networks(of: Model) -> dict[str, torch.nn.Module]:
    return {"unet": of.unet, "vae": of.vae, "text_encoder": of.text_encoder}


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_round_trip_is_exact_to_half_precision(original: Model, loaded: Model, name: str) -> None:
    before, after = networks(original)[name].state_dict(), networks(loaded)[name].state_dict()
    assert before.keys() == after.keys()
    assert all(after[key].equal(before[key].half().float()) for key in before)
    assert not any(parameter.requires_grad for parameter in networks(loaded)[name].parameters())


def test_a_round_trip_keeps_the_description(original: Model, loaded: Model, saved: Path) -> None:
    assert loaded.config == original.config == yaml.safe_load(saved.with_suffix(".yaml").read_text())
    assert loaded.vae.config.scaling_factor == 0.5
    assert loaded.size == 128
    for name in ("block_out_channels", "attention_head_dim", "cross_attention_dim", "up_block_types", "sample_size"):
        assert _plain(loaded.unet.config[name]) == _plain(original.unet.config[name])
    text = torch.randint(0, 49408, (2, 77), generator=torch.Generator().manual_seed(0))
    for tensor in original.text_encoder.state_dict().values():
        tensor.copy_(tensor.half())
    assert original.text_encoder(text).last_hidden_state.equal(loaded.text_encoder(text).last_hidden_state)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ------------------------------------------------------------------------------------------------ held against others


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: tensor.float() for key, tensor in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def test_ldm_s_own_unet_takes_the_file_and_gives_the_same(saved: Path, loaded: Model) -> None:
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    params = yaml.safe_load(saved.with_suffix(".yaml").read_text())["model"]["params"]["unet_config"]["params"]
    genuine = UNetModel(**params).eval()
    genuine.load_state_dict(under(load_file(saved), layout.UNET))
    torch.manual_seed(0)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 48)
    ours = loaded.unet(x, t, context).sample
    assert ours.std() > 0.1
    assert torch.allclose(genuine(x, t, context), ours, atol=1e-4)


@torch.no_grad()
def test_ldm_s_own_vae_takes_the_file_and_gives_the_same(saved: Path, loaded: Model) -> None:
    from ldm.modules.diffusionmodules.model import Decoder, Encoder

    first = yaml.safe_load(saved.with_suffix(".yaml").read_text())["model"]["params"]["first_stage_config"]["params"]
    tensors = under(load_file(saved), layout.VAE)
    encoder, decoder = Encoder(**first["ddconfig"]).eval(), Decoder(**first["ddconfig"]).eval()
    encoder.load_state_dict(under(tensors, "encoder."))
    decoder.load_state_dict(under(tensors, "decoder."))
    torch.manual_seed(0)
    picture, latent = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    moments = torch.nn.functional.conv2d(encoder(picture), tensors["quant_conv.weight"], tensors["quant_conv.bias"])
    assert torch.allclose(moments, loaded.vae.encode(picture).latent_dist.parameters, atol=1e-4)
    inside = torch.nn.functional.conv2d(latent, tensors["post_quant_conv.weight"], tensors["post_quant_conv.bias"])
    assert torch.allclose(decoder(inside), loaded.vae.decode(latent).sample, atol=1e-4)


def test_the_names_are_those_of_stable_diffusion_1_5(saved: Path) -> None:
    """At full size, against ldm's own modules and diffusers' own conversion of ldm's names."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    params = layout.SD1["model"]["params"]
    unet_params, vae_params = params["unet_config"]["params"], params["first_stage_config"]["params"]
    with torch.device("meta"):
        genuine = UNetModel(**unet_params)
        unet = UNet2DConditionModel(**layout.unet_config(unet_params, ""))
        vae = AutoencoderKL(**layout.vae_config(vae_params, 0.18215, ""))
    names = {name: model._unet_key(unet.config)(name) for name in unet.state_dict()}
    assert set(names.values()) == {layout.UNET + name for name in genuine.state_dict()}
    tags = {key: torch.tensor(number) for number, key in enumerate(names.values())}
    converted = convert_ldm_unet_checkpoint(dict(tags), dict(unet.config))
    assert {name: int(tag) for name, tag in converted.items()} == {name: int(tags[key]) for name, key in names.items()}
    names = {name: model._vae_key(vae.config)(name) for name in vae.state_dict()}
    tags = {key: torch.tensor(number) for number, key in enumerate(names.values())}
    converted = convert_ldm_vae_checkpoint(dict(tags), dict(vae.config))
    assert {name: int(tag) for name, tag in converted.items()} == {name: int(tags[key]) for name, key in names.items()}


def test_the_schedule_is_the_one_ldm_registers(saved: Path, loaded: Model) -> None:
    from ldm.modules.diffusionmodules.util import make_beta_schedule

    betas = torch.from_numpy(make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012))
    buffers = schedule_buffers(loaded.schedule)
    assert torch.allclose(buffers["betas"].double(), betas, atol=1e-9)
    assert torch.allclose(buffers["alphas_cumprod"].double(), (1 - betas).cumprod(0), atol=1e-7)
    stored = load_file(saved)
    assert all(stored[name].equal(tensor) and tensor.shape == (1000,) for name, tensor in buffers.items())


# ------------------------------------------------------------------------------------------------------------- offline


def test_nothing_asks_the_network(saved: Path) -> None:
    code = f"""
import socket
def refuse(*args, **kwargs):
    raise SystemExit("the network was asked")
socket.getaddrinfo = socket.socket.connect = refuse
from pathlib import Path
from lib_portrait.standalone import model, sampling
loaded = model.load_model(Path({str(saved)!r}))
print(sampling.sample(loaded, [sampling.Sampling("a woman", width=64, height=64, steps=1)])[0].shape)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "(64, 64, 3)\n"), done.stderr


def test_without_the_tokenizer_s_files_the_remedy_is_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "VOCABULARY", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    told = "vocab.json, merges.txt, special_tokens_map.json cannot be read.*git checkout models/text"
    with pytest.raises(PortraitError, match=told) as caught:
        load_model(saved)
    assert caught.value.status_code == 500


# -------------------------------------------------------------------------------------------------- what files are like


def test_a_ckpt_is_read_weights_only_with_its_step_counter(saved: Path, loaded: Model, tmp_path: Path) -> None:
    tensors = load_file(saved)
    torch.save({"state_dict": tensors, "global_step": 7, "epoch": 1}, tmp_path / "small.ckpt")
    (tmp_path / "small.yaml").write_text(saved.with_suffix(".yaml").read_text())
    again = load_model(tmp_path / "small.ckpt", dtype=torch.float16)
    assert again.unet.dtype == again.text_encoder.dtype == torch.float16
    assert again.vae.dtype == torch.float32
    assert again.unet.conv_in.weight.float().equal(loaded.unet.conv_in.weight)


def test_what_lies_beside_the_model_and_older_names_of_the_text_encoder_are_fine(saved: Path, tmp_path: Path) -> None:
    tensors = {
        key.replace(".transformer.text_model.", ".transformer."): value for key, value in load_file(saved).items()
    }
    tensors |= {"model_ema.decay": torch.tensor(0.9), "first_stage_model.loss.logvar": torch.zeros(1)}
    save_file(tensors, tmp_path / "old.safetensors")
    (tmp_path / "old.yaml").write_text(saved.with_suffix(".yaml").read_text())
    assert load_model(tmp_path / "old.safetensors").unet.device.type == "cpu"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"conditioner.embedders.0.x": 1, "conditioner.embedders.1.x": 1}, "it is an SDXL checkpoint"),
        ({"cond_stage_model.model.ln_final.weight": 1}, "it is an SD 2 checkpoint"),
        ({"conditioner.embedders.0.model.ln_final.weight": 1}, "SDXL refiner or SD 2"),
        ({"model.diffusion_model.joint_blocks.0.x": 1}, "Stable Diffusion 3"),
        ({"model.diffusion_model.double_blocks.0.x": 1}, "a Flux checkpoint"),
        ({"cond_stage_model.roberta.x": 1}, "AltDiffusion"),
        ({"lora_unet_down_blocks_0.alpha": 1}, "it is a LoRA"),
        ({"faceid_adapter.1.to_k_faceid.weight": 1}, "it is an adapter of Portrait"),
        ({f"{layout.UNET}input_blocks.0.0.weight": 9}, "it is an inpainting checkpoint"),
        ({f"{layout.UNET}input_blocks.0.0.weight": 8}, "instruct-pix2pix"),
        ({f"{layout.UNET}input_blocks.0.0.weight": 4}, "it has no VAE and no text encoder"),
        ({"anything": 1}, "it is no Stable Diffusion checkpoint"),
    ],
)
def test_other_models_are_refused_by_what_they_are(tmp_path: Path, keys: dict[str, int], told: str) -> None:
    save_file({key: torch.zeros(2, channels, 3, 3) for key, channels in keys.items()}, tmp_path / "other.safetensors")
    with pytest.raises(PortraitError, match=told):
        load_model(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        (f"{layout.UNET}out.2.bias", math.nan, torch.float32),
        (f"{layout.VAE}decoder.conv_out.bias", -math.inf, torch.float32),
        (f"{layout.TEXT}final_layer_norm.weight", math.nan, torch.float32),
        # What is finite in the file and not in half precision, in which the model would run.
        (f"{layout.UNET}out.2.bias", 1e6, torch.float16),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(
    saved: Path, tmp_path: Path, name: str, value: float, dtype: torch.dtype
) -> None:
    tensors = {key: tensor.float() for key, tensor in load_file(saved).items()}
    # Nobody looks at what is no weight of the networks: schedules of other models hold infinities.
    tensors["sqrt_recip_alphas_cumprod"] = torch.full((1000,), math.inf)
    path = tmp_path / "spoilt.safetensors"
    path.with_suffix(".yaml").write_bytes(saved.with_suffix(".yaml").read_bytes())
    save_file(tensors, path)
    load_model(path, dtype=dtype)
    tensors[name][-1] = value
    save_file(tensors, path)
    with pytest.raises(PortraitError, match=rf"^spoilt\.safetensors: {re.escape(name)}.* holds infinities or NaN"):
        load_model(path, dtype=dtype)
    if value == 1e6:
        load_model(path)


def test_a_ckpt_with_lightning_s_and_numpy_s_objects_is_the_same_model(
    saved: Path, loaded: Model, tmp_path: Path
) -> None:
    path = tmp_path / "small.ckpt"
    path.with_suffix(".yaml").write_bytes(saved.with_suffix(".yaml").read_bytes())
    state = {**load_file(saved), "steps": np.int64(3)}
    torch.save({"state_dict": state, "callbacks": {Path: np.float64(1)}, "loops": [np.arange(3), Path("x")]}, path)
    again = load_model(path)
    for name, network in networks(loaded).items():
        theirs = networks(again)[name].state_dict()
        assert all(theirs[key].equal(tensor) for key, tensor in network.state_dict().items())


def changed(saved: Path, folder: Path, *path: str, value: Any) -> Path:
    """The saved model with one entry of its .yaml changed (None takes it away)."""
    config = yaml.safe_load(saved.with_suffix(".yaml").read_text())
    holder = config["model"]
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    (folder / "small.safetensors").symlink_to(saved)
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return folder / "small.safetensors"


UNET_PARAMS = ("params", "unet_config", "params")


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("target",), "ldm.models.diffusion.ddpm.LatentInpaintDiffusion", "describes another kind of model"),
        (("params", "parameterization"), "x0", "describes another kind of model"),
        (("params", "scale_factor"), "large", "unusable numbers"),
        (("params", "unet_config"), None, "does not tell unet_config"),
        (("params", "cond_stage_config", "target"), "os.system", "another text encoder"),
        (
            ("params", "cond_stage_config"),
            {"target": layout.CLIP_TARGET, "params": {"layer": "hidden"}},
            "another text",
        ),
        (("params", "cond_stage_config", "params", "hidden_size"), 0, r"no text encoder's sizes \(hidden_size: 0\)"),
        (("params", "cond_stage_config", "params", "layers"), 2, r"no text encoder's sizes \(layers: 2\)"),
        (("params", "cond_stage_config", "params"), [48], "another text encoder"),
        ((*UNET_PARAMS, "use_linear_in_transformer"), True, "its UNet has use_linear_in_transformer"),
        ((*UNET_PARAMS, "model_channels"), 1.5, "model_channels is 1.5"),
        ((*UNET_PARAMS, "channel_mult"), [], r"channel_mult is \[\]"),
        ((*UNET_PARAMS, "channel_mult"), [1, 2, 2, 1], "instead of.*put its .yaml beside it"),
        ((*UNET_PARAMS, "num_res_blocks"), 3, "the tensor .* is missing"),
        (
            ("params", "first_stage_config", "params", "ddconfig", "attn_resolutions"),
            [16],
            "its VAE is not of the kind",
        ),
    ],
)
def test_descriptions_that_cannot_be_met_are_refused(
    saved: Path, tmp_path: Path, path: tuple[str, ...], value: Any, told: str
) -> None:
    with pytest.raises(PortraitError, match=told):
        load_model(changed(saved, tmp_path, *path, value=value))


def test_without_its_yaml_a_file_is_taken_for_sd_1_5(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.safetensors").symlink_to(saved)
    with pytest.raises(PortraitError, match=r"has the shape .* instead of \(320, 4, 3, 3\)|is missing"):
        load_model(tmp_path / "alone.safetensors")


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "!!python/object/apply:os.system ['true']"])
def test_a_yaml_that_is_no_description_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    path = changed(saved, tmp_path, "target", value="")
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(PortraitError, match=r"small\.yaml"):
        load_model(path)


def test_a_yaml_of_before_means_the_sizes_that_it_did_not_tell(saved: Path, tmp_path: Path) -> None:
    """People have copied such files into their WebUI."""
    tensors = {key: t for key, t in load_file(saved).items() if not key.startswith(layout.TEXT)}
    text = CLIPTextModel(CLIPTextConfig(**FORMER_SIZES))
    tensors |= {layout.text_key(name): tensor for name, tensor in text.state_dict().items()}
    path = changed(saved, tmp_path, "params", "cond_stage_config", value={"target": FORMER_TARGET})
    path.unlink()
    save_file(tensors, path)
    assert load_model(path).text_encoder.config.hidden_size == 96


def test_v_prediction_is_passed_on_to_the_schedulers(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path, "params", "parameterization", value="v")
    assert load_model(path).schedule["prediction_type"] == "v_prediction"


def test_networks_that_no_sd1_file_can_describe_are_not_saved(original: Model) -> None:
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in original.unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        uneven = UNet2DConditionModel.from_config({**config, "block_out_channels": (64, 96, 96, 96)})
        linear = UNet2DConditionModel.from_config({**config, "use_linear_projection": True})
        other = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_attention_heads=4, hidden_act="relu"))
    with pytest.raises(PortraitError, match="multiples of the first"):
        make_model(uneven, original.vae, original.text_encoder)
    with pytest.raises(PortraitError, match="use_linear_projection"):
        make_model(linear, original.vae, original.text_encoder)
    with pytest.raises(PortraitError, match=r"text_encoder: .*no text encoder's sizes \(hidden_act: relu\)"):
        make_model(original.unet, original.vae, other)
