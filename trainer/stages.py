"""A long piece of work as stages that need one another, each of which is done once.

What is done, and how long it took, is noted in a file for each stage; started again, the work goes on with the stages
that are not done. The minutes that are given to the whole are shared out among those, by their shares; what one leaves
over, or takes too much, the others have more, or less.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_portrait.errors import PortraitError

# Seconds between two looks at the processes of stages that run beside one another.
LOOK = 0.2
# The share of all minutes that there are at least for what is left.
LEAST = 0.02
# Seconds that processes have to save what they have when they are asked to end.
PATIENCE = 30.0


@dataclass(frozen=True)
class Stage:
    """A part of the work. share: of the minutes of the whole, beside the shares of the others; 0 for one that takes as
    long as it takes. needs: the stages that come before it.

    work: does it, or goes on with it, in so many minutes from its beginning, all starts together (0: as long as it
    takes); returns whether it is done.
    """

    name: str
    share: float
    needs: tuple[str, ...]
    work: Callable[[float], bool]


@dataclass(frozen=True)
class Note:
    """What is noted of a stage. seconds: of work, over all starts. minutes: those it was given, 0 for any number."""

    done: bool = False
    seconds: float = 0.0
    minutes: float = 0.0


class Stages:
    """The stages of one piece of work, in an order in which none comes before what it needs; notes lie in a folder."""

    def __init__(self, stages: Sequence[Stage], folder: Path):
        self.stages = {stage.name: stage for stage in stages}
        self.folder = folder
        known: set[str] = set()
        for stage in stages:
            if not set(stage.needs) <= known:
                raise ValueError(f"{stage.name} comes before {', '.join(sorted(set(stage.needs) - known))}")
            known.add(stage.name)

    def note(self, name: str) -> Note:
        """What is noted of a stage; of one that has not begun, and of a file that cannot be read, nothing."""
        try:
            stored = json.loads((self.folder / f"{name}.json").read_text("utf-8"))
            return Note(bool(stored["done"]), float(stored["seconds"]), float(stored["minutes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Note()

    def write(self, name: str, note: Note) -> None:
        """Notes something of a stage: all of it or, when the process is killed meanwhile, nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps({"done": note.done, "seconds": round(note.seconds, 1), "minutes": note.minutes}))
        os.replace(part, self.folder / f"{name}.json")

    def chosen(self, only: Collection[str] = (), without: Collection[str] = ()) -> list[str]:
        """The names of `only`, or of all, but for those of `without`, in order. Raises PortraitError for others."""
        for name in (*only, *without):
            if name not in self.stages:
                raise PortraitError("stage", f"there is no {name!r}", f"Give one of: {', '.join(self.stages)}.")
        return [name for name in self.stages if (not only or name in only) and name not in without]

    def needed(self, names: Collection[str]) -> list[str]:
        """Of these stages, in order, those that are not done and are an end in itself, or needed by one that is.

        So what is done needs nothing more, also where what it was made of is no longer there.
        """
        wanted: set[str] = set()

        def want(name: str) -> None:
            if name in names and name not in wanted and not self.note(name).done:
                wanted.add(name)
                for need in self.stages[name].needs:
                    want(need)

        for name in names:
            if not any(name in self.stages[user].needs for user in names):
                want(name)
        return [name for name in self.stages if name in wanted]

    def check(self, todo: Collection[str]) -> None:
        """Raises PortraitError for stages whose needs are neither done nor to be done."""
        for name in todo:
            lacking = [need for need in self.stages[name].needs if need not in todo and not self.note(need).done]
            if lacking:
                raise PortraitError("stage", f"{name} needs {', '.join(lacking)}", "Let that be done first.")

    def minutes(self, name: str, todo: Collection[str], left: float, beside: bool = False) -> float:
        """The minutes of `left` for a stage, of those that are to be done.

        beside: stages run beside one another, so that not all count that are to be done, but those on the longest way
        from this one to the end.
        """
        whole = self._way(name, todo) if beside else sum(self.stages[one].share for one in todo)
        return left * self.stages[name].share / whole if whole else 0.0

    def _way(self, name: str, todo: Collection[str]) -> float:
        """The shares along the longest way from a stage to the end, its own among them, of what is to be done."""
        users = [self._way(user, todo) for user in self.stages if name in self.stages[user].needs]
        return (self.stages[name].share if name in todo else 0.0) + max(users, default=0.0)

    def _given(self, name: str, todo: Sequence[str], minutes: float, beside: bool = False, gone: float = 0.0) -> float:
        """The minutes of a stage, over all its starts: those it was given when it began, else its part of what is left.

        Spent is what all stages took; beside one another, what those on the slowest way to this one took, or the
        minutes that are gone since the beginning, which are more by the starts of the processes.
        """
        note = self.note(name)
        if not minutes or not self.stages[name].share:
            return 0.0
        if note.minutes and note.seconds:
            return note.minutes
        spent = max(self._spent(name), gone) if beside else sum(self.note(one).seconds for one in todo) / 60
        undone = [one for one in todo if not self.note(one).done]
        # Where nothing is left, a little: what comes later needs all that comes before.
        return self.minutes(name, undone, max(minutes - spent, minutes * LEAST), beside)

    def _spent(self, name: str) -> float:
        """The minutes of the slowest way to a stage."""
        return max((self._spent(one) + self.note(one).seconds / 60 for one in self.stages[name].needs), default=0.0)

    def run(self, todo: Sequence[str], minutes: float, say: Callable[[str], object] = print) -> bool:
        """Does those of the stages that are `needed`, one after the other; returns whether all are done now.

        minutes: for all of them over all starts, 0 for as long as they take. Ends after the first that is not done,
        which happens when it was asked to end.
        """
        needed = self.needed(todo)
        self.check(needed)
        if done := [name for name in todo if name not in needed]:
            say(f"done before, or no longer needed: {', '.join(done)}")
        for name in needed:
            if not self.one(name, self._given(name, todo, minutes), say):
                say(f"{name}: broken off; the same command goes on with it")
                return False
        return True

    def one(self, name: str, minutes: float, say: Callable[[str], object] = print) -> bool:
        """Does a stage, also one that is done, or goes on with it; returns whether it is done.

        minutes: of it over all starts, see `Stage.work`.
        """
        before = self.note(name).seconds
        say(f"{name}: " + (f"{minutes:.1f} minutes" if minutes else "as long as it takes"))
        self.write(name, Note(False, before, minutes))
        started, done = time.monotonic(), False
        try:
            done = self.stages[name].work(minutes)
        finally:
            self.write(name, Note(done, before + time.monotonic() - started, minutes))
        return done

    def run_beside(
        self,
        todo: Sequence[str],
        minutes: float,
        most: int,
        command: Callable[[str, float], Sequence[str]],
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], object] = print,
    ) -> bool:
        """As `run`, but up to `most` of them at once, each in a process of its own as soon as what it needs is done.

        command: of a stage and its minutes, which does `one` in that process. What it prints goes into NAME.log beside
        the notes. Asked to end, it asks the processes and waits for them, but no longer than PATIENCE. Where a stage
        fails the others go on, and those that need it stay undone. Those with the longest way before them begin first.
        """
        waiting = self.needed(todo)
        needed = list(waiting)
        self.check(needed)
        running: dict[str, subprocess.Popen[bytes]] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        asked: list[int] = []
        started = time.monotonic()
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in previous:
            signal.signal(number, lambda number, frame: asked.append(number))
        try:
            while running or (waiting and not asked):
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        note = self.note(name)
                        say(f"{name}: {'done' if note.done else 'NOT done'} after {note.seconds:.0f} s")
                ready = [one for one in waiting if all(self.note(need).done for need in self.stages[one].needs)]
                if not ready and not running:
                    break
                ready.sort(key=lambda one: -self._way(one, todo))
                for name in ready[: most - len(running)] if not asked else ():
                    waiting.remove(name)
                    gone = (time.monotonic() - started) / 60
                    given = self._given(name, needed, minutes, beside=True, gone=gone)
                    say(f"{name}: begins, " + (f"{given:.1f} minutes" if given else "as long as it takes"))
                    with (self.folder / f"{name}.log").open("ab") as log:
                        running[name] = subprocess.Popen(
                            command(name, given),
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            env=environment,
                            # The terminal's Ctrl-C comes to this process, which passes it on.
                            start_new_session=True,
                        )
                if asked:
                    _end(running.values())
                time.sleep(LOOK)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return all(self.note(name).done for name in needed)


def _end(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Asks processes to end, and makes those that have not after PATIENCE."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            # With those that prepare its samples: it leads a session of its own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
