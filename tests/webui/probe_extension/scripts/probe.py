"""Test equipment: shows, over the server's API, what really happened inside the UNet, and what was left behind.

It observes through `__call__` of the UNet and attention classes (set while armed, removed when collected), so it puts
nothing on any instance and sees what whoever wrapped an instance's `forward` made of it.

    POST /probe/arm       {"sites": [..], "fail": {"call": k, "site": i}, "interrupt": {"call": k},
                           "callback_fails": bool, "tiles": bool}
    POST /probe/collect   {"file": PATH} -> what was seen, as JSON; tensors go into the safetensors file PATH
    GET  /probe/state     attributes, hooks, classes, weights, callbacks, live tensors, memory
    POST /probe/plant     {"what": "attribute" | "hook" | "weight" | "class" | "callback" | "tensor" | null}: a leak
    POST /probe/controlnet {"channels": n}: the width of the small control network of these tests
    POST /probe/host      {"prompt": .., "word": .., "instead": ..} -> what `WebuiHost` answers of the loaded model
    POST /probe/first     {"extension": folder's name | null}: whose callbacks come first; null as they were loaded
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import ldm.modules.attention
import ldm.modules.diffusionmodules.openaimodel
import numpy as np
import psutil
import sgm.modules.attention
import sgm.modules.diffusionmodules.openaimodel
import torch
from fastapi import Body, FastAPI
from modules import script_callbacks, scripts, shared
from modules import sd_hijack as host_hijack
from modules.call_queue import queue_lock
from safetensors.torch import save_file

UNETS = (
    ldm.modules.diffusionmodules.openaimodel.UNetModel,
    sgm.modules.diffusionmodules.openaimodel.UNetModel,
)
ATTENTIONS = (ldm.modules.attention.CrossAttention, sgm.modules.attention.CrossAttention)
CHUNK = 77
"""Tokens the host encodes at a time: whatever a context has beyond a multiple of this are marks put in front."""


def unmarked(context: torch.Tensor) -> torch.Tensor:
    return context[:, context.shape[1] % CHUNK :]


def fingerprints(context: torch.Tensor) -> list[str]:
    """One hash a row, of the first chunk without marks: padding, cutting and marking leave it as it is."""
    rows = unmarked(context)[:, :CHUNK].detach().float().cpu().contiguous()
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in rows]


def kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone()


def sites_of(unet: torch.nn.Module) -> dict[int, int]:
    """id of attention layer -> its number in the published order (down, up, middle; attn1 before attn2)."""
    numbers: dict[int, int] = {}
    for part in (unet.input_blocks, unet.output_blocks, unet.middle_block):
        for module in part.modules():
            if hasattr(module, "attn1") and hasattr(module, "attn2"):
                numbers[id(module.attn1)] = len(numbers)
                numbers[id(module.attn2)] = len(numbers)
    return numbers


class Recorder:
    """What one request did. Alive between `arm` and `collect`."""

    def __init__(self, wishes: dict[str, Any]):
        self.sites = set(wishes.get("sites", ()))
        self.fail = wishes.get("fail")
        self.interrupt = wishes.get("interrupt")
        self.callback_fails = bool(wishes.get("callback_fails"))
        self.foreigners = bool(wishes.get("foreigners"))
        self.tiles = bool(wishes.get("tiles"))
        self.tensors: dict[str, torch.Tensor] = {}
        self.calls: list[dict[str, Any]] = []
        self.foreign: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.samples = 0
        self.kinds: dict[str, str] = {}
        self.numbers: dict[int, int] = {}
        self.numbered: int | None = None
        self.inside = False

    def see_conditions(self, params: Any) -> None:
        if self.callback_fails:
            raise RuntimeError("planted by the probe in a callback")
        for kind, cond in (("positive", params.text_cond), ("negative", params.text_uncond)):
            cond = cond["crossattn"] if isinstance(cond, dict) else cond
            for mark in fingerprints(cond):
                self.kinds[mark] = kind

    def unet(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        call = torch.nn.Module.__call__
        if module is not shared.sd_model.model.diffusion_model:
            return call(module, *args, **kwargs)
        number = len(self.calls)
        if self.numbered != id(module):
            self.numbers, self.numbered = sites_of(module), id(module)
        x = args[0] if args else kwargs["x"]
        context = kwargs["context"] if "context" in kwargs else args[2]
        marks = fingerprints(context)
        self.calls.append(
            {
                "rows": len(x),
                "kinds": [self.kinds.get(mark, "unknown") for mark in marks],
                "fingerprints": marks,
                "context": list(context.shape),
                "marks": context.shape[1] % CHUNK,
                "shape": list(x.shape),
                "checkpoint": shared.sd_model.sd_checkpoint_info.name_for_extra,
                "seen": {},
            }
        )
        if self.interrupt and self.interrupt["call"] == number:
            shared.state.interrupt()
        if self.sites:
            self.tensors[f"{number}.x"] = kept(x)
            self.tensors[f"{number}.context"] = kept(unmarked(context))
        self.inside = True
        try:
            if self.tiles:
                # As extensions for large pictures do: the left and the right half one after the other.
                halves = x.chunk(2, dim=-1)
                out = torch.cat([call(module, half, *args[1:], **kwargs) for half in halves], dim=-1)
            else:
                out = call(module, *args, **kwargs)
        finally:
            self.inside = False
        if self.sites:
            self.tensors[f"{number}.out"] = kept(out)
        return out

    def attention(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        call = torch.nn.Module.__call__
        site = self.numbers.get(id(module))
        x = args[0] if args else kwargs["x"]
        context = kwargs.get("context", args[1] if len(args) > 1 else None)
        if site is None:
            seen = f"foreign.{len(self.foreign)}"
            self.foreign.append({"tokens": context.shape[1] if context is not None else 0, "rows": len(x)})
            out = call(module, *args, **kwargs)
            if self.foreigners and context is not None:
                for name, tensor in (("in", x), ("out", out), ("context", context)):
                    self.tensors[f"{seen}.{name}"] = kept(tensor)
            return out
        number = len(self.calls) - 1
        if self.fail and self.fail["call"] == number and self.fail.get("site", 1) == site:
            raise RuntimeError("planted by the probe inside a step")
        out = call(module, *args, **kwargs)
        seen = self.calls[number]["seen"]
        times = seen[str(site)] = seen.get(str(site), 0) + 1
        if site in self.sites:
            name = f"{number}.{site}.{times - 1}"
            self.tensors[name + ".in"] = kept(x)
            self.tensors[name + ".out"] = kept(out)
            if context is not None:
                self.tensors[name + ".context"] = kept(context)
        return out


recorder: Recorder | None = None
planted: list[Any] = []


def observed(method: str) -> Any:
    def __call__(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if recorder is None:
            return torch.nn.Module.__call__(self, *args, **kwargs)
        return getattr(recorder, method)(self, args, kwargs)

    return __call__


def observe() -> None:
    for cls in UNETS:
        cls.__call__ = observed("unet")
    for cls in ATTENTIONS:
        cls.__call__ = observed("attention")


def stop_observing() -> None:
    for cls in UNETS + ATTENTIONS:
        if "__call__" in vars(cls):
            del cls.__call__


class Script(scripts.Script):
    """Sees the latents before they are decoded."""

    def title(self) -> str:
        return "Probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list:
        return []

    def post_sample(self, p: Any, ps: Any, *args: Any) -> None:
        if recorder is not None:
            recorder.tensors[f"latents.{recorder.samples}"] = kept(torch.stack(list(ps.samples)))
            recorder.samples += 1

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        if recorder is not None:
            recorder.batches.append(
                {"attributes": sorted(vars(p)), "parameters": sorted(map(str, p.extra_generation_params))}
            )


def modules_watched() -> list[tuple[str, torch.nn.Module]]:
    model = shared.sd_model
    found = [("model", model), ("wrapper", model.model)]
    return found + [("unet." + name, module) for name, module in model.model.diffusion_model.named_modules()]


def attributes(module: torch.nn.Module) -> list[str]:
    """The names of what is set on a module. Hypertile's wrapper of a forward, which it leaves there, has its own."""

    def name_of(name: str, value: Any) -> str:
        code = getattr(value, "__code__", None)
        its = name == "forward" and code is not None and Path(code.co_filename).name == "hypertile.py"
        return "__webui_hypertile_forward" if its else name

    return sorted(name_of(name, value) for name, value in vars(module).items())


