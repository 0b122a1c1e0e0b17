"""Run a function when another library is there: at once if it is imported already, else right after its import."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AfterImport(MetaPathFinder):
    """Let the other finders find a library, and call the action once its loader has executed it."""

    def __init__(self, library: str, action: Callable[[], None]) -> None:
        self.library, self.action = library, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the library, whose loader calls the action; None for every other module."""
        if name != self.library:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        loader.exec_module = exec_module


def after_import(library: str, action: Callable[[], None]) -> None:
    """Call `action` once, as soon as the top-level module `library` is imported.

    A submodule's import begins with that of its library, so the action never meets a half-imported one.
    """
    if library in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(library, action))


__all__ = ["after_import"]
