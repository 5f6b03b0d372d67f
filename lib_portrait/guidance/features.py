"""Guidance by an energy of the UNet's decoder features, inside of the UNet's call.

The seat of OmniPortrait's RB-Guidance (eq. 11): the gradient of an energy E with respect to the latent z_t joins the
noise prediction. It is taken where the features have been computed, within that call, and joins the output
of every row of the picture; so classifier-free guidance gives eps_uncond + w (eps_cond - eps_uncond) + grad E exactly,
since (1 - w) + w = 1, and no sampler needs code of its own.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib_portrait.attention.arguments import LATENT, TIMESTEPS, predicted, rows_of, with_predicted
from lib_portrait.attention.injection import Call, Injection, Wrapper
from lib_portrait.attention.rows import NEGATIVE, POSITIVE, REFERENCE, Row
from lib_portrait.attention.schedule import signal_rate
from lib_portrait.attention.sites import LAYOUTS, Site, layout_of
from lib_portrait.errors import Notice, PortraitError
from lib_portrait.guidance.equations import guided

# What torch says of a forward that has no derivative, or whose inputs were written over since.
_WITHOUT_BACKWARD = ("derivative", "does not require grad", "inplace operation", "in-place operation", "_backward")
_MEMORY = ("out of memory", "not enough memory")
# The exponent by which a gradient is made smaller where half precision could not hold it.
HEADROOM = 12


class _Undifferentiable(RuntimeError):
    """An attention layer gave something that has no gradient."""


@dataclass(frozen=True)
class _Gradient:
    """What joins eps of a picture, (4, h, w), for one latent (c, h, w) at one timestep."""

    latent: Tensor
    t: Tensor
    value: Tensor

    def holds(self, latent: Tensor, t: Tensor) -> bool:
        return torch.equal(self.latent, latent) and bool(self.t == t)


@dataclass
class Pass:
    """Guided rows on their way through the UNet.

    rows: their places in what runs (all of it where they run apart). numbers: theirs in the table of rows. marks: what
    these mean. z (P, c, h, w): their z_t. t (P): their timesteps. gradient: grad E (P, c, h, w) once it is known.
    """

    rows: list[int]
    numbers: list[int]
    marks: list[Row]
    z: Tensor
    t: Tensor
    gradient: Tensor | None = None

    @staticmethod
    def of(call: Call, rows: list[int], z: Tensor, t: Tensor) -> Pass:
        """Of these rows of the call, whose latents z (B, c, h, w) and timesteps t (B) are."""
        numbers = [(call.numbers or [])[row] for row in rows]
        return Pass(rows, numbers, [call.table[number] for number in numbers], z[rows].detach(), t[rows])

    @property
    def pictures(self) -> list[int]:
        """The number of each row's picture."""
        return [mark.picture for mark in self.marks]

    @property
    def running(self) -> bool:
        """Whether the features are still to come, or come again for the gradient."""
        return self.gradient is None


def decoder_blocks(unet: nn.Module) -> list[str]:
    """The paths of the blocks that end the UNet's decoder levels, from the coarsest on, upsampling included.

    In SD1 the second one's activations are the features of DIFT (arXiv 2306.03881, "up block 1"): half of the latent's
    height and width, with 1280 channels.
    """
    _, decoder, _ = LAYOUTS[layout_of(unet)]
    blocks = list(unet.get_submodule(decoder))  # type: ignore[call-overload]
    if decoder == "up_blocks":
        return [f"{decoder}.{number}" for number in range(len(blocks))]
    ends = [number for number, block in enumerate(blocks) if _has(block, "Upsample")]
    return [f"{decoder}.{number}" for number in [*ends, len(blocks) - 1]]


