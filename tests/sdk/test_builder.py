"""What may be asked for, how it travels to admission, and what is refused by name."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest

from grafos import (
    BlockBuilder,
    Denied,
    FabricError,
    Incompatible,
    MemBuilder,
    RateLimited,
    _defaults,
)
from grafos._builder import LATER
from grafos._connection import Fabric, default_fabric
from grafos_core import failure
from grafos_proto.v1 import lease_pb2
from tests.sdk.world import World


def asked(world: World) -> Any:
    return world.admission.requests("Acquire")[-1]


def test_every_option_reaches_admission(world: World, fabric: Fabric) -> None:
    builder = MemBuilder().fabric(fabric).min_bytes(5000).lease_secs(7).wait(1.5).keep()
    with builder.where(node="n1", zone="a").where(label={"rack": "r2"}).acquire():
        request = asked(world)
    assert (request.kind, request.amount, request.ttl_ms) == (lease_pb2.KIND_MEM, 5000, 7000)
    assert (request.has_wait, request.wait_ms) == (True, 1500)
    assert dict(request.where) == {"node": "n1", "zone": "a", "rack": "r2"}
    assert request.policy.on_holder_exit == "keep"


def test_what_is_not_said_is_left_to_the_fabric(world: World, fabric: Fabric) -> None:
    with BlockBuilder().fabric(fabric).min_blocks(3).acquire():
        request = asked(world)
    assert (request.kind, request.amount, request.ttl_ms) == (lease_pb2.KIND_BLOCK, 3, 0)
    assert not request.has_wait
    assert not request.where
    assert not request.policy.on_holder_exit


def test_a_ttl_is_seconds_or_a_timedelta(world: World, fabric: Fabric) -> None:
    builder = MemBuilder().fabric(fabric).min_bytes(1)
    for ttl in (2, 2.0, timedelta(seconds=2)):
        with builder.ttl(ttl).acquire():
            assert asked(world).ttl_ms == 2000


def test_a_builder_is_never_changed_by_its_options() -> None:
    plain = MemBuilder().min_bytes(1)
    longer = plain.lease_secs(9)
    assert longer is not plain
    assert plain._request.ttl_ms == 0
    assert longer._request.ttl_ms == 9000


def test_new_is_another_way_to_begin() -> None:
    assert MemBuilder.new().min_bytes(1)._request == MemBuilder().min_bytes(1)._request


@pytest.mark.parametrize("name", sorted(LATER))
def test_an_option_of_a_later_version_is_refused_by_name(name: str) -> None:
    with pytest.raises(Incompatible, match=name) as refused:
        getattr(MemBuilder().min_bytes(1), name)(1)
    assert refused.value.code == "OPTION"


def test_an_option_that_nobody_knows_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no option 'min_byte'"):
        MemBuilder().min_byte(1)
    with pytest.raises(AttributeError):
        MemBuilder().min_blocks(1)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: MemBuilder().min_bytes(0),
        lambda: MemBuilder().min_bytes(-1),
        lambda: MemBuilder().min_bytes(2**63),
        lambda: MemBuilder().min_bytes(True),
        lambda: MemBuilder().min_bytes(1.5),  # type: ignore[arg-type]
        lambda: MemBuilder().min_bytes("1"),  # type: ignore[arg-type]
        lambda: MemBuilder().lease_secs(0.5),
        lambda: MemBuilder().lease_secs(86_401),
        lambda: MemBuilder().lease_secs(-1),
        lambda: MemBuilder().lease_secs(float("nan")),
        lambda: MemBuilder().lease_secs(float("inf")),
        lambda: MemBuilder().ttl("60"),  # type: ignore[arg-type]
        lambda: MemBuilder().wait(601),
        lambda: MemBuilder().wait(-1),
        lambda: MemBuilder().where(node=""),
        lambda: MemBuilder().where(zone=3),  # type: ignore[arg-type]
        lambda: MemBuilder().where(label={f"l{i}": "x" for i in range(17)}),
        lambda: MemBuilder().attach("not-an-id"),
    ],
)
def test_nonsense_is_refused_where_it_is_said(ask: Any, world: World) -> None:
    with default_of(world.fabric()):
        with pytest.raises(Incompatible):
            ask()
    assert not world.admission.requests("Acquire")


def test_a_builder_without_its_amount_is_refused(fabric: Fabric) -> None:
    with pytest.raises(Incompatible, match="min_bytes"):
        MemBuilder().fabric(fabric).acquire()


def test_a_refusal_of_admission_arrives_as_it_was_raised(world: World, fabric: Fabric) -> None:
    def refuse(method: str) -> None:
        if method == "Acquire":
            raise failure.of("QUOTA", "4096 of 4096 bytes in use", retry_after_ms=250)

    world.admission.before = refuse
    with pytest.raises(RateLimited) as refused:
        MemBuilder().fabric(fabric).min_bytes(1).acquire()
    assert refused.value.code == "QUOTA"
    assert refused.value.retry_after_ms == 250
    assert len(world.admission.requests("Acquire")) == 1, "a quota is not asked again"


def test_a_service_that_is_briefly_away_is_asked_again_under_the_same_id(
    world: World, fabric: Fabric
) -> None:
    left = [failure.of("RETRY_LATER"), failure.of("STREAMS")]

    def refuse(method: str) -> None:
        if method == "Acquire" and left:
            raise left.pop()

    world.admission.before = refuse
    with MemBuilder().fabric(fabric).min_bytes(1).acquire():
        pass
    ids = [request.request_id for request in world.admission.requests("Acquire")]
    assert len(ids) == 3
    assert len(set(ids)) == 1


@pytest.mark.parametrize("step", ["bind", "hand_over"])
def test_a_grant_that_cannot_be_bound_is_given_back_at_once(
    world: World, fabric: Fabric, step: str
) -> None:
    def refuse(op: str) -> None:
        if op == step:
            raise failure.of("SLOT_BUSY")

    world.control.before = refuse
    with pytest.raises(FabricError, match="not torn down yet"):
        MemBuilder().fabric(fabric).min_bytes(1).acquire()
    (request,) = world.admission.requests("Release")
    assert request.lease_id in world.book.grants


def test_an_interruption_while_binding_gives_the_grant_back(world: World, fabric: Fabric) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    grip: dict[str, Any] = {}
    take_up = fabric._node("n1", world.admission.endpoint)
    grip["take_up"], take_up.take_up = take_up.take_up, interrupt  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        MemBuilder().fabric(fabric).min_bytes(1).acquire()
    assert len(world.admission.requests("Release")) == 1


def test_builders_ask_the_innermost_block(world: World) -> None:
    outer, inner = world.fabric("alice"), world.fabric("bob")
    with outer:
        with inner:
            assert default_fabric() is inner
            seen = []
            thread = threading.Thread(target=lambda: seen.append(default_fabric()))
            thread.start()
            thread.join()
            assert seen == [inner], "a thread without a block of its own asks the innermost"
        assert inner.closed
        assert default_fabric() is outer
        with MemBuilder().min_bytes(1).acquire() as lease:
            assert lease._fabric is outer


def test_a_thread_in_a_block_of_its_own_asks_that_one(world: World) -> None:
    mine, other = world.fabric("alice"), world.fabric("bob")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with other:
            entered.set()
            leave.wait(10)

    with mine:
        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait(10)
        assert default_fabric() is mine
        leave.set()
        thread.join()


def test_connect_checks_tenant_and_identity(world: World) -> None:
    from grafos import connect

    folder = world.identity_folder()
    with connect(world.endpoint, identity=folder, tenant="acme") as fabric:
        assert fabric.tenant == "acme"
        assert fabric.identity == "spiffe://test.local/tenant/acme/holder/alice"
    with pytest.raises(Denied, match="acme"):
        connect(world.endpoint, identity=folder, tenant="other")


def test_connect_takes_endpoint_and_identity_from_the_environment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from grafos import connect

    monkeypatch.setenv("GRAFOS_ENDPOINT", world.endpoint)
    monkeypatch.setenv("GRAFOS_IDENTITY_DIR", str(world.identity_folder()))
    with connect():
        with MemBuilder().min_bytes(1).acquire() as lease:
            assert lease.valid


def test_connect_says_soon_that_nobody_answers(world: World) -> None:
    from grafos import Disconnected, connect

    world.stop_admission()
    with pytest.raises(Disconnected):
        connect(world.endpoint, identity=world.identity_folder(), timeout=0.5)


class default_of:
    """A block in which `fabric` is the default, without closing it."""

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric

    def __enter__(self) -> Fabric:
        return self._fabric.__enter__()

    def __exit__(self, *_: object) -> None:
        _defaults.leave(self._fabric)
