"""Every disk that a power cut can leave while a real program writes its files.

    program ─► recorded calls ─► before each sync and each word given: what may be on the disk
            ─► the real code is started on each of these disks ─► a law, or what broke it

Rules. What was synced is there. Of what was not, anything may be: a prefix, all but one call, a
call of which only some sectors arrived, or the length of a file without its bytes, any seeded
subset. A sector arrives whole or not at all. A sync of a file makes its own bytes and
its own name durable, as ext4, XFS and Btrfs do; a sync of a folder the names in it. Names that were
not synced come and go by themselves. A disk that was judged once is not judged again.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.disk.board import Disk, Fault, Op

ROOT: Final = Path(__file__).resolve().parents[2]
SECTOR_BYTES: Final = 512
SAID: Final = "said"
"""A program appends a line here when it has promised something; the file is not on the disk."""
PENDING_MAX: Final = 64
"""Of more calls that were not synced, the oldest count as arrived."""
_HEAD: Final = struct.Struct("<IIqQ")

Image = dict[str, bytes]
"""Path below the folder to content."""


@dataclass(frozen=True, slots=True)
class Step:
    op: Op
    path: str
    """Below the folder."""
    offset: int = 0
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Change:
    """One step as the disk knows it: of a file, whatever its name is, or of a name."""

    step: Step
    file: int


def record(
    workload: str, folder: Path, disk_folder: Path, kills: Sequence[tuple[str, Op, int]] = ()
) -> list[Step]:
    """What `python -m tests.disk.workload <workload> <folder>` does to its files, in order.

    Before that it was killed at these calls: the n-th of a sort on a path that holds such a text.
    """
    log = disk_folder / "log"
    disk = Disk(disk_folder, folder, log=log)
    try:
        for match, only, nth in kills:
            disk.arm(match, Fault.KILL_BEFORE, nth, only=only)
            if _run(workload, folder, disk) != -signal.SIGKILL:
                raise AssertionError(f"{workload} makes no {nth} such calls on {match}")
        disk.disarm()
        status = _run(workload, folder, disk)
    finally:
        disk.close()
    if status:
        raise AssertionError(f"{workload} ended with {status}")
    return list(steps_in(log.read_bytes(), str(folder.resolve())))


def _run(workload: str, folder: Path, disk: Disk) -> int:
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, **disk.environment}
    words = [sys.executable, "-m", "tests.disk.workload", workload, str(folder)]
    return subprocess.run(words, check=False, timeout=60, env=environment, cwd=ROOT).returncode


def steps_in(data: bytes, under: str) -> Iterator[Step]:
    at = 0
    while at < len(data):
        op, path_bytes, offset, data_bytes = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        path = data[at : at + path_bytes].decode()
        at += path_bytes
        written = data[at : at + data_bytes]
        at += data_bytes
        if op == Op.RENAME:
            written = os.path.relpath(written.decode(), under).encode()
        yield Step(Op(op), os.path.relpath(path, under), offset, written)


@dataclass(slots=True)
class Platter:
    """What is durable, and what was only written. Names and contents are kept apart."""

    names: dict[str, int] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    """Names as the running program sees them."""
    count: int = 0

    def take(self, step: Step) -> None:
        if step.op is Op.SYNC:
            self._sync(step.path)
            return
        if step.path not in self.live:
            self.count += 1
            self.live[step.path] = self.count
            self.pending.append(Change(Step(Op.CREATE, step.path), self.count))
        file = self.live[step.path]
        if step.op is Op.CREATE:
            return
        if step.op in (Op.RENAME, Op.UNLINK):
            del self.live[step.path]
        if step.op is Op.RENAME:
            self.live[step.data.decode()] = file
        self.pending.append(Change(step, file))
        if len(self.pending) > PENDING_MAX:
            self._settle(self.pending[:1])

    def _sync(self, path: str) -> None:
        if path in self.live:
            file = self.live[path]
            self._settle([each for each in self.pending if each.file == file])
            return
        self._settle([each for each in self.pending if _is_name_in(path, each.step)])

    def _settle(self, changes: Sequence[Change]) -> None:
        for each in changes:
            _apply(each, self.names, self.contents)
        gone = set(map(id, changes))
        self.pending = [each for each in self.pending if id(each) not in gone]

    def image(self, kept: Sequence[Change]) -> Image:
        names, contents = dict(self.names), dict(self.contents)
        for each in kept:
            _apply(each, names, contents)
        return {name: contents.get(file, b"") for name, file in names.items()}

    def after_power_cut(self, dice: random.Random, subsets: int) -> Iterator[Image]:
        there = self.pending
        for count in range(len(there) + 1):
            yield self.image(there[:count])
            if count and there[count - 1].step.op is Op.WRITE:
                before = there[: count - 1]
                yield from (self.image([*before, torn]) for torn in _torn(there[count - 1], dice))
        for missing in range(len(there)):
            yield self.image([*there[:missing], *there[missing + 1 :]])
        for _ in range(subsets if len(there) > 2 else 0):
            some = [each for each in there if dice.random() < 0.5]
            yield self.image([_worn(each, dice) for each in some])


def _is_name_in(folder: str, step: Step) -> bool:
    if step.op not in (Op.CREATE, Op.RENAME, Op.UNLINK):
        return False
    return (os.path.dirname(step.path) or ".") == folder


def _apply(change: Change, names: dict[str, int], contents: dict[int, bytes]) -> None:
    step, file = change.step, change.file
    old = contents.get(file, b"")
    match step.op:
        case Op.CREATE:
            names[step.path] = file
        case Op.RENAME:
            names.pop(step.path, None)
            names[step.data.decode()] = file
        case Op.UNLINK:
            names.pop(step.path, None)
        case Op.WRITE:
            end = step.offset + len(step.data)
            whole = old.ljust(end, b"\0")
            contents[file] = whole[: step.offset] + step.data + whole[end:]
        case Op.TRUNCATE:
            contents[file] = old[: step.offset].ljust(step.offset, b"\0")
        case Op.ALLOCATE:
            contents[file] = old.ljust(step.offset, b"\0")
        case Op.SYNC:
            raise AssertionError("a sync is never pending")


def _torn(change: Change, dice: random.Random) -> Iterator[Change]:
    """The first sectors, the last sectors; or none, though the file is as long as with them."""
    start, data = change.step.offset, change.step.data
    cuts = range(SECTOR_BYTES - start % SECTOR_BYTES, len(data), SECTOR_BYTES)
    if cuts:
        cut = dice.choice(cuts)
        yield _only(change, 0, cut)
        yield _only(change, cut, len(data))
    yield Change(Step(Op.ALLOCATE, change.step.path, start + len(data)), change.file)


def _worn(change: Change, dice: random.Random) -> Change:
    if change.step.op is not Op.WRITE or dice.random() < 0.5:
        return change
    return next(iter(_torn(change, dice)))


def _only(change: Change, start: int, end: int) -> Change:
    step = change.step
    return Change(Step(Op.WRITE, step.path, step.offset + start, step.data[start:end]), change.file)


Judge = Callable[[Path, Sequence[str]], str]
"""A folder with a disk in it, and what was said until then; what is wrong, or nothing."""


@dataclass(slots=True)
class Verdict:
    states: int = 0
    wrong: list[str] = field(default_factory=list)


def judged(
    steps: Sequence[Step], judge: Judge, *, seed: int, subsets: int, wrong_max: int = 1000
) -> Verdict:
    """Every instant's disks, each started by the real code; enough of them are wrong: stop."""
    platter, dice, verdict = Platter(), random.Random(f"power cut {seed}"), Verdict()
    said: list[str] = []
    seen: set[bytes] = set()
    for number, step in enumerate([*steps, Step(Op.SYNC, SAID)]):
        if step.path == SAID and step.op is Op.WRITE:
            said = [*said, *step.data.decode().splitlines()]
        if step.op is Op.SYNC or step.path == SAID:
            for image in platter.after_power_cut(dice, subsets):
                name = _digest(image, said)
                if name not in seen:
                    seen.add(name)
                    _judge_one(image, said, judge, verdict, f"before step {number} ({step.op.name}"
                               f" {step.path})")  # fmt: skip
        if len(verdict.wrong) >= wrong_max:
            break
        if step.path != SAID:
            platter.take(step)
    return verdict


def _digest(image: Image, said: Sequence[str]) -> bytes:
    whole = hashlib.sha256("\n".join(said).encode())
    for name in sorted(image):
        whole.update(f"{name} {len(image[name])} ".encode())
        whole.update(image[name])
    return whole.digest()


def _judge_one(
    image: Image, said: Sequence[str], judge: Judge, verdict: Verdict, where: str
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="cut-", dir=_quick_folder()))
    try:
        for name, data in image.items():
            path = folder / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o600)
        problem = judge(folder, said)
    finally:
        shutil.rmtree(folder)
    verdict.states += 1
    if problem:
        verdict.wrong.append(f"{where}: {problem}")


def _quick_folder() -> str | None:
    """The disks are judged one by one and never cut again: memory will do."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
