"""The one thread that takes chains in: verified, stored, and only then acknowledged.

Rules. Who calls may bring only its own chain. The first key of a chain is taken on trust of the
caller's certificate, once a whole batch was found to be sealed by it; from then on no other key
seals that chain. A new incarnation of an origin is a new chain, and its older ones grow no more.
What is wrong with a chain is stored as evidence before anybody is told of it. A disk that is full
or broken acknowledges nothing; what is known is still told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from grafos_core import chain, failure
from grafos_core.chain import Chain, Seal
from grafos_core.collector import Accepted, Collector, Position
from grafos_core.export import countersign_bytes
from grafos_core.failure import FabricError
from services.audit.store import Batch, Name, Store, verifier
from services.runtime import signing
from services.runtime.clock import Clock, Instant
from services.runtime.health import Readiness
from services.runtime.logs import Log
from services.runtime.loop import Batcher, Loop
from services.runtime.telemetry import Metrics

COUNTERSIGN_MS: Final = 1_000
BROKEN_MS_MAX: Final = 5_000
"""A failed disk is told of for so long; then the process ends, and the next one reads the disk."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Offer:
    """What one writer hands in. No records and one seal: it only says where its chain is."""

    origin: str
    incarnation: str
    records: Sequence[bytes]
    seals: Sequence[Seal]
    key_id: str
    public_key: bytes

    @property
    def name(self) -> Name:
        return (self.origin, self.incarnation)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    number: int
    head: bytes
    countersignature: bytes


