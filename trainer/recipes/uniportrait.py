"""UniPortrait's two stages (arXiv 2408.05939, sec. 3.4), on a frozen UNet: the world's or any SD1.5 checkpoint.

Stage 1, on pictures of one person, trains the ID embedding, its keys and values at every cross-attention and the LoRA;
stage 2, on pictures of several, the ID router and a second LoRA that begins as the first. Both write files in the
published layout, which the WebUI extension loads.

What the paper leaves open: structure tokens are dropped one by one with probability 1/2; eq. 4 is averaged over the
positions of the face boxes and over the layers; captions are dropped in 5 % of the samples beside the faces' 5 %.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lib_portrait.attention import POSITIVE, Injection, Row, mark
from lib_portrait.attention.sites import find_sites
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.checkpoints.hashes import file_sha256
from lib_portrait.errors import PortraitError
from lib_portrait.faces.heatmap_detector import open_detector
from lib_portrait.faces.recognition import Backbone, backbone_from_state_dict
from lib_portrait.methods.declarations.uniportrait import DECLARATION, FILES
from lib_portrait.methods.uniportrait import Adapter, BatchRule, IDEmbedding, Identities, routing_loss
from lib_portrait.options import defaults
from lib_portrait.routing_picture import draw_routing
from trainer import companions
from trainer.adapter_recipe import AdapterRecipe, add_adapter_options, side_by_side, with_share
from trainer.drawing import STEPS, ddim_sample, guided
from trainer.draws import Draws
from trainer.features import global_feature, uncaptioned
from trainer.identity_loss import DRAWN_IN, LAST_BELOW, OTHERS, SHARE, FaceLosses, IdentityLoss, Others
from trainer.loop import Recipe, Settings
from trainer.portraits import PortraitDataset
from trainer.recipes.uniportrait_start import begin_with_faceid, begin_with_router, first_stage, leave_out, second_stage
from trainer.shards import Shards

MODELS = Path(__file__).resolve().parents[2] / "models"
MOST_PEOPLE = 4
# Probabilities of the structure branch (sec. 3.4): dropped whole, some of its tokens dropped, the rest kept as it is.
BRANCH_DROPPED, TOKENS_DROPPED = 0.33, 0.33
TOKEN_KEPT = 0.5
# What the ID embedding reads of a face, each with what stands before it (Table 3): the recognition network's last,
# global feature; its local features instead; CLIP's as structure; the network's shallow features beside them.
COMPONENTS = ("global", "local", "structure", "shallow")
# The share of samples without faces (sec. 4.1), and without their caption.
FACES_DROPPED = CAPTION_DROPPED = 0.05
# Lambda of eq. 4, and the LoRA's share of the rate in stage 2 (sec. 3.4).
ROUTE_WEIGHT = LORA_RATE = 0.1
# How the adapter of the embedded world is trained, run after run: stage 1, the same with the identity loss, stage 2.
_FACES = "--gamma 0.5 --face-weight 5"
_FIRST = f"{_FACES} --width 192 --depth 4 --rank 40 --backbone {{backbone}} --vision {{vision}}"
WORLD_RUNS = (
    _FIRST,
    f"{_FIRST} --initial {{previous}}/uniportrait-faceid_{{name}}.safetensors --identity-weight 0.04 --last-below 600 "
    "--recognition {backbone} --detector {detector}",
    f"{_FACES} --stage 2 --faceid {{previous}}/uniportrait-faceid_{{name}}.safetensors --route-weight 0.3 "
    "--lora-rate 0.6",
)
# The ID scale of what is drawn, that of a request that does not say, as is TensorBoard's structure scale.
SCALE = float(defaults(DECLARATION.options)["scale"])
STRUCTURE = float(defaults(DECLARATION.identity_options)["structure"])


@dataclass(frozen=True)
class Condition:
    """What the UNet is conditioned on: caption_ids (B, 77), and the identities of each row."""

    caption_ids: Tensor
    identities: Identities

    def cat(self, other: Condition) -> Condition:
        """The rows of both."""
        caption_ids = torch.cat([self.caption_ids, other.caption_ids])
        return Condition(caption_ids, self.identities.cat(other.identities))


@dataclass(frozen=True)
class LastStep:
    """The last step of pictures that are sampled for the identity loss, from x_t (B, 4, h, w) at t (B) to x_0.

    cond: its condition. uncond: what is predicted (B, 4, h, w) without caption and face.
    intrinsic (B, N, m, d) and who (B, N): the faces' features and the people's numbers.
    """

    noisy: Tensor
    t: Tensor
    cond: Condition
    uncond: Tensor
    intrinsic: Tensor
    who: Tensor


class UniPortraitRecipe(AdapterRecipe):
    """See the module. Children are what the stage trains, named as in the published files."""

    files = FILES

    def __init__(self, options: argparse.Namespace):
        _refuse_unread(options)
        super().__init__(options)
        self.stage = options.stage
        self.name = f"uniportrait stage {self.stage}"
        self.route_weight = ROUTE_WEIGHT if options.route_weight is None else options.route_weight
        self.lora_rate = LORA_RATE if options.lora_rate is None else options.lora_rate
        self.identity_weight = options.identity_weight
        self.last_below = LAST_BELOW if options.last_below is None else options.last_below
        if self.identity_weight and options.components == "global":
            raise PortraitError("identity-weight", "it is for local features", "Give it without global.")
        self.dropping = not options.no_dropping
        model = self.model
        steps = len(self.schedule.alphas_bar)
        if not 0 < self.last_below <= steps:
            raise PortraitError("last_below", f"{self.last_below} was given", f"Give a number of 1 to {steps}.")
        people = (1, 1) if self.stage == 1 else (2, MOST_PEOPLE)
        self.components = options.components
        self.data = PortraitDataset(
            Shards.under(options.data), model.vae.config.scaling_factor, people, _global_feature(options)
        )
        hashes = self.data.features.hashes
        given = {"backbone": options.backbone, "vision": options.vision}
        self.companions = [companions.resolve(role, text, hashes) for role, text in given.items() if text]
        if self.stage == 2 and options.faceid is not None:
            self.companions = companions.of_further_file(options.faceid, FILES, self.adapter_name)
        elif self.stage == 1:
            for role in (role for role, text in given.items() if not text):
                companions.warn_of_unnamed(role, hashes)
        known = hashes.get("backbone")
        if options.recognition is not None and file_sha256(options.recognition) != known:
            raise PortraitError(
                "recognition",
                f"the features of faces come from another network than {options.recognition.name}",
                "Give the one that was dataset features' --backbone.",
            )
        sites = find_sites(model.unet)
        if self.stage == 1:
            sample = self.data[0, (0, 0, 0)]
            embedding = IDEmbedding(
                intrinsic=sample["intrinsic"].shape[-1],
                structure=sample["structure"].shape[-1],
                tokens=options.tokens,
                width=options.width,
                output=next(site.context for site in sites if site.cross),
                depth=options.depth,
            )
            leave_out(embedding, options.components, self.data.features.zero_structure)
            adapter = first_stage(embedding, sites, options.rank)
            self.faceid_proj, self.faceid_adapter = adapter.embedding, adapter.faceid
            if options.initial is not None:
                begin_with_faceid(self, options.initial)
        else:
            adapter = second_stage(options.faceid, sites)
            self.faceid_adapter = adapter.router
            if options.initial is not None:
                begin_with_router(self, options.initial)
        self.rule = BatchRule(adapter, several=self.stage == 2)
        self._frozen["adapter"] = adapter
        if self.identity_weight:
            backbone = _recognition(options, "the identity loss")
            detector = open_detector(options.detector or "mtcnn", [MODELS])
            faces, who = self.data.distinct_faces(OTHERS)
            others = Others(F.normalize(global_feature(backbone, faces)), who)
            self._frozen["identity loss"] = IdentityLoss(model.vae, backbone, detector, self.data.scale, others)

    @property
    def adapter(self) -> Adapter:
        return self._frozen["adapter"]

    def prepare(self, device: torch.device, dtype: torch.dtype, settings: Settings) -> None:
        super().prepare(device, dtype, settings)
        self.adapter.to(device)
        if self.identity_weight:
            self._frozen["identity loss"].to(device)
        self.injections = (Injection(self.model.unet, self.rule).inject(),)

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        groups = super().groups(settings)
        if self.stage == 2:
            # Sec. 3.4: the LoRA learns at a tenth of the router's rate.
            low_rank = [p for name, p in self.named_parameters() if "_lora." in name]
            return with_share(groups, low_rank, self.lora_rate, settings.rate)
        return groups

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        latent, present = batch["latent"], batch["present"]
        caption_ids = batch["caption_ids"]
        no_caption, no_face = draws.rand() < CAPTION_DROPPED, draws.rand() < FACES_DROPPED
        caption_ids = torch.where(no_caption[:, None], uncaptioned(caption_ids), caption_ids)
        id_tokens = self._embed(batch, no_face, draws)
        noise, t, noisy = self.noised(latent, draws)
        gumbel: dict[int, Tensor] = {}

        def gumbel_noise(site: int, shape: torch.Size) -> Tensor:
            if site not in gumbel:
                # Kept: gradient checkpointing asks a second time.
                own = -torch.log(-torch.log(draws.rand(*shape[1:]).clamp(1e-9, 1 - 1e-7)))
                # What is sampled for the identity loss is routed as at inference.
                gumbel[site] = F.pad(own, (0, 0, 0, 0, 0, shape[0] - len(own)))
            return gumbel[site]

        times = t
        cond = Condition(caption_ids, Identities(id_tokens, present, latent.new_ones(len(t), 1, 1)))
        last = self._sample(batch, caption_ids, ~no_face, draws) if self.identity_weight else None
        if last is not None:
            # One call of the UNet for both losses: gradient checkpointing knows of one, and DDP too.
            noisy, times, cond = torch.cat([noisy, last.noisy]), torch.cat([t, last.t]), cond.cat(last.cond)
        predicted, logits = self._predict(noisy, times, cond, gumbel_noise if self.training else None)
        diffusion = self.diffusion_loss(predicted[: len(t)], latent, noise, t, batch["regions"].amax(dim=1))
        losses = {"loss": diffusion, "diffusion": diffusion}
        if self.stage == 2:
            height, width = latent.shape[-2:]
            routed = {site: of_all[: len(t)] for site, of_all in logits.items()}
            route, right = routing_loss(routed, batch["regions"], present, (height, width))
            losses |= {"loss": diffusion + self.route_weight * route, "route": route, "routed_right": right}
        if self.identity_weight:
            faces = self._face_losses(last, predicted[len(t) :])
            whole = losses["loss"] + self.identity_weight * (faces.id_loss + faces.infonce)
            losses |= {"loss": whole, "id_loss": faces.id_loss, "infonce": faces.infonce, "top1": faces.top1}
            losses |= {"faces_found": faces.found}
        return losses

    def _face_losses(self, last: LastStep | None, predicted: Tensor) -> FaceLosses:
        """See `IdentityLoss`; zero where nothing was sampled."""
        if last is None:
            return FaceLosses(*[predicted.new_zeros(())] * 4)
        picture = self.schedule.denoised(last.noisy, guided(last.uncond, predicted), last.t)
        return self._frozen["identity loss"](picture, last.intrinsic, last.cond.identities.present, last.who)

    def _sample(self, batch: dict[str, Tensor], caption_ids: Tensor, asked: Tensor, draws: Draws) -> LastStep | None:
        """Pictures of the first people of a batch but for the last step, as a request with default settings has them.

        But that the structure scale of each is any of [0, 1], as a request may give it.

        asked (B) bool: the rows that have a face. None if no row has.
        """
        noise = draws.randn(*batch["latent"].shape[1:])
        last, beta = (draws.rand() * self.last_below).long(), draws.rand()
        which = asked.nonzero().flatten()[: math.ceil(SHARE * len(asked))]
        if not len(which):
            return None
        people = {name: batch[name][which] for name in ("intrinsic", "structure", "present")}
        cond, uncond = self._conditions(people, caption_ids[which], beta[which], SCALE)
        noisy = ddim_sample(noise[which], last[which], DRAWN_IN, self.schedule, self._guided(cond, uncond))
        with torch.no_grad():
            eps_uncond, _ = self._predict(noisy, last[which], uncond)
        return LastStep(noisy, last[which], cond, eps_uncond, people["intrinsic"], batch["who"][which])

    def _conditions(
        self, people: Mapping[str, Tensor], caption_ids: Tensor, beta: Tensor, scale: float
    ) -> tuple[Condition, Condition]:
        """The conditional rows of a request, and the unconditional ones: no caption, and no face in the places.

        people: intrinsic, structure and present, as `PortraitDataset` has them. beta (B): their structure scale.
        """
        intrinsic, structure, present = (people[name] for name in ("intrinsic", "structure", "present"))
        of_each = beta.repeat_interleave(present.shape[1])[:, None, None]
        scales = intrinsic.new_full((len(present), 1, 1), scale)
        with torch.no_grad():
            nobody = self.zero_structure.to(structure).expand_as(structure)
            nobody = self._id_tokens(torch.zeros_like(intrinsic), nobody, of_each)
        cond = Identities(self._id_tokens(intrinsic, structure, of_each), present, scales)
        uncond = Identities(nobody, present, scales)
        return Condition(caption_ids, cond), Condition(uncaptioned(caption_ids), uncond)

    def _guided(self, cond: Condition, uncond: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """The prediction with guidance, in one call of the UNet."""
        both = uncond.cat(cond)
        return lambda x, t: guided(*self._predict(x.repeat(2, 1, 1, 1), t.repeat(2), both)[0].chunk(2))

    def _predict(
        self, noisy: Tensor, t: Tensor, cond: Condition, noise: Callable[[int, torch.Size], Tensor] | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What the UNet predicts of `noisy` (B, 4, h, w), and each site's logits. noise: see `BatchRule.begin`."""
        self.rule.begin(cond.identities, noise)
        logits = self.rule.logits
        numbers = range(len(noisy))
        self.injections[0].rows = {number: Row(POSITIVE, picture=number) for number in numbers}
        return self.predicted(noisy, t, mark(self.encoded(cond.caption_ids), numbers)), logits

    def _embed(self, batch: dict[str, Tensor], no_face: Tensor, draws: Draws) -> Tensor:
        """F_id of all people, (B, N, T, D), with the dropping regularisation of sec. 3.4 where this trains.

        no_face: (B) bool, the rows that get the features of no face.
        """
        intrinsic, structure = batch["intrinsic"], batch["structure"]
        people, positions = structure.shape[1:3]
        zero = self.zero_structure.to(structure)
        intrinsic = torch.where(no_face[:, None, None, None], 0.0, intrinsic)
        structure = torch.where(no_face[:, None, None, None], zero, structure)
        branch, kept = draws.rand(people), draws.rand(people, positions) < TOKEN_KEPT
        beta = torch.ones_like(branch)
        keep = torch.ones_like(kept)
        if self.dropping:
            beta = (branch >= BRANCH_DROPPED).float()
            some = (branch >= BRANCH_DROPPED) & (branch < BRANCH_DROPPED + TOKENS_DROPPED)
            keep = torch.where(some[:, :, None], kept, True)
        return self._id_tokens(intrinsic, structure, beta.flatten()[:, None, None], keep.flatten(0, 1))

    def _id_tokens(
        self, intrinsic: Tensor, structure: Tensor, beta: float | Tensor, keep: Tensor | None = None
    ) -> Tensor:
        """F_id (B, N, T, D) of intrinsic (B, N, m, d) and structure (B, N, g, d')."""
        id_tokens = self.adapter.embedding(intrinsic.flatten(0, 1), structure.flatten(0, 1), beta, keep)
        return id_tokens.unflatten(0, intrinsic.shape[:2])

    @property
    def zero_structure(self) -> Tensor:
        """The structure features of no face, (g, d'): as `FaceEncoder.zero` gives them."""
        return self.data.features.zero_structure

    @torch.no_grad()
    def pictures(self, draws: Draws) -> dict[str, Tensor]:
        """Four pictures of the first samples' people and captions, as a request with default settings draws them; with
        several people the routing map of each under it."""
        device = draws.device
        batch = self.first_samples(device)
        rows = len(batch["latent"])
        beta = torch.full((rows,), STRUCTURE, device=device)
        cond, uncond = self._conditions(batch, batch["caption_ids"], beta, SCALE)
        noise, end = draws.randn(*batch["latent"].shape[1:])[:rows], torch.zeros(rows, dtype=torch.long, device=device)
        latent = ddim_sample(noise, end, STEPS, self.schedule, self._guided(cond, uncond))
        _, logits = self._predict(latent, end, cond)
        decoded = self.decoded(latent)
        rows_of = [side_by_side(decoded)]
        if logits:
            finest = max(logits.values(), key=lambda site: site.shape[1])
            maps = finest.softmax(dim=-1).transpose(1, 2).unflatten(-1, tuple(latent.shape[-2:])).cpu()
            made = [Image.fromarray(p.permute(1, 2, 0).mul(255).byte().cpu().numpy()) for p in decoded]
            counts = batch["present"].sum(dim=1).tolist()
            drawn = [draw_routing([p], [m[:n]])[0] for p, m, n in zip(made, maps, counts)]
            tensors = [torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) / 255 for p in drawn]
            rows_of.append(torch.cat(tensors, dim=2).to(device))
        return {"people": torch.cat(rows_of, dim=1)}

    def export(self, folder: Path, facts: Mapping[str, str]) -> None:
        """uniportrait-faceid_NAME or uniportrait-router_NAME.safetensors, fp16, in the published layout.

        Beside it what it cannot be used without, as far as that is in none of the model folders.
        """
        role = "faceid" if self.stage == 1 else "router"
        named = {one.role: one.name for one in self.companions} if self.stage == 1 else {}
        facts = {**facts, "components": self.components}
        first = {one.role: one.name for one in self.companions if one.role == "faceid"}
        self.write_adapter(folder, role, self.state_dict(), {**facts, **named}, facts, first)


