"""Embedded corpora: text that comes with every Python interpreter, so training needs no download.

`python_docs` is English (the language reference and the docstrings of the standard library), about 2 MB;
`python_source` is code (the source files of the standard library), about 30 MB. The source files are read, never
imported or run. The documents depend only on the Python version, not on the machine.
"""

import ast
import functools
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


#: Folders and files inside the standard library's folder that are not part of it: installed packages, bytecode, and
#: settings of the machine on which Python was built.
_FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "lib-dynload"})
_FOREIGN_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


class Document(NamedTuple):
    """One document. `name` is the same on every machine and determines the split of the document."""

    name: str
    text: str


def python_docs() -> list[Document]:
    """Return the language reference (one document per topic), then the docstrings (one document per module).

    Returns:
        Documents with distinct names and non-empty texts, in an order that depends only on the Python version.

    Raises:
        ValueError: if this Python was installed without its documentation topics or its source files.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "This Python has no module pydoc_data.topics, from which the dataset 'python-docs' is made; install the "
            "full standard library (on Debian: libpython3-stdlib), or name a text file as the dataset."
        ) from error
    documents = [Document(f"topic/{name}", text.strip()) for name, text in sorted(topics.items())]
    return [document for document in (*documents, *_module_documents()) if document.text]


def python_source() -> list[Document]:
    """Return the source files of the standard library, including its tests, one document per file.

    A few test files that are broken on purpose (not valid in their declared encoding) are left out.

    Raises:
        ValueError: if this Python was installed without its source files.
    """
    documents = (Document(name, _read_source(path)) for name, path in _source_files(skip_tests=False).items())
    return [document for document in documents if document.text.strip()]


@functools.cache  # parsing takes seconds, and each split of the dataset needs all documents
def _module_documents() -> tuple[Document, ...]:
    documents = []
    for file, path in _source_files(skip_tests=True).items():
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        documents.append(Document(f"module/{name}", _documentation(name, _read_source(path))))
    return tuple(documents)


def _source_files(*, skip_tests: bool) -> dict[str, Path]:
    """Return the standard library's `.py` files by relative path in POSIX form, sorted by it."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "ast.py").is_file():
        raise ValueError(
            f"The standard library's source files are not in {str(root)!r} (Python was installed without them); "
            "use a Python that has them, or name a text file as the dataset."
        )
    skipped = _FOREIGN_FOLDERS | _TEST_FOLDERS if skip_tests else _FOREIGN_FOLDERS
    files = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts) and not any(p.startswith(_FOREIGN_PREFIXES) for p in relative.parts):
            files[relative.as_posix()] = path
    return dict(sorted(files.items()))


def _read_source(path: Path) -> str:
    """Return the file's text in its declared encoding; empty if the file is broken on purpose."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _documentation(module: str, source: str) -> str:
    """Return all docstrings of a module, each below its qualified name; empty if there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old source files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or a file that is broken on purpose
        return ""
    return "\n\n".join(f"{heading}\n\n{docstring}" for heading, docstring in _docstrings(tree, module))


def _docstrings(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a module or class and of everything that it defines, in source order."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"{name}.{child.name}({ast.unparse(child.args)})", docstring
