"""Runs the core where there is no operating system, to show that it needs none.

This file is a program of its own, started with `python -I -S`. It takes Python sources as JSON on
its input, then raises a wall: every module outside `ALLOWED` is gone and cannot be imported again,
not by a late import inside a function either, and so are `open`, `input` and `print`. Behind the
wall it imports the given sources, lets them replay their golden scripts, and answers with JSON what
it saw.

Rules: the modules of `ALLOWED` are loaded before the wall goes up and keep what they need inside
themselves; what the core itself asks for is judged. Nothing is found on any path: a module is one
of those allowed, or one of those given, or it does not exist.
"""

import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

ALLOWED = (
    "__future__",
    "abc",
    "base64",
    "binascii",
    "bisect",
    "builtins",
    "collections",
    "collections.abc",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "heapq",
    "hmac",
    "itertools",
    "json",
    "math",
    "operator",
    "re",
    "string",
    "struct",
    "types",
    "typing",
)
"""What the core may import: the pure parts of the standard library, nothing that can act."""

GONE = ("breakpoint", "input", "open", "print")
"""Built-in functions that reach the operating system."""


class Refused(ImportError):
    """Somebody behind the wall asked for what is outside."""


class Wall(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The only finder behind the wall: serves the given sources and refuses everything else."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._packages = {name.rpartition(".")[0] for name in sources} - {""}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec:
        if fullname not in self._sources and fullname not in self._packages:
            raise Refused(f"{fullname} is outside the wall", name=fullname)
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=fullname, is_package=fullname in self._packages
        )

    def exec_module(self, module: ModuleType) -> None:
        source = self._sources.get(module.__name__, "")
        exec(compile(source, module.__name__, "exec"), module.__dict__)


def _gone(*_args: object, **_named: object) -> NoReturn:
    raise Refused("outside the wall: there is no file and no terminal")


def raise_wall(sources: dict[str, str]) -> None:
    """From here on only `ALLOWED` and the given sources exist."""
    for name in ALLOWED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name not in ALLOWED]:
        del sys.modules[name]
    for name in GONE:
        setattr(builtins, name, _gone)
    sys.path.clear()
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [Wall(sources)]


def attempt(act: Callable[[], str]) -> str:
    """What an act says: empty when all was well, else the failure, readable."""
    try:
        return act()
    except Exception:
        return traceback.format_exc()


def _import(name: str) -> str:
    importlib.import_module(name)
    return ""


def _replay(script: dict[str, str]) -> str:
    golden = importlib.import_module("tests.golden")
    interpreter = importlib.import_module(script["module"]).interpreter
    return str(golden.difference(script["text"], interpreter()))


def behind_wall(task: dict[str, Any]) -> dict[str, str]:
    """Import every module asked for, replay every script; answer only what went wrong."""
    raise_wall(task["sources"])
    seen = {name: attempt(lambda name=name: _import(name)) for name in task["imports"]}  # type: ignore[misc]
    for script in task["scripts"]:
        seen[script["path"]] = attempt(lambda script=script: _replay(script))  # type: ignore[misc]
    return {name: what for name, what in seen.items() if what}


if __name__ == "__main__":
    # Taken now: behind the wall there is neither `print` nor a way to import `sys` again.
    tell = sys.stdout.write
    tell(json.dumps(behind_wall(json.loads(sys.stdin.read()))))
