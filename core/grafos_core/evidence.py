"""Holds a receipt against the record that it names, in the chain of the node that signed it.

A receipt is a page torn from a bound book: it says which page it is. Who has the book can look
whether that page is there, and whether it says the same.

Rules. The record is the node's own, has the receipt's number and hash, and its body gives the very
receipt, measurement by measurement; only the boot may be a later one, for a receipt is signed anew
at each sending. That the chain is whole is for whoever read it to verify (export.py).
"""

from __future__ import annotations

from grafos_core import failure
from grafos_core.chain import Record
from grafos_core.node_effects import ReceiptFacts
from grafos_core.receipt import TeardownReceipt
from grafos_core.recollection import PROVING


def judge_record(receipt: TeardownReceipt, record: Record) -> None:
    """Refuse a receipt that this record does not prove: `RECEIPT`."""
    named = (receipt.node_id, receipt.incarnation, receipt.record_number, receipt.record_hash)
    if named != (record.origin, record.incarnation, record.number, record.hash.hex()):
        raise failure.of("RECEIPT", "it names another record", lease_id=receipt.lease_id)
    if record.kind not in PROVING or record.boot_epoch > receipt.boot_epoch:
        raise failure.of("RECEIPT", "its record proves nothing", lease_id=receipt.lease_id)
    facts = ReceiptFacts.of_body(record.lease_id, record.epoch, record.body)
    proved = facts.receipt(
        record.origin, record.incarnation, receipt.boot_epoch, record.number, record.hash.hex()
    )
    if proved != receipt:
        raise failure.of("RECEIPT", "its record says something else", lease_id=receipt.lease_id)
