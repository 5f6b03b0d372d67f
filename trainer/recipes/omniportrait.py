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
from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import SUFFIX, Manifest, bare_name, write_manifest
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
from lib_portrait.standalone.model import Model, load_model
from trainer import companions
from trainer.diffusion import NoiseSchedule, add_face_weight, face_weighted
from trainer.drawing import STEPS, ddim_sample, guided
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


class OmniPortraitRecipe(Recipe):
    """See the module. Its child is the method's own module, named as in the exported file."""

    name = "omniportrait"

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.adapter_name = bare_name(options.name, "name")
        self.base, self.licence = options.checkpoint, options.licence
        self.eta, self.gamma, self.face_weight = options.eta, options.gamma, options.face_weight
        if not self.eta >= 0:
            raise PortraitError("eta", f"{self.eta} was given", "Give a number of 0 or more.")
        model = load_model(options.checkpoint)
        model.unet.requires_grad_(False).eval()
        model.text_encoder.requires_grad_(False).eval()
        self.schedule = NoiseSchedule(model.schedule)

        def tokens(word: str) -> list[int]:
            return model.tokenizer(word, add_special_tokens=False).input_ids

        self.data = PicturesWithPivots(Shards.under(options.data), model.vae.config.scaling_factor, tokens)
        self.hashes = {"vision": self.data.features.hashes.get("image", "")}
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
        # Frozen things stay out of children(): they are neither trained nor saved.
        self._frozen: dict[str, Any] = {"model": model}

    @property
    def model(self) -> Model:
        return self._frozen["model"]

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        for network in (self.model.unet, self.model.text_encoder):
            network.to(device, dtype)
        self.shapes = self._shapes()
        self.located = localized_sites(self.sites, self.shapes)
        if settings.checkpointing:
            self.model.unet.enable_gradient_checkpointing()
            # Checkpointing works in training mode only; the UNet has no dropout that this would switch on.
            self.model.unet.train()
        self.rule = OmniPortraitRule(self.adapter, [PivotIdentity(torch.empty(0))], watched=self.located)
        self._injection = Injection(self.model.unet, self.rule).inject()

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

    def samples(self) -> PicturesWithPivots:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        untold = draws.rand() < CAPTION_DROPPED
        caption_ids = torch.where(untold[:, None], uncaptioned(caption_ids), caption_ids)
        words = batch["word"] & ~(untold | (draws.rand() < ID_DROPPED))[:, None]
        noise, t = draws.randn(*latent.shape[1:]), draws.randint(len(self.schedule.alphas_bar))
        predicted = self._predict(self.schedule(latent, noise, t), t, caption_ids, batch["e_ref"], words)
        squared = (predicted - self.schedule.target(latent, noise, t)).square()
        error = face_weighted(squared, batch["region"], self.face_weight)
        weight = self.schedule.weights(t, self.gamma) if self.gamma else torch.ones_like(error)
        diffusion, has = (weight * error).mean(), words.any(dim=1)
        attention = torch.stack([self.rule.attention[site] for site in self.located]).mean(dim=0)
        located = localization_loss(attention, batch["mask"], self.shapes[self.located[0]])
        location = (located * has).sum() / has.sum().clamp(min=1)
        return {"loss": diffusion + self.eta * location, "diffusion": diffusion, "location": location}

    def _predict(self, noisy: Tensor, t: Tensor, caption_ids: Tensor, e_ref: Tensor, words: Tensor) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w), each row with its own e_mix where `words` (B, 77) says."""
        model, numbers = self.model, range(len(noisy))
        with torch.no_grad():
            text = model.text_encoder(caption_ids).last_hidden_state
        self.rule.people = [PivotIdentity(e_ref)]
        positions = [tuple(own.nonzero().flatten().tolist()) for own in words]
        self._injection.rows = {
            number: Row(POSITIVE if positions[number] else NEGATIVE, number, (positions[number],)) for number in numbers
        }
        predicted = model.unet(noisy.to(model.unet.dtype), t, mark(text, numbers)).sample
        # Gradient checkpointing runs the layers again during the backward pass, and the rule must act there too.
        self._injection.resume()
        return predicted.float()

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below those they are of."""
        device = draws.device
        first = [self.data[i, (0, 0, 0)] for i in range(min(4, len(self.data)))]
        batch = {name: torch.stack([sample[name] for sample in first]).to(device) for name in first[0]}
        rows = len(first)
        ids = torch.cat([uncaptioned(batch["caption_ids"]), batch["caption_ids"]])
        words = torch.cat([torch.zeros_like(batch["word"]), batch["word"]])
        e_ref = batch["e_ref"].repeat(2, 1)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return guided(*self._predict(x.repeat(2, 1, 1, 1), t.repeat(2), ids, e_ref, words).chunk(2))

        end = torch.zeros(rows, dtype=torch.long, device=device)
        latent = ddim_sample(draws.randn(*batch["latent"].shape[1:])[:rows], end, STEPS, self.schedule, predict)
        vae = self.model.vae.to(device)
        shown = [
            torch.cat(list((vae.decode(one / self.data.scale).sample.float() / 2 + 0.5).clamp(0, 1)), dim=2)
            for one in (batch["latent"], latent)
        ]
        return {"people": torch.cat(shown, dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """omniportrait_NAME.safetensors, fp16, and the kit's manifest with the image encoder that it was trained on."""
        path = folder / f"omniportrait_{self.adapter_name}.safetensors"
        tensors = {
            name: tensor.detach().half().contiguous().cpu() for name, tensor in self.adapter.state_dict().items()
        }
        own = {"eta": str(self.eta), "features": str(sorted(self.data.features.hashes.items()))}
        write_tensors(path, tensors, {**facts, **own})
        for companion in self.companions:
            companion.export_to(folder)
        manifest = Manifest(
            name=self.adapter_name,
            method=FILES.method,
            adapter={"omniportrait": path.name},
            encoders=companions.encoder_files(FILES, self.companions, self.hashes),
            training={**facts, "eta": own["eta"]},
            **companions.of_base(self.base, self.model, self.licence),
        )
        write_manifest(folder / f"{self.adapter_name}{SUFFIX}", manifest)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="the base model, a single SD1.5 file")
    parser.add_argument("--name", required=True, help="NAME in omniportrait_NAME.safetensors")
    parser.add_argument("--initial", type=Path, help="a file to begin with")
    parser.add_argument("--licence", metavar="TEXT", help="of the adapter, for its manifest; default: the base kit's")
    parser.add_argument(
        "--vision",
        metavar="FILE",
        help="the image encoder of the features, a path or a name in the model folders; default: the published one",
    )
    parser.add_argument("--eta", type=float, default=ETA, help=f"of eq. 5, the weight of L_loc; default {ETA}")
    parser.add_argument("--gamma", type=float, default=0.0, help="Min-SNR's gamma; 0 for the plain loss")
    add_face_weight(parser)
    parser.set_defaults(rate=RATE)


def build(options: argparse.Namespace) -> Recipe:
    return OmniPortraitRecipe(options)
