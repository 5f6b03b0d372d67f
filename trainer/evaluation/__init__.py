"""Evaluation: the papers' protocols as code.

In the order a result comes about: `populations` and `prompts` say who and what, `layouts` where faces are to be,
`guided` what reference guidance is asked for, `plans` which samples that makes, `generators` generates their pictures,
`measuring` measures these with the networks of `instruments`, and moles and freckles by `details`, `metrics` makes
means with errors of the measurements, `report` tables of those, `plots` plots. `run` is the entry, `page` that of
everything at once. The network that predicts the attributes of the world's pictures is `trainer/attribute_network.py`.
"""
