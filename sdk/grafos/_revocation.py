"""Orders to take leases back, each with its own outcome, however many there are.

Rules. As many to a message as admission takes. A page that is lost fails the leases that it named;
what was chosen and not named yet is asked for by its own call, which may fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grafos_core.failure import FabricError
from grafos_core.lease import Lease

if TYPE_CHECKING:
    from grafos_proto.v1 import admission_pb2

IDS_MAX: Final = 1_024
PAGES_MAX: Final = 10_000

Ask = Callable[["admission_pb2.RevokeRequest"], "admission_pb2.RevokeResponse"]


@dataclass(frozen=True, slots=True)
class Revocation:
    """What became of the order to take one lease back."""

    lease_id: str
    lease: Lease | None = None
    """As the ledger has it now; None: the order was refused."""
    failure: FabricError | None = None
    """Why it was."""


def revoke_named(
    ask: Ask, order: admission_pb2.RevokeRequest, lease_ids: Sequence[str]
) -> list[Revocation]:
    """Each in the order in which it was named."""
    known: dict[str, Revocation] = {}
    for first in range(0, len(lease_ids), IDS_MAX):
        named = list(lease_ids[first : first + IDS_MAX])
        request = _copy(order)
        request.lease_ids[:] = named
        try:
            answer = ask(request)
        except FabricError as lost:
            if len(lease_ids) <= IDS_MAX:
                raise
            known |= {each: Revocation(each, failure=lost) for each in named}
        else:
            known |= {each.lease_id: each for each in _read(answer)}
    return [known[each] for each in lease_ids if each in known]


def revoke_chosen(
    ask: Ask, order: admission_pb2.RevokeRequest, select: admission_pb2.LeaseSelector
) -> list[Revocation]:
    found: list[Revocation] = []
    after = ""
    for _ in range(PAGES_MAX):
        request = _copy(order)
        request.select.CopyFrom(select)
        request.after = after
        answer = ask(request)
        found += _read(answer)
        if not answer.next:
            break
        after = answer.next
    return found


def _copy(order: admission_pb2.RevokeRequest) -> admission_pb2.RevokeRequest:
    from grafos._calls import new_request_id  # a connection has loaded it by now

    request = type(order)(request_id=new_request_id())
    request.MergeFrom(order)
    return request


def _read(answer: admission_pb2.RevokeResponse) -> list[Revocation]:
    from grafos_proto.wire import convert, failures

    taken = [convert.lease_from_proto(each) for each in answer.leases]
    return [Revocation(each.lease_id, each) for each in taken] + [
        Revocation(each.lease_id, failure=failures.failure_of(each.failure))
        for each in answer.refusals
    ]
