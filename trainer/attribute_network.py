"""Which of a caption's attributes a picture shows: a small classifier, trained on the world's ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lib_portrait.faces.trunk import Trunk, filled, read_network, save_network, view
from trainer.world.attributes import Attributes
from trainer.world.backgrounds import BACKGROUNDS
from trainer.world.scenes import MOST_PEOPLE, STYLES
from trainer.world.situations import CLOTHES_COLOURS, EXPRESSIONS, GARMENTS, HATS

KIND = "attributes"

# Attributes of every picture, then those of pictures of one person only. Every value is a word of `attributes_of`.
HEADS: dict[str, tuple[str, ...]] = {
    "people": tuple(str(number) for number in range(1, MOST_PEOPLE + 1)),
    "women": tuple(str(number) for number in range(MOST_PEOPLE + 1)),
    "style": STYLES,
    "background": tuple(BACKGROUNDS),
    "expression": tuple(EXPRESSIONS),
    "garment": GARMENTS,
    "clothes_colour": tuple(CLOTHES_COLOURS),
    "hat": ("none", *HATS),
    "glasses": ("no", "yes"),
    "scarf": ("no", "yes"),
}
# Heads that have to look at the face, which training shows them.
OF_THE_FACE = ("expression", "glasses")


class AttributeNetwork(nn.Module):
    """Classifies pictures (B, 3, 128, 128) in [-1, 1]. Each head reads the features where it has learned to look (a
    softmax over the places of the map) and the average of all."""

    def __init__(self, heads: Mapping[str, Sequence[str]] = HEADS):
        super().__init__()
        self.heads = {name: tuple(classes) for name, classes in heads.items()}
        self.trunk = Trunk()
        self.attention = nn.Conv2d(self.trunk.width, len(self.heads), 1)
        self.classify = nn.ModuleDict(
            {name: nn.Linear(2 * self.trunk.width, len(classes)) for name, classes in self.heads.items()}
        )

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By head: the logits (B, classes), and where it looks (B, 16, 16), which sums to 1."""
        maps = self.trunk(pictures)
        attention = self.attention(maps).flatten(2).softmax(dim=-1)
        places = maps.flatten(2)
        attended = torch.einsum("bhn,bcn->bhc", attention, places)
        whole = places.mean(dim=-1)
        logits, looks = {}, {}
        for number, (name, linear) in enumerate(self.classify.items()):
            logits[name] = linear(torch.cat([attended[:, number], whole], dim=-1))
            looks[name] = attention[:, number].unflatten(-1, maps.shape[2:])
        return logits, looks

    def save(self, path: Path, facts: Mapping[str, str]) -> None:
        save_network(self, path, KIND, facts, heads=self.heads)

    @staticmethod
    def load(path: Path) -> AttributeNetwork:
        """Raises PortraitError for a file that holds something else."""
        tensors, settings = read_network(path, KIND)
        return filled(AttributeNetwork(settings["heads"]), tensors, path, KIND)

    @torch.no_grad()
    def predict(self, pictures: Sequence[NDArray[Any]]) -> list[Attributes]:
        """The likeliest word of every head for pictures (H, W, 3) uint8."""
        if not pictures:
            return []
        device = next(self.parameters()).device
        logits, _ = self(torch.stack([view(picture) for picture in pictures]).to(device))
        best = {name: values.argmax(dim=-1).tolist() for name, values in logits.items()}
        return [{name: self.heads[name][best[name][row]] for name in best} for row in range(len(pictures))]
