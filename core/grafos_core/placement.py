"""Which node a request goes to, and for each node that it does not go to, the term that failed.

    filter    every node passes the same terms in the same order; the first that fails is the reason
    score     among those that pass, the emptiest first, so that leases spread; ties go by a hash of
              request and node, so that equal nodes share evenly and a retry decides alike

Decisions, as the seed names them: `Admit(node_id) | Deny(code, …) | Preempt(victims)`. Isolation is
yes or no at the filter, never a score. What can never fit is refused at once; what could fit later
says when, from the lifetimes of the leases in the way, or plainly that there is no bound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import HELD, Isolation, Kind, Lease, LeaseId, LeaseState, NodeId, Policy
from grafos_core.lessor import EVIDENCE_MS_MAX, NodeView

ISOLATION_OFFERED: Mapping[Kind, frozenset[Isolation]] = {
    Kind.MEM: frozenset({Isolation.NONE, Isolation.SOFT, Isolation.CONTEXT}),
    Kind.BLOCK: frozenset({Isolation.NONE, Isolation.SOFT, Isolation.CONTEXT}),
}
"""What a node can prove today; a kind that is not listed proves nothing."""
HELD_BY_MAX = 16


@dataclass(frozen=True, slots=True)
class Request:
    request_id: str
    kind: Kind
    amount: int
    policy: Policy = field(default_factory=Policy)
    where: Mapping[str, str] = field(default_factory=dict)
    """Labels a node must have; `node` is its id."""


@dataclass(frozen=True, slots=True)
class Term:
    name: str
    holds: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What became of one node. `terms` ends at the first that failed."""

    node_id: NodeId
    terms: tuple[Term, ...]
    held_by: tuple[LeaseId, ...] = ()
    free_by_ms: int | None = None
    """Wall clock; None: no bound."""

    @property
    def failed(self) -> Term | None:
        return next((term for term in self.terms if not term.holds), None)


@dataclass(frozen=True, slots=True)
class Admit:
    node_id: NodeId
    incarnation: str
    front_endpoint: str
    amount: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Deny:
    code: str
    reason: str
    earliest_ms: int | None = None
    reports: tuple[NodeReport, ...] = ()

    def failure(self) -> FabricError:
        retry_ms = 1000 if self.code in ("NO_CAPACITY", "NODE_NOT_READY") else None
        return failure.of(self.code, self.reason, retry_after_ms=retry_ms)


@dataclass(frozen=True, slots=True)
class Preempt:
    victims: tuple[LeaseId, ...]
    node_id: NodeId


Decision = Admit | Deny | Preempt

_LATER = ("capacity", "extent")
_WAITING = ("registration", "evidence", "readiness", "mode", "live")


def evaluate(request: Request, nodes: Iterable[NodeView]) -> Decision:
    """Pure: the same request and nodes give the same decision."""
    amount = rounded(request.kind, request.amount)
    views = list(nodes)
    reports = [NodeReport(view.node_id, judge(request, amount, view)) for view in views]
    fitting = [v for v, report in zip(views, reports, strict=True) if report.failed is None]
    if not fitting:
        return _deny(request, reports)
    best = min(fitting, key=lambda view: _rank(request, amount, view))
    return Admit(best.node_id, best.incarnation, best.front_endpoint, amount, "spread")


def candidates(request: Request, nodes: Iterable[NodeView]) -> list[Admit]:
    """Every node that fits, best first: where to go when the ledger's answer was 'no longer'."""
    amount = rounded(request.kind, request.amount)
    fitting = [v for v in nodes if all(term.holds for term in judge(request, amount, v))]
    fitting.sort(key=lambda view: _rank(request, amount, view))
    return [Admit(v.node_id, v.incarnation, v.front_endpoint, amount, "spread") for v in fitting]


def explain(
    request: Request, nodes: Iterable[NodeView], leases: Sequence[Lease]
) -> tuple[Decision, tuple[NodeReport, ...]]:
    """The decision, with every node's terms, what holds it and until when."""
    amount = rounded(request.kind, request.amount)
    views = list(nodes)
    reports = []
    for view in views:
        terms = judge(request, amount, view)
        report = NodeReport(view.node_id, terms)
        if report.failed is not None and report.failed.name in _LATER:
            mine = [x for x in leases if x.node_id == view.node_id and x.kind is request.kind]
            book = view.books[request.kind]
            held_by, free_by_ms = bound(amount - book.free, mine)
            report = NodeReport(view.node_id, terms, held_by, free_by_ms)
        reports.append(report)
    decision = evaluate(request, views)
    if isinstance(decision, Deny):
        bounds = [r.free_by_ms for r in reports if r.free_by_ms is not None]
        earliest_ms = min(bounds) if bounds else None
        decision = Deny(decision.code, decision.reason, earliest_ms, tuple(reports))
    return decision, tuple(reports)


