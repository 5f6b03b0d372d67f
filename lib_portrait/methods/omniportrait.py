"""OmniPortrait: Fine-Grained Personalized Portrait Synthesis via Pivotal Optimization. Its Pivot ID Encoder (sec. 3.2).

No code or weights are published, so the file layout is this project's. The paper's other half, Reference-Based Guidance
(sec. 3.3), needs no weights and is any method's: `lib_portrait.guidance`.

An image encoder's embedding of the reference, e_ref, and the text embedding of the word for the person, e_txt, go
through one linear layer, and its e_mix stands in the word's place in the UNet's context. The base model is as it was.
In training the attention that e_mix gets is held to the face (eq. 5).

Notation: N identities, E the width of e_ref, D the width of the context, n positions of a site.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_portrait.attention.injection import Call, Wrapper
from lib_portrait.attention.maps import RoutingMaps, word_attention
from lib_portrait.attention.regions import Region
from lib_portrait.attention.rows import PERSON_WORDS as WORDS
from lib_portrait.attention.rows import POSITIVE
from lib_portrait.attention.sites import Site
from lib_portrait.attention.windows import takes_part
from lib_portrait.checkpoints.formats import Checkpoint
from lib_portrait.errors import PortraitError
from lib_portrait.faces.references import IdentityFaces
from lib_portrait.faces.weights import checked, fill, unfilled, unfit
from lib_portrait.methods.base import Host, Method, Options, Placement, Rule

# Where eq. 5 holds A_t(m) to the mask: on the level with about as many positions.
LOCALIZED = 16 * 16

# One time that a word stands somewhere: in which of a picture's prompts, and at which positions.
Place = tuple[int, tuple[int, ...]]


# ------------------------------------------------------------------------------------------- Pivot ID Encoder, sec. 3.2


class PivotEncoder(nn.Module):
    """The linear layer [e_ref; e_txt] -> e_mix, all that is trained."""

    def __init__(self, image: int, text: int):
        """A new one leaves the text's embedding as it is. image: E. text: D."""
        super().__init__()
        self.projection = nn.Linear(image + text, text)
        with torch.no_grad():
            self.projection.weight.zero_()
            self.projection.bias.zero_()
            self.projection.weight[:, image:] = torch.eye(text)

    @property
    def image(self) -> int:
        return self.projection.in_features - self.text

    @property
    def text(self) -> int:
        return self.projection.out_features

    def forward(self, e_ref: Tensor, e_txt: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """e_mix (..., D) of e_ref (..., E) and e_txt (..., D).

        weight: how much the prompt emphasises the word. The host has multiplied e_txt with it, and would have e_mix:
        w L[e_ref; e_txt / w], written without the division.
        """
        of_image, of_text = self.projection.weight.split((self.image, self.text), dim=1)
        return weight * F.linear(e_ref, of_image, self.projection.bias) + F.linear(e_txt, of_text)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], field: str = "checkpoint") -> PivotEncoder:
        """The layer of a file with ``projection.weight`` (D, E + D) and ``projection.bias`` (D).

        Raises PortraitError for other keys, shapes that do not belong together, and numbers that are not finite.
        """
        if set(tensors) != {"projection.weight", "projection.bias"}:
            raise unfit(field, f"it holds {', '.join(sorted(tensors)[:3]) or 'nothing'}, not OmniPortrait's one layer")
        text, whole = checked(tensors, "projection.weight", (None, None), field).shape
        if whole <= text:
            raise unfit(field, f"projection.weight has the shape {(text, whole)}, in which there is no picture")
        with unfilled():
            made = PivotEncoder(whole - text, text)
        fill(made, tensors, field)
        return made.float()


def localization_loss(attention: Tensor, masks: Tensor, shape: tuple[int, int]) -> Tensor:
    """L_loc of each row (eq. 5): (B), the mean of (A_t(m) - M)^2 over a site's positions.

    attention: A_t(m) (B, n), how much each position attends to e_mix. masks: M (B, H, W) in [0, 1], where the face is,
    resized by area. shape: (h, w) of the positions.
    """
    resized = F.adaptive_avg_pool2d(masks[:, None].float(), shape).flatten(1)
    return (attention - resized).square().mean(dim=1)


# --------------------------------------------------------------------------------------------------------------- words