def _refuse_unread(options: argparse.Namespace) -> None:
    """Raises PortraitError for an option that was given and that nothing would read."""
    drawn, second = bool(options.identity_weight), options.stage == 2
    readers = {
        "detector": (drawn, "--identity-weight"),
        "last_below": (drawn, "--identity-weight"),
        "recognition": (drawn or options.components == "global", "--identity-weight or --components global"),
        "route_weight": (second, "--stage 2"),
        "lora_rate": (second, "--stage 2"),
        "faceid": (second, "--stage 2"),
        "backbone": (not second, "--stage 1: the file of --faceid names it"),
        "vision": (not second, "--stage 1: the file of --faceid names it"),
    }
    for name, (read, by) in readers.items():
        if getattr(options, name) is not None and not read:
            raise PortraitError(name, "nothing here reads it", f"Leave it away, or give {by}.")


def _global_feature(options: argparse.Namespace) -> Callable[[Tensor], Tensor] | None:
    """For `--components global`: the recognition network's last feature, made of the local ones before it."""
    if options.components != "global":
        return None
    return functools.partial(global_feature, _recognition(options, "the global feature"))


def _recognition(options: argparse.Namespace, what: str) -> Backbone:
    if options.recognition is None:
        raise PortraitError("recognition", f"{what} needs the recognition network", "Give --recognition.")
    return backbone_from_state_dict(read_tensors(options.recognition, "backbone").tensors).float().eval()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    add_adapter_options(parser, FILES)
    parser.add_argument("--faceid", type=Path, help="stage 2: the faceid file of stage 1")
    parser.add_argument("--initial", type=Path, help="a file of the same stage to begin with; stage 2 takes its router")
    for role, what in (("backbone", "recognition network"), ("vision", "image encoder")):
        text = f"stage 1: the {what} of the features, a path or a name in the model folders; default: the published one"
        parser.add_argument(f"--{role}", metavar="FILE", help=text)
    parser.add_argument("--rank", type=int, default=128, help="stage 1: of the LoRA, default 128")
    parser.add_argument("--tokens", type=int, default=16, help="stage 1: ID tokens, default 16")
    parser.add_argument("--width", type=int, default=768, help="stage 1: of the ID embedding, default 768")
    parser.add_argument("--depth", type=int, default=6, help="stage 1: layers of the ID embedding, default 6")
    parser.add_argument(
        "--components",
        choices=COMPONENTS,
        default=COMPONENTS[-1],
        help="what is read of a face, with all that stands before it; global instead of local features (Table 3)",
    )
    parser.add_argument(
        "--recognition",
        type=Path,
        help="the features' recognition network, for the global feature and the identity loss",
    )
    parser.add_argument(
        "--identity-weight",
        type=float,
        default=0.0,
        help="weight of the identity loss on faces that are drawn, which the paper has not; default 0",
    )
    parser.add_argument(
        "--last-below",
        type=int,
        metavar="T",
        help="the last step of what the identity loss draws, through which gradients flow, begins at any t below this; "
        f"default {LAST_BELOW}",
    )
    parser.add_argument(
        "--detector", metavar="mtcnn|insightface|FILE", help="finds the faces that are drawn; default mtcnn"
    )
    parser.add_argument("--no-dropping", action="store_true", help="without the dropping regularisation (Table 3)")
    parser.add_argument("--route-weight", type=float, help=f"stage 2: lambda of eq. 4, default {ROUTE_WEIGHT}")
    parser.add_argument("--lora-rate", type=float, help=f"stage 2: the LoRA's share of the rate, default {LORA_RATE}")


def build(options: argparse.Namespace) -> Recipe:
    return UniPortraitRecipe(options)
