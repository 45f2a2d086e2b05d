"""Whatever becomes of the agent, its leases end: in time, measured, and told to the next one."""

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.nodeagent.devices.memory import MemoryDevice
from services.nodeagent.gatepage import CellState, GatePage, Verdict
from services.nodeagent.ipc import Link, close_all
from services.nodeagent.orphans import recover_leftovers
from services.nodeagent.warden import boot_ms, boot_ns
from services.nodeagent.wardenlog import (
    Journal,
    LivingWarden,
    Taken,
    boot_epochs,
    read_journal,
)
from tests.services.nodeagent.hanging_agent import hold, spawn_warden

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
A, B, C = "aa" * 16, "bb" * 16, "cc" * 16
INCARNATION = secrets.token_hex(16)
"""Its own: other tests have memory, too, and may run at the same time."""
WAIT_S = 5.0
FAR_MS = 600_000


def wait_until(true: Callable[[], bool]) -> None:
    """At most `WAIT_S`: what is tested is that it happens, how fast is printed."""
    until_ns, pause = boot_ns() + int(WAIT_S * 1e9), threading.Event()
    while not true():
        assert boot_ns() < until_ns, "it did not happen in time"
        pause.wait(0.0005)


def has_ended(pidfd: int, wait_s: float = WAIT_S) -> bool:
    return bool(select.select([pidfd], [], [], wait_s)[0])


def memory(lease_id: str, size_bytes: int = MIB) -> int:
    return MemoryDevice(1 << 40).create(lease_id, INCARNATION, size_bytes)


@pytest.fixture
def gate() -> Iterator[GatePage]:
    gate = GatePage.create(8)
    yield gate
    gate.close()


def open_gate(gate: GatePage, lease_id: str, slot: int) -> None:
    gate.write_control(slot, CellState.OPEN, 7, 2**62, bytes.fromhex(lease_id))


def verdict(gate: GatePage, lease_id: str, slot: int) -> Verdict:
    return gate.verdict(slot, bytes.fromhex(lease_id), 7, boot_ns())


# Spoken to by its agent


@dataclass
class Ward:
    """A warden whose agent this process is."""

    link: Link
    process: subprocess.Popen[bytes]
    state: Path
    fds: list[int] = field(default_factory=list)

    def ask(self, op: str, **fields: object) -> dict[str, object]:
        self.link.send({"op": op, "id": 99, **fields})
        return self.hear()

    def hear(self) -> dict[str, object]:
        received = self.link.receive(int(WAIT_S * 1000))
        assert received is not None
        return received[0]


@pytest.fixture
def ward(gate: GatePage, tmp_path: Path) -> Iterator[Ward]:
    link, process = spawn_warden(gate.fd, tmp_path, 1, FAR_MS)
    ward = Ward(link, process, tmp_path)
    assert ward.ask("ping")["op"] == "pong", "it is there, so that deadlines below are long enough"
    yield ward
    process.kill()
    process.wait()
    link.close()


def test_it_opens_its_cell_when_it_holds_and_frees_it_when_dropped(
    gate: GatePage, ward: Ward
) -> None:
    fd = memory(A)
    open_gate(gate, A, 3)
    assert verdict(gate, A, 3) is Verdict.CLOSED
    assert hold(ward.link, A, 3, FAR_MS, fd)["op"] == "held"
    assert verdict(gate, A, 3) is Verdict.OPEN
    assert ward.ask("drop", lease=A)["op"] == "dropped"
    assert verdict(gate, A, 3) is Verdict.CLOSED
    assert os.fstat(fd).st_size == MIB, "a lease that control tears down is control's to truncate"
    os.close(fd)


def test_at_the_deadline_it_truncates_measures_and_tells(gate: GatePage, ward: Ward) -> None:
    fd = memory(A)
    open_gate(gate, A, 3)
    assert hold(ward.link, A, 3, 100, fd)["op"] == "held"
    taken = ward.hear()
    assert os.fstat(fd).st_size == 0
    assert verdict(gate, A, 3) is Verdict.CLOSED
    assert (taken["op"], taken["lease"], taken["cause"]) == ("taken", A, "deadline")
    assert taken["measured"]["clean"] is True  # type: ignore[index]
    print(f"\ndeadline to gone: {taken['late_us']} us")
    assert taken["late_us"] < WAIT_S * 1_000_000  # type: ignore[operator]
    journal = read_journal(ward.state / "warden" / "1.journal")
    assert [entry.value() for entry in journal] == [
        {key: value for key, value in taken.items() if key != "op"}
    ]
    os.close(fd)


