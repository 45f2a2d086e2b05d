"""Orders to take leases back, each with its own outcome, however many there are.

Rules. Leases are named, or chosen by what all of them have in common, never both. As many to a
message as admission takes. A message that is lost fails the leases that it named; what was chosen
and not named yet is asked for by the next message, which may fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import Kind, Lease

if TYPE_CHECKING:
    from grafos_proto.v1 import admission_pb2

IDS_MAX: Final = 1_024
SELECTORS: Final[Mapping[str, str]] = {
    "tenant": "tenant", "holder": "holder", "holder_prefix": "holder_prefix", "node": "node_id",
    "kind": "kind", "key": "key_id",
}  # fmt: skip
"""By what leases are chosen, and its name on the wire."""

Ask = Callable[["admission_pb2.RevokeRequest"], Any]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What became of the order to take one lease back."""

    lease_id: str
    lease: Lease | None = None
    """As the ledger has it now; None: the order was refused."""
    failure: FabricError | None = None
    """Why it was."""


def revocations(
    ask: Ask, named: Sequence[str], chosen: Mapping[str, str], reason: str, grace_ms: int
) -> list[Revocation]:
    """What became of the order for each lease; `chosen` is a selector, by the names above."""
    from grafos_proto.v1 import admission_pb2  # slow to load; whoever asks has a connection

    unknown = sorted(chosen.keys() - SELECTORS.keys())
    selects = {name: value for name, value in chosen.items() if value}
    if unknown or bool(named) is bool(selects):
        which = f"lease ids, or by {', '.join(SELECTORS)}"
        raise failure.of("INVALID", f"say which leases: {which}")
    order = admission_pb2.RevokeRequest(reason=reason, grace_ms=grace_ms)
    return _chosen(ask, order, selects) if selects else _named(ask, order, named)


def _named(
    ask: Ask, order: admission_pb2.RevokeRequest, lease_ids: Sequence[str]
) -> list[Revocation]:
    """Each in the order in which it was named."""
    known: dict[str, Revocation] = {}
    for first in range(0, len(lease_ids), IDS_MAX):
        batch = list(lease_ids[first : first + IDS_MAX])
        request = _copy(order)
        request.lease_ids[:] = batch
        try:
            answer = ask(request)
        except FabricError as lost:
            if len(lease_ids) <= IDS_MAX:
                raise
            known |= {each: Revocation(each, failure=lost) for each in batch}
        else:
            known |= {each.lease_id: each for each in _read(answer)}
    return [known[each] for each in lease_ids if each in known]


def _chosen(
    ask: Ask, order: admission_pb2.RevokeRequest, selects: Mapping[str, str]
) -> list[Revocation]:
    found: list[Revocation] = []
    after = ""
    while True:
        request = _copy(order)
        for name, value in selects.items():
            setattr(request.select, SELECTORS[name], _kind(value) if name == "kind" else value)
        request.after = after
        answer = ask(request)
        found += _read(answer)
        if answer.next <= after:  # empty at the end
            return found
        after = answer.next


def _kind(label: str) -> int:
    from grafos_proto.wire import convert

    if label not in tuple(Kind):
        raise failure.of("INVALID", f"kind: one of {', '.join(Kind)}")
    return convert.kind_to_proto(Kind(label))


def _copy(order: admission_pb2.RevokeRequest) -> admission_pb2.RevokeRequest:
    from grafos._calls import new_request_id

    request = type(order)(request_id=new_request_id())
    request.MergeFrom(order)
    return request


def _read(answer: Any) -> list[Revocation]:
    from grafos_proto.wire import convert, failures

    taken = [convert.lease_from_proto(each) for each in answer.leases]
    return [Revocation(each.lease_id, each) for each in taken] + [
        Revocation(each.lease_id, failure=failures.failure_of(each.failure))
        for each in answer.refusals
    ]
