"""`python -m services.audit`: flags, wiring, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

from grafos_proto.v1 import audit_pb2_grpc
from services.audit.desk import Desk
from services.audit.server import AuditServicer
from services.audit.store import Store
from services.runtime import flags
from services.runtime.limits import Limits
from services.runtime.process import Process, run_service
from services.runtime.server import Listener, Service

LIMITS: Final = Limits(connection_age_ms_max=300_000, calls_per_identity_max=256)
GATES: Final = ("store", "disk")


def start(process: Process) -> None:
    files = process.identity()
    store = Store.open(process.state_dir / "chains")
    process.on_stop(store.close)
    desk = Desk(
        store, clock=process.clock, log=process.log, readiness=process.readiness,
        metrics=process.metrics, halt=process.halt,
    )  # fmt: skip
    process.log.info("audit.verified", chains=len(store.names()), own_number=store.own_number)
    desk.start()
    process.on_stop(desk.stop)
    process.readiness.open("store")
    process.readiness.open("disk")
    servicer = AuditServicer(desk, store.key.public_key, store.key.key_id)
    service = Service(
        "grafos.v1.AuditService", audit_pb2_grpc.add_AuditServiceServicer_to_server, servicer
    )
    endpoints = [e for e in (process.values.listen, process.values.control_listen) if e]
    listeners = [Listener(e, [service], limits=LIMITS, control=True) for e in endpoints]
    process.serve(listeners, files)


def main(arguments: Sequence[str] | None = None) -> int:
    values = flags.read(
        "grafos-audit", "Keeps every sealed chain, and refuses gaps and forks.",
        arguments=arguments, without=("ledger", "audit"),
    )  # fmt: skip
    return run_service(Process("audit", values, gates=GATES), start)


if __name__ == "__main__":
    sys.exit(main())
