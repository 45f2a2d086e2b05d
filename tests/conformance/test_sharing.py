"""Sharing, as holders see it: on real processes and on the fabric in one process alike."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import grafos
from grafos import (
    BlockBuilder,
    Denied,
    Fabric,
    FabricError,
    Incompatible,
    LeaseExpired,
    MemBuilder,
    Revoked,
    open_share,
)
from grafos._connection import to_cluster
from grafos._local import LocalFabric
from grafos.testing import VirtualFabric
from tests.conformance.conftest import Running, real_only

BLOCK = 4096


@contextmanager
def refused(kind: type[FabricError], code: str) -> Iterator[None]:
    with pytest.raises(kind) as raised:
        yield
    assert raised.value.code == code, raised.value


@pytest.fixture
def another(running: Running) -> Iterator[Callable[[], Fabric]]:
    """Connects like another process: with a key of its own."""
    made: list[Fabric] = []

    def connect() -> Fabric:
        if isinstance(running, VirtualFabric):
            made.append(running.connect())
        else:
            made.append(to_cluster(running.description))
        return made[-1]

    yield connect
    for each in made:
        each.close()


@pytest.fixture
def reader(another: Callable[[], Fabric]) -> Fabric:
    return another()


@pytest.fixture
def lease(running: Running) -> Iterator[grafos.MemLease]:
    with MemBuilder().min_bytes(8192).lease_secs(60).acquire() as held:
        held.mem().write(0, bytes(range(256)) * 32)
        yield held


def test_a_share_is_read_by_the_one_that_it_is_for(lease: grafos.MemLease, reader: Fabric) -> None:
    text = str(lease.share(to=reader.holder_key))
    with open_share(text, fabric=reader) as share:
        assert (share.lease_id, share.kind, share.ops) == (lease.lease_id, "mem", ("read", "write"))
        assert share.mem().arena_size == 8192
        assert share.mem().read(250, 10) == lease.mem().read(250, 10)
        share.mem().write(0, b"from the other side")
        assert lease.mem().read(0, 19) == b"from the other side"
        assert share.mem().path != "shared"
        with refused(Incompatible, "OPTION"):
            share.mem().map()


def test_a_part_is_a_part(lease: grafos.MemLease, reader: Fabric) -> None:
    given = lease.share(to=reader.holder_key, ops=["read"], offset=16, length=32)
    with open_share(given.text, fabric=reader) as share:
        memory = share.mem()
        assert (memory.arena_size, memory.read(0, 32)) == (32, bytes(range(16, 48)))
        with refused(Incompatible, "EXTENT"):
            memory.read(1, 32)
        with refused(Denied, "SCOPE"):
            memory.write(0, b"x")
        assert share.valid
        assert memory.read(0, 1) == b"\x10"
        buffer = bytearray(4)
        assert memory.readinto(4, buffer) == 4
        assert buffer == bytes(range(20, 24))
        assert memory.read_many([(0, 1), (31, 1)]) == [b"\x10", b"\x2f"]
    assert lease.mem().read(0, 16) == bytes(range(16))


def test_who_is_named_and_not_keyed_uses_it_too_and_cannot_pass_it_on(
    lease: grafos.MemLease, reader: Fabric, another: Callable[[], Fabric]
) -> None:
    user = reader.identity.rpartition("/")[0]
    for name in (reader.identity, user):
        with open_share(lease.share(to=name).text, fabric=reader) as share:
            assert share.mem().read(0, 2) == b"\x00\x01"
            with refused(Denied, "SCOPE"):
                share.share(to=another().holder_key)


def test_what_was_given_to_another_is_of_no_use(
    lease: grafos.MemLease, reader: Fabric, another: Callable[[], Fabric]
) -> None:
    text = lease.share(to=reader.holder_key).text
    with refused(Denied, "HOLDER_MISMATCH"):
        open_share(text, fabric=another())
    stranger = another()
    chain, _ = grafos._share._read(text)
    with refused(Denied, "HOLDER_MISMATCH"):
        stranger._open_share(chain, text.partition("#")[2])


def test_nobody_gives_more_than_he_has(lease: grafos.MemLease, reader: Fabric) -> None:
    key = reader.holder_key
    for fields in (
        {"offset": 8192}, {"length": 8193}, {"offset": 8, "length": 8185}, {"offset": 4},
        {"ttl": 3600}, {"offset": -8}, {"length": 0},
    ):  # fmt: skip
        with refused(Incompatible, "RANGE"):
            lease.share(to=key, **fields)  # type: ignore[arg-type]
    for ops in ([], ["execute"]):
        with refused(Incompatible, "INVALID"):
            lease.share(to=key, ops=ops)
    with refused(Incompatible, "INVALID"):
        lease.share(to="whoever")
    with open_share(lease.share(to=key, ops=["read"], length=64).text, fabric=reader) as share:
        with refused(Denied, "SCOPE"):
            share.share(to=key, ops=["write"])
        with refused(Incompatible, "RANGE"):
            share.share(to=key, length=65)


def test_it_is_passed_on_three_deep_and_no_deeper(
    lease: grafos.MemLease, another: Callable[[], Fabric]
) -> None:
    people = [another() for _ in range(4)]
    given = lease.share(to=people[0].holder_key, offset=64)
    for who, then in itertools.pairwise(people):
        share = open_share(given.text, fabric=who)
        assert share.mem().read(0, 1) == lease.mem().read(64 * len(share._chain.shares), 1)
        if len(share._chain.shares) < 3:
            given = share.share(to=then.holder_key, offset=64)
    with refused(Incompatible, "RANGE"):
        share.share(to=people[3].holder_key)
    assert [each.depth for each in lease.shares()] == [1, 2, 3]


def test_ending_one_ends_what_was_made_of_it_and_nothing_else(
    lease: grafos.MemLease, another: Callable[[], Fabric]
) -> None:
    left, right, below = another(), another(), another()
    to_left, to_right = (lease.share(to=each.holder_key) for each in (left, right))
    a, b = open_share(to_left.text, fabric=left), open_share(to_right.text, fabric=right)
    to_below = a.share(to=below.holder_key, ops=["read"])
    c = open_share(to_below.text, fabric=below)
    assert c.mem().read(1, 1) == b"\x01"
    assert {each.share_id: each.parent_id for each in lease.shares()} == {
        a.share_id: "", b.share_id: "", c.share_id: a.share_id,
    }  # fmt: skip
    assert [each.share_id for each in a.shares()] == [c.share_id]
    assert b.shares() == []
    to_left.end()
    for each in (a, c):
        with refused(Revoked, "REVOKED"):
            each.mem().read(0, 1)
        assert not each.valid
    assert b.mem().read(1, 1) == lease.mem().read(1, 1) == b"\x01"
    assert sorted(each.state for each in lease.shares()) == ["ended", "ended", "open"]
    with refused(Revoked, "REVOKED"):
        open_share(to_below.text, fabric=below)
    to_left.end()


def test_a_share_that_nobody_has_opened_can_be_ended(
    lease: grafos.MemLease, reader: Fabric
) -> None:
    given = lease.share(to=reader.holder_key)
    given.end()
    with refused(Revoked, "REVOKED"):
        open_share(given.text, fabric=reader)


def test_only_who_gave_it_or_has_it_ends_a_share(
    lease: grafos.MemLease, another: Callable[[], Fabric]
) -> None:
    left, right = another(), another()
    a = open_share(lease.share(to=left.holder_key).text, fabric=left)
    b = open_share(lease.share(to=right.holder_key).text, fabric=right)
    a._giver().end(b.share_id)  # who has no say is not told so
    assert b.mem().read(1, 1) == b"\x01"
    b.end()
    with refused(LeaseExpired, "LEASE_RELEASED"):
        b.mem().read(0, 1)
    assert a.mem().read(1, 1) == b"\x01"


def test_its_own_time_ends_it(
    lease: grafos.MemLease, reader: Fabric, let_pass: Callable[[float], None]
) -> None:
    given = lease.share(to=reader.holder_key, ttl=1)
    share = open_share(given.text, fabric=reader)
    assert 0 < share.remaining_ms() <= 1000
    assert share.mem().read(1, 1) == b"\x01"
    careless = open_share(given.text, fabric=reader)
    careless._until_ns = 1 << 62  # whatever he believes
    let_pass(1.1)
    for each in (share, share, careless, careless):
        with refused(LeaseExpired, "LEASE_EXPIRED"):
            each.mem().read(0, 1)
    with refused(LeaseExpired, "LEASE_EXPIRED"):
        open_share(given.text, fabric=reader)
    assert lease.mem().read(1, 1) == b"\x01"


def test_it_ends_with_its_lease(running: Running, reader: Fabric) -> None:
    lease = MemBuilder().min_bytes(4096).acquire()
    given = lease.share(to=reader.holder_key)
    share = open_share(given.text, fabric=reader)
    share.mem().write(0, b"here")
    lease.release()
    with refused(LeaseExpired, "LEASE_RELEASED"):
        share.mem().read(0, 4)
    with refused(LeaseExpired, "LEASE_RELEASED"):
        open_share(given.text, fabric=reader)
    given.end()


def test_a_revocation_of_the_lease_ends_it_at_once(running: Running, reader: Fabric) -> None:
    lease = MemBuilder().min_bytes(4096).acquire()
    share = open_share(lease.share(to=reader.holder_key).text, fabric=reader)
    assert share.mem().read(0, 1) == b"\x00"
    lease._fabric.revoke(lease.lease_id, reason="wanted back")
    with refused(Revoked, "REVOKED"):  # as soon as the node has heard of it
        for _ in range(500):
            assert share.mem().read(0, 1) == b"\x00"
            threading.Event().wait(0.005)
    with refused(Revoked, "REVOKED"):
        lease.mem().read(0, 1)


def test_a_renewed_lease_is_shared_for_longer(lease: grafos.MemLease, reader: Fabric) -> None:
    before = lease.share(to=reader.holder_key)
    lease.renew(600)
    after = lease.share(to=reader.holder_key, ttl=500)
    assert after.expiry_ms > before.expiry_ms
    for given in (before, after):
        with open_share(given.text, fabric=reader) as share:
            assert share.mem().read(1, 1) == b"\x01"


@real_only
def test_words_are_changed_by_all_who_have_them(lease: grafos.MemLease, reader: Fabric) -> None:
    lease.mem().write(64, bytes(8))
    with open_share(lease.share(to=reader.holder_key, offset=64).text, fabric=reader) as share:
        assert (lease.mem().path, share.mem().path) == ("shared", "port")
        for _ in range(50):
            share.mem().fetch_add(0, 1)
            lease.mem().fetch_add(64, 1)
        assert share.mem().compare_and_swap(0, 100, 7) == 100
    assert lease.mem().read(64, 1) == b"\x07"


def test_blocks_are_shared_by_the_block(running: Running, reader: Fabric) -> None:
    with BlockBuilder().min_blocks(4).acquire() as lease:
        for index in range(4):
            lease.block().write_block(index, bytes([index]) * BLOCK)
        with refused(Incompatible, "RANGE"):
            lease.share(to=reader.holder_key, offset=8)
        given = lease.share(to=reader.holder_key, offset=BLOCK, length=2 * BLOCK)
        with open_share(given.text, fabric=reader) as share:
            blocks = share.block()
            assert blocks.num_blocks == 2
            assert blocks.read_block(1) == b"\x02" * BLOCK
            blocks.write_block(0, b"\xff" * BLOCK)
            with refused(Incompatible, "EXTENT"):
                blocks.read_block(2)
            with refused(Denied, "SCOPE"):
                share.mem()
        assert lease.block().read_blocks(0, 2) == bytes(BLOCK) + b"\xff" * BLOCK


def test_two_who_have_it_open_in_one_process_do_not_close_it_for_each_other(
    lease: grafos.MemLease, reader: Fabric
) -> None:
    text = lease.share(to=reader.holder_key).text
    one, two = (open_share(text, fabric=reader) for _ in range(2))
    with one:
        assert one.mem().read(1, 1) == b"\x01"
    assert two.mem().read(1, 1) == b"\x01"
    with refused(grafos.Disconnected, "CLOSED"):
        one.mem().read(1, 1)
    del two
    reader.poll()
    node = next(iter(reader._nodes.values()))
    assert (node._shared, dict(node._sharing)) == ({}, {})


def test_a_text_that_is_none_is_refused_before_anybody_is_asked(
    lease: grafos.MemLease, reader: Fabric
) -> None:
    text = lease.share(to=reader.holder_key).text
    chain, _, endpoint = text.partition("#")
    for bad in (
        "", "#", chain, f"{chain}#", f"#{endpoint}", f"{chain}#ftp://x", f"{chain}#{endpoint} x",
        f"{chain}#dns:///x:1", "A" * 9000, f"{chain.partition('~')[0]}#{endpoint}",
    ):  # fmt: skip
        with pytest.raises(Denied) as raised:
            open_share(bad, fabric=reader)
        assert raised.value.code.startswith("TOKEN_"), bad


@real_only
def test_a_front_that_is_killed_costs_its_shares_nothing_but_a_moment(
    running: Running, lease: grafos.MemLease, another: Callable[[], Fabric]
) -> None:
    assert isinstance(running, LocalFabric)
    left, right = another(), another()
    to_left = lease.share(to=left.holder_key)
    a = open_share(to_left.text, fabric=left)
    to_right = a.share(to=right.holder_key)
    b = open_share(to_right.text, fabric=right)
    assert a.mem().read(1, 1) == b.mem().read(1, 1) == b"\x01"
    front = running.pids()["node-n1/front"]
    os.kill(front, signal.SIGKILL)
    for each in (a, b):
        until(lambda: each.mem().read(1, 1) == b"\x01")  # noqa: B023
    a._grip.node._port = None  # by calls, to a front that has not been shown it by this one
    os.kill(running.pids()["node-n1/front"], signal.SIGKILL)
    until(lambda: a.mem().read(1, 1) == b"\x01")
    to_right.end()
    with refused(Revoked, "REVOKED"):
        b.mem().read(0, 1)


def until(what: Callable[[], bool]) -> None:
    """True within five seconds; whoever cannot be reached meanwhile is asked again."""
    for _ in range(100):
        try:
            assert what()
            return
        except grafos.Disconnected:
            threading.Event().wait(0.05)
    raise AssertionError("it never came true")
