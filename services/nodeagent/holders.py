"""What a holder may ask of a node: the node agent's NodeService, one method per question.

Rules. What binds, extends or ends a lease is control's to decide and is passed on with the caller's
name and key, as his certificate gives them; the bytes move here. The caller's words are checked
before anything is done with them, and nothing that he sent is repeated in a refusal.
"""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc

from grafos_core import failure, spiffe
from grafos_core.lease import EPOCH_MAX, check_lease_id, check_request_id
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire import failures
from services.nodeagent.datapath import (
    CHUNK_BYTES_MAX,
    WRITE_STREAM_BYTES_MAX,
    WRITE_STREAMS_BYTES_MAX,
    DataPath,
    check_payload,
)
from services.nodeagent.handover import SECRET_MS, Offer, Offers
from services.nodeagent.sessions import News, Sessions, session_key
from services.nodeagent.sharedesk import ShareDesk
from services.runtime import calls
from services.runtime.calls import Peer

TOKEN_CHARS_MAX: Final = 8_192
NEWS_MAX: Final = 256
"""Notices that wait for one slow stream; more are dropped."""
KEEP_ALIVE_S: Final = 1.0
CREDIT_WAIT_MS_DEFAULT, CREDIT_WAIT_MS_MAX = 1_000, 10_000
ANSWER_MS_MAX: Final = 15_000
"""How long control may take: a teardown that takes longer than 5 s has been fenced."""


class Control(Protocol):
    def ask(self, op: str, timeout_ms: int, **fields: Any) -> dict[str, Any]:
        """Control's answer; its refusals are raised."""

    def descriptor_for(self, lease_id: str, holder_key: str) -> int | None:
        """A descriptor that may be sent at once to the session that bound the lease, if any."""


