"""Where the members of a bundle go, so that all of them fit at once.

    hardest first ──► each tries the nodes that suit it, best first, beside those before it
                      none left? ──► the one before goes elsewhere, a bounded number of times

Rules. Pure, and the same answer for the same request and nodes. What one member takes is gone for
the next. The ledger decides again: where its blocks lie in pieces, what was found here may not fit.
A refusal says which member has no place, and whether waiting could help: a bundle that does not
even fit on empty nodes is refused for good.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from grafos_core import bundle, placement
from grafos_core.failure import FabricError
from grafos_core.lease import NodeId
from grafos_core.lessor import NodeView
from grafos_core.placement import Admit, Deny, Request

STEPS_MAX: Final = 512
"""Places that are tried for one bundle, all members together."""


@dataclass(frozen=True, slots=True)
class NoPlace:
    """Why there is none, and for which member."""

    member: int
    deny: Deny
    kind: str

    def failure(self) -> FabricError:
        return bundle.of_member(self.deny.failure(), self.member, self.kind)


Barred = Collection[tuple[int, NodeId]]
"""Members and the nodes that the ledger has refused them on."""


def place_all(
    asks: Sequence[Request], nodes: Sequence[NodeView], barred: Barred = ()
) -> tuple[Admit, ...] | NoPlace:
    """A place for every member, in the order of the members."""
    for index, ask in enumerate(asks):
        alone = placement.evaluate(ask, _open_to(index, nodes, barred))
        if isinstance(alone, Deny):
            return NoPlace(index, alone, ask.kind.value)
    search = _Search(asks, barred)
    if search.place({node.node_id: node for node in nodes}, search.order):
        return tuple(search.places[index] for index in range(len(asks)))
    stuck = search.stuck
    if not barred and not _fits_empty(asks, nodes):
        why = "the members do not fit together, not even on empty nodes"
        return NoPlace(stuck, Deny("CAPACITY", why), asks[stuck].kind.value)
    why = f"no room beside the other members: {search.why.reason}"
    return NoPlace(stuck, replace(search.why, reason=why), asks[stuck].kind.value)


def _fits_empty(asks: Sequence[Request], nodes: Sequence[NodeView]) -> bool:
    search = _Search(asks, ())
    return search.place({node.node_id: _emptied(node) for node in nodes}, search.order)


class _Search:
    def __init__(self, asks: Sequence[Request], barred: Barred) -> None:
        self._asks, self._barred = asks, barred
        self._steps = 0
        self.places: dict[int, Admit] = {}
        self.order = tuple(sorted(range(len(asks)), key=self._ease))
        self.stuck = self.order[-1]
        """The member that was the last to find no place."""
        self.why = Deny("NO_CAPACITY", "in use")
        self._deepest = -1

    def _ease(self, index: int) -> tuple[int, int, int]:
        """Those that say where they want to be come first, then the largest."""
        ask = self._asks[index]
        return -len(ask.where), -ask.amount, index

    def place(self, nodes: Mapping[NodeId, NodeView], order: Sequence[int]) -> bool:
        if not order:
            return True
        index, rest = order[0], order[1:]
        ask, views = self._asks[index], _open_to(index, list(nodes.values()), self._barred)
        for admit in placement.candidates(ask, views):
            self._steps += 1
            if self._steps > STEPS_MAX:
                return False
            self.places[index] = admit
            node = nodes[admit.node_id]
            if self.place({**nodes, admit.node_id: _without(node, ask, admit.amount)}, rest):
                return True
        decision = placement.evaluate(ask, views)
        depth = len(self._asks) - len(order)
        if isinstance(decision, Deny) and depth > self._deepest:
            self._deepest, self.stuck, self.why = depth, index, decision
        return False


def _open_to(index: int, nodes: Sequence[NodeView], barred: Barred) -> list[NodeView]:
    return [node for node in nodes if (index, node.node_id) not in barred]


def _without(node: NodeView, ask: Request, amount: int) -> NodeView:
    """With that much taken; of its extents the largest is hoped to be spared."""
    book = node.books[ask.kind]
    free = book.free - amount
    largest = min(book.largest_free_extent, free)
    left = replace(book, free=free, leased=book.leased + amount, largest_free_extent=largest)
    return replace(node, books={**node.books, ask.kind: left})


def _emptied(node: NodeView) -> NodeView:
    """With nothing leased on it."""
    books = {
        kind: replace(book, free=book.total, leased=0, largest_free_extent=book.total)
        for kind, book in node.books.items()
    }
    return replace(node, books=books)
