"""Fusion (paper of that name, sec. 3) on a frozen UNet: the world's or any SD1.5 checkpoint.

Only k_f and v_f of eq. 2 are trained, on pictures of one person, who is seen in another photo. Text and reference are
dropped in 10 % of the samples each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_portrait.attention import POSITIVE, Injection, Row, mark
from lib_portrait.attention.rows import NEGATIVE, REFERENCE
from lib_portrait.attention.sites import find_sites
from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import SUFFIX, Manifest, bare_name, write_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.methods.fusion import STEP, FaceFusion, FusedIdentity, FusionRule, HiddenStates, Properties
from lib_portrait.standalone.host import encode_prompts
from lib_portrait.standalone.model import Model, load_model
from trainer import companions
from trainer.diffusion import NoiseSchedule, add_face_weight, face_weighted
from trainer.drawing import STEPS, ddim_sample, guided
from trainer.draws import Draws
from trainer.features import uncaptioned
from trainer.loop import Recipe, Settings
from trainer.references import PicturesWithReferences
from trainer.shards import Shards

# How the adapter of the embedded world is trained.
WORLD_RUNS = ("--gamma 5 --face-weight 5",)
CAPTION_DROPPED = REFERENCE_DROPPED = 0.1


class FusionRecipe(Recipe):
    """See the module. Its child is the method's own module, named as in the exported file."""

    name = "fusion"

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.adapter_name = bare_name(options.name, "name")
        self.base, self.licence = options.checkpoint, options.licence
        self.gamma, self.face_weight = options.gamma, options.face_weight
        model = load_model(options.checkpoint)
        model.unet.requires_grad_(False).eval()
        model.text_encoder.requires_grad_(False).eval()
        self.schedule = NoiseSchedule(model.schedule)
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
        # Frozen things stay out of children(): they are neither trained nor saved.
        self._frozen: dict[str, Any] = {"model": model}

    @property
    def model(self) -> Model:
        return self._frozen["model"]

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        for network in (self.model.unet, self.model.text_encoder):
            network.to(device, dtype)
        if settings.checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            # Checkpointing works in training mode only; the UNet has no dropout that this would switch on.
            self.model.unet.train()
        with torch.no_grad():
            self._reference_text = encode_prompts(self.model, [self.adapter.properties.reference_text])
        self._injection = Injection(self.model.unet, self.rule).inject()

    def samples(self) -> PicturesWithReferences:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        caption_ids = torch.where((draws.rand() < CAPTION_DROPPED)[:, None], uncaptioned(caption_ids), caption_ids)
        sees = draws.rand() >= REFERENCE_DROPPED
        noise, t = draws.randn(*latent.shape[1:]), draws.randint(len(self.schedule.alphas_bar))
        hidden = self._look(batch["reference"], draws.randn(*batch["reference"].shape[1:]), t)
        predicted = self._predict(self.schedule(latent, noise, t), t, caption_ids, hidden, sees)
        squared = (predicted - self.schedule.target(latent, noise, t)).square()
        error = face_weighted(squared, batch["region"], self.face_weight)
        weight = self.schedule.weights(t, self.gamma) if self.gamma else torch.ones_like(error)
        return {"loss": (weight * error).mean()}

    def _look(self, reference: Tensor, noise: Tensor, t: Tensor) -> HiddenStates:
        """h_f of every row's reference (B, 4, s, s); t (B) is that of the pictures."""
        own = self.adapter.properties.reference_t
        if own != STEP:
            t = torch.full_like(t, int(own))
        unet, text = self.model.unet, self._reference_text.expand(len(reference), -1, -1)
        noisy = self.schedule(reference, noise, t).to(unet.dtype)
        self._injection.rows = {REFERENCE: Row(REFERENCE)}
        return self.rule.recorded(lambda: unet(noisy, t, mark(text, REFERENCE)))

    def _predict(self, noisy: Tensor, t: Tensor, caption_ids: Tensor, hidden: HiddenStates, sees: Tensor) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w), whose rows see their own references where `sees` (B) says."""
        model, numbers = self.model, range(len(noisy))
        with torch.no_grad():
            text = model.text_encoder(caption_ids).last_hidden_state
        self.rule.see([[hidden]])
        kinds = [POSITIVE if one else NEGATIVE for one in sees.tolist()]
        self._injection.rows = {number: Row(kinds[number], picture=number) for number in numbers}
        predicted = model.unet(noisy.to(model.unet.dtype), t, mark(text, numbers)).sample
        # Gradient checkpointing runs the layers again during the backward pass, and the rule must act there too.
        self._injection.resume()
        return predicted.float()

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below their references."""
        device = draws.device
        first = [self.data[i, (0, 0, 0)] for i in range(min(4, len(self.data)))]
        batch = {name: torch.stack([sample[name] for sample in first]).to(device) for name in first[0]}
        rows = len(first)
        ids = torch.cat([uncaptioned(batch["caption_ids"]), batch["caption_ids"]])
        positive = torch.arange(2 * rows, device=device) >= rows
        sees = positive | self.adapter.properties.negative
        noise = draws.randn(*batch["reference"].shape[1:])[:rows]

        def predict(x: Tensor, t: Tensor) -> Tensor:
            hidden = self._look(batch["reference"], noise, t)
            both = {site: states.repeat(2, 1, 1) for site, states in hidden.items()}
            return guided(*self._predict(x.repeat(2, 1, 1, 1), t.repeat(2), ids, both, sees).chunk(2))

        end = torch.zeros(rows, dtype=torch.long, device=device)
        latent = ddim_sample(draws.randn(*batch["latent"].shape[1:])[:rows], end, STEPS, self.schedule, predict)
        vae = self.model.vae.to(device)
        shown = [
            torch.cat(list((vae.decode(one / self.data.scale).sample.float() / 2 + 0.5).clamp(0, 1)), dim=2)
            for one in (batch["reference"], latent)
        ]
        return {"people": torch.cat(shown, dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """fusion_NAME.safetensors, fp16, with how the reference is seen in its metadata, and the kit's manifest."""
        path = folder / f"fusion_{self.adapter_name}.safetensors"
        tensors = {
            name: tensor.detach().half().contiguous().cpu() for name, tensor in self.adapter.state_dict().items()
        }
        properties = self.adapter.properties.to_metadata()
        features = {"features": str(sorted(self.data.features.hashes.items()))}
        write_tensors(path, tensors, {**facts, **features, **properties})
        manifest = Manifest(
            name=self.adapter_name,
            method="fusion",
            adapter={"fusion": path.name},
            training={**facts, **{name: value for name, value in properties.items() if value}},
            **companions.of_base(self.base, self.model, self.licence),
        )
        write_manifest(folder / f"{self.adapter_name}{SUFFIX}", manifest)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="the base model, a single SD1.5 file")
    parser.add_argument("--name", required=True, help="NAME in fusion_NAME.safetensors")
    parser.add_argument("--initial", type=Path, help="a file to begin with")
    parser.add_argument("--licence", metavar="TEXT", help="of the adapter, for its manifest; default: the base kit's")
    parser.add_argument(
        "--reference-t",
        default="0",
        metavar=f"T|{STEP}",
        help=f"how noisy references are: as at this timestep, or {STEP}, as the picture is; default 0",
    )
    parser.add_argument("--reference-text", default="", help="the prompt that references are seen with; default: none")
    parser.add_argument("--negative", action="store_true", help="negative rows are to see the reference too")
    parser.add_argument("--gamma", type=float, default=0.0, help="Min-SNR's gamma; 0 for the plain loss")
    add_face_weight(parser)


def build(options: argparse.Namespace) -> Recipe:
    return FusionRecipe(options)
