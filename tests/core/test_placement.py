"""What `explain` says of each node is true of it, also of the terms that hold."""

from __future__ import annotations

from dataclasses import replace

from grafos_core.books import BookView
from grafos_core.lease import Kind, NodeId
from grafos_core.lessor import NodeView
from grafos_core.placement import Request, judge

NODE = NodeView(
    node_id=NodeId("n1"), incarnation="1" * 32, boot_epoch=1, mode="accepting", lost=False,
    ready_kinds=frozenset({Kind.MEM}), closed_gates={}, evidence_age_ms=10, front_endpoint="",
    control_endpoint="", labels={}, books={Kind.MEM: BookView(8192, 8192, 0, 0, 0, 0, 8192)},
    lease_count=0, live_known=True, registered_until_ms=1_000,
)  # fmt: skip


def details(view: NodeView) -> dict[str, str]:
    terms = judge(Request("r", Kind.MEM, 4096), 4096, view)
    return {term.name: term.detail for term in terms}


def test_a_term_that_holds_says_what_is_so() -> None:
    said = details(NODE)
    assert said["registration"] == "in force"
    assert said["live"] == "its live leases are known"
    assert said["readiness"] == "mem is ready"


def test_a_term_that_fails_says_why_and_is_the_last() -> None:
    closed = {"warden": "it is being replaced"}
    unready = replace(NODE, ready_kinds=frozenset(), closed_gates=closed)
    for view, name, why in (
        (replace(NODE, lost=True), "registration", "ran out"),
        (replace(NODE, live_known=False), "live", "its live leases are not known yet"),
        (unready, "readiness", "warden: it is being replaced"),
        (replace(unready, closed_gates={}), "readiness", "mem is not ready"),
    ):
        assert list(details(view).items())[-1] == (name, why)
