"""The code saved with a model opens and runs nothing; no code unpickles objects."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bd3lm_hf


ROOT = Path(bd3lm_hf.__file__).parent.parent
TRAVELLING = sorted((ROOT / "modeling").glob("*.py"))
ROOMS = [path for room in ("modeling", "bd3lm_hf", "training", "hub_upload") for path in (ROOT / room).rglob("*.py")]

# Modules of the standard library that only compute, and those from which a few harmless names are taken.
COMPUTE = {
    "collections.abc", "contextlib", "copy", "dataclasses", "difflib", "functools", "inspect", "itertools", "math",
    "re", "types", "typing", "warnings", "weakref",
}  # fmt: skip
HARMLESS = {"torch.compile", "torch.jit.is_tracing"}
NAMES_OF = {"os": {"PathLike"}, "threading": {"Lock", "current_thread", "main_thread"}}
# Names through which torch, which itself may be imported, reaches outside.
OUTSIDE_TORCH = {
    "hub", "package", "save", "load", "jit", "multiprocessing", "from_file", "UntypedStorage", "classes",
    "cpp_extension", "export", "serialization",
}  # fmt: skip
BUILTINS = {"open", "eval", "exec", "compile", "__import__", "input", "breakpoint", "globals", "__builtins__"}
# Through these an object of any name reaches a file, a process or another module's code.
METHODS = {
    "open", "read_text", "read_bytes", "write_text", "write_bytes", "write", "unlink", "mkdir", "rmdir", "touch",
    "system", "popen", "urlopen", "connect", "tofile", "fromfile", "import_module", "load_module", "exec_module",
    "__import__", "__subclasses__", "__globals__", "__builtins__", "__code__", "f_globals", "f_locals", "f_builtins",
    "tb_frame", "gi_frame", "load_state_dict_from_url",
    "torch_load", "load_file", "save_file", "hf_hub_download", "snapshot_download", "cached_file",
}  # fmt: skip
HAVE_FIELDS = {"self", "config", "generation_config"}  # whose fields are read by computed names


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{head}.{node.attr}" if (head := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_imports(node: ast.AST) -> Iterator[str]:
    """Yield the forbidden imports of code that is saved with a model."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name not in COMPUTE | {"torch", "transformers"} | NAMES_OF.keys():
                if alias.name.split(".")[0] not in ("torch", "transformers") or outside(alias.name):
                    yield f"import {alias.name}"
            elif alias.asname and alias.name in NAMES_OF:
                yield f"import {alias.name} as {alias.asname}"
    elif isinstance(node, ast.ImportFrom) and not node.level:
        for alias in node.names:
            name, allowed = f"{node.module}.{alias.name}", node.module in COMPUTE
            allowed |= alias.name in NAMES_OF.get(node.module, ())
            allowed |= node.module.split(".")[0] in ("torch", "transformers") and not outside(name)
            if not allowed or alias.name == "*":
                yield f"from {node.module} import {alias.name}"


def outside(name: str) -> bool:
    """Return whether a dotted name in torch or transformers reaches a file, another process or foreign code."""
    library, _, rest = name.partition(".")
    parts = rest.split(".")
    if library == "torch":
        return bool(set(parts) & (OUTSIDE_TORCH | METHODS))
    files = {"dynamic_module_utils", "hub", "pipelines", "trainer", "safetensors_conversion", "agents"}
    return library == "transformers" and (bool(set(parts) & files) or parts[-1] in METHODS)


