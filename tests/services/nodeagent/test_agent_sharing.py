"""Shares at a whole node agent: roots that control proves, and fronts that come and go."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grafos_core import share, token
from grafos_core.failure import FabricError
from grafos_core.lease import Kind
from grafos_core.share import Chain, Recipient
from grafos_proto.v1 import node_pb2
from grafos_proto.wire import es256, failures
from tests.services.nodeagent.agents import AgentUnderTest, agent_in, tried
from tests.services.nodeagent.fabric import (
    ADMISSION,
    HolderSide,
    Signer,
    eventually,
    fabric_in,
    now_ms,
)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentUnderTest]:
    folder: Path = tmp_path_factory.mktemp("a")
    with fabric_in(folder) as fabric, agent_in(fabric, folder) as made:
        made.start()
        yield made
        assert made.stop() == 0


@pytest.fixture
def alice(agent: AgentUnderTest) -> HolderSide:
    return agent.holder()


@pytest.fixture
def bob(agent: AgentUnderTest) -> HolderSide:
    return agent.holder(agent.fabric.people.holder("bob"))


def bound(agent: AgentUnderTest, who: HolderSide, **changes: Any) -> Chain:
    """A lease, and the chain that its shares begin with."""
    slip = agent.fabric.token(who.credentials, **changes)
    text = agent.fabric.sign(slip)
    who.bind(text)
    return Chain(text, slip, ())


def give(chain: Chain, by: HolderSide, to: HolderSide, **changes: Any) -> Chain:
    scope = replace(chain.scope, to=Recipient(key=to.credentials.thumbprint), **changes)
    made = share.narrowed(chain, share_id=secrets.token_hex(16), scope=scope)
    return share.mint(chain, made, es256.signer(by.credentials.key))


def show(who: HolderSide, chain: Chain | str) -> node_pb2.OpenShareResponse:
    text = chain if isinstance(chain, str) else chain.text
    answer: node_pb2.OpenShareResponse = who.call(
        "OpenShare", node_pb2.OpenShareRequest(chain=text)
    )
    return answer


def read(who: HolderSide, chain: Chain, offset: int = 0, length: int = 8) -> bytes:
    request = node_pb2.ReadRequest(
        lease_id=chain.root.lease_id, epoch=chain.root.epoch, offset=offset, length=length,
        share=chain.digest,
    )  # fmt: skip
    return bytes(who.call("Read", request).data)


def write(who: HolderSide, chain: Chain, offset: int, data: bytes) -> None:
    request = node_pb2.WriteRequest(
        lease_id=chain.root.lease_id, epoch=chain.root.epoch, offset=offset, data=data,
        length=len(data), share=chain.digest,
    )  # fmt: skip
    who.call("Write", request)


def end(who: HolderSide, chain: Chain, by: str = "") -> None:
    request = node_pb2.EndShareRequest(
        lease_id=chain.root.lease_id, epoch=chain.root.epoch, share_id=chain.lineage[-1], by=by
    )
    who.call("EndShare", request)


def code_of(act: Callable[[], Any]) -> str:
    with pytest.raises(FabricError) as refused:
        act()
    return refused.value.code


def test_a_share_is_served_by_calls_within_its_range_and_rights(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice)
    alice.write(root.root, 0, b"0123456789abcdef" * 4)
    chain = give(root, alice, bob, offset=16, length=32, ops=("read",))
    assert code_of(lambda: read(bob, chain)) == "NOT_FOUND", "it was not shown yet"
    shown = show(bob, chain)
    assert (shown.share, shown.size_bytes, list(shown.ops)) == (chain.digest, 32, ["read"])
    assert 0 < shown.remaining_ms <= 60_000
    assert read(bob, chain, 8, 24) == b"89abcdef0123456789abcdef"
    assert code_of(lambda: read(bob, chain, 8, 25)) == "EXTENT"
    assert code_of(lambda: write(bob, chain, 0, b"x")) == "SCOPE"
    stranger = agent.holder(agent.fabric.people.holder("cid"))
    assert code_of(lambda: read(stranger, chain)) == "NOT_FOUND"
    assert code_of(lambda: show(stranger, chain)) == "HOLDER_MISMATCH"
    request = node_pb2.ReadRequest(
        lease_id=shown.lease_id, epoch=shown.epoch, offset=30, length=3, share=shown.share
    )
    assert code_of(lambda: list_of(bob, request)) == "EXTENT"
    request.offset, request.length = 0, 32
    assert b"".join(each.data for each in list_of(bob, request)) == b"0123456789abcdef" * 2
    alice.release(root.root)
    assert code_of(lambda: show(bob, chain)) == "LEASE_RELEASED"


def list_of(who: HolderSide, request: node_pb2.ReadRequest) -> list[node_pb2.ReadResponse]:
    with failures.status_to_failures():
        return list(who.stub.ReadStream(request, timeout=5))


def test_one_stream_writes_to_one_share(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice)
    chain = give(root, alice, bob, offset=64, length=64)
    show(bob, chain)

    def message(at: int, data: bytes, named: str) -> node_pb2.WriteRequest:
        return node_pb2.WriteRequest(
            lease_id=root.root.lease_id, epoch=root.root.epoch, offset=at, data=data,
            length=len(data), share=named,
        )  # fmt: skip

    def send(*named: str) -> Any:
        parts = [message(4 * at, b"abcd", name) for at, name in enumerate(named)]
        parts.append(message(4 * len(named), b"", named[0]))
        with failures.status_to_failures():
            return bob.stub.WriteStream(iter(parts), timeout=5)

    assert send(chain.digest, chain.digest).written == 8
    assert alice.read(root.root, 60, 16).data == bytes(4) + b"abcd" * 2 + bytes(4)
    assert code_of(lambda: send(chain.digest, "")) == "INVALID"
    alice.release(root.root)


def test_a_token_that_may_bind_no_more_is_still_the_root_of_its_lease(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice, exp_ms=now_ms() + 1_000)
    chain = give(root, alice, bob)
    threading.Event().wait(1.1)
    assert show(bob, chain).size_bytes == 65_536
    alice.release(root.root)


def test_a_root_that_is_not_admission_s_is_refused(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice)
    signed = root.text.split(".")
    wider = replace(root.root, amount=2 * root.root.amount)
    forged = Chain(".".join([*agent.fabric.sign(wider).split(".")[:2], signed[2]]), wider, ())
    assert code_of(lambda: show(bob, give(forged, alice, bob))) == "TOKEN_SIGNATURE"
    stranger = Signer("lease", str(ADMISSION))
    strange = Chain(agent.fabric.sign(root.root, by=stranger), root.root, ())
    chain = give(strange, alice, bob)
    seen = eventually(lambda: (c := code_of(lambda: show(bob, chain))) != "RETRY_LATER" and c)
    assert seen == "TOKEN_KEY_UNKNOWN"
    alice.release(root.root)


@pytest.mark.parametrize("audience", ["n2", "n1"])
def test_k15a_a_share_of_another_node_s_lease_is_of_no_use_here(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide, audience: str
) -> None:
    """Nor one of this node as it was before it was wiped."""
    root = bound(agent, alice)
    there = replace(root.root, audience=token.audience_of(audience, "cd" * 16))
    chain = give(Chain(agent.fabric.sign(there), there, ()), alice, bob)
    assert code_of(lambda: show(bob, chain)) == "TOKEN_AUDIENCE"
    alice.release(root.root)


def test_a_front_that_is_killed_forgets_no_end(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice)
    going, gone, unseen = (give(root, alice, bob, length=8 * n) for n in (1, 2, 3))
    for each in (going, gone):
        show(bob, each)
    write(bob, going, 0, b"8 bytes!")
    end(alice, gone)
    end(alice, unseen)
    front = agent.child("front")
    os.kill(front, signal.SIGKILL)
    eventually(lambda: agent.child("front") not in (0, front))
    eventually(lambda: tried(lambda: alice.read(root.root)))
    assert code_of(lambda: read(bob, going)) == "NOT_FOUND"
    show(bob, going)
    assert read(bob, going) == b"8 bytes!"
    for each in (gone, unseen):
        assert code_of(lambda: show(bob, each)) == "REVOKED"  # noqa: B023
    alice.release(root.root)


def test_a_renewal_lengthens_no_share_and_ends_none(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice, lease_end_ms=now_ms() + 10_000)
    chain = give(root, alice, bob, end_ms=now_ms() + 1_500)
    show(bob, chain)
    later = replace(root.root, generation=2, lease_end_ms=now_ms() + 90_000, jti="0b" * 16)
    alice.extend(agent.fabric.sign(later))
    assert len(read(bob, chain)) == 8
    threading.Event().wait(1.6)
    assert code_of(lambda: read(bob, chain)) == "LEASE_EXPIRED"
    longer = Chain(agent.fabric.sign(later), later, ())
    assert show(bob, give(longer, alice, bob)).remaining_ms > 20_000
    alice.release(root.root)


def test_blocks_are_shared_by_calls(
    agent: AgentUnderTest, alice: HolderSide, bob: HolderSide
) -> None:
    root = bound(agent, alice, kind=Kind.BLOCK, amount=4)
    alice.write(root.root, 4096, b"B" * 4096)
    chain = give(root, alice, bob, offset=4096, length=4096)
    show(bob, chain)
    assert read(bob, chain, 0, 4096) == b"B" * 4096
    write(bob, chain, 0, b"C" * 4096)
    assert alice.read(root.root, 0, 12_288).data == bytes(4096) + b"C" * 4096 + bytes(4096)
    for offset, length in ((4096, 4096), (0, 8192), (8, 8)):
        assert code_of(lambda: read(bob, chain, offset, length)) == "EXTENT"  # noqa: B023
    alice.release(root.root)


@pytest.mark.parametrize("text", ["~", "a.b.c~d.e.f", "A" * 8193])
def test_k6_what_is_no_chain_is_refused(bob: HolderSide, text: str) -> None:
    assert code_of(lambda: show(bob, text)).startswith("TOKEN_")


def test_an_empty_question_is_refused(bob: HolderSide) -> None:
    assert code_of(lambda: show(bob, "")) in ("EMPTY", "MISSING_FIELD")
