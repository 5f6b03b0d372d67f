"""Who may import whom: the table of docs/architecture.md, read off the syntax trees of all files.

A module that is named in a string is as good as imported: as an entry of a table, by importlib, after `-m`, in code for
another Python. Docstrings may name what they like; other prose may name packages, and the command `portrait.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import portrait
from lib_portrait.methods.declarations import Declaration, declarations

ROOT = Path(__file__).resolve().parents[2]
OWN = ("lib_portrait", "benchmarks", "scripts", "trainer", "tests")
HOST = {"modules", "gradio", "ldm", "sgm", "k_diffusion", "networks"}


@dataclasses.dataclass(frozen=True)
class Room:
    """What the files of one place may import beside the standard library and their own place.

    packages: from outside. own: other places of this project, by the start of their dotted name; a place inside of
    another of this table is one of its own. named: what strings may name beside these.
    """

    packages: str = ""
    own: str = ""
    named: str = ""


SERIALISED = "torch safetensors"
PICTURES = "numpy cv2 PIL"
WEBUI = Room(
    "modules gradio ldm sgm k_diffusion networks fastapi starlette pydantic torch numpy PIL",
    "lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.infotext lib_portrait.attention "
    "lib_portrait.faces lib_portrait.checkpoints lib_portrait.methods lib_portrait.methods.declarations "
    "lib_portrait.guidance lib_portrait.guidance.options lib_portrait.conditioning lib_portrait.routing_picture "
    "lib_portrait.guidance_picture lib_portrait.control_picture",
)
ROOMS = {
    "portrait": Room(
        own="lib_portrait.errors", named="lib_portrait.commands trainer.commands benchmarks.command tests.command"
    ),
    "install": Room(),
    "scripts": Room("modules gradio", "lib_portrait.webui lib_portrait.webui.panel"),
    "benchmarks": Room(
        "torch numpy einops ldm omegaconf diffusers transformers safetensors",
        "lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.attention lib_portrait.faces "
        "lib_portrait.methods lib_portrait.methods.declarations lib_portrait.guidance lib_portrait.guidance.options "
        "lib_portrait.standalone trainer",
    ),
    "tests.command": Room(),
    "trainer": Room(
        f"{SERIALISED} {PICTURES} accelerate diffusers transformers tqdm torchvision ray",
        "lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.attention lib_portrait.faces "
        "lib_portrait.checkpoints lib_portrait.methods lib_portrait.methods.declarations lib_portrait.picture_files "
        "lib_portrait.routing_picture lib_portrait.control_picture lib_portrait.standalone trainer.world",
    ),
    "trainer.commands": Room(own="lib_portrait.methods.declarations trainer trainer.evaluation"),
    "trainer.evaluation": Room(
        f"{SERIALISED} {PICTURES} diffusers transformers tqdm open_clip facenet_pytorch",
        "lib_portrait.errors lib_portrait.request lib_portrait.attention lib_portrait.faces lib_portrait.checkpoints "
        "lib_portrait.methods lib_portrait.methods.declarations lib_portrait.options lib_portrait.conditioning "
        "lib_portrait.control_picture lib_portrait.routing_picture lib_portrait.guidance lib_portrait.guidance.options "
        "lib_portrait.standalone trainer.architectures trainer.attribute_network "
        "trainer.features trainer.photos trainer.shards trainer.world",
    ),
    "trainer.world": Room("numpy skia cv2 PIL", "lib_portrait.errors trainer.world"),
    "lib_portrait": Room(),
    "lib_portrait.errors": Room(),
    "lib_portrait.options": Room(own="lib_portrait.errors"),
    "lib_portrait.request": Room(
        own="lib_portrait.errors lib_portrait.options lib_portrait.guidance.options lib_portrait.methods.declarations"
    ),
    "lib_portrait.infotext": Room(
        own="lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.guidance.options "
        "lib_portrait.methods.declarations"
    ),
    "lib_portrait.attention": Room("torch einops", "lib_portrait.errors"),
    "lib_portrait.guidance": Room(
        "torch numpy",
        "lib_portrait.errors lib_portrait.options lib_portrait.attention lib_portrait.faces lib_portrait.methods "
        "lib_portrait.guidance.options",
    ),
    # What is to be known of it where there is no torch.
    "lib_portrait.guidance.options": Room(own="lib_portrait.options"),
    "lib_portrait.checkpoints": Room(
        SERIALISED,
        "lib_portrait.errors lib_portrait.options lib_portrait.guidance.options",
        # The .yaml of a checkpoint is read by the WebUI, which makes the text encoder that it names.
        named="lib_portrait.webui.text_encoder.text_encoder lib_portrait.webui.world.text_encoder",
    ),
    "lib_portrait.faces": Room(
        f"{SERIALISED} {PICTURES} transformers facenet_pytorch insightface onnxruntime",
        "lib_portrait.errors lib_portrait.request lib_portrait.checkpoints lib_portrait.attention "
        "lib_portrait.control_picture",
    ),
    "lib_portrait.methods": Room(
        "torch numpy einops",
        "lib_portrait.errors lib_portrait.options lib_portrait.attention lib_portrait.faces lib_portrait.checkpoints "
        "lib_portrait.control_picture lib_portrait.methods.declarations",
    ),
    # What is to be known of a method where there is no torch.
    "lib_portrait.methods.declarations": Room(
        own="lib_portrait.errors lib_portrait.options lib_portrait.checkpoints", named="lib_portrait.methods"
    ),
    "lib_portrait.conditioning": Room(
        "torch numpy einops",
        "lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.attention lib_portrait.faces "
        "lib_portrait.checkpoints lib_portrait.guidance lib_portrait.guidance.options lib_portrait.methods "
        "lib_portrait.methods.declarations",
    ),
    "lib_portrait.picture_files": Room(),
    "lib_portrait.routing_picture": Room("torch numpy PIL", "lib_portrait.attention"),
    "lib_portrait.control_picture": Room("torch numpy cv2", "lib_portrait.attention"),
    "lib_portrait.guidance_picture": Room(
        "torch numpy PIL", "lib_portrait.attention lib_portrait.guidance lib_portrait.routing_picture"
    ),
    "lib_portrait.standalone": Room(
        f"{SERIALISED} {PICTURES} diffusers transformers yaml",
        "lib_portrait.errors lib_portrait.request lib_portrait.attention lib_portrait.faces lib_portrait.checkpoints "
        "lib_portrait.methods lib_portrait.methods.declarations lib_portrait.guidance lib_portrait.guidance.options "
        "lib_portrait.conditioning lib_portrait.routing_picture lib_portrait.guidance_picture "
        "lib_portrait.control_picture",
    ),
    "lib_portrait.commands": Room(
        own="lib_portrait.errors lib_portrait.options lib_portrait.request lib_portrait.picture_files "
        "lib_portrait.checkpoints lib_portrait.guidance.options lib_portrait.methods.declarations "
        "lib_portrait.standalone"
    ),
    "lib_portrait.webui": WEBUI,
    # A door: only what builds the host's interface goes through it.
    "lib_portrait.webui.panel": dataclasses.replace(WEBUI, own=f"{WEBUI.own} lib_portrait.webui"),
}
HEAVY = {"cv2", "transformers", "insightface", "onnxruntime", "facenet_pytorch", "open_clip", "diffusers"}


def sources() -> list[Path]:
    files = [ROOT / "portrait.py", ROOT / "install.py", ROOT / "tests" / "command.py"]
    for folder in ("scripts", "benchmarks", "lib_portrait", "trainer"):
        files += sorted((ROOT / folder).rglob("*.py"))
    return files


def dotted(path: Path) -> str:
    """The module's name, as if the project's folder was on the path."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The place of the table that a module belongs to: the longest of its prefixes there."""
    names = module.split(".")
    prefixes = (".".join(names[:length]) for length in range(len(names), 0, -1))
    name = next((prefix for prefix in prefixes if prefix in ROOMS), None)
    if name is None or (name == "lib_portrait" and module != name):
        raise AssertionError(f"{module} has no place in the table of {Path(__file__).name}")
    return name


