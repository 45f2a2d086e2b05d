"""The core works without an operating system: no clock, file, socket, thread, signal or chance.

The wall is in wall.py. Every module of the core is imported behind it, and every golden script
whose interpreter stands in `tests/core/<name>_script.py` is replayed there.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CORE = ROOT / "core"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources_below(folder: Path, root: Path, pattern: str = "*.py") -> dict[str, str]:
    return {module_name(path, root): path.read_text() for path in sorted(folder.rglob(pattern))}


def behind_wall(
    sources: dict[str, str], imports: list[str], scripts: list[dict[str, str]] | None = None
) -> dict[str, str]:
    """What went wrong behind the wall, by module or script; empty when nothing did."""
    task: dict[str, Any] = {"sources": sources, "imports": imports, "scripts": scripts or []}
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(HERE / "wall.py")],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    return answer


def golden_scripts() -> list[dict[str, str]]:
    found = []
    for interpreter in sorted(HERE.glob("*_script.py")):
        name = interpreter.stem.removesuffix("_script")
        for path in sorted((HERE / "testdata" / name).glob("*.txt")):
            label = path.relative_to(HERE).as_posix()
            module = f"tests.core.{interpreter.stem}"
            found.append({"module": module, "path": label, "text": path.read_text()})
    return found


def test_every_module_of_the_core_can_be_imported_without_an_operating_system() -> None:
    sources = sources_below(CORE, CORE)
    assert "grafos_core.failure" in sources
    wrong = behind_wall(sources, list(sources))
    assert not wrong, "\n".join(f"{name}:\n{what}" for name, what in wrong.items())


def test_the_golden_scripts_of_the_core_hold_without_an_operating_system() -> None:
    sources = sources_below(CORE, CORE) | sources_below(HERE, ROOT, "*_script.py")
    sources["tests.golden"] = (ROOT / "tests" / "golden.py").read_text()
    wrong = behind_wall(sources, [], golden_scripts())
    assert not wrong, "\n".join(f"{name}:\n{what}" for name, what in wrong.items())


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import sys",
        "import time",
        "import socket",
        "import threading",
        "import _thread",
        "import posix",
        "import select",
        "import signal",
        "import random",
        "import io",
        "import asyncio",
        "from importlib import import_module",
        "import os.path as p",
        "def late():\n    from time import monotonic\n    return monotonic()\nlate()",
        "__import__('subprocess')",
        "open('/dev/null')",
        "print('hello')",
        "import grpc",
        "import tests.conftest",
    ],
)
def test_the_wall_refuses_what_reaches_outside(source: str) -> None:
    wrong = behind_wall({"probe": source}, ["probe"])
    assert "outside the wall" in wrong["probe"]


def test_behind_the_wall_the_pure_parts_of_the_standard_library_work() -> None:
    source = """
import hashlib, json, re
from dataclasses import dataclass, replace
from enum import Enum
from typing import NewType, Protocol, get_type_hints

Id = NewType("Id", int)

class Kind(Enum):
    MEMORY = "memory"

@dataclass(frozen=True, slots=True)
class Lease:
    id: Id
    kind: Kind = Kind.MEMORY

assert replace(Lease(Id(1)), id=Id(2)).id == 2
assert get_type_hints(Lease)["kind"] is Kind
assert hashlib.sha256(b"").hexdigest().startswith("e3b0")
assert json.loads(json.dumps({"a": 1})) == {"a": 1} and re.fullmatch("a+", "aa")
"""
    assert behind_wall({"probe": source}, ["probe"]) == {}


def test_a_golden_script_whose_answer_changed_fails_behind_the_wall_too() -> None:
    sources = {
        "tests.golden": (ROOT / "tests" / "golden.py").read_text(),
        "tests.core.echo_script": "def interpreter():\n    return str.upper\n",
    }
    good = {"module": "tests.core.echo_script", "path": "good", "text": "a\n----\nA\n"}
    bad = good | {"path": "bad", "text": "a\n----\nB\n"}
    wrong = behind_wall(sources, [], [good, bad])
    assert set(wrong) == {"bad"}
    assert "answered now\nA" in wrong["bad"]
