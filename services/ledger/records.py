"""An event of the core as a record of the ledger's chain, and back.

Rules. The record carries the event whole: kind, lease, epoch and body have fields of their own, and
the event's instant is the record's wall clock. So the chain that auditors read is the very state
that a restarted ledger begins with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grafos_core import chain, failure
from grafos_core.chain import Chain, Record, Seal
from grafos_core.commands import Event
from services.runtime.signing import SigningKey

ORIGIN: Final = "ledger"
SEAL_BYTES_MAX: Final = 64 * 1024
"""With one record more, what a seal covers still fits into one message to the collector."""


def to_records(events: Sequence[Event], head: Chain, boottime_ns: int) -> list[Record]:
    """The records that come next, and the chain moved on to them.

    The events have happened in memory already: one that cannot be written down halts the ledger.
    """
    try:
        return [
            head.append(
                event.kind, wall_ms=event.at_ms, boottime_ns=boottime_ns,
                lease_id=event.lease_id, epoch=event.epoch, body=event.body,
            )
            for event in events
        ]  # fmt: skip
    except failure.FabricError as refused:
        raise failure.InvariantViolation(f"an event has no encoding: {refused}") from refused


def to_event(record: Record) -> Event:
    return Event(record.kind, record.wall_ms, record.lease_id, record.epoch, record.body)


def seals_over(records: Sequence[Record], key: SigningKey) -> list[Seal]:
    """One seal for each batch that a seal may cover, the last one over the last record."""
    seals, count, size = [], 0, 0
    for record in records:
        count, size = count + 1, size + len(record.data)
        full = count >= chain.BATCH_RECORDS_MAX or size > SEAL_BYTES_MAX
        if full or record is records[-1]:
            message = chain.seal_bytes(record.incarnation, record.number, record.hash)
            seals.append(Seal(record.number, record.hash, key.key_id, key.sign(message)))
            count = size = 0
    return seals