_OWN = rf"(?:{'|'.join(OWN)})"
# A module as a whole string: its dotted name, the start of one that is put together, an entry point, or its file.
MODULE = re.compile(rf"({_OWN}(?:\.\w+)+|{_OWN}\.(?:\w+\.)*)(?::\w+)?")
FILE = re.compile(rf"(?:\./)?({_OWN}(?:[/\\]\w+)+)\.py")
# Inside of a longer string: in a shell's command, or in statements.
RUN = re.compile(rf"(?:^|\s)-m\s+({_OWN}\b[\w.]*)")
IMPORT = re.compile(rf"(?:^|[;\n])\s*(?:import\s+(?:[\w.]+\s*,\s*)*|from\s+)({_OWN}\b[\w.]*)")
IMPORTERS = {"import_module", "__import__", "find_spec", "run_module", "resolve_name"}


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[str]:
    """Dotted names of everything imported anywhere below `tree`, also by importlib with a literal name.

    `from a import b` counts as a.b: b may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in IMPORTERS:
                yield str(node.args[0].value)


def named(tree: ast.AST) -> Iterator[str]:
    """Dotted names of this project's modules in strings below `tree`, but for docstrings: strings that stand alone."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.List, ast.Tuple, ast.Call)):
            words = node.args if isinstance(node, ast.Call) else node.elts
            values = [word.value if isinstance(word, ast.Constant) else None for word in words]
            # A package's bare name is a word like others, but for where it is run.
            yield from (str(value) for flag, value in itertools.pairwise(values) if flag == "-m" and value in OWN)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            text = node.value.strip()
            if (whole := MODULE.fullmatch(text)) is not None:
                yield whole[1].rstrip(".")
            if (file := FILE.fullmatch(text)) is not None:
                yield re.sub(r"[/\\]", ".", file[1])
            yield from (name.rstrip(".") for inside in (RUN, IMPORT) for name in inside.findall(text))


