"""Carries a typed failure across gRPC and makes the same failure again on the other side.

The status code is for machines in between; the failure itself travels in two trailers: whole in
`grafos-failure-bin`, and as google.rpc.ErrorInfo and RetryInfo in `grpc-status-details-bin` for
clients that are not ours. What outsiders read as message is one fixed sentence per code.

Rules, on the client's side: the failure trailer rules; else the ErrorInfo of our domain; else the
status alone, by `_BY_STATUS`. RESOURCE_EXHAUSTED that carries neither comes from the gRPC library:
a message or metadata over its limit, or more calls at a time than there is room for.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import lease_pb2

FAILURE_TRAILER: Final = "grafos-failure-bin"
DETAILS_TRAILER: Final = "grpc-status-details-bin"
DOMAIN: Final = "grafos"
TEXT_CHARS_MAX: Final = 512
"""Of each text in a trailer: all of them together stay below the 8 KiB that metadata may have."""
DETAILS_MAX: Final = 8
RETRY_AFTER_MS_DEFAULT: Final = 1_000
"""For a failure that may be retried and does not say when."""

Trailers = tuple[tuple[str, bytes], ...]
_T = TypeVar("_T")


class Aborting(Protocol):
    """The part of grpc.ServicerContext that ends a call with a failure."""

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...

    def abort(self, code: grpc.StatusCode, details: str) -> Any: ...


_BY_STATUS: Final[dict[grpc.StatusCode, str]] = {
    grpc.StatusCode.UNAVAILABLE: "UNREACHABLE",
    grpc.StatusCode.CANCELLED: "UNREACHABLE",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE",
    grpc.StatusCode.UNAUTHENTICATED: "IDENTITY",
    grpc.StatusCode.PERMISSION_DENIED: "DENIED",
    grpc.StatusCode.NOT_FOUND: "NOT_FOUND",
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID",
    grpc.StatusCode.FAILED_PRECONDITION: "VERSION",
    grpc.StatusCode.OUT_OF_RANGE: "RANGE",
    grpc.StatusCode.ALREADY_EXISTS: "PRECONDITION",
    grpc.StatusCode.ABORTED: "PRECONDITION",
    grpc.StatusCode.UNIMPLEMENTED: "VERSION",
    grpc.StatusCode.DATA_LOSS: "STORAGE",
}
"""Statuses that came without a failure of ours; all others are INTERNAL."""


def detail_of(error: FabricError) -> lease_pb2.FailureDetail:
    """The failure as a message; texts are cut, so that it always fits in a trailer."""
    message = lease_pb2.FailureDetail(
        failure=type(error).__name__,
        code=error.code,
        detail=_cut(error.detail),
        lease_id=_cut(error.lease_id),
        epoch=error.epoch,
        retry_after_ms=error.retry_after_ms or 0,
        has_retry_after=error.retry_after_ms is not None,
        cause=_cut(error.cause),
        incident_id=_cut(error.incident_id),
        message=_sentence(error),
    )
    for name, value in list(error.details.items())[:DETAILS_MAX]:
        message.details[_cut(name)] = _cut(value)
    return message


def failure_of(detail: lease_pb2.FailureDetail) -> FabricError:
    """The failure that `detail_of` wrote down."""
    fields: dict[str, Any] = {
        "code": detail.code,
        "detail": detail.detail,
        "lease_id": detail.lease_id,
        "epoch": detail.epoch,
        "retry_after_ms": detail.retry_after_ms if detail.has_retry_after else None,
        "cause": detail.cause,
        "incident_id": detail.incident_id,
        "details": dict(detail.details),
    }
    return failure.from_fields(detail.failure, fields)


def to_trailers(error: FabricError) -> tuple[grpc.StatusCode, str, Trailers]:
    """(status, message, trailing metadata) under which `error` goes out."""
    status = grpc.StatusCode[error.status]
    rich = status_pb2.Status(code=code_pb2.Code.Value(error.status), message=_sentence(error))
    metadata = {"code": error.code}
    if error.lease_id:
        metadata |= {"lease_id": _cut(error.lease_id), "epoch": str(error.epoch)}
    info = error_details_pb2.ErrorInfo(reason=error.failure.value, domain=DOMAIN, metadata=metadata)
    rich.details.add().Pack(info)
    retry_after_ms = _retry_after_ms(error)
    if retry_after_ms is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(retry_after_ms)
        rich.details.add().Pack(retry)
    trailers = (
        (FAILURE_TRAILER, detail_of(error).SerializeToString()),
        (DETAILS_TRAILER, rich.SerializeToString()),
    )
    return status, rich.message, trailers


def abort(context: Aborting, error: FabricError) -> Any:
    """End the call with `error`. Never returns: gRPC raises its own exception to leave."""
    status, message, trailers = to_trailers(error)
    context.set_trailing_metadata(trailers)
    return context.abort(status, message)


@contextmanager
def failures_to_status(context: Aborting) -> Generator[None, None, None]:
    """The server's side: a failure raised inside ends the call as that failure."""
    try:
        yield
    except FabricError as error:
        abort(context, error)


