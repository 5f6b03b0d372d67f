"""What the UNet's cross-attention should have put out, computed from the files alone, and who is seen in what it did.

The oracle has its own few lines of attention, routing and LoRA (UniPortrait, sec. 3.2 to 3.4), so that the tests do not
ask the code under test. From lib_portrait it takes the faces' features and the ID embedding, whose numbers the parity
tests compare with the official code.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lib_portrait.faces import FaceService
from lib_portrait.faces.features import FaceEncoder
from lib_portrait.faces.recognition import backbone_from_state_dict
from lib_portrait.faces.vision import vision_from_state_dict
from lib_portrait.methods.uniportrait import IDEmbedding
from lib_portrait.request import Photo
from tests.webui.server import Recording
from tests.webui.world import BACKBONE_WIDTHS, BLOCKS, KIT, LDM_PATHS, World

NOBODY = -1
UNCONDITIONAL = -2
UNKNOWN = -9
"""Labels of positions beside the people's numbers 0, 1, ...: no identity at all, the unconditional tokens, neither."""

TOLERANCE = 0.02
"""How far, relative to its length, an output may be from what it is taken for; two candidates are about 1.4 apart."""

PARTS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


@dataclass(frozen=True)
class Known:
    """One identity of a request. tokens: its F_id (T, D); unconditional: those of no face at the same beta."""

    tokens: Tensor
    unconditional: Tensor
    scale: float