def test_a_raised_deadline_stands_and_is_never_lowered(gate: GatePage, ward: Ward) -> None:
    fd = memory(A)
    open_gate(gate, A, 3)
    hold(ward.link, A, 3, 300, fd)
    later_ms = boot_ms() + FAR_MS
    assert ward.ask("raise", lease=A, deadline_ms=later_ms)["deadline_ms"] == later_ms
    assert ward.ask("raise", lease=A, deadline_ms=boot_ms() + 10)["deadline_ms"] == later_ms
    assert ward.link.receive(400) is None
    assert os.fstat(fd).st_size == MIB
    assert verdict(gate, A, 3) is Verdict.OPEN, "its cell has the later deadline too"
    assert ward.ask("raise", lease=B, deadline_ms=later_ms)["deadline_ms"] is None
    os.close(fd)


def test_what_is_overdue_when_it_comes_is_taken_at_once(gate: GatePage, ward: Ward) -> None:
    fd = memory(A)
    assert hold(ward.link, A, 3, -1, fd)["op"] == "taken"
    assert ward.hear()["op"] == "gone"
    assert os.fstat(fd).st_size == 0
    os.close(fd)


def test_one_that_falls_due_does_not_touch_its_neighbours(gate: GatePage, ward: Ward) -> None:
    fds = [memory(lease_id) for lease_id in (A, B)]
    open_gate(gate, B, 4)
    hold(ward.link, A, 3, 50, fds[0])
    assert hold(ward.link, B, 4, FAR_MS, fds[1])["op"] in {"held", "taken"}
    wait_until(lambda: os.fstat(fds[0]).st_size == 0)
    assert os.fstat(fds[1]).st_size == MIB
    wait_until(lambda: verdict(gate, B, 4) is Verdict.OPEN)
    close_all(fds)


def test_bye_with_nothing_held_ends_it_and_leaves_no_files(gate: GatePage, ward: Ward) -> None:
    fd = memory(A)
    hold(ward.link, A, 3, FAR_MS, fd)
    ward.ask("drop", lease=A)
    ward.link.send({"op": "bye"})
    assert ward.process.wait(WAIT_S) == 0
    assert list((ward.state / "warden").iterdir()) == []
    os.close(fd)


def test_bye_with_leases_is_no_way_out(gate: GatePage, ward: Ward) -> None:
    fd = memory(A)
    hold(ward.link, A, 3, FAR_MS, fd)
    ward.link.send({"op": "bye"})
    wait_until(lambda: os.fstat(fd).st_size == 0)
    assert ward.process.poll() is None, "it stays to tell of it"
    os.close(fd)


def test_nothing_held_and_no_agent_ends_it(gate: GatePage, ward: Ward) -> None:
    assert ward.ask("ping")["op"] == "pong"
    ward.link.close()
    assert ward.process.wait(WAIT_S) == 0


def test_signals_meant_for_everybody_do_not_end_it(gate: GatePage, ward: Ward) -> None:
    assert ward.ask("ping")["op"] == "pong"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        ward.process.send_signal(number)
    assert ward.ask("ping")["op"] == "pong"


def test_a_message_that_makes_no_sense_ends_everything_and_not_nothing(
    gate: GatePage, ward: Ward
) -> None:
    fd = memory(A)
    hold(ward.link, A, 3, FAR_MS, fd)
    open_gate(gate, A, 3)
    ward.link.send({"op": "hold", "lease": A})
    wait_until(lambda: os.fstat(fd).st_size == 0)
    assert verdict(gate, A, 3) is Verdict.CLOSED
    os.close(fd)


# Without its agent


@dataclass
class Agent:
    process: subprocess.Popen[str]
    warden_pidfd: int
    front_pidfd: int