def shared_out(own: Sequence[str], found: Mapping[str, Sequence[Place]]) -> list[list[Place]]:
    """For each person the places of their word in one picture's prompts.

    own: each person's own word, "" for the next one of WORDS. found: where each word stands, in the prompts' order.

    A word of one person alone is theirs wherever it stands; where several have it, each has the next time that it does.
    Whoever has no word of their own gets, in the prompt's order, a word of WORDS; where there are fewer than people
    ("a woman and a woman"), a time that one stands there, and later times are of whoever alone has the word.
    """
    places: list[list[Place]] = [[] for _ in own]
    for word in dict.fromkeys(filter(None, own)):
        holders = [person for person, theirs in enumerate(own) if theirs == word]
        if len(holders) == 1:
            places[holders[0]] = [*found[word]]
        else:
            for person, place in zip(holders, found[word]):
                places[person] = [place]
    taken = {(prompt, position) for theirs in places for prompt, positions in theirs for position in positions}
    standing = sorted(
        (prompt, positions, word)
        for word in WORDS
        if word not in own
        for prompt, positions in found[word]
        if not any((prompt, position) in taken for position in positions)
    )
    rest = [person for person, theirs in enumerate(own) if not theirs]
    words = list(dict.fromkeys(word for _, _, word in standing))
    if len(words) >= len(rest):
        holders_of = {word: [person] for person, word in zip(rest, words)}
    else:
        holders_of = {}
        for person, (prompt, positions, word) in zip(rest, standing):
            places[person].append((prompt, positions))
            holders_of.setdefault(word, []).append(person)
        standing = standing[len(rest) :]
    for prompt, positions, word in standing:
        if len(holders := holders_of.get(word, [])) == 1:
            places[holders[0]].append((prompt, positions))
    return places


# ---------------------------------------------------------------------------------------------------------------- rule


@dataclass(frozen=True)
class PivotIdentity:
    """One person. e_ref: (E), or (B, E) where every row has its own. word: their own word, "" for the next of WORDS.

    region: where guidance looks for them; e_mix is wherever the word is. start, end: share of the sampling, 0 to 1.
    strength: 0 for the text's own embedding, 1 for e_mix.
    """

    e_ref: Tensor
    word: str = ""
    region: Region | None = None
    start: float = 0.0
    end: float = 1.0
    strength: float = 1.0

    def active(self, progress: float) -> bool:
        return takes_part(self.start, self.end, progress)


