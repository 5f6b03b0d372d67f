"""Pictures of one person, each with that person's word in the caption, and an image encoder's embedding of the face."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lib_portrait.attention.rows import word_positions
from lib_portrait.errors import PortraitError
from lib_portrait.methods.omniportrait import WORDS, shared_out
from trainer.faces import ShardFace, by_identity, faces_of, region_of
from trainer.features import Features
from trainer.shards import Shards


class PicturesWithPivots:
    """The triplets of OmniPortrait (sec. 3.2 and 4.1): a noun of the caption, a face, and the face's mask.

    "latent" (4, h, w), "caption_ids" (77); "word" (77) bool, the positions of the person's word; "e_ref" (E), the
    embedding of the face in another picture of the person, or in this one where there is no other; "mask" (h, w), the
    part of each latent position that is the face, and "region" (h, w), that its box covers.
    """

    def __init__(self, shards: Shards, scale: float, tokens: Callable[[str], Sequence[int]]):
        """scale: of the latents. tokens: those of a word, as captions have them.

        Raises PortraitError when nobody is alone in a picture whose caption has a word for them.
        """
        self.features, self.scale = Features(shards), scale
        found, _ = faces_of(shards)
        images = self.features.images
        self.photos = by_identity([face for face in found if (face.sample, face.face) in images])
        alone: dict[int, list[ShardFace]] = {}
        for face in found:
            alone.setdefault(face.sample, []).append(face)
        spelled = {word: tokens(word) for word in WORDS}
        self.faces: list[ShardFace] = []
        self.words: list[tuple[int, ...]] = []
        for group in alone.values():
            face = group[0]
            if len(group) == 1 and (face.sample, face.face) in images:
                words = self._positions(self.features.tokens[face.sample].tolist(), face.record.word, spelled)
                if words:
                    self.faces.append(face)
                    self.words.append(words)
        if not self.faces:
            raise PortraitError(
                "data",
                "nobody is alone in a picture whose caption has a word for them",
                f"Write one of {', '.join(WORDS)} into the captions.",
            )

    @staticmethod
    def _positions(caption: Sequence[int], noun: str | None, spelled: dict[str, Sequence[int]]) -> tuple[int, ...]:
        """Where a caption has the word of its one person: their own noun, else the first of WORDS that stands there."""
        found = {word: [(0, place) for place in word_positions(caption, own)] for word, own in spelled.items()}
        (places,) = shared_out([noun or ""], found)
        if noun and not places:
            (places,) = shared_out([""], found)
        return tuple(position for _, positions in places for position in positions)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, draw: tuple[int, tuple[int, int, int]]) -> dict[str, Tensor]:
        index, seed = draw
        face, rng = self.faces[index], np.random.default_rng(seed)
        if not self.features.usable[face.sample]:
            raise ValueError("its picture cannot be used")
        others = [photo for photo in self.photos.get(face.record.id or "", []) if photo.sample != face.sample] or [face]
        other = others[int(rng.integers(len(others)))]
        latent = self.features.latents[face.sample].float() * self.scale
        word = torch.zeros(len(self.features.tokens[face.sample]), dtype=torch.bool)
        word[list(self.words[index])] = True
        return {
            "latent": latent,
            "caption_ids": self.features.tokens[face.sample].long(),
            "word": word,
            "e_ref": self.features.images[other.sample, other.face][0].float(),
            "mask": self.features.images[face.sample, face.face][1].float(),
            "region": region_of(face.record, self.features.sizes[face.sample].tolist(), latent.shape[1:]),
        }
