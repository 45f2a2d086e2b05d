"""The collector as a process: catalogue rows U1 to U9 over real gRPC, restarts, damaged files."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from grafos_core import export
from grafos_core.chain import Seal
from grafos_core.failure import FabricError
from grafos_proto.v1 import audit_pb2
from grafos_proto.wire import failures
from services.runtime import signing
from services.runtime.signing import key_id_of
from tests.services.audit.writer import Writer
from tests.services.ledger.house import House, ServiceProcess

Start = Callable[..., ServiceProcess]


@pytest.fixture
def audit(start: Start) -> ServiceProcess:
    return start()


@pytest.fixture
def writer(house: House, audit: ServiceProcess) -> Iterator[Writer]:
    made = Writer(house, audit.endpoint, "node/n1")
    yield made
    made.close()


def test_what_is_acknowledged_is_countersigned_and_known(writer: Writer) -> None:
    records = writer.write(3)
    answer = writer.append(records)
    assert (answer.number, answer.head) == (3, records[-1].hash)
    everything = writer.stub.Head(audit_pb2.HeadRequest(origin="n1"), timeout=10)
    message = export.countersign_bytes("n1", writer.incarnation, 3, records[-1].hash)
    assert signing.verify(everything.public_key, message, answer.countersignature)
    assert writer.head().number == 3


def test_what_is_known_already_is_no_error(writer: Writer) -> None:
    records = writer.write(4)
    writer.append(records[:2])
    assert writer.append(records).number == 4
    assert writer.append(records[1:3]).number == 4


def test_a_gap_is_refused_with_where_to_go_on(writer: Writer) -> None:
    """U1."""
    records = writer.write(4)
    writer.append(records[:1])
    refused = writer.refusal(records[2:])
    assert (refused.code, refused.status) == ("GAP", "OUT_OF_RANGE")
    assert refused.details["expected_number"] == "2"
    assert refused.details["expected_head"] == records[0].hash.hex()


def forked(writer: Writer) -> FabricError:
    """The same writer tells record 2 twice, differently."""
    first = writer.write(1)
    before = (writer.chain.head, writer.chain.number)
    writer.append(first + writer.write(1, story="one"))
    writer.chain._head, writer.chain._number = before
    return writer.refusal(writer.write(1, story="other"))


def test_a_fork_is_refused_and_the_chain_quarantined(writer: Writer) -> None:
    """U3."""
    refused = forked(writer)
    assert (refused.code, refused.status) == ("FORK", "DATA_LOSS")
    head = writer.head()
    assert head.quarantined
    assert "two records 2" in head.evidence
    assert writer.refusal(writer.write(1)).code == "FORK"


def test_the_evidence_of_a_fork_outlives_the_collector(
    house: House, start: Start, audit: ServiceProcess, writer: Writer
) -> None:
    """U3."""
    forked(writer)
    audit.kill()
    writer.moved(start().endpoint, house, "node/n1")
    assert writer.head().quarantined
    assert writer.refusal(writer.write(1)).code == "FORK"


def test_records_that_do_not_link_are_refused(house: House, writer: Writer) -> None:
    """U4."""
    writer.append(writer.write(2))
    stranger = Writer(house, "127.0.0.1:1", "node/n1")
    stranger.incarnation, stranger.key = writer.incarnation, writer.key
    stranger.chain = type(writer.chain)("n1", writer.incarnation, 1, b"\x01" * 32, 2)
    other = stranger.write(1)
    refused = writer.refusal(other)
    assert (refused.code, refused.status) == ("CHAIN", "DATA_LOSS")
    record = writer.write(1)
    assert writer.refusal(record, seals=[writer.seal(record[0], hash=b"\x02" * 32)]).code == "CHAIN"
    assert writer.append(record).number == 3
    stranger.close()


def test_a_seal_by_any_other_key_is_refused(house: House, writer: Writer) -> None:
    """U5."""
    own, records = writer.key, writer.write(1)
    writer.key = Ed25519PrivateKey.generate()
    unsigned = writer.seal(records[0], signature=bytes(64))
    assert writer.refusal(records, seals=[unsigned]).code == "SEAL_KEY"
    assert writer.head() is None
    writer.key = own  # a first key is believed only when it has sealed: this one still can be it
    writer.append(records)
    writer.key, more = Ed25519PrivateKey.generate(), writer.write(1)
    refused = writer.refusal(more)
    assert (refused.code, refused.status) == ("SEAL_KEY", "PERMISSION_DENIED")
    writer.key = own
    old, old_chain = writer.incarnation, writer.chain
    writer.format()
    writer.append(writer.write(1))
    writer.incarnation, writer.chain = old, old_chain
    assert writer.refusal(more).code == "SEAL_KEY"  # an old incarnation's


@pytest.mark.parametrize(
    "data",
    [
        b"\xbf\xff", b"\xa2\x01\x00\x01\x00", b"\xa2\x02\x00\x01\x00", b"\x18\x01", b"\xc0\x00",
        b"\xfb\x00\x00\x00\x00\x00\x00\x00\x00", b"\x00\x00", b"\x81" * 9 + b"\x00", b"",
    ],
    ids=["indefinite", "twice", "order", "long", "tag", "float", "after", "deep", "nothing"],
)  # fmt: skip
def test_bytes_in_any_other_encoding_are_refused(data: bytes, writer: Writer) -> None:
    """U6."""
    record = writer.write(1)
    refused = writer.refusal(record, sent=[data])
    assert (refused.code, refused.status) == ("ENCODING", "INVALID_ARGUMENT")
    assert writer.append(record).number == 1


def test_a_writer_behind_what_was_acknowledged_is_quarantined(writer: Writer) -> None:
    """U8."""
    records = writer.write(3)
    writer.append(records)
    assert writer.announce(records[2]).number == 3
    with pytest.raises(FabricError) as refused:
        writer.announce(records[1])
    assert (refused.value.code, refused.value.status) == ("ROLLBACK", "FAILED_PRECONDITION")
    assert writer.head().quarantined
    assert writer.refusal(writer.write(1)).code == "ROLLBACK"


def test_a_chain_comes_from_its_writer_alone(house: House, audit: ServiceProcess) -> None:
    for path, origin in (
        ("node/n1", "n2"), ("service/admission", "ledger"), ("service/audit", "audit"),
        ("node/ledger", "ledger"), ("service/ledger", "n1"),
    ):  # fmt: skip
        thief = Writer(house, audit.endpoint, path, origin)
        assert thief.refusal(thief.write(1)).code == "DENIED", path
        thief.close()
    ledger = Writer(house, audit.endpoint, "service/ledger")
    assert ledger.append(ledger.write(1)).number == 1
    ledger.close()


def test_nodes_see_their_own_head_and_export_nothing(
    house: House, audit: ServiceProcess, writer: Writer
) -> None:
    writer.append(writer.write(1))
    other = Writer(house, audit.endpoint, "node/n2")
    seen = other.stub.Head(audit_pb2.HeadRequest(), timeout=10)
    assert not [head for head in seen.heads if head.origin != "n2"]
    with pytest.raises(FabricError) as refused, failures.status_to_failures():
        list(other.stub.Export(audit_pb2.ExportRequest(), timeout=10))
    assert refused.value.code == "ROLE"
    other.close()


def exported(house: House, endpoint: str) -> list[str]:
    """As `grafos audit export` writes it."""
    operator = Writer(house, endpoint, "operator/alice")
    lines = [export.export_line()]
    stretches: dict[tuple[str, str], tuple[int, int, bytes]] = {}
    for part in operator.stub.Export(audit_pb2.ExportRequest(), timeout=10):
        name = (part.origin, part.incarnation)
        if name not in stretches:
            lines.append(export.key_line(*name, part.key_id, part.public_key))
        seals = [Seal(s.number, s.hash, s.key_id, s.signature) for s in part.seals]
        lines += export.lines_of(*name, part.records, seals)
        stretches[name] = (1, seals[-1].number, seals[-1].hash)
    operator.close()
    return [*lines, export.end_line(stretches, len(lines) + 1)]


def test_an_export_proves_itself_with_the_collectors_own_chain(
    house: House, start: Start, audit: ServiceProcess, writer: Writer
) -> None:
    for _ in range(3):
        writer.append(writer.write(200))
    assert audit.stop() == 0
    report = export.verify_export(
        exported(house, start().endpoint), signing.verify, signing.key_id_of,
        trusted=None,
    )  # fmt: skip
    assert report.problems == []
    assert report.chains["n1", writer.incarnation].sealed == 600
    own = next(each for each in report.chains.values() if each.origin == "audit")
    assert own.sealed >= 1


def test_a_restart_knows_all_that_was_acknowledged_before_a_kill(
    house: House, start: Start, audit: ServiceProcess, writer: Writer
) -> None:
    acknowledged = 0
    for _ in range(50):
        acknowledged = writer.append(writer.write(2)).number
    audit.kill()
    writer.moved(start().endpoint, house, "node/n1")
    assert writer.head().number == acknowledged
    assert writer.append(writer.write(1)).number == acknowledged + 1


def test_a_second_collector_on_the_same_folder_refuses_to_start(
    start: Start, audit: ServiceProcess
) -> None:
    second = start()
    assert second.ready == {}
    assert second.process.returncode == 1
    assert "another collector runs on this folder" in second.log()


@pytest.mark.parametrize("damage", ["record", "delete", "seal", "log", "table"])
def test_a_damaged_chain_is_named_and_nothing_is_served(
    damage: str, house: House, start: Start, audit: ServiceProcess, writer: Writer
) -> None:
    for _ in range(5):
        writer.append(writer.write(1))
    path = house.folder / "audit" / "chains" / "audit.sqlite3"
    audit.kill()
    expected = spoil(path, damage)
    again = start()
    assert again.ready == {}
    assert expected in again.log()


def spoil(path: Path, damage: str) -> str:
    """Damage the file; what the refusal must say."""
    if damage == "log":
        path.with_name(path.name + "-wal").write_bytes(b"")
        return "transactions are missing"
    if damage == "table":
        path.write_bytes(b"")
        return "is empty and should not be"
    connection = sqlite3.connect(path, isolation_level=None)
    where = "WHERE number = 3 AND chain = (SELECT id FROM chain WHERE origin = 'n1')"
    if damage == "record":
        ((data,),) = connection.execute(f"SELECT data FROM record {where}")
        changed = data[:-1] + bytes([data[-1] ^ 1])
        connection.execute(f"UPDATE record SET data = ? {where}", (changed,))
    elif damage == "delete":
        connection.execute(f"DELETE FROM record {where}")
    else:
        connection.execute(f"UPDATE seal SET signature = zeroblob(64) {where}")
    connection.close()
    return "record 3 of n1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir(mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(folder)], check=True
    )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.requires("mount", "umount")
def test_a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room(
    house: House, start: Start, small_disk: Path
) -> None:
    """U9."""
    audit = start(state="small/audit")
    writer = Writer(house, audit.endpoint, "node/n1")
    acknowledged, refused = 0, None
    records: list[Any] = []
    for _ in range(100):
        records = writer.write(8, filler="x" * 2000)
        try:
            acknowledged = writer.append(records).number
        except FabricError as error:
            refused = error
            break
    assert refused is not None
    assert (refused.code, refused.status) == ("COLLECTOR_DISK", "UNAVAILABLE")
    assert writer.head().number == acknowledged
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert writer.append(records).number == records[-1].number
    writer.close()
    assert audit.stop() == 0


def test_a_disk_that_fails_acknowledges_nothing_more_and_still_tells_heads(
    house: House, start: Start
) -> None:
    """U9, EIO."""
    audit = start("--mode", "development", environment={"GRAFOS_FAULT": "audit.append:EIO:2"})
    writer = Writer(house, audit.endpoint, "node/n1")
    writer.append(writer.write(1))
    more = writer.write(1)
    for _ in range(2):
        assert writer.refusal(more).code == "COLLECTOR_DISK"
    assert writer.head().number == 1
    assert audit.process.wait(30) != 0, "it ends, and the next one reads what is on disk"
    again = start()
    writer.moved(again.endpoint, house, "node/n1")
    assert writer.append(more).number == 2
    writer.close()


def test_calls_without_a_certificate_of_ours_end_in_the_handshake(
    tmp_path: Path, audit: ServiceProcess
) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    stranger = Writer(House(tmp_path / "other"), audit.endpoint, "node/n1")
    with pytest.raises(FabricError) as refused, failures.status_to_failures():
        stranger.stub.Head(audit_pb2.HeadRequest(), timeout=5)
    assert refused.value.code == "UNREACHABLE"
    stranger.close()


def test_the_id_of_a_key_is_made_of_the_key(writer: Writer) -> None:
    refused = writer.refusal(writer.write(1), key_id="0" * 16)
    assert refused.code == "SEAL_KEY"
    assert key_id_of(writer.public_key) != "0" * 16