def level_of(site: Site, unet: nn.Module) -> int:
    """How often the latent has been halved where an attention layer is."""
    part, *inside = site.path.split(".")
    first, last, _ = LAYOUTS[layout_of(unet)]
    down, up = (list(unet.get_submodule(name)) for name in (first, last))  # type: ignore[call-overload]
    if first == "down_blocks":
        return int(inside[0]) if part == first else len(up) - 1 - int(inside[0]) if part == last else len(down) - 1
    halved = [_has(block, "Downsample") for block in down]
    if part == first:
        return sum(halved[: int(inside[0])])
    return sum(halved) - (sum(_has(block, "Upsample") for block in up[: int(inside[0])]) if part == last else 0)


def _has(block: nn.Module, kind: str) -> bool:
    return any(type(module).__name__ == kind for module in block.children())


def blocks_before(unet: nn.Module, end: str) -> list[str]:
    """The paths of the UNet's blocks in the order in which they run, up to that one."""
    first, last, middle = LAYOUTS[layout_of(unet)]
    numbers = range(len(unet.get_submodule(first))), range(int(end.rpartition(".")[2]) + 1)  # type: ignore[arg-type]
    return [*(f"{first}.{n}" for n in numbers[0]), middle, *(f"{last}.{n}" for n in numbers[1])]


