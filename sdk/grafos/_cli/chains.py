"""Audit chains between the fabric and a file; the lines are made in grafos_core.export."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from grafos._cli.operator import Operator
from grafos_core import chain, export
from grafos_core.chain import Seal
from grafos_core.export import Report
from grafos_proto.v1 import audit_pb2

KEY_ID_CHARS = 16


def export_lines(operator: Operator, origin: str, keys: set[bytes]) -> Iterator[str]:
    """Every line of an export; the public keys that stand in it are added to `keys`."""
    stretches: dict[tuple[str, str], tuple[int, int, bytes]] = {}
    count = 1
    yield export.export_line()
    parts = operator.audit_stream("Export", audit_pb2.ExportRequest(origin=origin))
    for line in _chain_lines(parts, keys, stretches):
        count += 1
        yield line
    yield export.end_line(stretches, count + 1)


def _chain_lines(
    parts: Iterable[audit_pb2.ExportResponse],
    keys: set[bytes],
    stretches: dict[tuple[str, str], tuple[int, int, bytes]],
) -> Iterator[str]:
    said: set[tuple[str, str, str]] = set()
    for part in parts:
        name = (part.origin, part.incarnation)
        if part.public_key and (*name, part.key_id) not in said:
            said.add((*name, part.key_id))
            keys.add(part.public_key)
            yield export.key_line(*name, part.key_id, part.public_key)
        seals = [Seal(s.number, s.hash, s.key_id, s.signature) for s in part.seals]
        yield from export.lines_of(*name, part.records, seals)
        if part.records:
            first, last = chain.parse(part.records[0]), chain.parse(part.records[-1])
            begin = stretches[name][0] if name in stretches else first.number
            stretches[name] = (begin, last.number, last.hash)


def verify_file(path: Path, trusted: Collection[bytes] | None) -> Report:
    """Recompute every hash and every signature of an exported file."""
    with path.open("r", encoding="ascii", errors="replace", newline="\n") as file:
        return export.verify_export(file, _verify, _key_id, trusted=trusted)


def _verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _key_id(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()[:KEY_ID_CHARS]
