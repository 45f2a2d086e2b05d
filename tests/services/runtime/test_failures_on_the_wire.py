"""Every failure is the same on both sides of a real connection."""

from __future__ import annotations

import gc
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import node_pb2
from grafos_proto.wire import failures
from tests.services.runtime.world import World

REQUEST = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)


def raising(error: BaseException) -> Any:
    def behaviour(request: Any, context: grpc.ServicerContext) -> None:
        raise error

    return behaviour


def test_every_code_survives_the_wire_identically(world: World) -> None:
    stub = world.stub()
    for code in failure.CODES:
        sent = failure.of(
            code, "what exactly: ü", lease_id="b" * 32, epoch=2**64 - 2, retry_after_ms=250,
            cause="operator", incident_id="1f", details={"limit": "4096"},
        )  # fmt: skip
        world.node.behaviour = raising(sent)
        with pytest.raises(FabricError) as caught, failures.status_to_failures():
            stub.Read(REQUEST, timeout=5)
        assert caught.value == sent
        assert type(caught.value) is failure.CODES[code].kind


def test_an_absent_retry_delay_is_not_a_delay_of_zero(world: World) -> None:
    for delay_ms in (None, 0):
        world.node.behaviour = raising(failure.of("RATE", retry_after_ms=delay_ms))
        with pytest.raises(failure.RateLimited) as caught, failures.status_to_failures():
            world.stub().Read(REQUEST, timeout=5)
        assert caught.value.retry_after_ms == delay_ms


def test_a_client_that_is_not_ours_reads_status_reason_and_code(world: World) -> None:
    world.node.behaviour = raising(failure.of("EPOCH_BURNT", "inside", lease_id="b" * 32, epoch=3))
    with pytest.raises(grpc.RpcError) as caught:
        world.stub().Read(REQUEST, timeout=5)
    call: Any = caught.value
    assert call.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert call.details() == failure.CODES["EPOCH_BURNT"].message
    rich = rpc_status.from_call(call)
    assert [each.TypeName() for each in rich.details] == ["google.rpc.ErrorInfo"]
    info = error_details_pb2.ErrorInfo()
    rich.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("grafos", "Fenced")
    assert dict(info.metadata) == {"code": "EPOCH_BURNT", "lease_id": "b" * 32, "epoch": "3"}


def test_a_failure_in_the_middle_of_a_stream_comes_after_what_was_sent(world: World) -> None:
    def fails_at_the_third(request: Any, context: grpc.ServicerContext) -> None:
        if len(world.node.calls) == 3:
            raise failure.of("LEASE_EXPIRED", lease_id="b" * 32)

    world.node.behaviour = fails_at_the_third
    received: list[bytes] = []
    with pytest.raises(failure.LeaseExpired) as caught:
        received.extend(
            each.data
            for each in failures.each_to_failures(world.stub().ReadStream(REQUEST, timeout=5))
        )
    assert received == [b"read", b"read"]
    assert caught.value.lease_id == "b" * 32


def test_a_text_of_any_length_and_kind_fits_in_a_trailer(world: World) -> None:
    loud = failure.of("INVALID", "\ud800" + "x" * 100_000, details={"y" * 9_999: "z" * 9_999})
    world.node.behaviour = raising(loud)
    with pytest.raises(failure.Incompatible) as caught, failures.status_to_failures():
        world.stub().Read(REQUEST, timeout=5)
    assert caught.value.code == "INVALID"
    assert caught.value.detail == "?" + "x" * 511


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, "UNREACHABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE"),
        (grpc.StatusCode.UNAUTHENTICATED, "IDENTITY"),
        (grpc.StatusCode.PERMISSION_DENIED, "DENIED"),
        (grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAMS"),
        (grpc.StatusCode.UNKNOWN, "INTERNAL"),
    ],
)
def test_a_status_without_a_failure_is_read_by_the_table(
    world: World, status: grpc.StatusCode, code: str
) -> None:
    world.node.behaviour = lambda request, context: context.abort(status, "from elsewhere")
    with pytest.raises(FabricError) as caught, failures.status_to_failures():
        world.stub().Read(REQUEST, timeout=5)
    assert caught.value.code == code
    assert type(caught.value) is failure.CODES[code].kind


def test_a_trailer_that_is_no_failure_is_passed_over(world: World) -> None:
    def lies(request: Any, context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(((failures.FAILURE_TRAILER, b"\xff\xff"),))
        context.abort(grpc.StatusCode.NOT_FOUND, "")

    world.node.behaviour = lies
    with pytest.raises(failure.Denied) as caught, failures.status_to_failures():
        world.stub().Read(REQUEST, timeout=5)
    assert caught.value.code == "NOT_FOUND"


def test_a_failed_call_leaves_no_stream_open_even_while_the_collector_is_off(world: World) -> None:
    """A failure that its own frames refer to would keep its call, and with it a stream, alive."""

    def keeps_what_it_raises(request: Any, context: grpc.ServicerContext) -> None:
        kept = failure.of("LEASE_EXPIRED")
        raise kept

    world.node.behaviour = keeps_what_it_raises
    stub = world.stub()
    gc.disable()
    try:
        for _ in range(40):  # more than a connection may have streams
            with pytest.raises(failure.LeaseExpired), failures.status_to_failures():
                stub.Read(REQUEST, timeout=5)
    finally:
        gc.enable()
