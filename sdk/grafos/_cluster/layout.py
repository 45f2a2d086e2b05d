"""Where the parts of a fabric on this machine lie: its state, its sockets, its addresses.

    <state>/  ca/  ledger/  admission/  audit/  node-<id>/     one folder per service, kept
    <run>/    cluster.json  identity.sock  supervisor.sock  <service>.sock …    gone after a stop

Rules. Both folders are ours alone (0700); one that another user owns or may enter is refused, since
whoever can write there can pass for the fabric. A unix socket's address has room for 107 bytes:
folders that are too deep for that are refused at once and by name, not at the first bind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafos_core import failure

SOCKET_PATH_BYTES_MAX: Final = 107
LONGEST_SOCKET: Final = "node-xx-control.sock.t"
WARDEN_SOCKET: Final = "node-xx/warden/1234567890.sock"
"""An agent keeps this one below its own state."""
PORT_BASE_DEFAULT: Final = 7440
NODES_MAX: Final = 16
_UNITS: Final = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


@dataclass(frozen=True, slots=True)
class Layout:
    """The two folders of one fabric."""

    state: Path
    run: Path

    def service_state(self, name: str) -> Path:
        return self.state / name

    def log(self, name: str) -> Path:
        return self.state / name / "log.jsonl"

    @property
    def authority(self) -> Path:
        return self.state / "ca"

    @property
    def identity_socket(self) -> Path:
        return self.run / "identity.sock"

    @property
    def supervisor_socket(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def supervisor_log(self) -> Path:
        return self.state / "supervisor.log"

    @property
    def description(self) -> Path:
        return self.run / "cluster.json"

    def socket(self, name: str) -> str:
        return f"unix:{self.run / f'{name}.sock'}"

    def prepare(self) -> Layout:
        """Make both folders, private, and refuse what cannot work."""
        for folder in (self.state, self.run):
            make_private(folder)
        for longest in (self.run / LONGEST_SOCKET, self.state / WARDEN_SOCKET):
            if len(os.fsencode(longest)) > SOCKET_PATH_BYTES_MAX:
                raise failure.of(
                    "RANGE",
                    f"{longest.parent} is too deep for unix sockets "
                    f"({SOCKET_PATH_BYTES_MAX} bytes): choose a shorter folder",
                )
        return self


def state_directory(environment: Mapping[str, str]) -> Path:
    """Where the fabric's state is, unless a flag says otherwise."""
    if given := environment.get("GRAFOS_STATE_DIR"):
        return Path(given).absolute()
    if home := environment.get("XDG_STATE_HOME"):
        return Path(home).absolute() / "grafos"
    return Path.home() / ".local" / "state" / "grafos"


def run_directory(environment: Mapping[str, str]) -> Path:
    """Where the fabric's sockets are, unless a flag says otherwise."""
    if given := environment.get("GRAFOS_RUN_DIR"):
        return Path(given).absolute()
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        return Path(runtime).absolute() / "grafos"
    return Path(f"/tmp/grafos-{os.getuid()}")


def make_private(folder: Path) -> Path:
    """The folder, made if it was missing; refused unless it is ours alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise failure.of("IDENTITY", f"{folder} is no folder")
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise failure.of("IDENTITY", f"{folder} must be ours alone: chmod 700, or choose another")


def parse_size(text: str) -> int:
    """Bytes in `256MiB`, `1GiB` or a plain number of bytes."""
    digits = text.strip().rstrip("bBiIkKmMgGtT")
    unit = text.strip()[len(digits) :].lower()
    if unit in {"k", "m", "g", "t"}:
        unit += "ib"
    if not digits.isascii() or not digits.isdigit() or unit not in _UNITS:
        raise failure.of("INVALID", "a size is a number of bytes, or like 64KiB, 256MiB, 2GiB")
    return int(digits) * _UNITS[unit]


def shown_size(count: int) -> str:
    """Bytes for people: `256.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size := count / _UNITS[unit.lower()]) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
    return f"{count / (1 << 40):.1f} TiB"
