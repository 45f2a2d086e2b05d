"""What a machine can check of the house style, so that people need not.

Rules: a complaint names the place and shows the fix. Every rule is a ratchet: where today's code
has a reason to depart, the place is listed below with its reason, and the list may only shrink; an
entry that is no longer needed is itself a complaint. Line length, import order and the like are
ruff's; types are mypy's; who may import whom is import-linter's (pyproject.toml).
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 800
FILE_BYTES_MAX = 1 << 20

LONG_FUNCTIONS: dict[str, int] = {}
"""Functions that may be longer, `path:name` to lines; none may grow, and a shorter one says so."""

LONG_FILES: dict[str, int] = {}
"""Files that may be longer, likewise."""

CLOCK_READERS = (
    "services/runtime",  # the one clock of the services
    "services/nodeagent/warden",  # ends leases though everything else hangs
    "services/nodeagent/devices",  # worker programs measure what they tear down
    "protos/grafos_proto/wire/ttrpc",  # the deadlines of a socket, which gRPC keeps by itself
    "sdk/grafos/_clock.py",  # the one clock of the SDK
    "sdk/grafos/_identity_socket.py",  # bounds how long a silent peer may hold a connection
    "protos/grafos_proto/wire/identity.py",  # bounds how long it waits for an answer
)
"""Product files, by the beginning of their path, that may read a clock."""

SLEEPERS = (
    "services/runtime",
    "sdk/grafos/_clock.py",
    "tests/integration/",
    "tests/bench/",
    "tests/chaos/",
)
"""Files that may wait for real time to pass."""

BROAD_EXCEPTS = (
    "services/runtime",  # maps what is foreign at the edge of every call
    "sdk/grafos/",  # round a user's callback
    "tests/",
    "tools/",
)
"""Files that may catch whatever there is."""

SHAPELESS_NAMES = frozenset({"utils", "util", "common", "manager", "base", "helpers", "misc"})
PRODUCT = ("core/", "protos/", "services/", "sdk/")
# Written apart, so that this file does not complain about itself.
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
SOMEBODYS_PATH = re.compile(r"(?<![\w.])/(?:home/\w|ro" + r"ot/|wo" + r"rk/|Us" + r"ers/\w)")
CLOCK_NAMES = frozenset(
    f"{name}{unit}"
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    for unit in ("", "_ns")
) | {"clock_gettime", "clock_gettime_ns"}
DATETIME_CLOCKS = frozenset({"now", "utcnow", "today"})


@dataclass(frozen=True)
class File:
    """One committed file; what is derived from it is made once."""

    path: str
    """From the repository's root, with slashes."""
    data: bytes = field(repr=False)

    @cached_property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @property
    def is_generated(self) -> bool:
        return "_pb2" in Path(self.path).name or Path(self.path).name == "uv.lock"

    @property
    def is_text(self) -> bool:
        return b"\0" not in self.data[:8192] and not self.is_generated

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py") and not self.is_generated

    @property
    def is_product(self) -> bool:
        return self.path.startswith(PRODUCT) and self.is_python

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.path}:{node.lineno}"


Node = TypeVar("Node", bound=ast.AST)

Find = Callable[[list[File]], Iterator[str]]
"""Looks at every file; yields where a rule is broken, with what was seen."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that holds everywhere, and what to do where it does not."""

    name: str
    fix: str
    find: Find


def functions_are_short(files: list[File]) -> Iterator[str]:
    seen = {}
    for file in (file for file in files if file.is_python):
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                seen[f"{file.path}:{node.name}"] = lines
    yield from _ratchet(seen, LONG_FUNCTIONS, FUNCTION_LINES_MAX, "LONG_FUNCTIONS")


def files_are_short(files: list[File]) -> Iterator[str]:
    seen = {file.path: len(file.lines) for file in files if file.is_python}
    yield from _ratchet(seen, LONG_FILES, FILE_LINES_MAX, "LONG_FILES")


def _ratchet(seen: dict[str, int], listed: dict[str, int], most: int, where: str) -> Iterator[str]:
    for name, lines in seen.items():
        if lines > listed.get(name, most):
            yield f"{name} has {lines} lines, allowed are {listed.get(name, most)}"
    for name, lines in listed.items():
        now = seen.get(name, 0)
        if now < lines:
            yield f"{name} has {now} lines: lower its entry in {where}, or strike it out"


