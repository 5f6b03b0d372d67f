"""A UNet seen as an ordered list of attention sites, and the one way to change what happens at them."""

from lib_portrait.attention.injection import Call, Injection, Rule
from lib_portrait.attention.maps import RoutingMaps, word_attention
from lib_portrait.attention.rows import NEGATIVE, POSITIVE, Row, mark, mark_conditions, unmark
from lib_portrait.attention.sites import Site, control_sites, find_sites, spatial_shape

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "Call",
    "Injection",
    "RoutingMaps",
    "Row",
    "Rule",
    "Site",
    "control_sites",
    "find_sites",
    "mark",
    "mark_conditions",
    "spatial_shape",
    "unmark",
    "word_attention",
]
