"""The counter of a node agent: the process that holders talk to.

It has what holders need, their bytes and nothing else: duplicates of the memory of bound leases
and the keys of bound blocks, no signing key, no record, no say. Control starts it, tells it what
is open and kills it when it does not let go; whoever is killed here loses connections, not leases.

    python -m services.nodeagent.front --link <fd> --gate <fd> --listen <endpoint> …

Rules. It ends with control: by the kernel's signal when the thread that started it ends, and at the
end of file on the link. It writes no file but the sockets that it listens on.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import node_pb2_grpc
from grafos_proto.wire.credentials import CHAIN_FILE, Credentials, IdentityFiles
from services.nodeagent.datapath import DataPath, LeaseTable
from services.nodeagent.dataport import DataPort, Terms
from services.nodeagent.frontblock import BlockShelf
from services.nodeagent.frontdesk import ControlLine, FrontDesk
from services.nodeagent.gatepage import GatePage
from services.nodeagent.handover import HandoverServer, Offers
from services.nodeagent.holders import NodeServicer, Places
from services.nodeagent.ipc import Link
from services.nodeagent.sessions import Sessions
from services.nodeagent.sharedesk import ShareDesk
from services.nodeagent.shares import Shares
from services.runtime import faults
from services.runtime.clock import SYSTEM
from services.runtime.logs import Log
from services.runtime.server import Limits, Listener, Server, Service, serve

_PR_SET_PDEATHSIG: Final = 1
STOP_MS: Final = 1_000
"""For calls in flight when the agent drains."""
LIMITS: Final = replace(Limits(), calls_per_second_max=20_000, calls_per_identity_max=96)
"""One holder may move small blocks as fast as one core serves them."""


def main() -> None:
    flags = _flags()
    die_with_parent(flags.parent)
    faults.arm_from_environment(os.environ, development=flags.development)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold tenants' bytes
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # control drains us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Front(flags).run()


class Front:
    """The rooms of this process and how they hang together."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._identity = RenewedFiles(Path(flags.identity_dir))
        self._log = Log("front", level=flags.log_level)
        self._link = Link.from_fd(flags.link)
        table = LeaseTable()
        line = ControlLine(self._link, table)
        self._sessions = Sessions(line)
        self._shares = Shares(table, line.prove_root, SYSTEM)
        gate = GatePage.attach(flags.gate)
        self._data = DataPath(gate, table, SYSTEM.boot_ns, line.device_failed, self._shares)
        self._line, self._offers = line, Offers()
        self._server: Server | None = None
        self._data_path = Path(flags.handover).with_name("data.sock")
        terms = Terms(self._identity().identity.trust_domain, SYSTEM)
        self._data_port = 0
        self._port = DataPort(self._data, self._sessions, self._identity, terms, self._shares)
        shelf = BlockShelf(Path(flags.block_file), flags.block_bytes)
        self._desk = FrontDesk(
            line, self._data, self._sessions, shelf.storage, self._stop, self._shares
        )

    def run(self) -> None:
        reader = threading.Thread(target=self._link.serve, args=[self._desk.handle], name="link")
        reader.start()
        self._link.send({"op": "hello"})
        self._desk.serve.wait()
        HandoverServer(self._offers, self._sessions, self._line, SYSTEM.boot_ms).start(
            Path(self._flags.handover)
        )
        self._port.listen_unix(self._data_path)
        self._data_port = self._listen_for_remotes()
        self._server = serve(
            [self._listener()],
            provider=self._identity,
            trust_domain=self._identity().identity.trust_domain,
            log=self._log,
        )
        endpoint = self._server.endpoints[0]
        self._link.send({"op": "ready", "endpoint": endpoint, "data_port": self._data_port})
        reader.join()
        os._exit(0)  # control is gone: nothing here is worth another moment

    def _listener(self) -> Listener:
        places = Places(
            self._flags.handover, LIMITS.calls_max // 2, str(self._data_path), self._data_port
        )
        servicer = NodeServicer(
            self._line, self._data, self._sessions, self._offers, places, SYSTEM.boot_ms,
            ShareDesk(self._shares, self._data, self._line.share_ended),
        )  # fmt: skip
        service = Service(
            "grafos.v1.NodeService", node_pb2_grpc.add_NodeServiceServicer_to_server, servicer
        )
        return Listener(self._flags.listen, [service], limits=LIMITS)

    def _listen_for_remotes(self) -> int:
        """The number of the data port beside a network listener; 0: all holders are local."""
        if self._flags.listen.startswith("unix:"):
            return 0
        host = self._flags.listen.rpartition(":")[0].strip("[]")
        try:
            return self._port.listen_tls(host, self._flags.data_port)
        except FabricError:  # another program has the number that was ours
            return self._port.listen_tls(host, 0)

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop(STOP_MS)
        self._port.stop()


class RenewedFiles:
    """Our certificate, which control renews on disk: read again when its file is another one."""

    def __init__(self, folder: Path) -> None:
        self._files, self._chain = IdentityFiles(folder), folder / CHAIN_FILE
        self._read = 0

    def __call__(self) -> Credentials:
        written = self._chain.stat().st_mtime_ns
        if written != self._read:
            self._files.load()
            self._read = written
        return self._files()


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that started it ends: no front without control."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise failure.of("INTERNAL", os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:  # it ended before we had asked for the signal
        os._exit(0)


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="front", description="Started by the node agent.")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--link", type=int, required=True)
    parser.add_argument("--gate", type=int, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--identity-dir", required=True)
    parser.add_argument("--handover", required=True)
    parser.add_argument("--data-port", type=int, default=0)
    parser.add_argument("--block-file", default="")
    parser.add_argument("--block-bytes", type=int, default=0)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--development", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
