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
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.methods.declarations.instantfamily import FILES
from lib_portrait.methods.instantfamily import MULTIPLY, FaceProjections, Families, FamilyRule, Properties
from lib_portrait.standalone.control import load_control, save_control
from trainer import companions
from trainer.adapter_recipe import AdapterRecipe, add_adapter_options, side_by_side, with_share
from trainer.companions import stored_file
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


class InstantFamilyRecipe(AdapterRecipe):
    """See the module. Its children are what is trained: the projections, and the ControlNet."""

    name = "instantfamily"
    files = FILES

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        if not 0 < options.control_rate <= 1:
            raise PortraitError("control_rate", f"{options.control_rate} was given", "Give a number above 0, up to 1.")
        self.control_rate = options.control_rate
        model = self.model
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

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        super().prepare(device, dtype, settings)
        if settings.checkpointing:
            self.control.enable_gradient_checkpointing()
        unet = self.model.unet
        self.injections = (
            Injection(unet, self.rule).inject(),
            Injection(self.control, self.rule, sites=control_sites(self.control, unet)).inject(),
        )

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        return with_share(super().groups(settings), [*self.control.parameters()], self.control_rate, settings.rate)

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, caption_ids = batch["latent"], batch["caption_ids"]
        caption_ids = torch.where((draws.rand() < CAPTION_DROPPED)[:, None], uncaptioned(caption_ids), caption_ids)
        told = draws.rand() >= FACES_DROPPED
        noise, t, noisy = self.noised(latent, draws)
        predicted = self._predict(noisy, t, caption_ids, batch, told)
        return {"loss": self.diffusion_loss(predicted, latent, noise, t, batch["faces"])}

    def _predict(
        self, noisy: Tensor, t: Tensor, caption_ids: Tensor, batch: Mapping[str, Tensor], told: Tensor
    ) -> Tensor:
        """What the UNet predicts of `noisy` (B, 4, h, w); rows see their faces where `told` (B) says so."""
        numbers, text = range(len(noisy)), self.encoded(caption_ids)
        # Every row passes the rule: one that is told of nobody has no faces in its stack.
        tokens = self.adapter(F.normalize(batch["embedding"], dim=-1), batch["intrinsic"])
        self.rule.families = Families(tokens, batch["present"] & told[:, None], batch["shares"])
        for injection in self.injections:
            injection.rows = {number: Row(POSITIVE, picture=number) for number in numbers}
        dtype, hint = self.control.dtype, batch["control"].to(self.control.dtype) / 255
        down, middle = self.control(noisy.to(dtype), t, mark(text.to(dtype), numbers), hint, return_dict=False)
        dtype = self.model.unet.dtype
        return self.predicted(
            noisy,
            t,
            mark(text.to(dtype), numbers),
            down_block_additional_residuals=[one.to(dtype) for one in down],
            mid_block_additional_residual=middle.to(dtype),
        )

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request draws them, below their control."""
        batch = self.first_samples(draws.device)
        both = {name: torch.cat([tensor, tensor]) for name, tensor in batch.items()}

        def predict(x: Tensor, t: Tensor, caption_ids: Tensor, positive: Tensor) -> Tensor:
            return self._predict(x, t, caption_ids, both, positive)

        pictures = self.decoded(self.drawn(batch, draws, predict))
        control = F.interpolate(batch["control"].float() / 255, size=pictures.shape[-2:])
        return {"people": torch.cat([side_by_side(one) for one in (control, pictures)], dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """instantfamily_NAME.safetensors with what it was trained with in its metadata, the ControlNet, both fp16, and
        the kit's manifest, which names it."""
        control = save_control(self.control, folder, f"control_instantfamily_{self.adapter_name}")
        named = {one.role: one.name for one in self.companions}
        metadata = {**facts, **named, **self.adapter.properties.to_metadata()}
        training = {**facts, "mask": self.rule.mask, "trained": "projections and ControlNet"}
        tensors = self.adapter.state_dict()
        self.write_adapter(folder, "instantfamily", tensors, metadata, training, control=stored_file(control))


def _recognition(path: Path) -> Backbone:
    return backbone_from_state_dict(read_tensors(path, "backbone").tensors, path.name).float().eval()


def configure(parser: argparse.ArgumentParser) -> None:
    add_adapter_options(parser, FILES)
    parser.add_argument("--backbone", type=Path, required=True, help="the features' recognition network")
    parser.add_argument("--initial", type=Path, help="projections to begin with")
    parser.add_argument("--control", type=Path, help="a ControlNet to begin with; default: a copy of the UNet")
    parser.add_argument(
        "--control-rate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="the ControlNet's share of the rate: it begins trained, the projections do not; default 1",
    )
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


def build(options: argparse.Namespace) -> Recipe:
    return InstantFamilyRecipe(options)
