"""The line that stays open between this process and a node, for as long as it holds leases there.

It says two things without a word: that this process is alive, and which process it is. Down it come
the node's notices; on the node's own machine leased memory itself comes down it once, at bind.

    LocalSession    a unix socket to the node's hand-over desk: descriptors and notices
    StreamSession   the RPC `Notices`: what remains where there is no such socket

Rules. There is one session per process and node, for all its leases. A session that breaks ends no
lease by itself: it is opened anew, and the holder's deadline stands. Every wait has an end. A local
session has no thread: it is read by whoever calls `poll`. A stream needs one, since nothing else
can wait for gRPC, and another that ends it when the node has fallen silent; they only pass notices
on.
"""

from __future__ import annotations

import array
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol

from grafos import _clock
from grafos._notice import Notice, Tell, failure_of, notice_of
from grafos_core import failure
from grafos_core.failure import FabricError

VERSION: Final = 1
PACKET_BYTES_MAX: Final = 65_536
EXCHANGE_MS_MAX: Final = 3_000
"""For one hand-over; the desk asks control, which answers in about a millisecond."""
DESCRIPTORS_MAX: Final = 4
"""Room for more than the one that belongs to an answer, so that strangers are closed, not lost."""
ARRIVED_MAX: Final = 64
"""Descriptors that wait for the thread that bound their lease."""
PACKETS_PER_POLL_MAX: Final = 256
RECONNECT_MS_MIN, RECONNECT_MS_MAX = 50, 1_000
SILENCE_MS_MAX: Final = 3_000
"""A node says something on its stream each second; after so long without a word the stream is dead,
although this end may not have been told."""
LOOK_S: Final = 0.5


class Session(Protocol):
    """What a node's connection needs of either kind."""

    @property
    def is_lost(self) -> bool: ...

    def poll(self) -> None: ...

    def close(self) -> None: ...

    def forget(self) -> None:
        """In a forked child: let go of what belongs to the parent, without a word to anyone."""


class LocalSession:
    """The unix socket to a node on this machine. Thread-safe."""

    def __init__(self, path: str, session: str, tell: Tell) -> None:
        self._session, self._tell = session, tell
        self._lock = threading.Lock()
        self._arrived: dict[str, int] = {}
        """Descriptors by lease that another thread's reading brought."""
        self.is_lost = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(EXCHANGE_MS_MAX / 1000)
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise failure.of("UNREACHABLE", f"hand-over socket: {error.strerror}") from None

    def hand_over(self, lease_id: str, secret: bytes) -> int | None:
        """The descriptor of a lease that was bound just now; None for a kind that has none."""
        question = {"v": VERSION, "secret": secret.hex(), "session": self._session}
        with self._lock:
            if lease_id in self._arrived:
                return self._arrived.pop(lease_id)
            try:
                self._socket.settimeout(EXCHANGE_MS_MAX / 1000)
                self._socket.send(json.dumps(question).encode())
                return self._answer(lease_id, _clock.boot_ms() + EXCHANGE_MS_MAX)
            except TimeoutError:
                self._lose()
                raise failure.of("DEADLINE", "hand-over", lease_id=lease_id) from None
            except OSError as error:
                self._lose()
                raise failure.of("UNREACHABLE", f"hand-over: {error.strerror}") from None
            except FabricError:
                self._lose()  # the desk closes after a refusal
                raise

    def await_pushed(self, lease_id: str) -> bool:
        """Whether the descriptor that the node sent before its answer is here, for `hand_over`."""
        with self._lock:
            if lease_id not in self._arrived and not self.is_lost:
                try:
                    descriptor = self._answer(lease_id, _clock.boot_ms() + EXCHANGE_MS_MAX)
                    self._keep({"lease_id": lease_id}, descriptor)
                except (OSError, FabricError):
                    self._lose()
            return lease_id in self._arrived

    def poll(self) -> None:
        """Pass on what has come. Never waits, not even for another thread that talks here."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._drain()
        finally:
            self._lock.release()

    def close(self) -> None:
        with self._lock:
            self._lose()

    def forget(self) -> None:
        self.is_lost = True
        self._socket.close()  # our copy of the descriptor; the parent's connection stays
        _close_all(self._arrived.values())
        self._arrived = {}

    def _drain(self) -> None:
        for _ in range(PACKETS_PER_POLL_MAX):
            if self.is_lost:
                return
            try:
                self._socket.setblocking(False)
                message, descriptor = self._receive()
            except BlockingIOError:
                return
            except (OSError, FabricError):
                self._lose()
                return
            self._keep(message, descriptor)
            self._pass_on(message)

    def _answer(self, lease_id: str, end_ms: int) -> int | None:
        """The answer about this lease; notices and late answers may come before it."""
        while True:
            left_ms = end_ms - _clock.boot_ms()
            if left_ms <= 0:
                raise TimeoutError
            self._socket.settimeout(left_ms / 1000)
            message, descriptor = self._receive()
            if message.get("lease_id") == lease_id:
                return descriptor
            self._keep(message, descriptor)
            if "failure" in message:
                raise failure_of(message["failure"]) or failure.of("INTERNAL", "hand-over")
            self._pass_on(message)

    def _receive(self) -> tuple[dict[str, Any], int | None]:
        packet, descriptors, flags = _received(self._socket)
        _close_all(descriptors[1:])
        message = _parsed(packet)
        if message is not None and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            return message, descriptors[0] if descriptors else None
        _close_all(descriptors[:1])
        if not packet:
            raise failure.of("UNREACHABLE", "the node closed the session")
        if flags & socket.MSG_CTRUNC:  # more than fit, or this process has as many as it may
            raise failure.of("UNREACHABLE", "descriptors of the node did not all arrive")
        raise failure.of("ENCODING", "the node's message")

    def _keep(self, message: dict[str, Any], descriptor: int | None) -> None:
        """Somebody else's, who will look for it; what nobody looked for gives way."""
        if descriptor is None:
            return
        lease_id = str(message.get("lease_id"))
        if lease_id in self._arrived:
            os.close(self._arrived.pop(lease_id))
        self._arrived[lease_id] = descriptor
        while len(self._arrived) > ARRIVED_MAX:
            os.close(self._arrived.pop(next(iter(self._arrived))))

    def _pass_on(self, message: dict[str, Any]) -> None:
        fields = message.get("notice")
        if isinstance(fields, dict) and fields.get("lease_id"):
            self._tell(notice_of(fields))

    def _lose(self) -> None:
        self.is_lost = True
        self._socket.close()
        _close_all(self._arrived.values())
        self._arrived.clear()