def offences(source: str, module: str, package: bool = False) -> list[str]:
    """What a file imports, or names in strings, that its place in the table does not allow."""
    room = room_of(module)
    tree = ast.parse(source)
    packages = {*ROOMS[room].packages.split(), *sys.stdlib_module_names}
    own = {room, *ROOMS[room].own.split()}
    # The package itself is its version number, which everybody may tell.
    found = [
        name
        for name in imports(tree, module, package)
        if not (within(name, own) or name == "lib_portrait.__version__" or name.split(".")[0] in packages)
    ]
    return found + [name for name in named(tree) if not within(name, own | set(ROOMS[room].named.split()))]


def within(name: str, places: set[str]) -> bool:
    """Whether a module, or something in one, belongs to the places, and not to another place that lies inside them."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in ROOMS or prefix in places), None) in places


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_imports_only_what_its_place_may(path):
    assert offences(path.read_text(encoding="utf-8"), dotted(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("lib_portrait.faces.detection", "from modules import shared", ["modules.shared"]),
        ("lib_portrait.faces.detection", "def f():\n    import gradio", ["gradio"]),
        ("lib_portrait.faces.detection", "import importlib\nimportlib.import_module('ldm.util')", ["ldm.util"]),
        ("lib_portrait.webui.panel", "import diffusers", ["diffusers"]),
        ("lib_portrait.request", "import torch", ["torch"]),
        ("lib_portrait.attention.sites", "from lib_portrait import methods", ["lib_portrait.methods"]),
        ("lib_portrait.attention.sites", "from ..methods import uniportrait", ["lib_portrait.methods.uniportrait"]),
        ("lib_portrait.conditioning", "import lib_portrait.webui.panel", ["lib_portrait.webui.panel"]),
        ("trainer.recipes.attributes", "import trainer.evaluation.run", ["trainer.evaluation.run"]),
        ("lib_portrait.commands.train", "from trainer import loop", ["trainer.loop"]),
        ("lib_portrait.commands.bench", "def f():\n    import benchmarks", ["benchmarks"]),
        ("lib_portrait.webui.session", "from lib_portrait.webui import panel", ["lib_portrait.webui.panel"]),
        ("lib_portrait.webui.session", "from .panel import build", ["lib_portrait.webui.panel.build"]),
        ("install", "import lib_portrait.errors", ["lib_portrait.errors"]),
        ("portrait", "from lib_portrait import checkpoints", ["lib_portrait.checkpoints"]),
        ("scripts.portrait", "from lib_portrait import conditioning", ["lib_portrait.conditioning"]),
        ("lib_portrait.attention.sites", "from .rows import mark\nimport torch, math", []),
        ("lib_portrait.webui.panel", "from modules import shared\nfrom lib_portrait import request", []),
    ],
)
def test_the_check_catches_what_it_is_for(module, source, caught):
    assert offences(source, module) == caught


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ('importlib.import_module("trainer.loop")', ["trainer.loop"]),
        ('importlib.import_module("trainer")', ["trainer"]),
        ('importlib.import_module(f"trainer.recipes.{name}")', ["trainer.recipes"]),
        ('importlib.import_module("trainer." + name)', ["trainer"]),
        (
            'COMMANDS = {"train": "trainer.commands", "bench": "benchmarks.command"}',
            ["trainer.commands", "benchmarks.command"],
        ),
        ('DOORS = ["trainer.loop:train"]', ["trainer.loop"]),
        ('sys.modules["benchmarks.step"].main([])', ["benchmarks.step"]),
        ('subprocess.run([sys.executable, "-m", "trainer.release"])', ["trainer.release"]),
        ('subprocess.run([sys.executable, "-m", "benchmarks"])', ["benchmarks"]),
        ('os.execl(python, python, "-m", "trainer")', ["trainer"]),
        ('subprocess.run([sys.executable, "trainer/release.py"])', ["trainer.release"]),
        ('os.system("python -m trainer.release --vae x")', ["trainer.release"]),
        ('os.system(f"{sys.executable} -m trainer.world sheet")', ["trainer.world"]),
        ('subprocess.run([python, "-c", "import sys, trainer.loop"])', ["trainer.loop"]),
        ('exec("x = 1; from trainer.loop import train")', ["trainer.loop"]),
        ('exec(f"from trainer.{name} import train")', ["trainer"]),
        ('def f():\n    "Like `python -m trainer.world`, see trainer.loop."', []),
        ('"""trainer.loop"""', []),
        (
            'raise PortraitError("x", "it is missing", "Run: portrait.py train uniportrait, portrait.py bench step.")',
            [],
        ),
        ('KINDS = ("trainer", "benchmarks")', []),
        ('text = f"weights from trainer {name}, see trainer/README.md"', []),
    ],
)
def test_modules_named_in_strings_are_caught_and_prose_is_not(code, caught):
    assert set(offences("import importlib, os, subprocess, sys\n" + code, "lib_portrait.standalone.generation")) == set(
        caught
    )


def test_what_a_place_may_name_in_strings_it_may_not_import():
    table = 'TABLE = {"train": "trainer.commands.train"}'
    assert offences(table, "portrait") == []
    assert offences("import trainer.commands.train", "portrait") == ["trainer.commands.train"]
    assert offences(table.replace("commands.train", "loop"), "portrait") == ["trainer.loop"]


def test_a_new_place_must_be_entered_in_the_table():
    with pytest.raises(AssertionError, match=r"lib_portrait\.novelty has no place"):
        room_of("lib_portrait.novelty")


def test_only_webui_and_scripts_may_import_the_host():
    allowed = {name for name, room in ROOMS.items() if HOST & set(room.packages.split())}
    # The bench measures the genuine ldm UNet of stable-diffusion-sdkit, which is no host.
    assert allowed == {"scripts", "lib_portrait.webui", "lib_portrait.webui.panel", "benchmarks"}
    assert HOST & set(ROOMS["benchmarks"].packages.split()) == {"ldm"}


HOOKS = re.compile("lllite|ipadapter|_hacks", re.IGNORECASE)


def test_one_file_alone_knows_what_other_extensions_hang_onto_layers():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if any(re.fullmatch(r"\w+", word) and HOOKS.search(word) for word in words(path.read_text(encoding="utf-8")))
    }
    assert found - {"lib_portrait/webui/session.py"} == {"lib_portrait/webui/hooks.py"}


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; what only a type checker reads is left out."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                pending += node.body
            pending += getattr(node, "orelse", [])
            for handler in getattr(node, "handlers", []):
                pending += handler.body
        elif isinstance(node, ast.ClassDef):
            pending += node.body
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def imported_at_start(start: list[str]) -> dict[str, str]:
    """Every module that importing the `start` modules imports: its name, and through which file it came."""
    paths = {dotted(path): path for path in sources()}
    found = dict.fromkeys(start, "the start")
    pending = list(start)
    while pending:
        module = pending.pop()
        path = paths.get(module)
        if path is None:
            continue
        for statement in top_level(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imports(statement, module, path.name == "__init__.py"):
                parts = name.split(".")
                for length in range(1, len(parts) + 1):
                    prefix = ".".join(parts[:length])
                    if prefix not in found:
                        found[prefix] = module
                        pending.append(prefix)
    return found


def test_the_webui_starts_without_what_is_heavy():
    """The statements at the top of scripts/portrait.py and of all it imports, followed through the whole project."""
    found = imported_at_start([dotted(path) for path in (ROOT / "scripts").glob("*.py")])
    assert any(name.startswith("lib_portrait.webui") for name in found)
    assert {name: through for name, through in found.items() if name.split(".")[0] in HEAVY} == {}


def test_the_commands_parse_on_a_bare_machine():
    found = imported_at_start(["portrait", *portrait.COMMANDS.values()])
    bare = {*sys.stdlib_module_names, "portrait", *OWN}
    assert {name for name in found if name.split(".")[0] not in bare} == set()


def test_importing_the_doors_of_the_packages_imports_nothing_heavy():
    code = (
        "import lib_portrait.request, lib_portrait.errors, lib_portrait.checkpoints, lib_portrait.faces, sys;"
        f"print(*sorted({HEAVY | {'torch'}!r} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


# ------------------------------------------------------------------------------------------------------------- methods


def names_of_methods() -> re.Pattern[str]:
    """Finds the methods' names and titles as words, also inside of identifiers: not "fusion" in "diffusion".

    The name of the one without weights is a word of English, of which its title alone is told.
    """
    titles = [rf"(?<![A-Z]){one.title}(?![a-z])" for one in declarations()]
    names = [
        part
        for one in adapted()
        for part in (rf"(?<![A-Za-z]){one.name}(?![a-z])", rf"(?<![A-Z]){one.name.upper()}(?![A-Z])")
    ]
    return re.compile("|".join([*titles, *names]))


def adapted() -> list[Declaration]:
    """The methods with weights of their own."""
    return [one for one in declarations() if one.has_adapter]


def words(source: str) -> Iterator[str]:
    """All identifiers and strings of a file. Docstrings and comments cite papers."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            yield from [node.value] if isinstance(node.value, str) and id(node) not in docstrings else []
        else:
            yield from (value for _, value in ast.iter_fields(node) if isinstance(value, str))