def forbidden(source: str) -> list[str]:
    """Return everything in a source text that could open, send, run or load something."""
    found = []
    tree = ast.parse(source)
    parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node) in HARMLESS}
    for node in ast.walk(tree):
        found += forbidden_imports(node)
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and id(node) not in parts:
            name = dotted(node)
            head = name.partition(".")[0]
            harmless = head in NAMES_OF and node.attr in NAMES_OF[head]
            if name in HARMLESS:
                continue
            if head.startswith("BD3LM") and node.attr == "__subclasses__":  # the families of decoders
                continue
            if name in ("static_step.__code__", "static_step.__globals__"):  # a copy of a function of ours, to compile
                continue
            if head in NAMES_OF and not harmless or node.attr in METHODS or (name and outside(name)):
                found.append(name or node.attr)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "setattr", "delattr"):
            # A computed name could be any of the above, except on an object that has none of them.
            # A class has no more names than its instances.
            target = node.args[0]
            if isinstance(target, ast.Call) and dotted(target.func) == "type":
                target = target.args[0]
            fields = dotted(target).rpartition(".")[2] in HAVE_FIELDS
            names = {name.value for name in [node.args[1]] if isinstance(name, ast.Constant)}
            if names & (METHODS | BUILTINS) or not (names or fields):
                found.append(ast.unparse(node))
    return found


def unpickles(source: str) -> list[str]:
    """Return calls of a pickle reader, or of torch's without the switch that keeps it to tensors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            error_only = [alias.name for alias in node.names] == ["UnpicklingError"]
            found += [name for name in names if name.split(".")[0] in PICKLES and not error_only]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("torch.load", "np.load", "numpy.load"):
            switch = {"torch.load": ("weights_only", True)}.get(dotted(node.func), ("allow_pickle", False))
            given = [(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)]
            found += [] if switch in given else [dotted(node.func)]
        elif isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "torch_load"):
            found.append(node.attr)
    return found


PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", TRAVELLING, ids=lambda path: path.name)
def test_code_that_travels_opens_and_runs_nothing(path):
    assert not forbidden(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "snippet",
    [
        "open('x')", "f = open", "import pathlib", "from pathlib import Path", "Path('x').write_text('y')",
        "self.file.read_bytes()", "import subprocess", "import os\nos.system('x')",
        "import os\nos.environ['HF_TOKEN']", "import os as harmless", "from os import environ", "import os.path",
        "import socket", "import urllib.request", "from urllib.request import urlopen", "import requests",
        "import httpx", "import numpy", "import pickle", "import io", "import ctypes", "import tempfile",
        "import threading\nthreading.Thread(target=print)", "def f():\n    import shutil", "import importlib",
        "from importlib import import_module", "__import__('os')", "eval('1')", "exec('1')",
        "compile('1', '', 'eval')", "torch.load('x')", "from torch import load",
        "from torch.hub import load_state_dict_from_url", "import torch.hub", "torch.hub.load('x', 'y')",
        "torch.save({}, 'x')", "torch.jit.load('x')", "tensor.numpy().tofile('x')", "torch.from_file('x')",
        "from torch.utils.cpp_extension import load_inline", "from transformers.utils.hub import cached_file",
        "from transformers import pipelines", "jit = torch.jit",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file",
        "getattr(builtins, 'eval')", "getattr(torch, 'lo' + 'ad')", "().__class__.__base__.__subclasses__()",
        "f.__globals__['x']", "frame.f_globals['x']", "globals()['x']", "breakpoint()", "from torch import *",
    ],
)  # fmt: skip
def test_the_checker_finds_what_it_looks_for(snippet):
    assert forbidden(snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "import torch\ntorch.compile(f)", "import os\ndef save(directory: str | os.PathLike): ...",
        "from .noise_bd3lm import check_interval", "from transformers.modeling_utils import PreTrainedModel",
        "from torch.nn.attention.flex_attention import flex_attention", "model.eval()", "re.compile('x')",
        "torch.jit.is_tracing()",
        "self.load_state_dict(state)", "getattr(self.config, name)", "'open is a word in a text'",
    ],
)  # fmt: skip
def test_the_checker_lets_innocent_code_pass(snippet):
    assert not forbidden(snippet)


def test_no_code_unpickles_anything_but_tensors_and_plain_values():
    found = {path.relative_to(ROOT).as_posix(): unpickles(path.read_text(encoding="utf-8")) for path in ROOMS}
    assert not {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle", "from pickle import loads", "import joblib", "torch.load(path)",
        "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "pd.read_pickle(path)",
    ],
)  # fmt: skip
def test_the_check_for_pickles_finds_each_of_them(snippet):
    assert unpickles(snippet)
    assert not unpickles("torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)")