def function_name(owner: type, name: str) -> str:
    function = getattr(owner, name)
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}@{id(function)}"


def state() -> dict[str, Any]:
    gc.collect()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    modules = {
        name: {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "attributes": attributes(module),
            "hooks": {key: len(value) for key, value in vars(module).items() if "hooks" in key and value},
        }
        for name, module in modules_watched()
    }
    classes = {
        f"{cls.__module__}.{cls.__qualname__}.{name}": function_name(cls, name)
        for cls in (
            *UNETS,
            *ATTENTIONS,
            ldm.modules.attention.BasicTransformerBlock,
            ldm.modules.attention.SpatialTransformer,
            sgm.modules.attention.BasicTransformerBlock,
            torch.nn.Linear,
            torch.nn.Module,
        )
        for name in ("forward", "_forward", "__call__")
        if hasattr(cls, name)
    }
    weights = 0
    for name, tensor in shared.sd_model.state_dict().items():
        weights = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), weights))
    live = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return {
        "modules": modules,
        "classes": classes,
        "global_hooks": {
            name: len(value)
            for name, value in vars(torch.nn.modules.module).items()
            if name.startswith("_global") and hasattr(value, "__len__")
        },
        "weights": weights,
        "callbacks": {name: len(found) for name, found in script_callbacks.callback_map.items()},
        "optimization": getattr(host_hijack.current_optimizer, "name", None),
        "optimizations": [optimizer.title() for optimizer in host_hijack.optimizers],
        "checkpoint": shared.sd_model.sd_checkpoint_info.name_for_extra,
        "tensors": {
            "count": len(live),
            "bytes": sum(item.numel() * item.element_size() for item in live),
            "with a graph": sum(item.grad_fn is not None for item in live),
            "with a gradient": sum(item.is_leaf and item.grad is not None for item in live),
        },
        "rss": psutil.Process().memory_info().rss,
        "heavy": sorted({"cv2", "transformers", "insightface", "facenet_pytorch", "onnxruntime"} & set(sys.modules)),
        "portrait": sorted(name for name in sys.modules if name.split(".")[0] == "lib_portrait"),
        "armed": recorder is not None,
    }