class Oracle:
    """Knows the world's weights, and the photos' tokens."""

    def __init__(self, world: World, scratch: Path):
        self.world = world
        self._faces = FaceService([], scratch, detector="mtcnn")
        self._backbone = backbone_from_state_dict(load_file(world.kit / "tiny_backbone.safetensors"))
        self._vision = vision_from_state_dict(load_file(world.kit / "tiny_vision.safetensors"))
        self._encoder = FaceEncoder(lambda: (self._backbone, self._vision), "oracle")
        self._adapter = {
            role: load_file(world.kit / f"uniportrait-{role}_{KIT}.safetensors") for role in ("faceid", "router")
        }
        embedding = {
            name.removeprefix("faceid_proj."): tensor
            for name, tensor in self._adapter["faceid"].items()
            if name.startswith("faceid_proj.")
        }
        self._embedding = IDEmbedding.from_tensors(embedding)
        self._checkpoints: dict[str, dict[str, Tensor]] = {}
        self._known: dict[str, list[Known]] = {}

    def people(self, portrait: Mapping[str, Any]) -> list[Known]:
        """Tokens of the request's identities; photos are base64 of files with one face."""
        key = json.dumps(portrait, sort_keys=True)
        if key not in self._known:
            self._known[key] = [self._person(portrait, identity) for identity in portrait["identities"]]
        return self._known[key]

    @torch.no_grad()
    def _person(self, portrait: Mapping[str, Any], identity: Mapping[str, Any]) -> Known:
        beta = identity.get("structure", 0.1)

        def tokens(photos: Sequence[str]) -> Tensor:
            crops = [self._faces.crop(Photo.of(base64.b64decode(text)), "photo") for text in photos]
            features = self._encoder.encode(crops)
            intrinsic, structure = (
                torch.cat([getattr(f, name) for f in features]) for name in ("intrinsic", "structure")
            )
            return self._embedding(intrinsic[None], structure[None], beta)[0]

        mixes = identity.get("mix", ())
        mixed = (1 - sum(mix["weight"] for mix in mixes)) * tokens(identity["photos"])
        for mix in mixes:
            mixed = mixed + mix["weight"] * tokens(mix["photos"])
        clip = self._vision.penultimate(torch.zeros(1, 3, 224, 224))
        zeros = torch.zeros(1, clip.shape[1], sum(BACKBONE_WIDTHS[1:-1]))
        nobody = self._embedding(torch.zeros(1, 49, BACKBONE_WIDTHS[-1]), torch.cat([zeros, clip], dim=-1), beta)[0]
        return Known(mixed, nobody, portrait.get("scale", 0.7) * identity.get("scale", 1.0))

    def queried(self, site: int, x: Tensor) -> Tensor:
        """What the queries of a cross-attention are made of, where its input is x: tests of others who change it say
        so in place of this."""
        return x

    def routed(self, x: Tensor, site: int, portrait: Mapping[str, Any]) -> Tensor:
        """Whose turn it is at each position (eq. 2, 3): x (rows, n, C), the site's input -> numbers (rows, n).

        UNKNOWN where two people's logits are closer than 5 % of how far logits vary: other releases of packages find
        and cut out the faces there and here, and a hundredth of a pixel in the photo can decide between the two.
        """
        of = {
            name: self._adapter["router"][f"faceid_adapter.{site}.{name}"]
            for name in (
                *(f"to_{part}_router.{layer}" for part in "qk" for layer in ("0.weight", "0.bias", "2.weight")),
                "aggr_router.weight",
                "aggr_router.bias",
            )
        }

        def mlp(part: str, value: Tensor) -> Tensor:
            inner = F.gelu(F.linear(value, of[f"to_{part}_router.0.weight"], of[f"to_{part}_router.0.bias"]))
            return F.linear(inner, of[f"to_{part}_router.2.weight"])

        tokens = torch.stack([person.tokens for person in self.people(portrait)])
        identities = F.linear(tokens.transpose(1, 2), of["aggr_router.weight"], of["aggr_router.bias"])[..., 0]
        logits = mlp("q", x) @ mlp("k", identities).T
        best, number = logits.sort(dim=-1, descending=True)
        if len(tokens) == 1:
            return number[..., 0]
        return torch.where(best[..., 0] - best[..., 1] > 0.05 * logits.std(), number[..., 0], UNKNOWN)

    def _weight(self, site: int, part: str, checkpoint: str, loras: Mapping[str, float]) -> Tensor:
        """W of one projection of the host, with the prompt's LoRAs in it."""
        if checkpoint not in self._checkpoints:
            self._checkpoints[checkpoint] = load_file(self.world.checkpoint(checkpoint))
        attention = f"transformer_blocks.0.attn{1 + site % 2}"
        weight = self._checkpoints[checkpoint][
            f"model.diffusion_model.{LDM_PATHS[site // 2]}.{attention}.{PARTS[part]}.weight"
        ].float()
        for name, strength in loras.items():
            tensors = load_file(self.world.models / "Lora" / f"{name}.safetensors")
            key = f"lora_unet_{BLOCKS[site // 2][0]}_{attention}_{PARTS[part]}".replace(".", "_")
            weight = weight + strength * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        return weight

    def _bias(self, site: int, checkpoint: str) -> Tensor:
        self._weight(site, "to_out", checkpoint, {})
        path = f"model.diffusion_model.{LDM_PATHS[site // 2]}.transformer_blocks.0.attn{1 + site % 2}.to_out.0.bias"
        return self._checkpoints[checkpoint][path].float()

    def seen(
        self,
        recording: Recording,
        call: int,
        site: int,
        portrait: Mapping[str, Any] | None,
        loras: Mapping[str, float] | None = None,
        time: int = 0,
    ) -> Tensor:
        """Who is in the output of cross-attention `site` in UNet call `call`: labels (rows, positions).

        The text's part is computed from the recorded input and taken off; what remains is compared with what each
        identity's tokens, the unconditional tokens of the first identity, and nothing would have added.
        """
        name = f"{call}.{site}.{time}"
        x, out, context = (recording.tensors[f"{name}.{part}"] for part in ("in", "out", "context"))
        checkpoint = recording.calls[call]["checkpoint"]
        weights = {part: self._weight(site, part, checkpoint, loras or {}) for part in PARTS}
        people = self.people(portrait) if portrait is not None else []
        if portrait is not None:
            source = self._adapter["faceid" if len(people) == 1 else "router"]
            for part in PARTS:
                up, down = (source[f"faceid_adapter.{site}.{part}_lora.{side}.weight"] for side in ("up", "down"))
                weights[part] = weights[part] + portrait.get("lora_scale", 1.0) * up @ down

        query = F.linear(self.queried(site, x), weights["to_q"])
        # The host's own marks and Portrait's are off here: the layer itself must see text alone.
        assert context.shape[1] % 77 == 0, f"attention saw {context.shape[1]} tokens of context"
        text = self._attend(query, F.linear(context, weights["to_k"]), F.linear(context, weights["to_v"]))
        rest = out - F.linear(text, weights["to_out"], self._bias(site, checkpoint))

        candidates: dict[int, Tensor] = {NOBODY: torch.zeros_like(rest)}
        if people:
            key, value = (self._adapter["faceid"][f"faceid_adapter.{site}.to_{part}_faceid.weight"] for part in "kv")
            tokens = {i: (person.tokens, person.scale) for i, person in enumerate(people)}
            tokens[UNCONDITIONAL] = (people[0].unconditional, people[0].scale)
            for label, (own, scale) in tokens.items():
                own = own.expand(len(x), -1, -1)
                added = scale * self._attend(query, F.linear(own, key), F.linear(own, value))
                candidates[label] = F.linear(added, weights["to_out"])
        labels = torch.tensor(list(candidates))
        distances = torch.stack([(rest - candidate).norm(dim=-1) for candidate in candidates.values()])
        # The yardstick of all candidates: what text and identity put out here.
        length = (rest.norm(dim=-1) + out.norm(dim=-1)).clamp(min=1e-6) / 2
        nearest, which = distances.min(dim=0)
        return torch.where(nearest < TOLERANCE * length, labels[which], UNKNOWN)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.world.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return (scores @ v).transpose(1, 2).flatten(2)