def names_say_what_is_inside(files: list[File]) -> Iterator[str]:
    for file in files:
        parts = [part.split(".")[0].lstrip("_") for part in file.path.split("/")]
        if SHAPELESS_NAMES.intersection(parts):
            yield file.path


def nothing_is_left_for_later(files: list[File]) -> Iterator[str]:
    yield from _matching(files, UNFINISHED)


def no_path_of_somebodys_machine(files: list[File]) -> Iterator[str]:
    yield from _matching(files, SOMEBODYS_PATH)


def _matching(files: list[File], pattern: re.Pattern[str]) -> Iterator[str]:
    for file in (file for file in files if file.is_text):
        for number, line in enumerate(file.lines, start=1):
            if pattern.search(line):
                yield f"{file.path}:{number}: {line.strip()[:80]}"


def imports_are_absolute(files: list[File]) -> Iterator[str]:
    for file, node in _nodes(files, ast.ImportFrom):
        if node.level:
            yield file.at(node)


def modules_say_what_they_are(files: list[File]) -> Iterator[str]:
    for file in (file for file in files if file.is_python):
        if file.tree.body and not ast.get_docstring(file.tree):
            yield file.path


def only_the_runtime_reads_a_clock(files: list[File]) -> Iterator[str]:
    for place, name in _time_uses(files):
        if name != "sleep" and place.startswith(PRODUCT) and not place.startswith(CLOCK_READERS):
            yield f"{place}: time.{name}"
    for file, node in _nodes(files, ast.Attribute):
        if (
            file.is_product
            and node.attr in DATETIME_CLOCKS
            and isinstance(node.value, ast.Name)
            and node.value.id in {"datetime", "date"}
            and not file.path.startswith(CLOCK_READERS)
        ):
            yield f"{file.at(node)}: {node.value.id}.{node.attr}"


def nothing_sleeps(files: list[File]) -> Iterator[str]:
    for place, name in _time_uses(files):
        if name == "sleep" and not place.startswith(SLEEPERS):
            yield place


def _time_uses(files: list[File]) -> Iterator[tuple[str, str]]:
    """Every use of a clock or of sleep by its module `time`, however it was imported."""
    wanted = CLOCK_NAMES | {"sleep"}
    for file, node in _nodes(files, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "time" and node.attr in wanted:
            yield file.at(node), node.attr
    for file, imported in _nodes(files, ast.ImportFrom):
        if imported.module == "time":
            yield from (
                (file.at(imported), name.name) for name in imported.names if name.name in wanted
            )


def exceptions_are_caught_by_name(files: list[File]) -> Iterator[str]:
    for file in (file for file in files if file.is_python):
        if file.path.startswith(BROAD_EXCEPTS):
            continue
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                yield f"{file.path}:{node.lineno}"


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(part) for part in caught.elts)
    return caught is None or (
        isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"}
    )


def test_folders_are_packages(files: list[File]) -> Iterator[str]:
    paths = {file.path for file in files}
    folders = {path.rpartition("/")[0] for path in paths if re.match(r"tests/.*\.py$", path)}
    yield from sorted(folder for folder in folders if f"{folder}/__init__.py" not in paths)


def fakes_not_mocks(files: list[File]) -> Iterator[str]:
    for file, node in _nodes(files, ast.ImportFrom):
        if (node.module or "").startswith("unittest"):
            yield file.at(node)
    for file, plain in _nodes(files, ast.Import):
        if any(name.name.startswith("unittest") for name in plain.names):
            yield file.at(plain)


def needs_are_stated(files: list[File]) -> Iterator[str]:
    for file, node in _nodes(files, ast.Call):
        if file.path != "tests/requirements.py" and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            if called in {"pytest.skip", "pytest.importorskip"}:
                yield f"{file.at(node)}: {called}"


def files_are_small(files: list[File]) -> Iterator[str]:
    for file in files:
        if len(file.data) >= FILE_BYTES_MAX:
            yield f"{file.path} has {len(file.data)} bytes"


def links_between_documents_resolve(files: list[File]) -> Iterator[str]:
    documents = {file.path: file for file in files if file.path.endswith(".md")}
    paths = {file.path for file in files}
    folders = {str(parent) for path in paths for parent in Path(path).parents}
    for file in documents.values():
        for number, target in _links(file):
            path, _, anchor = target.partition("#")
            goal = _joined(file.path, path) if path else file.path
            if goal not in paths and goal not in folders:
                yield f"{file.path}:{number}: {target}"
            elif anchor and goal in documents and anchor not in _anchors(documents[goal]):
                yield f"{file.path}:{number}: {target} (no such heading)"


