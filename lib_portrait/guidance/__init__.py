"""Guidance by what the UNet itself computes of a picture, inside of its call."""

from lib_portrait.guidance.features import Energy, FeatureGuidance, signal_rate

__all__ = ["Energy", "FeatureGuidance", "signal_rate"]
