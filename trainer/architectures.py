"""The networks of the embedded world: the layouts of the real ones, scaled down to what two CPU cores can train.

Each function builds one network with random weights; seed torch first for the same ones. A picture is 128 pixels a
side, its latent 4 x 16 x 16, the text's context 77 x 96.
"""

from __future__ import annotations

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from lib_portrait.faces.recognition import Backbone

PICTURE = 128
LATENT_CHANNELS = 4
CONTEXT = 96
VOCABULARY = 49408
POSITIONS = 77
HEADS = 4
EMBEDDING = 128


def world_vae() -> AutoencoderKL:
    """ldm's AutoencoderKL, f8 with 4 channels: (B, 3, H, W) in [-1, 1] to (B, 4, H / 8, W / 8).

    Of the same width everywhere, three channels to each of the 32 groups of ldm's normalisation: with 32 channels it
    would be one, and the normalisation before the last convolution would take every channel's level out of a picture.
    No residual blocks before the bottleneck, one at each level after it: there the detail is made.
    """
    return AutoencoderKL(
        block_out_channels=(96, 96, 96, 96),
        layers_per_block=0,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        sample_size=PICTURE,
        scaling_factor=1.0,
    )


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


def world_unet(channels: tuple[int, ...] = (96, 96, 192, 96), layers: int = 1) -> UNet2DConditionModel:
    """SD1's layout: three levels with attention and one without; heads per layer are fixed, as in SD1."""
    return UNet2DConditionModel(
        sample_size=PICTURE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        layers_per_block=layers,
        cross_attention_dim=CONTEXT,
        # diffusers' name for the number of heads.
        attention_head_dim=HEADS,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    )


def world_recognition() -> Backbone:
    """The IR network whose features condition: faces (B, 3, 80, 80) to taps of 16, 48, 96 and 128 channels.

    80 pixels are about what a face of a 128 px picture has to show.
    """
    return Backbone(blocks=(1, 2, 2, 1), widths=(16, 16, 48, 96, 128), embedding=EMBEDDING, image_size=80)


def world_measuring() -> Backbone:
    """The IR network that only measures: other depth, widths and input than the conditioning one, and its own seed."""
    return Backbone(blocks=(1, 1, 2, 2), widths=(16, 32, 48, 96, 160), embedding=EMBEDDING, image_size=64)


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
