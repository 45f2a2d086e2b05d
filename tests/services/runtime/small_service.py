"""The smallest service: a node that answers reads. Its `start` may be told to fail."""

from __future__ import annotations

import sys
import threading
from typing import Any

from grafos_core import failure
from grafos_proto.v1 import node_pb2_grpc
from services.runtime import flags
from services.runtime.process import Process, run_service
from services.runtime.server import Listener, Service
from tests.services.runtime.world import Node

FLAGS = [
    flags.Flag("refuse", "do not start", "no", flags.choice("no", "yes")),
    flags.Flag("slow-ms", "how long a read takes", "0", flags.number(0, 10_000)),
]


def start(process: Process) -> None:
    if process.values.refuse == "yes":
        raise failure.of("STORAGE", "record 7 is damaged")
    node = Node()
    if process.values.slow_ms:

        def slow(request: Any, context: Any) -> None:
            process.log.info("read.entered")
            threading.Event().wait(process.values.slow_ms / 1000)

        node.behaviour = slow
    service = Service(
        "grafos.v1.NodeService", node_pb2_grpc.add_NodeServiceServicer_to_server, node
    )
    process.on_stop(lambda: process.log.info("stopped.first"))
    process.on_stop(lambda: process.log.info("stopped.last"))
    process.serve([Listener(process.values.listen, [service])], process.identity())


if __name__ == "__main__":
    read = flags.read("small", "Answers reads.", FLAGS)
    sys.exit(run_service(Process("small", read), start))
