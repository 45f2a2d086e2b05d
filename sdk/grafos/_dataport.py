"""The data port of a node, from the holder's side: operations on leases without gRPC.

One connection serves all leases of this process at that node. Whoever has an operation sends it and
waits for its answer; many small ones may go out together and come back together.

Rules. Bytes are believed only with the node's verdict behind them. A connection whose exchange was
cut short, by a deadline or an interruption, is not used again. What may be done twice is asked for
once more over a fresh connection when a kept one turns out to be dead; a change of a word that
somebody may have made already is not, and fails. Where the port cannot be had `PortDown` says so,
and the caller goes another way for a while. A forked child closes its copy and says nothing.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

from grafos import _clock
from grafos._dataport_ways import RECEIVE_BYTES, Connect, Stream
from grafos._notice import Notice, Tell, notice_of
from grafos_core import failure
from grafos_core.failure import Degraded, Disconnected, FabricError, InternalError, RateLimited
from grafos_proto.wire import dataframes as frames

CONNECT_MS_MAX: Final = 3_000
DOWN_MS_MIN, DOWN_MS_MAX = 50, 1_000
"""How long the port is left alone after it could not be had; doubles each time."""
AGE_PART: Final = 0.5
"""Of the age at which the node ends a connection; we leave it then."""
SMALL_BYTES_MAX: Final = 32 * 1024
"""What is larger is received where it belongs, and not in a buffer before."""
WRITE_BYTES: Final = 256 * 1024
"""Of one frame of a large write: the node stores one while the next one arrives."""
READ_BYTES: Final = frames.DATA_BYTES_MAX
TAG_MASK: Final = (1 << 32) - 1
_REQUEST, _ANSWER = frames.REQUEST.pack, frames.ANSWER.unpack_from
_HEADER: Final = frames.ANSWER.size


@functools.lru_cache(64)
def _shape_of_good(length: int) -> struct.Struct:
    """Of a whole answer of so many bytes with its verdict."""
    return struct.Struct(f"{frames.ANSWER.format}{length}sB")


class PortDown(Exception):
    """The port cannot be had; nothing was done there that may not be done once more."""


class _Lost(Exception):
    """The connection broke. `sent`: the node may have got the request."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Exchange(Protocol):
    """What is said on a connection that is ours for as long as it takes."""

    def __call__(self, line: Line, handle: int, end_ms: float) -> Any: ...


