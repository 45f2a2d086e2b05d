"""A place of its own for each test's fabric, and the command as people type it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that is short enough for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="grafos-cli-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cli(place: Path) -> Cli:
    """Runs `grafos …` as a process, in folders of the test's own."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("GRAFOS_")
    } | {
        "GRAFOS_STATE_DIR": str(place / "state"), "GRAFOS_RUN_DIR": str(place / "run"),
        "XDG_CONFIG_HOME": str(place / "config"), "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }  # fmt: skip

    def run(*words: str, timeout_s: float = 60, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "grafos._cli", *words],
            capture_output=True, text=True, timeout=timeout_s, check=False, cwd=place,
            env=environment | more,
        )  # fmt: skip

    return run
