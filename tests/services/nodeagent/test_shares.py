"""Shares at the data port: shown by frames, held against what is bound, looked at before and after
the bytes, and ended by their giver; catalogue rows K15a and its neighbours where they are used."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grafos_core import failure, jws, share
from grafos_core.failure import FabricError, LeaseExpired, Revoked
from grafos_core.lease import Kind
from grafos_core.share import Chain, Recipient, Scope
from grafos_core.sharebook import Entry
from grafos_core.token import LeaseToken
from grafos_proto.v1 import node_pb2
from grafos_proto.wire import dataframes as frames
from grafos_proto.wire import es256
from grafos_proto.wire.credentials import Credentials
from services.nodeagent.datapath import OpenLease
from services.nodeagent.sharedesk import ShareDesk
from services.runtime.calls import Peer
from tests.services.nodeagent.dataport_rig import EPOCH, Caller, Rig, Shelf

SIZE = 64 * 1024
END_MS = 60_000


class Town(Rig):
    """A rig in which alice has a lease and shares it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.alice, self.bob, self.cid = (self.holder(name) for name in ("alice", "bob", "cid"))
        self.leased = self.lease(self.alice, SIZE)
        storage = self.leased.storage
        assert isinstance(storage, Shelf)
        self.shelf: Shelf = storage
        self.shelf.write(0, bytes(range(256)) * (SIZE // 256))
        self.remembered: list[tuple[str, int, str, str]] = []
        self.desk = ShareDesk(
            self.shares, self.data, lambda *fields: self.remembered.append(fields)
        )

    def root(self, **changes: Any) -> Chain:
        """As admission would have signed it; what it says is proved by the rig."""
        now_ms = self.clock.wall_ms()
        fields: dict[str, Any] = {
            "issuer": "spiffe://test.local/service/admission", "subject": str(self.alice.identity),
            "audience": "n1/" + "ab" * 16, "jti": "0a" * 16, "iat_ms": now_ms, "nbf_ms": now_ms,
            "exp_ms": now_ms + 1, "holder_thumbprint": self.alice.thumbprint,
            "lease_id": self.leased.lease_id, "kind": Kind.MEM, "amount": SIZE,
            "ops": ("read", "write"), "epoch": EPOCH, "generation": 1, "ttl_ms": END_MS,
            "lease_end_ms": now_ms + END_MS, **changes,
        }  # fmt: skip
        claims = jws.canonical(LeaseToken(**fields).to_claims())
        slip = jws.header(jws.LEASE, "k1") + b"." + jws.to_base64url(claims) + b".eA"
        return share.read_root(slip.decode())

    def give(self, chain: Chain, by: Credentials, to: Credentials, **changes: Any) -> Chain:
        mine = chain.scope
        scope = Scope(
            changes.get("recipient", Recipient(key=to.thumbprint)), changes.get("ops", mine.ops),
            changes.get("offset", mine.offset),
            changes.get("length", mine.range_end - changes.get("offset", mine.offset)),
            changes.get("end_ms", mine.end_ms),
        )  # fmt: skip
        made = share.narrowed(chain, share_id=secrets.token_hex(16), scope=scope)
        return share.mint(chain, made, es256.signer(by.key))

    def opened(self, chain: Chain, who: Credentials, handle: int = 0) -> Caller:
        caller = self.connect(who).hello()
        kind, _, data = self.show(caller, chain, handle)
        assert kind == frames.DATA, data
        return caller

    def show(self, caller: Caller, chain: Chain | str | bytes, handle: int = 0) -> Any:
        text = chain.text if isinstance(chain, Chain) else chain
        payload = text.encode() if isinstance(text, str) else text
        return caller.ask(frames.SHARE, handle, 1, payload=payload)

    def entry(self, chain: Chain, key: str) -> Entry:
        found = self.shares.find(self.leased.lease_id, EPOCH, chain.digest, key).share
        assert found is not None
        return found

    def strike(self, who: Credentials, share_id: str, by: str = "") -> Any:
        request = node_pb2.EndShareRequest(
            lease_id=self.leased.lease_id, epoch=EPOCH, share_id=share_id, by=by
        )
        return self.desk.end(peer(who), request)


def peer(who: Credentials) -> Peer:
    return Peer(who.identity, who.thumbprint, 2**62)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    made = Town(tmp_path)
    yield made
    made.close()


def read(caller: Caller, offset: int, count: int, handle: int = 0) -> Any:
    return caller.ask(frames.READ, handle, 9, count=count, offset=offset)


def refusal(answer: Any) -> str:
    kind, _, cause = answer
    assert kind == frames.REFUSAL, answer
    assert isinstance(cause, FabricError)
    return cause.code


class TestUse:
    def test_its_bytes_begin_where_it_begins_and_end_where_it_ends(self, town: Town) -> None:
        chain = town.give(town.root(), town.alice, town.bob, offset=1024, length=512)
        bob = town.opened(chain, town.bob)
        assert read(bob, 0, 4)[2] == bytes([0, 1, 2, 3])
        assert read(bob, 508, 4)[2] == bytes([252, 253, 254, 255])
        for offset, count in ((512, 1), (509, 4), (2**64 - 8, 8), (0, 513)):
            assert refusal(read(bob, offset, count)) == "EXTENT"
        town.shelf.write(1024, b"written")
        bob.ask(frames.WRITE, 0, 2, count=3, offset=7, payload=b"abc")
        assert town.shelf.read(1024, 10) == b"writtenabc"
        for offset in (511, 512, 2**64 - 1):
            answer = bob.ask(frames.WRITE, 0, 2, count=2, offset=offset, payload=b"xx")
            assert refusal(answer) == "EXTENT"
        assert town.shelf.read(1536, 4) == bytes([0, 1, 2, 3])
        bob.close()

    def test_large_reads_and_writes_and_many_parts_stay_within_it(self, town: Town) -> None:
        whole = town.lease(town.alice, 1 << 20)
        assert isinstance(whole.storage, Shelf)
        root = town.root(lease_id=whole.lease_id, amount=1 << 20)
        chain = town.give(root, town.alice, town.bob, offset=4096, length=600_000)
        bob = town.opened(chain, town.bob)
        data = bytes(range(250)) * 2400
        bob.ask(frames.WRITE, 0, 2, count=600_000, offset=0, payload=data)
        assert read(bob, 0, 600_000)[2] == data
        assert whole.storage.read(0, 4096) == bytes(4096)
        assert whole.storage.read(604_096, 8) == bytes(8)
        assert refusal(read(bob, 8, 600_000)) == "EXTENT"
        answer = bob.ask(frames.WRITE, 0, 2, count=600_000, offset=1, payload=data)
        assert refusal(answer) == "EXTENT"
        good, bad = frames.PART.pack(0, 8), frames.PART.pack(599_996, 8)
        assert bob.ask(frames.READ_MANY, 0, 3, payload=good)[2] == data[:8]
        assert refusal(bob.ask(frames.READ_MANY, 0, 3, payload=good + bad)) == "EXTENT"
        payload = good + bad + b"A" * 16
        assert refusal(bob.ask(frames.WRITE_MANY, 0, 3, count=2, payload=payload)) == "EXTENT"
        assert whole.storage.read(4096, 8) == data[:8], "not even the part that fits"
        bob.close()

    @pytest.mark.parametrize("ops", [("read",), ("write",)])
    def test_k19_what_it_does_not_allow_is_not_done(self, town: Town, ops: tuple[str, ...]) -> None:
        bob = town.opened(town.give(town.root(), town.alice, town.bob, ops=ops), town.bob)
        part = frames.PART.pack(0, 8)
        reads = [
            (frames.READ, 8, 0, b""),
            (frames.READ_MANY, 0, 0, part),
            (frames.READ, SIZE, 0, b""),
        ]
        writes = [
            (frames.WRITE, 8, 0, b"x" * 8), (frames.WRITE_MANY, 1, 0, part + b"x" * 8),
            (frames.FLUSH, 0, 0, b""), (frames.WRITE, SIZE, 0, b"x" * SIZE),
        ]  # fmt: skip
        words = [(frames.SWAP, 0, 0, bytes(16)), (frames.ADD, 0, 0, bytes(8))]
        before = town.shelf.read(0, SIZE)
        for op, count, offset, payload in (writes if ops == ("read",) else reads) + words:
            answer = bob.ask(op, 0, 2, count=count, offset=offset, payload=payload)
            assert refusal(answer) == "SCOPE", op
        assert town.shelf.read(0, SIZE) == before
        bob.close()

    def test_words_are_the_lease_s_own(self, town: Town) -> None:
        bob = town.opened(town.give(town.root(), town.alice, town.bob, offset=8), town.bob)
        town.shelf.write(0, bytes(32))
        assert bob.ask(frames.ADD, 0, 2, offset=8, payload=frames.WORD.pack(5))[2] == bytes(8)
        swapped = bob.ask(frames.SWAP, 0, 2, offset=8, payload=frames.WORDS.pack(5, 6))
        assert swapped[2] == frames.WORD.pack(5)
        assert town.shelf.read(0, 32) == bytes(16) + frames.WORD.pack(6) + bytes(8)
        assert refusal(bob.ask(frames.ADD, 0, 2, offset=4, payload=bytes(8))) == "EXTENT"
        bob.close()

    def test_a_share_has_no_descriptor(self, town: Town) -> None:
        town.table.open(replace(town.leased, descriptor=True, handed=True))
        chain = town.give(town.root(), town.alice, town.bob)
        shown = town.shares.show(chain.text, key=town.bob.thumbprint, name="")
        assert not shown.descriptor
        assert not shown.handed
        with pytest.raises(FabricError):
            town.table.find(shown.lease_id, town.bob.thumbprint)


class TestShowing:
    def test_k14_it_is_for_one_key(self, town: Town) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        for who in (town.cid, town.alice):
            caller = town.connect(who).hello()
            assert refusal(town.show(caller, chain)) == "HOLDER_MISMATCH"
            caller.close()

    def test_the_lease_itself_is_still_its_holder_s_alone(self, town: Town) -> None:
        bob = town.opened(town.give(town.root(), town.alice, town.bob), town.bob)
        payload = bytes.fromhex(town.leased.lease_id)
        assert refusal(bob.ask(frames.OPEN, 5, 1, offset=EPOCH, payload=payload)) == "NOT_FOUND"
        assert refusal(read(bob, 0, 1, handle=5)) == "INVALID"
        bob.close()

    def test_a_root_that_is_not_proved_lets_nobody_in(self, town: Town) -> None:
        def refuse(token: str) -> None:
            raise failure.of("TOKEN_SIGNATURE")

        town.shares._prove_root = refuse
        bob = town.connect(town.bob).hello()
        chain = town.give(town.root(), town.alice, town.bob)
        for _ in range(2):
            assert refusal(town.show(bob, chain)) == "TOKEN_SIGNATURE"
        bob.close()

    def test_a_root_is_proved_once(self, town: Town) -> None:
        root = town.root()
        for offset in (0, 8, 16):
            town.opened(town.give(root, town.alice, town.bob, offset=offset), town.bob).close()
        assert town.proved_roots == [root.text]

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"lease_id": "ee" * 16}, "NOT_FOUND"), ({"epoch": EPOCH + 1}, "EPOCH_STALE"),
            ({"amount": 2 * SIZE}, "TOKEN_CLAIM"),
            ({"kind": Kind.BLOCK, "amount": 1}, "TOKEN_CLAIM"),
        ],
    )  # fmt: skip
    def test_a_root_that_says_more_than_is_bound_here(
        self, town: Town, changes: dict[str, Any], code: str
    ) -> None:
        chain = town.give(town.root(**changes), town.alice, town.bob)
        bob = town.connect(town.bob).hello()
        assert refusal(town.show(bob, chain)) == code
        bob.close()

    def test_a_root_of_another_holder_s_is_no_way_in(self, town: Town) -> None:
        """Cid has a token, or had one, for alice's lease: it is hers now."""
        root = town.root(holder_thumbprint=town.cid.thumbprint)
        bob = town.connect(town.bob).hello()
        assert refusal(town.show(bob, town.give(root, town.cid, town.bob))) == "NOT_FOUND"
        bob.close()

    def test_a_root_with_more_rights_than_the_lease_gives_none_of_them(self, town: Town) -> None:
        whole = town.lease(town.alice, SIZE, ops=("read",))
        chain = town.give(town.root(lease_id=whole.lease_id), town.alice, town.bob)
        bob = town.opened(chain, town.bob)
        assert read(bob, 0, 1)[0] == frames.DATA
        assert refusal(bob.ask(frames.WRITE, 0, 2, count=1, payload=b"x")) == "SCOPE"
        bob.close()

    def test_noise_is_refused_and_the_connection_goes_on(self, town: Town) -> None:
        bob = town.connect(town.bob).hello()
        good = town.give(town.root(), town.alice, town.bob).text
        for noise in (
            b"", b"~", b"\xff" * 100, good[:-1], good + "~", good + "\xe9", good.replace(".", "~"),
            b"A" * 8193, b"A" * 100_000, good.encode() + bytes(1), "~".join([good] * 4),
        ):  # fmt: skip
            assert refusal(town.show(bob, noise)).startswith("TOKEN_"), noise
        assert town.show(bob, good)[0] == frames.DATA
        assert refusal(town.show(bob, good)) == "INVALID", "the handle is in use"
        bob.close()