class DataPort:
    """The port of one node. Thread-safe: one exchange at a time."""

    def __init__(self, connect: Connect, session: str = "", tell: Tell | None = None) -> None:
        """`session`: to hear its notices on the port, too; they go to `tell`."""
        self._connect, self._session, self._tell = connect, session, tell
        self._lock = threading.Lock()
        self._line: Line | None = None
        self._chains: dict[str, bytes] = {}
        """Of shares, by what the node calls them: what they are opened with."""
        self._down_ms, self._down_until_ms = 0, 0
        self._closed = False

    @property
    def is_up(self) -> bool:
        """Whether it is worth asking."""
        return not self._closed and (
            not self._down_until_ms or _clock.boot_ms() >= self._down_until_ms
        )

    def read(self, lease_id: str, epoch: int, offset: int, length: int, timeout_ms: float) -> bytes:
        if length <= SMALL_BYTES_MAX:
            return self._small(lease_id, epoch, (frames.READ, offset, length, b""), timeout_ms)

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.read_large(handle, offset, length, end_ms)

        found: bytes = self._exchange(lease_id, epoch, timeout_ms, exchange)
        return found

    def readinto(
        self, lease_id: str, epoch: int, *, offset: int, view: memoryview, timeout_ms: float
    ) -> None:
        """What was put into `view` before a failure is for the caller to blank out."""

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.read_into(handle, offset, view, end_ms)

        self._exchange(lease_id, epoch, timeout_ms, exchange)

    def write(
        self,
        lease_id: str,
        epoch: int,
        *,
        offset: int,
        data: bytes | memoryview,
        timeout_ms: float,
        flush: bool = False,
    ) -> None:
        if len(data) <= SMALL_BYTES_MAX and not flush:
            self._small(lease_id, epoch, (frames.WRITE, offset, len(data), data), timeout_ms)
            return

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.write_large(handle, offset, data, flush, end_ms)

        self._exchange(lease_id, epoch, timeout_ms, exchange)

    def read_many(
        self, lease_id: str, epoch: int, parts: Sequence[tuple[int, int]], *, timeout_ms: float
    ) -> list[bytes]:
        """The bytes of each (offset, length), which together fit one answer."""
        table = b"".join([frames.PART.pack(*part) for part in parts])

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.ask(frames.READ_MANY, handle, 0, len(parts), table, end_ms)

        data, found, at = self._exchange(lease_id, epoch, timeout_ms, exchange), [], 0
        for _, length in parts:
            found.append(data[at : at + length])
            at += length
        if at != len(data):
            raise failure.of("LENGTH", "the node's answer", lease_id=lease_id, epoch=epoch)
        return found

    def write_many(
        self,
        lease_id: str,
        epoch: int,
        parts: Sequence[tuple[int, bytes | memoryview]],
        *,
        timeout_ms: float,
    ) -> None:
        """All of (offset, data), which together fit one request."""
        table = [frames.PART.pack(offset, len(data)) for offset, data in parts]
        payload = b"".join([*table, *(data for _, data in parts)])

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.ask(frames.WRITE_MANY, handle, 0, len(parts), payload, end_ms)

        self._exchange(lease_id, epoch, timeout_ms, exchange)

    def pipelined(
        self, lease_id: str, epoch: int, parts: Sequence[tuple[int, int]], *, timeout_ms: float
    ) -> list[bytes]:
        """As `read_many`, each read a request of its own; all are sent before any is awaited."""

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.read_pipelined(handle, parts, end_ms)

        found: list[bytes] = self._exchange(lease_id, epoch, timeout_ms, exchange)
        return found

    def swap(
        self, lease_id: str, epoch: int, *, offset: int, expected: int, new: int, timeout_ms: float
    ) -> int:
        payload = frames.WORDS.pack(expected, new)
        return self._change(lease_id, epoch, frames.SWAP, offset, payload, timeout_ms)

    def add(self, lease_id: str, epoch: int, *, offset: int, n: int, timeout_ms: float) -> int:
        payload = frames.WORD.pack(n)
        return self._change(lease_id, epoch, frames.ADD, offset, payload, timeout_ms)

    def add_share(self, target: str, chain: str) -> None:
        """From now on `target` is asked for like a lease."""
        self._chains[target] = chain.encode("ascii")

    def leave_share(self, target: str) -> None:
        if self._chains.pop(target, None) is not None:
            self.close_lease(target)

    def close_lease(self, lease_id: str) -> None:
        """Its handle is closed together with the next request."""
        line = self._line
        if line is not None:
            line.leave(lease_id)

    def poll(self) -> None:
        """Pass on notices that have come. Never waits."""
        if self._line is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._line is not None:
                self._line.listen()
        except (_Lost, OSError, FabricError):
            self._drop()
        finally:
            self._lock.release()

    def close(self) -> None:
        self._closed = True
        with self._lock:
            self._drop()

    def forget(self) -> None:
        """In a forked child, whatever the lock is."""
        self._closed = True
        self._lock = threading.Lock()
        self._drop()

    def _small(
        self, lease_id: str, epoch: int, asked: tuple[int, int, int, Any], timeout_ms: float
    ) -> bytes:
        """Op, offset, count, payload. The usual case first: an open handle, and nobody else here;
        whatever is unusual goes the long way, also what broke: it may be asked for twice."""
        line = self._line
        if line is not None and self._lock.acquire(False):
            try:
                now_ms = _clock.boot_ms()
                handle = line.handles.get(lease_id)
                if handle is not None and line is self._line and now_ms < line.leave_ms:
                    op, offset, count, payload = asked
                    end_ms = now_ms + timeout_ms
                    answer = line.ask(op, handle, offset, count, payload, end_ms)
                    if type(answer) is bytes:
                        return answer
            except _Lost:
                self._drop()
            except BaseException:
                self._drop()
                raise
            finally:
                self._lock.release()

        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            op, offset, count, payload = asked
            return line.ask(op, handle, offset, count, payload, end_ms)

        found: bytes = self._exchange(lease_id, epoch, timeout_ms, exchange)
        return found

    def _change(
        self, lease_id: str, epoch: int, op: int, offset: int, payload: bytes, timeout_ms: float
    ) -> int:
        def exchange(line: Line, handle: int, end_ms: float) -> Any:
            return line.ask(op, handle, offset, 0, payload, end_ms)

        data = self._exchange(lease_id, epoch, timeout_ms, exchange, may_repeat=False)
        if len(data) != frames.WORD.size:
            raise failure.of("LENGTH", "the node's answer", lease_id=lease_id, epoch=epoch)
        return int(frames.WORD.unpack(data)[0])

    def _exchange(
        self,
        lease_id: str,
        epoch: int,
        timeout_ms: float,
        exchange: Exchange,
        *,
        may_repeat: bool = True,
    ) -> Any:
        """What `exchange` returns, which may be a refusal to raise."""
        end_ms = _clock.boot_ms() + timeout_ms
        if not self._lock.acquire(timeout=max(0.0, timeout_ms / 1000)):
            raise failure.of("DEADLINE", "the connection is busy", lease_id=lease_id)
        try:
            try:
                answer = self._once(lease_id, epoch, exchange, end_ms)
            except _Lost as lost:
                self._drop()
                if lost.sent and not may_repeat:
                    raise failure.of("UNREACHABLE", "the answer was lost") from None
                try:
                    answer = self._once(lease_id, epoch, exchange, end_ms)
                except _Lost as again:
                    if again.sent and not may_repeat:
                        raise failure.of("UNREACHABLE", "the answer was lost") from None
                    raise self._down(str(again)) from None
        except BaseException:
            self._drop()
            raise
        finally:
            self._lock.release()
        if isinstance(answer, FabricError):
            raise answer
        return answer

    def _once(self, lease_id: str, epoch: int, exchange: Exchange, end_ms: float) -> Any:
        line = self._line
        if line is None or _clock.boot_ms() >= line.leave_ms:
            line = self._opened(end_ms)
        handle = line.handles.get(lease_id)
        if handle is None:
            opened = line.open(lease_id, epoch, end_ms, self._chains.get(lease_id))
            if isinstance(opened, FabricError):
                return opened
            handle = opened
        answer = exchange(line, handle, end_ms)
        if isinstance(answer, FabricError) and not isinstance(
            answer, Degraded | RateLimited | Disconnected | InternalError
        ):
            line.disown(lease_id)  # it may be over: another attempt asks for it anew
        return answer

    def _opened(self, end_ms: float) -> Line:
        if self._closed:
            raise failure.of("CLOSED", "the data port")
        left_ms = min(CONNECT_MS_MAX, end_ms - _clock.boot_ms())
        try:
            made = Line(self._connect(max(1, left_ms)), self._told)
            try:
                made.hello(self._session, end_ms)
            except BaseException:
                made.close()
                raise
        except (OSError, _Lost, FabricError) as error:
            raise self._down(str(error)) from None
        self._drop()
        self._line, self._down_ms, self._down_until_ms = made, 0, 0
        return made

    def _down(self, why: str) -> PortDown:
        self._drop()
        self._down_ms = min(DOWN_MS_MAX, max(DOWN_MS_MIN, 2 * self._down_ms))
        self._down_until_ms = _clock.boot_ms() + self._down_ms
        return PortDown(why)

    def _drop(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _told(self, notice: Notice) -> None:
        if self._tell is not None:
            self._tell(notice)


class Line:
    """One connection. For one thread at a time."""

    def __init__(self, stream: Stream, tell: Tell) -> None:
        self._stream, self._tell = stream, tell
        self.handles: dict[str, int] = {}
        self.leave_ms = 0.0
        self._left: list[str] = []
        self._dead: list[int] = []
        """Handles that are to be closed and then free."""
        self._free: list[int] = []
        self._next_handle = 0
        self._tag = 0
        self._data, self._at = b"", 0
        """What has been received, and how far it has been read."""

    def hello(self, session: str, end_ms: float) -> None:
        payload = session.encode()
        answer = self.ask(frames.HELLO, 0, 0, frames.VERSION, payload, end_ms)
        if isinstance(answer, FabricError):
            raise answer
        version, _, age_ms = frames.HELLO_ANSWER.unpack(answer)
        if version != frames.VERSION:
            raise failure.of("VERSION", "data port")
        self.leave_ms = _clock.boot_ms() + age_ms * AGE_PART

    def open(
        self, lease_id: str, epoch: int, end_ms: float, chain: bytes | None = None
    ) -> int | FabricError:
        """The handle of a lease, or of the share that a chain ends with, from now on."""
        if len(self.handles) >= frames.HANDLES_MAX:
            self.leave(next(iter(self.handles)))
        self._close_left(end_ms)
        handle = self._free.pop() if self._free else self._next_handle
        if chain is not None:
            answer = self.ask(frames.SHARE, handle, 0, 0, chain, end_ms)
        else:
            answer = self.ask(frames.OPEN, handle, epoch, 0, bytes.fromhex(lease_id), end_ms)
        if isinstance(answer, FabricError):
            if handle != self._next_handle:
                self._free.append(handle)
            return answer
        if handle == self._next_handle:
            self._next_handle += 1
        self.handles[lease_id] = handle
        return handle

    def leave(self, lease_id: str) -> None:
        """From any thread: close the handle at the next opportunity."""
        self._left.append(lease_id)

    def disown(self, lease_id: str) -> None:
        """Use its handle no more."""
        handle = self.handles.pop(lease_id, None)
        if handle is not None:
            self._dead.append(handle)

    def ask(
        self, op: int, handle: int, offset: int, count: int, payload: Any, end_ms: float
    ) -> bytes | FabricError:
        """One small request and what answers it."""
        self._tag = tag = self._tag + 1 & TAG_MASK
        self._send(_REQUEST(len(payload), op, 0, handle, tag, count, offset) + payload, end_ms)
        if self._at == len(self._data):
            data = self._piece(RECEIVE_BYTES if count > 4000 else 4096, end_ms)
            length, kind, _, _, got = _ANSWER(data) if len(data) >= _HEADER else (0,) * 5
            is_whole = len(data) == _HEADER + length and data[-1] == frames.GOOD
            if is_whole and kind == frames.DATA and got == tag:
                return data[_HEADER:-1]
            self._data, self._at = data, 0
        return self._answer(tag, end_ms)

    def read_pipelined(
        self, handle: int, parts: Sequence[tuple[int, int]], end_ms: float
    ) -> list[bytes] | FabricError:
        first = self._tags(len(parts))
        read, pack = frames.READ, _REQUEST
        self._send(
            b"".join(
                [
                    pack(0, read, 0, handle, (first + i) & TAG_MASK, length, offset)
                    for i, (offset, length) in enumerate(parts)
                ]
            ),
            end_ms,
        )
        found = self._alike(first, len(parts), parts[0][1], end_ms) if parts else []
        refused: FabricError | None = None
        for i in range(len(found), len(parts)):
            tag = (first + i) & TAG_MASK
            data, at = self._data, self._at
            if len(data) - at > _HEADER:
                length, kind, _, _, got = _ANSWER(data, at)
                end = at + _HEADER + length
                if end <= len(data) and kind == 1 and got == tag and data[end - 1] == 1:
                    found.append(data[at + _HEADER : end - 1])
                    self._at = end
                    continue
            answer = self._answer(tag, end_ms)
            if isinstance(answer, FabricError):
                refused = refused or answer
            else:
                found.append(answer)
        return refused or found

    def _alike(self, first: int, count: int, length: int, end_ms: float) -> list[bytes]:
        """Good answers of `length` bytes that have come together, taken apart in one go; none where
        one of them is anything else, and then all of them are still to be read."""
        if self._at == len(self._data):
            self._data, self._at = self._piece(RECEIVE_BYTES, end_ms), 0
        shape = _shape_of_good(length)
        count = min(count, (len(self._data) - self._at) // shape.size)
        end = self._at + count * shape.size
        rows = shape.iter_unpack(memoryview(self._data)[self._at : end])
        if not count:
            return []
        lengths, kinds, _, _, tags, found, verdicts = zip(*rows, strict=True)
        if (
            set(lengths) != {length + 1}
            or set(kinds) != {frames.DATA}
            or set(verdicts) != {frames.GOOD}
            or tags != tuple(range(first, first + count))
        ):
            return []
        self._at = end
        return list(found)

    def read_large(
        self, handle: int, offset: int, length: int, end_ms: float
    ) -> bytes | FabricError:
        parts = []
        for answer in self._large_answers(handle, offset, length, None, end_ms):
            if isinstance(answer, FabricError):
                return answer
            parts.append(answer)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(
        self, handle: int, offset: int, view: memoryview, end_ms: float
    ) -> FabricError | None:
        for answer in self._large_answers(handle, offset, len(view), view, end_ms):
            if isinstance(answer, FabricError):
                return answer
        return None

    def write_large(
        self, handle: int, offset: int, data: bytes | memoryview, flush: bool, end_ms: float
    ) -> bytes | FabricError:
        view = memoryview(data)
        starts = range(0, len(view), WRITE_BYTES)
        first, refused = self._tags(len(starts) + flush), None
        for i, start in enumerate(starts):
            part = view[start : start + WRITE_BYTES]
            tag = (first + i) & TAG_MASK
            head = _REQUEST(len(part), frames.WRITE, 0, handle, tag, len(part), offset + start)
            self._send(head, end_ms, more=True)
            self._send(part, end_ms)
        if flush:
            tag = (first + len(starts)) & TAG_MASK
            self._send(_REQUEST(0, frames.FLUSH, 0, handle, tag, 0, 0), end_ms)
        for i in range(len(starts) + flush):
            answer = self._answer((first + i) & TAG_MASK, end_ms)
            if isinstance(answer, FabricError):
                refused = refused or answer
        return refused or b""

    def listen(self) -> None:
        """Take notices that are here."""
        try:
            while piece := self._stream.receive_now():
                self._data, self._at = self._data[self._at :] + piece, 0
            raise _Lost("the node ended the connection", sent=False)
        except BlockingIOError:
            pass
        while len(self._data) - self._at >= _HEADER:
            length, kind, *_ = _ANSWER(self._data, self._at)
            if kind != frames.NOTICE or len(self._data) - self._at < _HEADER + length:
                return
            self._at += _HEADER
            self._hear(self._exactly(length, 0))

    def close(self) -> None:
        self._stream.close()

    def _large_answers(
        self, handle: int, offset: int, length: int, view: memoryview | None, end_ms: float
    ) -> Iterable[bytes | FabricError]:
        """All are asked for at once; each is received where it belongs."""
        starts = range(0, max(1, length), READ_BYTES)
        first = self._tags(len(starts))
        asked = [
            _REQUEST(
                0, frames.READ, 0, handle, (first + i) & TAG_MASK,
                min(READ_BYTES, length - start), offset + start,
            )
            for i, start in enumerate(starts)
        ]  # fmt: skip
        self._send(b"".join(asked), end_ms)
        refused: FabricError | None = None
        for i, start in enumerate(starts):
            count = min(READ_BYTES, length - start)
            into = None if view is None else view[start : start + count]
            answer = self._answer((first + i) & TAG_MASK, end_ms, count, into)
            if isinstance(answer, FabricError):
                refused = refused or answer
            elif refused is None:
                yield answer
        if refused is not None:
            yield refused

    def _tags(self, count: int) -> int:
        """The first of so many tags that follow each other."""
        first = self._tag + 1
        self._tag = self._tag + count & TAG_MASK
        return first

    def _close_left(self, end_ms: float) -> None:
        while self._left:
            self.disown(self._left.pop())
        while self._dead:
            handle = self._dead.pop()
            self.ask(frames.CLOSE, handle, 0, 0, b"", end_ms)
            self._free.append(handle)

    def _answer(
        self, tag: int, end_ms: float, count: int = -1, into: memoryview | None = None
    ) -> bytes | FabricError:
        """The answer with this tag, or the refusal; notices may come before it.

        `count`: of a large one, which is received into its place.
        """
        void = False
        while True:
            header = self._exactly(_HEADER, end_ms, exact=count >= 0)
            length, kind, _, _, got = _ANSWER(header)
            if kind == frames.DATA and got == tag and not void:
                if count >= 0 and length != count + 1:
                    raise _Lost("an answer of another length", sent=True)
                data = self._body(length - 1, end_ms, into)
                if self._exactly(1, end_ms, exact=count >= 0)[0] == frames.GOOD:
                    return data
                void = True
                continue
            if length > frames.JSON_BYTES_MAX or kind not in (frames.REFUSAL, frames.NOTICE):
                raise _Lost("not an answer", sent=True)
            text = self._exactly(length, end_ms)
            if kind == frames.NOTICE:
                self._hear(text)
            elif got == tag:
                return frames.failure_of(frames.fields_of(text))
            else:
                raise _Lost("an answer to something else", sent=True)

    def _body(self, count: int, end_ms: float, into: memoryview | None) -> bytes:
        if into is not None:
            self._fill(into, end_ms)
            return b""
        return self._exactly(count, end_ms)

    def _hear(self, text: bytes) -> None:
        fields = frames.fields_of(text)
        if fields.get("lease_id"):
            self._tell(notice_of(fields))

    def _exactly(self, count: int, end_ms: float, *, exact: bool = False) -> bytes:
        """`exact`: take nothing off the wire that is behind it."""
        at, data = self._at, self._data
        if at + count <= len(data):
            self._at = at + count
            return data[at : at + count]
        self._data, self._at = b"", 0
        parts, missing = [data[at:]] if at < len(data) else [], count - (len(data) - at)
        while missing:
            wanted = missing if exact or missing > RECEIVE_BYTES else RECEIVE_BYTES
            piece = self._piece(wanted, end_ms)
            if len(piece) > missing:
                self._data, self._at = piece, missing
                piece = piece[:missing]
            parts.append(piece)
            missing -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self, view: memoryview, end_ms: float) -> None:
        there = self._data[self._at : self._at + len(view)]
        self._at += len(there)
        view[: len(there)] = there
        view = view[len(there) :]
        while view:
            try:
                count = self._stream.receive_into(view)
            except BlockingIOError:
                self._check_time(end_ms)
                continue
            except OSError as error:
                raise _Lost(str(error), sent=True) from None
            if not count:
                raise _Lost("the node ended the connection", sent=True)
            view = view[count:]

    def _piece(self, count: int, end_ms: float) -> bytes:
        while True:
            try:
                piece = self._stream.receive(count, whole=count > RECEIVE_BYTES)
            except BlockingIOError:
                self._check_time(end_ms)
                continue
            except OSError as error:
                raise _Lost(str(error), sent=True) from None
            if not piece:
                raise _Lost("the node ended the connection", sent=True)
            return piece

    def _send(self, data: bytes | memoryview, end_ms: float, *, more: bool = False) -> None:
        rest: bytes | memoryview = data
        while True:
            try:
                sent = self._stream.send(rest, more=more)
            except BlockingIOError:
                self._check_time(end_ms)
                continue
            except OSError as error:
                raise _Lost(str(error), sent=len(rest) < len(data)) from None
            if sent == len(rest):
                return
            rest = memoryview(rest)[sent:]

    def _check_time(self, end_ms: float) -> None:
        if _clock.boot_ms() >= end_ms:
            raise failure.of("DEADLINE", "data port")
