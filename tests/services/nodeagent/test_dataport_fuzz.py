"""Whatever bytes arrive at the data port: the process lives, and nobody else's lease is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grafos_core.lease import Kind
from grafos_proto.wire import dataframes as frames
from services.nodeagent.datapath import OpenLease
from services.nodeagent.dataport import Room
from services.nodeagent.dataport_line import Line
from services.nodeagent.dataport_work import Work
from tests.services.nodeagent.dataport_rig import EPOCH, Rig

SIZE = 64 * 1024
THEIRS = b"\xee" * SIZE
EXAMPLES = 150


class Script:
    """A pipe that gives out what it was given, in pieces, and keeps what it is told."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.said = bytearray()
        self.closed = False

    def receive(self, room: memoryview, *, whole: bool = False) -> int:
        if not self._pieces:
            return 0
        piece = self._pieces.pop(0)
        count = min(len(room), len(piece))
        room[:count] = piece[:count]
        if piece[count:]:
            self._pieces.insert(0, piece[count:])
        assert count, "there is always room for more"
        return count

    def send(self, data: bytes | memoryview) -> int:
        self.said += data
        return len(data)

    def send_at_once(self, data: bytes) -> int:
        return self.send(data)

    def wake(self) -> None: ...

    def shut(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class Table:
    """Two leases of two holders in one process."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.alice, bob = rig.holder("alice"), rig.holder("bob")
        self.ours, self.theirs = rig.lease(self.alice, SIZE), rig.lease(bob, SIZE)
        self.theirs.storage.write(0, THEIRS)
        assert self.ours.kind is Kind.MEM

    def hear(self, pieces: list[bytes]) -> bytes:
        """What a connection of Alice's says to these bytes. An exception would end the process."""
        pipe, room = Script(pieces), Room(1 << 20)
        work = Work(self.rig.data, self.alice.thumbprint)
        Line(pipe, self.alice.certificate, work, self.rig.sessions, room, self.rig.clock).run()
        assert pipe.closed
        assert room.borrow(1 << 20), "what was borrowed was given back"
        assert self.rig.gate.in_flight(self.ours.slot) == 0
        return bytes(pipe.said)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    rig = Rig(Path(tmp_path_factory.mktemp("fuzz")))
    yield Table(rig)
    rig.close()


def opening(lease: OpenLease, handle: int) -> bytes:
    payload = bytes.fromhex(lease.lease_id)
    return frames.request(frames.OPEN, handle, 1, offset=EPOCH, payload=payload)


HELLO = frames.request(frames.HELLO, 0, 0, count=frames.VERSION)
ops = st.sampled_from([*range(5), *range(15, 24), 255])
edges = st.sampled_from([0, 1, 8, 12, 4096, SIZE - 8, SIZE, SIZE + 1, 2**31, 2**32 - 1])
numbers = st.one_of(edges, st.integers(0, 2**32 - 1))
requests = st.builds(
    lambda op, handle, tag, offset, count, payload: frames.request(
        op, handle, tag, offset=offset, count=count, payload=payload
    ),
    ops,
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
    st.one_of(numbers, st.sampled_from([2**63, 2**64 - 1])),
    numbers,
    st.one_of(st.binary(max_size=64), st.builds(bytes, st.integers(0, 200_000))),
)
fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The same bytes, arriving in pieces."""
    at = sorted({place % (len(data) + 1) for place in places})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def check(table: Table, said: bytes) -> None:
    """The answers are whole frames, none has a byte of the other lease, and that is as it was."""
    at = 0
    while at < len(said):
        length, kind, flags, handle, _ = frames.ANSWER.unpack_from(said, at)
        assert kind in (frames.DATA, frames.REFUSAL)
        assert (flags, handle) == (0, 0)
        at += frames.ANSWER.size + length
    assert at == len(said)
    assert b"\xee" * 8 not in said
    assert table.theirs.storage.read(0, SIZE) == THEIRS


@fuzzing
@given(st.lists(requests, max_size=8), st.lists(st.integers(0, 2**20), max_size=4))
def test_requests_of_any_kind_are_answered_or_end_the_connection(
    table: Table, asked: list[bytes], places: list[int]
) -> None:
    data = b"".join([HELLO, opening(table.ours, 0), opening(table.theirs, 1), *asked])
    check(table, table.hear(cut(data, places)))


@fuzzing
@given(
    st.lists(requests, min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**20), max_size=4),
)
def test_streams_with_bytes_changed_are_harmless(
    table: Table, asked: list[bytes], changes: list[tuple[int, int]], places: list[int]
) -> None:
    whole = bytearray(b"".join([HELLO, opening(table.ours, 0), opening(table.theirs, 1), *asked]))
    for place, value in changes:
        whole[place % len(whole)] = value
    check(table, table.hear(cut(bytes(whole), places)))


@fuzzing
@given(st.binary(max_size=300), st.booleans())
def test_bytes_without_any_sense_are_harmless(table: Table, data: bytes, greeted: bool) -> None:
    check(table, table.hear([HELLO + data if greeted else data]))


def test_the_fuzz_reaches_the_bytes_of_a_lease_at_all(table: Table) -> None:
    """Were nothing ever opened, nothing above would prove anything."""
    write = frames.request(frames.WRITE, 0, 2, offset=5, count=3, payload=b"abc")
    read = frames.request(frames.READ, 0, 3, offset=4, count=5)
    said = table.hear([HELLO, opening(table.ours, 0) + write + read])
    assert said.endswith(frames.answer(3, b"\0abc\0"))
