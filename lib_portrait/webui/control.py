"""sd-webui-controlnet's networks, for methods that have trained one together with their adapter (as of 1.1.455).

Its script keeps what its enabled units run in `latest_network.control_params`, in their order, from `process` (with a
refiner `before_process_batch`) until the pictures are done; its hook on the UNet's forward calls these networks with
the context that the UNet got.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lib_portrait.attention.regions import Box
from lib_portrait.errors import PortraitError

if TYPE_CHECKING:
    from lib_portrait.checkpoints.kit import StoredFile
    from lib_portrait.control_picture import Circle

TITLE = "controlnet"
# The folder that the extension saves them in.
SHOWN_AS = "portrait"
_HINTS = ("hint_cond", "hr_hint_cond")
# Where the host keeps what it has made of prompts for the next request: its parameters and the conditions.
_KEPT_CONDITIONS = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")


@dataclass(frozen=True)
class Unit:
    """An enabled unit that runs a network. name: of its model, as the panel shows it. file: the model's, None where
    that is not known. parameters: the extension's own of this unit."""

    name: str
    file: Path | None
    parameters: Any

    @property
    def network(self) -> torch.nn.Module:
        return self.parameters.control_model.control_model


def show(p: Any, unit: Unit) -> None:
    """Puts the picture that a unit's network sees among those that the extension shows, and saves where its settings
    say so, as those of its preprocessors."""
    from lib_portrait.control_picture import to_image

    hint = unit.parameters.hint_cond
    if isinstance(hint, torch.Tensor) and hint.ndim == 4 and hint.shape[1] == 3:
        _script(p).detected_map.append((to_image(hint[0]), SHOWN_AS))


def _script(p: Any) -> Any:
    scripts = getattr(p.scripts, "alwayson_scripts", ())
    return next((one for one in scripts if one.title().lower() == TITLE), None)


def _run(p: Any) -> list[Any]:
    """The extension's own parameters of what its enabled units run."""
    return list(getattr(getattr(_script(p), "latest_network", None), "control_params", None) or ())


def units(p: Any) -> list[Unit]:
    """The enabled units whose model is a ControlNet, for the sampling that is about to begin."""
    script, run = _script(p), _run(p)
    if not run:
        return []
    # Its files by the names of the models: in a module of its own, which has no name here that is ours to use.
    state = type(script).title.__globals__.get("global_state")
    files = getattr(state, "cn_models", {})
    found = []
    for unit, parameters in zip(script.enabled_units, run):
        if getattr(parameters.control_model_type, "is_controlnet", False):
            name = str(unit.model)
            file = files.get(name)
            found.append(Unit(name, Path(str(file).strip('"')) if file else None, parameters))
    return found


def trained_with(p: Any, file: StoredFile) -> list[Unit]:
    """Of `units` those that run this very network. Each network is there once, however many units run it."""
    from lib_portrait.webui import instances

    found = [unit for unit in units(p) if unit.file is not None and instances.store().matches(unit.file, file)]
    return list({id(unit.network): unit for unit in reversed(found)}.values())[::-1]


@contextlib.contextmanager
def marks_dropped(p: Any) -> Iterator[None]:
    """Around a sampling: where it fails beside units, the host forgets the conditions that it keeps for the next one.

    In front of each stands then the extension's mark, put there at the sampling's start. It has them forgotten too, but
    in its first call of the UNet; a request that is refused before would spoil the next one of the same prompt.
    """
    try:
        yield
    except BaseException:
        beside_units = getattr(_script(p), "latest_network", None) is not None
        for name in _KEPT_CONDITIONS if beside_units else ():
            if kept := getattr(p, name, None):
                kept[:] = [None, None]
        raise


class Frozen:
    """The weights of what the enabled units run, without gradients while this is in place.

    A guided step has the extension's networks run with a graph. Of their weights that would keep what entered every
    layer, and where one is kept from call to call, as what a T2I-Adapter makes of its picture, it could not be copied.
    """

    def __init__(self, p: Any):
        run = [parameters.control_model for parameters in _run(p)]
        networks = [network for network in run if isinstance(network, torch.nn.Module)]
        self._weights = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
        self._set(False)

    def restore(self) -> None:
        self._set(True)

    def _set(self, gradients: bool) -> None:
        for weight in self._weights:
            weight.requires_grad_(gradients)


class Spared:
    """Rows that a method has run along, while this is in place without what ControlNets and T2I-Adapters of the enabled
    units add, which is made for the picture.

    rows: which ones of the UNet's call that is under way, its last. Raises PortraitError where a unit acts on all rows
    in another way, as LLLites do, and references by attention.
    """

    def __init__(self, p: Any, rows: Callable[[], range], who: str):
        run = _run(p)
        for parameters in run:
            kind = parameters.control_model_type
            if not kind.is_controlnet and kind.name != "T2I_Adapter":
                raise PortraitError(
                    "ControlNet",
                    f"a unit of the kind {kind.name} acts on all that runs in the picture's steps, and so on the "
                    f"photos that {who} has run along with this adapter",
                    "Switch this unit off, or choose an adapter that looks at the photos beforehand, or another "
                    "method.",
                )
        self._units = run
        for parameters in run:
            parameters.apply_effective_region_mask = partial(
                self._without, parameters.apply_effective_region_mask, rows
            )

    @staticmethod
    def _without(theirs: Callable[[torch.Tensor], torch.Tensor], rows: Callable[[], range], added: Any) -> torch.Tensor:
        """What a unit adds to the rows of one layer (B, C, h, w), or to each of them alike (1, C, h, w)."""
        added, own = theirs(added), rows()
        if not own:
            return added
        shared = added.expand(own.start, -1, -1, -1) if len(added) == 1 else added[: own.start]
        return torch.cat([shared, added.new_zeros(len(own), *added.shape[1:])])

    def restore(self) -> None:
        for parameters in self._units:
            del parameters.apply_effective_region_mask


class Hints:
    """The pictures that units show their networks, with circles on them while this is in place."""

    def __init__(self, units: Sequence[Unit], circles: Sequence[Circle], place: Box):
        from lib_portrait.control_picture import with_circles

        self._before: list[tuple[Any, str, torch.Tensor]] = []
        for unit in units:
            for name in _HINTS:
                hint = getattr(unit.parameters, name, None)
                if isinstance(hint, torch.Tensor) and hint.ndim == 4 and hint.shape[1] == 3:
                    self._before.append((unit.parameters, name, hint))
                    setattr(unit.parameters, name, with_circles(hint, circles, place))

    def restore(self) -> None:
        while self._before:
            setattr(*self._before.pop())
