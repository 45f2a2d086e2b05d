"""Named places where a service can be made to fail on purpose, to see that it fails well.

    GRAFOS_FAULT="teardown.erase:EIO,ledger.commit:ENOSPC:3"

makes every erasure fail with EIO, and the third commit with ENOSPC; `EIO:1-2` is the first two
alone. What may stand after the name:

    an errno's name    the point raises that OSError
    kill               the process is killed, as by SIGKILL
    stop               the process is stopped, as by SIGSTOP, until somebody continues it
    hang=<ms>          the point takes that long

Rules. Only in development mode; in production a service with faults set refuses to start. A name
that is not in `POINTS` is refused at start with the list: a mistyped fault must not look like a
test that passed.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from grafos_core import failure
from grafos_core.failure import invariant

VARIABLE: Final = "GRAFOS_FAULT"
HANG_MS_MAX: Final = 600_000
FAULTS_MAX: Final = 64

POINTS: Final[dict[str, str]] = {
    "ledger.open": "opening the event table",
    "ledger.replay": "reading the event table back at start",
    "ledger.commit": "committing a batch of events, before the transaction ends",
    "ledger.committed": "after the transaction ended, before anybody is told",
    "ledger.watch": "sending events to a watcher",
    "admission.decide": "deciding on a request",
    "admission.mint": "minting a token",
    "admission.commit": "handing a batch to the ledger",
    "audit.append": "storing records of a chain",
    "audit.acknowledge": "after records are stored, before they are acknowledged",
    "bind.device": "creating what is leased",
    "bind.warden": "telling the warden of a lease",
    "bind.answer": "after a bind is durable, before the holder is told",
    "teardown.dead": "closing the gate of a lease",
    "teardown.quiesce": "waiting for operations in flight",
    "teardown.reap": "ending what uses the lease",
    "teardown.erase": "erasing what was leased",
    "teardown.measure": "measuring that it is erased",
    "teardown.seal": "sealing the record of a teardown",
    "memory.create": "reserving the pages of a memory lease",
    "memory.erase": "cutting a memory lease to nothing",
    "memory.measure": "measuring that a memory lease is gone",
    "block.read": "reading blocks from the disk",
    "block.write": "writing blocks to the disk",
    "block.flush": "syncing the disk under a block lease",
    "block.erase": "zeroing the extent of a block lease",
    "block.measure": "reading the zeroed extent back",
    "surface.head": "writing a head slot of the durable surface",
    "surface.head_sync": "syncing the head slots of the durable surface",
    "surface.append": "appending to the durable surface",
    "surface.sync": "syncing the durable surface",
    "surface.segment": "making the next segment of the durable surface",
    "warden.journal": "writing the warden's journal",
    "warden.take": "taking a lease back in the warden",
    "front.read": "reading for a holder",
    "front.write": "writing for a holder",
    "spool.send": "sending records to the collector",
    "receipt.send": "signing and sending receipts",
    "credit.send": "sending receipts to the ledger",
    "register.send": "renewing the node's registration",
    "identity.renew": "renewing a certificate",
}
"""Name to what happens there. Whoever adds a point describes it here."""


@dataclass(slots=True)
class _Armed:
    action: str
    first: int
    """0: at every passage; else from this one on, to `last`."""
    last: int
    passages: int = 0


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()


def arm(text: str, *, development: bool) -> None:
    """Set the faults that `text` names in the place of those set before."""
    parsed = parse(text)
    if parsed and not development:
        raise failure.of("OPTION", f"{VARIABLE} is for development mode only")
    with _lock:
        _armed.clear()
        _armed.update(parsed)


def arm_from_environment(environment: Mapping[str, str], *, development: bool) -> None:
    arm(environment.get(VARIABLE, ""), development=development)


def parse(text: str) -> dict[str, _Armed]:
    """The faults in `text`; whatever is not well formed is refused with what would be."""
    found: dict[str, _Armed] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, rest = part.partition(":")
        action, _, when = rest.partition(":")
        if name not in POINTS:
            raise failure.of("OPTION", f"no fault point of this name; there are: {names()}")
        _check_action(action)
        found[name] = _Armed(action, *_passages(name, when))
    if len(found) > FAULTS_MAX:
        raise failure.of("OPTION", f"at most {FAULTS_MAX} faults")
    return found


def _passages(name: str, when: str) -> tuple[int, int]:
    """`3`, or `1-2`, or nothing for all."""
    first, _, last = when.partition("-")
    numbers = (first or "0", last or first or "0")
    if not all(each.isascii() and each.isdigit() for each in numbers):
        raise failure.of("OPTION", f"{name}: passages are numbers: 3, or 1-2")
    if when and not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise failure.of("OPTION", f"{name}: the passage is a number from 1 on")
    return int(numbers[0]), int(numbers[1])


def _check_action(action: str) -> None:
    if action in {"kill", "stop"} or action in errno.errorcode.values():
        return
    hang_ms = action.removeprefix("hang=")
    is_number = action.startswith("hang=") and hang_ms.isascii() and hang_ms.isdigit()
    if is_number and int(hang_ms) <= HANG_MS_MAX:
        return
    raise failure.of("OPTION", f"an errno's name, kill, stop or hang=<ms up to {HANG_MS_MAX}>")


def names() -> str:
    return ", ".join(sorted(POINTS))


def described() -> str:
    """One line per point, for `--help`."""
    return "\n".join(f"  {name:20} {what}" for name, what in sorted(POINTS.items()))


def fault(name: str) -> None:
    """A place that can be made to fail. Costs one look at an empty table when nothing is set."""
    if not _armed:
        return
    invariant(name in POINTS, f"fault point {name} is not described")
    with _lock:
        armed = _armed.get(name)
        if armed is None:
            return
        armed.passages += 1
        if armed.first and not armed.first <= armed.passages <= armed.last:
            return
    _perform(armed.action, name)


def _perform(action: str, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action.startswith("hang="):
        time.sleep(int(action.removeprefix("hang=")) / 1000)  # noqa: TID251 - the fault itself
    else:
        number = getattr(errno, action)
        raise OSError(number, f"{os.strerror(number)} (fault point {name})")
