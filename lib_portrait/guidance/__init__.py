"""RB-Guidance (OmniPortrait, section 3.3): guidance by what the UNet itself computes of a picture, inside of its call.

Its options are declared in `options`, which is read where there is no torch; so nothing is imported here.
"""
