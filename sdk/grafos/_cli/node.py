"""`grafos node`: the nodes of the fabric, their capacity, joining and forgetting them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from grafos import _clock
from grafos._cli import output, settings
from grafos._cli.exits import OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing, Row
from grafos_core import failure

TOKEN_VARIABLE = "GRAFOS_JOIN_TOKEN"


def register(tree: Tree) -> None:
    noun = tree.noun("node", "the nodes of the fabric")
    output.add_flags(noun.verb("list", "nodes, their readiness and capacity", _list))
    forget = noun.verb("forget", "strike out a node that will never return", _forget)
    forget.add_argument("node_id")
    forget.add_argument("--reason", required=True, help="recorded with your name")
    forget.add_argument(
        "--i-accept-residue", action="store_true",
        help="what was leased there is given up without proof that it is gone; required",
    )  # fmt: skip
    join = noun.verb("join", "on another machine: get a certificate with a join token", _join)
    join.add_argument("address", help="host:port of the fabric's join listener")
    join.add_argument("--token", help=f"from `node token create`; or ${TOKEN_VARIABLE}")
    join.add_argument("--out", type=Path, required=True, metavar="DIR", help="for key and chain")
    token = noun.noun("token", "tokens with which machines join")
    create = token.verb("create", "a token for one machine, good once", _token)
    create.add_argument("node_id", help="what the machine will be called")
    create.add_argument("--ttl", type=int, default=3600, metavar="S", help="life [3600]")


def _list(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator

    with Operator(given) as operator:
        return output.show(given, lambda: [_row(node) for node in operator.snapshot().nodes], NODES)


def _row(node: Any) -> dict[str, Any]:
    from grafos._cli.operator import kind_name

    return {
        "node_id": node.node_id, "incarnation": node.incarnation, "boot_epoch": node.boot_epoch,
        "mode": node.mode, "lost": node.lost, "ready": node.readiness.ready and not node.lost,
        "closed_gates": dict(node.readiness.closed_gates), "lease_count": node.lease_count,
        "evidence_age_ms": node.evidence_age_ms, "front": node.front_endpoint,
        "control": node.control_endpoint, "labels": dict(node.labels),
        "clears_proved_clean": node.clears_proved_clean,
        "capacity": {
            kind_name(book.kind): {
                "total": book.total, "free": book.free, "leased": book.leased,
                "ending": book.ending, "fenced": book.fenced, "withheld": book.withheld,
            }
            for book in node.books
        },
    }  # fmt: skip


def _forget(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator
    from grafos_proto.v1 import ledger_pb2

    if not given.i_accept_residue:
        raise failure.of(
            "OPTION",
            "nothing proves that what was leased there is gone: say --i-accept-residue if you "
            "take that upon yourself",
        )
    with Operator(given) as operator:
        order = ledger_pb2.ForgetNode(
            node_id=given.node_id, accept_residue=True, reason=given.reason
        )
        operator.commit(ledger_pb2.Command(forget_node=order))
    print(f"{given.node_id} forgotten")
    return OK


def _join(given: argparse.Namespace) -> int:
    from grafos._authority import node_join

    token = given.token or os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise failure.of("JOIN_TOKEN", f"say --token, or set {TOKEN_VARIABLE}")
    made = node_join(given.address, token, given.out.absolute(), now_ms=_clock.wall_ms())
    print(f"{made.identity} in {given.out.absolute()}")
    return OK


def _token(given: argparse.Namespace) -> int:
    from grafos._authority import node_token

    layout = settings.the_layout(given)
    print(
        node_token(
            layout.authority, given.node_id, ttl_ms=given.ttl * 1000, now_ms=_clock.wall_ms()
        )
    )
    return OK


def _readiness(row: Row) -> str:
    if row["lost"]:
        return "lost"
    if row["ready"]:
        return "ready"
    return "; ".join(f"{gate} ({why})" for gate, why in row["closed_gates"].items()) or "no"


def _free(row: Row, kind: str) -> str:
    from grafos._cli.operator import shown_amount

    book = row["capacity"].get(kind)
    if book is None:
        return "-"
    return f"{shown_amount(kind, book['free'])} of {shown_amount(kind, book['total'])}"


def _held(row: Row, state: str) -> str:
    from grafos._cli.operator import shown_amount

    held = [
        f"{kind} {shown_amount(kind, book[state])}"
        for kind, book in row["capacity"].items()
        if book[state]
    ]
    return ", ".join(held) or "-"


NODES = Listing(
    [
        Column("NODE", lambda row: row["node_id"]),
        Column("MODE", lambda row: row["mode"]),
        Column("READY", _readiness),
        Column("LEASES", lambda row: row["lease_count"]),
        Column("MEMORY FREE", lambda row: _free(row, "mem")),
        Column("BLOCKS FREE", lambda row: _free(row, "block")),
        Column("FENCED", lambda row: _held(row, "fenced")),
        Column(
            "CLEARS", lambda row: "proved clean" if row["clears_proved_clean"] else "-", wide=True
        ),
        Column("ENDING", lambda row: _held(row, "ending"), wide=True),
        Column("WITHHELD", lambda row: _held(row, "withheld"), wide=True),
        Column("BOOT", lambda row: row["boot_epoch"], wide=True),
        Column("HEARD", lambda row: output.duration(row["evidence_age_ms"]), wide=True),
        Column("FRONT", lambda row: row["front"], wide=True),
        Column("INCARNATION", lambda row: row["incarnation"], wide=True),
    ],
    name=lambda row: str(row["node_id"]),
    empty="no node has registered",
)
