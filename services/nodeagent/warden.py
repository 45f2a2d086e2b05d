"""The warden's process: takes everything back at its deadline, or when the agent is gone.

It is small, has no keys and starts in a blink, and it needs nobody: it holds a duplicate of every
lease's memory and can cut it to nothing while the agent hangs, is stopped or is dead.

Rules. When to take what is `grafos_core.warden`'s to say. How is written here, in one order: close
the cells of the gate page, kill the front if the agent is lost, truncate, measure, write it down,
and only then tell. What is written down and not yet read by the next agent keeps this process
alive; with nothing left to tell it ends. However it ends, nothing stays open behind it.

    control ► warden   hold + memfd · raise · drop · front + pidfd · ping · bye
    warden ► control   held, raised, dropped (each to its question) · taken
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafos_core.failure import FabricError
from grafos_core.lease import LeaseId
from grafos_core.warden import AGENT_SILENT_MS_MAX, TakeBack, WardenCore
from services.nodeagent.devices.memory import measure
from services.nodeagent.gatepage import CellState, GatePage
from services.nodeagent.ipc import Link, LinkClosed, Message, close_all
from services.nodeagent.wardenlog import BATCH_MAX, Journal, Taken, short_path
from services.runtime import faults
from services.runtime.faults import fault

NS_PER_MS: Final = 1_000_000
POLL_MS_MAX: Final = 1_000
"""A wait does not count the time that the machine is suspended, deadlines do: so look again."""
AWAY_MS_MAX: Final = 1_500
"""Who did not look for longer was suspended, stopped or starved, and the agent perhaps with him."""
FRONT_EXIT_MS_MAX: Final = 1_000
"""For a killed front to be gone; its memory is truncated in any case."""
PEERS_MAX: Final = 4
"""Next agents that may speak at a time; there is one, and a few that died while asking."""
EMPTY_LEASE: Final = bytes(16)


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def boot_ms() -> int:
    return boot_ns() // NS_PER_MS


@dataclass(slots=True)
class Kept:
    """What the warden has of one lease, beside what the core knows."""

    slot: int
    epoch: int
    deadline_ms: int
    device: str
    fd: int | None


class Warden:
    """One agent's warden. `run` returns when there is nothing left to hold or to tell."""

    def __init__(
        self,
        link: Link,
        gate: GatePage,
        folder: Path,
        boot_epoch: int,
        *,
        silent_ms_max: int,
        control_pid: int | None = None,
    ) -> None:
        self._link: Link | None = link
        self._gate = gate
        self._looked_ms = boot_ms()
        self._core = WardenCore(self._looked_ms, silent_ms_max=silent_ms_max)
        self._journal = Journal(folder, boot_epoch)
        self._kept: dict[str, Kept] = {}
        self._taken: dict[str, Taken] = {}
        self._slots: dict[int, str] = {}
        self._front_pidfd: int | None = None
        self._control_pidfd = _control_pidfd(link, control_pid)
        self._folder, self._socket_name = folder, f"{boot_epoch}.sock"
        self._listener = _listener(folder, self._socket_name)
        self._peers: list[Link] = []
        self._ended = False

    def run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        finally:
            if not self._ended:
                self._lose_control()
            self._gate.close_all_warden()
            (self._folder / self._socket_name).unlink(missing_ok=True)

    def _turn(self) -> None:
        """Wait until something is said or due; what is due comes first."""
        ready = self._wait()
        now_ms = boot_ms()
        away_ms, self._looked_ms = now_ms - self._looked_ms, now_ms
        if away_ms > AWAY_MS_MAX:
            self._core.slept(away_ms - POLL_MS_MAX, now_ms)
        due = self._core.tick(now_ms)
        if self._core.agent_is_lost and self._link is not None:
            self._end_control()  # it was silent: stopped or stuck, and must not wake up and go on
        self._take(due)
        if self._link is not None and self._link.fileno() in ready:
            self._hear_control()
        if self._listener.fileno() in ready:
            self._accept()
        for peer in [peer for peer in self._peers if peer.fileno() in ready]:
            self._hear_peer(peer)
        if self._core.agent_is_lost and not self._taken:
            self._end()  # nothing to tell anybody
        elif self._core.agent_is_lost and not (self._folder / self._socket_name).exists():
            self._ended = True  # the node's state was deleted: nobody will ever come and ask

    def _wait(self) -> set[int]:
        poll = select.poll()
        for fd in self._fds():
            poll.register(fd, select.POLLIN)
        timeout_ms = self._core.timeout_ms(boot_ms())
        exact_ms: float = POLL_MS_MAX if timeout_ms is None else min(timeout_ms, POLL_MS_MAX)
        if 0 < exact_ms < POLL_MS_MAX:
            exact_ms -= boot_ns() % NS_PER_MS / NS_PER_MS
        return {fd for fd, _ in poll.poll(exact_ms)}

    def _fds(self) -> list[int]:
        links = [link for link in (self._link, *self._peers) if link is not None]
        return [self._listener.fileno(), *(link.fileno() for link in links)]

    # Control

    def _hear_control(self) -> None:
        assert self._link is not None
        try:
            received = self._link.receive(0)
            if received is None:
                return
            self._core.agent_heard(boot_ms())
            self._obey(*received)
        except LinkClosed:
            self._lose_control()

    def _obey(self, message: Message, fds: list[int]) -> None:
        match message.get("op"):
            case "hold":
                self._hold(message, fds)
                return
            case "front":
                self._watch_front(fds)
                return
            case "raise":
                self._raise(message)
            case "drop":
                self._drop(message)
            case "ping":
                self._reply(message, {"op": "pong"})
            case "bye":
                self._bye()
        close_all(fds)

    def _hold(self, message: Message, fds: list[int]) -> None:
        lease_id, slot, epoch = message["lease"], message["slot"], message["epoch"]
        deadline_ms = message["deadline_ms"]
        before = self._kept.get(lease_id)
        if before is None:
            fd = fds.pop(0) if fds else None
            kept = Kept(slot, epoch, deadline_ms, message["device"], fd)
            self._kept[lease_id], self._slots[slot] = kept, lease_id
        close_all(fds)
        due = self._core.hold(
            lease_id, slot=slot, epoch=epoch, deadline_ms=deadline_ms, now_ms=boot_ms()
        )
        self._take([each for each in due if each.lease_id not in self._taken])
        if lease_id in self._taken:
            self._reply(message, {"op": "gone", "lease": lease_id})
            return
        self._open_cell(lease_id, deadline_ms)
        self._reply(message, {"op": "held", "lease": lease_id})

    def _raise(self, message: Message) -> None:
        lease_id = message["lease"]
        stands_ms = self._core.raise_deadline(lease_id, message["deadline_ms"], boot_ms())
        if stands_ms is not None:
            self._open_cell(lease_id, stands_ms)
        self._reply(message, {"op": "raised", "lease": lease_id, "deadline_ms": stands_ms})

    def _open_cell(self, lease_id: str, deadline_ms: int) -> None:
        kept = self._kept[lease_id]
        kept.deadline_ms = max(kept.deadline_ms, deadline_ms)
        self._gate.write_warden(
            kept.slot,
            CellState.OPEN,
            kept.epoch,
            kept.deadline_ms * NS_PER_MS,
            bytes.fromhex(lease_id),
        )

    def _drop(self, message: Message) -> None:
        lease_id = message["lease"]
        self._core.drop(lease_id)
        self._taken.pop(lease_id, None)
        kept = self._kept.pop(lease_id, None)
        if kept is not None and self._slots.get(kept.slot) == lease_id:
            del self._slots[kept.slot]
            self._gate.write_warden(kept.slot, CellState.FREE, 0, 0, EMPTY_LEASE)
        if kept is not None and kept.fd is not None:
            os.close(kept.fd)
        self._reply(message, {"op": "dropped", "lease": lease_id})

    def _watch_front(self, fds: list[int]) -> None:
        if self._front_pidfd is not None:
            os.close(self._front_pidfd)
        self._front_pidfd = fds.pop(0) if fds else None
        close_all(fds)

    def _bye(self) -> None:
        """Control goes in good order if nothing is held; otherwise it goes like any other."""
        if self._kept:
            self._lose_control()
        else:
            self._end()

    def _end(self) -> None:
        """What a warden before this one wrote into the same journal stays for the next agent."""
        self._ended = True
        if not self._journal.is_inherited:
            self._journal.remove()

    def _lose_control(self) -> None:
        self._take(self._core.agent_lost(boot_ms()))

    def _reply(self, question: Message, answer: Message) -> None:
        if self._link is not None:
            self._link.reply(question, answer)

    # Taking back

    def _take(self, due: Sequence[TakeBack]) -> None:
        """The order is the point. Nothing in here waits for control."""
        lost_ns = boot_ns()
        if self._core.agent_is_lost and self._link is not None:
            self._gate.close_all_warden()
            self._link.close()
            self._link = None
            self._end_front()
        if not due:
            return
        for each in due:
            self._gate.close_warden(each.slot)
        errors = {each.lease_id: self._truncate(each.lease_id) for each in due}
        entries = [self._entry(each, errors[each.lease_id], lost_ns) for each in due]
        try:
            self._journal.append(entries)
        except OSError as error:
            print(f"warden: the journal cannot be written: {error}", file=sys.stderr, flush=True)
        for entry in entries:
            self._taken[entry.lease_id] = entry
            self._tell(entry)

    def _end_control(self) -> None:
        """Of an agent that may still live. One that hung up by itself is not in here."""
        self._gate.close_all_warden()
        if self._control_pidfd is not None and self._link is not None:
            _kill(self._control_pidfd)

    def _end_front(self) -> None:
        if self._front_pidfd is not None:
            _kill(self._front_pidfd)
            poll = select.poll()
            poll.register(self._front_pidfd, select.POLLIN)
            poll.poll(FRONT_EXIT_MS_MAX)

    def _truncate(self, lease_id: LeaseId) -> str:
        """The name of the error, or nothing."""
        fd = self._kept[lease_id].fd
        if fd is None:
            return ""
        try:
            fault("warden.take")
            os.ftruncate(fd, 0)
        except OSError as error:
            return str(error)
        return ""

    def _entry(self, due: TakeBack, error: str, lost_ns: int) -> Taken:
        kept = self._kept[due.lease_id]
        since_ns = kept.deadline_ms * NS_PER_MS if due.cause == "deadline" else lost_ns
        late_us = max(0, boot_ns() - since_ns) // 1000
        measured: dict[str, int | bool | str] = {}
        if error:
            measured["error"] = error
        if kept.fd is not None:
            try:
                # Whether its descriptor left the agent only control knows; it says so in the end.
                measured |= measure(kept.fd, exported=True)
            except OSError as wrong:
                measured["error"] = str(wrong)
        return Taken(due.lease_id, due.slot, due.epoch, due.cause, kept.device, measured, late_us)

    def _tell(self, entry: Taken) -> None:
        """Without waiting: an agent that does not read finds out by the gate and by its tick."""
        if self._link is None:
            return
        try:
            self._link.send({"op": "taken", **entry.value()}, timeout_ms=0)
        except LinkClosed:
            pass  # if it is really closed, the next turn sees the end of file

    # The next agent

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if len(self._peers) >= PEERS_MAX or _peer(sock)[1] != os.geteuid():
            sock.close()
            return
        self._peers.append(Link(sock, fds_max=BATCH_MAX))

    def _hear_peer(self, peer: Link) -> None:
        """A next agent speaks: then ours is over, whether it knows it or not."""
        try:
            received = peer.receive(0)
            if received is None:
                return
            message, fds = received
            close_all(fds)
            self._end_control()
            self._lose_control()
            if message.get("op") == "fetch":
                self._hand_over(peer, int(message["from"]))
            elif message.get("op") == "done":
                self._forget_all()
                peer.send({"op": "bye"})
        except (LinkClosed, FabricError, KeyError, TypeError, ValueError):
            peer.close()
            self._peers.remove(peer)

    def _hand_over(self, peer: Link, start: int) -> None:
        entries = list(self._taken.values())
        batch = entries[start : start + BATCH_MAX]
        values, fds = [], []
        for entry in batch:
            fd = self._kept[entry.lease_id].fd
            values.append({**entry.value(), "fd": fd is not None})
            fds += [] if fd is None else [fd]
        more = start + len(batch) < len(entries)
        peer.send({"op": "taken", "entries": values, "more": more}, fds)

    def _forget_all(self) -> None:
        for lease_id in list(self._taken):
            self._core.drop(lease_id)
            kept = self._kept.pop(lease_id)
            if kept.fd is not None:
                os.close(kept.fd)
        self._taken.clear()
        self._journal.remove()


