"""OmniPortrait's Pivot ID Encoder (sec. 3.2 of the paper) on a frozen model: the world's or any SD1.5 checkpoint.

Only the linear layer is trained, on pictures of one person with the person's word in the caption: L_diff + eta L_loc
(eq. 5). Text and ID are dropped in 10 % of the samples each. The image encoder stays as it is: its embeddings come from
`portrait.py dataset features --image FILE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_portrait.attention import POSITIVE, Injection, Row, find_sites, mark, spatial_shape
from lib_portrait.attention.rows import NEGATIVE
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations.omniportrait import FILES
from lib_portrait.methods.omniportrait import (
    METHOD,
    OmniPortraitRule,
    PivotEncoder,
    PivotIdentity,
    localization_loss,
    localized_sites,
)
from trainer import companions
from trainer.adapter_recipe import AdapterRecipe, add_adapter_options, side_by_side
from trainer.draws import Draws
from trainer.features import uncaptioned
from trainer.loop import Recipe, Settings
from trainer.recipes.omniportrait_data import PicturesWithPivots
from trainer.shards import Shards

CAPTION_DROPPED = ID_DROPPED = 0.1
# Sec. 3.2 and 4.2.
ETA, RATE = 2e-3, 2e-5
# In the embedded world, see `trainer.world_stages`.
WORLD_RUNS = ("--vision {vision} --gamma 5 --face-weight 5",)


class OmniPortraitRecipe(AdapterRecipe):
    """See the module. Its child is the method's own module, named as in the exported file."""

    name = "omniportrait"
    files = FILES

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.eta = options.eta
        if not self.eta >= 0:
            raise PortraitError("eta", f"{self.eta} was given", "Give a number of 0 or more.")
        model = self.model

        def tokens(word: str) -> list[int]:
            return model.tokenizer(word, add_special_tokens=False).input_ids

        self.data = PicturesWithPivots(Shards.under(options.data), model.vae.config.scaling_factor, tokens)
        given = [("vision", options.vision)] if options.vision else []
        self.companions = [companions.resolve(role, text, self.hashes) for role, text in given]
        width = next(iter(self.data.features.images.values()))[0].shape[0]
        self.sites = find_sites(model.unet)
        if options.initial is not None:
            self.adapter = PivotEncoder.from_tensors(read_tensors(options.initial).tensors, options.initial.name)
            if self.adapter.image != width:
                raise PortraitError(
                    "initial",
                    f"{options.initial.name} reads embeddings of width {self.adapter.image}, the features have {width}",
                    "Give a file that was trained on the same image encoder.",
                )
            self.adapter.requires_grad_(True)
        else:
            self.adapter = PivotEncoder(width, next(site.context for site in self.sites if site.cross))
        METHOD.check_fits(self.adapter, self.sites)

    @property
    def hashes(self) -> Mapping[str, str]:
        image = self.data.features.hashes.get("image")
        return {"vision": image} if image else {}

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        super().prepare(device, dtype, settings)
        self.shapes = self._shapes()
        self.located = localized_sites(self.sites, self.shapes)
        self.rule = OmniPortraitRule(self.adapter, [PivotIdentity(torch.empty(0))], watched=self.located)
        self.injections = (Injection(self.model.unet, self.rule).inject(),)

    @torch.no_grad()
    def _shapes(self) -> dict[int, tuple[int, int]]:
        """(h, w) of each cross-attention, by site number, of the latents that are trained on."""
        unet, found, handles = self.model.unet, {}, []
        latent = torch.zeros_like(self.data.features.latents[:1]).to(unet.device, unet.dtype)
        for site in (site for site in self.sites if site.cross):

            def keep(module: nn.Module, args: Any, kwargs: Any, index: int = site.index) -> None:
                positions = (kwargs.get("hidden_states") if not args else args[0]).shape[1]
                found[index] = spatial_shape(positions, (latent.shape[2], latent.shape[3]))

            handles.append(site.module.register_forward_pre_hook(keep, with_kwargs=True))
        text = torch.zeros(1, 77, self.adapter.text, device=unet.device, dtype=unet.dtype)
        unet(latent, torch.zeros(1, device=unet.device), text)
        for handle in handles:
            handle.remove()
        return found

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        untold = draws.rand() < CAPTION_DROPPED
        caption_ids = torch.where(untold[:, None], uncaptioned(caption_ids), caption_ids)
        words = batch["word"] & ~(untold | (draws.rand() < ID_DROPPED))[:, None]
        noise, t, noisy = self.noised(latent, draws)
        predicted = self._predict(noisy, t, caption_ids, batch["e_ref"], words)
        diffusion, has = self.diffusion_loss(predicted, latent, noise, t, batch["region"]), words.any(dim=1)
        attention = torch.stack([self.rule.attention[site] for site in self.located]).mean(dim=0)
        located = localization_loss(attention, batch["mask"], self.shapes[self.located[0]])
        location = (located * has).sum() / has.sum().clamp(min=1)
        return {"loss": diffusion + self.eta * location, "diffusion": diffusion, "location": location}

    def _predict(self, noisy: Tensor, t: Tensor, caption_ids: Tensor, e_ref: Tensor, words: Tensor) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w), each row with its own e_mix where `words` (B, 77) says."""
        numbers = range(len(noisy))
        self.rule.people = [PivotIdentity(e_ref)]
        positions = [tuple(own.nonzero().flatten().tolist()) for own in words]
        self.injections[0].rows = {
            number: Row(POSITIVE if positions[number] else NEGATIVE, number, (positions[number],)) for number in numbers
        }
        return self.predicted(noisy, t, mark(self.encoded(caption_ids), numbers))

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below those they are of."""
        batch = self.first_samples(draws.device)
        words, e_ref = batch["word"].repeat(2, 1), batch["e_ref"].repeat(2, 1)

        def predict(x: Tensor, t: Tensor, caption_ids: Tensor, positive: Tensor) -> Tensor:
            return self._predict(x, t, caption_ids, e_ref, words & positive[:, None])

        shown = [side_by_side(self.decoded(one)) for one in (batch["latent"], self.drawn(batch, draws, predict))]
        return {"people": torch.cat(shown, dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """omniportrait_NAME.safetensors, fp16, and the kit's manifest with the image encoder that it was trained on."""
        facts = {**facts, "eta": str(self.eta)}
        self.write_adapter(folder, "omniportrait", self.adapter.state_dict(), facts, facts)


def configure(parser: argparse.ArgumentParser) -> None:
    add_adapter_options(parser, FILES)
    parser.add_argument("--initial", type=Path, help="a file to begin with")
    parser.add_argument(
        "--vision",
        metavar="FILE",
        help="the image encoder of the features, a path or a name in the model folders; default: the published one",
    )
    parser.add_argument("--eta", type=float, default=ETA, help=f"of eq. 5, the weight of L_loc; default {ETA}")
    parser.set_defaults(rate=RATE)


def build(options: argparse.Namespace) -> Recipe:
    return OmniPortraitRecipe(options)
