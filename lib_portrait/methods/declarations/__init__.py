"""The methods there are, and what is to be known of each before it does anything.

A method has two files: its declaration here, standard library only, so that requests are read, panels built and command
lines answered where there is no torch, or before it is imported; and `lib_portrait.methods.NAME`, the paper's maths,
which ends in a `METHOD` (`methods.base`) and is imported when the method is first used.

A new method is registered by its name in ADAPTED.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from lib_portrait.checkpoints.files import AdapterFiles
from lib_portrait.errors import PortraitError
from lib_portrait.options import Option, shown

# Those with weights of their own. The first is the one that requests mean where they name none.
ADAPTED = ("uniportrait", "fusion", "instantfamily", "omniportrait")
# And the one without: people are in the picture by reference guidance alone, or by what is no part of this project.
NAMES = (*ADAPTED, "none")


@dataclass(frozen=True)
class Declaration:
    """A method from outside.

    files: what its weights are called, and which networks of faces it reads.
    options: what may be chosen for a whole request. identity_options: for each of its people.
    mixes: whether people can be mixed into an identity.
    maps: the switch among its options that asks for maps of where people were put; "" where it makes none.
    control: the switch that asks for the picture that the ControlNet saw; "" where none is told of people.
    names_each: whether everybody needs a word of the prompt to themselves: "a woman and a woman", not "two women".
    overlap: a clause on who is seen where the regions of two people overlap.
    """

    files: AdapterFiles
    options: tuple[Option, ...] = ()
    identity_options: tuple[Option, ...] = ()
    mixes: bool = False
    maps: str = ""
    control: str = ""
    names_each: bool = False
    overlap: str = "where both belong"

    @property
    def name(self) -> str:
        """In requests and manifests, and of its module."""
        return self.files.method

    @property
    def title(self) -> str:
        """For people."""
        return self.files.title

    @property
    def has_adapter(self) -> bool:
        """Whether it has weights of its own; without them it draws nobody by itself."""
        return bool(self.files.parts)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Which networks of faces it reads, by their roles in a kit."""
        return self.files.encoders


def declaration(name: str) -> Declaration:
    """The declaration of a method, imported when first asked for. Raises PortraitError for a name that is none's."""
    if name not in NAMES:
        raise PortraitError("method", f"{shown(name)} is not a method", f"Use one of: {', '.join(NAMES)}.")
    return importlib.import_module(f"{__name__}.{name}").DECLARATION


def declarations() -> tuple[Declaration, ...]:
    """Those of all methods, the default one first."""
    return tuple(declaration(name) for name in NAMES)


def adapter_files() -> tuple[AdapterFiles, ...]:
    """What the weights of all methods that have some are called, for a `checkpoints.Store`."""
    return tuple(one.files for one in declarations() if one.has_adapter)
