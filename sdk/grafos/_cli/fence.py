"""`grafos fence`: slices whose teardown failed, and giving them back after somebody has looked.

Rules. A fenced slice serves nobody until its node has measured it anew, or an operator takes what
may be left in it upon himself. Either way it is recorded who cleared it, and why. `probe` and
`clear` answer the same question, whether the slice is clean, with the same exit status.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, Final

from grafos import _clock
from grafos._cli import output
from grafos._cli.exits import FAILED, OK, TIMEOUT, exit_status, explained, together
from grafos._cli.lease import size
from grafos._cli.nouns import Tree
from grafos._cli.output import Column, Listing, Row
from grafos_core import failure
from grafos_core.failure import Disconnected, FabricError

if TYPE_CHECKING:
    from grafos._cli.operator import Operator
    from grafos_proto.v1 import lease_pb2, node_pb2

CLEAR_MS_MAX = 10_000
LOOK_MS = 100
EPILOG: Final = (
    "Exit status: 0 when the slice is clean (clear: and free; with --no-wait: the order is given), "
    "1 when it was measured and is not clean, 3 when it is not fenced, 5 when its node has not "
    "measured it in time. Of several: what those that are not 0 have in common, else 1."
)


def register(tree: Tree) -> None:
    noun = tree.noun("fence", "slices whose teardown failed")
    listing = noun.verb("list", "what is fenced, and since when", _list)
    listing.add_argument("--node", default="", help="only at this node")
    listing.add_argument(
        "--residue", action="store_true",
        help="what was cleared though something may have been left, of all times",
    )  # fmt: skip
    output.add_flags(listing)
    describe = noun.verb("describe", "what is known of one fence", _describe)
    describe.add_argument("lease_id", help="or the beginning of it")
    describe.add_argument("-o", "--output", choices=("table", "json"), default="table")
    probe = noun.verb("probe", "let the node measure a slice again; frees nothing", _probe)
    probe.epilog = EPILOG
    probe.add_argument("lease_id", help="or the beginning of it")
    probe.add_argument("-o", "--output", choices=("table", "json"), default="table")
    clear = noun.verb("clear", "have it torn down and measured once more, then freed", _clear)
    clear.epilog = EPILOG
    clear.add_argument("lease_id", nargs="+", help="or the beginning of it")
    clear.add_argument("--reason", required=True, help="recorded with your name")
    clear.add_argument(
        "--accept-residue", "--i-accept-residue", action="store_true", dest="accept_residue",
        help="free it even where it is not measured clean; stands in receipt and listing for ever",
    )  # fmt: skip
    clear.add_argument("--no-wait", action="store_true", help="do not wait for it to be free")


def _list(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator, lease_row
    from grafos_proto.v1 import lease_pb2

    with Operator(given) as operator:

        def fetch() -> list[dict[str, object]]:
            wanted: dict[str, Any] = {"state": lease_pb2.LEASE_STATE_FENCED}
            if given.residue:
                wanted = {"cleared": "residue"}
            return [lease_row(lease) for lease in operator.leases(node_id=given.node, **wanted)]

        return output.show(given, fetch, RESIDUES if given.residue else FENCES)


def _describe(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator, lease_row

    with Operator(given) as operator:
        lease = _fenced(operator, given.lease_id)
        row, probes = lease_row(lease), _probes(operator, lease)
    if given.output == "json":
        print(json.dumps(row | {"probes": probes}, sort_keys=True))
        return OK
    evidence = [(f"  {name}", value) for name, value in row["fence_evidence"].items()]
    facts = [
        ("lease", row["lease_id"]), ("slice", f"{size(row)} of {row['kind']} at {row['node_id']}"),
        ("epoch", row["epoch"]), ("cause", row["fence_cause"]), ("since", _since(row)),
        ("ended by", row["cause"]), ("holder", row["holder"]), *evidence, *_told(probes),
    ]  # fmt: skip
    print(output.facts(facts), end="")
    return OK


def _probes(operator: Operator, lease: lease_pb2.Lease) -> dict[str, Any] | None:
    """What the node has found since; None: it does not answer."""
    from grafos_proto.v1 import node_pb2

    request = node_pb2.ListNodeLeasesRequest(lease_id=lease.lease_id)
    try:
        found = operator.node(lease.node_id, "ListLeases", request).leases
    except Disconnected:
        return None
    if not found or not found[0].HasField("fence"):
        return None
    fence = found[0].fence
    return {
        "count": fence.probes, "next_ms": fence.next_probe_ms,
        "latest": _finding(fence.latest) if fence.HasField("latest") else None,
        "findings": [_finding(each) for each in fence.findings],
    }  # fmt: skip


def _finding(found: node_pb2.Finding) -> dict[str, Any]:
    return {
        "number": found.number, "at_ms": found.at_ms, "clean": found.clean, "asked": found.asked,
        "evidence": dict(found.evidence),
    }  # fmt: skip


def _told(probes: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The last look, and those before it that found something else."""
    if probes is None:
        return [("probes", "its node does not answer")]
    due = f"the next in {output.duration(probes['next_ms'])}"
    if probes["latest"] is None:
        return [("probes", f"none yet, {due}")]
    told = [("probes", f"{probes['count']}, {due}"), ("last", _line(probes["latest"]))]
    return told + [(f"  #{each['number']}", _line(each)) for each in reversed(probes["findings"])]


