"""What Fusion (ICLR 2025 submission "Fusion Is All You Need") lets people choose."""

from lib_portrait.methods.declarations import Declaration
from lib_portrait.options import Switch

DECLARATION = Declaration(
    name="fusion",
    title="Fusion",
    options=(
        Switch(
            name="face_only",
            title="Face only",
            help="grey out what is around the faces of the photos, so that hair, clothes and places do not come along",
            axis="Face only",
        ),
    ),
)