def judge(request: Request, amount: int, view: NodeView) -> tuple[Term, ...]:
    """The terms in order, up to and with the first that fails."""
    terms: list[Term] = []
    for term in _terms(request, amount, view):
        terms.append(term)
        if not term.holds:
            break
    return tuple(terms)


def _terms(request: Request, amount: int, view: NodeView) -> Iterable[Term]:
    for name, wanted in sorted(request.where.items()):
        found = view.node_id if name == "node" else view.labels.get(name, "")
        yield Term(f"label:{name}", found == wanted, f"{wanted} asked, {found or 'none'} found")
    book = view.books.get(request.kind)
    yield Term("kind", book is not None, f"{request.kind} asked")
    assert book is not None  # else the caller stopped at the term above
    offered = ISOLATION_OFFERED.get(request.kind, frozenset({Isolation.NONE}))
    isolation = request.policy.isolation
    yield Term("isolation", isolation in offered, f"{isolation} asked")
    yield Term("total", book.total >= amount, f"{amount} asked, {book.total} in all")
    yield Term("registration", not view.lost, "ran out" if view.lost else "in force")
    fresh = view.evidence_age_ms <= EVIDENCE_MS_MAX
    yield Term("evidence", fresh, f"{view.evidence_age_ms} ms old, {EVIDENCE_MS_MAX} allowed")
    yield Term("mode", view.mode == "accepting", view.mode)
    known = "known" if view.live_known else "not known yet"
    yield Term("live", view.live_known, f"its live leases are {known}")
    ready = request.kind in view.ready_kinds
    closed = ", ".join(f"{gate}: {why}" for gate, why in sorted(view.closed_gates.items()))
    unready = closed or f"{request.kind} is not ready"
    yield Term("readiness", ready, f"{request.kind} is ready" if ready else unready)
    yield Term("capacity", book.free >= amount, f"{amount} asked, {book.free} free")
    largest = book.largest_free_extent
    yield Term("extent", largest >= amount, f"{amount} asked, {largest} in one piece")


def bound(missing: int, leases: Sequence[Lease]) -> tuple[tuple[LeaseId, ...], int | None]:
    """What stands in the way of `missing`, and when at the latest it is gone.

    A lease without a lifetime, or one that is fenced, bounds nothing. Teardown time is not counted:
    an overdue teardown fences, and a fence has no bound.
    """
    ordered = sorted(
        (lease for lease in leases if lease.state in HELD),
        key=lambda lease: (_gone_by_ms(lease) is None, _gone_by_ms(lease) or 0, lease.lease_id),
    )
    held_by, sum_ = [], 0
    for lease in ordered:
        held_by.append(lease.lease_id)
        sum_ += lease.amount
        gone_ms = _gone_by_ms(lease)
        if gone_ms is None:
            break
        if sum_ >= missing:
            return tuple(held_by[:HELD_BY_MAX]), gone_ms
    return tuple(held_by[:HELD_BY_MAX]), None


def _gone_by_ms(lease: Lease) -> int | None:
    if lease.state is LeaseState.FENCED:
        return None
    return lease.lifetime_end_ms


def rounded(kind: Kind, amount: int) -> int:
    """Up to the kind's granule: memory goes by pages."""
    return -(-amount // kind.granule) * kind.granule


def _rank(request: Request, amount: int, view: NodeView) -> tuple[int, bytes]:
    book = view.books[request.kind]
    used_permille = (book.total - book.free + amount) * 1000 // max(1, book.total)
    tie = hashlib.sha256(f"{request.request_id}/{view.node_id}".encode()).digest()
    return used_permille, tie


def _deny(request: Request, reports: Sequence[NodeReport]) -> Deny:
    """The best reason: what came nearest to fitting speaks for all."""
    order = ("label", "kind", "isolation", "total", *_WAITING, *_LATER)

    def progress(report: NodeReport) -> int:
        assert report.failed is not None
        return order.index(report.failed.name.split(":")[0])

    if not reports:
        return Deny("NODE_NOT_READY", "no node has registered")
    nearest = max(reports, key=progress)
    term = nearest.failed
    assert term is not None
    name = term.name.split(":")[0]
    if name in ("label", "kind", "isolation"):
        return Deny("NO_MATCH", f"{term.name}: {term.detail}", reports=tuple(reports))
    if name == "total":
        return Deny("CAPACITY", term.detail, reports=tuple(reports))
    code = "NODE_NOT_READY" if name in _WAITING else "NO_CAPACITY"
    return Deny(code, f"{nearest.node_id}: {term.name}: {term.detail}", reports=tuple(reports))
