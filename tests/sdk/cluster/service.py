"""A service that does nothing but what every service does round its work.

It takes the flags that the supervisor gives, asks for its certificate with its secret, says where
it serves, answers readiness, and ends on SIGTERM or with its parent. Started as
`python -m tests.sdk.cluster.service`, in the place of the four real ones.

What it is told through the faults of its process, which is free text here:
    usage       exits with status 2 at once     refuse   exits with status 1 each time
    stubborn    does not end on SIGTERM         mute     never says that it is ready
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from grafos._clock import wall_ms
from grafos_proto.wire.credentials import IdentityFiles
from grafos_proto.wire.identity import read_spawn_secret, request_identity


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        mute = os.environ.get("GRAFOS_FAULT") == "mute"
        gate = {"open": False, "why": "told to be mute"} if mute else {"open": True}
        kinds = {"mem": {"ready": not mute, "gates": {"device": gate}}}
        body = json.dumps({"gates": {"serving": gate}, "kinds": kinds}).encode()
        self.send_response(503 if mute else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody asked."""


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("state-dir", "identity-socket", "listen"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("ready-fd", "secret-fd", "exit-with-parent-fd"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given, _ = parser.parse_known_args()
    fault = os.environ.get("GRAFOS_FAULT", "")
    if fault == "usage":
        print("this flag does not fit", file=sys.stderr)
        return 2
    if fault == "refuse":
        line = {"event": "service.refused", "traceback": ["STORAGE: the disk is not ours"]}
        print(json.dumps(line), file=sys.stderr)
        return 1
    files = IdentityFiles(Path(given.state_dir) / "identity")
    secret = read_spawn_secret(given.secret_fd)
    files.save(
        request_identity(given.identity_socket, files.key(), secret=secret, now_ms=wall_ms())
    )
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    said = {"http": f"127.0.0.1:{server.server_address[1]}", "endpoints": [given.listen]}
    os.write(given.ready_fd, json.dumps(said).encode() + b"\n")
    os.close(given.ready_fd)
    print(
        json.dumps({"event": "started", "id": str(files().identity)}), file=sys.stderr, flush=True
    )
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if fault == "stubborn" else stopped.set())
    threading.Thread(target=_parent, args=(given.exit_with_parent_fd, stopped), daemon=True).start()
    stopped.wait()
    return 0


def _parent(descriptor: int, stopped: threading.Event) -> None:
    os.read(descriptor, 1)
    stopped.set()


if __name__ == "__main__":
    sys.exit(main())