class NoticeStream:
    """One holder's stream of notices, from whoever has news to the thread that sends it."""

    def __init__(self) -> None:
        self._news: queue.Queue[News | None] = queue.Queue(NEWS_MAX)

    def tell(self, news: News) -> None:
        try:
            self._news.put_nowait(news)
        except queue.Full:  # the next operation on the lease says it
            pass

    def push(self, lease_id: str, descriptor: int) -> bool:
        """No descriptor goes down a stream."""
        return False

    def end(self) -> None:
        try:
            self._news.put_nowait(None)
        except queue.Full:  # its thread finds out at the next message
            pass

    def notices(self, is_active: Callable[[], bool]) -> Iterator[node_pb2.Notice]:
        """The first one comes at once and says that the stream stands."""
        yield node_pb2.Notice()
        while is_active():
            try:
                news = self._news.get(timeout=KEEP_ALIVE_S)
            except queue.Empty:
                yield node_pb2.Notice()
                continue
            if news is None:
                return
            yield notice_of(news)


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are, as holders are told."""

    handover_path: str
    streams_max: int
    """Notice streams at a time: each takes a thread of the pool."""
    data_path: str = ""
    data_port: int = 0


class NodeServicer(node_pb2_grpc.NodeServiceServicer):
    """NodeService, for callers with the role of a holder; the listener has checked that."""

    def __init__(
        self,
        control: Control,
        data: DataPath,
        sessions: Sessions,
        offers: Offers,
        places: Places,
        boottime_ms: Callable[[], int],
        shares: ShareDesk,
    ) -> None:
        self._control, self._data, self._places = control, data, places
        self._shares = shares
        self._sessions, self._offers = sessions, offers
        self._boottime_ms = boottime_ms
        self._streams = threading.BoundedSemaphore(places.streams_max)
        self._buffered = Budget(WRITE_STREAMS_BYTES_MAX)

    def Bind(
        self, request: node_pb2.BindRequest, context: grpc.ServicerContext
    ) -> node_pb2.BindResponse:
        return self._bind("bind", request, context)

    def Attach(
        self, request: node_pb2.BindRequest, context: grpc.ServicerContext
    ) -> node_pb2.BindResponse:
        return self._bind("attach", request, context)

    def Extend(
        self, request: node_pb2.ExtendRequest, context: grpc.ServicerContext
    ) -> node_pb2.ExtendResponse:
        caller = calls.peer()
        answer = self._control.ask(
            "extend",
            time_left_ms(),
            token=_token(request.token),
            session=session_key(caller.key_thumbprint, request.session),
            **_named(caller),
        )
        return node_pb2.ExtendResponse(
            remaining_ms=answer["remaining_ms"], generation=answer["generation"]
        )

    def Release(
        self, request: node_pb2.NodeReleaseRequest, context: grpc.ServicerContext
    ) -> node_pb2.NodeReleaseResponse:
        check_request_id(request.request_id)
        wait_ms = request.credit_wait_ms or CREDIT_WAIT_MS_DEFAULT
        if wait_ms > CREDIT_WAIT_MS_MAX:
            raise failure.of("RANGE", f"credit_wait_ms: at most {CREDIT_WAIT_MS_MAX}")
        answer = self._control.ask(
            "release",
            time_left_ms(),
            lease=check_lease_id(request.lease_id),
            epoch=_epoch(request.epoch),
            credit_wait_ms=wait_ms,
            checkpoint=request.checkpoint,
            **_named(calls.peer()),
        )
        return node_pb2.NodeReleaseResponse(receipt=answer["receipt"], credited=answer["credited"])

    def Detach(
        self, request: node_pb2.DetachRequest, context: grpc.ServicerContext
    ) -> node_pb2.DetachResponse:
        answer = self._control.ask(
            "detach",
            time_left_ms(),
            lease=check_lease_id(request.lease_id),
            epoch=_epoch(request.epoch),
            **_named(calls.peer()),
        )
        return node_pb2.DetachResponse(remaining_ms=answer["remaining_ms"])

    def Read(
        self, request: node_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> node_pb2.ReadResponse:
        return self._read(calls.peer(), request, request.offset, request.length)

    def ReadStream(
        self, request: node_pb2.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[node_pb2.ReadResponse]:
        caller = calls.peer()
        self._data.check_read(
            caller.key_thumbprint,
            request.lease_id,
            request.epoch,
            offset=request.offset,
            length=request.length,
            share=request.share,
        )
        end = request.offset + request.length
        for offset in range(request.offset, end, CHUNK_BYTES_MAX):
            if not context.is_active():
                return
            yield self._read(caller, request, offset, min(CHUNK_BYTES_MAX, end - offset))

    def Write(
        self, request: node_pb2.WriteRequest, context: grpc.ServicerContext
    ) -> node_pb2.WriteResponse:
        _check_chunk(request)
        remaining_ms = self._data.write(
            calls.peer().key_thumbprint,
            request.lease_id,
            request.epoch,
            offset=request.offset,
            data=request.data,
            flush=request.flush,
            share=request.share,
        )
        return node_pb2.WriteResponse(written=len(request.data), remaining_ms=remaining_ms)

    def WriteStream(
        self, request_iterator: Iterator[node_pb2.WriteRequest], context: grpc.ServicerContext
    ) -> node_pb2.WriteResponse:
        with self._buffered.share() as share:
            chunks = _gathered(request_iterator, share)
            written, remaining_ms = 0, 0
            for chunk in chunks:
                remaining_ms = self.Write(chunk, context).remaining_ms
                written += len(chunk.data)
        return node_pb2.WriteResponse(written=written, remaining_ms=remaining_ms)

    def OpenShare(
        self, request: node_pb2.OpenShareRequest, context: grpc.ServicerContext
    ) -> node_pb2.OpenShareResponse:
        answer = self._shares.open(calls.peer(), request)
        answer.data_path, answer.data_port = self._places.data_path, self._places.data_port
        return answer

    def EndShare(
        self, request: node_pb2.EndShareRequest, context: grpc.ServicerContext
    ) -> node_pb2.EndShareResponse:
        return self._shares.end(calls.peer(), request)

    def ListShares(
        self, request: node_pb2.ListSharesRequest, context: grpc.ServicerContext
    ) -> node_pb2.ListSharesResponse:
        return self._shares.tree(calls.peer(), request)

    def Notices(
        self, request: node_pb2.NoticesRequest, context: grpc.ServicerContext
    ) -> Iterator[node_pb2.Notice]:
        session = session_key(calls.peer().key_thumbprint, request.session)
        if not self._streams.acquire(blocking=False):
            raise failure.of("STREAMS", "too many holders listen; use the hand-over socket")
        stream = NoticeStream()
        try:
            self._sessions.join(session, stream)
            try:
                if context.add_callback(stream.end):
                    yield from stream.notices(context.is_active)
            finally:
                self._sessions.leave(session, stream)
        finally:
            self._streams.release()

    def _bind(
        self, op: str, request: node_pb2.BindRequest, context: grpc.ServicerContext
    ) -> node_pb2.BindResponse:
        caller = calls.peer()
        session = session_key(caller.key_thumbprint, request.session)
        answer = self._control.ask(
            op,
            time_left_ms(),
            token=_token(request.token),
            session=session,
            **_named(caller),
        )
        pushed = request.push and self._push(answer["lease_id"], caller, session)
        now_ms = self._boottime_ms()
        offer = Offer(
            answer["lease_id"],
            caller.key_thumbprint,
            request.session,
            spiffe.uid_of_local_holder(caller.identity),
            now_ms + SECRET_MS,
        )
        return node_pb2.BindResponse(
            lease_id=answer["lease_id"],
            epoch=answer["epoch"],
            generation=answer["generation"],
            remaining_ms=answer["remaining_ms"],
            handover_path=self._places.handover_path,
            handover_secret=b"" if pushed else self._offers.add(offer, now_ms),
            size_bytes=answer["size_bytes"],
            block_bytes=answer["block_bytes"],
            descriptor=answer["descriptor"],
            direct_io=answer["direct_io"],
            data_path=self._places.data_path,
            data_port=self._places.data_port,
            pushed=pushed,
        )

    def _push(self, lease_id: str, caller: Peer, session: str) -> bool:
        """Send the memfd down the open connection of a process that control knows already."""
        descriptor = self._control.descriptor_for(lease_id, caller.key_thumbprint)
        if descriptor is None:
            return False
        try:
            return self._sessions.push(session, lease_id, descriptor)
        finally:
            os.close(descriptor)

    def _read(
        self, caller: Peer, request: node_pb2.ReadRequest, offset: int, length: int
    ) -> node_pb2.ReadResponse:
        data, remaining_ms = self._data.read(
            caller.key_thumbprint, request.lease_id, request.epoch,
            offset=offset, length=length, share=request.share,
        )  # fmt: skip
        return node_pb2.ReadResponse(
            data=data, checksum=zlib.crc32(data), offset=offset, remaining_ms=remaining_ms
        )


class Budget:
    """Bytes that all write streams may keep together. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max
        self._lock = threading.Lock()

    @contextmanager
    def share(self) -> Generator[Callable[[int], None], None, None]:
        """A function that takes bytes out of the budget; they go back at the end."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            with self._lock:
                if count > self._left:
                    raise failure.of("RATE", "too many bytes under way", retry_after_ms=100)
                self._left -= count
            taken += count

        try:
            yield take
        finally:
            with self._lock:
                self._left += taken


def notice_of(news: News) -> node_pb2.Notice:
    cause = None if news.cause is None else failures.detail_of(news.cause)
    return node_pb2.Notice(
        lease_id=news.lease_id,
        kind=news.kind,
        reason=news.reason,
        grace_ms=news.grace_ms,
        failure=cause,
    )


def time_left_ms() -> int:
    """Of the caller's deadline, and never more than control may take."""
    left_ms = calls.deadline_left_ms()
    if left_ms <= 0:
        raise failure.of("DEADLINE")
    return min(ANSWER_MS_MAX, left_ms)


