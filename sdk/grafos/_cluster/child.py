"""One process of the fabric: how it is started, heard, ended, and when it is started again.

Rules. A process is known by its pidfd from its start on, so a signal never reaches a stranger that
got its number. It inherits three pipes and its log, nothing else: one that brings the secret for
its first certificate, one on which it says once where it serves, and one whose end tells it that
its supervisor is gone. Whoever dies is started again after 0.1 s, then after twice that, up to 5 s;
one that has lived for 30 s has earned a fresh beginning.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos._cluster.layout import Layout
from grafos._cluster.logfile import open_log
from grafos._cluster.programs import Program, environment

BACK_OFF_MS_MIN: Final = 100
BACK_OFF_MS_MAX: Final = 5_000
FRESH_MS: Final = 30_000
ANNOUNCEMENT_BYTES_MAX: Final = 16_384


@dataclass(slots=True)
class BackOff:
    """When a process that died may be started again."""

    deaths: int = 0
    due_ms: int | None = None

    def died(self, *, started_ms: int, now_ms: int) -> int:
        """Note a death; the pause until the next start, in ms."""
        self.deaths = 1 if now_ms - started_ms >= FRESH_MS else self.deaths + 1
        pause_ms = min(BACK_OFF_MS_MAX, BACK_OFF_MS_MIN << min(self.deaths - 1, 16))
        self.due_ms = now_ms + pause_ms
        return pause_ms

    def take(self, now_ms: int) -> bool:
        """Whether it is to be started now; asked again, no."""
        if self.due_ms is None or now_ms < self.due_ms:
            return False
        self.due_ms = None
        return True


@dataclass(slots=True)
class Child:
    """A running process. Its owner closes it after its end."""

    program: Program
    process: subprocess.Popen[bytes]
    pidfd: int
    ready_fd: int
    """Reading end; -1 when the announcement has come."""
    secret_fd: int
    """Writing end; -1 when the secret is delivered."""
    started_ms: int
    http: str = ""
    endpoints: list[str] = field(default_factory=list)
    _heard: bytearray = field(default_factory=bytearray)

    @property
    def pid(self) -> int:
        return self.process.pid

    def deliver(self, secret: str) -> None:
        """Hand over the secret for its first certificate."""
        descriptor, self.secret_fd = self.secret_fd, -1
        try:
            with os.fdopen(descriptor, "wb") as pipe:
                pipe.write(secret.encode("ascii"))
        except BrokenPipeError:
            pass  # it is dead already; its pidfd says so next

    def hear(self) -> bool:
        """Read what it announces; True once that is complete."""
        part = os.read(self.ready_fd, ANNOUNCEMENT_BYTES_MAX)
        self._heard += part
        if not part or len(self._heard) > ANNOUNCEMENT_BYTES_MAX:
            self._stop_hearing()
            return False
        if b"\n" not in self._heard:
            return False
        self._stop_hearing()
        return self._understand(bytes(self._heard))

    def _understand(self, line: bytes) -> bool:
        try:
            said: dict[str, Any] = json.loads(line)
            self.http, self.endpoints = str(said["http"]), [str(e) for e in said["endpoints"]]
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def _stop_hearing(self) -> None:
        os.close(self.ready_fd)
        self.ready_fd = -1

    def signal(self, number: int) -> None:
        """Nothing, if it has ended."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass

    def reap(self) -> int:
        """Its exit status, after its end; closes everything that is left."""
        status = self.process.wait()
        for descriptor in (self.pidfd, self.ready_fd, self.secret_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.pidfd = self.ready_fd = self.secret_fd = -1
        return status


def start(
    program: Program, layout: Layout, parent_fd: int, given: Mapping[str, str], now_ms: int
) -> Child:
    """Start one process; its secret is delivered afterwards."""
    state = layout.service_state(program.name)
    log = open_log(layout.log(program.name))
    ready_reading, ready_writing = os.pipe()
    secret_reading, secret_writing = os.pipe()
    try:
        process = subprocess.Popen(
            [
                sys.executable, "-m", program.module, "--state-dir", str(state), *program.flags,
                "--ready-fd", str(ready_writing), "--secret-fd", str(secret_reading),
                "--exit-with-parent-fd", str(parent_fd),
            ],
            pass_fds=[ready_writing, secret_reading, parent_fd],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=state,
            env=environment(given, program.fault),
            start_new_session=True,
        )  # fmt: skip
    except OSError:
        os.close(ready_reading)
        os.close(secret_writing)
        raise
    finally:
        for descriptor in (log, ready_writing, secret_reading):
            os.close(descriptor)
    pidfd = os.pidfd_open(process.pid)
    return Child(program, process, pidfd, ready_reading, secret_writing, now_ms)
