"""portrait.py and its sub-commands: the environment is made once, by one at a time; commands say what they do."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks
import lib_portrait
import portrait
from lib_portrait.commands.download import Meter
from lib_portrait.errors import PortraitError
from tests import command as test_command
from tests import conftest

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------------ environment


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project whose requirement files are nearly empty, for portrait.py's functions in this process."""
    folder = tmp_path / "requirements"
    folder.mkdir()
    for name in ("standalone", "standalone-no-deps", "train", "dev", "dev-no-deps", "constraints"):
        (folder / f"{name}.txt").write_text(f"# {name}\n")
    monkeypatch.setattr(portrait, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def made(project):
    """An environment as far as its files tell, nothing installed in it yet."""
    environment = project / "env"
    portrait.interpreter(environment).parent.mkdir(parents=True)
    portrait.interpreter(environment).touch()
    (environment / "pyvenv.cfg").write_text("version = 3.11.7\n")
    return environment


@pytest.fixture
def pip(monkeypatch):
    """Every subprocess portrait.py starts, in order; `pip.code` is what they exit with."""

    class Pip(list):
        code = 0

        def __call__(self, command, **options):
            assert options.get("stdout", sys.stderr) is sys.stderr, "only the command itself writes to stdout"
            self.append(command)
            return subprocess.CompletedProcess(command, self.code)

    calls = Pip()
    monkeypatch.setattr(portrait.subprocess, "run", calls)
    return calls


def test_what_was_installed_is_not_installed_again(made, pip):
    assert not portrait.fresh(made, "dev")
    portrait.install(made, "dev")
    assert portrait.fresh(made, "dev")
    pip.clear()
    portrait.ensure(made, "dev")
    assert pip == []


def test_each_set_holds_the_ones_before_it_but_not_the_other_way_round(made, pip):
    sets = ["standalone", "train", "dev"]
    assert {*portrait.REQUIREMENTS} == {*sets, "ray"}
    for number, name in enumerate(sets):
        portrait.install(made, name)
        assert [portrait.fresh(made, other) for other in sets] == [other in sets[: number + 1] for other in sets]
        portrait.stamp(made, name).unlink()


@pytest.mark.parametrize(
    "name", ["standalone.txt", "standalone-no-deps.txt", "train.txt", "dev.txt", "dev-no-deps.txt", "constraints.txt"]
)
def test_a_changed_pin_makes_it_stale(project, made, pip, name):
    portrait.install(made, "dev")
    (project / "requirements" / name).write_text("numpy==1.0\n")
    assert not portrait.fresh(made, "dev")


def test_another_python_makes_it_stale(made, pip):
    portrait.install(made, "dev")
    (made / "pyvenv.cfg").write_text("version = 3.12.1\n")
    assert not portrait.fresh(made, "dev")


def test_a_failed_install_is_told_and_leaves_no_stamp(made, pip):
    portrait.install(made, "dev")
    pip.code = 1
    with pytest.raises(SystemExit, match="could not be installed.*run the same command again"):
        portrait.install(made, "dev")
    assert not portrait.fresh(made, "dev")


def test_packages_with_pins_of_their_own_are_installed_without_dependencies(project, made, pip):
    portrait.install(made, "dev")
    plain, alone = pip
    assert "--no-deps" not in plain and str(project / "requirements" / "constraints.txt") in plain
    assert "--no-deps" in alone and "-c" not in alone
    assert [Path(word).name for word in plain if word.endswith(".txt")] == [
        "constraints.txt",
        "standalone.txt",
        "train.txt",
        "dev.txt",
    ]
    assert [Path(word).name for word in alone if word.endswith(".txt")] == [
        "standalone-no-deps.txt",
        "dev-no-deps.txt",
    ]


def test_a_folder_that_is_not_ours_is_never_cleared(project, pip):
    folder = project / "documents"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear")
    pip.code = 1
    with pytest.raises(SystemExit, match="did not make it"):
        portrait.ensure(folder, "dev")
    assert (folder / "letter.txt").read_text() == "dear"


def test_our_own_broken_environment_is_made_anew(project, pip):
    environment = project / "env"
    environment.mkdir()
    (environment / portrait.MARK).touch()
    (environment / "half").touch()
    portrait.create(environment)
    assert not (environment / "half").exists() and (environment / portrait.MARK).is_file()
    assert pip[-1][1:] == ["-m", "venv", str(environment)]


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 13, 0)])
def test_other_pythons_are_refused_with_the_way_out(project, monkeypatch, version):
    monkeypatch.setattr(portrait.sys, "version_info", version)
    with pytest.raises(SystemExit, match=r"3\.10, 3\.11 or 3\.12, for example"):
        portrait.create(project / "env")


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_the_environments_python_goes_on_with_the_same_words(project, monkeypatch, platform):
    """On Windows exec would return to the shell at once, so there a child process is waited for."""
    seen = []
    monkeypatch.setattr(portrait.sys, "platform", platform)
    monkeypatch.setattr(portrait.os, "execv", lambda path, command: seen.append(command))
    monkeypatch.setattr(portrait.subprocess, "call", lambda command: seen.append(command) or 7)
    code = portrait.hand_over(project / "env", ["test", "-k", "two words"])
    python = project / "env" / ("Scripts/python.exe" if platform == "win32" else "bin/python")
    assert seen == [[str(python), str(project / "portrait.py"), "test", "-k", "two words"]]
    assert code == (7 if platform == "win32" else None)


