"""A long piece of work in stages: their order, what is left out, how minutes are shared out, and going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lib_portrait.errors import PortraitError
from trainer.stages import Note, Stage, Stages

ROOT = Path(__file__).resolve().parents[2]
# pictures -> encoder -> base -> adapter -> kit, and beside that way: judge.
WAYS = {
    "pictures": (1, ()),
    "encoder": (2, ("pictures",)),
    "judge": (3, ("pictures",)),
    "base": (4, ("encoder",)),
    "adapter": (2, ("base", "judge")),
    "kit": (0, ("adapter", "judge")),
}


class Worked(list[tuple[str, float]]):
    """The work of stages in the order it was done, with their minutes. `breaks` says at which they are broken off."""

    def __init__(self, breaks: dict[str, int] | None = None):
        super().__init__()
        self.breaks = breaks or {}

    def of(self, name: str) -> Callable[[float], bool]:
        def work(minutes: float) -> bool:
            self.append((name, minutes))
            self.breaks[name] = self.breaks.get(name, 0) - 1
            return self.breaks[name] < 0

        return work

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


def stages(folder: Path, worked: Worked) -> Stages:
    return Stages([Stage(name, share, needs, worked.of(name)) for name, (share, needs) in WAYS.items()], folder)


def quiet(text: str) -> None:
    pass


def test_stages_run_in_order_and_each_of_them_once(tmp_path: Path) -> None:
    worked = Worked()
    made = stages(tmp_path, worked)
    assert made.run(made.chosen(), 0, quiet)
    assert worked == [(name, 0.0) for name in WAYS]
    worked.clear()
    assert stages(tmp_path, worked).run(made.chosen(), 0, quiet) and worked == []


def test_a_stage_that_was_broken_off_is_gone_on_with_and_the_next_ones_follow(tmp_path: Path) -> None:
    worked = Worked({"base": 2})
    made = stages(tmp_path, worked)
    assert not made.run(made.chosen(), 0, quiet)
    assert worked.names == ["pictures", "encoder", "judge", "base"]
    assert not made.run(made.chosen(), 0, quiet) and made.run(made.chosen(), 0, quiet)
    assert worked.names[4:] == ["base", "base", "adapter", "kit"]


def test_what_raises_is_not_done(tmp_path: Path) -> None:
    def fails(minutes: float) -> bool:
        raise RuntimeError("no disk")

    made = Stages([Stage("one", 1, (), fails)], tmp_path)
    with pytest.raises(RuntimeError):
        made.run(["one"], 0, quiet)
    assert not made.note("one").done
    (tmp_path / "one.json").write_text('{"done": tr')
    assert made.note("one") == Note()


def test_minutes_are_shared_out_and_what_one_leaves_over_the_others_have(tmp_path: Path) -> None:
    worked = Worked()
    made = stages(tmp_path, worked)
    made.run(made.chosen(), 12.0, quiet)
    given = dict(worked)
    # Of 12 shares each stage has its own, for this work takes no time.
    rest = 12.0
    for name, left in (("pictures", 12), ("encoder", 11), ("judge", 9), ("base", 6), ("adapter", 2)):
        assert given[name] == pytest.approx(12 * WAYS[name][0] / left, rel=1e-2), rest
    assert given["kit"] == 0


def test_a_stage_that_took_too_long_leaves_less_for_those_after_it(tmp_path: Path) -> None:
    worked = Worked()
    made = stages(tmp_path, worked)
    made.write("pictures", Note(True, 6 * 60, 1.0))
    made.run(made.chosen(), 12.0, quiet)
    # Six minutes are left for eleven shares.
    assert dict(worked)["encoder"] == pytest.approx(6 * 2 / 11, rel=1e-2)


def test_a_stage_keeps_the_minutes_it_began_with(tmp_path: Path) -> None:
    worked = Worked({"encoder": 1})
    made = stages(tmp_path, worked)
    made.run(made.chosen(), 12.0, quiet)
    made.write("encoder", Note(False, 30.0, made.note("encoder").minutes))
    first = dict(worked)["encoder"]
    made.run(made.chosen(), 100.0, quiet)
    assert [minutes for name, minutes in worked if name == "encoder"] == [first, first]
    assert made.note("encoder").seconds >= 30


def test_beside_one_another_only_the_longest_way_counts(tmp_path: Path) -> None:
    made = stages(tmp_path, Worked())
    todo = made.chosen()
    # pictures 1, encoder 2, base 4, adapter 2 are 9; judge 3 and adapter 2 are 5.
    assert made.minutes("pictures", todo, 9, beside=True) == 1
    assert made.minutes("base", todo[1:], 6, beside=True) == 4
    assert made.minutes("judge", todo, 5, beside=True) == 3
    assert made.minutes("judge", todo, 12) == 3


def test_what_is_done_needs_nothing_more(tmp_path: Path) -> None:
    """As after a run elsewhere, of which only the end came back."""
    worked = Worked()
    made = stages(tmp_path, worked)
    made.write("adapter", Note(True))
    made.write("judge", Note(True))
    assert made.run(made.chosen(), 0, quiet) and worked.names == ["kit"]


def test_stages_by_name_and_without_some(tmp_path: Path) -> None:
    made = stages(tmp_path, Worked())
    assert made.chosen(["judge", "pictures"]) == ["pictures", "judge"]
    assert made.chosen(without=["kit", "base"]) == ["pictures", "encoder", "judge", "adapter"]
    with pytest.raises(PortraitError, match="there is no 'bas'.*encoder"):
        made.chosen(["bas"])
    with pytest.raises(PortraitError, match="adapter needs base, judge"):
        made.check(["adapter"])
    with pytest.raises(ValueError, match="comes before"):
        Stages([Stage("one", 1, ("two",), lambda minutes: True)], tmp_path)


# --------------------------------------------------------------------------------------------- beside one another

# A stage that waits for a file called NAME.go, after which it is done, or to be asked to end.
WAITS = """
import pathlib, signal, sys, time
from trainer.stages import Note, Stage, Stages
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
def work(minutes):
    (folder / f"{name}.begun").touch()
    while not (folder / f"{name}.go").exists() and not asked:
        time.sleep(0.02)
    return not asked and name != "broken"
