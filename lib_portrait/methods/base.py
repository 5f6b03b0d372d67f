"""The contract between a method and everything around it.

`lib_portrait.methods.NAME` ends in a `METHOD`, one of the class `Method`; what is to be known of a method before torch
is imported stands in its `declarations.Declaration`. Nobody outside of `lib_portrait.methods` names one.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.maps import RoutingMaps
from lib_portrait.attention.regions import WHOLE, Box, Region
from lib_portrait.attention.rows import Row
from lib_portrait.attention.sites import Site
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.control_picture import Circle
from lib_portrait.errors import Notice
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.methods.declarations import Declaration, declaration
from lib_portrait.options import Value

Options = Mapping[str, Value]


@dataclass(frozen=True)
class Placement:
    """Where and when somebody takes part: the region, None for wherever the method puts them, and the window, in shares
    of the sampling."""

    region: Region | None = None
    start: float = 0.0
    end: float = 1.0


class Person(Protocol):
    """One identity as a rule needs it. strength: 0 where it is not to be drawn."""

    @property
    def region(self) -> Region | None: ...

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    @property
    def strength(self) -> float: ...

    def active(self, progress: float) -> bool:
        """Whether it takes part where the share `progress` of the sampling is done."""


P = TypeVar("P", bound=Person)


class Host(Protocol):
    """What a rule may ask of the host before the sampling.

    alphas_cumprod: (T,), of the model's schedule. prediction: what its UNet puts out.
    state: changes with the checkpoint and the LoRA applied to it; for caches.
    """

    @property
    def unet(self) -> nn.Module: ...

    @property
    def alphas_cumprod(self) -> Tensor: ...

    @property
    def prediction(self) -> Literal["epsilon", "v"]: ...

    @property
    def state(self) -> Hashable: ...

    def latent(self, picture: np.ndarray) -> Tensor:
        """The latent (1, 4, H / 8, W / 8) of a picture (H, W, 3) uint8 RGB, scaled as the UNet sees it: the mean of the
        posterior."""

    def picture(self, latent: Tensor) -> np.ndarray:
        """The picture (H, W, 3) uint8 RGB of a latent (1, 4, H / 8, W / 8) as the UNet sees it; also within a call of
        the UNet."""

    def text(self, prompt: str) -> Any:
        """The context of a prompt, (1, n, D), or the host's own form of it."""

    def positions(self, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
        """Where a word stands in the prompt's context: the positions of its tokens, for every time that it is there."""

    def emphasis(self, prompt: str) -> tuple[float, ...]:
        """What each position of the prompt's context is multiplied with, by the prompt's own emphasis: (n)."""

    def call(self, latent: Tensor, t: Tensor, context: Any) -> Tensor:
        """The UNet's output (B, 4, h, w) for latents (B, 4, h, w), timesteps (B,) and a context of `text`; the model's
        other inputs are filled in."""

    def bare(self) -> AbstractContextManager[None]:
        """While this lasts, the layers of its UNet give what they would without what other extensions have hung onto
        them, as they do in `call`; for who runs the UNet by themselves within a call of it."""

    def adds_to(self, layer: nn.Module) -> bool:
        """Whether another extension adds to what this attention layer gives, which its projections do not show."""


class Rule(ABC, Generic[P]):
    """A method at the attention sites of one UNet, for `attention.Injection`, during one or several samplings.

    people: in the request's order. drawn: who was added to positive rows with a strength above 0, by number.
    place: the part of the finished picture that the UNet samples at the moment; regions lie on all of it.
    routing: collects where people are put, where that is asked for and the method's declaration has `maps`.
    reads_words: whether `words` is to be asked where people's words are, for `attention.Row`.
    in_control: whether it stands in the ControlNet too that was trained with the adapter.
    replaces_attention: whether positive rows run without the host's own cross-attention, and so without what others
    have added to it.
    adds_rows: whether rows of its own run along in the UNet's calls, which show other pictures than those drawn.
    added_rows: which ones of the call that is under way, or was the last, these are: the last of them all.
    """

    reads_words = False
    in_control = False
    replaces_attention = False
    adds_rows = False
    added_rows = range(0)

    def __init__(self, people: Sequence[P], routing: RoutingMaps | None = None):
        self.people = list(people)
        self.routing = routing
        self.drawn: set[int] = set()
        self.place: Box = WHOLE

    @property
    def circles(self) -> list[Circle]:
        """What is drawn on the picture that this ControlNet sees."""
        return []

    def begin(self) -> None:
        """Before each sampling: forgets what belongs to the one before."""
        self.drawn.clear()

    def prepare(self, host: Host) -> None:
        """Before each sampling, and when the host changes its model within one: what has to be asked of the model."""

    def words(self, host: Host, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """For each of the prompts that one picture's is composed of: of every person the positions of their words."""
        return [()] * len(prompts)

    def check_words(self, found: Sequence[Sequence[tuple[tuple[int, ...], ...]]]) -> None:
        """Raises PortraitError for somebody whose words are nowhere. found: what `words` said of one picture, at each
        part of the sampling that has prompts of its own."""

    def active(self, progress: float) -> bool:
        return any(person.active(progress) for person in self.people)

    def must_visit(self, site: Site) -> bool:
        return site.cross

    @abstractmethod
    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        """As for `attention.Rule`."""

    def locates(self) -> bool:
        """Asked before each sampling by who wants to know where people are put: whether `located` will tell it."""
        return False

    def located(self, person: int, number: int) -> Tensor | None:
        """How much of each position that person was given so far in the call under way, or in the last one, in the row
        of that number: (h, w) in [0, 1]; None where it is not known."""
        return None


def with_words(rule: Rule[Any], host: Host, rows: Sequence[Row], prompts: Sequence[tuple[str, int]]) -> list[Row]:
    """The positive rows of one picture, told where people's words are.

    prompts: of each row the text, and the length of the context that the host has made of it, in which others may have
    put tokens in front.
    """
    told = []
    for row, words, (prompt, length) in zip(rows, rule.words(host, [prompt for prompt, _ in prompts]), prompts):
        emphasis = host.emphasis(prompt)
        weights = tuple(tuple(emphasis[position] for position in own) for own in words)
        told.append(replace(row, words=words, weights=weights, ahead=max(length - len(emphasis), 0)))
    return told


class Method(ABC):
    """A paper as the hosts and the trainer use it. name: of its module and its declaration."""

    name: str

    @property
    def declaration(self) -> Declaration:
        return declaration(self.name)

    @abstractmethod
    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> Any:
        """The adapter made of its files, and what these are called, both by role.

        Raises PortraitError naming file and tensor where they do not belong together.
        """

    @abstractmethod
    def check_fits(self, adapter: Any, sites: Sequence[Site]) -> None:
        """Raises PortraitError unless the adapter was made for a UNet with these attention sites."""

    @abstractmethod
    def text_attentions(self, adapter: Any) -> Mapping[str, Sequence[tuple[int, int]]]:
        """The shapes that the weights of a projection (``to_q``, ``to_k``) have in all text attentions of a UNet that
        the adapter is made for, in any order: so it is known of a checkpoint's file before it is loaded."""

    def feature_widths(self, adapter: Any) -> Mapping[str, int]:
        """The widths of the features (`FaceFeatures`, by field) that the adapter reads."""
        return {}

    @abstractmethod
    def encode(
        self, adapter: Any, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> Person:
        """What the rule needs of one identity. options: of the request. own: of the identity.

        Raises PortraitError naming the photo at fault.
        """

    def notices(self, options: Options, own: Sequence[Options]) -> list[Notice]:
        """What of a request's options, and of its identities' own, leaves something out."""
        return []

    @abstractmethod
    def rule(self, adapter: Any, people: Sequence[Any], options: Options) -> Rule[Any]:
        """The rule of a request for one UNet. Raises PortraitError where the adapter cannot draw these people."""


def method(name: str) -> Method:
    """The method of that name; its module is imported when it is first asked for. Raises PortraitError as `declaration`
    does."""
    declaration(name)
    return importlib.import_module(f"{__package__}.{name}").METHOD
