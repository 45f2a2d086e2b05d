"""One data connection: what comes in is cut into requests, served in order, and answered at once.

    receive ──► whole requests ──► runs on one lease ──► answers, one send ──► receive

Rules. One thread reads, serves and answers a connection; whatever it sends, it sends while nothing
of it is in flight in the gate page, so that a holder who does not read delays nobody's teardown.
What arrived together is answered together. News of the holder's session comes from other threads:
they send it if that is possible without waiting, else this thread does. What is no frame, is not
whole in time or is not taken in time ends this connection and nothing else. Whether the holder's
certificate is in force is asked again each second.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Final, Protocol

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.wire import dataframes as frames
from grafos_proto.wire.certificates import Certificate
from grafos_proto.wire.dataframes import READ
from services.nodeagent.dataport_work import (
    COUNT,
    FLAGS,
    HANDLE,
    OP,
    RUN_MAX,
    SMALL_BYTES_MAX,
    TAG,
    Asked,
    Work,
)
from services.nodeagent.handover import notice_fields
from services.nodeagent.sessions import News, Sessions, session_key
from services.runtime.clock import Clock

RECEIVE_BYTES: Final = 64 * 1024
"""Of a connection's buffer, and of what it answers at a time; a larger frame borrows its room."""
NEWS_MAX: Final = 256
"""Notices that wait for a holder who does not read; the oldest give way."""
FRAME_MS_MAX: Final = 5_000
"""For a frame that has begun to be whole."""
SEND_MS_MAX: Final = 5_000
"""For what was answered to be taken."""
IDLE_MS_MAX: Final = 120_000
FRESH_MS: Final = 1_000
AGE_MS_MAX: Final = 60_000
"""What only a greeting checks is checked again after this; as for gRPC's connections."""
_UNPACK: Final = frames.REQUEST.unpack_from
_HEADER: Final = frames.REQUEST.size


class Broken(Exception):
    """The other end is gone, too slow, or does not speak this protocol."""


class Pipe(Protocol):
    """A connected stream: a unix socket, or TLS."""

    def receive(self, room: memoryview, *, whole: bool = False) -> int:
        """How many bytes came; 0 at the end. `whole`: rather all that has room than soon.

        Raises:
            BlockingIOError: nothing came for a second, or somebody called `wake`.
        """

    def send(self, data: bytes | memoryview) -> int:
        """How many bytes were taken. BlockingIOError: none for a second."""

    def send_at_once(self, data: bytes) -> int:
        """As `send`, from any thread; BlockingIOError: that would have to wait."""

    def wake(self) -> None:
        """Have `receive` return soon: there is something to send."""

    def shut(self) -> None:
        """End it, from any thread."""

    def close(self) -> None: ...


class Room(Protocol):
    """Memory for frames that are larger than a connection's buffer."""

    def borrow(self, count: int) -> bool: ...

    def give_back(self, count: int) -> None: ...