class Desk:
    """Collector and store, owned by one thread from `start` on."""

    def __init__(
        self, store: Store, *, clock: Clock, log: Log, readiness: Readiness, metrics: Metrics,
        halt: Callable[[], None],
    ) -> None:  # fmt: skip
        self._store, self._clock, self._log, self._readiness = store, clock, log, readiness
        state, self._keys = store.load()
        self._collector = Collector(store.own_chain(), store.lookup)
        self._collector.restore(state)
        self._failures = metrics.counter("grafos_audit_verify_failures")
        self._countersign_at_ms = 0
        self._halt, self._broken_at_ms = halt, 0
        self._loop = Loop("audit", on_tick=self._tick, log=log, halt=halt, clock=clock)
        self._batcher: Batcher[Offer, Acknowledged] = Batcher(self._loop, self._handle)

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> bool:
        self._loop.call(self._countersign)
        return self._loop.stop()

    # from any thread

    def submit(self, offer: Offer, timeout_ms: int) -> Acknowledged:
        return self._batcher.submit(offer, timeout_ms)

    def read(
        self, question: Callable[[Collector, Store], _Result], timeout_ms: int | None = None
    ) -> _Result:
        return self._loop.call(lambda: question(self._collector, self._store), timeout_ms)

    def countersign(self, name: Name, position: Position) -> bytes:
        """The collector's word that it has this much on disk. From any thread."""
        return self._store.key.sign(countersign_bytes(*name, position.number, position.head))

    # in the owner thread

    def _handle(self, offers: list[Offer]) -> list[Acknowledged | FabricError]:
        """Rounds, so that two batches of one chain are seen one after the other."""
        answers: dict[int, Acknowledged | FabricError] = {}
        waiting = list(enumerate(offers))
        while waiting:
            chains: set[Name] = set()
            this_round: list[tuple[int, Offer]] = []
            later: list[tuple[int, Offer]] = []
            for index, offer in waiting:
                (later if offer.name in chains else this_round).append((index, offer))
                chains.add(offer.name)
            answers |= self._round(this_round)
            waiting = later
        return [answers[index] for index in range(len(offers))]

    def _round(self, offers: Sequence[tuple[int, Offer]]) -> dict[int, Acknowledged | FabricError]:
        decided = {index: self._decide(offer) for index, offer in offers}
        names = {index: offer.name for index, offer in offers}
        changed = {
            names[index]
            for index, each in decided.items()
            if (isinstance(each, FabricError) and each.code in ("FORK", "ROLLBACK"))
            or (isinstance(each, Accepted) and each.records)
        }  # fmt: skip
        accepted = [each for each in decided.values() if isinstance(each, Accepted)]
        try:
            if changed:
                self._store.commit(self._batch(changed, accepted))
        except FabricError as refused:
            self._show_disk()
            return {
                index: refused if names[index] in changed else self._answer(names[index], each)
                for index, each in decided.items()
            }
        for each in accepted:
            self._collector.stored(each)
        self._show_disk()
        return {index: self._answer(names[index], each) for index, each in decided.items()}

    def _decide(self, offer: Offer) -> Accepted | Position | FabricError:
        try:
            self._admit(offer)
            keys = self._keys.get(offer.name, {})
            if not offer.records:
                return self._announced(offer, keys)
            return self._collector.offer(*offer.name, offer.records, offer.seals, verifier(keys))
        except FabricError as refused:
            self._failures.inc()
            self._log.warning(
                "audit.refused", origin=offer.origin, code=refused.code, detail=refused.detail
            )
            return refused

    def _admit(self, offer: Offer) -> None:
        """A chain that was never seen: believe its key once it is seen to have sealed the batch."""
        if offer.name in self._keys:
            return
        if not offer.records:
            raise failure.of("SEAL_KEY", "nothing is known of this chain")
        if offer.key_id != signing.key_id_of(offer.public_key):
            raise failure.of("SEAL_KEY", "the key's id is not made of the key")
        keys = {offer.key_id: offer.public_key}
        trial = Collector(Chain("audit", "0" * 32, 1), lambda *of: None)
        trial.admit(*offer.name, offer.key_id)
        trial.offer(*offer.name, offer.records, offer.seals, verifier(keys))
        self._collector.admit(*offer.name, offer.key_id)
        self._keys[offer.name] = keys

    def _announced(self, offer: Offer, keys: dict[str, bytes]) -> Position:
        """Where a writer's chain is, under its seal."""
        if len(offer.seals) != 1:
            raise failure.of("EMPTY", "records, or one seal that says where the chain is")
        (seal,) = offer.seals
        chain.check_seal(seal, offer.incarnation, verifier(keys))
        return self._collector.announce(*offer.name, seal.number, seal.hash)

    def _batch(self, changed: set[Name], accepted: list[Accepted]) -> Batch:
        """What the transaction has to hold: the core's pages as they will be when it is stored."""
        state = self._collector.state()
        heads = {(each.origin, each.incarnation): each for each in accepted}
        batch = Batch(accepted=[each for each in accepted if each.records])
        for page in state["chains"]:
            name = (page[0], page[1])
            if name not in changed:
                continue
            stored = heads.get(name)
            if stored is not None:
                page[2], page[3] = stored.number, stored.head
            is_current = state["incarnations"].get(name[0]) == name[1]
            batch.pages[name] = (is_current, page)
            batch.keys[name] = self._keys[name]
        return batch

    def _answer(
        self, name: Name, decided: Accepted | Position | FabricError
    ) -> Acknowledged | FabricError:
        if isinstance(decided, FabricError):
            return decided
        position = Position(decided.number, decided.head)
        if isinstance(decided, Position):
            position = self._collector.position(*name)
        if not position.number:
            return Acknowledged(0, position.head, b"")
        return Acknowledged(position.number, position.head, self.countersign(name, position))

    def _tick(self, now: Instant) -> int:
        if now.boot_ms >= self._countersign_at_ms:
            self._countersign_at_ms = now.boot_ms + COUNTERSIGN_MS
            self._countersign()
        self._store.maintain()
        if self._store.broken:
            self._end_broken(now.boot_ms)
        return COUNTERSIGN_MS

    def _end_broken(self, now_ms: int) -> None:
        """Nothing would ever be acknowledged by this process again."""
        self._broken_at_ms = self._broken_at_ms or now_ms
        if now_ms >= self._broken_at_ms + BROKEN_MS_MAX:
            self._log.error("audit.disk_failed", why=self._store.broken)
            self._halt()

    def _countersign(self) -> None:
        """A record of every head that moved, in the collector's own chain."""
        record = self._collector.countersign(self._clock.wall_ms(), self._clock.boot_ns())
        if record is None:
            return
        message = chain.seal_bytes(record.incarnation, record.number, record.hash)
        key = self._store.key
        seal = Seal(record.number, record.hash, key.key_id, key.sign(message))
        try:
            self._store.commit(Batch(own=(record, seal)))
        except FabricError:
            self._show_disk()
            return
        self._collector.countersigned(record)
        self._show_disk()

    def _show_disk(self) -> None:
        if self._store.broken:
            self._readiness.close("disk", self._store.broken)
        elif self._store.full:
            self._readiness.close("disk", "the disk is full; nothing is acknowledged")
        else:
            self._readiness.open("disk")
