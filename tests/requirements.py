"""What a test needs of the machine it runs on: a command, a right, a device.

Rules: a test that lacks something is skipped and names it, so that a machine without root or
without Debian still runs all the rest. Under GRAFOS_REQUIRE_ALL=1 the same lack is a failure: the
gate must not grow green by running less. Only a missing graphics processor never fails.

A test states its needs with `@pytest.mark.requires("strace", "root")`; a fixture calls
`require("etcd")`.
"""

import functools
import os
import shutil
import subprocess

import pytest

SYSTEM_PATH = ("/usr/sbin", "/sbin")
"""Where Debian keeps `ip` and `nft`; not on an ordinary user's PATH."""

NEVER_FAILS = frozenset({"gpu"})


def add_system_path() -> None:
    """Let this process and its children find system commands."""
    parts = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(
        parts + [folder for folder in SYSTEM_PATH if folder not in parts]
    )


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@functools.cache
def is_there(name: str) -> bool:
    """Whether this machine has a command, or one of the rights root, netns and gpu."""
    if name == "root":
        return os.geteuid() == 0
    if name == "netns":
        return _succeeds("unshare", "--net", "true")
    if name == "gpu":
        return _succeeds("nvidia-smi", "-L")
    return shutil.which(name) is not None


def missing(*names: str) -> list[str]:
    """Those of the names that this machine lacks."""
    return [name for name in names if not is_there(name)]


def require(*names: str) -> None:
    """Skip the running test and name what is missing; fail where everything must be there."""
    lacking = missing(*names)
    if not lacking:
        return
    reason = f"missing on this machine: {', '.join(lacking)}"
    if os.environ.get("GRAFOS_REQUIRE_ALL") == "1" and not NEVER_FAILS.issuperset(lacking):
        pytest.fail(f"{reason} (GRAFOS_REQUIRE_ALL=1)", pytrace=False)
    pytest.skip(reason)
