"""InstantFamily (arXiv 2404.19427) on a frozen UNet: the world's or any SD1.5 checkpoint.

Trained are the projections of the faces' features and the ControlNet, which begins as a copy of the UNet (sec. 4.3),
its keys and values among it; the UNet sees the faces through its own. Of each picture min(4, N') faces are told, in
random order, the poses of all people (sec. 4.2). Captions and faces are dropped in 10 % of the samples each; poses and
circles stay, as in the negative rows of a request.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor

from lib_portrait.attention import POSITIVE, Injection, Row, control_sites, mark
from lib_portrait.attention.sites import find_sites
from lib_portrait.checkpoints.formats import read_tensors, write_tensors
from lib_portrait.checkpoints.kit import SUFFIX, Manifest, bare_name, write_manifest
from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.methods.declarations.instantfamily import FILES
from lib_portrait.methods.instantfamily import MULTIPLY, FaceProjections, Families, FamilyRule, Properties
from lib_portrait.standalone.control import load_control, save_control
from lib_portrait.standalone.model import Model, load_model
from trainer import companions
from trainer.diffusion import NoiseSchedule, add_face_weight, face_weighted
from trainer.drawing import STEPS, ddim_sample, guided
from trainer.draws import Draws
from trainer.families import PicturesOfFamilies
from trainer.features import global_feature, uncaptioned
from trainer.loop import Recipe, Settings
from trainer.shards import Shards

# N of sec. 4.2.
MOST_FACES = 4
CAPTION_DROPPED = FACES_DROPPED = 0.1
# In the embedded world, see `trainer.world_stages`.
WORLD_RUNS = ("--backbone {backbone} --gamma 5 --face-weight 5 --other-photos 0.5",)


class InstantFamilyRecipe(Recipe):
    """See the module. Its children are what is trained: the projections, and the ControlNet."""

    name = "instantfamily"

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.adapter_name = bare_name(options.name, "name")
        self.base, self.licence = options.checkpoint, options.licence
        self.gamma, self.face_weight = options.gamma, options.face_weight
        model = load_model(options.checkpoint)
        model.unet.requires_grad_(False).eval()
        model.text_encoder.requires_grad_(False).eval()
        self.schedule = NoiseSchedule(model.schedule)
        backbone = _recognition(options.backbone)
        side = backbone.image_size // 2 ** len(backbone.taps)
        sites = find_sites(model.unet)
        self.adapter = FaceProjections.for_sites(
            sites, backbone.embedding_width, backbone.widths[-1], local_side=side, margin=options.margin
        )
        if options.initial is not None:
            file = read_tensors(options.initial)
            properties = Properties.from_metadata(file.metadata, "initial")
            if properties != self.adapter.properties:
                raise PortraitError(
                    "initial", "it was trained with another model, network or margin", "Give the same ones."
                )
            self.adapter = FaceProjections.from_tensors(file.tensors, properties, "initial").requires_grad_(True)
        if options.control is not None:
            self.control = load_control(options.control, model.unet)
        else:
            self.control = ControlNetModel.from_unet(model.unet)
        self.control.requires_grad_(True).train()
        self.data = PicturesOfFamilies(
            Shards.under(options.data),
            model.vae.config.scaling_factor,
            MOST_FACES,
            functools.partial(global_feature, backbone),
            options.margin,
            self.adapter.properties.circle_on,
            options.other_photos,
        )
        self.companions = [companions.resolve("backbone", str(options.backbone), self.data.features.hashes)]
        self.rule = FamilyRule(self.adapter, mask=options.mask)
        # Frozen things stay out of children(): they are neither trained nor saved.
        self._frozen: dict[str, Any] = {"model": model}

    @property
    def model(self) -> Model:
        return self._frozen["model"]

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        for network in (self.model.unet, self.model.text_encoder):
            network.to(device, dtype)
        if settings.checkpointing:
            for network in (self.model.unet, self.control):
                network.enable_gradient_checkpointing()
                # Checkpointing works in training mode only; the UNet has no dropout that this would switch on.
                network.train()
        unet = self.model.unet
        self._injections = [
            Injection(unet, self.rule).inject(),
            Injection(self.control, self.rule, sites=control_sites(self.control, unet)).inject(),
        ]

    def samples(self) -> PicturesOfFamilies:
        return self.data

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        caption_ids = torch.where((draws.rand() < CAPTION_DROPPED)[:, None], uncaptioned(caption_ids), caption_ids)
        told = draws.rand() >= FACES_DROPPED
        noise, t = draws.randn(*latent.shape[1:]), draws.randint(len(self.schedule.alphas_bar))
        predicted = self._predict(self.schedule(latent, noise, t), t, caption_ids, batch, told)
        squared = (predicted - self.schedule.target(latent, noise, t)).square()
        error = face_weighted(squared, batch["faces"], self.face_weight)
        weight = self.schedule.weights(t, self.gamma) if self.gamma else torch.ones_like(error)
        return {"loss": (weight * error).mean()}

    def _predict(
        self, noisy: Tensor, t: Tensor, caption_ids: Tensor, batch: Mapping[str, Tensor], told: Tensor
    ) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w); rows see their faces where `told` (B) says so."""
        model, numbers = self.model, range(len(noisy))
        with torch.no_grad():
            text = model.text_encoder(caption_ids).last_hidden_state
        # Every row passes the rule: one that is told of nobody has no faces in its stack.
        tokens = self.adapter(F.normalize(batch["embedding"], dim=-1), batch["intrinsic"])
        self.rule.families = Families(tokens, batch["present"] & told[:, None], batch["shares"])
        for injection in self._injections:
            injection.rows = {number: Row(POSITIVE, picture=number) for number in numbers}
        dtype, hint = self.control.dtype, batch["control"].to(self.control.dtype) / 255
        down, middle = self.control(noisy.to(dtype), t, mark(text.to(dtype), numbers), hint, return_dict=False)
        dtype = model.unet.dtype
        predicted = model.unet(
            noisy.to(dtype),
            t,
            mark(text.to(dtype), numbers),
            down_block_additional_residuals=[one.to(dtype) for one in down],
            mid_block_additional_residual=middle.to(dtype),
        ).sample
        # Gradient checkpointing runs the layers again during the backward pass, and the rule must act there too.
        for injection in self._injections:
            injection.resume()
        return predicted.float()

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below their control."""
        device = draws.device
        first = [self.data[i, (0, 0, 0)] for i in range(min(4, len(self.data)))]
        batch = {name: torch.stack([sample[name] for sample in first]).to(device) for name in first[0]}
        rows = len(first)
        ids = torch.cat([uncaptioned(batch["caption_ids"]), batch["caption_ids"]])
        both = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}
        told = torch.arange(2 * rows, device=device) >= rows

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return guided(*self._predict(x.repeat(2, 1, 1, 1), t.repeat(2), ids, both, told).chunk(2))

        end = torch.zeros(rows, dtype=torch.long, device=device)
        latent = ddim_sample(draws.randn(*batch["latent"].shape[1:])[:rows], end, STEPS, self.schedule, predict)
        decoded = self.model.vae.to(device).decode(latent / self.data.scale).sample.float() / 2 + 0.5
        shown = F.interpolate(batch["control"].float() / 255, size=decoded.shape[-2:])
        return {"people": torch.cat([torch.cat(list(one.clamp(0, 1)), dim=2) for one in (shown, decoded)], dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """instantfamily_NAME.safetensors with what it was trained with in its metadata, the ControlNet, both fp16, and
        the kit's manifest, which names it."""
        path = folder / f"instantfamily_{self.adapter_name}.safetensors"
        tensors = {
            name: tensor.detach().half().contiguous().cpu() for name, tensor in self.adapter.state_dict().items()
        }
        properties = self.adapter.properties.to_metadata()
        features = {"features": str(sorted(self.data.features.hashes.items()))}
        named = {one.role: one.name for one in self.companions}
        write_tensors(path, tensors, {**facts, **named, **features, **properties})
        control = save_control(self.control, folder, f"control_{path.stem}")
        for companion in self.companions:
            companion.export_to(folder)
        manifest = Manifest(
            name=self.adapter_name,
            method=FILES.method,
            adapter={"instantfamily": path.name},
            encoders=companions.encoder_files(FILES, self.companions, self.data.features.hashes),
            control=companions.stored_file(control),
            training={**facts, "mask": self.rule.mask, "trained": "projections and ControlNet"},
            **companions.of_base(self.base, self.model, self.licence),
        )
        write_manifest(folder / f"{self.adapter_name}{SUFFIX}", manifest)


