"""`grafos lease`: what is leased, to whom, until when; and taking it back."""

from __future__ import annotations

import argparse
from typing import Any

from grafos import _clock
from grafos._cli import output, revocation
from grafos._cli.exits import FAILED, OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing, Row

STATES = ("pending", "active", "ending", "released", "fenced")


def register(tree: Tree) -> None:
    noun = tree.noun("lease", "what is leased, to whom, until when")
    listing = noun.verb("list", "leases that live, end or are fenced", _list)
    revocation.add_selector(listing, STATES)
    output.add_flags(listing)
    describe = noun.verb("describe", "everything about one lease", _describe)
    describe.add_argument("lease_id", help="or the beginning of it")
    describe.add_argument("-o", "--output", choices=("table", "json"), default="table")
    revocation.register(noun.verb("revoke", "take leases back from their holders", _revoke))
    explain = noun.verb("explain", "what a request would get now, and why, node by node", _explain)
    explain.add_argument("--kind", choices=("mem", "block"), default="mem")
    explain.add_argument(
        "--amount", default="4096", help="like 64MiB; for blocks also their number"
    )
    explain.add_argument("--node", default="", help="at this node only")
    explain.add_argument("-o", "--output", choices=("table", "json"), default="table")


def _list(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator, lease_row

    wanted = revocation.wanted(given)
    with Operator(given) as operator:
        return output.show(
            given, lambda: [lease_row(lease) for lease in operator.leases(**wanted)], LEASES
        )


def _describe(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator, lease_row

    with Operator(given) as operator:
        row = lease_row(operator.lease(given.lease_id))
    if given.output == "json":
        return _print_json(row)
    facts = [(name, value) for name, value in row.items() if value not in ("", None, {}, False)]
    print(output.facts([*facts, ("left", left(row))]), end="")
    return OK


def _revoke(given: argparse.Namespace) -> int:
    return revocation.revoke(given, LEASES)


def _explain(given: argparse.Namespace) -> int:
    from grafos._cli.operator import KINDS, Operator, amount_of, new_request_id
    from grafos_proto.v1 import admission_pb2

    request = admission_pb2.AcquireRequest(
        request_id=new_request_id(), kind=KINDS[given.kind],
        amount=amount_of(given.kind, given.amount),
        where={"node": given.node} if given.node else {},
    )  # fmt: skip
    with Operator(given) as operator:
        answer = operator.admission("Explain", request)
    if given.output == "json":
        _print_json(_explanation(answer))
    else:
        print(_told(answer), end="")
    return OK if answer.admissible else FAILED


def _explanation(answer: Any) -> dict[str, Any]:
    return {
        "admissible": answer.admissible, "node_id": answer.node_id, "code": answer.code,
        "summary": answer.summary, "no_bound": answer.no_bound,
        "earliest_ms": answer.earliest_ms or None,
        "nodes": [
            {
                "node_id": node.node_id, "held_by": list(node.held_by),
                "free_by_ms": node.free_by_ms or None,
                "terms": [
                    {"name": term.name, "holds": term.holds, "detail": term.detail}
                    for term in node.terms
                ],
            }
            for node in answer.nodes
        ],
    }  # fmt: skip


def _told(answer: Any) -> str:
    lines = [f"yes, at node {answer.node_id}" if answer.admissible else f"no: {answer.summary}"]
    for node in answer.nodes:
        for term in node.terms:
            mark = "ok" if term.holds else "NO"
            lines.append(f"  {node.node_id}  {mark}  {term.name}: {term.detail}")
        if node.held_by:
            lines.append(f"  {node.node_id}      held by {', '.join(node.held_by)}")
    if not answer.admissible:
        lines.append(_bound(answer))
    return "\n".join(lines) + "\n"


def _bound(answer: Any) -> str:
    if answer.no_bound or not answer.earliest_ms:
        return "there is no bound on the wait"
    wait_ms = max(0, answer.earliest_ms - _clock.wall_ms())
    return f"at the latest in {output.duration(wait_ms)}"


def _state(row: Row) -> str:
    notes = ["unconfirmed"] * row["unconfirmed"] + ["residue"] * (row["cleared"] == "residue")
    return str(row["state"]) + (f" ({', '.join(notes)})" if notes else "")


def left(row: Row) -> str:
    """How long a lease has still to go, by this machine's clock."""
    if row["state"] not in ("pending", "active"):
        return "-"
    return output.duration(max(0, row["end_ms"] - _clock.wall_ms()))


def size(row: Row) -> str:
    from grafos._cli.operator import shown_amount

    return shown_amount(row["kind"], row["amount"])


def _print_json(value: Any) -> int:
    import json

    print(json.dumps(value, sort_keys=True))
    return OK


LEASES = Listing(
    [
        Column("LEASE", lambda row: row["lease_id"][:12]),
        Column("KIND", lambda row: row["kind"]),
        Column("SIZE", size),
        Column("STATE", _state),
        Column("NODE", lambda row: row["node_id"]),
        Column("LEFT", left),
        Column("TENANT", lambda row: row["tenant"]),
        Column("EPOCH", lambda row: row["epoch"], wide=True),
        Column("GENERATION", lambda row: row["generation"], wide=True),
        Column("STAGE", lambda row: row["stage"] or "-", wide=True),
        Column("CAUSE", lambda row: row["cause"] or "-", wide=True),
        Column("HOLDER", lambda row: row["holder"], wide=True),
        Column("ID", lambda row: row["lease_id"], wide=True),
    ],
    name=lambda row: str(row["lease_id"]),
    empty="no leases",
)
