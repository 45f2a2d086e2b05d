"""`grafos demo`: what a lease is, shown on a fabric of its own with real processes.

Every step says what it does, does it, and looks whether it is as it should be: not by asking who
did it, but from outside, by the kernel's own count of a memory file's pages where memory is
concerned. A step that is not as it should be is said so, and the exit status is 1.

    grafos demo                 the demonstration
    python -m grafos._demo …    the programs that it starts, to be killed or to end
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from grafos import _clock
from grafos._cluster.description import start_ticks
from grafos._cluster.layout import shown_size
from grafos._cluster.programs import environment
from grafos._local import LocalFabric
from grafos_core import failure
from grafos_core.failure import FabricError, Fenced, LeaseExpired

MIB: Final = 1 << 20
NODE_BYTES: Final = 128 * MIB
KILLED_BYTES: Final = 64 * MIB
LOOK_MS: Final = 1
WAIT_MS_MAX: Final = 15_000
BACK_MS_MAX: Final = 500
"""Within which memory must be back, whatever else this machine does meanwhile. How fast it really
is, the demonstration prints; what to expect, the measurements of `make bench` say."""
BROKEN: Final = "memory.erase:EIO"
_ASSURANCES: Final = {
    "freed": "freed: nobody else ever had a descriptor",
    "detached": "detached: its descriptor had been handed to us, and is of no use any more",
}
KEPT_WORDS: Final = b"left here by a program that has ended"


class Teller:
    """Says what happens, with times, and remembers what was not as it should be."""

    def __init__(self, steps_count: int) -> None:
        self._started_ms = _clock.boot_ms()
        self._steps_count, self._step, self.faults = steps_count, 0, 0

    def step(self, title: str) -> None:
        self._step += 1
        print(f"\n[{self._step}/{self._steps_count}] {title}  ({self._at()})", flush=True)

    def say(self, text: str) -> None:
        print(f"      {text}", flush=True)

    def check(self, is_right: bool, text: str) -> bool:
        """One thing that must hold; whether it does."""
        if not is_right:
            self.faults += 1
        print(f"   {'ok' if is_right else 'NO'} {text}", flush=True)
        return is_right

    def failed(self, what: object) -> None:
        self.check(False, f"the step broke off: {type(what).__name__}: {what}")

    def _at(self) -> str:
        return f"{(_clock.boot_ms() - self._started_ms) / 1000:.1f} s"


class Eye:
    """Looks at one lease's memory from outside: a descriptor of the demo's own on the memory file.

    It is found through /proc in the warden, which keeps one for each lease that is held.
    """

    def __init__(self, warden_pid: int, lease_id: str) -> None:
        self._descriptor = _open_memory(warden_pid, lease_id)

    def resident_bytes(self) -> int:
        """Pages that the kernel keeps for it, from wherever it may be mapped."""
        return os.fstat(self._descriptor).st_blocks * 512

    def gone_after_ms(self, since_ns: int) -> float | None:
        """When the last page was gone, counted from that instant; None: it never was."""
        while self.resident_bytes() > 0:
            if _clock.boot_ns() - since_ns > WAIT_MS_MAX * 1_000_000:
                return None
            _clock.sleep_ms(LOOK_MS)
        return (_clock.boot_ns() - since_ns) / 1e6

    def close(self) -> None:
        os.close(self._descriptor)


def _open_memory(pid: int, lease_id: str) -> int:
    folder = Path(f"/proc/{pid}/fd")
    for entry in os.listdir(folder):
        try:
            if lease_id in os.readlink(folder / entry):
                return os.open(folder / entry, os.O_RDONLY)
        except OSError:
            continue  # closed in the meantime
    raise FileNotFoundError(f"process {pid} holds no memory of lease {lease_id}")


class Demo:
    """The steps, in their order, on one running fabric."""

    def __init__(self, fabric: LocalFabric, teller: Teller) -> None:
        from grafos._cli.operator import Operator

        self._fabric, self._teller = fabric, teller
        where = argparse.Namespace(
            run_dir=str(fabric.layout.run), state_dir=str(fabric.layout.state)
        )
        self._operator = Operator(where)

    def run(self) -> None:
        for step in (
            self.memory, self.blocks, self.renewal, self.expiry, self.holder_killed, self.kept,
            self.agent_killed, self.fenced, self.audit,
        ):  # fmt: skip
            try:
                step()
            except (FabricError, OSError, subprocess.SubprocessError) as broken:
                self._teller.failed(broken)
        self._operator.close()

    # what users do

    def memory(self) -> None:
        from grafos import MemBuilder

        self._teller.step("memory: a file goes into leased memory and comes back")
        path, data, digest = _sample()
        with MemBuilder().min_bytes(len(data)).lease_secs(30).where(node="n1").acquire() as lease:
            self._teller.say(
                f"leased {shown_size(lease.mem().arena_size)} at {lease.node_id} for 30 s "
                f"(lease {lease.lease_id[:8]}, epoch {lease.epoch})"
            )
            started_ns = _clock.boot_ns()
            lease.mem().write(0, data)
            back = lease.mem().read(0, len(data))
            took_us = (_clock.boot_ns() - started_ns) / 1000
            self._compare(path, data, digest, back, took_us)
            eye = self._eye(lease)
            receipt = lease.release()
        self._teller.check(
            receipt.credited and receipt.outcome == "torndown" and eye.resident_bytes() == 0,
            f"given back, no page is left; the node's signed receipt says {receipt.outcome}, "
            f"{_ASSURANCES.get(receipt.assurance, receipt.assurance)}",
        )
        eye.close()

    def blocks(self) -> None:
        from grafos import BlockBuilder

        self._teller.step("blocks: the same file on leased, encrypted disk blocks")
        path, data, digest = _sample()
        count = -(-len(data) // 4096)
        with BlockBuilder().min_blocks(count).lease_secs(30).acquire() as lease:
            self._teller.say(f"leased {count} blocks of 4096 bytes at {lease.node_id}")
            started_ns = _clock.boot_ns()
            lease.block().write_blocks(0, data.ljust(count * 4096, b"\0"))
            lease.block().flush()
            back = lease.block().read_blocks(0, count)[: len(data)]
            took_us = (_clock.boot_ns() - started_ns) / 1000
            self._compare(path, data, digest, back, took_us)
            receipt = lease.release()
        self._teller.check(
            receipt.credited, f"given back: key destroyed, extent zeroed, {receipt.outcome}"
        )

    def renewal(self) -> None:
        from grafos import MemBuilder

        self._teller.step("renewal: more time, for whoever asks in time")
        with MemBuilder().min_bytes(4096).lease_secs(2).where(node="n1").acquire() as lease:
            _clock.sleep_ms(700)
            before_ms = lease.remaining_ms()
            after_ms = lease.renew()
            self._teller.check(
                before_ms < 1_400 < after_ms <= 2_000 and lease.generation == 2,
                f"{before_ms} ms were left, now {after_ms} ms are; same epoch, generation 2",
            )

    def expiry(self) -> None:
        from grafos import MemBuilder

        self._teller.step("expiry: a lease ends while it is being used")
        lease = MemBuilder().min_bytes(MIB).lease_secs(1).where(node="n1").acquire()
        eye = self._eye(lease)
        end_ns = _clock.boot_ns() + lease.remaining_ms() * 1_000_000
        count, failed = _write_until_refused(lease.mem())
        late_ms = (_clock.boot_ns() - end_ns) / 1e6
        self._teller.check(
            isinstance(failed, LeaseExpired),
            f"after {count} writes the next one raised {type(failed).__name__}, "
            f"{late_ms:+.0f} ms round the deadline",
        )
        gone_ms = eye.gone_after_ms(end_ns)
        eye.close()
        self._was_taken("its memory was taken back", gone_ms, "after the deadline")
        self._settled(lease.lease_id)

    # what goes wrong

    def holder_killed(self) -> None:
        self._teller.step("a holder is killed with SIGKILL: it cannot clean up, others do")
        with self._program("killed") as (program, lease_id):
            eye = Eye(self._fabric.pids()["node-n1/warden"], lease_id)
            held = eye.resident_bytes()
            self._teller.say(f"another program has filled {shown_size(held)}; killing it")
            since_ns = _clock.boot_ns()
            program.kill()
            gone_ms = eye.gone_after_ms(since_ns)
            eye.close()
        self._was_taken(f"{shown_size(held)} are back", gone_ms, "after the kill")
        self._teller.check(held >= KILLED_BYTES, f"they had been there: {shown_size(held)}")
        self._settled(lease_id)

    def kept(self) -> None:
        from grafos import MemBuilder

        self._teller.step("a kept lease outlives its program; a new one takes it up")
        with self._program("kept") as (program, lease_id):
            program.wait(WAIT_MS_MAX / 1000)
        self._teller.say(f"a program wrote something and ended; lease {lease_id[:8]} lives on")
        with MemBuilder().attach(lease_id) as lease:
            words = lease.mem().read(0, len(KEPT_WORDS))
            self._teller.check(
                words == KEPT_WORDS and lease.generation == 2,
                f"attached (generation {lease.generation}); it reads: {words.decode('ascii')!r}",
            )

    def agent_killed(self) -> None:
        from grafos import MemBuilder

        self._teller.step("a node agent is killed with SIGKILL: its warden takes memory back")
        lease = MemBuilder().min_bytes(32 * MIB).where(node="n1").lease_secs(60).acquire()
        lease.mem().write(0, b"\xff" * (32 * MIB))
        eye = self._eye(lease)
        self._teller.say(f"{shown_size(eye.resident_bytes())} are leased at n1; killing its agent")
        since_ns = _clock.boot_ns()
        self._fabric.kill("node-n1")
        gone_ms = eye.gone_after_ms(since_ns)
        eye.close()
        self._was_taken("memory is back", gone_ms, "after the kill, with no agent there")
        refused = _refusal(lambda: lease.mem().read(0, 1))
        self._teller.check(
            isinstance(refused, Fenced),
            f"the holder's next read raised {type(refused).__name__} ({_code(refused)})",
        )
        is_back = _until(lambda: self._book("n1")["free"] == NODE_BYTES)
        took_ms = (_clock.boot_ns() - since_ns) / 1e6
        self._teller.check(
            is_back, f"the agent was started again and n1's capacity is whole, {took_ms:.0f} ms on"
        )

    def fenced(self) -> None:
        from grafos import MemBuilder

        self._teller.step("a teardown fails: that slice is fenced, nothing else is")
        lease = MemBuilder().min_bytes(8 * MIB).where(node="n2").acquire()
        lease.mem().write(0, b"this cannot be erased")
        self._teller.say(f"at n2 erasing memory fails on purpose ({BROKEN}); giving 8 MiB back")
        refused = _refusal(lease.release)
        is_refused = isinstance(refused, Fenced)
        if not self._teller.check(is_refused, f"release raised {type(refused).__name__}"):
            return
        is_counted = _until(lambda: self._book("n2")["fenced"] == 8 * MIB)
        self._teller.check(is_counted, "8 MiB of n2 are fenced: they serve nobody")
        self._neighbour_serves()
        self._repair("node-n2")
        self._teller.check(
            [each.lease_id for each in self._fences()] == [lease.lease_id],
            "the device is repaired and the agent started anew: the fence has survived that",
        )
        self._clear(lease.lease_id)
        is_free = _until(lambda: self._book("n2")["free"] == NODE_BYTES)
        self._teller.check(is_free, "an operator cleared it, it was measured again: all is free")

    def audit(self) -> None:
        from grafos._cli.chains import export_lines, verify_file

        self._teller.step("the audit chain of all this, taken out and checked without the fabric")
        with tempfile.TemporaryDirectory(prefix="grafos-demo-") as folder:
            path, keys = Path(folder) / "chains.jsonl", set[bytes]()
            _until(self._is_collected)
            lines = list(export_lines(self._operator, "", keys))
            path.write_text("".join(f"{line}\n" for line in lines), "ascii")
            started_ns = _clock.boot_ns()
            report = verify_file(path, keys)
            took_ms = (_clock.boot_ns() - started_ns) / 1e6
            records = sum(chain.number for chain in report.chains.values())
            self._teller.check(
                report.ok and {"ledger", "n1", "n2"} <= {name for name, _ in report.chains},
                f"{records} records in {len(report.chains)} chains: every link and seal is good "
                f"({took_ms:.0f} ms)",
            )
            for line, what in report.problems[:5]:
                self._teller.say(f"line {line}: {what}")
            self._kinds_are_there(lines)
            _change_one_digit(path)
            self._teller.check(
                not verify_file(path, keys).ok, "with one digit changed, the same check fails"
            )

    # looking

    def _compare(self, path: Path, data: bytes, digest: str, back: bytes, took_us: float) -> None:
        self._teller.check(
            hashlib.sha256(back).hexdigest() == digest,
            f"{path.name}, {shown_size(len(data))}, written and read back in {took_us:.0f} µs: "
            f"sha256 {digest[:16]}… both times",
        )

    def _was_taken(self, what: str, gone_ms: float | None, since: str) -> None:
        is_in_time = gone_ms is not None and gone_ms <= BACK_MS_MAX
        when = "never" if gone_ms is None else f"{gone_ms:.1f} ms {since}"
        self._teller.check(is_in_time, f"{what}; the last page was gone {when}, by fstat")

    def _settled(self, lease_id: str) -> None:
        from grafos._cli.operator import STATE_NAMES

        is_released = _until(
            lambda: STATE_NAMES[self._operator.lease(lease_id).state] == "released"
        )
        cause = self._operator.lease(lease_id).cause
        self._teller.check(is_released, f"the ledger has its receipt: released ({cause})")

    def _eye(self, lease: Any) -> Eye:
        return Eye(self._fabric.pids()[f"node-{lease.node_id}/warden"], lease.lease_id)

    def _book(self, node_id: str) -> dict[str, int]:
        from grafos_proto.v1 import lease_pb2

        for node in self._operator.snapshot().nodes:
            for book in node.books:
                if node.node_id == node_id and book.kind == lease_pb2.KIND_MEM:
                    return {"free": book.free, "fenced": book.fenced}
        return {"free": 0, "fenced": 0}

    def _fences(self) -> list[Any]:
        from grafos_proto.v1 import lease_pb2

        return self._operator.leases(state=lease_pb2.LEASE_STATE_FENCED)

    def _neighbour_serves(self) -> None:
        from grafos import BlockBuilder

        with BlockBuilder().min_blocks(1).where(node="n2").acquire() as neighbour:
            neighbour.block().write_block(0, b"n" * 4096)
            is_served = neighbour.block().read_block(0) == b"n" * 4096
        self._teller.check(is_served, "another lease at n2 works all the same")

    def _repair(self, name: str) -> None:
        """Without its fault from the next start on; and that start is now."""
        self._fabric.set_fault(name, "")
        self._fabric.kill(name)
        self._fabric.wait_ready()

    def _clear(self, lease_id: str) -> None:
        from grafos._cli.operator import new_request_id
        from grafos_proto.v1 import ledger_pb2

        order = ledger_pb2.ClearFence(
            request_id=new_request_id(), lease_id=lease_id, reason="demo: the device works again"
        )
        self._operator.commit(ledger_pb2.Command(clear=order))

    def _is_collected(self) -> bool:
        """Whether the collector has all that the ledger has sealed so far."""
        from grafos_proto.v1 import audit_pb2

        sealed = self._operator.snapshot().head
        heads = self._operator.audit("Head", audit_pb2.HeadRequest()).heads
        return any(each.origin == "ledger" and each.head == sealed for each in heads)

    def _kinds_are_there(self, lines: list[str]) -> None:
        wanted = ("granted", "bound", "renewed", "released", "fenced", "clear_ordered")
        text = "\n".join(lines)
        missing = [kind for kind in wanted if f'"lease.{kind}"' not in text]
        self._teller.check(
            not missing,
            f"recorded are grants, renewals, ends, the fence and its clear{_list(missing)}",
        )

    @contextmanager
    def _program(self, what: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A program of its own that holds a lease, and the lease's id."""
        given = {**environment(os.environ, ""), "GRAFOS_RUN_DIR": str(self._fabric.layout.run)}
        program = subprocess.Popen(
            [sys.executable, "-m", "grafos._demo", what],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given,
        )  # fmt: skip
        assert program.stdout is not None
        assert program.stdin is not None
        try:
            lease_id = program.stdout.readline().strip()
            if not lease_id:
                raise failure.of("NOT_READY", "the other program got no lease")
            yield program, lease_id
        finally:
            program.kill()
            program.wait()
            program.stdin.close()
            program.stdout.close()


