"""`python -m grafos._cluster`: the supervisor, as `grafos up` and `local_fabric` start it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from grafos._cluster.layout import Layout
from grafos._cluster.machine import memory_for_each
from grafos._cluster.programs import MODULES, Plan
from grafos._cluster.supervisor import Supervisor
from grafos_core.failure import FabricError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m grafos._cluster", allow_abbrev=False)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--memory-bytes", type=int, default=0)
    parser.add_argument("--block-bytes", type=int, default=0)
    parser.add_argument("--trust-domain", default="")
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--port-base", type=int, default=0)
    parser.add_argument("--join-listen", default="")
    parser.add_argument("--fault", action="append", default=[], metavar="PROCESS=FAULTS")
    parser.add_argument("--module", action="append", default=[], metavar="SERVICE=MODULE")
    parser.add_argument("--exit-with-parent-fd", type=int)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--ephemeral", action="store_true")
    parser.add_argument("--clear-proved-clean", action="store_true")
    given = parser.parse_args(arguments)
    try:
        return Supervisor(
            _plan(given),
            Layout(given.state.absolute(), given.run.absolute()),
            environment=os.environ,
            parent_fd=given.exit_with_parent_fd,
            ready_fd=given.ready_fd,
            ephemeral=given.ephemeral,
        ).run()
    except FabricError as refusal:
        print(f"{refusal.code}: {refusal.detail}", file=sys.stderr)
        return 1


def _plan(given: argparse.Namespace) -> Plan:
    return Plan(
        nodes=given.nodes,
        memory_bytes=given.memory_bytes or memory_for_each(given.nodes),
        block_bytes=given.block_bytes,
        trust_domain=given.trust_domain,
        tcp=given.tcp,
        port_base=given.port_base,
        faults=dict(each.split("=", 1) for each in given.fault),
        modules={**MODULES, **dict(each.split("=", 1) for each in given.module)},
        join_listen=given.join_listen,
        clear_proved_clean=given.clear_proved_clean,
    )


if __name__ == "__main__":
    sys.exit(main())
