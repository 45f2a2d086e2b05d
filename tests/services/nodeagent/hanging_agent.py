"""An agent that starts a warden, gives it leases and then does nothing more, like one that hangs.

It says `ready`, the warden's pid and its front's pid, and from then on at most sends pings: on its
standard input stands how many milliseconds are to pass between two of them, 0 for none.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
from pathlib import Path

from services.nodeagent.ipc import Link, pair
from services.nodeagent.warden import boot_ms


def spawn_warden(
    gate_fd: int, state: Path, boot_epoch: int, silent_ms_max: int
) -> tuple[Link, subprocess.Popen[bytes]]:
    ours, theirs = pair()
    command = [
        *(sys.executable, "-m", "services.nodeagent.warden"),
        *("--link", str(theirs.fileno()), "--gate", str(gate_fd), "--state", str(state)),
        *("--boot-epoch", str(boot_epoch), "--silent-ms-max", str(silent_ms_max)),
    ]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno(), gate_fd], start_new_session=True)
    theirs.close()
    return Link(ours), process


def hold(link: Link, lease_id: str, slot: int, ttl_ms: int, fd: int | None) -> dict[str, object]:
    message = {
        "op": "hold", "id": slot + 1, "lease": lease_id, "slot": slot, "epoch": 7, "kind": "mem",
        "deadline_ms": boot_ms() + ttl_ms, "device": "block" if fd is None else "memfd",
    }  # fmt: skip
    link.send(message, [] if fd is None else [fd])
    received = link.receive(10_000)
    assert received is not None
    return received[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gate", type=int)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--silent-ms-max", type=int)
    parser.add_argument("--lease", action="append", default=[], help="id:slot:ttl_ms:fd")
    flags = parser.parse_args()
    link, warden = spawn_warden(flags.gate, flags.state, 1, flags.silent_ms_max)
    front = subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL)
    link.send({"op": "front", "pid": front.pid}, [os.pidfd_open(front.pid)])
    for lease in flags.lease:
        lease_id, slot, ttl_ms, fd = lease.split(":")
        answer = hold(link, lease_id, int(slot), int(ttl_ms), int(fd) if fd else None)
        assert answer["op"] == "held", answer
        if fd:
            os.close(int(fd))
    print("ready", warden.pid, front.pid, flush=True)
    pause_ms = int(sys.stdin.readline())
    for _ in range(60_000 // pause_ms if pause_ms else 0):
        link.send({"op": "ping"})
        threading.Event().wait(pause_ms / 1000)
    threading.Event().wait(60)


if __name__ == "__main__":
    main()