def plant(what: str | None) -> None:
    """Leaves behind, on purpose, what must not be left behind; None takes it all away."""
    unet = shared.sd_model.model.diffusion_model
    attention = unet.middle_block[1].transformer_blocks[0].attn2
    if what is None:
        while planted:
            planted.pop()()
    elif what == "attribute":
        attention.left_behind = True
        planted.append(lambda: delattr(attention, "left_behind"))
    elif what == "hook":
        planted.append(attention.register_forward_hook(lambda module, args, out: None).remove)
    elif what == "weight":
        weight = attention.to_q.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01)
        planted.append(lambda: weight.data.copy_(before))
    elif what == "class":
        cls, before = ATTENTIONS[0], ATTENTIONS[0].forward
        cls.forward = lambda self, *args, **kwargs: before(self, *args, **kwargs)
        planted.append(lambda: setattr(cls, "forward", before))
    elif what == "callback":

        def nothing(params: Any) -> None:
            return None

        script_callbacks.on_cfg_denoiser(nothing)
        planted.append(lambda: script_callbacks.remove_callbacks_for_function(nothing))
    elif what == "tensor":
        kept_alive = [torch.zeros(1000) for _ in range(10)]
        planted.append(kept_alive.clear)
    else:
        raise ValueError(what)


@torch.no_grad()
def host_answers(prompt: str, word: str, instead: str) -> dict[str, Any]:
    """What `WebuiHost` answers, beside what the model's own modules give. instead: a word put in the word's place."""
    from lib_portrait.webui.host import WebuiHost

    model, vae = shared.sd_model, shared.sd_model.first_stage_model
    host = WebuiHost(model, (128, 128))
    picture = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    pixels = torch.from_numpy(picture.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None]
    mean = vae.quant_conv(vae.encoder(pixels))[:, :4] * model.scale_factor
    random = torch.get_rng_state()
    latent, conditions = host.latent(picture), host.text(prompt)
    kept = torch.equal(random, torch.get_rng_state())
    context = conditions["crossattn"] if isinstance(conditions, dict) else conditions
    vector = {"y": conditions["vector"].expand(2, -1)} if isinstance(conditions, dict) else {}
    other = host.text(prompt.replace(word, instead))
    other = other["crossattn"] if isinstance(other, dict) else other
    two = latent.repeat(2, 1, 1, 1)
    out = host.call(two, torch.tensor(300), conditions)
    t = torch.full((2,), 300)
    expected = model.model.diffusion_model(two, timesteps=t, context=context.expand(2, -1, -1), **vector)
    return {
        "latent": float((latent - mean).abs().max()),
        "largest": float(mean.abs().max()),
        "random": kept,
        "call": float((out - expected).abs().max()),
        "context": list(context.shape),
        "positions": [position for own in host.positions(prompt, word) for position in own],
        "emphasis": list(host.emphasis(prompt)),
        # Text encoders look backwards only: before the word nothing changes.
        "changed": int((context != other).any(dim=2)[0].nonzero()[0]),
        "alphas_cumprod": [len(host.alphas_cumprod), float(host.alphas_cumprod[0]), float(host.alphas_cumprod[-1])],
        "prediction": host.prediction,
        "same": host.state == WebuiHost(model, (64, 64)).state,
        "state": repr(host.state),
    }