class StreamSession:
    """The stream of notices from a node that has no socket here, read by one thread."""

    def __init__(self, node_id: str, open_stream: Callable[[], Iterator[Any]], tell: Tell) -> None:
        self._open_stream, self._tell = open_stream, tell
        self._stopped = threading.Event()
        self._stands = threading.Event()
        self._call: Any = None
        self._heard_ms = _clock.boot_ms()
        self._thread = threading.Thread(
            target=self._run, name=f"grafos-notices-{node_id}", daemon=True
        )
        self._thread.start()
        threading.Thread(target=self._watch, name=f"grafos-silence-{node_id}", daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Only until it stands again: the thread opens it anew by itself."""
        return not self._stands.is_set()

    def wait(self, timeout_ms: int) -> bool:
        """Whether the node has answered by then."""
        return self._stands.wait(timeout_ms / 1000)

    def poll(self) -> None:
        """Nothing to do: the thread passes notices on as they come."""

    def close(self) -> None:
        self._stopped.set()
        call = self._call
        if call is not None:
            call.cancel()
        self._thread.join(RECONNECT_MS_MAX / 1000)

    def forget(self) -> None:
        self._stopped.set()
        self._stands.clear()

    def _run(self) -> None:
        pause_ms = RECONNECT_MS_MIN
        while not self._stopped.is_set():
            try:
                self._heard_ms = _clock.boot_ms()
                self._call = self._open_stream()
                for message in self._call:
                    self._heard_ms = _clock.boot_ms()
                    pause_ms = RECONNECT_MS_MIN
                    self._stands.set()
                    if message.lease_id:
                        self._tell(_notice_from_proto(message))
            except Exception:  # whatever broke the stream: it is opened again, the lease stands
                pass
            self._stands.clear()
            self._stopped.wait(pause_ms / 1000)
            pause_ms = min(pause_ms * 2, RECONNECT_MS_MAX)

    def _watch(self) -> None:
        """End a stream on which nothing comes any more: `_run` then opens the next one."""
        while not self._stopped.wait(LOOK_S):
            call = self._call
            if call is not None and _clock.boot_ms() - self._heard_ms > SILENCE_MS_MAX:
                call.cancel()


def _received(link: socket.socket) -> tuple[bytes, list[int], int]:
    """A packet, its descriptors and the kernel's flags. No child of ours inherits a descriptor.

    Not `socket.recv_fds`, which takes flags and ignores them: between its return and a call that
    makes the descriptors ours alone, another thread may start a process.
    """
    descriptors = array.array("i")
    room = socket.CMSG_SPACE(DESCRIPTORS_MAX * descriptors.itemsize)
    packet, rights, flags, _ = link.recvmsg(PACKET_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, part in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(part[: len(part) - len(part) % descriptors.itemsize])
    return packet, list(descriptors), flags


def _close_all(descriptors: Iterable[int]) -> None:
    for each in descriptors:
        os.close(each)


def _parsed(packet: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and message.get("v") == VERSION else None


def _notice_from_proto(message: Any) -> Notice:
    from grafos_proto.wire import failures  # gRPC is loaded by now: a stream has spoken

    cause = failures.failure_of(message.failure) if message.HasField("failure") else None
    return Notice(message.lease_id, message.kind, message.reason, message.grace_ms, cause)
