"""`grafos up`, `down`, `status`: the fabric of this machine."""

from __future__ import annotations

import argparse
import os
from typing import Any

from grafos._cli import output, settings
from grafos._cli.exits import FAILED, OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing
from grafos._clock import boot_ms
from grafos._cluster import description as descriptions
from grafos._cluster.description import ClusterDescription
from grafos._cluster.layout import Layout, parse_size
from grafos_core import failure
from grafos_core.failure import FabricError


def register(tree: Tree) -> None:
    up = tree.verb("up", "start a fabric on this machine and wait until it is ready", _up)
    up.add_argument("--nodes", type=int, metavar="N", help="node agents to start [1]")
    up.add_argument("--memory", metavar="SIZE", help="memory of each node, like 256MiB")
    up.add_argument(
        "--block", metavar="SIZE", help="block storage of each node [256MiB, or as before]"
    )
    up.add_argument("--tcp", action="store_true", help="loopback ports in place of unix sockets")
    up.add_argument("--port-base", type=int, metavar="PORT", help="first port [7440]; 0: any")
    up.add_argument("--join-listen", metavar="HOST:PORT", help="let other machines join here")
    up.add_argument("--trust-domain", metavar="NAME", help="name of the fabric [grafos.local]")
    fault_help = "make a process fail on purpose, such as node-n1=teardown.erase:EIO"
    up.add_argument(
        "--fault", action="append", default=[], metavar="PROCESS=FAULTS", help=fault_help
    )
    up.add_argument(
        "--clear-proved-clean", action="store_true",
        help="let nodes free fenced slices that a probe has proved clean",
    )  # fmt: skip
    up.add_argument("--foreground", action="store_true", help="stay, and stop with Ctrl-C")
    up.add_argument("--wait", type=int, default=30, metavar="S", help="for it to be ready [30]")
    down = tree.verb("down", "stop the fabric of this machine; its state stays", _down)
    down.add_argument("--timeout", type=int, default=40, metavar="S", help="then it is killed [40]")
    status = tree.verb("status", "what runs, where, and whether it is ready", _status)
    output.add_flags(status)


def running(layout: Layout) -> ClusterDescription | None:
    """The fabric of these folders, if its supervisor lives."""
    found = descriptions.load(layout.description)
    return found if found is not None and found.is_alive() else None


def _up(given: argparse.Namespace) -> int:
    layout = settings.the_layout(given)
    found = running(layout)
    if found is not None:
        return _already(layout, found)
    from grafos._cluster import launch  # starts processes, which the other commands do not
    from grafos._cluster.programs import environment

    wanted = _wanted(given)
    layout.prepare()
    if given.foreground:
        command = launch.command(layout, wanted)
        os.execve(command[0], command, environment(os.environ, ""))
    started_ms = boot_ms()
    output.progress(f"starting a fabric with {wanted.nodes} node(s), state in {layout.state}")
    launched = launch.launch(layout, wanted)
    try:
        launched.wait_ready(given.wait * 1000)
    except failure.DeadlineExceeded as late:
        going_on = "it goes on trying; stop it with `grafos down`"
        raise failure.of("DEADLINE", f"{late.detail}; {going_on}") from None
    except KeyboardInterrupt:
        output.progress("interrupted: stopping what was started")
        launched.stop()
        raise
    finally:
        launched.close()
    output.progress(f"memory and blocks are ready after {(boot_ms() - started_ms) / 1000:.1f} s")
    found = running(layout)
    if found is None:
        raise failure.of("NOT_READY", "the fabric ended as soon as it was ready")
    print(_where(layout, found), end="")
    return OK


def _wanted(given: argparse.Namespace) -> Any:
    from grafos._cluster.launch import Wanted

    memory, block = (str(settings.value(given, name)) for name in ("memory", "block"))
    faults = dict(each.partition("=")[::2] for each in given.fault)
    if not all(faults.values()):
        raise failure.of("INVALID", "--fault takes PROCESS=FAULTS")
    return Wanted(
        nodes=settings.value(given, "nodes"),
        memory_bytes=parse_size(memory) if memory else 0,
        block_bytes=parse_size(block) if block else 0,
        trust_domain=settings.value(given, "trust_domain"),
        tcp=settings.value(given, "tcp"),
        port_base=settings.value(given, "port_base"),
        join_listen=settings.value(given, "join_listen"),
        faults=faults,
        clear_proved_clean=given.clear_proved_clean,
    )


