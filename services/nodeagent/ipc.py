"""How the processes of one node agent talk: whole messages over a socket pair, with descriptors.

Like a pneumatic post between two desks: a capsule arrives whole or not at all, can carry an object
beside the letter, and when the other desk is gone both ends know at once.

Rules. One message is one map in the audit codec's encoding, at most 64 KiB. A question has an `id`,
its answer has the same number as `re`; both ends may ask. Descriptors belong to whoever received
them, and are closed on exec. Every wait has a bound. A peer that is gone, does not read, or sends
what is no message of ours is the same to us: the link is closed.
"""

from __future__ import annotations

import array
import errno
import itertools
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from grafos_core import codec, failure

MESSAGE_BYTES_MAX: Final = 64 * 1024
"""Far below a socket's buffer, so that a message never waits for room that cannot come."""
FDS_MAX: Final = 8
SEND_MS_MAX: Final = 1_000
"""A peer that has not read for this long counts as gone."""

Message = dict[str, Any]
Handler = Callable[[Message, list[int]], None]


class LinkClosed(Exception):
    """The other end is gone, or as good as gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends that keep message boundaries and notice each other's death."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _send(sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Python's `send_fds` and `recv_fds` take flags and ignore them; ours must be heeded."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _receive(sock: socket.socket, fds_max: int) -> tuple[bytes, list[int], int]:
    fds = array.array("i")
    room = socket.CMSG_LEN(fds_max * fds.itemsize)
    data, rights, flags, _ = sock.recvmsg(MESSAGE_BYTES_MAX, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, part in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(part[: len(part) - len(part) % fds.itemsize])
    return data, list(fds), flags


class _Waiter:
    """One question that is not answered yet."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.answer: tuple[Message, list[int]] | None = None


class Link:
    """One end. Any thread may send and ask; exactly one thread reads, by `serve` or `receive`."""

    def __init__(self, sock: socket.socket, *, fds_max: int = FDS_MAX) -> None:
        self._sock = sock
        self._fds_max = fds_max
        self._send_lock = threading.Lock()
        self._waiters_lock = threading.Lock()
        self._waiters: dict[int, _Waiter] = {}
        self._ids = itertools.count(1)
        self._closed = False

    @classmethod
    def from_fd(cls, fd: int) -> Link:
        """The end that a process inherited; the descriptor is the link's from now on."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """End it for both sides. Idempotent; whoever waits for an answer hears of it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was first
        self._sock.close()
        self._give_up()

    def send(
        self, message: Mapping[str, Any], fds: Sequence[int] = (), timeout_ms: int = SEND_MS_MAX
    ) -> None:
        """Hand a message over; our descriptors stay ours."""
        data = codec.encode(dict(message))
        if len(data) > MESSAGE_BYTES_MAX:
            raise failure.of("MESSAGE_SIZE", f"{len(data)} bytes between processes")
        failure.invariant(len(fds) <= self._fds_max, f"at most {self._fds_max} descriptors")
        with self._send_lock:
            try:
                try:
                    _send(self._sock, data, fds)
                except BlockingIOError:  # full: only now is it worth to ask when it will not be
                    self._wait_for(select.POLLOUT, timeout_ms, "the other end does not read")
                    _send(self._sock, data, fds)
            except OSError as error:
                raise LinkClosed(errno.errorcode.get(error.errno or 0, "closed")) from None

    def receive(self, timeout_ms: int | None = None) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors; None if none came in time."""
        if timeout_ms is not None and not self._ready(select.POLLIN, timeout_ms):
            return None
        try:
            data, fds, flags = _receive(self._sock, self._fds_max)
        except OSError as error:
            raise LinkClosed(errno.errorcode.get(error.errno or 0, "closed")) from None
        if not data:
            close_all(fds)
            raise LinkClosed("end of file")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(fds)
            raise LinkClosed("a message that is too long")
        return self._read(data, fds), fds

    def request(
        self, message: Mapping[str, Any], fds: Sequence[int] = (), timeout_ms: int = SEND_MS_MAX
    ) -> tuple[Message, list[int]]:
        """Ask and wait for the answer. Another thread must be in `serve`; never call it there."""
        waiter, number = _Waiter(), next(self._ids)
        with self._waiters_lock:
            if self._closed:
                raise LinkClosed("end of file")
            self._waiters[number] = waiter
        try:
            self.send({**message, "id": number}, fds, timeout_ms)
            in_time = waiter.answered.wait(timeout_ms / 1000)
        finally:
            with self._waiters_lock:
                self._waiters.pop(number, None)
        if waiter.answer is not None:
            return waiter.answer
        if in_time:
            raise LinkClosed("end of file")
        raise failure.of("DEADLINE", f"no answer to {message.get('op')!r} in {timeout_ms} ms")

    def reply(
        self, question: Mapping[str, Any], answer: Mapping[str, Any], fds: Sequence[int] = ()
    ) -> None:
        """Answer a question; a message that asked nothing is told nothing."""
        if "id" in question:
            self.send({**answer, "re": question["id"]}, fds)

    def serve(self, handle: Handler) -> None:
        """Read until the end: answers go to who asked, all else to `handle`, which owns the fds."""
        try:
            while True:
                received = self.receive()
                if received is not None:
                    self.deliver(*received, handle)
        except LinkClosed:
            pass
        finally:
            self._give_up()

    def deliver(self, message: Message, fds: list[int], handle: Handler) -> None:
        """Sort one received message; for owners with a loop of their own."""
        if "re" not in message:
            handle(message, fds)
            return
        with self._waiters_lock:
            waiter = self._waiters.pop(message["re"], None)
            if waiter is not None:
                waiter.answer = (message, fds)
                waiter.answered.set()
                return
        close_all(fds)  # it came after the one who asked had stopped waiting

    def _give_up(self) -> None:
        with self._waiters_lock:
            self._closed = True
            for waiter in self._waiters.values():
                waiter.answered.set()

    def _read(self, data: bytes, fds: list[int]) -> Message:
        try:
            message = codec.decode(data)
        except failure.FabricError:
            message = None
        if isinstance(message, dict) and all(isinstance(key, str) for key in message):
            return {str(key): value for key, value in message.items()}
        close_all(fds)
        raise LinkClosed("not one of our messages")

    def _wait_for(self, event: int, timeout_ms: int, otherwise: str) -> None:
        if not self._ready(event, timeout_ms):
            raise LinkClosed(otherwise)

    def _ready(self, event: int, timeout_ms: int | None) -> bool:
        if self._sock.fileno() < 0:
            raise LinkClosed("closed here")
        poll = select.poll()
        poll.register(self._sock, event)
        return bool(poll.poll(timeout_ms))
