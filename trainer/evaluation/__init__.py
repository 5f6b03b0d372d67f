"""Evaluation: the papers' protocols as code.

In the order a result comes about: `populations` and `prompts` say who and what, `plans` which samples that makes,
`generators` generates their pictures, `measuring` measures these with the networks of `instruments`, `metrics` makes
means with errors of the measurements, `report` tables of those. `run` is the entry. The network that predicts the
attributes of the world's pictures is `trainer/attribute_network.py`.
"""