def _already(layout: Layout, found: ClusterDescription) -> int:
    status = fetch_status(layout)
    print(_where(layout, found), end="")
    if status["ready"]:
        output.progress(f"the fabric is up already (supervisor pid {found.supervisor_pid})")
        return OK
    from grafos._cluster.launch import why_not_ready

    output.progress(f"the fabric is up, but {why_not_ready(layout)}")
    return FAILED


def _where(layout: Layout, found: ClusterDescription) -> str:
    return output.facts([
        ("nodes", ", ".join(node.node_id for node in found.nodes)),
        ("admission", found.admission),
        ("identity", found.identity_socket),
        *([("machines join", found.join)] if found.join else []),
        ("state", layout.state),
        ("logs", f"{layout.state}/<service>/log.jsonl"),
        ("stop it", "grafos down"),
    ])  # fmt: skip


def _down(given: argparse.Namespace) -> int:
    layout = settings.the_layout(given)
    found = descriptions.supervisor(layout.run)
    if found is None:
        output.progress(f"no fabric runs in {layout.run}: nothing to stop")
        return OK
    pid, start = found
    from grafos._cluster import launch

    started_ms = boot_ms()
    how = launch.end(pid, start, given.timeout * 1000)
    took = f"{(boot_ms() - started_ms) / 1000:.1f} s"
    output.progress(
        f"the fabric is {how} (supervisor pid {pid}, {took}); its state is kept in {layout.state}"
    )
    return OK if how != "killed" else FAILED


def fetch_status(layout: Layout) -> dict[str, Any]:
    """What the supervisor says now."""
    from grafos._cluster.telephone import ask

    return ask(layout.supervisor_socket, {"op": "status"})


def _status(given: argparse.Namespace) -> int:
    layout = settings.the_layout(given)

    def fetch() -> dict[str, Any]:
        try:
            status = fetch_status(layout)
        except FabricError:
            if running(layout) is None:
                raise failure.of("UNREACHABLE", f"no fabric runs in {layout.run}") from None
            raise
        return {"items": [_supervisor_row(status), *status["processes"]], "whole": status}

    return output.show(given, fetch, _PROCESSES)


def _supervisor_row(status: dict[str, Any]) -> dict[str, Any]:
    own = status["supervisor"]
    return {
        "name": "supervisor", "pid": own["pid"], "ready": status["ready"], "restarts": 0,
        "uptime_ms": own["uptime_ms"], "state": "running", "children": [], "closed_gates": {},
        "endpoints": {"listen": f"unix:{status['run_dir']}/supervisor.sock"}, "ready_kinds": [],
        "policies": [],
    }  # fmt: skip


def _readiness(row: output.Row) -> str:
    if row["ready"]:
        return ", ".join(["ready", *row["policies"]])
    closed = row["closed_gates"]
    return "waits: " + "; ".join(f"{gate} ({why})" for gate, why in closed.items()) or "no"


_PROCESSES = Listing(
    [
        Column("PROCESS", lambda row: row["name"]),
        Column("PID", lambda row: row["pid"] or "-"),
        Column("STATE", lambda row: row["state"]),
        Column("READY", _readiness),
        Column("RESTARTS", lambda row: row["restarts"]),
        Column("UPTIME", lambda row: output.duration(row["uptime_ms"])),
        Column("ENDPOINT", lambda row: row["endpoints"]["listen"]),
        Column("CONTROL", lambda row: row["endpoints"].get("control", "-"), wide=True),
        Column("HTTP", lambda row: row["endpoints"].get("http", "-"), wide=True),
        Column("KINDS", lambda row: ",".join(row["ready_kinds"]) or "-", wide=True),
        Column(
            "CHILDREN",
            lambda row: (
                ", ".join(f"{each['name']} {each['pid']}" for each in row["children"]) or "-"
            ),
            wide=True,
        ),
    ],
    name=lambda row: str(row["name"]),
)