class Line:
    """A connection whose holder has proved who he is. `run` it in a thread of its own."""

    def __init__(
        self,
        pipe: Pipe,
        holder: Certificate,
        work: Work,
        sessions: Sessions,
        room: Room,
        clock: Clock,
    ) -> None:
        self._pipe, self._holder, self._work = pipe, holder, work
        self._sessions, self._room, self._clock = sessions, room, clock
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._borrowed = self._start = self._end = 0
        self._wanted = 0
        """What is missing of a large frame; received alone, so that nothing has to be moved."""
        self._greeted, self._session = False, ""
        self._news: deque[bytes] = deque(maxlen=NEWS_MAX)
        self._unsent = b""
        """The rest of a notice of which a part has been sent: it goes before anything else."""
        self._sending = threading.Lock()
        now_ms = clock.boot_ms()
        self._heard_ms, self._fresh_ms, self._end_ms = now_ms, 0, now_ms + AGE_MS_MAX
        self._is_run = False
        self._begun_ms = 0
        """Since when a frame is incomplete; 0: none is."""

    def run(self) -> None:
        try:
            while True:
                wanted = self._wanted
                end = self._end + wanted if wanted else max(RECEIVE_BYTES, self._end + 1)
                try:
                    count = self._pipe.receive(self._buffer[self._end : end], whole=wanted > 0)
                except BlockingIOError:
                    self._quiet()
                    continue
                if not count:
                    return
                self._end += count
                self._serve()
        except (OSError, Broken):
            return
        finally:
            self._close()

    def push(self, lease_id: str, descriptor: int) -> bool:
        """No descriptor comes down a data port."""
        return False

    def tell(self, news: News) -> None:
        """From any thread, without waiting."""
        self._news.append(frames.said(frames.NOTICE, 0, notice_fields(news)))
        self._send_news()
        if self._news or self._unsent:
            self._pipe.wake()

    def shut(self) -> None:
        self._pipe.shut()

    # what comes in

    def _serve(self) -> None:
        """Everything that has arrived as a whole."""
        now_ms = self._clock.boot_ms()
        self._heard_ms = now_ms
        if now_ms >= self._fresh_ms:
            self._check_fresh(now_ms)
        while True:
            asked = self._whole()
            if asked:
                self._begun_ms = 0
                if self._is_run:
                    answers = self._work.run(asked)
                    self._send(answers)
                    asked = asked[len(answers) :]
                if asked or not self._is_run:
                    self._answer(asked)
            if not asked or self._start == self._end:
                break
        self._wanted = 0
        if self._start < self._end:
            self._begun_ms = self._begun_ms or now_ms
            if now_ms - self._begun_ms > FRAME_MS_MAX:
                raise Broken("a frame does not become whole")
            self._make_room()
        else:
            self._start = self._end = 0

    def _whole(self) -> list[Asked]:
        """The requests that are in the buffer from end to end; `_is_run`: they are one run."""
        found: list[Asked] = []
        is_run, lease = self._greeted, -1
        buffer, start, end = self._buffer, self._start, self._end
        while end - start >= _HEADER:
            request = _UNPACK(buffer, start)
            payload = start + _HEADER
            after = payload + request[0]
            if request[0] > frames.PAYLOAD_BYTES_MAX or request[FLAGS]:
                self._send([frames.refusal(request[TAG], failure.of("INVALID", "no such frame"))])
                raise Broken("no frame")
            if after > end:
                break
            found.append((request, buffer[payload:after]))
            start = after
            if lease < 0:
                lease = request[HANDLE]
            if request[OP] < READ or request[COUNT] > SMALL_BYTES_MAX or request[HANDLE] != lease:
                is_run = False
        self._start = start
        self._is_run = is_run and len(found) <= RUN_MAX
        return found

    def _make_room(self) -> None:
        """Have the frame that has begun fit behind what is there of it."""
        start, end, buffer = self._start, self._end, self._buffer
        there = end - start
        whole = _HEADER
        if there >= _HEADER:
            whole += _UNPACK(buffer, start)[0]
        if whole > len(buffer):
            wanted = whole + RECEIVE_BYTES
            self._give_back()
            if not self._room.borrow(wanted):
                self._skip(whole)
                return
            self._borrowed = wanted
            self._buffer = memoryview(bytearray(wanted))
        elif start + whole <= len(buffer) and end < len(buffer):
            self._wanted = whole - there if whole > RECEIVE_BYTES else 0
            return
        self._buffer[:there] = bytes(buffer[start:end])
        self._start, self._end = 0, there
        self._wanted = whole - there if whole > RECEIVE_BYTES else 0

    def _skip(self, whole: int) -> None:
        """Take a frame that there is no room for off the wire, and say so."""
        tag = _UNPACK(self._buffer, self._start)[TAG]
        left = whole - (self._end - self._start)
        self._start = self._end = 0
        until_ms = self._clock.boot_ms() + FRAME_MS_MAX
        while left:
            if self._clock.boot_ms() > until_ms:
                raise Broken("a frame does not become whole")
            try:
                count = self._pipe.receive(self._buffer[: min(left, RECEIVE_BYTES)])
            except BlockingIOError:
                continue
            if not count:
                raise Broken("the end, within a frame")
            left -= count
        cause = failure.of("RATE", "too many bytes under way", retry_after_ms=100)
        self._send([frames.refusal(tag, cause)])

    def _give_back(self) -> None:
        if self._borrowed:
            self._room.give_back(self._borrowed)
            self._borrowed = 0

    # what goes out

    def _answer(self, asked: list[Asked]) -> None:
        at, answers, size = 0, [], 0
        while at < len(asked):
            request, payload = asked[at]
            if request[OP] not in frames.OPS_USING:
                answers.append(self._managed(asked[at]))
                at += 1
            elif self._work.is_large(request):
                self._send(answers)
                answers, size = [], 0
                self._send(self._work.large(request, payload))
                at += 1
            else:
                done = self._work.run(self._run_at(asked, at))
                answers += done
                at += len(done)
                size += sum(map(len, done))
            if size >= RECEIVE_BYTES:
                self._send(answers)
                answers, size = [], 0
        self._send(answers)

    def _run_at(self, asked: list[Asked], at: int) -> list[Asked]:
        """The requests from `at` on that are one run."""
        if not self._greeted:
            raise Broken("HELLO comes first")
        handle, end = asked[at][0][HANDLE], at + 1
        last = min(len(asked), at + RUN_MAX)
        while end < last:
            request = asked[end][0]
            if request[HANDLE] != handle or request[OP] not in frames.OPS_USING:
                break
            if self._work.is_large(request):
                break
            end += 1
        return asked[at:end]

    def _managed(self, asked: Asked) -> bytes:
        """What is not an operation on a lease's bytes."""
        request, payload = asked
        try:
            if request[OP] == frames.HELLO and not self._greeted:
                return self._hello(request[COUNT], request[TAG], bytes(payload))
            if not self._greeted:
                raise failure.of("VERSION", "HELLO comes first")
            if request[OP] == frames.OPEN:
                return self._work.open(request, payload)
            if request[OP] == frames.SHARE:
                return self._work.open_share(request, payload)
            if request[OP] == frames.CLOSE:
                return self._work.close(request)
            raise failure.of("INVALID", "no such operation")
        except FabricError as cause:
            refusal = frames.refusal(request[TAG], cause)
            if self._greeted:
                return refusal
            self._send([refusal])
            raise Broken("not greeted") from None

    def _hello(self, version: int, tag: int, session: bytes) -> bytes:
        if version != frames.VERSION:
            raise failure.of("VERSION", f"this node speaks version {frames.VERSION}")
        if session:
            name = session_key(self._holder.thumbprint, session.decode("ascii", "replace"))
            self._sessions.join(name, self)
            self._session = name
        self._greeted = True
        left_ms = max(0, self._end_ms - self._clock.boot_ms())
        answer = frames.HELLO_ANSWER.pack(frames.VERSION, frames.HANDLES_MAX, left_ms)
        return frames.answer(tag, answer)

    def _send(self, parts: Iterable[bytes | memoryview]) -> None:
        """All of it, before anything that another thread may have to say."""
        with self._sending:
            if self._unsent:
                self._push(self._unsent)
                self._unsent = b""
            if isinstance(parts, list):
                if parts:
                    self._push(b"".join(parts))
            else:
                for part in parts:
                    self._push(part)
            while self._news:
                self._push(self._news.popleft())
        if self._news:  # told while we held the lock
            self._send_news()

    def _push(self, data: bytes | memoryview) -> None:
        view: bytes | memoryview = data
        until_ms = 0
        while True:
            try:
                sent = self._pipe.send(view)
                if sent == len(view):
                    return
                view = memoryview(view)[sent:]
            except BlockingIOError:
                pass
            now_ms = self._clock.boot_ms()
            until_ms = until_ms or now_ms + SEND_MS_MAX
            if now_ms > until_ms:
                raise Broken("the holder does not read")

    def _send_news(self) -> None:
        """As much as goes at once. Whoever holds the lock looks for news after giving it back."""
        while self._news and self._sending.acquire(blocking=False):
            try:
                whole = self._unsent or self._news.popleft()
                sent = self._pipe.send_at_once(whole)
                self._unsent = whole[sent:]
                if self._unsent:
                    return
            except IndexError:  # another thread was faster
                return
            except BlockingIOError:
                self._unsent = whole
                return
            except OSError:  # gone; the thread that reads finds out
                return
            finally:
                self._sending.release()

    # as time passes

    def _quiet(self) -> None:
        """Nothing has come for a moment."""
        self._work.rest()
        if self._borrowed and self._end == 0:
            self._buffer = memoryview(bytearray(RECEIVE_BYTES))
            self._give_back()
        now_ms = self._clock.boot_ms()
        if self._news or self._unsent:
            self._send([])
        if self._begun_ms and now_ms - self._begun_ms > FRAME_MS_MAX:
            raise Broken("a frame does not become whole")
        if now_ms - self._heard_ms > IDLE_MS_MAX or now_ms >= self._end_ms:
            raise Broken("idle, or old")

    def _check_fresh(self, now_ms: int) -> None:
        self._fresh_ms = now_ms + FRESH_MS
        try:
            self._holder.check_fresh(self._clock.wall_ms())
        except FabricError as cause:
            asked = self._whole()
            self._send([frames.refusal(request[TAG], cause) for request, _ in asked])
            raise Broken("the certificate is not in force any more") from None
        if now_ms >= self._end_ms:
            raise Broken("old")

    def _close(self) -> None:
        self._pipe.close()
        if self._session:
            self._sessions.leave(self._session, self)
        self._give_back()