class OmniPortraitRule(Rule[PivotIdentity]):
    """e_mix in the words' places of positive rows, for `attention.Injection`.

    watched: numbers of the sites whose attention to the first person's e_mix is to be kept in `attention`, for
    training: (B, n) by site, with gradient, of every row of the last call.
    """

    reads_words = True

    def __init__(
        self,
        adapter: PivotEncoder,
        people: Sequence[PivotIdentity],
        routing: RoutingMaps | None = None,
        watched: Collection[int] = (),
    ):
        super().__init__(people, routing)
        self.adapter = adapter
        self.watched = watched
        self.attention: dict[int, Tensor] = {}
        self._moved: PivotEncoder | None = None

    def must_visit(self, site: Site) -> bool:
        return False

    # ---- words

    def words(self, host: Host, prompts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        own = [person.word.lower() for person in self.people]
        found = {
            word: [(number, place) for number, one in enumerate(prompts) for place in host.positions(one, word)]
            for word in dict.fromkeys([*WORDS, *filter(None, own)])
        }
        told: list[list[list[int]]] = [[[] for _ in self.people] for _ in prompts]
        for person, places in enumerate(shared_out(own, found)):
            for number, positions in places:
                told[number][person] += positions
        return [tuple(map(tuple, of_prompt)) for of_prompt in told]

    def check_words(self, found: Sequence[Sequence[tuple[tuple[int, ...], ...]]]) -> None:
        prompts = list(itertools.chain.from_iterable(found))
        for number, person in enumerate(self.people):
            if person.strength == 0 or any(words[number] for words in prompts):
                continue
            if person.word:
                problem = f"{person.word!r} does not stand in the prompt (or not as often as people have this word)"
                raise PortraitError(
                    f"identities[{number}].word", problem, "Write it there, as a word of its own, or give another."
                )
            raise PortraitError(
                "prompt",
                f"it has no word for identity {number + 1} of {len(self.people)}: of {', '.join(WORDS)} each is one "
                "person, and each time that one stands there another, where there are not enough",
                "Write one of these for everybody, in the order of the identities, or name a word of the prompt as the "
                f"identity's own: identities[{number}].word.",
            )

    def context(self, call: Call, context: Tensor) -> Tensor:
        """The context (B, n, D) with e_mix where people's words are, in positive rows."""
        out, layer = context.clone(), self._layer(context)
        for number, row in enumerate(call.rows):
            if row.kind != POSITIVE:
                continue
            for i, (person, words) in enumerate(zip(self.people, row.words)):
                if not words or person.strength == 0 or not person.active(call.progress):
                    continue
                self.drawn.add(i)
                places = [position + row.ahead for position in words]
                e_ref = person.e_ref if person.e_ref.ndim == 1 else person.e_ref[number]
                e_txt = context[number, places].to(layer.projection.weight)
                weights = e_txt.new_tensor(row.weights[i] if row.weights else [1.0] * len(words))[:, None]
                e_mix = layer(e_ref.to(e_txt).expand(len(places), -1), e_txt, weights)
                out[number, places] = torch.lerp(e_txt, e_mix, person.strength).to(out)
        return out

    def _layer(self, context: Tensor) -> PivotEncoder:
        """The layer where the context is; what is moved there lives as long as this rule."""
        weight = self.adapter.projection.weight
        if weight.device == context.device or (torch.is_grad_enabled() and weight.requires_grad):
            return self.adapter
        if self._moved is None or self._moved.projection.weight.device != context.device:
            self._moved = copy.deepcopy(self.adapter).to(context.device)
        return self._moved

    # ---- at a site, in training

    def overrides(self, site: Site, call: Call) -> dict[str, Wrapper]:
        def watched(host: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            x, context = site.arguments(args, kwargs)
            words = [row.words[:1] or ((),) for row in call.rows]
            self.attention[site.index] = word_attention(site, x, context, words)[:, 0]
            return host(*args, **kwargs)

        return {"": watched} if site.cross and site.index in self.watched else {}


def localized_sites(sites: Sequence[Site], shapes: Mapping[int, tuple[int, int]]) -> list[int]:
    """The numbers of the cross-attentions that eq. 5 is about: those of the level nearest to 16 x 16 positions, the
    finer one of two. shapes: (h, w) by site number."""
    counts = {site.index: shapes[site.index][0] * shapes[site.index][1] for site in sites if site.cross}
    best = min(counts.values(), key=lambda count: (max(count, LOCALIZED) / min(count, LOCALIZED), -count))
    return [index for index, count in counts.items() if count == best]


# -------------------------------------------------------------------------------------------------------------- method


class OmniPortrait(Method):
    """OmniPortrait for the hosts: its adapter is a `PivotEncoder`, what it needs of an identity a `PivotIdentity`."""

    name = "omniportrait"

    def load(self, files: Mapping[str, Checkpoint], names: Mapping[str, str]) -> PivotEncoder:
        return PivotEncoder.from_tensors(files["omniportrait"].tensors, names["omniportrait"])

    def check_fits(self, adapter: PivotEncoder, sites: Sequence[Site]) -> None:
        width = next(site.context for site in sites if site.cross)
        if width != adapter.text:
            raise PortraitError(
                "checkpoint",
                f"the adapter was made for another kind of model: for contexts of width {adapter.text}, the loaded "
                f"model has {width}",
                "Load a Stable Diffusion checkpoint of the adapter's family.",
            )

    def text_attentions(self, adapter: PivotEncoder) -> dict[str, list[tuple[int, int]]]:
        """Nothing: the layer tells the context's width, not how many attentions read it, nor how wide these are."""
        return {}

    def feature_widths(self, adapter: PivotEncoder) -> dict[str, int]:
        return {"image": adapter.image}

    def encode(
        self, adapter: PivotEncoder, faces: IdentityFaces, options: Options, own: Options, placement: Placement
    ) -> PivotIdentity:
        """Of several photos the mean of their embeddings."""
        e_ref = torch.stack([reference.features.image.float() for reference in faces.references]).mean(dim=0)
        return PivotIdentity(
            e_ref, str(own["word"]), placement.region, placement.start, placement.end, float(own["strength"])
        )

    def rule(self, adapter: PivotEncoder, people: Sequence[PivotIdentity], options: Options) -> OmniPortraitRule:
        return OmniPortraitRule(adapter, people)


METHOD = OmniPortrait()
