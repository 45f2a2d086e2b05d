"""What several callers of one connection ask together: one commit, an answer for each.

Rules. Each succeeds or fails alone, and exactly as if it had come alone. None of them waits, so
that none makes the others wait; the node that fits is tried first, and for those that the ledger
refused there the next one, all of them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from grafos_core import failure, placement
from grafos_core.failure import FabricError
from grafos_core.lease import Lease
from grafos_core.lessor import NodeView
from grafos_core.placement import Admit, Deny, Request
from grafos_core.spiffe import Identity
from grafos_proto.v1 import admission_pb2, ledger_pb2
from grafos_proto.wire import convert
from grafos_proto.wire.failures import failure_of
from services.admission import asking
from services.admission.ledger import Ledger
from services.admission.tokens import Minter

REQUESTS_MAX: Final = 64
"""Requests are about 1 KiB at most, and a message to us has 256 KiB; answers are below 2 KiB."""
NODES_TRIED_MAX: Final = 8

A = TypeVar("A")


@dataclass(slots=True)
class _Pending:
    """One request, and the nodes that are left to try."""

    ask: Request
    request: admission_pb2.AcquireRequest
    places: list[Admit]
    outcome: Lease | FabricError


class Batches:
    """Safe from any thread."""

    def __init__(self, ledger: Ledger, minter: Minter) -> None:
        self._ledger, self._minter = ledger, minter

    def acquire(
        self, requests: Sequence[admission_pb2.AcquireRequest], who: Identity,
        nodes: Sequence[NodeView],
    ) -> list[tuple[Request | None, Lease | FabricError]]:  # fmt: skip
        """Each request as it was read, and its lease or why there is none."""
        found: list[tuple[Request | None, Lease | FabricError]] = []
        pending: list[tuple[int, _Pending]] = []
        for request in requests:
            one = attempt(lambda asked=request: self._read(asked, nodes))  # type: ignore[misc]
            if isinstance(one, FabricError):
                found.append((None, one))
                continue
            if one.places:
                pending.append((len(found), one))
            found.append((one.ask, one.outcome))
        for _ in range(NODES_TRIED_MAX):
            if not pending:
                break
            self._grant([one for _, one in pending], who)
            for index, one in pending:
                found[index] = (one.ask, one.outcome)
            pending = [(index, one) for index, one in pending if _goes_on(one)]
        return found

    def _read(self, request: admission_pb2.AcquireRequest, nodes: Sequence[NodeView]) -> _Pending:
        ask = asking.read_request(request)
        places = placement.candidates(ask, nodes)
        if places:
            return _Pending(ask, request, places[::-1], failure.of("NO_CAPACITY"))
        decision = placement.evaluate(ask, nodes)
        failure.invariant(isinstance(decision, Deny), "no node fits and none is refused")
        assert isinstance(decision, Deny)
        return _Pending(ask, request, [], decision.failure())

    def _grant(self, pending: Sequence[_Pending], who: Identity) -> None:
        """Each on its next node, all in one commit."""
        key_id = self._minter.key_id
        commands = [
            ledger_pb2.Command(
                grant=asking.grant_of(one.ask, one.request, who, one.places.pop(), key_id)
            )
            for one in pending
        ]
        outcomes = self._ledger.commit_each(commands, asking.time_left_ms())
        for one, outcome in zip(pending, outcomes, strict=True):
            one.outcome = lease_or_failure(outcome)

    def renew(
        self, renewals: Sequence[ledger_pb2.LedgerRenew | FabricError]
    ) -> list[Lease | FabricError]:
        good = [each for each in renewals if not isinstance(each, FabricError)]
        outcomes = self._ledger.renew_each(good, asking.time_left_ms()) if good else []
        return _merged(renewals, outcomes)

    def end(self, ends: Sequence[ledger_pb2.EndLease | FabricError]) -> list[Lease | FabricError]:
        commands = [
            ledger_pb2.Command(end=each) for each in ends if not isinstance(each, FabricError)
        ]
        outcomes = self._ledger.commit_each(commands, asking.time_left_ms()) if commands else []
        return _merged(ends, outcomes)


def _goes_on(one: _Pending) -> bool:
    refused = isinstance(one.outcome, FabricError) and one.outcome.code in asking.ELSEWHERE
    return refused and bool(one.places)


def _merged(
    asked: Sequence[Any], outcomes: Sequence[ledger_pb2.Outcome]
) -> list[Lease | FabricError]:
    """Those that could not be read keep their refusal; the others take what the ledger said."""
    answers = iter(outcomes)
    return [
        each if isinstance(each, FabricError) else lease_or_failure(next(answers)) for each in asked
    ]


def attempt(work: Callable[[], A]) -> A | FabricError:
    """What it gives, or the refusal that it raises: one of many must not end the others."""
    try:
        return work()
    except FabricError as refused:
        return refused


def lease_or_failure(outcome: ledger_pb2.Outcome) -> Lease | FabricError:
    if outcome.HasField("failure"):
        return failure_of(outcome.failure)
    return convert.lease_from_proto(outcome.lease)
