"""A stand-in for what `lib_portrait.webui` uses of the WebUI's modules, so that it runs where no WebUI is.

It does what the WebUI (v1.10.1) does, in the same order and under the same names: `process_images` and the processing
objects (modules/processing.py), the samplers' loop and `CFGDenoiser` (modules/sd_samplers_cfg_denoiser.py), and scripts
and callbacks, whose exceptions are written down and go no further. What is in between is small: the loaded checkpoints
are UNets of ldm's class, prompts are random contexts, and a picture is its latent, enlarged.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import itertools
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFont

ROOT = Path(__file__).parents[1]
LATENT = 8
SIDE = 8 * LATENT
SCRIPTS = ("loopback.py", "xyz_grid.py", "sd_upscale.py")
TITLES = {"loopback.py": "Loopback", "xyz_grid.py": "X/Y/Z plot", "sd_upscale.py": "SD upscale"}
LOOPBACK, PLOT, UPSCALE = 1, 2, 3


@contextmanager
def standing_in(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Has `modules` imported in place of the host's, and everything of `lib_portrait.webui` anew beside them."""

    def theirs(name: str) -> bool:
        return name in modules or name.startswith(("modules.", "lib_portrait.webui."))

    package = importlib.import_module("lib_portrait.webui")
    attributes = dict(vars(package))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if theirs(name)}
    for name in before:
        vars(package).pop(name.removeprefix("lib_portrait.webui."), None)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if theirs(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        vars(package).clear()
        vars(package).update(attributes)


class InterruptedException(BaseException):
    pass


class DecodedSamples(list):
    already_decoded = True


class DictWithShape(dict):
    @property
    def shape(self) -> torch.Size:
        return self["crossattn"].shape


@dataclasses.dataclass
class Script:
    """What the host knows of a script. owner: the script itself, None for those that are not there."""

    filename: str
    name: str
    owner: Any = None
    args_from: int = 0
    args_to: int = 0

    def title(self) -> str:
        return self.name


@dataclasses.dataclass
class UNetCall:
    """One call of a UNet as a neighbour's hooks see it: name of the checkpoint, arguments and result."""

    checkpoint: str
    x: torch.Tensor
    context: torch.Tensor
    output: torch.Tensor | None = None


class Host:
    """The host's modules and what they hold.

    folder: where its data and models are. unets: the checkpoints by name; the first is loaded. vary: for its options.
    calls: of the UNets, so far. reported: what it printed as errors. saved: the pictures it saved, by path. run: what
    calls the UNet with (unet, x, timesteps, context), for extensions to replace. before_call: called before each step's
    UNet calls, after the callbacks, with the number of the step.
    """

    def __init__(self, folder: Path, unets: Mapping[str, torch.nn.Module]):
        self.calls: list[UNetCall] = []
        self.reported: list[str] = []
        self.saved: dict[str, tuple[Image.Image, str]] = {}
        self.run: Callable[..., torch.Tensor] = lambda unet, x, timesteps, context: unet(x, timesteps, context=context)
        self.before_call: Callable[[int], None] = lambda step: None
        self._hooks: list[Any] = []
        self.models = {name: self._model(name, unet) for name, unet in unets.items()}
        self.first = next(iter(self.models))
        self.callbacks: dict[str, list[Any]] = {
            f"callbacks_{name}": [] for name in ("cfg_denoiser", "ui_settings", "before_ui", "app_started")
        }
        self.modules = self._modules(folder)
        self.shared: Any = self.modules["modules.shared"]
        self.opts, self.state = self.shared.opts, self.shared.state

    def load_portrait(self) -> None:
        """Imports the extension's script as the host does; called inside of `standing_in(self.modules)`."""
        spec = importlib.util.spec_from_file_location("portrait_script", ROOT / "scripts" / "portrait.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.portrait = module.PortraitScript()

    @property
    def unet(self) -> torch.nn.Module:
        return self.shared.sd_model.model.diffusion_model

    def take_hooks_off(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def load(self, name: str) -> None:
        """modules/sd_models.py: reload_model_weights, with all checkpoints kept in memory."""
        self.shared.sd_model = self.models[name]

    def _model(self, name: str, unet: torch.nn.Module) -> SdModel:
        def enter(unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            context = kwargs["context"] if "context" in kwargs else args[2]
            self.calls.append(UNetCall(name, args[0].clone(), context.clone()))

        def leave(unet: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self.calls[-1].output = output.clone()

        self._hooks += [unet.register_forward_pre_hook(enter, with_kwargs=True), unet.register_forward_hook(leave)]
        return SdModel(name, unet)

    def report(self, message: str, *, exc_info: bool = False) -> None:
        self.reported.append(message)

    def save_image(self, image: Image.Image, path: str, basename: str, info: str = "", **options: Any) -> None:
        name = options.get("forced_filename") or f"{len(self.saved):05}{options.get('suffix', '')}"
        image.already_saved_as = str(Path(path) / f"{name}.png")  # type: ignore[attr-defined]
        self.saved[image.already_saved_as] = (image, info)  # type: ignore[attr-defined]

    def _modules(self, folder: Path) -> dict[str, types.ModuleType]:
        made: dict[str, types.ModuleType] = {"modules": types.ModuleType("modules")}

        def module(name: str, **attributes: Any) -> None:
            made[f"modules.{name}"] = types.ModuleType(f"modules.{name}")
            vars(made[f"modules.{name}"]).update(attributes)
            setattr(made["modules"], name, made[f"modules.{name}"])

        def setup_img2img_steps(p: Any, steps: int | None = None) -> tuple[int, int]:
            return p.steps, int(min(p.denoising_strength, 0.999) * p.steps)

        def checkpoint_match(name: str) -> Any:
            files = (folder / f"{name}.safetensors", folder / f"{name}.ckpt")
            file = next((file for file in files if file.is_file()), files[-1])
            return SimpleNamespace(filename=str(file)) if name in self.models else None

        opts = SimpleNamespace(
            data={},
            batch_cond_uncond=True,
            pad_cond_uncond=False,
            pad_cond_uncond_v0=False,
            skip_early_cond=0.0,
            return_mask=False,
            return_mask_composite=False,
            CLIP_stop_at_last_layers=1,
            emphasis="Original",
        )
        state = SimpleNamespace(interrupted=False, skipped=False, stopping_generation=False, textinfo=None)
        loaded = {"sd_model": self.models[self.first], "loaded_hypernetworks": []}
        module("shared", opts=opts, cmd_opts=SimpleNamespace(), state=state, **loaded)
        dtypes = {"dtype": torch.float16, "dtype_vae": torch.float32}
        module("devices", device=torch.device("cpu"), **dtypes, autocast=nullcontext, without_autocast=nullcontext)
        module("prompt_parser", SdConditioning=SdConditioning)
        module("sd_vae", loaded_vae_file=None)
        module("errors", report=self.report)
        module("images", save_image=self.save_image, get_font=lambda size: ImageFont.load_default())
        module(
            "processing",
            opt_f=LATENT,
            create_binary_mask=lambda image, round=True: image.convert("L").point(lambda v: 255 if v > 128 else 0),
            DecodedSamples=DecodedSamples,
            StableDiffusionProcessingImg2Img=Img2Img,
        )
        module("sd_models", get_closet_checkpoint_match=checkpoint_match)
        module("sd_samplers", find_sampler_config=SAMPLERS.get)
        module(
            "sd_samplers_common",
            setup_img2img_steps=setup_img2img_steps,
            samples_to_images_tensor=lambda sample, approximation, model: model.decode_first_stage(sample),
        )
        module("lowvram", is_enabled=lambda model: getattr(model, "lowvram", False))
        module("script_callbacks", callback_map=self.callbacks, add_callback=_add_callback)
        module("scripts", Script=object, AlwaysVisible=object(), scripts_data=[])
        paths = ("data_path", "extensions_dir", "models_path")
        module("paths_internal", **dict(zip(paths, map(str, (folder, folder / "extensions", folder / "models")))))
        made["fastapi"], made["fastapi.exceptions"] = types.ModuleType("fastapi"), types.ModuleType("exceptions")
        vars(made["fastapi.exceptions"])["HTTPException"] = HTTPException
        return made

    # ---- modules/scripts.py and modules/script_callbacks.py: what is raised in them is printed

    def call(self, callback: Callable[..., Any], *args: Any) -> None:
        try:
            callback(*args)
        except Exception as error:
            self.report(f"Error running {callback.__qualname__}: {error}")

    def cfg_denoiser_callback(self, params: Any) -> None:
        for callback in self.callbacks["callbacks_cfg_denoiser"]:
            self.call(callback, params)

    # ---- modules/processing.py and modules/api/api.py

    def generate(self, p: Any) -> Processed:
        """What the API does with a request."""
        with closing(p):
            return self.process_images(p)

    def process_images(self, p: Any) -> Processed:
        p.scripts.each("before_process", p)
        self.load(self.first)
        p.all_prompts = [f"prompt {number}" for number in range(p.batch_size * p.n_iter)]
        seeds = [p.seed + number for number in range(len(p.all_prompts))]
        p.scripts.each("process", p)
        images: list[Image.Image] = []
        infotexts: list[str] = []
        with torch.no_grad():
            p.init(p.all_prompts, seeds, seeds)
            for batch in range(p.n_iter):
                self.state.skipped = False
                if self.state.interrupted or self.state.stopping_generation:
                    break
                self.load(self.first)
                chosen = slice(batch * p.batch_size, (batch + 1) * p.batch_size)
                p.prompts, p.seeds = p.all_prompts[chosen], seeds[chosen]
                p.setup_conds()
                samples = p.sample(
                    conditioning=p.c,
                    unconditional_conditioning=p.uc,
                    seeds=p.seeds,
                    subseeds=p.seeds,
                    subseed_strength=0,
                    prompts=p.prompts,
                )
                for number, picture in enumerate(self._decoded(p, samples)):
                    text = ", ".join(
                        [p.prompts[number], *(f"{key}: {value}" for key, value in p.extra_generation_params.items())]
                    )
                    if p.saves:
                        self.save_image(picture, "pictures", "", info=text)
                    p.scripts.each("postprocess_image", p, SimpleNamespace(image=picture))
                    images.append(picture)
                    infotexts.append(text)
                    if getattr(p, "mask_for_overlay", None) is not None and self.opts.return_mask:
                        images.append(p.mask_for_overlay.convert("RGB"))
        processed = Processed(images, infotexts, list(p.all_prompts))
        if p.grid and len(images) > 1:
            processed.images.insert(0, images[0].copy())
            processed.infotexts.insert(0, infotexts[0])
            processed.index_of_first_image = 1
        p.scripts.each("postprocess", p, processed)
        return processed

    def _decoded(self, p: Any, samples: Any) -> list[Image.Image]:
        pictures = []
        for sample in samples:
            if not getattr(samples, "already_decoded", False):
                sample = torch.nn.functional.interpolate(sample[None, :3], scale_factor=LATENT)[0].clamp(-3, 3) / 3
            pixels = ((sample.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).to(torch.uint8)
            pictures.append(Image.fromarray(pixels.numpy()))
        return pictures

    def plot(self, p: Any, cells: Sequence[Callable[[Any], None]]) -> list[Processed | None]:
        """scripts/xyz_grid.py: a shallow copy of `p` for each cell; a cell that fails is black, None here."""
        results: list[Processed | None] = []
        with closing(p):
            for change in cells:
                cell = copy.copy(p)
                change(cell)
                try:
                    results.append(self.process_images(cell))
                except Exception as error:
                    self.report(f"Error generating image for xyz plot: {error}")
                    results.append(None)
        return results


class SdConditioning(list):
    """modules/prompt_parser.py."""

    def __init__(self, prompts: Sequence[str], width: int = 0, height: int = 0):
        super().__init__(prompts)
        self.width, self.height = width, height


class SdModel:
    """A loaded checkpoint: ldm's LatentDiffusion, or sgm's DiffusionEngine where `is_sdxl`, as the host has it."""

    scale_factor = 0.5
    parameterization = "eps"
    is_sdxl = is_sdxl_inpaint = False

    def __init__(self, name: str, unet: torch.nn.Module):
        self.name = name
        self.sd_checkpoint_info = SimpleNamespace(filename=f"{name}.safetensors", sha256=None)
        self.model = SimpleNamespace(diffusion_model=unet, conditioning_key="crossattn")
        self.alphas_cumprod = torch.linspace(0.999, 0.005, 1000)
        self.cond_stage_model: Any = TextModel()
        self.first_stage_model = Vae()

    def encode_first_stage(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.first_stage_model.encode(pixels)

    def decode_first_stage(self, latents: torch.Tensor) -> torch.Tensor:
        """Each position's channels, over its pixels."""
        pixels = latents[:, :3] / self.scale_factor
        return pixels.repeat_interleave(LATENT, dim=2).repeat_interleave(LATENT, dim=3)

    def get_learned_conditioning(self, texts: SdConditioning) -> Any:
        context = self.cond_stage_model(texts)
        if not self.is_sdxl:
            return context
        return {"crossattn": context, "vector": torch.tensor([[texts.height, texts.width, 0.0, 0.0]])}

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
        if self.is_sdxl_inpaint or self.model.conditioning_key == "hybrid":
            x = torch.cat([x, *cond["c_concat"]], dim=1)
        if self.is_sdxl:
            return self.model.diffusion_model(x, timesteps=t, context=cond["crossattn"], y=cond["vector"])
        return self.model.diffusion_model(x, t, context=torch.cat(cond["c_crossattn"], dim=1))


class Vae(torch.nn.Module):
    """sgm's: what it gives is drawn from the posterior."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.encoder = torch.nn.Conv2d(3, 8, LATENT, LATENT).requires_grad_(False)
            self.quant_conv = torch.nn.Conv2d(8, 8, 1).requires_grad_(False)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean + (log_variance / 2).exp() * torch.randn(mean.shape)


class TextModel:
    """modules/sd_hijack_clip.py: a prompt's words in chunks of 75, each between a start and ends."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Of a word with a hyphen each part is a token."""
        return [[zlib.crc32(part.encode()) for word in text.split() for part in word.split("-")] for text in texts]

    def tokenize_line(self, line: str) -> tuple[list[SimpleNamespace], int]:
        """What stands between brackets is emphasised."""
        tokens, weights = [], []
        for word in line.split():
            (own,) = self.tokenize([word.strip("()")])
            tokens += own
            weights += [1.1 if word.startswith("(") else 1.0] * len(own)
        chunks = []
        for first in range(0, max(len(tokens), 1), 75):
            own, last = tokens[first : first + 75], first + 75
            rest = 76 - len(own)
            multipliers = [1.0, *weights[first:last], *[1.0] * rest]
            chunks.append(SimpleNamespace(tokens=[0, *own, *[1] * rest], multipliers=multipliers))
        return chunks, len(tokens)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Of each token its remainders by the numbers from 2 on, 48 channels."""
        tokens = [[token for chunk in self.tokenize_line(text)[0] for token in chunk.tokens] for text in texts]
        return torch.tensor([[[float(token % channel) for channel in range(2, 50)] for token in one] for one in tokens])


class HTTPException(Exception):
    """fastapi's, which not every environment has."""

    def __init__(self, status_code: int, detail: str):
        self.status_code, self.detail = status_code, detail


def _add_callback(callbacks: list[Any], function: Any, category: str, filename: str) -> None:
    callbacks.append(function)


@dataclasses.dataclass
class Processed:
    images: list[Image.Image]
    infotexts: list[str]
    all_prompts: list[str]
    index_of_first_image: int = 0


@dataclasses.dataclass
class SamplerData:
    """steps_less: how many steps fewer it draws in img2img (DDIM and PLMS)."""

    name: str
    second_order: bool = False
    steps_less: int = 0

    def total_steps(self, steps: int) -> int:
        return steps * 2 if self.second_order else steps


SAMPLERS = {
    one.name: one for one in (SamplerData("Euler"), SamplerData("Heun", True), SamplerData("DDIM", steps_less=1))
} | {"DPM adaptive": SamplerData("DPM adaptive")}


class ScriptRunner:
    """The scripts of one tab: Portrait, and neighbours that tests put there, an object with some of the methods."""

    def __init__(self, host: Host, count: int):
        self.host = host
        self.neighbours: list[Any] = []
        portrait = Script("/x/scripts/portrait.py", "Portrait", host.portrait, 1, 1 + count)
        self.alwayson_scripts = [portrait]
        self.selectable_scripts = [Script(f"/x/scripts/{name}", TITLES[name]) for name in SCRIPTS]

    def each(self, name: str, p: Any, *args: Any) -> None:
        for script in self.alwayson_scripts:
            if hasattr(script.owner, name):
                values = p.script_args[script.args_from : script.args_to]
                self.host.call(getattr(script.owner, name), p, *args, *values)
        for neighbour in self.neighbours:
            if hasattr(neighbour, name):
                self.host.call(getattr(neighbour, name), p, *args)


class Processing:
    """modules/processing.py: StableDiffusionProcessingTxt2Img, with a refiner and hires fix.

    values: of the Portrait panel. script: the number of the script chosen, from 1. Others: as the host calls them,
    except: tokens: lengths of prompt and negative prompt. mapping: conditions are SDXL's mappings. prompts_of_each: of
    each picture of a batch, how many prompts are joined by AND. saves, grid: whether pictures are saved, a grid made.
    """

    def __init__(
        self, host: Host, values: Sequence[Any], script: int = 0, runner: ScriptRunner | None = None, **own: Any
    ):
        self.host = host
        self.sampler_name, self.steps, self.seed, self.cfg_scale = "Euler", 2, 1, 3.0
        self.width = self.height = SIDE
        self.batch_size = self.n_iter = 1
        self.tokens, self.mapping, self.prompts_of_each = (6, 6), False, None
        self.refiner_checkpoint, self.refiner_switch_at = None, None
        self.enable_hr, self.is_hr_pass, self.hr_scale, self.hr_checkpoint_name = False, False, 2, None
        self.hr_resize_x = self.hr_resize_y = self.truncate_x = self.truncate_y = 0
        self.hr_sampler_name, self.hr_second_pass_steps, self.denoising_strength = None, 0, None
        self.is_api, self.saves, self.grid = False, False, False
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.closed = 0
        vars(self).update(own)
        self.script_args = (script, *values)
        self.scripts = runner or ScriptRunner(host, len(values))
        self.scripts.each("setup", self)

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def close(self) -> None:
        self.closed += 1

    def setup_conds(self) -> None:
        random = torch.Generator().manual_seed(7)
        self.repeats = self.prompts_of_each or [1] * len(self.prompts)

        def condition(rows: int, tokens: int) -> Any:
            text = torch.randn(rows, tokens, 48, generator=random)
            return DictWithShape(crossattn=text, vector=torch.ones(rows, 4)) if self.mapping else text

        self.c, self.uc = condition(sum(self.repeats), self.tokens[0]), condition(len(self.prompts), self.tokens[1])

    def init(self, all_prompts: Any, all_seeds: Any, all_subseeds: Any) -> None:
        if self.enable_hr:
            self.hr_upscale_to_x, self.hr_upscale_to_y = (int(x * self.hr_scale) for x in (self.width, self.height))

    def sample(
        self,
        conditioning: Any,
        unconditional_conditioning: Any,
        seeds: Sequence[int],
        subseeds: Sequence[int],
        subseed_strength: float,
        prompts: Sequence[str],
    ) -> torch.Tensor:
        shape = (4, self.height // LATENT, self.width // LATENT)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        self.is_hr_pass = False
        x = self._launch(self.sampler_name, self.steps, x, conditioning, unconditional_conditioning)
        if not self.enable_hr:
            return x
        self.is_hr_pass = True
        if self.hr_checkpoint_name:
            self.host.load(self.hr_checkpoint_name)
        size = (self.hr_upscale_to_y // LATENT, self.hr_upscale_to_x // LATENT)
        x = torch.nn.functional.interpolate(x, size=size)
        steps = self.hr_second_pass_steps or self.steps
        x = self._launch(self.hr_sampler_name or self.sampler_name, steps, x, conditioning, unconditional_conditioning)
        self.is_hr_pass = False
        return x

    def _launch(self, sampler: str, steps: int, x: torch.Tensor, cond: Any, uncond: Any) -> torch.Tensor:
        """modules/sd_samplers_common.py: Sampler.launch_sampling."""
        denoiser = CFGDenoiser(self, SAMPLERS[sampler].total_steps(steps), cond, uncond)
        try:
            for _ in range(denoiser.total_steps):
                x = 0.7 * x + 0.3 * denoiser(x)
        except InterruptedException:
            pass
        return x


class Img2Img(Processing):
    """modules/processing.py: StableDiffusionProcessingImg2Img. nmask: what is painted, (4, h, w), or None."""

    def __init__(self, host: Host, values: Sequence[Any], script: int = 0, **own: Any):
        defaults = {"denoising_strength": 0.75, "image_mask": None, "nmask": None, "paste_to": None}
        picture = Image.new("RGB", (SIDE, SIDE), "grey")
        masked = {"inpaint_full_res": True, "mask_round": True, "inpainting_mask_invert": 0, "init_images": [picture]}
        super().__init__(host, values, script, **{**defaults, **masked, **own})

    def init(self, all_prompts: Any, all_seeds: Any, all_subseeds: Any) -> None:
        if self.image_mask is None:
            return
        left, top, right, bottom = self.image_mask.getbbox()
        if self.inpaint_full_res:
            self.paste_to = (left, top, right - left, bottom - top)
        small = self.image_mask.resize((self.width // LATENT, self.height // LATENT), Image.Resampling.BOX)
        self.nmask = torch.from_numpy(np.array(small) / 255).expand(4, -1, -1)
        if self.inpaint_full_res:
            self.nmask = torch.ones_like(self.nmask)

    def _launch(self, sampler: str, steps: int, x: torch.Tensor, cond: Any, uncond: Any) -> torch.Tensor:
        _, count = sys.modules["modules.sd_samplers_common"].setup_img2img_steps(self)
        return super()._launch(sampler, count + 1 - SAMPLERS[sampler].steps_less, x, cond, uncond)


class CFGDenoiser:
    """modules/sd_samplers_cfg_denoiser.py."""

    def __init__(self, p: Processing, total_steps: int, cond: Any, uncond: Any):
        self.p, self.host, self.total_steps, self.cond, self.uncond = p, p.host, total_steps, cond, uncond
        self.step = 0
        # Of each picture its prompts, as modules/prompt_parser.py: MulticondLearnedConditioning has them.
        composed = SimpleNamespace(batch=[[None] * count for count in p.repeats])
        self.sampler = SimpleNamespace(sampler_extra_args={"cond": composed, "uncond": uncond})

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        host, opts, p = self.host, self.host.opts, self.p
        if host.state.interrupted or host.state.skipped:
            raise InterruptedException
        # modules/sd_samplers_common.py: apply_refiner.
        if p.refiner_checkpoint and self.step / self.total_steps >= p.refiner_switch_at:
            host.load(p.refiner_checkpoint)
        repeats = p.repeats
        copies = [x[i] for i, count in enumerate(repeats) for _ in range(count)]
        params = SimpleNamespace(
            x=torch.cat([torch.stack(copies), x]), text_cond=self.cond, text_uncond=self.uncond, denoiser=self
        )
        host.cfg_denoiser_callback(params)
        x_in, cond, uncond = params.x, params.text_cond, params.text_uncond
        skip_uncond = opts.skip_early_cond != 0 and self.step / self.total_steps <= opts.skip_early_cond
        if skip_uncond:
            x_in = x_in[: -len(x)]
        if opts.pad_cond_uncond and cond.shape[1] != uncond.shape[1]:
            cond, uncond = _padded(cond, uncond)
        elif opts.pad_cond_uncond_v0 and cond.shape[1] != uncond.shape[1]:
            uncond = _padded_v0(cond, uncond)
        host.before_call(self.step)
        if skip_uncond:
            x_out = self._inner_model(x_in, cond)
        elif opts.batch_cond_uncond and cond.shape[1] == uncond.shape[1]:
            x_out = self._inner_model(x_in, _joined(cond, uncond))
        else:
            x_out = torch.cat([self._inner_model(x_in[: -len(x)], cond), self._inner_model(x_in[-len(x) :], uncond)])
        if skip_uncond:
            starts = itertools.accumulate([0, *repeats[:-1]])
            x_out = torch.cat([x_out, *(x_out[start : start + 1] for start in starts)])
        negative = x_out[-len(x) :]
        denoised = negative.clone()
        row = 0
        for i, count in enumerate(repeats):
            for _ in range(count):
                denoised[i] += (x_out[row] - negative[i]) * (1.0 if skip_uncond else p.cfg_scale)
                row += 1
        self.step += 1
        return denoised

    def _inner_model(self, x: torch.Tensor, cond: Any) -> torch.Tensor:
        context = cond["crossattn"] if isinstance(cond, dict) else cond
        timesteps = torch.full((len(x),), math.ceil(999 * (1 - self.step / self.total_steps)))
        return self.host.run(self.host.unet, x, timesteps, context)


def _joined(cond: Any, uncond: Any) -> Any:
    if isinstance(cond, dict):
        return {key: torch.cat([cond[key], uncond[key]]) for key in cond}
    return torch.cat([cond, uncond])


def _padded(cond: Any, uncond: Any) -> tuple[Any, Any]:
    """What is shorter is made longer at its end, in place where it is a mapping."""

    def longer(condition: Any, tokens: int) -> Any:
        if isinstance(condition, dict):
            condition["crossattn"] = longer(condition["crossattn"], tokens)
            return condition
        return torch.nn.functional.pad(condition, (0, 0, 0, max(tokens - condition.shape[1], 0)))

    return longer(cond, uncond.shape[1]), longer(uncond, cond.shape[1])


def _padded_v0(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """The last token is repeated, or what is too long is cut off."""
    last = uncond[:, -1:].repeat(1, max(cond.shape[1] - uncond.shape[1], 0), 1)
    return torch.hstack([uncond, last])[:, : cond.shape[1]]
