"""What InstantFamily (arXiv 2404.19427) lets people choose, and what its weights are called."""

from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles
from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Choice, Switch

FILES = AdapterFiles(
    method="instantfamily",
    title="InstantFamily",
    parts=(AdapterFile("instantfamily", "instantfamily_{name}", "projections of the faces' features"),),
    encoders=("backbone",),
)

DECLARATION = Declaration(
    files=FILES,
    options=(
        Choice(
            name="mask",
            title="Mask",
            help="how faces are kept out of one another's places: as in the paper their logits are multiplied with the "
            "mask, or their keys are left out, or not at all",
            default="multiply",
            choices={"multiply": "Multiply logits (paper)", "exclude": "Leave keys out", "none": "None"},
            axis="Mask",
        ),
        Switch(
            name="show_control",
            title="Show control picture",
            help="append the picture that the ControlNet saw, with the circles on the faces, to the resulting pictures",
        ),
    ),
    control="show_control",
    overlap="where the faces of both are seen",
)