class FeatureGuidance(ABC):
    """Adds the gradient of an energy to what a UNet puts out, for `attention.Injection(guidance=...)`.

    block: whose activations the features are, of `decoder_blocks`. alphas_cumprod: (T,) of a model that predicts v,
    whose output changes by grad E / alpha_t where eps changes by grad E; None for one that predicts eps.
    checkpointing: the blocks before the features keep nothing for the gradient, which then runs them anew.

    The rows whose features are looked at, the first positive one of each guided picture, run apart from the others
    where nobody else stands around the UNet's forward and no rule has rows of its own in the call; elsewhere all rows
    are in the graph. A picture's gradient is made once for each latent, in the first call with a positive row of it;
    where a host runs its other rows in later calls, it is kept for them.

    Raises PortraitError for a negative row that comes before, for gradients that are not finite, where the UNet passes
    the block by, and where the memory does not suffice. An attention whose backward pass is missing is replaced by
    PyTorch's own for the guided rows alone; `notices` says so.
    """

    def __init__(self, block: int = 1, alphas_cumprod: Tensor | None = None, checkpointing: bool = False):
        self.block = block
        self.alphas_cumprod = alphas_cumprod
        self.checkpointing = checkpointing
        self.notices: list[Notice] = []
        self._plain = False
        self._known: dict[int, _Gradient] = {}

    # ---- what is guided, and by what

    @abstractmethod
    def energy(self, features: Tensor, current: Pass) -> Tensor:
        """E (P) of the features (P, C, h, w), at least float32, of the pass's rows: each picture's of its own alone."""

    def active(self, progress: float) -> bool:
        """Whether anything is guided at this point of the sampling, 0 to 1."""
        return True

    def guides(self, picture: int, t: float) -> bool:
        """Whether this picture of the batch is guided at this timestep; the same for all its rows."""
        return True

    def before(self, current: Pass, run: Callable[[], Tensor], call: Call, injection: Injection) -> None:
        """Told before guided rows run. run: what the UNet predicts of them, (P, 4, h, w), without guidance."""
        return

    def added(self, gradient: Tensor, current: Pass, prediction: Tensor) -> Tensor:
        """What joins eps of the guided pictures, made of grad E (P, 4, h, w) in float32 and of their rows' own
        prediction (P, 4, h, w)."""
        return gradient

    def adds_to(self, site: Site) -> bool:
        """Whether somebody else adds to what this attention layer gives. It then keeps its own forward, as PyTorch's
        attention in its place would leave that out."""
        return False

    @property
    def looks(self) -> bool:
        """Whether `look` wants to be told."""
        return False

    def look(self, site: Site, x: Tensor, context: Tensor, current: Pass) -> None:
        """Told of each attention layer before the features when it is about to run, also when it runs again: its input
        x (B, n, channels) and context (B, m, context)."""
        return

    # ---- in the UNet

    def path_of(self, unet: nn.Module) -> str:
        """Of the block whose activations are the features. Raises PortraitError where there is none of that number."""
        blocks = decoder_blocks(unet)
        if self.block >= len(blocks):
            raise PortraitError(
                "guidance.block",
                f"the model's decoder has {len(blocks)} blocks, none of the number {self.block}",
                f"Give a whole number from 0 to {len(blocks) - 1}.",
            )
        return blocks[self.block]

    def overrides(self, unet: nn.Module, call: Call, injection: Injection) -> dict[str, Wrapper]:
        under_way: list[Pass] = []
        outer: list[bool] = []
        ran: set[int] = set()
        path = self.path_of(unet)

        def network(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            z = LATENT.of(args, kwargs)
            t = torch.as_tensor(TIMESTEPS.of(args, kwargs), device=z.device).expand(len(z))
            rows = self._rows(call, z, t)
            if not rows:
                return self._with_gradients(call, z, t, host(*args, **kwargs))
            rest = [row for row in range(len(z)) if row not in rows]
            apart = bool(rest) and injection.alone and REFERENCE not in call.kinds

            def guided_rows(run: Callable[[Sequence[int], tuple[Any, ...], dict[str, Any]], Any]) -> Any:
                if not apart:
                    return run(rows, args, kwargs)
                with injection.only(rows):
                    return run(range(len(rows)), *rows_of((args, kwargs), len(z), rows))

            def unguided(own: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                with injection.repeated():
                    return predicted(host(*args, **kwargs))[list(own)]

            self.before(Pass.of(call, rows, z, t), lambda: guided_rows(unguided), call, injection)
            output = guided_rows(lambda own, *given: through(host, list(own), *given))
            self._keep(under_way.pop(), predicted(output)[slice(None) if apart else rows])
            if apart:
                with injection.only(rest):
                    others = host(*rows_of(args, len(z), rest), **rows_of(kwargs, len(z), rest))
                output = with_predicted(output, _merged(z, (rows, predicted(output)), (rest, predicted(others))))
            return self._with_gradients(call, z, t, output)

        def through(host: Callable[..., Any], rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """The UNet's output, with the gradient of these rows left in `under_way`."""
            try:
                return once(host, rows, args, kwargs)
            except RuntimeError as error:
                self._check_memory(error)
                if self._plain or not _lacks_backward(error):
                    raise
            self._plain = True
            self.notices.append(
                Notice(
                    "guidance",
                    "the attention optimization has no backward pass, so that guided rows take PyTorch's own attention",
                )
            )
            with injection.repeated(set(ran)):
                return once(host, rows, args, kwargs)

        def once(host: Callable[..., Any], rows: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            under_way.clear()
            ran.clear()
            z, t = LATENT.of(args, kwargs), TIMESTEPS.of(args, kwargs)
            current = Pass.of(call, rows, z, torch.as_tensor(t, device=z.device).expand(len(z)))
            under_way.append(current)
            outer.append(torch.is_grad_enabled())
            try:
                # `features` switches it off again; leaving the block does where the call does not come so far.
                with _frozen(unet), torch.enable_grad():
                    current.z.requires_grad_()
                    leaf = z.detach().index_copy(0, torch.tensor(rows, device=z.device), current.z)
                    args, kwargs = LATENT.put(args, kwargs, leaf)
                    return host(*args, **kwargs)
            except BaseException:
                under_way.clear()
                raise
            finally:
                outer.clear()

        def features(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            activations = host(*args, **kwargs)
            # Without a graph it is another pass, as ControlNet's "reference" has one of its own in front.
            if not (under_way and under_way[0].running and activations.requires_grad):
                return activations
            current = under_way[0]
            # Where nothing was kept for the gradient, it runs the blocks again.
            with injection.repeated():
                gradient = self._gradient(current, activations[current.rows])
            current.gradient = gradient
            torch.set_grad_enabled(outer[0])
            return activations.detach()

        def attention(site: Site, host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            if not (under_way and under_way[0].running and site.input(args, kwargs).requires_grad):
                return host(*args, **kwargs)
            if self.looks:
                self.look(site, *site.arguments(args, kwargs), under_way[0])
            plain = self._plain and not self.adds_to(site)
            out = _plain_attention(site, args, kwargs) if plain else host(*args, **kwargs)
            ran.add(site.index)
            if not out.requires_grad:
                raise _Undifferentiable(f"{site.path} has no derivative")
            return out

        def block(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not (under_way and under_way[0].running):
                return host(*args, **kwargs)
            # ControlNet walks through the encoder without gradients (scripts/hook.py), and between the blocks it adds
            # what T2I-Adapters give. Who switched them off puts back what was.
            torch.set_grad_enabled(True)
            return host(*args, **kwargs)

        def checkpointed(module: nn.Module, host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not (under_way and under_way[0].running):
                return host(*args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                if call.repeated:
                    # What moves the block's weights where they are needed (lowvram) stands before its forward.
                    for number, hook in list(module._forward_pre_hooks.items()):
                        if number not in module._forward_pre_hooks_with_kwargs:
                            hook(module, args)
                return host(*args, **kwargs)

            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        before = blocks_before(unet, path)
        blocks = {one: unet.get_submodule(one) for one in before}
        # Weights that come and go with the blocks (lowvram) are not there any more when the gradient is taken.
        checkpointing = self.checkpointing or any(one._forward_pre_hooks for one in blocks.values())
        functions: dict[str, Wrapper] = {"": network, **dict.fromkeys(blocks, block)}
        if checkpointing:
            functions |= {name: _around(block, _bound(checkpointed, one)) for name, one in blocks.items()}
        functions[path] = _around(features, functions.get(path))
        for site in injection.sites:
            if site.path.startswith(tuple(f"{one}." for one in before)):
                functions[site.path] = _bound(attention, site)
        return functions

    def _rows(self, call: Call, z: Tensor, t: Tensor) -> list[int]:
        """The first positive row of each guided picture whose gradient is not known for this latent."""
        first: dict[int, int] = {}
        for number, row in enumerate(call.rows):
            if row.kind == POSITIVE and self.guides(row.picture, float(t[number])):
                first.setdefault(row.picture, number)
        return [number for picture, number in first.items() if not self._knows(picture, z[number], t[number])]

    def _knows(self, picture: int, z: Tensor, t: Tensor) -> bool:
        return picture in self._known and self._known[picture].holds(z, t)

    def _gradient(self, current: Pass, activations: Tensor) -> Tensor:
        """grad E with respect to z_t, (P, c, h, w), by the chain rule over the features (P, C, h', w')."""
        features = activations.detach().to(torch.promote_types(activations.dtype, torch.float32)).requires_grad_()
        total = self.energy(features, current).sum()
        if not total.requires_grad:
            return torch.zeros_like(current.z, dtype=features.dtype)
        (outer,) = torch.autograd.grad(total, features)
        # E is small and its gradient smaller; a power of two keeps what half precision would lose of it on the way.
        # Where that makes it too large, a smaller one is tried.
        exponent = math.frexp(float(outer.abs().max()))[1]
        half = activations.dtype == torch.float16
        gradient = self._backward(activations, current.z, outer, exponent, half)
        if half and not bool(gradient.isfinite().all()):
            gradient = self._backward(activations, current.z, outer, exponent + HEADROOM, False)
        return gradient

    @staticmethod
    def _backward(activations: Tensor, z: Tensor, outer: Tensor, exponent: int, again: bool) -> Tensor:
        """outer (P, C, h', w') through the UNet, over 2^exponent on the way: (P, c, h, w). again: keep the graph."""
        scaled = torch.ldexp(outer, torch.tensor(-exponent)).to(activations.dtype)
        (gradient,) = torch.autograd.grad(activations, z, scaled, retain_graph=again)
        return torch.ldexp(gradient.to(outer.dtype), torch.tensor(exponent))

    def _keep(self, done: Pass, prediction: Tensor) -> None:
        """prediction: of the pass's rows."""
        if done.gradient is None:
            raise PortraitError(
                "model",
                "the UNet did not run the block whose features guide it",
                "Switch off what replaces the UNet (TensorRT, compiled or exported UNets) and generate again.",
                500,
            )
        # An inpainting model's further channels are no part of what it predicts.
        gradient = done.gradient[:, : prediction.shape[1]]
        value = self.added(gradient, done, prediction.detach())
        if not bool(value.isfinite().all()):
            raise PortraitError(
                "guidance",
                "its gradient is infinite or undefined",
                "Lower its strength, or use a model in full precision.",
                500,
            )
        for picture, z, t, own in zip(done.pictures, done.z.detach(), done.t, value, strict=True):
            self._known[picture] = _Gradient(z, t, own)

    def _with_gradients(self, call: Call, z: Tensor, t: Tensor, output: Any) -> Any:
        """The UNet's output with grad E in every row of the guided pictures (eq. 11)."""
        prediction = predicted(output).clone()
        for number, row in enumerate(call.rows):
            if row.kind in (POSITIVE, NEGATIVE) and self.guides(row.picture, float(t[number])):
                if not self._knows(row.picture, z[number], t[number]):
                    raise PortraitError(
                        "rows",
                        f"a negative row of picture {row.picture + 1} came before its positive one",
                        "Switch off extensions that split UNet calls.",
                        500,
                    )
                value = self._known[row.picture].value
                alpha = 1.0 if self.alphas_cumprod is None else signal_rate(self.alphas_cumprod, t[number])
                prediction[number] = guided(prediction[number], value, alpha).to(prediction.dtype)
        return with_predicted(output, prediction)

    @staticmethod
    def _check_memory(error: RuntimeError) -> None:
        """Raises PortraitError where the device's memory is full."""
        if isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error).lower() for word in _MEMORY):
            raise PortraitError(
                "guidance",
                "the memory does not suffice for its gradient",
                "Switch on its option that saves memory (checkpointing), or make smaller pictures.",
                500,
            ) from error


def _bound(function: Callable[..., Any], first: Any) -> Wrapper:
    return lambda *args, **kwargs: function(first, *args, **kwargs)


def _around(outer: Wrapper, inner: Wrapper | None) -> Wrapper:
    """One function around a module in place of two."""
    if inner is None:
        return outer
    return lambda host, *args, **kwargs: outer(_bound(inner, host), *args, **kwargs)


def _merged(like: Tensor, *parts: tuple[Sequence[int], Tensor]) -> Tensor:
    """Rows that ran apart, in the order of the call's."""
    (_, first), *_ = parts
    whole = first.new_empty(len(like), *first.shape[1:])
    for rows, values in parts:
        whole[list(rows)] = values
    return whole


@contextlib.contextmanager
def _frozen(unet: nn.Module) -> Iterator[None]:
    """The host's weights without gradients, for which the graph would keep what entered every layer."""
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _plain_attention(site: Site, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The layer by PyTorch's own attention, in single precision, which SD2's attention needs."""
    q, k, v = site.qkv(*site.arguments(args, kwargs))
    autocast = torch.is_autocast_enabled()
    with torch.autocast(q.device.type, enabled=False) if autocast else contextlib.nullcontext():
        attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return site.out(attended.to(v.dtype))


def _lacks_backward(error: RuntimeError) -> bool:
    known = (NotImplementedError, _Undifferentiable)
    return isinstance(error, known) or any(word in str(error) for word in _WITHOUT_BACKWARD)