def _recognition(path: Path) -> Backbone:
    return backbone_from_state_dict(read_tensors(path, "backbone").tensors, path.name).float().eval()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="the base model, a single SD1.5 file")
    parser.add_argument("--name", required=True, help="NAME in instantfamily_NAME.safetensors")
    parser.add_argument("--backbone", type=Path, required=True, help="the features' recognition network")
    parser.add_argument("--initial", type=Path, help="projections to begin with")
    parser.add_argument("--control", type=Path, help="a ControlNet to begin with; default: a copy of the UNet")
    parser.add_argument("--licence", metavar="TEXT", help="of the adapter, for its manifest; default: the base kit's")
    parser.add_argument("--mask", choices=(MULTIPLY, "exclude"), default=MULTIPLY, help=f"default {MULTIPLY}")
    parser.add_argument(
        "--margin", type=float, default=0.25, help="by which share faces' boxes are grown; default 0.25"
    )
    parser.add_argument(
        "--other-photos",
        type=float,
        default=0.0,
        help="share of the faces that another photo of the same person tells of; default 0, as in the paper",
    )
    parser.add_argument("--gamma", type=float, default=0.0, help="Min-SNR's gamma; 0 for the plain loss")
    add_face_weight(parser)


def build(options: argparse.Namespace) -> Recipe:
    return InstantFamilyRecipe(options)