@pytest.fixture
def agent(gate: GatePage, tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    started: list[Agent] = []

    def start(*leases: str, fds: list[int], silent_ms_max: int = FAR_MS, ping_ms: int = 0) -> Agent:
        arguments = [part for lease in leases for part in ("--lease", lease)]
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.services.nodeagent.hanging_agent"),
                *("--gate", str(gate.fd), "--state", str(tmp_path)),
                *("--silent-ms-max", str(silent_ms_max), *arguments),
            ],
            pass_fds=[gate.fd, *fds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/core:{ROOT}/protos"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        _, warden_pid, front_pid = process.stdout.readline().split()
        process.stdin.write(f"{ping_ms}\n")
        process.stdin.flush()
        agent = Agent(process, os.pidfd_open(int(warden_pid)), os.pidfd_open(int(front_pid)))
        started.append(agent)
        return agent

    yield start
    for each in started:
        for pidfd in (each.warden_pidfd, each.front_pidfd):
            if not has_ended(pidfd, 0):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        each.process.kill()
        each.process.communicate()


def test_a_deadline_is_kept_though_the_agent_hangs(
    gate: GatePage, agent: Callable[..., Agent]
) -> None:
    fds = [memory(A), memory(B)]
    start_ms = boot_ms()
    open_gate(gate, A, 3)  # first: where all is slow its deadline may pass before the agent stands
    open_gate(gate, B, 4)
    agent(f"{A}:3:1500:{fds[0]}", f"{B}:4:{FAR_MS}:{fds[1]}", fds=fds)
    assert os.fstat(fds[0]).st_size == MIB or boot_ms() - start_ms > 1500
    wait_until(lambda: os.fstat(fds[0]).st_size == 0)
    assert verdict(gate, A, 3) is Verdict.CLOSED
    assert os.fstat(fds[1]).st_size == MIB
    assert verdict(gate, B, 4) is Verdict.OPEN
    close_all(fds)


def test_a_killed_agent_loses_everything_at_once_and_the_next_one_is_told(
    gate: GatePage, agent: Callable[..., Agent], tmp_path: Path
) -> None:
    fds = [memory(lease_id, 64 * MIB) for lease_id in (A, B)]
    killed = agent(
        f"{A}:3:{FAR_MS}:{fds[0]}", f"{B}:4:{FAR_MS}:{fds[1]}", f"{C}:5:{FAR_MS}:", fds=fds
    )
    for slot, lease_id in ((3, A), (4, B), (5, C)):
        open_gate(gate, lease_id, slot)
        assert verdict(gate, lease_id, slot) is Verdict.OPEN
    killed_ns = boot_ns()
    killed.process.kill()
    wait_until(lambda: all(os.fstat(fd).st_size == 0 for fd in fds))
    print(f"\nagent killed to 2 x 64 MiB gone: {(boot_ns() - killed_ns) / 1e6:.1f} ms")
    assert has_ended(killed.front_pidfd)
    for slot, lease_id in ((3, A), (4, B), (5, C)):
        assert verdict(gate, lease_id, slot) is Verdict.CLOSED

    folder = tmp_path / "warden"
    assert boot_epochs(folder) == [1]
    warden = LivingWarden.find(folder, 1)
    assert warden is not None
    found = {taken.lease_id: (taken, fd) for taken, fd in warden.fetch()}
    assert set(found) == {A, B, C}
    for lease_id, original in ((A, fds[0]), (B, fds[1])):
        taken, fd = found[lease_id]
        assert fd is not None
        assert os.fstat(fd).st_ino == os.fstat(original).st_ino
        assert (taken.cause, taken.epoch, taken.measured["clean"]) == ("agent_lost", 7, True)
        os.close(fd)
    assert found[C][1] is None
    assert found[C][0].device == "block"
    assert not has_ended(killed.warden_pidfd, 0), "it stays until all of it is sealed"
    assert read_journal(folder / "1.journal") == [taken for taken, _ in found.values()]

    assert len(warden.fetch()) == 3, "asked again it says the same: the first asker may have died"
    warden.done()
    assert has_ended(killed.warden_pidfd)
    assert list(folder.iterdir()) == []
    assert LivingWarden.find(folder, 1) is None
    close_all(fds)


def test_a_warden_does_not_outlive_the_state_of_its_node(
    gate: GatePage, agent: Callable[..., Agent], tmp_path: Path
) -> None:
    """Else one would be left of every fabric that is thrown away while a slice is fenced."""
    fd = memory(A)
    killed = agent(f"{A}:3:{FAR_MS}:{fd}", fds=[fd])
    killed.process.kill()
    wait_until(lambda: os.fstat(fd).st_size == 0)
    assert not has_ended(killed.warden_pidfd, 1.5), "the next agent may come"
    shutil.rmtree(tmp_path / "warden")
    assert has_ended(killed.warden_pidfd)
    os.close(fd)


def test_an_agent_that_was_stopped_too_long_is_dead(
    gate: GatePage, agent: Callable[..., Agent]
) -> None:
    fd = memory(A)
    stopped = agent(f"{A}:3:{FAR_MS}:{fd}", fds=[fd], silent_ms_max=1_000, ping_ms=100)
    open_gate(gate, A, 3)
    assert not has_ended(stopped.warden_pidfd, 1.5)
    assert os.fstat(fd).st_size == MIB, "an agent that pings keeps its leases"
    stopped.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: os.fstat(fd).st_size == 0)
    assert verdict(gate, A, 3) is Verdict.CLOSED
    assert stopped.process.wait(WAIT_S) == -signal.SIGKILL, "it must never wake up again"
    assert has_ended(stopped.front_pidfd)
    os.close(fd)


def test_the_next_agent_ends_one_that_is_only_stopped(
    gate: GatePage, agent: Callable[..., Agent], tmp_path: Path
) -> None:
    fd = memory(A)
    stopped = agent(f"{A}:3:{FAR_MS}:{fd}", fds=[fd])
    stopped.process.send_signal(signal.SIGSTOP)
    warden = LivingWarden.find(tmp_path / "warden", 1)
    assert warden is not None
    ((taken, copy),) = warden.fetch()
    assert taken.cause == "agent_lost"
    assert os.fstat(fd).st_size == 0
    assert stopped.process.wait(WAIT_S) == -signal.SIGKILL
    assert copy is not None
    warden.done()
    close_all([fd, copy])


