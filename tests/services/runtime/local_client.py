"""A client process to be killed: it begins a stream, says so, and stays; or forks before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grafos_core import spiffe
from grafos_proto.v1 import node_pb2, node_pb2_grpc
from grafos_proto.wire.credentials import IdentityFiles, PeerChannel


def main(folder: str, endpoint: str, peer: str, what: str) -> None:
    files = IdentityFiles(Path(folder))
    channel = PeerChannel(endpoint, files, spiffe.parse_id(peer))
    stub = node_pb2_grpc.NodeServiceStub(channel.get())
    request = node_pb2.ReadRequest(lease_id="a" * 32, epoch=7, length=1)
    answers = stub.ReadStream(request, timeout=60)
    next(iter(answers))
    if what == "fork" and os.fork() == 0:
        del answers
        channel.close()  # neither says anything on the parent's connection
        sys.stdin.buffer.read()  # lives on until the test ends
        os._exit(0)
    print("begun", flush=True)
    if what == "fork":
        for _ in answers:  # still ours after all that the child did
            print("more", flush=True)
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
