"""`grafos quota`: how much each tenant may hold of each kind, and what it holds."""

from __future__ import annotations

import argparse
from typing import Any, Final

from grafos._cli import output
from grafos._cli.exits import OK
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing
from grafos_core import failure

UNLIMITED: Final = 2**63 - 1


def register(tree: Tree) -> None:
    noun = tree.noun("quota", "how much each tenant may hold")
    get = noun.verb("get", "limits and what is used of them", _get)
    get.add_argument("tenant", nargs="?", default="", help="only this one")
    output.add_flags(get)
    set_ = noun.verb("set", "limit one tenant's leases of one kind", _set)
    set_.add_argument("tenant")
    set_.add_argument("--kind", choices=("mem", "block"), required=True)
    set_.add_argument("--amount", default="unlimited", help="like 2GiB, or unlimited")
    set_.add_argument("--count", default="unlimited", help="leases at a time, or unlimited")


def _get(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator

    with Operator(given) as operator:

        def fetch() -> list[dict[str, Any]]:
            quotas = operator.snapshot().quotas
            return [_row(each) for each in quotas if given.tenant in ("", each.tenant)]

        return output.show(given, fetch, QUOTAS)


def _row(quota: Any) -> dict[str, Any]:
    from grafos._cli.operator import kind_name

    return {
        "tenant": quota.tenant, "kind": kind_name(quota.kind),
        "amount": None if quota.amount == UNLIMITED else quota.amount,
        "count": None if quota.count == UNLIMITED else quota.count,
        "used_amount": quota.used_amount, "used_count": quota.used_count,
    }  # fmt: skip


def _set(given: argparse.Namespace) -> int:
    from grafos._cli.operator import KINDS, Operator, amount_of
    from grafos_proto.v1 import ledger_pb2

    amount = UNLIMITED if given.amount == "unlimited" else amount_of(given.kind, given.amount)
    if given.count != "unlimited" and not given.count.isdigit():
        raise failure.of("INVALID", "--count: a number of leases, or unlimited")
    count = UNLIMITED if given.count == "unlimited" else int(given.count)
    quota = ledger_pb2.SetQuota(
        tenant=given.tenant, kind=KINDS[given.kind], amount=amount, count=count
    )
    with Operator(given) as operator:
        operator.commit(ledger_pb2.Command(set_quota=quota))
    print(f"{given.tenant} {given.kind}: {given.amount}, {given.count} leases")
    return OK


def _limit(kind: str, amount: int | None) -> str:
    from grafos._cli.operator import shown_amount

    return "unlimited" if amount is None else shown_amount(kind, amount)


QUOTAS = Listing(
    [
        Column("TENANT", lambda row: row["tenant"]),
        Column("KIND", lambda row: row["kind"]),
        Column("USED", lambda row: _limit(row["kind"], row["used_amount"])),
        Column("LIMIT", lambda row: _limit(row["kind"], row["amount"])),
        Column("LEASES", lambda row: row["used_count"]),
        Column("LEASES MAX", lambda row: "unlimited" if row["count"] is None else row["count"]),
    ],
    name=lambda row: f"{row['tenant']}/{row['kind']}",
    empty="no tenant holds anything or has a limit",
)