@contextmanager
def status_to_failures() -> Generator[None, None, None]:
    """The client's side: what gRPC raises inside leaves as the failure that the server raised."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def each_to_failures(responses: Iterable[_T]) -> Iterator[_T]:
    """`status_to_failures` for the answers of a streaming call."""
    with status_to_failures():
        yield from responses


def from_rpc_error(error: grpc.RpcError) -> FabricError:
    """The failure behind what gRPC raised."""
    call: Any = error
    if not isinstance(call, grpc.Call):
        return failure.of("INTERNAL", "a call ended without a status")
    trailers = _trailers(call)
    carried = _from_failure_trailer(trailers.get(FAILURE_TRAILER))
    if carried is None:
        carried = _from_error_info(trailers.get(DETAILS_TRAILER))
    return carried or from_status(call.code(), call.details() or "")


def retry_after_ms(error: FabricError) -> int | None:
    """When the caller may try again; None: never by itself."""
    return _retry_after_ms(error) if error.retryable else None


def _trailers(call: grpc.Call) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, value in call.trailing_metadata() or ():
        found[name] = value if isinstance(value, bytes) else value.encode()
    return found


def _from_failure_trailer(data: bytes | None) -> FabricError | None:
    if data is None:
        return None
    try:
        detail = lease_pb2.FailureDetail.FromString(data)
    except DecodeError:
        return None
    return failure_of(detail) if detail.code else None


def _from_error_info(data: bytes | None) -> FabricError | None:
    if data is None:
        return None
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError:
        return None
    code, fields = "", dict[str, Any]()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for each in status.details:
        if each.Unpack(info) and info.domain == DOMAIN:
            code = info.metadata.get("code", "")
            fields["lease_id"] = info.metadata.get("lease_id", "")
        elif each.Unpack(retry):
            fields["retry_after_ms"] = retry.retry_delay.ToMilliseconds()
    return failure.of(code, **fields) if code in failure.CODES else None


def from_status(status: grpc.StatusCode, details: str) -> FabricError:
    """The failure for a status that came without one of ours."""
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        too_large = "larger than" in details or "metadata" in details.lower()
        return failure.of("MESSAGE_SIZE" if too_large else "STREAMS")
    return failure.of(_BY_STATUS.get(status, "INTERNAL"), status.name.lower().replace("_", " "))


def _retry_after_ms(error: FabricError) -> int | None:
    if error.retry_after_ms is not None:
        return error.retry_after_ms
    if error.failure is failure.Failure.RateLimited or error.status == "UNAVAILABLE":
        return RETRY_AFTER_MS_DEFAULT
    return None


def _sentence(error: FabricError) -> str:
    known = failure.CODES.get(error.code)
    return known.message if known else "refused"


def _cut(text: str) -> str:
    """Protobuf takes no lone surrogates; a trailer takes no long text."""
    return text[:TEXT_CHARS_MAX].encode("utf-8", "replace").decode("utf-8")
