"""An export proves itself, and no byte of it can be another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import pytest

from grafos_core import chain, export
from grafos_core.chain import Chain, Record, Seal

INCARNATION = "4f" * 16
PUBLIC = b"public key of the node".ljust(32, b".")
OTHER = b"public key of nobody".ljust(32, b".")


def key_id(public_key: bytes) -> str:
    return hashlib.sha256(public_key).hexdigest()[:16]


def sign(public_key: bytes, message: bytes) -> bytes:
    """Stands in for Ed25519: who can verify could sign here, which is of no use to the test."""
    return hashlib.sha512(public_key + message).digest()


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    return sign(public_key, message) == signature


def seal(record: Record, public_key: bytes = PUBLIC) -> Seal:
    message = chain.seal_bytes(record.incarnation, record.number, record.hash)
    return Seal(record.number, record.hash, key_id(public_key), sign(public_key, message))


def written(count: int = 4) -> list[str]:
    """Lines of one chain, sealed at every second record."""
    writer = Chain("node-1", INCARNATION, 1)
    records = [
        writer.append(
            "agent.bound", wall_ms=1_000 + n, boottime_ns=n, lease_id="a" * 32, epoch=n + 1,
            body={"n": n, "hash": b"\x00\xff", "list": [1, None, True]},
        )
        for n in range(count)
    ]  # fmt: skip
    name = ("node-1", INCARNATION)
    seals = [seal(record) for record in records[1::2]]
    lines = export.lines_of(*name, [record.data for record in records], seals)
    made = [export.export_line(), export.key_line(*name, key_id(PUBLIC), PUBLIC), *lines]
    return [*made, export.end_line({name: (1, count, writer.head)}, len(made) + 1)]


def report(lines: list[str], trusted: list[bytes] | None = None) -> export.Report:
    return export.verify_export(lines, verify, key_id, trusted=trusted)


def test_what_was_exported_is_proved_to_its_last_record() -> None:
    found = report(written())
    assert found.problems == []
    (each,) = found.chains.values()
    assert (each.first, each.number, each.sealed, each.seals) == (1, 4, 4, 2)
    assert report([f"{line}\n" for line in written()]).ok


def test_people_read_in_a_line_what_the_record_says() -> None:
    value = json.loads(written()[2])
    assert (value["kind"], value["lease_id"], value["epoch"]) == ("agent.bound", "a" * 32, 1)
    assert value["body"] == {"n": 0, "hash": {"hex": "00ff"}, "list": [1, None, True]}


def test_any_byte_that_is_changed_anywhere_is_found() -> None:
    lines = written(2)
    for index, line in enumerate(lines):
        for at in range(len(line)):
            changed = line[:at] + chr(ord(line[at]) ^ 1) + line[at + 1 :]
            spoiled = [*lines[:index], changed, *lines[index + 1 :]]
            assert not report(spoiled).ok, f"line {index + 1}, character {at + 1}: {line[at]}"


def test_a_line_that_is_missing_twice_or_elsewhere_is_found() -> None:
    lines = written()
    for index in range(len(lines)):
        assert not report(lines[:index] + lines[index + 1 :]).ok, f"without line {index + 1}"
        assert not report([*lines[: index + 1], *lines[index:]]).ok, f"line {index + 1} twice"
    for index in range(len(lines) - 1):
        swapped = [*lines]
        swapped[index], swapped[index + 1] = lines[index + 1], lines[index]
        assert not report(swapped).ok, f"lines {index + 1} and {index + 2} swapped"


def test_a_file_that_was_cut_short_is_found() -> None:
    lines = written()
    for count in range(len(lines)):
        assert not report(lines[:count]).ok


def rewritten(change: Callable[[dict[str, object]], None]) -> list[str]:
    """A record's line spelt out otherwise, its bytes as they were."""
    lines = written()
    value = json.loads(lines[2])
    change(value)
    lines[2] = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return lines


def test_what_people_read_cannot_differ_from_what_was_signed() -> None:
    for field, value in (("epoch", 9), ("kind", "agent.fenced"), ("wall_ms", 1), ("body", {})):
        found = report(rewritten(lambda line, f=field, v=value: line.update({f: v})))  # type: ignore[misc]
        assert any("is not what its bytes say" in what for _, what in found.problems), field


def test_records_that_no_seal_covers_are_found() -> None:
    lines = written()
    (last,) = [
        at for at, line in enumerate(lines) if '"type":"seal"' in line and '"number":4' in line
    ]
    found = report(lines[:last] + lines[last + 1 :])
    assert [what for _, what in found.problems if "are not sealed" in what]


def test_only_the_keys_that_somebody_believes_count_when_he_names_them() -> None:
    assert report(written(), trusted=[PUBLIC]).ok
    found = report(written(), trusted=[OTHER])
    assert "is not one of those believed" in found.problems[0][1]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"type":"x"}', "[" * 5000, "é"])
def test_lines_that_are_none_are_named_and_the_rest_is_read_on(text: str) -> None:
    lines = written()
    found = report([*lines[:2], text, *lines[2:]])
    assert found.problems[0][0] == 3
    assert found.chains["node-1", INCARNATION].sealed == 4


def test_a_stretch_of_a_chain_is_proved_and_says_where_it_begins() -> None:
    lines = written()
    kept = [line for line in lines[:-1] if '"number":1,' not in line and '"number":2,' not in line]
    head = json.loads(lines[-1])["chains"][0][4]
    end = export.end_line({("node-1", INCARNATION): (3, 4, bytes.fromhex(head))}, len(kept) + 1)
    found = report([*kept, end])
    assert found.problems == []
    assert next(iter(found.chains.values())).first == 3
