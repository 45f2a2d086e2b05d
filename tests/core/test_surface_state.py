"""The state is what the records add up to, also after it was carried forward."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grafos_core.chain import Chain, EventKind, Record
from grafos_core.epochs import EpochWindow, ExtentEpochs
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.surface_state import Fence, OpenBind, SurfaceState

CHAIN = Chain("node-1", "4f" * 16, 1)
MEM: dict[str, Any] = {
    "kind": "mem", "amount": 64, "extent_offset": 0, "generation": 1, "holder_key": "T",
}  # fmt: skip
BLOCK: dict[str, Any] = MEM | {"kind": "block", "amount": 4, "extent_offset": 8}


def record(kind: str, lease_id: str = "a", epoch: int = 5, /, **body: Any) -> Record:
    return CHAIN.append(
        kind, wall_ms=1, boottime_ns=1, lease_id=lease_id, epoch=epoch, body=body
    )  # fmt: skip


def state_of(*records: Record) -> SurfaceState:
    state = SurfaceState()
    for each in records:
        state.fold(each)
    return state


def carried(state: SurfaceState) -> SurfaceState:
    """The state as a segment's first records give it to a node that knows nothing else."""
    again = SurfaceState(from_start=False)
    for part in state.tables():
        again.fold(record(EventKind.AGENT_TABLES, "", 0, **part))
    return again


def test_a_bind_is_open_until_its_teardown_is_sealed_and_its_epoch_used_for_ever() -> None:
    state = state_of(record("agent.bound", **MEM))
    assert state.open_binds() == {"a": OpenBind("a", Kind.MEM, 5, 1, 64, 0, "T")}
    state.fold(record("agent.extended", generation=2))
    state.fold(record("agent.attached", generation=3, holder_key="U"))
    state.fold(record("agent.teardown_begin"))
    assert state.open_binds()["a"] == OpenBind("a", Kind.MEM, 5, 3, 64, 0, "U")
    state.fold(record("agent.teardown_end"))
    assert state.open_binds() == {}
    epochs = state.epochs(Kind.MEM)
    assert isinstance(epochs, EpochWindow)
    assert epochs.refusal(5) == "EPOCH_BURNT"
    assert epochs.refusal(6) == ""


def test_a_fence_stays_until_it_is_cleared() -> None:
    state = state_of(record("agent.bound", **BLOCK), record("agent.fenced", cause="erase"))
    assert state.open_binds() == {}
    assert state.fences() == {"a": Fence(OpenBind("a", Kind.BLOCK, 5, 1, 4, 8, "T"), "erase")}
    assert carried(state).fences() == state.fences()
    state.fold(record("agent.cleared"))
    assert state.fences() == {}
    epochs = state.epochs(Kind.BLOCK)
    assert isinstance(epochs, ExtentEpochs)
    assert epochs.refusal(11, 12, 5) == "EPOCH_BURNT"
    assert epochs.refusal(12, 13, 5) == ""


def test_a_slice_that_was_never_bound_can_be_fenced_if_the_record_says_what_it_is() -> None:
    state = state_of(record("agent.fenced", cause="lost", **BLOCK))
    assert state.fences()["a"].slice == OpenBind("a", Kind.BLOCK, 5, 0, 4, 8, "")


def test_a_burnt_epoch_is_used_without_a_bind() -> None:
    state = state_of(record("agent.burnt", kind="cpu", amount=1, extent_offset=0))
    assert state.open_binds() == {}
    epochs = state.epochs(Kind.CPU)
    assert isinstance(epochs, EpochWindow)
    assert epochs.refusal(5) == "EPOCH_BURNT"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("agent.bound", {}),
        ("agent.bound", MEM | {"kind": "disk"}),
        ("agent.bound", MEM | {"amount": "x"}),
        ("agent.extended", {"generation": 2}),
        ("agent.fenced", {"cause": "erase"}),
        ("agent.cleared", {}),
        ("agent.burnt", {"kind": "mem"}),
        ("agent.tables", {}),
        ("agent.tables", {"part": 1, "parts": 2, "entries": []}),
        ("agent.tables", {"part": 0, "parts": 1, "entries": [["what", 1]]}),
        ("agent.tables", {"part": 0, "parts": 1, "entries": [["burnt", "block", 1]]}),
        ("agent.tables", {"part": 0, "parts": 1, "entries": [["run", "mem", 1, 2, 3]]}),
        ("agent.tables", {"part": 0, "parts": 1, "entries": [["burnt", "mem", 1]]}),
    ],
)
def test_a_record_that_does_not_fit_is_a_broken_book(kind: str, body: dict[str, Any]) -> None:
    state = SurfaceState()
    with pytest.raises(FabricError) as refused:
        state.fold(record(kind, "z", **body))
    assert refused.value.code == "STORAGE"
    assert f"({kind})" in refused.value.detail


def test_without_a_balance_before_it_no_record_is_believed() -> None:
    with pytest.raises(FabricError) as refused:
        SurfaceState(from_start=False).fold(record("agent.bound", **MEM))
    assert refused.value.code == "STORAGE"


def test_other_kinds_change_nothing() -> None:
    state = state_of(record("agent.bound", **MEM))
    before = state.tables_hash()
    state.fold(record("agent.clock", offset_ms=3))
    state.fold(record("agent.ready"))
    assert state.tables_hash() == before


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["agent.bound", "agent.burnt", "agent.teardown_end", "agent.fenced", "agent.cleared"]
        ),
        st.sampled_from("abcd"),
        st.integers(1, 40),
        st.sampled_from([Kind.MEM, Kind.BLOCK]),
        st.integers(0, 12),
        st.integers(1, 6),
    ),
    max_size=40,
)


@given(STEPS)
@settings(max_examples=150)
def test_any_state_carried_forward_is_the_same_state(
    steps: list[tuple[str, str, int, Kind, int, int]],
) -> None:
    state = SurfaceState()
    for kind, lease_id, epoch, of_kind, offset, amount in steps:
        if kind == "agent.cleared" and lease_id not in state.fences():
            continue
        body = MEM | {"kind": of_kind.value, "amount": amount, "extent_offset": offset}
        state.fold(record(kind, lease_id, epoch, cause="c", **body))
    again = carried(state)
    assert again.tables_hash() == state.tables_hash()
    assert again.open_binds() == state.open_binds()
    assert again.fences() == state.fences()


def test_a_large_state_takes_several_records_of_bounded_size() -> None:
    state = SurfaceState()
    for i in range(3000):
        body = BLOCK | {"extent_offset": 10 * i}
        state.fold(record("agent.bound", f"{i:032x}", i + 1, **body))
    parts = state.tables()
    assert 1 < len(parts) < 64
    again = carried(state)
    assert again.tables_hash() == state.tables_hash()
    assert len(again.open_binds()) == 3000
    broken = SurfaceState(from_start=False)
    broken.fold(record("agent.tables", "", 0, **parts[0]))
    with pytest.raises(FabricError):
        broken.fold(record("agent.tables", "", 0, **parts[2]))