def hold(what: str) -> int:
    """In a program of its own: hold a lease and wait to be killed, or leave it behind."""
    from grafos import MemBuilder, connect

    with connect():
        builder = MemBuilder().where(node="n1").lease_secs(60)
        if what == "kept":
            lease = builder.min_bytes(4096).keep().acquire()
            lease.mem().write(0, KEPT_WORDS)
            print(lease.lease_id, flush=True)
            return 0
        lease = builder.min_bytes(KILLED_BYTES).acquire()
        lease.mem().write(0, b"\xff" * KILLED_BYTES)
        print(lease.lease_id, flush=True)
        sys.stdin.read()
    return 0


def _sample() -> tuple[Path, bytes, str]:
    """The largest file of the installed package, its bytes and their digest."""
    path = max(Path(__file__).parent.rglob("*.py"), key=lambda each: each.stat().st_size)
    data = path.read_bytes()
    return path, data, hashlib.sha256(data).hexdigest()


def _write_until_refused(memory: Any) -> tuple[int, FabricError | None]:
    """How many writes went well, and what the next one raised."""
    until_ms, count = _clock.boot_ms() + WAIT_MS_MAX, 0
    while _clock.boot_ms() < until_ms:
        try:
            memory.write(count % MIB, b"x")
        except FabricError as refused:
            return count, refused
        count += 1
    return count, None


