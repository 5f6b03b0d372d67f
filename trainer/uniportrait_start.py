"""What UniPortrait's two stages begin with: new layers, another run's or a published file, the first stage's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lib_portrait.attention.sites import Site
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import check_finite
from lib_portrait.methods.uniportrait import IDEmbedding
from trainer.uniportrait_rule import SiteLayers


def site_layers(sites: list[Site], rank: int) -> nn.ModuleDict:
    """New layers of that LoRA rank at each attention site, by its number."""
    return nn.ModuleDict({str(site.index): SiteLayers(site, rank) for site in sites})


def of_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """An adapter's tensors with every LoRA of greater rank replaced by the nearest of that rank.

    That is, in up @ down: its largest singular values are kept (Eckart and Young).
    """
    reduced = dict(tensors)
    for name, down in tensors.items():
        if name.endswith("_lora.down.weight") and len(down) > rank:
            other = name.replace(".down.", ".up.")
            left, strength, right = torch.linalg.svd(tensors[other].float() @ down.float(), full_matrices=False)
            share = strength[:rank].sqrt()
            reduced |= {other: left[:, :rank] * share, name: share[:, None] * right[:rank]}
    return reduced


def begin_with_faceid(recipe: nn.Module, faceid: Path) -> None:
    """Gives stage 1 the weights of another run's file, or of a published one.

    A LoRA of greater rank than the recipe's is replaced by the nearest of that rank. Raises PortraitError for a file of
    other sizes.
    """
    rank = next(len(own) for name, own in recipe.named_parameters() if name.endswith("_lora.down.weight"))
    stored = read_tensors(faceid, "faceid").tensors
    check_finite(stored, faceid.name)
    tensors = of_rank({name: t.float() for name, t in stored.items()}, rank)
    try:
        recipe.load_state_dict(tensors)
    except RuntimeError as error:
        raise PortraitError(
            "initial",
            f"{faceid.name} does not fit ({str(error)[:300]})",
            "Give its --tokens, --width and --depth, no greater --rank, and the checkpoint it was trained on.",
        ) from None


def begin_with_router(recipe: nn.Module, file: Path) -> None:
    """Gives stage 2 the router of another run's file, or of a published one; the LoRA begins as stage 1's.

    Raises PortraitError for a file of other sizes.
    """
    tensors = {name: t.float() for name, t in read_tensors(file, "router").tensors.items() if "_router." in name}
    check_finite(tensors, file.name)
    own = {name: tensor.shape for name, tensor in recipe.state_dict().items() if "_router." in name}
    if {name: tensor.shape for name, tensor in tensors.items()} != own:
        raise PortraitError(
            "initial",
            f"{file.name} does not fit: its router is of another model",
            "Give a router file that was made for the same checkpoint and --faceid.",
        )
    recipe.load_state_dict(tensors, strict=False)


def second_stage(faceid: Path | None, sites: list[Site]) -> tuple[IDEmbedding, nn.ModuleDict, nn.ModuleDict]:
    """The first stage's ID embedding and identity attention, frozen, and the layers that stage 2 trains.

    Raises PortraitError for no file, and for one of another model, without LoRA or with values that are not finite.
    """
    if faceid is None:
        raise PortraitError("faceid", "stage 2 builds on stage 1", "Give --faceid uniportrait-faceid_NAME.safetensors.")
    tensors = read_tensors(faceid, "faceid").tensors
    check_finite(tensors, faceid.name)
    under = {
        prefix: {k[len(prefix) :]: v.float() for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("faceid_proj.", "faceid_adapter.")
    }
    embedding = IDEmbedding.from_tensors(under["faceid_proj."], faceid.name)
    ranks = [v.shape[0] for k, v in under["faceid_adapter."].items() if k.endswith("to_q_lora.down.weight")]
    if not ranks:
        raise PortraitError("faceid", f"{faceid.name} holds no LoRA", "Give the export of stage 1.")
    rank = ranks[0]
    identity, trained = site_layers(sites, rank), site_layers(sites, rank)
    for site in sites:
        if site.cross:
            cast(SiteLayers, identity[str(site.index)]).add_identity_attention(site)
    try:
        identity.load_state_dict(under["faceid_adapter."])
    except RuntimeError as error:
        raise PortraitError(
            "faceid", f"{faceid.name} was made for another model ({error})", "Give the checkpoint it was trained on."
        ) from None
    trained.load_state_dict({k: v for k, v in under["faceid_adapter."].items() if "_lora." in k})
    for site in sites:
        if site.cross:
            cast(SiteLayers, trained[str(site.index)]).add_router(site, embedding.latents.shape[1])
    return embedding, identity.requires_grad_(False).eval(), trained


def leave_out(embedding: IDEmbedding, components: str, zero_structure: Tensor) -> None:
    """Takes what is not among the components out of an ID embedding: weights of zero that stay so.

    So the published layout holds the variants of Table 3 too, and inference needs to know nothing of them.
    """
    if components in ("global", "local"):
        for layer in embedding.layers:
            branch = cast(nn.ModuleList, layer)[1].requires_grad_(False)
            nn.init.zeros_(cast(nn.Linear, branch.to_out).weight)
    if components == "structure":
        # The features of no face hold zeros in place of the recognition network's.
        shallow = (zero_structure == 0).all(dim=0)
        first = cast(nn.Linear, embedding.proj_clip[0]).weight
        first.data[:, shallow] = 0
        first.register_hook(lambda gradient: gradient * ~shallow.to(gradient.device))