def _gathered(
    requests: Iterator[node_pb2.WriteRequest], take: Callable[[int], None]
) -> list[node_pb2.WriteRequest]:
    """All messages of one stream, which must be one contiguous write to one lease.

    A stream that its caller gave up ends here like any other, before gRPC has heard of it: so only
    the message without data, with which a whole stream ends, says that it is whole.
    """
    chunks: list[node_pb2.WriteRequest] = []
    total, is_whole = 0, False
    try:
        for request in requests:
            _check_chunk(request)
            first = chunks[0] if chunks else request
            if _place_of(request) != _place_of(first):
                raise failure.of("INVALID", "one stream writes to one lease")
            if request.offset != first.offset + total:
                raise failure.of("EXTENT", "a stream's messages are contiguous")
            if is_whole:
                raise failure.of("INVALID", "nothing follows the message without data")
            is_whole = not request.data
            total += len(request.data)
            if total > WRITE_STREAM_BYTES_MAX:
                raise failure.of("CHUNK", f"at most {WRITE_STREAM_BYTES_MAX} bytes in a stream")
            take(len(request.data))
            chunks.append(request)
    except grpc.RpcError:  # the stream broke off before its end
        raise failure.of("UNREACHABLE", "the stream broke off") from None
    if not chunks:
        raise failure.of("EMPTY")
    if not is_whole:
        raise failure.of("INVALID", "a stream ends with a message without data")
    return chunks


def _place_of(request: node_pb2.WriteRequest) -> tuple[str, int, str]:
    return request.lease_id, request.epoch, request.share


def _check_chunk(request: node_pb2.WriteRequest) -> None:
    if len(request.data) > CHUNK_BYTES_MAX:
        raise failure.of("CHUNK", f"at most {CHUNK_BYTES_MAX} bytes at a time")
    checksum = request.checksum if request.has_checksum else None
    check_payload(request.data, length=request.length, checksum=checksum)


def _named(caller: Peer) -> dict[str, Any]:
    return {"peer": str(caller.identity), "peer_key": caller.key_thumbprint}


def _token(text: str) -> str:
    if not text:
        raise failure.of("MISSING_FIELD", "token")
    if len(text) > TOKEN_CHARS_MAX:
        raise failure.of("TOKEN_ENCODING", "too long")
    return text


def _epoch(epoch: int) -> int:
    if not 1 <= epoch <= EPOCH_MAX:
        raise failure.of("EPOCH_RANGE")
    return epoch