class TestEnds:
    def test_k15a_the_parent_s_end_is_told_as_the_parent_s(self, town: Town) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        bob = town.opened(chain, town.bob)
        town_end(town, failure.of("REVOKED", "wanted back"))
        for _ in range(2):
            kind, _, cause = read(bob, 0, 1)
            assert kind == frames.REFUSAL
            assert isinstance(cause, Revoked)
        assert refusal(town.show(bob, chain, handle=3)) == "REVOKED"
        bob.close()

    def test_a_lease_that_ends_between_the_looks_gives_no_byte(self, town: Town) -> None:
        bob = town.opened(town.give(town.root(), town.alice, town.bob), town.bob)
        town.shelf.meanwhile = lambda: town_end(town, failure.of("LEASE_RELEASED"))
        kind, _, cause = read(bob, 0, 1)
        assert (kind, cause.code) == (frames.REFUSAL, "LEASE_RELEASED")
        bob.close()

    @pytest.mark.parametrize("count", [16, 200_000 // 8 * 2])
    def test_one_that_is_ended_between_the_looks_gives_no_byte(
        self, town: Town, count: int
    ) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        bob = town.opened(chain, town.bob)
        entry = town.entry(chain, town.bob.thumbprint)

        def end() -> None:
            town.shelf.meanwhile = lambda: None
            town.shares.end(town.leased.lease_id, EPOCH, entry.share_id, "")

        town.shelf.meanwhile = end
        assert refusal(read(bob, 0, count)) == "REVOKED"
        assert refusal(bob.ask(frames.WRITE, 0, 2, count=1, payload=b"x")) == "REVOKED"
        bob.close()

    def test_its_time_ends_between_the_looks(self, town: Town) -> None:
        end_ms = town.clock.wall_ms() + 30_000
        chain = town.give(town.root(), town.alice, town.bob, end_ms=end_ms)
        bob = town.opened(chain, town.bob)
        assert read(bob, 0, 1)[0] == frames.DATA

        def wait() -> None:
            town.clock.boot_skew_ms = 30_000

        town.shelf.meanwhile = wait
        kind, _, cause = read(bob, 0, 1)
        assert kind == frames.REFUSAL
        assert isinstance(cause, LeaseExpired)
        bob.close()

    def test_a_wall_clock_that_is_set_back_lengthens_nothing(self, town: Town) -> None:
        end_ms = town.clock.wall_ms() + 30_000
        chain = town.give(town.root(), town.alice, town.bob, end_ms=end_ms)
        bob = town.opened(chain, town.bob)
        town.clock.wall_skew_ms, town.clock.boot_skew_ms = -3_600_000, 20_000
        deadline_ns = town.entry(chain, town.bob.thumbprint).deadline_ns
        shown = town.shares.show(chain.text, key=town.bob.thumbprint, name="")
        assert shown.share is not None
        assert shown.share.deadline_ns == deadline_ns
        town.clock.wall_skew_ms, town.clock.boot_skew_ms = 0, 30_000
        assert refusal(read(bob, 0, 1)) == "LEASE_EXPIRED"
        bob.close()

    def test_whoever_takes_the_lease_over_takes_it_over_without_its_shares(
        self, town: Town
    ) -> None:
        bob = town.opened(town.give(town.root(), town.alice, town.bob), town.bob)
        town.table.open(taken_by(town.leased, town.alice.thumbprint))
        assert read(bob, 0, 1)[0] == frames.DATA, "the same holder has attached again"
        town.table.open(taken_by(town.leased, town.cid.thumbprint))
        assert refusal(read(bob, 0, 1)) == "NOT_FOUND"
        bob.close()


class TestEnding:
    def test_ending_waits_for_what_is_in_flight_and_nothing_moves_after_it(
        self, town: Town
    ) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        bob, entry = town.opened(chain, town.bob), town.entry(chain, town.bob.thumbprint)
        in_write, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            in_write.set()
            go_on.wait(5)

        town.shelf.meanwhile = hold
        bob.send(frames.request(frames.WRITE, 0, 2, count=1, payload=b"x"))
        assert in_write.wait(5)
        assert entry.in_flight == 1
        for _ in range(2):  # asked again, it is still there
            with pytest.raises(FabricError) as refused:
                town.strike(town.alice, entry.share_id)
            assert refused.value.code == "RETRY_LATER"
        go_on.set()
        assert refusal(bob.hear()) == "REVOKED"
        assert town.strike(town.alice, entry.share_id).ended == 1
        assert entry.in_flight == 0
        assert town.remembered[0] == (town.leased.lease_id, EPOCH, entry.share_id, "")
        bob.close()

    def test_the_lease_s_own_operations_do_not_hold_it_up(self, town: Town) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        town.opened(chain, town.bob).close()
        entry = town.entry(chain, town.bob.thumbprint)
        town.data.enter(town.leased)
        assert town.strike(town.alice, entry.share_id).ended == 1
        town.data.leave(town.leased)

    def test_a_share_s_operation_holds_up_the_teardown_of_its_lease(self, town: Town) -> None:
        chain = town.give(town.root(), town.alice, town.bob)
        shown = town.shares.show(chain.text, key=town.bob.thumbprint, name="")
        town.data.enter(shown)
        assert town.data.wait_quiet(town.leased.slot) == 1
        town.data.leave(shown)
        assert town.data.wait_quiet(town.leased.slot) == 0

    def test_who_has_no_say_ends_nothing(self, town: Town) -> None:
        root = town.root()
        to_bob, to_cid = (town.give(root, town.alice, who) for who in (town.bob, town.cid))
        bob, cid = town.opened(to_bob, town.bob), town.opened(to_cid, town.cid)
        of_cid = to_cid.lineage[-1]
        with pytest.raises(FabricError) as refused:
            town.strike(town.bob, of_cid)  # as if the lease were his
        assert refused.value.code == "NOT_FOUND"
        with pytest.raises(FabricError) as refused:
            town.strike(town.bob, of_cid, by=to_cid.digest)  # as if the share were his
        assert refused.value.code == "NOT_FOUND"
        assert town.strike(town.bob, of_cid, by=to_bob.digest).ended == 0
        assert read(cid, 0, 1)[0] == frames.DATA
        assert town.strike(town.bob, to_bob.lineage[-1], by=to_bob.digest).ended == 1
        with pytest.raises(FabricError) as refused:
            town.strike(town.bob, of_cid, by=to_bob.digest)
        assert refused.value.code == "REVOKED", "who is out has no say any more"
        for each in (bob, cid):
            each.close()

    def test_the_tree_is_for_who_gave_it(self, town: Town) -> None:
        root = town.root()
        to_bob = town.give(root, town.alice, town.bob, length=64)
        to_cid = town.give(to_bob, town.bob, town.cid, ops=("read",))
        town.opened(to_bob, town.bob).close()
        town.opened(to_cid, town.cid).close()

        def tree(who: Credentials, by: str = "") -> list[tuple[str, int, str]]:
            request = node_pb2.ListSharesRequest(lease_id=town.leased.lease_id, epoch=EPOCH, by=by)
            views = town.desk.tree(peer(who), request).shares
            return [(each.share_id, each.depth, each.state) for each in views]

        first, second = to_cid.lineage
        assert tree(town.alice) == [(first, 1, "open"), (second, 2, "open")]
        assert tree(town.bob, to_bob.digest) == [(second, 2, "open")]
        assert tree(town.cid, to_cid.digest) == []
        with pytest.raises(FabricError):
            tree(town.bob)

    @pytest.mark.parametrize("share_id", ["", "x", "A" * 32, "0" * 33])
    def test_an_id_that_is_none_is_refused(self, town: Town, share_id: str) -> None:
        with pytest.raises(FabricError) as refused:
            town.strike(town.alice, share_id)
        assert refused.value.code == "IDENTIFIER"


def town_end(town: Town, cause: FabricError) -> None:
    """As control does; and the book forgets."""
    town.end(town.leased, cause)
    town.shares.forget(town.leased.lease_id)


def taken_by(lease: OpenLease, key: str) -> OpenLease:
    return replace(lease, holder_key=key, generation=lease.generation + 1)
