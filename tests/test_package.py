"""Packaging: rooms that import in one direction, a package that installs in three ways, pins inside their ranges."""

import ast
import configparser
import fnmatch
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bd3lm_hf


ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("modeling", "bd3lm_hf", "hub_upload", "training")  # each may import itself and those before it
PACKAGES = {room: room if room == "bd3lm_hf" else f"bd3lm_hf.{room}" for room in ROOMS}
MODULE = r"bd3lm_hf(\.\w+)+"
# The only imports of a later room, made on demand: for `model.push_to_hub`, and the verbs of the command.
UPWARD = {"bd3lm_hf/auto_classes.py": "bd3lm_hf.hub_upload.push", "bd3lm_hf/cli.py": "bd3lm_hf.*"}
TRAVELS_WITH = {"torch", "transformers"}  # the only libraries that code on the Hub may require


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    """All nodes of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def source_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Every (line, absolute dotted name) that a file of `package` imports, at the top or inside a function."""
    for node in parsed(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(name, package) if node.level else name
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imports_of(room: str) -> Iterator[tuple[Path, int, str]]:
    """Every (file, line, absolute dotted name) that a room imports."""
    for path in source_files(room):
        yield from ((path, line, name) for line, name in imports(path, package_of(path, room)))


def package_of(path: Path, room: str) -> str:
    return ".".join([PACKAGES.get(room, room), *path.parent.relative_to(ROOT / room).parts])


def room_of(name: str) -> str | None:
    """The room of an imported name; None for another library."""
    head, _, rest = name.partition(".")
    if head != "bd3lm_hf":
        return None
    room = rest.partition(".")[0]
    return room if room in ROOMS and room != "bd3lm_hf" else "bd3lm_hf"


def module_strings(path: Path) -> Iterator[tuple[int, str]]:
    """Every (line, text) of a string that names a module of ours, as `importlib.import_module` would take it."""
    for node in parsed(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(MODULE, node.value):
            yield node.lineno, node.value


def upward(room: str) -> set[tuple[str, str]]:
    """The (file, name) of every import of a later room in a room, written as an import or as a string."""
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return {
        (path.relative_to(ROOT).as_posix(), name)
        for path in source_files(room)
        for _, name in [*imports(path, package_of(path, room)), *module_strings(path)]
        if (room_of(name) or room) not in allowed
    }


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_earlier_rooms(room):
    assert source_files(room), f"the room {room}/ is empty"
    found = upward(room)
    assert {(file, name) for file, name in found if not fnmatch.fnmatch(name, UPWARD.get(file, ""))} == set()


def test_every_exception_to_the_order_of_rooms_is_still_needed():
    assert {file for room in ROOMS for file, _ in upward(room)} == set(UPWARD)


def test_modeling_imports_only_torch_transformers_and_the_standard_library():
    others = [found for found in imports_of("modeling") if room_of(found[2]) != "modeling"]
    allowed = TRAVELS_WITH | sys.stdlib_module_names
    assert not [found for found in others if found[2].partition(".")[0] not in allowed]


def test_modeling_imports_its_own_files_in_the_form_that_save_pretrained_follows():
    # `from .x import y` is copied next to the weights; `from . import x` and absolute imports are not.
    wrong = []
    for path in source_files("modeling"):
        for node in parsed(path):
            if isinstance(node, ast.ImportFrom) and node.level and (node.level > 1 or not node.module):
                wrong.append(f"{path.name}:{node.lineno} imports from {'.' * node.level}{node.module or ''}")
        wrong += [(path, line, name) for line, name in imports(path, "here") if name.startswith("bd3lm_hf.")]
    assert not wrong


def test_no_file_in_training_shadows_a_library():
    # `python training/train.py` puts training/ first on the path.
    libraries = set(importlib.metadata.packages_distributions()) | sys.stdlib_module_names
    names = {path.stem for path in (ROOT / "training").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & (libraries - set(ROOMS))


def test_every_room_is_typed_and_modeling_is_flat_and_tests_is_no_package():
    assert [room for room in ROOMS if not (ROOT / room / "py.typed").is_file()] == []
    assert [path for path in (ROOT / "modeling").rglob("*.py") if path.parent != ROOT / "modeling"] == []
    assert not (ROOT / "tests" / "__init__.py").exists() and not (ROOT / "conftest.py").exists()


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def test_setup_cfg_lists_every_package(setup_cfg):
    listed = set(setup_cfg["options"]["packages"].split())
    found = {package_of(path, room) for room in ROOMS for path in source_files(room)}
    assert listed == {name.rstrip(".") for name in found}


def test_every_file_that_is_not_python_is_installed_too(setup_cfg):
    missing = []
    for room in ROOMS:
        patterns = setup_cfg["options.package_data"][PACKAGES[room]].split()
        for path in (ROOT / room).rglob("*"):
            name = path.relative_to(ROOT / room).as_posix()
            if path.is_dir() or path.suffix in (".py", ".pyc") or any(fnmatch.fnmatch(name, p) for p in patterns):
                continue
            missing.append(f"{room}/{name}")
    assert not missing


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def requirements(setup_cfg: configparser.ConfigParser) -> list[Requirement]:
    texts = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    return [Requirement(line) for text in texts for line in text.splitlines() if line]


def test_every_library_that_is_imported_is_required(setup_cfg):
    required = {requirement.name.lower().replace("_", "-") for requirement in requirements(setup_cfg)}
    distributions = importlib.metadata.packages_distributions()
    found = {name.partition(".")[0] for room in ROOMS for _, _, name in imports_of(room) if not room_of(name)}
    for library in found - sys.stdlib_module_names:
        providers = {p.lower().replace("_", "-") for p in distributions.get(library, [library])}
        assert providers & required, f"no requirement provides {library}"


def test_every_requirement_is_a_range_and_pinned_inside_it(setup_cfg):
    pinned = pins()
    assert next(iter(pinned)) == "torch"  # the Makefile installs it first and alone
    for requirement in requirements(setup_cfg):
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside {requirement}"
        assert not {"==", "==="} & {part.operator for part in requirement.specifier}, f"{requirement} binds its user"


def test_the_version_is_written_once(setup_cfg):
    assert setup_cfg["metadata"]["version"] == "attr: bd3lm_hf.__version__"
    assert importlib.metadata.version("bd3lm-hf") == bd3lm_hf.__version__


PUBLIC = {"BD3LMConfig", "BD3LMForMaskedLM", "BD3LMGenerationConfig", "BD3LMModel", "SSDLMConfig", "SSDLMForMaskedLM"}
PUBLIC |= {"SSDLMGenerationConfig", "TokenNLL", "noise_schedule"}


def test_public_names_are_announced_once_and_exist_and_no_other_does():
    assert set(bd3lm_hf.__all__) >= PUBLIC and set(dir(bd3lm_hf)) > PUBLIC
    assert all(getattr(bd3lm_hf, name).__module__.startswith("bd3lm_hf.modeling.") for name in PUBLIC)
    assert [name for name in bd3lm_hf.__all__ if not hasattr(bd3lm_hf, name)] == []
    assert sorted(set(bd3lm_hf.__all__)) == sorted(bd3lm_hf.__all__)
    with pytest.raises(AttributeError, match="'NoSuchModel'"):
        bd3lm_hf.NoSuchModel  # noqa: B018


# Run by a fresh interpreter in a foreign folder; prints where the rooms were found.
PROBE = """
import importlib, importlib.resources, sys
import bd3lm_hf
from bd3lm_hf.modeling.configuration_bd3lm import BD3LMConfig
from bd3lm_hf.modeling.modeling_bd3lm import BD3LMForMaskedLM
from transformers import AutoConfig, AutoModelForMaskedLM

assert bd3lm_hf.BD3LMConfig is BD3LMConfig and bd3lm_hf.BD3LMForMaskedLM is BD3LMForMaskedLM
assert type(AutoConfig.for_model("bd3lm")) is BD3LMConfig
config = BD3LMConfig(vocab_size=8, model_length=8, hidden_dim=8, n_blocks=1, n_heads=1, cond_dim=4)
assert type(AutoModelForMaskedLM.from_config(config)) is BD3LMForMaskedLM
copies = [n for n, m in sys.modules.items() if (getattr(m, "__file__", None) or "").endswith("configuration_bd3lm.py")]
assert copies == ["bd3lm_hf.modeling.configuration_bd3lm"], copies
for room in ("", ".modeling", ".training", ".hub_upload"):
    module = importlib.import_module("bd3lm_hf" + room)
    assert importlib.resources.files(module).joinpath("py.typed").is_file(), room
    print(module.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the package's files in a clone: a build in the real checkout would leave files in it."""
    copy = tmp_path_factory.mktemp("clone")
    for room in ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def fresh_python(tmp_path) -> Path:
    """A separate interpreter that has the libraries of this one, but not our editable install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A folder named in a .pth file is searched, its own .pth files (our editable install) are not run.
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=python.parent)
    assert result.returncode == 0, result.stderr


def locations(python: Path, folder: Path, **environment: str) -> list[Path]:
    """Where a fresh process, started in `folder`, finds the four rooms."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    result = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, cwd=folder, env=variables)
    assert result.returncode == 0, result.stderr
    return [Path(line).parent for line in result.stdout.split()]


def rooms_in(checkout: Path) -> list[Path]:
    return [checkout / "bd3lm_hf", checkout / "modeling", checkout / "training", checkout / "hub_upload"]


@pytest.mark.slow
def test_a_wheel_carries_all_rooms(checkout, fresh_python, tmp_path):
    install(fresh_python, checkout)
    package, *others = locations(fresh_python, tmp_path)
    assert package.is_relative_to(tmp_path / "env")
    assert others == [package / "modeling", package / "training", package / "hub_upload"]
    shipped = {path.relative_to(package) for path in package.rglob("*") if "__pycache__" not in path.parts}
    for room in ROOMS:
        target = Path() if room == "bd3lm_hf" else Path(room)
        files = [p for p in (checkout / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert {target / path.relative_to(checkout / room) for path in files} <= shipped


@pytest.mark.slow
def test_an_editable_install_uses_the_rooms_of_the_checkout(checkout, fresh_python, tmp_path):
    install(fresh_python, "--editable", checkout)
    assert locations(fresh_python, tmp_path) == rooms_in(checkout)


@pytest.mark.slow
def test_a_bare_checkout_needs_only_its_root_on_the_path_and_works_from_it(checkout, fresh_python, tmp_path):
    assert locations(fresh_python, tmp_path, PYTHONPATH=str(checkout)) == rooms_in(checkout)
    assert locations(fresh_python, checkout) == rooms_in(checkout)


# --- what an import costs, by what it leaves in sys.modules ----------------------------------------------------------


def test_the_auto_classes_know_the_models_whichever_module_is_imported_first():
    # Each case is a fork of one process that has imported torch, which takes most of the time.
    forks = """
import os, sys, torch._dynamo, torch.distributed.checkpoint
for first in (
    "import bd3lm_hf",
    "from bd3lm_hf.modeling.modeling_bd3lm import *",
    "import bd3lm_hf, transformers.modeling_layers",
    "import bd3lm_hf.foreign_layouts",
):
    if os.fork():
        assert os.wait()[1] == 0, first
    else:
        exec(first)
        from transformers import AutoModelForMaskedLM, CONFIG_MAPPING
        config = CONFIG_MAPPING["bd3lm"](vocab_size=8, model_length=8, hidden_dim=8, n_blocks=1, n_heads=1)
        model = AutoModelForMaskedLM.from_config(config)
        assert type(model).__module__ == "bd3lm_hf.modeling.modeling_bd3lm"
        assert not {"datasets", "evaluate", "peft", "pyarrow"} & set(sys.modules)
        os._exit(0)
assert "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", forks], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
