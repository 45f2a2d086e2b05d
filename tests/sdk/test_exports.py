"""The public names, frozen; and what the import of the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import grafos
import grafos.audit
import grafos.fence
import grafos.leasekit
import grafos.observe
from grafos_core import failure

PUBLIC = [
    "BlockBuilder",
    "BlockLease",
    "Bundle",
    "BundleLease",
    "DeadlineExceeded",
    "Degraded",
    "Denied",
    "Disconnected",
    "Fabric",
    "FabricBlock",
    "FabricError",
    "FabricMem",
    "FabricView",
    "Failure",
    "Fenced",
    "Incompatible",
    "InternalError",
    "Lease",
    "LeaseExpired",
    "LeaseStatus",
    "MemBuilder",
    "MemLease",
    "Notice",
    "RateLimited",
    "Revocation",
    "Revoked",
    "Share",
    "ShareView",
    "SharedLease",
    "TeardownReceipt",
    "connect",
    "local_fabric",
    "open_share",
]
LEASE = [
    "checkpoint_done",
    "detach",
    "drop",
    "epoch",
    "expiry_ms",
    "generation",
    "kind",
    "lease_id",
    "lifetime_end_ms",
    "node_id",
    "on_notice",
    "release",
    "remaining_ms",
    "renew",
    "share",
    "shares",
    "status",
    "ttl_ms",
    "valid",
]
BUILDER = [
    "acquire",
    "attach",
    "auto_renew",
    "fabric",
    "keep",
    "lease_secs",
    "new",
    "on_disconnect",
    "ttl",
    "wait",
    "where",
]
MEM = [
    "arena_size",
    "compare_and_swap",
    "fetch_add",
    "map",
    "path",
    "read",
    "read_many",
    "readinto",
    "write",
    "write_many",
]
BLOCK = [
    "block_size",
    "flush",
    "num_blocks",
    "read_block",
    "read_blocks",
    "write_block",
    "write_blocks",
]
FABRIC = [
    "close",
    "describe",
    "fences",
    "holder_key",
    "identity",
    "keys",
    "leases",
    "poll",
    "revoke",
    "start",
    "tenant",
    "tick",
]


def public(of: object) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


def test_the_package_exports_these_names_and_no_others() -> None:
    assert sorted(grafos.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(grafos, name) is not None


@pytest.mark.parametrize(
    ("of", "names"),
    [
        (grafos.MemLease, {*LEASE, "mem"}),
        (grafos.BlockLease, {*LEASE, "block"}),
        (grafos.FabricMem, set(MEM)),
        (grafos.FabricBlock, set(BLOCK)),
    ],
)
def test_leases_and_handles_have_these_members(of: type, names: set[str]) -> None:
    assert public(of) == names


def test_builders_have_their_options() -> None:
    plain = {"kind", "lease_class", "amount_option"}
    assert public(grafos.MemBuilder) - plain == {*BUILDER, "min_bytes"}
    assert public(grafos.BlockBuilder) - plain == {*BUILDER, "min_blocks"}


def test_a_connection_has_these_members() -> None:
    assert public(grafos.Fabric) == set(FABRIC)


def test_the_modules_of_the_seed_have_its_names() -> None:
    assert {"RenewalManager", "RenewalPolicy", "TickSummary"} <= public(grafos.leasekit)
    assert {"FenceEpoch", "FenceGuard", "Fenced", "StaleEpochError"} <= public(grafos.fence)
    assert {"FabricMetrics", "instrument", "EventRingBuffer"} <= public(grafos.observe)
    audit = {"ChainAssembler", "AuditEvent", "AuditEventKind", "AuditEventData", "Signer"}
    assert audit | {"PreemptionReason", "DurableAnchor", "Collector"} <= public(grafos.audit)


def test_each_of_the_eight_failures_is_an_exception_of_the_same_name() -> None:
    assert [each.name for each in grafos.Failure] == [
        "LeaseExpired", "Revoked", "Fenced", "Disconnected", "Degraded", "Incompatible",
        "RateLimited", "InternalError",
    ]  # fmt: skip
    for each in grafos.Failure:
        kind = getattr(grafos, each.name)
        assert issubclass(kind, grafos.FabricError)
        assert failure.exception_of(each) is kind
    assert issubclass(grafos.Denied, grafos.Incompatible)


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'MemBilder'"):
        grafos.MemBilder  # noqa: B018


def test_importing_the_package_loads_neither_grpc_nor_the_supervisor() -> None:
    script = (
        "import sys, grafos, grafos.leasekit, grafos.fence, grafos.observe\n"
        "heavy = {'grpc', 'google.protobuf', 'asyncio', 'opentelemetry', 'cryptography', 'ssl'}\n"
        "heavy |= {'socket', 'logging', 'grafos._connection', 'grafos._local'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = [each for each in sys.path if each]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
