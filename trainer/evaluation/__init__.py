"""Evaluation: the papers' protocols as code.

In the order a result comes about: `people` and `prompts` say who and what, `plans` which pictures that makes,
`artist` draws them, `instruments` measure them (`attributes` is the world's own), `metrics` turn
measurements into numbers with errors, `report` into tables. `run` is the door.
"""
