"""The networks of the embedded world: the layouts of the real ones, scaled down to what two CPU cores can train.

Each function builds one network with random weights; seed torch first for the same ones. Widths and sizes are arguments
whose defaults are those of the world of 128 pixels a side, with latents of 4 x 16 x 16; `vae_like` and `unet_like` read
them off weights, so that whoever opens a file need not know them. The text's context is 77 x 96.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from lib_portrait.errors import PortraitError
from lib_portrait.faces.recognition import Backbone

PICTURE = 128
LATENT_CHANNELS = 4
VAE_CHANNELS = (96, 96, 96, 96)
UNET_CHANNELS = (96, 96, 192, 96)
CONTEXT = 96
VOCABULARY = 49408
POSITIONS = 77
HEADS = 4
EMBEDDING = 128


def world_vae(channels: Sequence[int] = VAE_CHANNELS, layers: int = 0) -> AutoencoderKL:
    """ldm's AutoencoderKL, f8 with 4 channels: (B, 3, H, W) in [-1, 1] to (B, 4, H / 8, W / 8).

    channels: of the four levels, multiples of the first as ldm has them. layers: residual blocks a level before the
    bottleneck; after it there is one more. By default of the same width everywhere, three channels to each of the 32
    groups of ldm's normalisation: with 32 channels it would be one, and the normalisation before the last convolution
    would take every channel's level out of a picture. No residual blocks before the bottleneck, one at each level after
    it: there the detail is made.
    """
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        sample_size=PICTURE,
        scaling_factor=1.0,
    )


def vae_like(tensors: Mapping[str, Tensor], name: str) -> AutoencoderKL:
    """`world_vae` of the widths that these weights have, with random ones of its own.

    name: of their file, for the PortraitError that is raised where they are not an autoencoder's.
    """
    try:
        channels = [len(tensors[f"decoder.up_blocks.{3 - level}.resnets.0.conv1.weight"]) for level in range(4)]
    except KeyError:
        raise PortraitError(
            "vae", f"{name} does not hold the world's VAE", "Use the export of the recipe vae."
        ) from None
    return world_vae(channels, _count(tensors, "decoder.up_blocks.0.resnets.") - 1)


def deepened(vae: AutoencoderKL, layers: int) -> AutoencoderKL:
    """The same function with `layers` residual blocks a level before the bottleneck, one more after it, where `vae` has
    fewer: the last convolution of each new block is zero, so that it adds nothing yet. Else `vae` itself.
    """
    before = vae.config.layers_per_block
    if layers <= before:
        return vae
    made = world_vae(vae.config.block_out_channels, layers)
    made.load_state_dict(vae.state_dict(), strict=False)
    for levels, had in ((made.encoder.down_blocks, before), (made.decoder.up_blocks, before + 1)):
        for level in levels:
            for block in level.resnets[had:]:
                nn.init.zeros_(block.conv2.weight)
                nn.init.zeros_(block.conv2.bias)
    return made


def _count(tensors: Mapping[str, Tensor], start: str) -> int:
    """How many numbered parts the names that begin so tell of."""
    return len({name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)})


def world_text_encoder() -> CLIPTextModel:
    """CLIP's text transformer: token numbers (B, 77) to (B, 77, 96)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=CONTEXT,
            intermediate_size=4 * CONTEXT,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            hidden_act="quick_gelu",
            projection_dim=CONTEXT,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
        )
    )


def world_unet(
    channels: Sequence[int] = UNET_CHANNELS, layers: int = 1, heads: int = HEADS, latent: int = PICTURE // 8
) -> UNet2DConditionModel:
    """SD1's layout: three levels with attention and one without; heads per layer are fixed, as in SD1.

    channels: of the four levels, multiples of the first. latent: side of the latents that it is trained on.
    """
    return UNet2DConditionModel(
        sample_size=latent,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=CONTEXT,
        # diffusers' name for the number of heads.
        attention_head_dim=heads,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )


def unet_like(tensors: Mapping[str, Tensor], facts: Mapping[str, str], name: str) -> UNet2DConditionModel:
    """`world_unet` of the widths that these weights have, with random ones of its own.

    facts: `heads` and `latent` of the file's metadata; without them those of the world of 128 pixels. name: of the
    file, for the PortraitError that is raised where they are not such a UNet's.
    """
    try:
        channels = [len(tensors[f"down_blocks.{level}.resnets.0.conv1.weight"]) for level in range(4)]
        heads, latent = int(facts.get("heads", HEADS)), int(facts.get("latent", PICTURE // 8))
    except (KeyError, ValueError):
        raise PortraitError(
            "base", f"{name} does not hold a world's UNet", "Use the export of the recipe base."
        ) from None
    return world_unet(channels, _count(tensors, "down_blocks.0.resnets."), heads, latent)


def world_recognition(side: int = 80) -> Backbone:
    """The IR network whose features condition: faces (B, 3, side, side) to taps of 16, 48, 96 and 128 channels.

    80 pixels are about what a face of a 128 px picture has to show, and 112 show a mole of one of 256 px.
    """
    return Backbone(blocks=(1, 2, 2, 1), widths=(16, 16, 48, 96, 128), embedding=EMBEDDING, image_size=side)


def world_measuring(side: int = 64) -> Backbone:
    """The IR network that only measures: other depth, widths and input than the conditioning one, and its own seed."""
    return Backbone(blocks=(1, 1, 2, 2), widths=(16, 32, 48, 96, 160), embedding=EMBEDDING, image_size=side)


def world_vision() -> CLIPVisionModel:
    """A CLIP vision transformer of 112 px with 8 x 8 patches of 14, 5 layers of width 128."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            projection_dim=CONTEXT,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=112,
            patch_size=14,
            hidden_act="gelu",
        )
    )