def test_a_next_agent_that_dies_while_asking_hurts_nobody(
    gate: GatePage, agent: Callable[..., Agent], tmp_path: Path
) -> None:
    fd = memory(A)
    killed = agent(f"{A}:3:{FAR_MS}:{fd}", fds=[fd])
    killed.process.kill()
    for _ in range(8):
        first = LivingWarden.find(tmp_path / "warden", 1)
        assert first is not None
        first._link.send({"op": "fetch", "from": 0})
        first.close()
    second = LivingWarden.find(tmp_path / "warden", 1)
    assert second is not None
    ((taken, copy),) = second.fetch()
    assert taken.lease_id == A
    second.done()
    assert has_ended(killed.warden_pidfd)
    close_all([fd] + ([] if copy is None else [copy]))


def test_when_both_are_dead_the_memory_is_found_at_its_holders(
    gate: GatePage, agent: Callable[..., Agent]
) -> None:
    """One holder has the descriptor, the other only a mapping of it."""
    fds = {A: memory(A), B: memory(B)}
    holder = "import mmap, os, sys; fd = int(sys.argv[1]); m = mmap.mmap(fd, 4096); "
    holders = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                holder + after + "print(1, flush=True); sys.stdin.read()",
                str(fd),
            ],
            pass_fds=[fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for fd, after in ((fds[A], ""), (fds[B], "os.close(fd); "))
    ]
    for each in holders:
        assert each.stdout is not None
        each.stdout.readline()
    watch = {lease_id: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY) for lease_id, fd in fds.items()}
    dead = agent(f"{A}:3:{FAR_MS}:{fds[A]}", f"{B}:4:{FAR_MS}:{fds[B]}", fds=list(fds.values()))
    signal.pidfd_send_signal(dead.warden_pidfd, signal.SIGKILL)
    assert has_ended(dead.warden_pidfd)
    dead.process.kill()
    assert all(os.fstat(fd).st_size == MIB for fd in watch.values()), "nobody took it back"
    assert recover_leftovers("ef" * 16).found == (), "another incarnation's is not ours"
    left = recover_leftovers(INCARNATION)
    reached = {each.lease_id for each in left.found if each.fd is not None}
    assert {each.lease_id for each in left.found} == {A, B}
    assert A in reached
    if os.geteuid() == 0:
        assert B in reached, "root reaches mappings too"
    for lease_id in reached:
        assert os.fstat(watch[lease_id]).st_size == 0
    for process in holders:
        process.communicate()
    close_all([*fds.values(), *watch.values(), *(each.fd for each in left.found if each.fd)])


# The journal


def taken(lease_id: str) -> Taken:
    return Taken(lease_id, 3, 7, "deadline", "memfd", {"clean": True, "st_size": 0}, 12)


def test_a_journal_is_read_as_it_was_written_and_across_wardens_of_one_boot(
    tmp_path: Path,
) -> None:
    first = Journal(tmp_path, 5)
    first.append([taken(A), taken(B)])
    second = Journal(tmp_path, 5)
    second.append([taken(C)])
    assert read_journal(second.path) == [taken(A), taken(B), taken(C)]
    assert (first.is_inherited, second.is_inherited) == (False, True)
    assert boot_epochs(tmp_path) == [5]
    assert second.path.stat().st_mode & 0o077 == 0


def test_a_torn_last_entry_is_passed_over_at_every_length(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 5)
    journal.append([taken(A)])
    whole = journal.path.stat().st_size
    journal.append([taken(B)])
    data = journal.path.read_bytes()
    for length in range(whole, len(data)):
        journal.path.write_bytes(data[:length])
        assert read_journal(journal.path) == [taken(A)]
    journal.path.write_bytes(data[: whole + 9] + b"\xff" + data[whole + 10 :])
    assert read_journal(journal.path) == [taken(A)]
    Journal(tmp_path, 5).append([taken(C)])
    assert read_journal(journal.path) == [taken(A), taken(C)], "the next warden goes on before it"


def test_a_warden_that_cannot_write_its_journal_still_takes_everything_back(
    gate: GatePage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = memory(A)
    (tmp_path / "warden").mkdir(mode=0o700)
    (tmp_path / "warden" / "1.journal").symlink_to("/dev/full")
    link, process = spawn_warden(gate.fd, tmp_path, 1, FAR_MS)
    hold(link, A, 3, FAR_MS, fd)
    link.close()
    wait_until(lambda: os.fstat(fd).st_size == 0)
    process.kill()
    process.wait()
    os.close(fd)
