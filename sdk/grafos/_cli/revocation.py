"""`grafos lease revoke`: which leases are taken back, and what became of each of them.

Rules. Leases are named by id or chosen by a selector, never both; who chooses nothing must say
`--all`. A signing key is revoked before its leases are looked for, so that it signs no more. Nobody
is asked anything: `--dry-run` shows what would be taken. An id that does not exist stops the
command before its first order. After that every lease gets its order and its line, and one that
fails keeps none of the others from being taken back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from grafos import _clock
from grafos._cli import output, settings
from grafos._cli.exits import FAILED, OK, TIMEOUT, exit_status, together
from grafos._cli.output import Listing
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import IN_GRACE, TEARDOWN_MS_MAX

if TYPE_CHECKING:
    from grafos._cli.operator import Operator
    from grafos_proto.v1 import lease_pb2

GRACE_S_MAX: Final = 600
BATCH: Final = 256
"""Orders in one message; the ledger takes no more."""
LOOK_ONE_BY_ONE_MAX: Final = 32
"""Above it the leases that are still ending are listed, which costs a page and not a call each."""
LOOK_MS_MIN, LOOK_MS_MAX = 50, 1_000
SELECTORS: Final = ("node", "kind", "tenant", "holder", "holder_prefix", "state", "key")
EPILOG: Final = (
    "Exit status: 0 when every lease was taken back (without --wait: was ordered to be), 1 when "
    "one is fenced or was refused, 3 when an id does not exist, 5 when --wait ended before the "
    "leases did."
)


def add_selector(parser: argparse.ArgumentParser, states: Iterable[str]) -> None:
    """The flags by which leases are chosen."""
    parser.add_argument("--node", default="", help="only at this node")
    parser.add_argument("--kind", choices=("mem", "block"), default="", help="only of this kind")
    parser.add_argument("--tenant", default="", help="only of this tenant")
    parser.add_argument("--holder", default="", help="only of this holder (SPIFFE id)")
    parser.add_argument(
        "--holder-prefix", default="", metavar="ID",
        help="only of holders whose SPIFFE id begins with these whole segments",
    )  # fmt: skip
    parser.add_argument("--state", choices=tuple(states), default="", help="only so")


def wanted(given: argparse.Namespace) -> dict[str, Any]:
    """What the selector means to `Operator.leases`."""
    from grafos._cli.operator import KINDS, STATE_NAMES

    states = {name: number for number, name in STATE_NAMES.items()}
    return {
        "node_id": given.node, "tenant": given.tenant, "holder": given.holder,
        "holder_prefix": given.holder_prefix,
        "kind": KINDS[given.kind] if given.kind else 0,
        "state": states[given.state] if given.state else 0,
    }  # fmt: skip


def register(verb: argparse.ArgumentParser) -> None:
    verb.epilog = EPILOG
    verb.add_argument("lease_id", nargs="*", help="or the beginning of it")
    add_selector(verb, ("pending", "active"))
    verb.add_argument(
        "--key", default="", metavar="ID",
        help="only those of which this key signed a token; it signs nothing from then on",
    )  # fmt: skip
    verb.add_argument("--all", action="store_true", help="every live lease of the fabric")
    verb.add_argument("--reason", required=True, help="recorded, and told to the holder")
    verb.add_argument("--grace", type=int, default=0, metavar="S", help="warn, and wait so long")
    verb.add_argument(
        "--wait", action="store_true",
        help="until each is credited or fenced: the grace, a teardown and GRAFOS_TIMEOUT_S long",
    )  # fmt: skip
    verb.add_argument("--dry-run", action="store_true", help="only list what would be taken back")
    verb.add_argument("-o", "--output", choices=("table", "json", "name"), default="table")
    verb.set_defaults(misused=verb.error)


def revoke(given: argparse.Namespace, listing: Listing) -> int:
    """Take back what was chosen; `listing` shows leases to people."""
    from grafos._cli.operator import Operator, lease_row

    _check(given)
    with Operator(given) as operator:
        if given.key and not given.dry_run:
            _revoke_key(operator, given)
        chosen = _chosen(operator, given)
        if given.dry_run:
            rows = [lease_row(each) for each in chosen]
            print(output.rendered(rows, listing, given.output, headers=True), end="")
            return OK
        found = Revocation(operator, given)
        found.order(chosen)
        if given.wait:
            found.wait()
    return found.show()


def _check(given: argparse.Namespace) -> None:
    selects = any(getattr(given, name) for name in SELECTORS)
    if (bool(given.lease_id), selects, given.all).count(True) != 1:
        given.misused("say which leases: ids, or a selector such as --node, or --all")
    if not 0 <= given.grace <= GRACE_S_MAX:
        raise failure.of("RANGE", f"--grace: 0 to {GRACE_S_MAX} s")


def _chosen(operator: Operator, given: argparse.Namespace) -> list[lease_pb2.Lease]:
    if given.lease_id:
        named = [operator.lease(text) for text in given.lease_id]
        return list({each.lease_id: each for each in named}.values())
    found = operator.leases(**wanted(given))
    return [each for each in found if _is_revocable(each) and given.key in ("", *each.key_ids)]


def _is_revocable(lease: lease_pb2.Lease) -> bool:
    """It lives; or it is in a grace, which may become shorter."""
    from grafos_proto.v1 import lease_pb2

    live = (lease_pb2.LEASE_STATE_PENDING, lease_pb2.LEASE_STATE_ACTIVE)
    in_grace = lease.state == lease_pb2.LEASE_STATE_ENDING and lease.stage in IN_GRACE
    return lease.state in live or in_grace


def _revoke_key(operator: Operator, given: argparse.Namespace) -> None:
    from grafos_proto.v1 import ledger_pb2

    order = ledger_pb2.RevokeKey(key_id=given.key, reason=given.reason)
    operator.commit(ledger_pb2.Command(revoke_key=order))


class Revocation:
    """The orders of one command, and how far each lease has come."""

    def __init__(self, operator: Operator, given: argparse.Namespace) -> None:
        self._operator, self._given = operator, given
        self._leases: dict[str, lease_pb2.Lease] = {}
        self._refusals: dict[str, FabricError] = {}

    def order(self, chosen: list[lease_pb2.Lease]) -> None:
        """One order for each, many in one message; a message that is lost fails its own leases."""
        self._leases = {each.lease_id: each for each in chosen}
        ids = list(self._leases)
        for first in range(0, len(ids), BATCH):
            batch = ids[first : first + BATCH]
            try:
                self._commit(batch)
            except FabricError as refused:
                self._refusals |= dict.fromkeys(batch, refused)

    def _commit(self, batch: list[str]) -> None:
        from grafos._cli.operator import new_request_id
        from grafos_proto.v1 import ledger_pb2
        from grafos_proto.wire import failures

        request_id = new_request_id()
        orders = [
            ledger_pb2.EndLease(
                request_id=request_id, lease_id=each, cause="revoked", reason=self._given.reason,
                grace_ms=self._given.grace * 1000,
            )
            for each in batch
        ]  # fmt: skip
        commands = [ledger_pb2.Command(end=order) for order in orders]
        answer = self._operator.ledger("Commit", ledger_pb2.CommitRequest(commands=commands))
        for lease_id, outcome in zip(batch, answer.outcomes, strict=True):
            if outcome.HasField("failure"):
                self._refusals[lease_id] = failures.failure_of(outcome.failure)
            else:
                self._leases[lease_id] = outcome.lease

    def wait(self) -> None:
        """Until each is credited or fenced, or it takes too long."""
        patience_ms = self._given.grace * 1000 + TEARDOWN_MS_MAX
        patience_ms += 1000 * int(settings.value(self._given, "timeout_s"))
        until_ms, pause_ms = _clock.boot_ms() + patience_ms, LOOK_MS_MIN
        while (ending := self._ending()) and _clock.boot_ms() < until_ms:
            try:
                self._leases |= self._looked_up(ending)
            except FabricError as refused:  # what is known by now is still worth telling
                output.progress(f"grafos: cannot look any more: {refused}")
                return
            _clock.sleep_ms(pause_ms)
            pause_ms = min(pause_ms * 2, LOOK_MS_MAX)

    def _ending(self) -> list[str]:
        from grafos_proto.v1 import lease_pb2

        return [
            lease_id for lease_id, lease in self._leases.items()
            if lease.state == lease_pb2.LEASE_STATE_ENDING and lease_id not in self._refusals
        ]  # fmt: skip

    def _looked_up(self, ending: Collection[str]) -> Mapping[str, lease_pb2.Lease]:
        """Those that may have come further, as they are now."""
        from grafos_proto.v1 import lease_pb2

        if len(ending) > LOOK_ONE_BY_ONE_MAX:
            still = self._operator.leases(state=lease_pb2.LEASE_STATE_ENDING)
            ending = set(ending) - {each.lease_id for each in still}
        return {each: self._operator.lease(each) for each in ending}

    def show(self) -> int:
        """Print what became of each; the exit status."""
        rows = [self._row(lease_id) for lease_id in self._leases]
        if self._given.output == "json":
            print(json.dumps(rows, sort_keys=True))
        for row in rows if self._given.output != "json" else ():
            named = self._given.output == "name"
            print(row["lease_id"] if named else f"{row['lease_id']} {_told(row)}")
        if not rows:
            output.progress("no such lease")
        return together(self._status(row) for row in rows)

    def _row(self, lease_id: str) -> dict[str, Any]:
        from grafos._cli.operator import lease_row

        refused = self._refusals.get(lease_id)
        told = {"code": refused.code, "detail": refused.detail} if refused else {}
        return lease_row(self._leases[lease_id]) | {"code": "", "detail": ""} | told

    def _status(self, row: Mapping[str, Any]) -> int:
        refused = self._refusals.get(row["lease_id"])
        if refused is not None:
            return exit_status(refused)
        if row["state"] == "fenced":
            return FAILED
        return TIMEOUT if self._given.wait and row["state"] == "ending" else OK


def _told(row: Mapping[str, Any]) -> str:
    if row["code"]:
        return f"not revoked ({row['code']}: {row['detail']})"
    why = row["fence_cause"] if row["state"] == "fenced" else row["cause"]
    return f"{row['state']} ({why})"