def assert_people_are_seen(
    recording: Recording,
    oracle: Oracle,
    portrait: Mapping[str, Any],
    loras: Mapping[str, float] | None = None,
    calls: Sequence[int] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Every positive row of every call attends to the identities, every negative row to the unconditional tokens.

    Without regions each position attends to whom the router gives it to.
    Returns the labels of the positive rows by (call, site). `calls` narrows the check down to some of the UNet calls.
    """
    assert recording.answer.status == 200, recording.answer.detail
    assert recording.calls, "the UNet was not called"
    assert "unknown" not in recording.kinds(), [call["kinds"] for call in recording.calls]
    numbers = range(len(recording.calls)) if calls is None else calls
    people = set(range(len(portrait["identities"])))
    regions = any("region" in identity for identity in portrait["identities"])
    found = {}
    for number in numbers:
        kinds = recording.calls[number]["kinds"]
        for site in recorded_sites(recording, number):
            # More than once where ControlNet sends a reference picture through the UNet first; the last time counts.
            for time in range(recording.calls[number]["seen"][str(site)]):
                labels = oracle.seen(recording, number, site, portrait, loras, time)
                routed = oracle.routed(recording.tensors[f"{number}.{site}.{time}.in"], site, portrait)
                for row, kind in enumerate(kinds):
                    wanted = people if kind == "positive" else {UNCONDITIONAL}
                    got = set(labels[row].tolist())
                    assert got <= wanted, f"call {number}, site {site}, row {row} ({kind}): {sorted(got)}"
                    if kind == "positive" and not regions:
                        wrong = (labels[row] != routed[row]) & (routed[row] != UNKNOWN)
                        assert not wrong.any(), f"call {number}, site {site}, row {row}: routing of {wrong.nonzero()}"
            positive = [row for row, kind in enumerate(kinds) if kind == "positive"]
            if positive:
                found[(number, site)] = labels[positive]
    seen = {label for labels in found.values() for label in labels.unique().tolist()}
    assert seen == people, f"of {sorted(people)} only {sorted(seen)} were seen"
    return found


def assert_nobody_is_seen(recording: Recording, oracle: Oracle, calls: Sequence[int] | None = None) -> None:
    assert recording.answer.status == 200, recording.answer.detail
    assert recording.calls, "the UNet was not called"
    for number in range(len(recording.calls)) if calls is None else calls:
        for site in recorded_sites(recording, number):
            labels = oracle.seen(recording, number, site, None)
            assert (labels == NOBODY).all(), f"call {number}, site {site}: {labels.unique().tolist()}"


def recorded_sites(recording: Recording, call: int) -> list[int]:
    sites = sorted(int(name) for name in recording.calls[call]["seen"] if f"{call}.{name}.0.in" in recording.tensors)
    assert sites, f"call {call}: no attention site was recorded"
    return sites
