"""The house style holds in every committed file, and each rule has been seen to fail.

A rule that never complains proves nothing: for each, a folder with one planted violation must be
reported, with its place and its fix.
"""

from pathlib import Path

import pytest

from tools import tidy

ROOT = Path(__file__).resolve().parent.parent
DOC = '"""A module."""\n'

PLANTED = {
    "functions are short": ("core/a.py", DOC + "def f():\n" + "    g()\n" * 71, "core/a.py:f"),
    "files are short": ("core/a.py", DOC + "x = 1\n" * 801, "core/a.py has 802"),
    "names say what is inside": ("services/utils.py", DOC, "services/utils.py"),
    "nothing is left for later": ("core/a.py", DOC + "# TO" + "DO later\n", "core/a.py:2"),
    "no path of somebody's machine": ("README.md", "see /ho" + "me/ann/x\n", "README.md:1"),
    "imports are absolute": ("core/a.py", DOC + "from .b import c\n", "core/a.py:2"),
    "modules say what they are": ("core/a.py", "x = 1\n", "core/a.py"),
    "only the runtime reads a clock": (
        "services/ledger/server.py",
        DOC + "import time\nnow = time.monotonic_ns()\n",
        "services/ledger/server.py:3: time.monotonic_ns",
    ),
    "nothing sleeps": ("tests/a.py", DOC + "from time import sleep\n", "tests/a.py:2"),
    "exceptions are caught by name": (
        "core/a.py",
        DOC + "try:\n    f()\nexcept (KeyError, Exception):\n    pass\n",
        "core/a.py:4",
    ),
    "test folders are packages": ("tests/core/test_a.py", DOC, "tests/core"),
    "fakes, not mocks": ("tests/a.py", DOC + "from unittest import mock\n", "tests/a.py:2"),
    "needs are stated": ("tests/a.py", DOC + 'import pytest\npytest.skip("no")\n', "tests/a.py:3"),
    "files are small": ("docs/a.bin", "\0" * (1 << 20), "docs/a.bin has 1048576"),
    "links between documents resolve": ("docs/a.md", "[b](../b.md)\n", "docs/a.md:1: ../b.md"),
}

BLAMELESS = {
    "core/grafos_core/__init__.py": "",
    "core/grafos_core/a.py": DOC + "def f(now_ms: int) -> int:\n    return now_ms\n",
    "services/runtime/clock.py": DOC + "import time\ntime.sleep(1)\ntime.monotonic()\n",
    "protos/grafos_proto/v1/a_pb2.py": "x = 1\n" * 900,
    "tests/__init__.py": "",
    "tests/test_a.py": DOC,
    "docs/a.md": "# A title, here\n[a](#a-title-here) [b](../core/grafos_core/a.py)\n`[c](none)`\n",
}


def write(root: Path, files: dict[str, str]) -> list[tidy.File]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tidy.committed(root)


@pytest.fixture(scope="module")
def repository() -> list[tidy.File]:
    """Read and parsed once for all rules."""
    return tidy.committed(ROOT)


@pytest.mark.parametrize("rule", tidy.RULES, ids=lambda rule: rule.name)
def test_the_repository_keeps_the_rule(rule: tidy.Rule, repository: list[tidy.File]) -> None:
    found = tidy.complaints(rule, repository)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("rule", tidy.RULES, ids=lambda rule: rule.name)
def test_a_planted_violation_is_reported_with_its_place_and_its_fix(
    rule: tidy.Rule, tmp_path: Path
) -> None:
    path, text, place = PLANTED[rule.name]
    found = tidy.complaints(rule, write(tmp_path, {path: text}))
    assert len(found) == 1
    assert found[0].startswith(place)
    assert rule.fix in found[0]


def test_blameless_files_are_not_reported(tmp_path: Path) -> None:
    files = write(tmp_path, BLAMELESS)
    assert [line for rule in tidy.RULES for line in tidy.complaints(rule, files)] == []


def test_an_exception_that_is_no_longer_needed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tidy.LONG_FUNCTIONS, "core/a.py:f", 90)
    files = write(tmp_path, {"core/a.py": DOC + "def f():\n    g()\n"})
    rule = next(rule for rule in tidy.RULES if rule.name == "functions are short")
    assert "lower its entry" in tidy.complaints(rule, files)[0]


def test_the_repository_is_read_at_all() -> None:
    assert {"Makefile", "pyproject.toml"} <= {file.path for file in tidy.committed(ROOT)}
