"""Starting a supervisor, waiting until its fabric is ready, and ending it again.

Rules. The supervisor is a process of its own session: what is typed at the terminal does not reach
it. It says once, on a pipe, that its fabric is ready or why it cannot be. It is ended by its pidfd,
after its start time was compared, so that no stranger with its old number is ever signalled.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos._clock import boot_ms
from grafos._cluster.description import start_ticks
from grafos._cluster.layout import PORT_BASE_DEFAULT, Layout
from grafos._cluster.logfile import last_words, open_log
from grafos._cluster.programs import environment
from grafos._cluster.telephone import ask
from grafos_core import failure
from grafos_core.failure import FabricError

READY_MS_MAX: Final = 60_000
END_MS_MAX: Final = 40_000
"""Three groups of processes are stopped one after another, each within 8 s, and 5 s if killed."""
REPORT_BYTES_MAX: Final = 16_384


@dataclass(frozen=True, slots=True)
class Wanted:
    """What fabric to start."""

    nodes: int = 1
    memory_bytes: int = 0
    """Of each node; 0: a fair part of what this machine has."""
    block_bytes: int = 0
    """Of each node; 0: as its state was made with, else 256 MiB."""
    trust_domain: str = ""
    """Empty: as its state was made with, else grafos.local."""
    tcp: bool = False
    port_base: int = PORT_BASE_DEFAULT
    join_listen: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    clear_proved_clean: bool = False
    ephemeral: bool = False

    def flags(self) -> list[str]:
        made = [
            "--nodes", str(self.nodes), "--memory-bytes", str(self.memory_bytes),
            "--block-bytes", str(self.block_bytes), "--trust-domain", self.trust_domain,
            "--port-base", str(self.port_base), "--join-listen", self.join_listen,
        ]  # fmt: skip
        made += ["--tcp"] if self.tcp else []
        made += ["--clear-proved-clean"] if self.clear_proved_clean else []
        made += ["--ephemeral"] if self.ephemeral else []
        for flag, pairs in (("--fault", self.faults), ("--module", self.modules)):
            for name, value in pairs.items():
                made += [flag, f"{name}={value}"]
        return made


@dataclass(slots=True)
class Launched:
    """A supervisor on its way."""

    process: subprocess.Popen[bytes]
    layout: Layout
    ready_fd: int

    def wait_ready(self, timeout_ms: int = READY_MS_MAX) -> dict[str, Any]:
        """What it says when its fabric is ready; raises with its reason when it cannot be."""
        line = self._line(boot_ms() + timeout_ms)
        if line.get("ready"):
            return line
        code = str(line.get("code", "NOT_READY"))
        raise failure.of(code, f"the fabric did not start: {line.get('why', '')}")

    def _line(self, until_ms: int) -> dict[str, Any]:
        data = bytearray()
        poller = select.poll()
        poller.register(self.ready_fd, select.POLLIN)
        while not data.endswith(b"\n"):
            if not poller.poll(max(0, until_ms - boot_ms())):
                raise failure.of("DEADLINE", why_not_ready(self.layout))
            part = os.read(self.ready_fd, REPORT_BYTES_MAX)
            if not part:
                why = last_words(self.layout.supervisor_log)
                raise failure.of("NOT_READY", f"the supervisor ended at its start: {why}")
            data += part
        os.close(self.ready_fd)
        self.ready_fd = -1
        said: dict[str, Any] = json.loads(data)
        return said

    def stop(self) -> None:
        """End it again, ready or not."""
        start = start_ticks(self.process.pid)
        if start is not None:
            end(self.process.pid, start)

    def close(self) -> None:
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1


def command(layout: Layout, wanted: Wanted) -> list[str]:
    """How the supervisor of this fabric is started."""
    return [
        sys.executable, "-m", "grafos._cluster",
        "--state", str(layout.state), "--run", str(layout.run), *wanted.flags(),
    ]  # fmt: skip


def launch(layout: Layout, wanted: Wanted, *, parent_fd: int | None = None) -> Launched:
    """Start a supervisor in the background. `parent_fd`: a pipe whose end ends it."""
    layout.prepare()
    log = open_log(layout.supervisor_log)
    reading, writing = os.pipe()
    pass_fds = [writing] + ([parent_fd] if parent_fd is not None else [])
    flags = ["--ready-fd", str(writing)]
    if parent_fd is not None:
        flags += ["--exit-with-parent-fd", str(parent_fd)]
    try:
        process = subprocess.Popen(
            [*command(layout, wanted), *flags],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=layout.state,
            env=environment(os.environ, ""),
            start_new_session=True,
        )
    finally:
        os.close(log)
        os.close(writing)
    return Launched(process, layout, reading)


def why_not_ready(layout: Layout) -> str:
    """Which gates are closed, in words."""
    try:
        status = ask(layout.supervisor_socket, {"op": "status"})
    except FabricError:
        return "the fabric is not ready, and its supervisor does not answer"
    waits = [_waits(each, layout) for each in status["processes"] if each["closed_gates"]]
    return f"not ready yet: {'; '.join(waits)}"


def _waits(process: Mapping[str, Any], layout: Layout) -> str:
    """Its closed gates; of one that has not come so far, the last that it has logged."""
    name = str(process["name"])
    text = f"{name} ({', '.join(f'{gate}: {why}' for gate, why in process['closed_gates'].items())}"
    if "http" not in process["endpoints"]:
        said = last_words(layout.log(name)) or "nothing"
        text += f", started {process['restarts'] + 1} times, said last: {said}"
    return text + ")"


def end(pid: int, start: int, timeout_ms: int = END_MS_MAX) -> str:
    """End the supervisor with this number and start time: `gone`, `stopped` or `killed`."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return "gone"
    try:
        if start_ticks(pid) != start:
            return "gone"
        for number, patience_ms in ((signal.SIGTERM, timeout_ms), (signal.SIGKILL, 5_000)):
            signal.pidfd_send_signal(pidfd, number)
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            if poller.poll(patience_ms):
                return "stopped" if number == signal.SIGTERM else "killed"
    except ProcessLookupError:
        return "gone"
    finally:
        os.close(pidfd)
    raise failure.of("DEADLINE", f"the supervisor (pid {pid}) does not end")
