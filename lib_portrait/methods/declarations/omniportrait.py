"""What OmniPortrait (Pivot ID Encoder) lets people choose, and what its weights are called."""

from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles, KnownWeight
from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Number, Word

_ENCODER = "https://huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K/resolve/main/open_clip_pytorch_model.bin"

FILES = AdapterFiles(
    method="omniportrait",
    title="OmniPortrait",
    parts=(AdapterFile("omniportrait", "omniportrait_{name}", "the linear layer of the Pivot ID Encoder"),),
    encoders=("vision",),
    published=(
        KnownWeight(
            role="vision",
            filename="CLIP-ViT-L-14-laion2B-s32B-b82K.bin",
            url=_ENCODER,
            size=None,
            sha256=None,
            licence="MIT",
            what="OpenCLIP ViT-L/14 (LAION-2B), the image encoder of OmniPortrait",
            group="omniportrait",
            aliases=(
                "CLIP-ViT-L-14-laion2B-s32B-b82K.safetensors",
                "ViT-L-14-laion2B-s32B-b82K.bin",
                "ViT-L-14-laion2B-s32B-b82K.safetensors",
            ),
        ),
    ),
)

DECLARATION = Declaration(
    files=FILES,
    identity_options=(
        Number(
            name="strength",
            title="Strength",
            help="how far the word's embedding goes from the text's own (0) to the person's (1)",
            default=1.0,
            low=0.0,
            high=2.0,
            axis="Strength of identity {number}",
        ),
        Word(
            name="word",
            title="Word",
            help="the prompt's word for this person, where it is not woman, man, girl, boy, person or one of their "
            "plurals, or not the next one of these",
        ),
    ),
    names_each=True,
)