def bare_project(folder: Path, command: str) -> Path:
    """A tree with the real portrait.py, no packages to install, and commands whose code is given."""
    (folder / "requirements").mkdir(parents=True)
    shutil.copy(ROOT / "portrait.py", folder)
    for name in ("standalone", "train", "dev", "constraints"):
        (folder / "requirements" / f"{name}.txt").touch()
    for path in portrait.COMMANDS.values():
        module = folder.joinpath(*path.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(
            '"""What it does."""\nimport sys\nREQUIREMENTS = "dev"\n'
            "def configure(parser):\n    parser.add_argument('arguments', nargs='*')\n"
            f"def run(options):\n    {command}\n"
        )
    shutil.copy(ROOT / "lib_portrait" / "errors.py", folder / "lib_portrait")
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PORTRAIT_VENV"}
    return subprocess.Popen(
        [sys.executable, str(folder / "portrait.py"), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_commands_on_a_bare_machine_share_one_real_environment(tmp_path):
    folder = bare_project(tmp_path / "with a space", "print(sys.prefix, *options.arguments); return 3")
    both = [start(folder, "generate", "a", "b c"), start(folder, "train", "a", "b c")]
    said = [process.communicate(timeout=300) for process in both]
    for process, (out, _) in zip(both, said, strict=True):
        assert process.returncode == 3
        assert out == f"{folder / '.venv'} a b c\n"
    errors = sorted(error for _, error in said)
    assert sum("Making an environment" in error for error in errors) == 1
    assert sum("Waiting for another portrait.py" in error for error in errors) == 1

    began = time.perf_counter()
    third = start(folder, "generate")
    out, error = third.communicate(timeout=60)
    assert (third.returncode, error) == (3, "")
    assert time.perf_counter() - began < 2


# --------------------------------------------------------------------------------------------------------- commands


def test_the_test_command_hands_its_words_to_pytest_unchanged():
    assert portrait.parse(["test"]).others == []
    assert portrait.parse(["test", "-k", "parity"]).others == ["-k", "parity"]
    words = ["tests/unit", "-x", "--lf", "-k", "not slow"]
    assert portrait.parse(["test", *words]).others == words


def test_the_test_command_runs_every_check_and_fails_with_any(monkeypatch, capfd):
    ran = []

    def run(command, cwd, env):
        ran.append(command[2])
        return subprocess.CompletedProcess(command, 1 if command[2] == "mypy" else 0)

    monkeypatch.setattr(test_command.subprocess, "run", run)
    assert portrait.run(portrait.parse(["test"])) == 1
    assert ran == ["ruff", "ruff", "mypy", "pytest"]
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("portrait.py test: ruff check passed, ruff format passed, mypy FAILED, pytest passed")
    ran.clear()
    assert portrait.run(portrait.parse(["test", "-k", "parity"])) == 0
    assert ran == ["pytest"]


def test_the_files_that_are_handed_out_first_are_there():
    """One that was renamed would be handed out last, and the whole take longer without anybody's seeing why."""
    missing = [file for file in conftest.LONGEST if not (ROOT / file).is_file()]
    assert missing == [] and len(set(conftest.LONGEST)) == len(conftest.LONGEST)


def test_bench_hands_on_what_follows_the_name(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmarks, "run", lambda name, words: seen.append((name, words)) or 0)
    assert portrait.run(portrait.parse(["bench", "step", "--pairs", "5", "--help"])) == 0
    assert seen == [("step", ["--pairs", "5", "--help"])]


def test_without_a_command_the_commands_are_told(capsys, monkeypatch):
    """By portrait.py itself, which makes no environment for that."""
    monkeypatch.setattr(portrait, "ensure", lambda *_: pytest.fail("an environment was asked for"))
    with pytest.raises(SystemExit) as caught:
        portrait.main([])
    said = capsys.readouterr()
    assert (caught.value.code, said.err) == (0, "")
    for name, module in portrait.COMMANDS.items():
        summary = " ".join(importlib.import_module(module).__doc__.splitlines()[0].split())
        assert f"{name} {summary}" in " ".join(said.out.split())


@pytest.mark.parametrize("words", [["imagine"], ["convert", "a"], ["convert", "a", "b", "--fast"], ["bench", "no"]])
def test_a_command_line_that_makes_no_sense_is_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        portrait.parse(words)
    assert caught.value.code == 2
    assert "portrait.py" in capsys.readouterr().err


def test_what_the_user_did_wrong_is_one_line(tmp_path, capsys):
    assert portrait.run(portrait.parse(["convert", str(tmp_path / "none.bin"), str(tmp_path / "b.safetensors")])) == 1
    error = capsys.readouterr().err
    assert error.startswith("portrait.py: none.bin") and error.count("\n") == 1


def test_convert_turns_a_checkpoint_round(tmp_path, capsys):
    import torch

    torch.save({"faceid_proj": {"latents": torch.ones(2, 3)}}, tmp_path / "a.bin")
    assert portrait.run(portrait.parse(["convert", str(tmp_path / "a.bin"), str(tmp_path / "a.safetensors")])) == 0
    assert portrait.run(portrait.parse(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.bin")])) == 0
    assert "1 tensors of float32" in capsys.readouterr().out.replace("torch.", "")
    again = torch.load(tmp_path / "b.bin", weights_only=True)
    assert again["faceid_proj"]["latents"].equal(torch.ones(2, 3))


def test_download_fetches_what_was_named_into_the_folder(tmp_path, monkeypatch, capsys):
    import lib_portrait.checkpoints.download as fetching

    asked = []

    def fetch(name, folder, registry, progress, sha256):
        if name == "unknown":
            raise PortraitError(name, "no published weight has this name", "Use another.")
        asked.append(name)
        progress(name, 2**20, 2**20)
        (folder / name).write_bytes(bytes(2**20))
        return [folder / name]

    monkeypatch.setattr(fetching, "fetch_known", fetch)
    assert portrait.run(portrait.parse(["download", "backbone", "vision", "--into", str(tmp_path)])) == 0
    assert asked == ["backbone", "vision"]
    said = capsys.readouterr()
    assert f"{tmp_path / 'vision'} is there (1.0 MiB)" in said.out
    assert "vision: 1.0 of 1.0 MiB, 100 %" in said.err
    asked.clear()
    assert portrait.run(portrait.parse(["download", "all", "--into", str(tmp_path)])) == 0
    assert asked == ["uniportrait", "omniportrait", "insightface", "facexlib"]
    assert portrait.parse(["download"]).what == ["uniportrait"]
    assert portrait.run(portrait.parse(["download", "unknown"])) == 1


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    meter = Meter()
    for done in range(0, 11):
        meter("x.bin", done * 2**20, 10 * 2**20)
    assert capsys.readouterr().err.splitlines() == ["x.bin: 0.0 of 10.0 MiB, 0 %", "x.bin: 10.0 of 10.0 MiB, 100 %"]


# -------------------------------------------------------------------------------------------------------- the house


def test_the_version_is_the_same_everywhere():
    written = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert written is not None and written[1] == lib_portrait.__version__


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned_to_one_version(path):
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r'[\w.-]+==[\w.]+(; python_version (<|>=|==) "3\.\d+")?(\s+#.*)?$', line), line