def belongs_to_a_method(path: Path) -> bool:
    """Whether it is a method's own file: its maths and declaration, its recipe, its sizes for the bench."""
    place = path.relative_to(ROOT).as_posix()
    own = (f"{folder}/{one.name}" for one in declarations() for folder in ("trainer/recipes", "benchmarks/methods"))
    return place.startswith(("lib_portrait/methods/", *own))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_but_its_own_files_names_a_method(path):
    if not belongs_to_a_method(path):
        found = names_of_methods()
        assert [word for word in words(path.read_text(encoding="utf-8")) if found.search(word)] == []


@pytest.mark.parametrize("file", ["javascript/portrait.js", "style.css"])
def test_the_page_names_no_method(file):
    assert not names_of_methods().search((ROOT / file).read_text(encoding="utf-8"))


def test_the_check_finds_methods_in_all_that_can_name_one():
    for one in adapted():
        for source in (
            f"import lib_portrait.methods.{one.name}",
            f"from lib_portrait.methods import {one.name} as used",
            f"class {one.title}Panel: pass",
            f"def load_{one.name}(): pass",
            f"run({one.name}=1)",
            f"{one.name.upper()}_FILES = 1",
            f"x.{one.name}",
            f'title = "by {one.title}."',
            f'f"{one.name}-{{name}}"',
        ):
            assert any(names_of_methods().search(word) for word in words(source)), source
    innocent = 'class StableDiffusion: pass\ndiffusion = "confusions of Diffusion"'
    assert not any(names_of_methods().search(word) for word in words(innocent))
