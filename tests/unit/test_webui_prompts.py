"""What prompts say at each step, by the WebUI's own parser: AND, prompt editing, hires fix, marks in front."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_portrait.errors import PortraitError
from tests.host_stand_in import standing_in


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Any:
    """modules/prompt_parser.py of a WebUI, which needs nothing but lark."""
    webui = Path(os.environ.get("WEBUI_DIR") or Path.home() / "stable-diffusion-webui")
    packages = next(webui.glob("venv/lib/python3*/site-packages"), None)
    if packages is None or not (packages / "lark").is_dir():
        pytest.skip("no WebUI with its environment is here")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    spec = importlib.util.spec_from_file_location("prompt_parser", webui / "modules" / "prompt_parser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompts(parser: Any) -> Iterator[Any]:
    made = {"modules": types.ModuleType("modules"), "modules.prompt_parser": parser}
    config = SimpleNamespace(total_steps=lambda steps: 2 * steps)
    for name, content in (
        ("sd_samplers", {"find_sampler_config": {"Heun": config}.get}),
        ("shared", {"opts": SimpleNamespace(use_old_scheduling=False)}),
    ):
        made[f"modules.{name}"] = types.ModuleType(f"modules.{name}")
        vars(made[f"modules.{name}"]).update(content)
    for name, module in made.items():
        if "." in name:
            setattr(made["modules"], name.partition(".")[2], module)
    with standing_in(made):
        from lib_portrait.webui import prompts

        yield prompts


def processing(*texts: str, steps: int = 4, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(prompts=list(texts), firstpass_steps=steps, steps=steps, sampler_name="Heun", **more)


class Model:
    """Its contexts have as many tokens as the text has words, and two of others in front where marked."""

    def __init__(self, parser: Any, marked: int = 0, mapping: bool = False):
        self.parser, self.marked, self.mapping = parser, marked, mapping

    def get_learned_conditioning(self, texts: list[str]) -> Any:
        made = [torch.zeros(len(text.split()) + self.marked, 3) for text in texts]
        return {"crossattn": made, "vector": torch.zeros(len(texts), 2)} if self.mapping else made

    def denoiser(self, p: Any, step: int, steps: int, hires: int | None = None) -> Any:
        texts = p.hr_prompts if getattr(p, "is_hr_pass", False) else p.prompts
        cond = self.parser.get_multicond_learned_conditioning(self, self.parser.SdConditioning(texts), steps, hires)
        return SimpleNamespace(p=p, step=step, sampler=SimpleNamespace(sampler_extra_args={"cond": cond}))


@pytest.mark.parametrize("mapping", [False, True])
def test_rows_are_told_what_their_prompts_say_at_the_step(parser: Any, prompts: Any, mapping: bool) -> None:
    p = processing("a [man:woman:0.5] in a hat AND a hall :0.5", "a girl")
    model = Model(parser, 1, mapping)
    for step, word in ((0, "man"), (2, "man"), (3, "woman"), (4, "woman"), (9, "man")):
        found = prompts.at_step(model.denoiser(p, step, 4))
        # Behind the last step the host begins anew.
        assert found == [[(f"a {word} in a hat", 6), (" a hall", 3)], [("a girl", 3)]], step


def test_every_part_of_a_sampling_is_known_before_it(prompts: Any) -> None:
    p = processing("a [man:woman:1] AND [a hall:a park:3]", "a girl")
    first, second = prompts.of_all_steps(p)
    assert [[" ".join(text.split()) for text in texts] for texts in first] == [
        ["a man", "a hall"],
        ["a woman", "a hall"],
        ["a woman", "a park"],
    ]
    assert second == [["a girl"]]


def test_the_second_pass_has_prompts_and_steps_of_its_own(parser: Any, prompts: Any) -> None:
    p = processing(
        "a man", is_hr_pass=True, hr_prompts=["a [boy:girl:0.5]"], hr_second_pass_steps=3, hr_sampler_name=None
    )
    said = [
        prompts.at_step(Model(parser).denoiser(p, step, 4, 6))[0][0][0].split()[-1] for step in (0, 1, 2, 3, 4, 5, 6)
    ]
    # 0.5 counts from the first pass on, which is over.
    expected = [text for _, text in parser.get_learned_conditioning_prompt_schedules(["a [boy:girl:0.5]"], 4, 6)[0]]
    assert set(said) == {text.split()[-1] for text in expected}


def test_conditions_of_other_prompts_are_told(parser: Any, prompts: Any) -> None:
    p = processing("a [man:woman:0.5]")
    other = Model(parser).denoiser(processing("a man"), 0, 4)
    other.p = p
    with pytest.raises(PortraitError, match="not what the prompts say"):
        prompts.at_step(other)
    fewer = Model(parser).denoiser(processing("a man"), 0, 4)
    fewer.p = processing("a man AND a woman")
    with pytest.raises(PortraitError, match="not what the prompts say"):
        prompts.at_step(fewer)
