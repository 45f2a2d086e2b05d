"""Which processes make up a fabric, and with which flags each is started.

    ledger   admission   audit   node-n1 … node-nN     (python -m services.<module>)

Rules. Every address is known before anything is started, so that all start at once and find each
other by trying again. Over TCP the ports are consecutive; where any port will do, free ones are
looked up once and kept for the life of the fabric, so that a service comes back where it was.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Final

from grafos._cluster.layout import NODES_MAX, PORT_BASE_DEFAULT, Layout
from grafos_core import failure
from grafos_core.spiffe import Role

LOOPBACK: Final = "127.0.0.1"
TRUST_DOMAIN_DEFAULT: Final = "grafos.local"
BLOCK_BYTES_DEFAULT: Final = 256 << 20
MODULES: Final[Mapping[str, str]] = {
    "ledger": "services.ledger",
    "admission": "services.admission",
    "audit": "services.audit",
    "node": "services.nodeagent",
}
INHERITED: Final = ("GRAFOS_LOG_LEVEL", "GRAFOS_OTLP_ENDPOINT", "GRAFOS_FAULT")
"""Of our own variables; all others are meant for the command line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What fabric is wanted."""

    nodes: int
    memory_bytes: int
    """Of each node."""
    block_bytes: int = 0
    """Of each node; 0: as its state was made with."""
    trust_domain: str = ""
    """Empty: as its state was made with."""
    tcp: bool = False
    port_base: int = PORT_BASE_DEFAULT
    """0: any free ports."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Process name to faults in the syntax of GRAFOS_FAULT."""
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)
    join_listen: str = ""
    """Where other machines may ask to join, `host:port`; empty: nowhere."""
    clear_proved_clean: bool = False
    """Nodes free fenced slices that a probe has proved clean."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= NODES_MAX:
            raise failure.of("RANGE", f"1 to {NODES_MAX} nodes run on one machine")
        if self.memory_bytes < 4096 or 0 < self.block_bytes < 4096:
            raise failure.of("RANGE", "a node leases out at least 4096 bytes of each kind")
        if not 0 <= self.port_base <= 65_000:
            raise failure.of("RANGE", "the first port is 0 to 65000")


@dataclass(frozen=True, slots=True)
class Program:
    """One process: who it is, where it listens, how it is started."""

    name: str
    """As people and the log folder call it: `ledger`, `node-n1`."""
    module: str
    role: Role
    identity: str
    """The last part of its SPIFFE id."""
    endpoints: Mapping[str, str]
    """`listen`, and where there is one `control`."""
    flags: tuple[str, ...]
    fault: str = ""

    @property
    def is_node(self) -> bool:
        return self.role is Role.NODE


def programs(plan: Plan, layout: Layout) -> list[Program]:
    """All processes of the fabric, in the order in which they are started."""
    where = _endpoints(plan, layout)
    common = (
        "--trust-domain", plan.trust_domain, "--identity-socket", str(layout.identity_socket),
        "--mode", "development",
    )  # fmt: skip
    ledger, audit = ("--ledger", where["ledger"]), ("--audit", where["audit"])
    made = [
        _program(plan, "ledger", {"listen": where["ledger"]}, common + audit),
        _program(
            plan, "admission",
            {"listen": where["admission"], "control": where["admission-control"]},
            common + ledger + audit,
        ),
        _program(plan, "audit", {"listen": where["audit"]}, common),
    ]  # fmt: skip
    for node_id in node_ids(plan):
        name = f"node-{node_id}"
        own = (
            "--node-id", node_id, "--memory-bytes", str(plan.memory_bytes),
            "--block-bytes", str(plan.block_bytes),
        ) + (("--clear-proved-clean",) if plan.clear_proved_clean else ())  # fmt: skip
        endpoints = {"listen": where[f"{name}-front"], "control": where[f"{name}-control"]}
        made.append(_program(plan, name, endpoints, common + ledger + audit + own, node_id))
    return made


def node_ids(plan: Plan) -> list[str]:
    return [f"n{number}" for number in range(1, plan.nodes + 1)]


def _program(
    plan: Plan, name: str, endpoints: Mapping[str, str], flags: tuple[str, ...], node_id: str = ""
) -> Program:
    listen: tuple[str, ...] = ("--listen", endpoints["listen"])
    if "control" in endpoints:
        listen += ("--control-listen", endpoints["control"])
    return Program(
        name,
        plan.modules["node" if node_id else name],
        Role.NODE if node_id else Role.SERVICE,
        node_id or name,
        endpoints,
        listen + flags,
        plan.faults.get(name, ""),
    )


def _endpoints(plan: Plan, layout: Layout) -> dict[str, str]:
    names = ["ledger", "admission", "admission-control", "audit"]
    for node_id in node_ids(plan):
        names += [f"node-{node_id}-front", f"node-{node_id}-control"]
    if not plan.tcp:
        return {name: layout.socket(name) for name in names}
    if plan.port_base == 0:
        ports: Sequence[int] = free_ports(len(names))
    else:
        ports = range(plan.port_base, plan.port_base + len(names))
    return {name: f"{LOOPBACK}:{port}" for name, port in zip(names, ports, strict=True)}


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different: each is held until the last one is found."""
    with ExitStack() as held:
        found = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in found]


def environment(given: Mapping[str, str], fault: str) -> dict[str, str]:
    """What a service inherits: no variable of ours that is meant for the command line.

    The packages are found where this process found them, and never in the current folder.
    """
    made = {
        name: value
        for name, value in given.items()
        if not name.startswith("GRAFOS_") or name in INHERITED
    }
    if fault:
        made["GRAFOS_FAULT"] = fault
    made["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(_roots()))
    made["PYTHONSAFEPATH"] = "1"
    return made


def _roots() -> Iterator[str]:
    for package in ("grafos", "grafos_core", "grafos_proto", "services"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            yield os.path.dirname(os.path.abspath(folder))
    yield from filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
