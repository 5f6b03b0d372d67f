"""Evaluation: the papers' protocols as code.

In the order a result comes about: `people` and `prompts` say who and what, `plans` which pictures that makes,
`artist` draws them, `instruments` measure them, `metrics` turn measurements into numbers with errors, `report` into
tables. `run` is the door. What tells the world's attributes is `trainer/attribute_network.py`.
"""
