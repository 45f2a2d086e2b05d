"""cluster.json: what a program on this machine needs to know to find the running fabric.

The supervisor writes it whenever an address changes; the SDK and the command line read it.

Rules. Standard library only: reading it must cost nothing. It is replaced as a whole, 0600 in a
folder of 0700; one that another user could have written is not believed. It names the supervisor by
process number and start time, so that what a dead supervisor left behind is seen to be just that.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from grafos._cluster.layout import check_private, run_directory
from grafos_core import failure

VERSION: Final = 1
FILE_NAME: Final = "cluster.json"
LOCK_FILE: Final = "supervisor.lock"
"""Beside it; held by the supervisor, whose number and start time stand in it."""
BYTES_MAX: Final = 65_536


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """Where one node's agent is reached; endpoints are `unix:<path>` or `<host>:<port>`."""

    node_id: str
    front: str
    """For holders."""
    control: str
    """For operators and services."""
    http: str
    """Readiness and metrics; empty until the agent has said where."""


@dataclass(frozen=True, slots=True)
class ClusterDescription:
    """The running fabric of this machine."""

    trust_domain: str
    identity_socket: str
    ca_file: str
    state_dir: str
    admission: str
    ledger: str
    audit: str
    nodes: tuple[NodeDescription, ...]
    supervisor_pid: int
    supervisor_start: int
    """Field 22 of proc(5)'s stat: two processes of one number differ in it."""
    admission_control: str = ""
    join: str = ""
    """Where other machines join, `host:port`; empty: nowhere."""
    supervisor_socket: str = ""
    http: Mapping[str, str] = field(default_factory=dict)
    """Service to its plain HTTP listener."""

    def node(self, node_id: str) -> NodeDescription | None:
        return next((node for node in self.nodes if node.node_id == node_id), None)

    def is_alive(self) -> bool:
        """Whether the supervisor that wrote this still runs."""
        return start_ticks(self.supervisor_pid) == self.supervisor_start


def load(path: str | os.PathLike[str] | None = None) -> ClusterDescription | None:
    """The description in this file, or in the run folder; None where there is none."""
    where = Path(path) if path is not None else run_directory(os.environ) / FILE_NAME
    try:
        check_private(where.parent)
        with where.open("rb") as file:
            text = file.read(BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise failure.of("STORAGE", f"{where}: {error.strerror}") from None
    try:
        return read(json.loads(text))
    except (ValueError, TypeError, KeyError):
        raise failure.of("ENCODING", f"{where} is not a description of a fabric") from None


def read(raw: Mapping[str, Any]) -> ClusterDescription:
    """From JSON's types; names that this version does not know are passed over."""
    if raw["v"] != VERSION:
        raise failure.of("VERSION", f"{FILE_NAME} here is version {VERSION}")
    known = {name: raw[name] for name in ClusterDescription.__dataclass_fields__ if name in raw}
    known["nodes"] = tuple(NodeDescription(**node) for node in raw["nodes"])
    return ClusterDescription(**known)


def save(path: Path, description: ClusterDescription) -> None:
    """Replace the file as a whole."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    text = json.dumps({"v": VERSION, **asdict(description)}, indent=1, sort_keys=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.replace(draft, path)


def supervisor(run: Path) -> tuple[int, int] | None:
    """Number and start time of the supervisor that lives in this run folder, ready or not."""
    try:
        pid, start = map(int, (run / LOCK_FILE).read_text("ascii").split())
    except (OSError, ValueError):
        return None  # none has ever been here, or it is about to write this
    return (pid, start) if start_ticks(pid) == start else None


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is none, or a zombie.

    The same for every reader: one with a boottime of his own (time_namespaces(7)) reads it shifted.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19]) - _shift_ticks()


@functools.cache
def _shift_ticks() -> int:
    """By how much this process reads all start times too late."""
    try:
        lines = Path("/proc/self/timens_offsets").read_text("ascii").splitlines()
    except OSError:
        return 0  # a kernel without them
    words = next((line.split() for line in lines if line.startswith("boottime")), ["", "0", "0"])
    ticks = os.sysconf("SC_CLK_TCK")
    return int(words[1]) * ticks + int(words[2]) * ticks // 10**9
