"""What UniPortrait (arXiv 2408.05939) lets people choose."""

from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Number, Switch

DECLARATION = Declaration(
    name="uniportrait",
    title="UniPortrait",
    encoders=("backbone", "vision"),
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
)