def _peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of whoever made the other end."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", data)
    return pid, uid


def _control_pidfd(link: Link, pid: int | None) -> int | None:
    """If it still lives; its pid cannot have been given away while the link is open."""
    if pid is None:
        with socket.socket(fileno=os.dup(link.fileno())) as sock:
            pid, _ = _peer(sock)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if _is_closed(link):
        os.close(pidfd)
        return None
    return pidfd


def _is_closed(link: Link) -> bool:
    poll = select.poll()
    poll.register(link.fileno(), 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was faster


def _listener(folder: Path, name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (folder / name).unlink(missing_ok=True)
    with short_path(folder, name) as path:
        sock.bind(path)
    sock.listen(PEERS_MAX)
    return sock


def _prepare_process() -> None:
    """Be hard to end and quick to run. Each is welcome and none is needed."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # only control says when
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for attempt in (
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most)),
        lambda: os.setpriority(os.PRIO_PROCESS, 0, -10),
        lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)),
        lambda: Path("/proc/self/oom_score_adj").write_text("-900"),
    ):
        try:
            attempt()
        except (OSError, ValueError):
            pass  # not our right on this machine


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="services.nodeagent.warden", description=__doc__)
    parser.add_argument("--link", type=int, required=True, help="descriptor of the link to control")
    parser.add_argument("--gate", type=int, required=True, help="descriptor of the gate page")
    parser.add_argument(
        *("--state", "--state-dir"), type=Path, required=True, help="the agent's state folder"
    )
    parser.add_argument("--parent", type=int, help="control's pid, if another made the link")
    parser.add_argument("--boot-epoch", type=int, required=True)
    parser.add_argument("--silent-ms-max", type=int, default=AGENT_SILENT_MS_MAX)
    parser.add_argument("--development", action="store_true", help="allow faults on purpose")
    flags = parser.parse_args(arguments)
    _prepare_process()
    faults.arm_from_environment(os.environ, development=flags.development)
    os.set_inheritable(flags.gate, False)
    Warden(
        Link.from_fd(flags.link),
        GatePage.attach(flags.gate),
        flags.state / "warden",
        flags.boot_epoch,
        silent_ms_max=flags.silent_ms_max,
        control_pid=flags.parent,
    ).run()


if __name__ == "__main__":
    main(sys.argv[1:])
