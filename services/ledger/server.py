"""The ledger's calls: who may ask what, messages into commands, steps into messages.

Rules. What a caller says of itself must be what its certificate says: a node speaks for itself
alone, an operator's name is never taken from a message, a key is published by its owner. A refusal
of one command is its outcome; the others of the same call are decided all the same.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import grpc

from grafos_core import commands as c
from grafos_core import failure, jws, receipt
from grafos_core.commands import Command, Obligation, PublishedKey, Step
from grafos_core.failure import FabricError
from grafos_core.lease import Lease, check_lease_id
from grafos_core.lessor import CLEAR_ORDER_MS, REGISTRATION_TTL_MS, Lessor
from grafos_core.spiffe import Identity, Role
from grafos_core.token import audience_of
from grafos_proto.v1 import admission_pb2, lease_pb2, ledger_pb2, ledger_pb2_grpc
from grafos_proto.wire import convert, failures
from services.ledger import proto
from services.ledger.watchers import Happening, Watcher
from services.ledger.writer import Answer, Ask, Ledger, page
from services.runtime import signing
from services.runtime.calls import deadline_left_ms, peer
from services.runtime.faults import fault
from services.runtime.signing import SigningKey

PROTOCOL: Final = 1
SOFTWARE: Final = "0.1"
COMMANDS_MAX: Final = 256
BOUND_MAX: Final = 1_024
OBLIGATIONS_MAX: Final = 256
LIST_DEFAULT, LIST_MAX = 1_000, 10_000
LIST_BYTES_MAX: Final = 512 * 1024
PROGRESS_MS: Final = 1_000


class LedgerServicer(ledger_pb2_grpc.LedgerServiceServicer):
    def __init__(
        self, ledger: Ledger, receipt_keys: jws.Keys, clear_key: SigningKey, own: Identity
    ) -> None:
        self._ledger, self._receipt_keys = ledger, receipt_keys
        self._clear_key, self._own = clear_key, str(own)

    # decisions

    def Commit(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.CommitResponse:
        _check_count(request.commands, COMMANDS_MAX)
        outcomes, revision = self._decide(request.commands, _command)
        return ledger_pb2.CommitResponse(outcomes=outcomes, revision=revision)

    def Renew(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.LedgerRenewResponse:
        _check_count(request.renewals, COMMANDS_MAX)
        outcomes, revision = self._decide(request.renewals, proto.renew)
        return ledger_pb2.LedgerRenewResponse(outcomes=outcomes, revision=revision)

    def Burn(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.BurnResponse:
        _check_count(request.lease_ids, COMMANDS_MAX)
        reason = proto.words(request.reason)
        outcomes, _ = self._decide(
            request.lease_ids, lambda lease_id: c.Burn(check_lease_id(lease_id), reason)
        )
        return ledger_pb2.BurnResponse(outcomes=outcomes)

    def ReportBound(
        self, request: Any, context: grpc.ServicerContext
    ) -> ledger_pb2.ReportBoundResponse:
        _check_count(request.bound, BOUND_MAX)
        node_id = proto.node_id(_own_node(request.node_id))

        def command(bound: ledger_pb2.Bound) -> Command:
            return c.ReportBound(
                node_id, request.incarnation, check_lease_id(bound.lease_id), bound.epoch,
                bound.generation, proto.stage(bound.stage),
            )  # fmt: skip

        outcomes, _ = self._decide(request.bound, command)
        return ledger_pb2.ReportBoundResponse(outcomes=outcomes)

    def Credit(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.CreditResponse:
        _check_count(request.receipts, COMMANDS_MAX)
        caller = peer().identity.name
        outcomes, _ = self._decide(request.receipts, lambda text: self.credit(text, caller))
        return ledger_pb2.CreditResponse(outcomes=outcomes)

    def credit(self, text: str, caller: str) -> Command:
        """The command that a receipt is, once its signature is checked."""
        proved = receipt.verify(text, self._receipt_keys)
        if proved.node_id != caller:
            raise failure.of("RECEIPT", "another node's")
        return c.Credit(proved, proto.node_id(proved.node_id))

    def _decide(
        self, asks: Sequence[Any], convert_ask: Callable[[Any], Command]
    ) -> tuple[list[ledger_pb2.Outcome], int]:
        """One outcome for each ask, in order; those that cannot be read are refused alone."""
        read: list[Command | FabricError] = []
        for ask in asks:
            try:
                read.append(convert_ask(ask))
            except FabricError as refused:
                read.append(refused)
        commands = [each for each in read if not isinstance(each, FabricError)]
        answer = self._submit(Ask(commands))
        steps = iter(answer.steps)
        outcomes = [
            _outcome(Step(failure=each) if isinstance(each, FabricError) else next(steps))
            for each in read
        ]
        return outcomes, answer.revision

    def _submit(self, ask: Ask) -> Answer:
        return self._ledger.submit(ask, deadline_left_ms())

    # nodes

    def Register(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.RegisterResponse:
        _check_version(request.version)
        _own_node(request.node_id)
        command = proto.register(request)
        key = command.receipt_key
        if key.use != "receipt" or key.owner != str(peer().identity):
            raise failure.of("DENIED", "a node registers a receipt key of its own")

        def see(lessor: Lessor, now_ms: int) -> ledger_pb2.RegisterResponse:
            self._ledger.revocations = max(self._ledger.revocations, request.revocation_number)
            return self._registered(lessor, command.node_id, now_ms)

        answer = self._submit(Ask([command], see))
        refused = answer.steps[0].failure
        if refused is not None:
            raise refused
        response: ledger_pb2.RegisterResponse = answer.seen
        response.revision = answer.revision
        return response

    def _registered(self, lessor: Lessor, node_id: Any, now_ms: int) -> ledger_pb2.RegisterResponse:
        """What the ledger wants of a node, and the keys that it verifies with."""
        strangers = lessor.strangers(node_id)
        owed = [self.obligation(each, now_ms) for each in lessor.obligations(node_id)]
        for each in strangers:
            foreign = lease_pb2.Lease(lease_id=each.lease_id, epoch=each.epoch)
            owed.append(
                ledger_pb2.Obligation(
                    lease_id=each.lease_id, epoch=each.epoch, action="release", lease=foreign
                )
            )
        return ledger_pb2.RegisterResponse(
            version=lease_pb2.Version(protocol=PROTOCOL, software=SOFTWARE),
            ttl_ms=REGISTRATION_TTL_MS,
            now_ms=now_ms,
            obligations=owed[:OBLIGATIONS_MAX],
            keys=[
                proto.key_to_proto(key)
                for key in lessor.state.keys.values()
                if key.use != "receipt" and key.key_id not in lessor.state.revoked_keys
            ],
            revoked_keys=sorted(lessor.state.revoked_keys),
            revocation_number=self._ledger.revocations,
            send_live=lessor.wants_live(node_id) or bool(strangers),
        )

    def obligation(self, owed: Obligation, now_ms: int) -> ledger_pb2.Obligation:
        lease = owed.lease
        made = ledger_pb2.Obligation(
            lease_id=lease.lease_id, epoch=lease.epoch, action=owed.action,
            grace_ms=lease.grace_ms, lease=convert.lease_to_proto(lease),
        )  # fmt: skip
        if owed.action == "clear":
            made.clear_order = self._clear_order(owed, now_ms)
        return made

    def _clear_order(self, owed: Obligation, now_ms: int) -> str:
        """Signed anew at each sending, with the same nonce: the node takes it once."""
        lease = owed.lease
        order = receipt.ClearOrder(
            lease_id=lease.lease_id, node_id=lease.node_id, incarnation=lease.incarnation,
            epoch=lease.epoch, nonce=owed.nonce, exp_ms=now_ms + CLEAR_ORDER_MS,
            reason=f"{owed.operator}: {owed.reason}"[: receipt.REASON_CHARS_MAX],
            operator=self._own, accept_residue=owed.accept_residue,
        )  # fmt: skip
        return receipt.mint_clear(order, self._clear_key.key_id, self._clear_key.sign)

    # reading

    def Get(self, request: Any, context: grpc.ServicerContext) -> lease_pb2.Lease:
        lease_id = check_lease_id(request.lease_id)
        lease = self._ledger.read(lambda lessor, _: lessor.lease(lease_id), deadline_left_ms())
        if _node_filter() not in ("", lease.node_id):
            raise failure.of("NOT_FOUND", lease_id=lease_id)
        return convert.lease_to_proto(lease)

    def List(self, request: Any, context: grpc.ServicerContext) -> admission_pb2.ListLeasesResponse:
        wanted, limit = _wanted(request), min(request.limit or LIST_DEFAULT, LIST_MAX)
        ended = request.state == lease_pb2.LEASE_STATE_RELEASED
        ended = ended or bool(request.prefix or request.cleared)

        def copy(lessor: Lessor, now_ms: int) -> tuple[list[Lease], int]:
            found = list(lessor.state.leases.values())
            if ended:
                found += lessor.state.released.values()
                found += lessor.state.residues.values()
            return found, self._ledger.watchers.revision

        leases, revision = self._ledger.read(copy, deadline_left_ms())
        matching = heapq.nsmallest(
            limit + 1, filter(wanted, leases), key=lambda lease: lease.lease_id
        )
        return _listed(matching, limit, revision)

    def Snapshot(self, request: Any, context: grpc.ServicerContext) -> ledger_pb2.SnapshotResponse:
        node_id = _node_filter()

        def look(lessor: Lessor, now_ms: int) -> ledger_pb2.SnapshotResponse:
            quotas = [] if node_id else lessor.state.quotas.entries()
            return ledger_pb2.SnapshotResponse(
                revision=self._ledger.watchers.revision,
                nodes=[
                    proto.node_to_proto(view)
                    for view in lessor.nodes(now_ms)
                    if node_id in ("", view.node_id)
                ],
                quotas=[
                    ledger_pb2.Quota(
                        tenant=tenant, kind=convert.kind_to_proto(kind), amount=limit.amount,
                        count=limit.count, used_amount=usage.amount, used_count=usage.count,
                    )
                    for tenant, kind, limit, usage in quotas
                ],
                keys=[proto.key_to_proto(key) for key in lessor.state.keys.values()],
                now_ms=now_ms,
            )  # fmt: skip

        response = self._ledger.read(look, deadline_left_ms())
        response.head = self._ledger.with_store(lambda store: store.head, deadline_left_ms())
        return response

    def Watch(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[ledger_pb2.WatchResponse]:
        node_id = _node_filter() or request.node_id
        watcher = Watcher(node_id)
        try:
            yield from self._catch_up(request, node_id, watcher)
            while context.is_active():
                happenings = watcher.take(PROGRESS_MS)
                fault("ledger.watch")
                yield _told(happenings, self._ledger.watchers.revision)
        finally:
            self._ledger.watchers.leave(watcher)

    def _catch_up(
        self, request: Any, node_id: str, watcher: Watcher
    ) -> Iterator[ledger_pb2.WatchResponse]:
        """What happened since, then join those who listen, without a gap between."""
        watchers = self._ledger.watchers
        after = request.from_revision
        if after > watchers.revision:
            raise failure.of("ROLLBACK", f"revision {after} is beyond the last here")

        def join(lessor: Lessor, now_ms: int) -> int:
            if request.live_only or after >= watchers.revision:
                watchers.join(watcher)
                return watchers.revision
            return -1

        while True:
            joined_at = self._ledger.read(join)
            if joined_at >= 0:
                yield ledger_pb2.WatchResponse(revision=joined_at)
                return
            happenings = page(self._ledger, after, None)
            after = happenings[-1].revision
            yield _told([x for x in happenings if node_id in ("", x.node_id)], after)


def _told(happenings: Iterable[Happening], revision: int) -> ledger_pb2.WatchResponse:
    """`revision`: everything up to it that concerns this watcher has been sent; alone: progress."""
    events = [happening.event() for happening in happenings]
    last = max((event.revision for event in events), default=0)
    return ledger_pb2.WatchResponse(revision=last or revision, events=events)


def _command(ask: ledger_pb2.Command) -> Command:
    """What a service or an operator may hand in; each has commands of its own."""
    caller = peer().identity
    name = ask.WhichOneof("command")
    if name is None:
        raise failure.of("MISSING_FIELD", "command")
    of_service = caller.role is Role.SERVICE
    if name not in ("end", "revoke_key") and of_service is (
        name in ("clear", "set_quota", "forget_node")
    ):
        raise failure.of("ROLE", name)
    who = str(caller)
    match name:
        case "grant":
            return proto.grant(ask.grant)
        case "grant_bundle":
            return proto.grant_bundle(ask.grant_bundle)
        case "attach":
            return proto.attach(ask.attach)
        case "end":
            return proto.end(ask.end, (ask.end.by if of_service else "") or who)
        case "revoke_key":
            operator = (ask.revoke_key.operator if of_service else "") or who
            return proto.revoke_key(ask.revoke_key, operator)
        case "clear":
            return proto.clear(ask.clear, who, secrets.token_hex(16))
        case "set_quota":
            return proto.set_quota(ask.set_quota)
        case "forget_node":
            return proto.forget(ask.forget_node, who)
        case "refusal":
            return proto.refusal(ask.refusal)
        case _:
            key = proto.published_key(ask.publish_key.key)
            if key.owner != who:
                raise failure.of("DENIED", "a key is published by its owner")
            return c.PublishKey(key)


def _outcome(step: Step) -> ledger_pb2.Outcome:
    outcome = ledger_pb2.Outcome()
    if step.lease is not None:
        outcome.lease.CopyFrom(convert.lease_to_proto(step.lease))
    outcome.leases.extend(convert.lease_to_proto(lease) for lease in step.leases)
    if step.failure is not None:
        outcome.failure.CopyFrom(failures.detail_of(step.failure))
    return outcome


def _wanted(ask: Any) -> Callable[[Lease], bool]:
    """The filter that a List request stands for."""
    node_id = _node_filter() or ask.node_id
    kind = convert.kind_from_proto(ask.kind) if ask.kind else None
    state = convert.state_from_proto(ask.state) if ask.state else None

    def wanted(lease: Lease) -> bool:
        return (
            lease.lease_id > ask.after
            and lease.lease_id.startswith(ask.prefix)
            and node_id in ("", lease.node_id)
            and kind in (None, lease.kind)
            and state in (None, lease.state)
            and ask.holder in ("", lease.holder)
            and ask.tenant in ("", lease.tenant)
            and ask.cleared in ("", lease.cleared)
        )

    return wanted


def _listed(matching: list[Lease], limit: int, revision: int) -> admission_pb2.ListLeasesResponse:
    """As many as fit; `next` says where the next page begins."""
    response, size = admission_pb2.ListLeasesResponse(revision=revision), 0
    for count, lease in enumerate(matching):
        message = convert.lease_to_proto(lease)
        size += message.ByteSize()
        if count == limit or (count and size > LIST_BYTES_MAX):
            response.next = matching[count - 1].lease_id
            break
        response.leases.append(message)
    return response


def _node_filter() -> str:
    """Nodes see their own; services and operators see everything."""
    caller = peer().identity
    return caller.name if caller.role is Role.NODE else ""


def _own_node(node_id: str) -> str:
    if node_id != peer().identity.name:
        raise failure.of("DENIED", "a node speaks for itself alone")
    return node_id


def _check_version(version: lease_pb2.Version) -> None:
    if version.protocol != PROTOCOL:
        older = "the node" if version.protocol < PROTOCOL else "the ledger"
        text = f"protocol {version.protocol} asked, {PROTOCOL} spoken: {older} is too old"
        raise failure.of("VERSION", text)


def _check_count(items: Sequence[Any], most: int) -> None:
    if not items:
        raise failure.of("EMPTY")
    if len(items) > most:
        raise failure.of("RANGE", f"at most {most} in one call")


def add_receipt_key(keys: jws.Keys, key: PublishedKey, incarnation: str) -> None:
    """Believe the receipts of this key, in the name of this incarnation of its node."""
    node_id = key.owner.rpartition("/")[2]
    keys.add(
        jws.RECEIPT, key.key_id, signing.verifier(key.public_key),
        owner=audience_of(node_id, incarnation),
    )  # fmt: skip