loaded_order: dict[str, list] = {}


def put_first(extension: str | None) -> None:
    """Orders what the host calls in order: the always-on scripts, and the callbacks of the denoiser."""
    lists = {
        "txt2img": scripts.scripts_txt2img.alwayson_scripts,
        "img2img": scripts.scripts_img2img.alwayson_scripts,
        "denoiser": script_callbacks.callback_map["callbacks_cfg_denoiser"],
    }
    for name, found in lists.items():
        loaded_order.setdefault(name, list(found))
        files = {id(item): getattr(item, "filename", None) or item.script for item in found}
        found[:] = sorted(
            loaded_order[name], key=lambda item, files=files: extension not in Path(files[id(item)]).parts
        )
    for runner in (scripts.scripts_txt2img, scripts.scripts_img2img):
        runner.callback_map.clear()
    script_callbacks.ordered_callbacks_map.clear()


def add_routes(demo: Any, app: FastAPI) -> None:
    @app.post("/probe/arm")
    def arm(wishes: dict = Body(default={})) -> dict:
        # What img2img begins with is drawn of the VAE's distribution by the process's own generator, which nobody
        # seeds: two recordings would differ by what ran before them.
        torch.manual_seed(0)
        global recorder
        recorder = Recorder(wishes)
        observe()
        return {}

    @app.post("/probe/collect")
    def collect(wishes: dict = Body(...)) -> dict:
        global recorder
        stop_observing()
        done, recorder = recorder, None
        if done is None:
            return {"error": "it was not armed"}
        if done.tensors:
            save_file({name: tensor.contiguous() for name, tensor in done.tensors.items()}, wishes["file"])
        return {"calls": done.calls, "foreign": done.foreign, "batches": done.batches, "tensors": len(done.tensors)}

    @app.get("/probe/state")
    def report_state() -> dict:
        return state()

    @app.post("/probe/plant")
    def plant_leak(wishes: dict = Body(...)) -> dict:
        plant(wishes["what"])
        return {}

    @app.post("/probe/controlnet")
    def narrow_controlnet(wishes: dict = Body(...)) -> dict:
        guess = sys.modules["scripts.controlnet_model_guess"]
        guess.controlnet_default_config["model_channels"] = wishes["channels"]
        return {}

    @app.post("/probe/host")
    def ask_host(wishes: dict = Body(...)) -> dict:
        with queue_lock:
            return host_answers(**wishes)

    @app.post("/probe/first")
    def order(wishes: dict = Body(...)) -> dict:
        put_first(wishes["extension"])
        return {"order": [script.title() for script in scripts.scripts_txt2img.alwayson_scripts]}


def see_conditions(params: Any) -> None:
    if recorder is not None:
        recorder.see_conditions(params)


def end_with_the_tests(parent: int = os.getppid()) -> None:
    """A test run that is killed takes its server with it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


threading.Thread(target=end_with_the_tests, daemon=True).start()
script_callbacks.on_app_started(add_routes)
script_callbacks.on_cfg_denoiser(see_conditions)
