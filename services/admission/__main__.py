"""`python -m services.admission`: wiring, and nothing else."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Final

from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity, Role
from grafos_proto.v1 import admission_pb2_grpc, lease_pb2, ledger_pb2
from grafos_proto.v1.ledger_pb2_grpc import LedgerServiceStub
from grafos_proto.wire.failures import failure_of
from services.admission.ledger import UPKEEP_TIMEOUT_MS, Ledger
from services.admission.server import AdmissionServicer
from services.admission.tokens import Minter
from services.admission.view import FabricView
from services.runtime import flags
from services.runtime.client import Remote
from services.runtime.process import Process, run_service
from services.runtime.server import Listener, Service
from services.runtime.signing import SigningKey

NAME: Final = "grafos.v1.AdmissionService"
FOLLOW_AGAIN_S: Final = 0.1
FLUSH_TURNS: Final = 10
GATE_S: Final = 0.1
GATES: Final = ("ledger", "key")


def start(process: Process) -> None:
    files = process.identity()
    here = files().identity
    ledger_identity = Identity(here.trust_domain, Role.SERVICE, None, "ledger")
    remote = Remote(
        process.values.ledger, ledger_identity, files, LedgerServiceStub,
        dice=process.dice, clock=process.clock,
    )  # fmt: skip
    process.on_stop(remote.close)
    minter = Minter(str(here), signing_key(process))
    view, ledger = FabricView(remote, process.clock), Ledger(remote)
    servicer = AdmissionServicer(view, ledger, minter, process.clock, process.metrics)
    stopped = threading.Event()
    process.on_stop(stopped.set)
    for body, arguments in (
        (follow, (process, view, stopped)),
        (show_gate, (process, view, stopped)),
        (upkeep, (process, view, ledger, minter, str(here), stopped)),
    ):
        threading.Thread(target=body, args=arguments, name=body.__name__, daemon=True).start()
    service = Service(NAME, admission_pb2_grpc.add_AdmissionServiceServicer_to_server, servicer)
    listeners = [Listener(process.values.listen, [service])]
    if process.values.control_listen:
        listeners.append(Listener(process.values.control_listen, [service], control=True))
    process.serve(listeners, files)


def signing_key(process: Process) -> SigningKey:
    """The key that tokens are signed with, made at the first start."""
    path = process.state_dir / "token.key"
    return SigningKey.load(path) if path.exists() else SigningKey.make(path)


def follow(process: Process, view: FabricView, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            view.follow(stopped)
        except FabricError as error:
            process.log.debug("ledger.watch_broken", code=error.code)
        stopped.wait(FOLLOW_AGAIN_S)


def show_gate(process: Process, view: FabricView, stopped: threading.Event) -> None:
    """Apart from `upkeep`, which waits for the ledger when that is away."""
    while not stopped.wait(GATE_S):
        if view.loaded:
            process.readiness.open("ledger")
        else:
            process.readiness.close("ledger", "no fresh word of the ledger")


def upkeep(
    process: Process, view: FabricView, ledger: Ledger, minter: Minter, issuer: str,
    stopped: threading.Event,
) -> None:  # fmt: skip
    """Publish our key to each ledger that we meet, and another where it is revoked; hand in
    refusals that nobody took along."""
    published_at = (0, "")
    for turn in itertools.count():
        if stopped.wait(FOLLOW_AGAIN_S):
            return
        snapshots = view.snapshots
        try:
            if minter.key_id in view.revoked_keys:
                change_key(process, minter)
            if published_at != (snapshots, minter.key_id):
                publish_or_change(process, ledger, minter, issuer)
                published_at = (snapshots, minter.key_id)
                process.readiness.open("key")
            if turn % FLUSH_TURNS == 0:
                ledger.flush_refusals()
        except (FabricError, OSError) as error:
            process.log.debug("ledger.unreachable", error=str(error))


def publish_or_change(process: Process, ledger: Ledger, minter: Minter, issuer: str) -> None:
    try:
        publish(ledger, minter.key, issuer)
    except FabricError as refusal:
        if refusal.code != "PRECONDITION":
            raise
        change_key(process, minter)  # it was revoked while we were not there
        publish(ledger, minter.key, issuer)


def change_key(process: Process, minter: Minter) -> None:
    """The old one is overwritten: nothing that it signs counts any more."""
    minter.key = SigningKey.make(process.state_dir / "token.key")
    process.log.warning("key.changed", key_id=minter.key_id)


def publish(ledger: Ledger, key: SigningKey, issuer: str) -> None:
    """Nodes verify our tokens with what the ledger gives them."""
    message = lease_pb2.VerificationKey(
        key_id=key.key_id, owner=issuer, use="lease", public_key=key.public_key
    )
    command = ledger_pb2.Command(publish_key=ledger_pb2.PublishKey(key=message))
    (outcome,) = ledger.commit_all([command], timeout_ms=UPKEEP_TIMEOUT_MS)
    if outcome.HasField("failure"):
        raise failure_of(outcome.failure)


def main() -> int:
    values = flags.read(
        "services.admission",
        "Decides who gets what, and mints the tokens that nodes are bound with.",
        [flags.Flag("ledger", "address of the ledger", None, flags.endpoint)],
    )
    return run_service(Process("admission", values, gates=GATES), start)


if __name__ == "__main__":
    sys.exit(main())