sys.exit(not Stages([Stage(name, 1, (), work)], folder).one(name, 0.0, print))
"""


def beside(folder: Path, most: int = 2, ways: dict[str, tuple[float, tuple[str, ...]]] | None = None) -> bool:
    made = Stages([Stage(n, s, needs, lambda minutes: True) for n, (s, needs) in (ways or WAYS).items()], folder)

    def command(name: str, minutes: float) -> list[str]:
        return [sys.executable, "-c", WAITS, str(folder), name]

    return made.run_beside(made.chosen(), 0.0, most, command, {**os.environ, "PYTHONPATH": str(ROOT)}, quiet)


def wait_for(file: Path) -> None:
    for _ in range(1500):
        if file.exists():
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"{file.name} never came")


def test_stages_that_need_nothing_of_each_other_run_at_once(tmp_path: Path) -> None:
    for name in ("pictures", "base", "adapter", "kit"):
        (tmp_path / f"{name}.go").touch()
    result: list[bool] = []
    # Signals are for the main thread: what runs beside is a thread that lets the stages go on.
    looking = threading.Thread(target=lambda: _let_go(tmp_path, result))
    looking.start()
    assert beside(tmp_path)
    looking.join()
    assert result == [True]


def _let_go(folder: Path, result: list[bool]) -> None:
    for name in ("encoder", "judge"):
        wait_for(folder / f"{name}.begun")
    result.append(not (folder / "base.begun").exists() and not (folder / "adapter.begun").exists())
    for name in ("encoder", "judge"):
        (folder / f"{name}.go").touch()


def test_where_one_fails_the_others_go_on_and_what_needs_it_is_not_begun(tmp_path: Path) -> None:
    for name in ("broken", "fine"):
        (tmp_path / f"{name}.go").touch()
    assert not beside(tmp_path, ways={"broken": (1, ()), "fine": (1, ()), "after": (1, ("broken",))})
    assert [(tmp_path / f"{name}.begun").exists() for name in ("broken", "fine", "after")] == [True, True, False]


def test_asked_to_end_it_asks_its_stages_and_waits_for_them(tmp_path: Path) -> None:
    code = f"import sys, pathlib; sys.path.insert(0, {str(ROOT)!r}); from tests.unit.test_stages import beside; "
    code += "sys.exit(beside(pathlib.Path(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    wait_for(tmp_path / "pictures.begun")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0  # beside() says False
    note = Stages([Stage("pictures", 1, (), lambda minutes: True)], tmp_path).note("pictures")
    assert not note.done and note.seconds > 0 and not (tmp_path / "encoder.begun").exists()
