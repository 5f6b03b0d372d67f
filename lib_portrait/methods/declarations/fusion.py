"""What Fusion (ICLR 2025 submission "Fusion Is All You Need") lets people choose, and what its weights are called."""

from lib_portrait.checkpoints.files import AdapterFile, AdapterFiles
from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Switch

FILES = AdapterFiles(
    method="fusion",
    title="Fusion",
    parts=(AdapterFile("fusion", "fusion_{name}", "keys and values of the reference at every cross-attention"),),
)

DECLARATION = Declaration(
    files=FILES,
    options=(
        Switch(
            name="face_only",
            title="Face only",
            help="grey out what is around the faces of the photos, so that hair, clothes and places do not come along",
            axis="Face only",
        ),
    ),
    overlap="where neither of the two is seen",
)
