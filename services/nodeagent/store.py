"""The node agent's files: the spool of everything it ever did, and the slip that says how far.

Like a bound ledger with its pages numbered in advance: no entry ever waits for paper, no page can
be torn out unseen, and only one clerk at a time has the book.

    <state>/lock              held by the one agent that may write here
    <state>/node.key          the node's Ed25519 key, readable for its owner only
    <state>/surface/spool.n   segments of one size, written full of zeros before they are used
    <state>/surface/head      two slots; the file appears when all else is formatted

Rules. What is written, and in which order, `grafos_core.surface` says; here it is done. An error of
the disk is never tried again: the store is halted, and whoever owns it ends and recovers. A full
disk cannot hit a write, since the next segment and one in reserve lie ready; where the reserve can
not be made the store is `full`: nothing new is bound, while endings still have their room. A state
that is damaged, cut short or of another version is refused by name and never repaired.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, overload

from grafos_core import failure, surface
from grafos_core.chain import VerifySeal
from services.runtime.faults import fault

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SEGMENT_BYTES: Final = 4 << 20
SEGMENTS_MAX: Final = 64
"""256 MiB: more than an hour of records at full rate while the collector is away."""
AHEAD: Final = 2
"""Segments that lie ready behind the one in use: the next, and the reserve for endings."""

_SEGMENT_NAME = re.compile(r"spool\.(0|[1-9][0-9]{0,9})")
_ZEROS: Final = bytes(1 << 20)


class Store:
    """The open files of one agent; holds the lock for as long as it lives."""

    def __init__(
        self,
        folder: Path,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        segments_max: int = SEGMENTS_MAX,
        batch_bytes_max: int = surface.BATCH_BYTES_MAX,
    ) -> None:
        self.folder, self._surface_folder = folder, folder / "surface"
        self.segment_bytes, self.segments_max = segment_bytes, segments_max
        self.batch_bytes_max = batch_bytes_max
        self.full = False
        """The disk has no room for the reserve: bind nothing new."""
        self._halted = False
        self._segment_fds: dict[int, int] = {}
        self._lock_fd = _locked(folder)
        if not is_formatted(folder):
            os.close(self._lock_fd)
            raise failure.of("STORAGE", "this folder was never formatted")
        self._head_fd = os.open(self._surface_folder / "head", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        for fd in (*self._segment_fds.values(), self._head_fd, self._lock_fd):
            os.close(fd)
        self._segment_fds.clear()

    def signing_key(self) -> Ed25519PrivateKey:
        return _read_key(self.folder / "node.key")

    def start(self, verify: VerifySeal | None = None) -> tuple[surface.Surface, surface.Recovered]:
        """Read everything, refuse what is not whole, and begin the next boot epoch, durably."""
        numbers = _segment_numbers(self._surface_folder)
        first = _check_numbers(numbers)
        recovered = surface.recover(
            _Segments(self._surface_folder, numbers),
            os.pread(self._head_fd, surface.HEAD_BYTES + 1, 0),
            first_segment=first,
            verify=verify,
        )
        for number in numbers:
            self._open_segment(number, recovered)
        writer, effects = surface.resume(
            recovered,
            segment_bytes=self.segment_bytes,
            segments_max=self.segments_max,
            batch_bytes_max=self.batch_bytes_max,
        )
        self.perform(effects)
        self.prepare(recovered.segment)
        return writer, recovered

    def perform(self, effects: Iterable[surface.Effect]) -> None:
        """Do what the core says, in its order. Everything is durable when this returns."""
        if self._halted:
            raise failure.of("STORAGE", "halted after an error of the disk")
        begun = None
        for effect in effects:
            try:
                self._perform(effect)
            except OSError as error:
                self._halted = True
                name = errno.errorcode.get(error.errno or 0, "an error")
                raise failure.of("STORAGE", f"{name} at {type(effect).__name__}") from error
            if isinstance(effect, surface.WriteSpool) and effect.offset == 0:
                begun = effect.segment
        if begun is not None:
            self.prepare(begun)

    def has_next(self, segment: int) -> bool:
        """Whether the segment after this one lies ready. Ask before `begin_segment`."""
        return segment + 1 in self._segment_fds

    def prepare(self, segment: int) -> None:
        """Have the segments after this one ready; `full` says whether the disk had room."""
        wanted = range(segment + 1, segment + 1 + AHEAD)
        try:
            for number in wanted:
                if number not in self._segment_fds:
                    fault("surface.segment")
                    _make_segment(self._surface_folder, number, self.segment_bytes)
                    self._open_segment(number)
            self.full = False
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                self._halted = True
                raise failure.of("STORAGE", "the next segment cannot be made") from error
            self.full = True

    def _perform(self, effect: surface.Effect) -> None:
        match effect:
            case surface.WriteSpool(segment, offset, data):
                fault("surface.append")
                if segment not in self._segment_fds:
                    raise OSError(errno.ENOSPC, "the segment was never made")
                _write(self._segment_fds[segment], offset, data)
            case surface.SyncSpool(segment):
                fault("surface.sync")
                os.fdatasync(self._segment_fds[segment])
            case surface.WriteSlot(index, data):
                fault("surface.head")
                _write(self._head_fd, index * surface.SLOT_BYTES, data)
            case surface.SyncHead():
                fault("surface.head_sync")
                os.fdatasync(self._head_fd)
            case surface.DropSegment(segment):
                self._drop(segment)

    def _drop(self, segment: int) -> None:
        os.close(self._segment_fds.pop(segment))
        os.unlink(_segment_path(self._surface_folder, segment))
        _sync_folder(self._surface_folder)

    def _open_segment(self, number: int, recovered: surface.Recovered | None = None) -> None:
        fd = os.open(_segment_path(self._surface_folder, number), os.O_RDWR | os.O_CLOEXEC)
        size_bytes = os.fstat(fd).st_size
        self._segment_fds[number] = fd
        if size_bytes != self.segment_bytes:
            after = f", after record {recovered.number}" if recovered else ""
            detail = f"spool.{number} has {size_bytes} bytes and not {self.segment_bytes}{after}"
            raise failure.of("STORAGE", detail)


def is_formatted(folder: Path) -> bool:
    return (folder / "surface" / "head").exists()


def format_store(folder: Path, incarnation: str, *, segment_bytes: int = SEGMENT_BYTES) -> None:
    """Make an empty store, once, when a node is provisioned. Cut off, it is simply done again."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock_fd = _locked(folder)
    try:
        _check_blank(folder)
        try:
            _format(folder, incarnation, segment_bytes)
        except OSError as error:
            code = "DISK" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "STORAGE"
            raise failure.of(code, "the node's state cannot be formatted") from error
    finally:
        os.close(lock_fd)


