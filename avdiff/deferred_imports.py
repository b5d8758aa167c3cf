"""Import less of the libraries below, and sooner.

diffusers keeps its packages lazy, but for three: asked for `DiffusionPipeline` alone, it imports
all of its autoencoders, U-Nets and transformers. `defer_imports` makes those lazy as well, in the
way of PEP 562: a name is imported when it is first asked for. Nothing of diffusers is copied or
changed, and what somebody imported before stays as it is. DECISIONS.md has the figures, and what
cannot be deferred.
"""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

EAGER_PACKAGES = (
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)


def defer_imports() -> None:
    """Make the packages above lazy for whoever imports them from now on; a second call does
    nothing.
    """
    if not any(isinstance(finder, DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeferringFinder())


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Modules are objects that stay: the collector walks through all of them again and again while
    thousands are made, and finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class DeferringFinder(MetaPathFinder):
    """Finds the deferred modules as Python would, and hands them to a lazy loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a deferred module, else None: others are found by the usual finders."""
        if fullname not in EAGER_PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = LazyPackageLoader(spec.loader)
        return spec


class LazyPackageLoader(Loader):
    """Runs a package's `__init__.py` as a table of where its names live.

    A package whose `__init__.py` does more than import from its own modules is run as it is.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader of the package would."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with `__getattr__`, `__dir__` and `__all__` in place of its names."""
        homes = None if module.__file__ is None else homes_of_names(Path(module.__file__))
        if homes is None:
            self.loader.exec_module(module)
            return
        namespace = vars(module)
        namespace["__all__"] = sorted(homes)
        namespace["__dir__"] = lambda: sorted({*namespace, *homes, *homes.values()})
        namespace["__getattr__"] = _resolver(module, homes)


def homes_of_names(init: Path) -> dict[str, str] | None:
    """name -> module of the package that defines it, from an `__init__.py` that only re-exports.

    Returns:
        None where the file does anything else, or renames what it imports.
    """
    homes: dict[str, str] = {}
    statements = list(ast.parse(init.read_text(encoding="utf-8")).body)
    while statements:
        statement = statements.pop()
        if isinstance(statement, ast.If):  # `if is_torch_available():`, and torch is
            if statement.orelse:
                return None
            statements += statement.body
        elif isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            if any(alias.asname or alias.name == "*" for alias in statement.names):
                return None
            homes |= {alias.name: statement.module for alias in statement.names}
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            return None
    return homes


def _resolver(module: ModuleType, homes: dict[str, str]) -> Callable[[str], object]:
    """`__getattr__` of a lazy package: its names, and its modules by their own names."""

    def resolve(name: str) -> object:
        if name in homes:
            value = getattr(import_module(f"{module.__name__}.{homes[name]}"), name)
        elif name in homes.values():
            value = import_module(f"{module.__name__}.{name}")
        else:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        vars(module)[name] = value
        return value

    return resolve