def _prose(file: File) -> Iterator[tuple[int, str]]:
    """The lines of a document that are no code, from 1."""
    fenced = False
    for number, line in enumerate(file.lines, start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, re.sub(r"`[^`]*`", "", line)


def _links(file: File) -> Iterator[tuple[int, str]]:
    for number, line in _prose(file):
        for target in re.findall(r"\]\(<?([^)\s>]+)", line):
            if not re.match(r"[a-z]+:", target):
                yield number, target


def _joined(document: str, link: str) -> str:
    parts: list[str] = []
    for part in [*document.split("/")[:-1], *link.split("/")]:
        if part == "..":
            parts = parts[:-1] if parts else [".."]
        elif part not in {"", "."}:
            parts.append(part)
    return "/".join(parts) or "."


def _anchors(document: File) -> set[str]:
    found = set()
    for line in document.lines:
        if match := re.match(r"#+\s+(.*)", line):
            heading = re.sub(r"[^\w\- ]", "", match[1].strip().lower())
            found.add(heading.replace(" ", "-"))
    return found


def _nodes(files: list[File], kind: type[Node]) -> Iterator[tuple[File, Node]]:
    for file in (file for file in files if file.is_python):
        for node in ast.walk(file.tree):
            if isinstance(node, kind):
                yield file, node


RULES = (
    Rule(
        "functions are short",
        f"take a step out and name it; {FUNCTION_LINES_MAX} lines are a screenful",
        functions_are_short,
    ),
    Rule("files are short", "one idea, one file: move the second idea out", files_are_short),
    Rule(
        "names say what is inside",
        f"call it after what it does, not one of: {', '.join(sorted(SHAPELESS_NAMES))}",
        names_say_what_is_inside,
    ),
    Rule(
        "nothing is left for later",
        "do it, or describe what is missing in docs/DESIGN.md",
        nothing_is_left_for_later,
    ),
    Rule(
        "no path of somebody's machine",
        "take the path as an argument, from XDG variables or from the file's own place",
        no_path_of_somebodys_machine,
    ),
    Rule(
        "imports are absolute",
        "write from services.ledger.store import …, not from .store",
        imports_are_absolute,
    ),
    Rule(
        "modules say what they are",
        "begin with a docstring: a sentence a layman follows, then the rules",
        modules_say_what_they_are,
    ),
    Rule(
        "only the runtime reads a clock",
        "take now_ms as an argument, or the clock of services/runtime as a constructor argument",
        only_the_runtime_reads_a_clock,
    ),
    Rule(
        "nothing sleeps",
        "let the tick loop of services/runtime wait, or wait on an event with a bound",
        nothing_sleeps,
    ),
    Rule(
        "exceptions are caught by name",
        "name what can be raised; whatever else is mapped in services/runtime",
        exceptions_are_caught_by_name,
    ),
    Rule("test folders are packages", "add an empty __init__.py", test_folders_are_packages),
    Rule(
        "fakes, not mocks",
        "use the real thing with its I/O end replaced; monkeypatch for the environment",
        fakes_not_mocks,
    ),
    Rule(
        "needs are stated",
        'say @pytest.mark.requires("etcd") or require("etcd"), so that the gate sees it',
        needs_are_stated,
    ),
    Rule("files are small", "make it when it is needed, by a committed program", files_are_small),
    Rule(
        "links between documents resolve",
        "correct the path or the heading",
        links_between_documents_resolve,
    ),
)


def committed(root: Path) -> list[File]:
    """Every file of the repository that git does not ignore; every file where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        check=False,
    )
    if listing.returncode == 0 and (root / ".git").exists():
        names = sorted(set(listing.stdout.decode().split("\0")) - {""})
    else:
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if not {".venv", "__pycache__"}.intersection(path.parts)
        )
    paths = [(name, root / name) for name in names]
    return [
        File(name, path.read_bytes())
        for name, path in paths
        if path.is_file() and not path.is_symlink()
    ]


def complaints(rule: Rule, files: list[File]) -> list[str]:
    """Where a rule is broken, each with its fix."""
    return [f"{found}\n    {rule.name}: {rule.fix}" for found in rule.find(files)]


def main() -> int:
    files = committed(Path(__file__).resolve().parent.parent)
    found = [line for rule in RULES for line in complaints(rule, files)]
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
