"""What UniPortrait (arXiv 2408.05939) lets people choose, and what its weights are called."""

from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles, KnownWeight
from lib_portrait.checkpoints.kit import CLIP_L, Manifest, StoredFile
from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Number, Switch

_PUBLISHER = "https://huggingface.co/Junjie96/UniPortrait/resolve/main/"
_LICENCE = "see the publisher's page (the code is Apache-2.0)"
_PUBLISHED = (
    KnownWeight(
        role="faceid",
        filename="uniportrait-faceid_sd15.bin",
        url=f"{_PUBLISHER}uniportrait-faceid_sd15.bin",
        size=None,
        sha256=None,
        licence=_LICENCE,
        what="UniPortrait for Stable Diffusion 1.5: ID embedding, attention adapter, LoRA for one person",
        group="uniportrait",
        aliases=("uniportrait-faceid_sd15.safetensors",),
    ),
    KnownWeight(
        role="router",
        filename="uniportrait-router_sd15.bin",
        url=f"{_PUBLISHER}uniportrait-router_sd15.bin",
        size=None,
        sha256=None,
        licence=_LICENCE,
        what="UniPortrait for Stable Diffusion 1.5: ID router and LoRA for several people",
        group="uniportrait",
        aliases=("uniportrait-router_sd15.safetensors",),
    ),
    KnownWeight(
        role="backbone",
        filename="glint360k_curricular_face_r101_backbone.bin",
        url=f"{_PUBLISHER}glint360k_curricular_face_r101_backbone.bin",
        size=None,
        sha256=None,
        licence="see the publisher's page",
        what="face recognition network IR-101 (CurricularFace, trained on Glint360K)",
        group="uniportrait",
        aliases=("glint360k_curricular_face_r101_backbone.safetensors",),
    ),
    KnownWeight(
        role="vision",
        filename="CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
        url="https://huggingface.co/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        size=2_528_373_448,
        sha256="6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
        licence="Apache-2.0 (IP-Adapter's copy of OpenCLIP's MIT-licensed weights)",
        what="CLIP ViT-H/14 image encoder (LAION-2B), the one IP-Adapter uses",
        group="uniportrait",
        aliases=("CLIP-ViT-H-14-laion2B-s32B-b79K.bin", "CLIP-ViT-H-14.safetensors", "clip_h.pth"),
        generic=(
            "model.safetensors",
            "pytorch_model.bin",
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.bin",
        ),
    ),
)

FILES = AdapterFiles(
    method="uniportrait",
    title="UniPortrait",
    parts=(
        AdapterFile("faceid", "uniportrait-faceid_{name}", "ID embedding, attention adapter, LoRA for one person"),
        AdapterFile("router", "uniportrait-router_{name}", "ID router and LoRA for several people", people=2),
    ),
    encoders=("backbone", "vision"),
    published=_PUBLISHED,
    # Without default sampler settings: any of the WebUI's do.
    kit=Manifest(
        name="sd15",
        method="uniportrait",
        adapter={weight.role: weight.filename for weight in _PUBLISHED[:2]},
        encoders={weight.role: StoredFile(weight.filename, weight.sha256, weight.size) for weight in _PUBLISHED[2:]},
        text_encoder=CLIP_L,
        picture=(512, 512),
        licence=_LICENCE,
    ),
)

DECLARATION = Declaration(
    files=FILES,
    options=(
        Number(
            name="scale",
            title="ID scale",
            help="strength of all people together (lambda of the decoupled cross-attention)",
            default=0.7,
            low=0.0,
            high=2.0,
            axis="ID scale",
        ),
        Number(
            name="lora_scale",
            title="LoRA scale",
            help="strength of the adapter's LoRA on the UNet's attention layers",
            default=1.0,
            low=0.0,
            high=2.0,
            axis="LoRA scale",
        ),
        Switch(
            name="show_routing",
            title="Show routing map",
            help="append the routing map, which shows who was put where, to the resulting pictures",
        ),
    ),
    identity_options=(
        Number(
            name="scale",
            title="Scale",
            help="strength of this person, multiplied with the request's scale",
            default=1.0,
            low=0.0,
            high=2.0,
            axis="Scale of identity {number}",
        ),
        Number(
            name="structure",
            title="Face structure (β)",
            help="face structure scale beta: more likeness, less editability (appendix A)",
            default=0.1,
            low=0.0,
            high=2.0,
            axis="Structure scale",
        ),
    ),
    mixes=True,
    maps="show_routing",
    overlap="where routing decides between the two",
)
