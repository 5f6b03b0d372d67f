"""What UniPortrait's two stages begin with: new layers, another run's or a published file, the first stage's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from lib_portrait.attention.decoupled import projection_sizes
from lib_portrait.attention.sites import Site
from lib_portrait.checkpoints.formats import read_tensors
from lib_portrait.errors import PortraitError
from lib_portrait.faces.weights import check_finite
from lib_portrait.methods.uniportrait import Adapter, IDEmbedding, SiteLayers
from trainer.low_rank import of_rank


def first_stage(embedding: IDEmbedding, sites: Sequence[Site], rank: int) -> Adapter:
    """What stage 1 trains: the ID embedding, and at each site new layers.

    LoRA of that rank, W_k^id and W_v^id, which begin as the text's own (as IP-Adapter's do).
    """
    faceid = {}
    for site in sites:
        layers = faceid[site.index] = _with_lora(site, rank)
        if site.cross:
            layers.add_id_attention(site.context, site.inner)
            for name in ("to_k", "to_v"):
                own = cast(nn.Linear, site.module.get_submodule(name))
                cast(nn.Linear, layers.get_submodule(f"{name}_faceid")).weight.data.copy_(own.weight.data)
    return Adapter(embedding, faceid)


def _with_lora(site: Site, rank: int) -> SiteLayers:
    layers = SiteLayers()
    for name, (inside, outside) in projection_sizes(site).items():
        layers.add_lora(name, inside, outside, rank)
    return layers


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


def second_stage(file: Path | None, sites: Sequence[Site]) -> Adapter:
    """What stage 2 builds on, the first stage's ID embedding and ID attention, frozen; and the router that it trains.

    The second LoRA begins as the first (sec. 3.4). Raises PortraitError for no file, and for one of another model,
    without LoRA or with values that are not finite.
    """
    if file is None:
        raise PortraitError("faceid", "stage 2 builds on stage 1", "Give --faceid uniportrait-faceid_NAME.safetensors.")
    tensors = {name: tensor.float() for name, tensor in read_tensors(file, "faceid").tensors.items()}
    adapter = Adapter.from_tensors(tensors, None, (file.name, "router"))
    adapter.check_fits(sites)
    for site in sites:
        first = adapter.faceid_at(site).lora
        layers = SiteLayers()
        for name, (inside, outside) in projection_sizes(site).items():
            if name not in first:
                raise PortraitError(
                    "faceid", f"{file.name} holds no LoRA for {name} of {site.path}", "Give the export of stage 1."
                )
            layers.add_lora(name, inside, outside, len(first[name].down.weight))
            layers.lora[name].load_state_dict(first[name].state_dict())
        if site.cross:
            c, d = site.channels, site.context
            layers.add_router((c, 2 * c, c), (d, 2 * d, c), adapter.embedding.latents.shape[1])
        adapter.router[str(site.index)] = layers
    return adapter


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
