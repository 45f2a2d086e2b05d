"""A fabric as it stands on many machines: each service in a place of its own, TCP between them.

    hub (a bridge) ── eth0 ledger    10.77.0.11   one user, one network namespace, one folder
                   ── eth0 admission 10.77.0.12   …
                   ── eth0 audit · n1 · n2 · holder · operator

Rules. With walls each member is another user in another network namespace, and all cables end in
the namespace `hub`: the machine's own network is not touched. Without walls all are this user on
the loopback device, and nothing needs root. Certificates are issued by the fabric's authority into
each member's own folder. Whatever was made is taken down, in the order in which it can be; what
runs is ended by its process number.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from grafos._authority import Authority, identity_issue

ROOT: Final = Path(__file__).resolve().parents[2]
DOMAIN: Final = "grafos.local"
UID_FIRST: Final = 61_100
"""Nobody's: no entry in the password file is needed."""
PORTS: Final = (15_000, 32_000)
START_S: Final = 40
STOP_S: Final = 20
ANSWER_S: Final = 60
MEMORY_BYTES: Final = 8 << 20
BLOCK_BYTES: Final = 1 << 20
SPIFFE: Final = {
    "ledger": "service/ledger", "admission": "service/admission", "audit": "service/audit",
    "n1": "node/n1", "n2": "node/n2", "holder": "tenant/acme/holder/worker",
    "operator": "operator/ops",
}  # fmt: skip
SERVED: Final = ("ledger", "admission", "audit", "n1", "n2")


@dataclass(slots=True)
class Member:
    """One place: a user, a network, a folder."""

    name: str
    uid: int
    address: str
    folder: Path
    namespace: str = ""
    """Empty: the network of this process."""
    ports: tuple[int, int] = (7440, 7441)
    process: subprocess.Popen[bytes] | None = None
    visitors: list[Visitor] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.ports[0]}"

    @property
    def control(self) -> str:
        return f"{self.address}:{self.ports[1]}"

    @property
    def identity(self) -> Path:
        return self.folder / "identity"

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text("utf-8", "replace")[-3_000:] if path.exists() else ""