def _check_blank(folder: Path) -> None:
    """A head that is gone from beside a written spool is damage, not a new node."""
    if is_formatted(folder):
        raise failure.of("STORAGE", "this folder is formatted already")
    for number in _segment_numbers(folder / "surface"):
        if _segment_path(folder / "surface", number).read_bytes().strip(b"\0"):
            raise failure.of("STORAGE", f"the head file is missing beside a written spool.{number}")


def _format(folder: Path, incarnation: str, segment_bytes: int) -> None:
    surface_folder = folder / "surface"
    surface_folder.mkdir(mode=0o700, exist_ok=True)
    _write_key(folder / "node.key")
    for number in range(1 + AHEAD):
        _make_segment(surface_folder, number, segment_bytes)
    head, making = surface_folder / "head", surface_folder / "head.new"
    fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for effect in surface.formatted(incarnation):
            if isinstance(effect, surface.WriteSlot):
                _write(fd, effect.index * surface.SLOT_BYTES, effect.data)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    os.rename(making, head)
    _sync_folder(surface_folder)
    _sync_folder(folder)


def _locked(folder: Path) -> int:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise failure.of("STORAGE", "another agent is using this folder") from None
    return fd


def _segment_path(folder: Path, number: int) -> Path:
    return folder / f"spool.{number}"


def _segment_numbers(folder: Path) -> list[int]:
    if not folder.exists():
        return []
    found = (_SEGMENT_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


def _check_numbers(numbers: list[int]) -> int:
    """The first of them; one that is missing in between took records with it."""
    if not numbers:
        raise failure.of("STORAGE", "the spool is missing")
    for before, number in pairwise(numbers):
        if number != before + 1:
            raise failure.of("STORAGE", f"spool.{before + 1} is missing")
    return numbers[0]


class _Segments(Sequence[bytes]):
    """The segments' contents, each read when it is looked at and then forgotten."""

    def __init__(self, folder: Path, numbers: list[int]) -> None:
        self._folder, self._numbers = folder, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return _Segments(self._folder, self._numbers[index])
        try:
            return _segment_path(self._folder, self._numbers[index]).read_bytes()
        except OSError as error:
            raise failure.of("STORAGE", f"spool.{self._numbers[index]} cannot be read") from error


def _make_segment(folder: Path, number: int, segment_bytes: int) -> None:
    """A file of zeros that are on the disk; it has its name only when it is whole.

    Zeros are written, not only reserved: else each later sync would also have to record that a
    piece of the reservation is now in use.
    """
    path, making = _segment_path(folder, number), folder / "segment.new"
    fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, segment_bytes)
        for offset in range(0, segment_bytes, len(_ZEROS)):
            _write(fd, offset, _ZEROS[: segment_bytes - offset])
        os.fdatasync(fd)
    except OSError:
        os.unlink(making)
        raise
    finally:
        os.close(fd)
    os.rename(making, path)
    _sync_folder(folder)


def _write(fd: int, offset: int, data: bytes) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.EIO, "short write")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_key(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, Ed25519PrivateKey.generate().private_bytes_raw())
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except OSError:
        raise failure.of("STORAGE", "the node's key cannot be read") from None
    if mode & 0o077:
        raise failure.of("STORAGE", "the node's key is readable for others")
    if len(data) != 32:
        raise failure.of("STORAGE", "the node's key is damaged")
    return Ed25519PrivateKey.from_private_bytes(data)
