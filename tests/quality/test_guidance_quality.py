"""RB-Guidance in the embedded world: its gradient lowers the energy that it is the gradient of."""

from __future__ import annotations

import json

import pytest

from benchmarks import energy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (energy.WORLD / "world.safetensors").is_file(), reason="models/world lacks its checkpoint"),
]

# A gradient that can be seen, against a reference that is as noisy as the picture.
GUIDANCE = {"noise": "step", "features": "centred", "gradient": "share", "strength": 0.3, "block": 2}


def test_the_energy_is_lower_than_it_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    """A small part of the hundred runs of `bench energy`."""
    assert energy.main(["--runs", "3", "--steps", "10", "--guidance", json.dumps(GUIDANCE)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["runs"] == 3 and found["lower"] == 1