class Town:
    def __init__(self, folder: Path, *, walls: bool) -> None:
        self.folder, self.walls = folder, walls
        self.hub = f"grafos-{os.getpid()}-hub"
        self.members: dict[str, Member] = {}
        ports = quiet_ports(2 * len(SPIFFE))
        for number, name in enumerate(SPIFFE):
            self.members[name] = Member(
                name,
                UID_FIRST + number if walls else os.getuid(),
                f"10.77.0.{11 + number}" if walls else "127.0.0.1",
                folder / name,
                f"grafos-{os.getpid()}-{name}" if walls else "",
                (7440, 7441) if walls else (ports[2 * number], ports[2 * number + 1]),
            )

    # building

    def build(self) -> None:
        self._issue()
        if self.walls:
            self._lay_cables()

    def _issue(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        Authority.init(self.folder / "ca", now_ms=now_ms, trust_domain=DOMAIN)
        for name, path in SPIFFE.items():
            member = self.members[name]
            member.folder.mkdir(mode=0o700)
            identity_issue(
                self.folder / "ca", f"spiffe://{DOMAIN}/{path}", member.identity, now_ms=now_ms
            )
            if self.walls:
                for each in (member.folder, *member.folder.rglob("*")):
                    os.chown(each, member.uid, member.uid)

    def _lay_cables(self) -> None:
        _ip("netns", "add", self.hub)
        _ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.hub, "link", "set", "br0", "up")
        for member in self.members.values():
            cable, inside = f"to-{member.name}", member.namespace
            _ip("netns", "add", inside)
            _ip("-n", self.hub, "link", "add", cable, "type", "veth",
                "peer", "name", "eth0", "netns", inside)  # fmt: skip
            _ip("-n", self.hub, "link", "set", cable, "master", "br0", "up")
            _ip("-n", inside, "address", "add", f"{member.address}/24", "dev", "eth0")
            _ip("-n", inside, "link", "set", "lo", "up")
            _ip("-n", inside, "link", "set", "eth0", "up")

    def cut(self, name: str) -> None:
        """Pull the cable of one member at the hub's end."""
        _ip("-n", self.hub, "link", "set", f"to-{name}", "down")

    def heal(self, name: str) -> None:
        _ip("-n", self.hub, "link", "set", f"to-{name}", "up")

    # programs

    def start(self, *names: str) -> None:
        """Start these services, or all, and wait until each serves."""
        waiting = [(name, self._start(self.members[name])) for name in names or SERVED]
        for name, reading in waiting:
            self._wait_ready(self.members[name], reading)

    def _start(self, member: Member) -> int:
        reading, writing = os.pipe()
        with (member.folder / "log").open("ab") as log:
            member.process = subprocess.Popen(
                self._words(member, "-m", *self._service(member), "--ready-fd", str(writing)),
                cwd="/", env=self._environment(), pass_fds=[writing], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        os.close(writing)
        return reading

    def _service(self, member: Member) -> list[str]:
        is_node = member.name in ("n1", "n2")
        ledger, audit = self.members["ledger"].endpoint, self.members["audit"].endpoint
        words = [
            "services.nodeagent" if is_node else f"services.{member.name}",
            "--state-dir", str(member.folder / "state"), "--identity-dir", str(member.identity),
            "--listen", member.endpoint, "--trust-domain", DOMAIN, "--log-level", "warning",
        ]  # fmt: skip
        if member.name != "audit":
            words += ["--audit", audit]
        if is_node or member.name == "admission":
            words += ["--ledger", ledger, "--control-listen", member.control]
        if is_node:
            words += ["--memory-bytes", str(MEMORY_BYTES), "--block-bytes", str(BLOCK_BYTES)]
        return words

    def _wait_ready(self, member: Member, reading: int) -> None:
        with os.fdopen(reading) as pipe:
            said = select.select([pipe], [], [], START_S)[0] and pipe.readline()
        assert said, f"{member.name} does not serve: {member.log()}"

    def visit(self, name: str, *, at: str = "") -> Visitor:
        """A program of this member that does what it is told; perhaps at another's place."""
        who, place = self.members[name], self.members[at or name]
        as_there = Member(who.name, who.uid, "", who.folder, place.namespace)
        words = self._words(as_there, "-m", "tests.integration.visitor")
        environment = self._environment() | {
            "GRAFOS_ENDPOINT": self.members["admission"].endpoint,
            "GRAFOS_IDENTITY_DIR": str(who.identity),
        }
        visitor = Visitor(words, environment)
        who.visitors.append(visitor)
        return visitor

    def _words(self, member: Member, *words: str) -> list[str]:
        program = [sys.executable, *words]
        if not self.walls:
            return program
        needed = {ROOT, Path(sys.prefix), Path(sys.base_prefix), member.folder}
        return [
            "nsenter", f"--net=/run/netns/{member.namespace}", "--",
            "unshare", "--mount", "--propagation", "private", "--",
            sys.executable, str(ROOT / "tests/integration/walled.py"), str(member.uid),
            *sorted(map(str, needed)), "--", *program,
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        roots = [ROOT, *(ROOT / each for each in ("core", "protos", "sdk"))]
        return kept | {"PYTHONPATH": os.pathsep.join(map(str, roots)), "PYTHONSAFEPATH": "1",
                       "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"}  # fmt: skip

    # the end

    def stop(self) -> dict[str, int]:
        """SIGTERM, agents first; the exit statuses of services."""
        for member in self.members.values():
            for visitor in member.visitors:
                visitor.close()
        statuses = {}
        for name in reversed(SERVED):
            process = self.members[name].process
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    statuses[name] = process.wait(STOP_S)
        return statuses

    def tear_down(self) -> None:
        """Whatever state it is in, nothing of it is left."""
        for member in self.members.values():
            for visitor in member.visitors:
                visitor.close()
            if member.process is not None and member.process.poll() is None:
                member.process.kill()
                member.process.wait(STOP_S)
        if self.walls:
            for name in (*(member.namespace for member in self.members.values()), self.hub):
                self._remove_namespace(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_namespace(self, name: str) -> None:
        if not Path("/run/netns", name).exists():
            return
        found = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        for pid in map(int, found.stdout.split()):  # a warden waits for its next agent
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=False)


def quiet_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to whoever asks for any."""
    dice = random.Random(os.getpid())
    with contextlib.ExitStack() as held:
        found: list[int] = []
        while len(found) < count:
            port = dice.randrange(*PORTS)
            trial = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                trial.bind(("127.0.0.1", port))
                found.append(port)
        return found


@contextlib.contextmanager
def town_in(folder: Path, *, walls: bool) -> Iterator[Town]:
    folder.mkdir()
    town = Town(folder, walls=walls)
    try:
        town.build()
        yield town
    finally:
        town.tear_down()


class Visitor:
    """A program that does one thing per line, and says what came of it."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            words, cwd="/", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __call__(self, do: str, **fields: Any) -> Any:
        """What it answers; a typed failure comes as `Refused`."""
        self.tell(do, **fields)
        return self.hear(do)

    def tell(self, do: str, **fields: Any) -> None:
        """Without waiting for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, do: str) -> Any:
        """The next answer."""
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], ANSWER_S)[0]
        line = self.process.stdout.readline() if ready else b""
        assert line, f"{do}: no answer within {ANSWER_S} s"
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"], answer["code"], answer["why"])
        return answer["is"]

    def close(self) -> None:
        """End of input ends it; if it is late, it is killed."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()


class Refused(Exception):
    """A typed failure at a visitor's."""

    def __init__(self, failure: str, code: str, why: str) -> None:
        super().__init__(f"{failure} ({code}): {why}")
        self.failure, self.code = failure, code


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=20)
