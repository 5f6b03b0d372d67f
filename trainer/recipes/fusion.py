"""Fusion (paper of that name, sec. 3) on a frozen UNet: the world's or any SD1.5 checkpoint.

Only k_f and v_f of eq. 2 are trained, on pictures of one person, who is seen in another photo. Text and reference are
dropped in 10 % of the samples each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lib_portrait.attention import POSITIVE, Injection, Row, mark
from lib_portrait.attention.rows import NEGATIVE, REFERENCE
from lib_portrait.attention.sites import find_sites
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.methods.declarations.fusion import FILES
from lib_portrait.methods.fusion import STEP, FaceFusion, FusedIdentity, FusionRule, HiddenStates, Properties
from lib_portrait.standalone.host import encode_prompts
from trainer.adapter_recipe import AdapterRecipe, add_adapter_options, side_by_side
from trainer.draws import Draws
from trainer.features import uncaptioned
from trainer.loop import Recipe, Settings
from trainer.references import PicturesWithReferences
from trainer.shards import Shards

# How the adapter of the embedded world is trained.
WORLD_RUNS = ("--gamma 5 --face-weight 5",)
CAPTION_DROPPED = REFERENCE_DROPPED = 0.1


class FusionRecipe(AdapterRecipe):
    """See the module. Its child is the method's own module, named as in the exported file."""

    name = "fusion"
    files = FILES

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        model = self.model
        shards = Shards.under(options.data)
        side = model.size
        self.data = PicturesWithReferences(shards, model.vae.config.scaling_factor)
        known = self.data.features.hashes.get("references")
        if known != str(side):
            raise PortraitError(
                "data",
                f"its references have {known} pixels a side, the model's pictures {side}",
                f"Make them: portrait.py dataset features --references {side}.",
            )
        steps = len(self.schedule.alphas_bar)
        t = options.reference_t
        if t != STEP and not (t.isdecimal() and int(t) < steps):
            raise PortraitError("reference_t", f"{t!r} was given", f"Give a number of 0 to {steps - 1}, or {STEP}.")
        properties = Properties(t if t == STEP else int(t), options.reference_text, side, options.negative)
        sites = find_sites(model.unet)
        if options.initial is not None:
            self.adapter = FaceFusion.from_tensors(read_tensors(options.initial).tensors, properties, "initial")
            self.adapter.check_fits(sites)
            self.adapter.requires_grad_(True)
        else:
            self.adapter = FaceFusion.for_sites(sites, properties)
        self.rule = FusionRule(self.adapter, [FusedIdentity()])
        # Whether a row sees its reference is decided row by row here.
        self.rule.seeing = (POSITIVE,)

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        super().prepare(device, dtype, settings)
        with torch.no_grad():
            self._reference_text = encode_prompts(self.model, [self.adapter.properties.reference_text])
        self.injections = (Injection(self.model.unet, self.rule).inject(),)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        caption_ids = torch.where((draws.rand() < CAPTION_DROPPED)[:, None], uncaptioned(caption_ids), caption_ids)
        sees = draws.rand() >= REFERENCE_DROPPED
        noise, t, noisy = self.noised(latent, draws)
        hidden = self._look(batch["reference"], draws.randn(*batch["reference"].shape[1:]), t)
        predicted = self._predict(noisy, t, caption_ids, hidden, sees)
        return {"loss": self.diffusion_loss(predicted, latent, noise, t, batch["region"])}

    def _look(self, reference: Tensor, noise: Tensor, t: Tensor) -> HiddenStates:
        """h_f of every row's reference (B, 4, s, s); t (B) is that of the pictures."""
        own = self.adapter.properties.reference_t
        if own != STEP:
            t = torch.full_like(t, int(own))
        unet, text = self.model.unet, self._reference_text.expand(len(reference), -1, -1)
        noisy = self.schedule(reference, noise, t).to(unet.dtype)
        self.injections[0].rows = {REFERENCE: Row(REFERENCE)}
        return self.rule.recorded(lambda: unet(noisy, t, mark(text, REFERENCE)))

    def _predict(self, noisy: Tensor, t: Tensor, caption_ids: Tensor, hidden: HiddenStates, sees: Tensor) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w), whose rows see their own references where `sees` (B) says."""
        numbers = range(len(noisy))
        self.rule.see([[hidden]])
        kinds = [POSITIVE if one else NEGATIVE for one in sees.tolist()]
        self.injections[0].rows = {number: Row(kinds[number], picture=number) for number in numbers}
        return self.predicted(noisy, t, mark(self.encoded(caption_ids), numbers))

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below their references."""
        batch = self.first_samples(draws.device)
        reference = batch["reference"]
        noise = draws.randn(*reference.shape[1:])[: len(reference)]

        def predict(x: Tensor, t: Tensor, caption_ids: Tensor, positive: Tensor) -> Tensor:
            hidden = self._look(reference, noise, t[: len(reference)])
            both = {site: states.repeat(2, 1, 1) for site, states in hidden.items()}
            return self._predict(x, t, caption_ids, both, positive | self.adapter.properties.negative)

        shown = [side_by_side(self.decoded(one)) for one in (reference, self.drawn(batch, draws, predict))]
        return {"people": torch.cat(shown, dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """fusion_NAME.safetensors, fp16, with how the reference is seen in its metadata, and the kit's manifest."""
        properties = self.adapter.properties.to_metadata()
        training = {**facts, **{name: value for name, value in properties.items() if value}}
        self.write_adapter(folder, "fusion", self.adapter.state_dict(), {**facts, **properties}, training)


def configure(parser: argparse.ArgumentParser) -> None:
    add_adapter_options(parser, FILES)
    parser.add_argument("--initial", type=Path, help="a file to begin with")
    parser.add_argument(
        "--reference-t",
        default="0",
        metavar=f"T|{STEP}",
        help=f"how noisy references are: as at this timestep, or {STEP}, as the picture is; default 0",
    )
    parser.add_argument("--reference-text", default="", help="the prompt that references are seen with; default: none")
    parser.add_argument("--negative", action="store_true", help="negative rows are to see the reference too")


def build(options: argparse.Namespace) -> Recipe:
    return FusionRecipe(options)