def _refusal(act: Callable[[], object]) -> FabricError | None:
    try:
        act()
    except FabricError as refused:
        return refused
    return None


def _code(refused: FabricError | None) -> str:
    return "nothing" if refused is None else refused.code


def _until(what: Callable[[], bool]) -> bool:
    """Whether it came true in time; a service that has just started may not answer at once."""
    until_ms = _clock.boot_ms() + WAIT_MS_MAX
    while _clock.boot_ms() < until_ms:
        try:
            if what():
                return True
        except FabricError:
            pass
        _clock.sleep_ms(20)
    return False


def _change_one_digit(path: Path) -> None:
    text = path.read_text("ascii")
    at = text.index('"lease.granted"')
    digit = next(index for index in range(at, len(text)) if text[index].isdigit())
    changed = str((int(text[digit]) + 1) % 10)
    path.write_text(text[:digit] + changed + text[digit + 1 :], "ascii")


def _list(missing: list[str]) -> str:
    return f", but not: {', '.join(missing)}" if missing else ""


def main() -> int:
    """The demonstration; the exit status, 1 where anything was not as it should be."""
    teller = Teller(9)
    print("A fabric of its own is started: ledger, admission, audit, two nodes.", flush=True)
    started_ms = _clock.boot_ms()
    faults = {"node-n2": BROKEN}
    fabric = LocalFabric(nodes=2, memory_bytes=NODE_BYTES, block_bytes=64 * MIB, faults=faults)
    with fabric:
        took_s = (_clock.boot_ms() - started_ms) / 1000
        print(f"Memory and blocks are ready after {took_s:.1f} s.", flush=True)
        Demo(fabric, teller).run()
        pids = fabric.pids()
    left = sorted(name for name, pid in pids.items() if start_ticks(pid) is not None)
    if left or fabric.layout.state.parent.exists():
        teller.check(False, f"left behind are processes or files: {', '.join(left) or 'files'}")
    took_s = (_clock.boot_ms() - started_ms) / 1000
    if teller.faults:
        print(f"\n{teller.faults} thing(s) were NOT as they should be. ({took_s:.1f} s)")
        return 1
    print(f"\nEverything was as it should be, and nothing is left behind. ({took_s:.1f} s)")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(hold(sys.argv[1]) if len(sys.argv) > 1 else main())
