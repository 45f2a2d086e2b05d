"""What a holder may believe of a receipt: each thing in it that could be forged, forged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grafos import Denied, Fabric, MemBuilder, MemLease
from tests.sdk.world import World


def take(fabric: Fabric) -> MemLease:
    return MemBuilder().min_bytes(8192).fabric(fabric).acquire()


def test_a_genuine_receipt_of_another_lease_does_not_pass_for_this_one(
    world: World, fabric: Fabric
) -> None:
    lease, other = take(fabric), take(fabric)
    receipt, foreign = lease.release(), other.release()
    keys = world.control.keys()
    assert receipt.verify(keys, lease=lease) is receipt
    assert receipt.incarnation
    with pytest.raises(Denied, match="another lease"):
        foreign.verify(keys, lease=lease)
    with pytest.raises(Denied, match="another lease"):
        receipt.verify(keys, lease=replace(receipt, epoch=receipt.epoch + 1))
    with pytest.raises(Denied, match="another lease"):
        receipt.verify(keys, lease=replace(receipt, node_id="n9"))


@pytest.mark.parametrize(
    "changes",
    [
        {"epoch": 9}, {"outcome": "nothing_created"}, {"incarnation": "ef" * 16},
        {"record_number": 2}, {"record_hash": "1" * 64}, {"measured": {}}, {"node_id": "n9"},
        {"cause": "revoked"}, {"boot_epoch": 2}, {"amount": 12288}, {"cleared": "operator"},
        {"kind": "block"}, {"duration_us": 6}, {"begin_ms": 1}, {"end_ms": 1},
    ],
)  # fmt: skip
def test_no_field_of_a_receipt_can_be_changed(
    world: World, fabric: Fabric, changes: dict[str, Any]
) -> None:
    receipt = take(fabric).release()
    with pytest.raises(Denied) as refused:
        replace(receipt, **changes).verify(world.control.keys())
    assert refused.value.code == "RECEIPT"


def test_a_receipt_whose_record_is_not_in_the_chain_is_refused(
    world: World, fabric: Fabric
) -> None:
    receipt = take(fabric).release()
    with pytest.raises(Denied, match="its record is not there"):
        receipt.verify(world.control.keys(), records=[])