def _line(finding: dict[str, Any]) -> str:
    verdict = "clean" if finding["clean"] else "not clean"
    asked = ", asked for" if finding["asked"] else ""
    found = finding["evidence"]
    listed = ", ".join(f"{name} {value}" for name, value in sorted(found.items()))
    evidence = found.get("cause") or listed
    return f"{verdict}, {_ago(finding['at_ms'])} ago{asked}: {evidence or 'nothing measured'}"


def _ago(at_ms: int) -> str:
    return output.duration(max(0, _clock.wall_ms() - at_ms))


def _probe(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator

    with Operator(given) as operator:
        lease = _fenced(operator, given.lease_id)
        try:
            clean, evidence = _measured(operator, lease)
        except Disconnected as refused:
            output.progress(f"grafos: {explained(refused)}")
            return TIMEOUT
    if given.output == "json":
        print(json.dumps({"clean": clean, "evidence": evidence}, sort_keys=True))
    else:
        verdict = "clean: a clear would succeed now" if clean else "not clean"
        print(output.facts([("verdict", verdict), *sorted(evidence.items())]), end="")
    return OK if clean else FAILED


def _clear(given: argparse.Namespace) -> int:
    from grafos._cli.operator import Operator

    with Operator(given) as operator:
        named = [_fenced(operator, text) for text in given.lease_id]
        return together([_clear_one(operator, lease, given) for lease in named])


def _clear_one(operator: Operator, lease: lease_pb2.Lease, given: argparse.Namespace) -> int:
    """Order it and tell what came of it; the exit status for this one."""
    try:
        _order(operator, lease.lease_id, given)
        if given.no_wait:
            told, status = "clear ordered", OK
        else:
            told, status = _outcome(operator, lease)
    except FabricError as refused:
        output.progress(f"grafos: {lease.lease_id}: {explained(refused)}")
        return exit_status(refused)
    print(f"{lease.lease_id} {told}")
    return status


def _order(operator: Operator, lease_id: str, given: argparse.Namespace) -> None:
    from grafos._cli.operator import new_request_id
    from grafos_proto.v1 import ledger_pb2

    order = ledger_pb2.ClearFence(
        request_id=new_request_id(), lease_id=lease_id, reason=given.reason,
        accept_residue=given.accept_residue,
    )  # fmt: skip
    operator.commit(ledger_pb2.Command(clear=order))


def _outcome(operator: Operator, lease: lease_pb2.Lease) -> tuple[str, int]:
    """Released, or why not: the node finds that it is not clean, or has not answered."""
    from grafos._cli.operator import STATE_NAMES

    until_ms = _clock.boot_ms() + CLEAR_MS_MAX
    while True:
        state = STATE_NAMES[operator.lease(lease.lease_id).state]
        if state == "released":
            return state, OK
        if _clock.boot_ms() >= until_ms:
            break
        _clock.sleep_ms(LOOK_MS)
    try:
        clean, _ = _measured(operator, lease)
    except Disconnected:
        return f"{state}: its node does not answer; the order stands", TIMEOUT
    if clean:
        return f"{state}: clean, but not free yet; the order stands", TIMEOUT
    return f"{state}: not clean", FAILED


def _fenced(operator: Operator, text: str) -> lease_pb2.Lease:
    from grafos._cli.operator import STATE_NAMES

    lease = operator.lease(text)
    state = STATE_NAMES[lease.state]
    if state != "fenced":
        raise failure.of("NOT_FOUND", f"lease {lease.lease_id} is {state}, not fenced")
    return lease


def _measured(operator: Operator, lease: lease_pb2.Lease) -> tuple[bool, dict[str, str]]:
    """Whether the node finds the slice clean, and what it measured."""
    from grafos_proto.v1 import node_pb2

    request = node_pb2.ProbeRequest(lease_id=lease.lease_id)
    found = operator.node(lease.node_id, "Probe", request)
    return found.clean, dict(found.evidence)


def _since(row: Row) -> str:
    return _ago(row["fenced_at_ms"] or 0)


FENCES = Listing(
    [
        Column("LEASE", lambda row: row["lease_id"][:12]),
        Column("NODE", lambda row: row["node_id"]),
        Column("KIND", lambda row: row["kind"]),
        Column("SIZE", size),
        Column("SINCE", _since),
        Column("CAUSE", lambda row: row["fence_cause"]),
        Column("EPOCH", lambda row: row["epoch"], wide=True),
        Column("ENDED BY", lambda row: row["cause"], wide=True),
        Column("HOLDER", lambda row: row["holder"], wide=True),
        Column("ID", lambda row: row["lease_id"], wide=True),
    ],
    name=lambda row: str(row["lease_id"]),
    empty="nothing is fenced",
)
RESIDUES = Listing(
    [*FENCES.columns[:4], Column("FENCED", _since), *FENCES.columns[5:]],
    name=FENCES.name,
    empty="nothing was freed with residue",
)
