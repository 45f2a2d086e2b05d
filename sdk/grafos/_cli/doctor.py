"""`grafos doctor`: what this machine has of what a fabric needs."""

from __future__ import annotations

import argparse
import errno
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from grafos._cli import output, settings
from grafos._cli.exits import FAILED, OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing
from grafos._cluster.layout import Layout, shown_size
from grafos._cluster.machine import memory_available, memory_for_each

FILES_MIN: Final = 4_096
DISK_BYTES_MIN: Final = 1 << 30
Finding = tuple[bool, str]
TEST_COMMANDS: Final = ("strace", "ip", "nft", "etcd", "redis-server")


def register(tree: Tree) -> None:
    output.add_flags(tree.verb("doctor", "what this machine lacks", _doctor), watch=False)


def _doctor(given: argparse.Namespace) -> int:
    layout = settings.the_layout(given)
    rows: list[dict[str, Any]] = []
    for name, needed, look in _checks(layout):
        is_there, found = look()
        rows.append({"check": name, "ok": is_there, "needed": needed, "found": found})
    output.show(given, lambda: rows, _FINDINGS)
    return OK if all(row["ok"] for row in rows if row["needed"]) else FAILED


def _checks(layout: Layout) -> list[tuple[str, bool, Callable[[], Finding]]]:
    """(name, whether a fabric needs it, look)"""
    return [
        ("python", True, _python),
        ("kernel", True, lambda: (sys.platform == "linux", platform.release())),
        ("sealed memory files", True, _memfd),
        ("pidfd", True, _pidfd),
        ("sockets' paths", True, lambda: _paths(layout)),
        ("direct disk access", False, lambda: _direct(_existing(layout.state))),
        ("disk", True, lambda: _disk(_existing(layout.state))),
        ("open files", True, _files),
        ("memory", True, _memory),
        *((f"{name} (for tests)", False, _command(name)) for name in TEST_COMMANDS),
    ]


def _python() -> Finding:
    return sys.version_info >= (3, 11), sys.version.split()[0]


def _memfd() -> Finding:
    import fcntl

    try:
        descriptor = os.memfd_create("grafos-doctor", os.MFD_ALLOW_SEALING)
    except OSError as error:
        return False, str(error.strerror)
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        return True, "memfd_create with seals"
    except OSError as error:
        return False, f"no seals: {error.strerror}"
    finally:
        os.close(descriptor)


def _pidfd() -> Finding:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return False, str(error.strerror)
    return True, "pidfd_open"


def _paths(layout: Layout) -> Finding:
    from grafos._cluster.layout import LONGEST_SOCKET, SOCKET_PATH_BYTES_MAX, WARDEN_SOCKET

    longest = max(
        len(os.fsencode(path))
        for path in (layout.run / LONGEST_SOCKET, layout.state / WARDEN_SOCKET)
    )
    return longest <= SOCKET_PATH_BYTES_MAX, f"{longest} of {SOCKET_PATH_BYTES_MAX} bytes"


def _direct(folder: Path) -> Finding:
    probe = folder / f".grafos-doctor-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False, f"{folder}: buffered writes with fdatasync instead"
        return False, f"{folder}: {error.strerror}"
    finally:
        probe.unlink(missing_ok=True)
    return True, str(folder)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    return free >= DISK_BYTES_MIN, f"{shown_size(free)} free in {folder}"


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft >= FILES_MIN or hard >= FILES_MIN, f"{soft}, at most {hard}"


def _memory() -> Finding:
    found = f"{shown_size(memory_available())} available, a node would lease {{}}"
    return memory_available() > 0, found.format(shown_size(memory_for_each(1)))


def _command(name: str) -> Callable[[], Finding]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    return lambda: (found is not None, found or "not installed")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _verdict(row: output.Row) -> str:
    if row["ok"]:
        return "ok"
    return "MISSING" if row["needed"] else "without"


_FINDINGS = Listing(
    [
        Column("CHECK", lambda row: row["check"]),
        Column("", _verdict),
        Column("FOUND", lambda row: row["found"]),
    ],
    name=lambda row: str(row["check"]),
)
